"""`duet eval`: figures as JSON, the judges that are named, and exit statuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from duet_moe.cli import main
from duet_moe.eval_cli import SUITES
from duet_moe.evaluation import task as tasks


@pytest.fixture
def saved(tmp_path: Path, tiny_writer) -> str:
    tiny_writer.model.save_pretrained(tmp_path / "model")
    tiny_writer.tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def task_file(folder: Path, *metrics: str) -> str:
    path = folder / "task.yaml"
    entry = {
        "name": "mine", "version": 1, "suite": "own", "samples": 2, "max_new_tokens": 6,
        "metrics": dict.fromkeys(metrics, "higher"), "prompts": ["Hello there", "Tell me about the fox."],
    }  # fmt: skip
    path.write_text(yaml.safe_dump(entry))
    return str(path)


def evaluated(command: list[str], capsys: pytest.CaptureFixture) -> dict[tuple[str, str], dict]:
    """Run `duet eval --json` and return the figures by contestant and metric."""
    assert main(["eval", *command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert Path(answer["results"]).is_file() and Path(answer["report"]).is_file()
    return {(figure["contestant"], figure["metric"]): figure for figure in answer["figures"]}


def test_modes_are_compared_in_one_command(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    models = [f"{saved}:factual", f"{saved}:creative"]
    command = [*models, "--suite", task_file(tmp_path, "distinct_2", "words"), "--out", str(out), "--seed", "4"]
    found = evaluated(command, capsys)
    assert found.keys() == {(name, metric) for name in models for metric in ("distinct_2", "words")}
    # a greedy mode says the same twice
    assert found[models[0], "distinct_2"]["mean"] < found[models[1], "distinct_2"]["mean"]
    assert found[models[1], "distinct_2"]["difference"][0] > 0
    written = (out / "results.jsonl").read_bytes()
    assert evaluated(command, capsys) == found  # goes on, with nothing left to do
    assert (out / "results.jsonl").read_bytes() == written
    assert {path.name for path in out.iterdir()} >= {"report.html", "report.md", "mine.svg"}


def test_samples_and_judges_are_what_the_options_say(
    saved: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "training.txt").write_text("The fox ran over the hill and sang to the moon.\n")
    suite = task_file(tmp_path, "bits_per_character", "unseen_5grams", "words")
    command = [f"{saved}:creative", "--suite", suite, "--out", str(tmp_path / "out"), "--samples", "3"]
    judges = ["--evaluator", saved, "--training-text", str(tmp_path / "training.txt")]
    found = evaluated([*command, *judges], capsys)
    assert found[f"{saved}:creative", "bits_per_character"]["mean"] > 0
    assert (f"{saved}:creative", "unseen_5grams") in found
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 2 * 3
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"- evaluator: {saved}" in report and "training.txt" in report
    assert (f"{saved}:creative", "bits_per_character") not in evaluated(command, capsys)


def test_the_encoder_is_loaded_only_where_a_metric_needs_it(
    saved: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Encoder:
        name = "fake"

        def __init__(self) -> None:
            made.append(self)

        def embed(self, texts: list[str]) -> np.ndarray:
            return np.eye(len(texts))

    monkeypatch.setattr("duet_moe.evaluation.encoder.Encoder", Encoder)
    command = [f"{saved}:creative", "--out", str(tmp_path / "out"), "--suite"]
    evaluated([*command, task_file(tmp_path, "words")], capsys)
    assert not made
    found = evaluated([*command, task_file(tmp_path, "vendi")], capsys)
    assert len(made) == 1 and 1.0 < found[f"{saved}:creative", "vendi"]["mean"] <= 2.0


def test_costs_are_in_the_table(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    suite = task_file(tmp_path, "tokens_per_second", "weight_bytes", "peak_memory_bytes", "dollars_per_million_tokens")
    command = ["eval", f"{saved}:factual", "--suite", suite, "--out", str(tmp_path / "out")]
    assert main([*command, "--dollars-per-hour", "1.5"]) == 0
    shown = capsys.readouterr().out
    assert "tokens_per_second" in shown and "report.md" in shown
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    values = {entry["metric"]: entry["values"][0] for entry in scores}
    assert values["dollars_per_million_tokens"] == pytest.approx(1.5e6 / 3600 / values["tokens_per_second"])
    assert values["peak_memory_bytes"] > values["weight_bytes"] > 0


@pytest.mark.parametrize(
    "options",
    [["--suite", "creative"], ["--out", "x"], ["--suite", "poetry", "--out", "x"], ["--suite", "all", "--seed", "a"]],
)
def test_wrong_use_exits_with_2(options: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", "duet-mini", *options])
    assert stop.value.code == 2
    assert "usage: duet eval" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "options", "told"),
    [
        ("no-such-model", [], "no-such-model"),
        ("openai:nowhere#x", [], "http://"),
        ("duet-mini:voice-nobody", ["--store", "."], "nobody"),
        ("duet-mini", ["--samples", "0"], "samples=0"),
        ("duet-mini", ["--dollars-per-hour", "-1"], "above 0"),
        ("duet-mini", ["--training-text", "no-such-file"], "no-such-file"),
    ],
)
def test_a_failure_says_why_exits_with_1_and_leaves_nothing(
    model: str, options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert main(["eval", model, "--suite", "style", "--out", str(out), *options]) == 1
    assert told in capsys.readouterr().err
    assert not out.exists()


def test_the_help_names_every_suite() -> None:
    assert SUITES == tasks.SUITES
