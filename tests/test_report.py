"""The report: figures computed by hand, differences marked only where they are sure, nothing a text could break."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from duet_moe.evaluation.report import figures, report, summary

HOSTILE = "</pre><script>alert(1)</script>\n\n# Not a heading\n| not | a table |"
NAMES = ("base", "openai:http://x/v1#a|b$c$", "other")


def made(folder: Path, scores: list[dict], text: str = "Some answer.") -> Path:
    """Write what a run leaves: a line for each contestant, scores and settings."""
    names = list(dict.fromkeys(entry["contestant"] for entry in scores))
    rows = [
        {"contestant": name, "task": "mine", "index": 0, "sample": 0, "seed": 0, "prompt": "Say `this`", "text": text}
        for name in names
    ]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "scores.json").write_text(json.dumps(scores))
    settings = {
        "date": "2026-01-31",
        "seed": 0,
        "judges": {"evaluator": "judge <b>1</b>"},
        "environment": {"torch": "2.13"},
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder / "results.jsonl"


def entry(contestant: str, metric: str, values: list[float | None], direction: str = "higher") -> dict:
    return {
        "contestant": contestant, "task": "mine", "suite": "own", "version": 1, "metric": metric,
        "direction": direction, "values": values,
    }  # fmt: skip


def test_figures_are_means_with_intervals_over_prompts(tmp_path: Path) -> None:
    results = made(tmp_path, [entry("base", "distinct_2", [0.2, None, 0.4, 0.6]), entry("base", "words", [7.0])])
    many, one = figures(results)
    assert (many.mean, many.prompts, many.difference) == (pytest.approx(0.4), 3, None)
    assert 0.2 <= many.low < 0.4 < many.high <= 0.6
    assert (one.mean, one.low, one.high, one.prompts) == (7.0, None, None, 1)


def test_a_difference_is_paired_by_prompt(tmp_path: Path) -> None:
    base, other = [0.1, 0.9, 0.5, None], [0.2, 1.0, 0.6, 0.3]
    found = figures(made(tmp_path, [entry("base", "distinct_2", base), entry("other", "distinct_2", other)]))
    assert found[0].difference is None
    assert found[1].difference == pytest.approx((0.1, 0.1, 0.1))  # though the values themselves spread widely
    assert found[1].low < 0.3 < found[1].high


def test_only_sure_differences_are_bold(tmp_path: Path) -> None:
    scores = [
        entry("base", "distinct_2", [0.1, 0.2, 0.3, 0.2]),
        entry("base", "self_bleu", [0.1, 0.2, 0.3, 0.2], "lower"),
        entry("other", "distinct_2", [0.5, 0.7, 0.6, 0.8]),
        entry("other", "self_bleu", [0.3, 0.1, 0.2, 0.25], "lower"),
    ]
    text = report(made(tmp_path, scores)).read_text(encoding="utf-8")
    (difference,) = [line for line in text.splitlines() if line.startswith("| `other` |") and "+0.45" in line]
    sure, unsure = difference.split("|")[2:4]
    assert sure.strip().startswith("**+0.45 [") and "**" not in unsure
    assert "distinct 2 \u2191" in text and "self bleu \u2193" in text


def test_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    scores = [entry("base", "distinct_2", [0.1, 0.2]), entry("other", "words", [3.0, 4.0], "none")]
    lines = report(made(tmp_path, scores)).read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("| `base` | 0.15 [") and line.endswith("| \u2013 |") for line in lines)


def test_rounding_is_not_shown(tmp_path: Path) -> None:
    scores = [entry("base", "dispersion", [0.0, 1e-16]), entry("base", "words", [2.0, 2.0], "none")]
    lines = report(made(tmp_path, scores)).read_text(encoding="utf-8").splitlines()
    assert "| `base` | 0 | 2 |" in lines


def test_the_report_says_what_was_run_and_shows_answers(tmp_path: Path) -> None:
    text = report(made(tmp_path, [entry("base", "distinct_2", [0.1, 0.2])])).read_text(encoding="utf-8")
    for part in ("- seed: 0", "- evaluator: judge", "- torch: 2.13", "(mine.svg)", "Say  this ", "    Some answer."):
        assert part in text


def test_no_name_and_no_answer_breaks_the_page(tmp_path: Path) -> None:
    scores = [entry(name, "distinct_2", [0.1, 0.2, 0.4]) for name in NAMES]
    path = report(made(tmp_path, scores, HOSTILE))
    page = path.with_suffix(".html").read_text(encoding="utf-8")
    assert "<script>" not in page and "&lt;script&gt;" in page and "<b>" not in page
    assert "Not a heading</h1>" not in page and page.count("<table>") == 2
    tables = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert {line.count("|") for line in tables} == {3}


def test_plots_have_a_panel_for_each_metric_and_are_the_same_again(tmp_path: Path) -> None:
    scores = [entry(name, metric, [0.1, 0.2, 0.4]) for name in NAMES for metric in ("distinct_2", "self_bleu")]
    results = made(tmp_path, scores)
    report(results)
    first = (tmp_path / "mine.svg").read_bytes()
    report(results)
    assert (tmp_path / "mine.svg").read_bytes() == first
    ids = [node.get("id", "") for node in ElementTree.fromstring(first).iter()]
    assert sum(name.startswith("axes_") for name in ids) == 2
    assert not list(tmp_path.glob(".*"))  # nothing half-written stays


def test_a_report_may_stand_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path = report(made(tmp_path / "run", [entry("base", "distinct_2", [0.1, 0.2])]), tmp_path / "page")
    assert path == tmp_path / "page" / "report.md"
    assert {file.name for file in path.parent.iterdir()} == {"report.md", "report.html", "mine.svg"}


def test_the_summary_is_plain_data(tmp_path: Path) -> None:
    (row,) = json.loads(json.dumps(summary(made(tmp_path, [entry("base", "distinct_2", [0.1, 0.3])]))))
    assert (row["task"], row["contestant"], row["metric"], row["mean"]) == ("mine", "base", "distinct_2", 0.2)


def test_an_unfinished_run_has_no_report(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(FileNotFoundError, match="finish the run first"):
        report(tmp_path / "results.jsonl")
    assert [file.name for file in tmp_path.iterdir()] == ["results.jsonl"]
