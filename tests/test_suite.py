"""A run of a suite: hand-computed scores, and the same results however often it is interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from contestant_script import Measured, Scripted

from duet_moe.evaluation.contestants import Duet
from duet_moe.evaluation.cost import price_per_million
from duet_moe.evaluation.scores import METRICS, Answers, Judges, score
from duet_moe.evaluation.suite import read_results, run, voice_scorers
from duet_moe.evaluation.task import Task
from duet_moe.finetune.style_score import StyleScorer

ROOT = Path(__file__).resolve().parent.parent
LEXICAL = {"distinct_2": "higher", "repetition": "lower", "words": "none", "empty": "lower"}


def task_file(folder: Path, **changes: object) -> str:
    entry = {
        "name": "mine", "version": 1, "suite": "own", "samples": 5, "max_new_tokens": 6, "metrics": LEXICAL,
        "prompts": [f"Tell me of number {i}" for i in range(10)],
    }  # fmt: skip
    path = folder / "task.yaml"
    path.write_text(yaml.safe_dump(entry | changes))
    return str(path)


def scores_of(results: Path) -> dict[tuple[str, str], list]:
    entries = json.loads(results.with_name("scores.json").read_text())
    return {(entry["contestant"], entry["metric"]): entry["values"] for entry in entries}


def measured(texts: list[str], *metrics: str, gold: str | None = None, **judges: object) -> dict[str, float | None]:
    """Return the scores of one prompt's answers."""
    task = Task("t", 1, "s", ("p",), len(texts), 1, dict.fromkeys(metrics, "none"))
    rows = [{"text": text} for text in texts]
    return {name: values[0] for name, values in score(task, [Answers("p", rows, gold, Judges(**judges))]).items()}


class Encoder:
    def embed(self, texts: list[str]) -> np.ndarray:
        """Turn texts that begin alike to the same side."""
        return np.array([[1.0, 0.0] if text.startswith("a") else [0.0, 2.0] for text in texts])


class Evaluator:
    def bits_per_character(self, texts: list[str], prompts: list[str]) -> np.ndarray:
        assert all(text.strip() for text in texts) and set(prompts) == {"p"}
        return np.array([float(len(text)) for text in texts])


class Training:
    def unseen_share(self, text: str) -> float:
        return 0.5 if "new" in text else 0.0

    def longest_run(self, text: str) -> int:
        return len(text.split())


class Style:
    def share(self, texts: list[str]) -> float:
        return sum("!" in text for text in texts) / len(texts)


def test_lexical_scores_are_those_computed_by_hand() -> None:
    found = measured(["a b c", "a b d"], "distinct_2", "distinct_3", "repetition", "words", "empty")
    assert found == {"distinct_2": 3 / 4, "distinct_3": 1.0, "repetition": 0.0, "words": 3.0, "empty": 0.0}
    assert measured(["a b c d"] * 3, "self_bleu")["self_bleu"] == pytest.approx(1.0)
    alike, unlike = (measured(texts, "compression_ratio") for texts in (["the fox"] * 40, [os.urandom(200).hex()] * 1))
    assert alike["compression_ratio"] > 5 > unlike["compression_ratio"]


def test_semantic_scores_come_from_the_encoder() -> None:
    found = measured(["a", "another", "b", "c"], "vendi", "dispersion", encoder=Encoder())
    assert found["vendi"] == pytest.approx(2.0)
    assert found["dispersion"] == pytest.approx(4 / 6)
    assert measured(["a", "a"], "vendi", "dispersion", encoder=Encoder()) == pytest.approx(
        {"vendi": 1.0, "dispersion": 0.0}
    )


def test_quality_novelty_and_style_come_from_their_judges() -> None:
    texts = ["four", "sixsix"]
    assert measured(texts, "bits_per_character", evaluator=Evaluator()) == {"bits_per_character": 5.0}
    found = measured(["new one here", "old"], "unseen_5grams", "longest_copy", training=Training())
    assert found == {"unseen_5grams": 0.25, "longest_copy": 2.0}
    found = measured(["Ha!", "no", "no", "no"], "taken_for", voices={"volt": Style(), "zuzu": Style()})
    assert found == {"taken_for_volt": 0.25, "taken_for_zuzu": 0.25}


def test_without_its_judge_a_metric_is_left_out() -> None:
    assert measured(["a", "b"], *METRICS, "taken_for").keys() == {
        "distinct_2", "distinct_3", "self_bleu", "compression_ratio", "repetition", "words", "empty",
        "multiple_choice",
    }  # fmt: skip


def test_answers_without_a_word_count_as_empty_and_flatter_nothing() -> None:
    judges = {"encoder": Encoder(), "evaluator": Evaluator(), "training": Training(), "voices": {"volt": Style()}}
    some = measured(["a b", "", " \n", "..."], *METRICS, "taken_for", **judges)
    assert some["empty"] == 0.75 and some["distinct_2"] == 1.0 and some["bits_per_character"] == 3.0
    assert "self_bleu" not in some  # one text has nothing to be compared with
    none = measured(["", "..."], *METRICS, "taken_for", gold="a", **judges)
    assert none == {"empty": 1.0, "words": 0.5, "exact_match": 0.0, "multiple_choice": 0.0}


def test_an_answer_is_right_when_the_gold_one_stands_in_it() -> None:
    found = measured(["It is OSLO.", "Oslofjord", "", "Oslo"], "exact_match", gold="Oslo")
    assert found == {"exact_match": 0.5}


def test_style_consistency_leaves_out_texts_too_short_to_vary() -> None:
    sentence = "The old man walked slowly to the sea and said nothing at all. "
    same = measured([sentence * 10], "style_consistency")["style_consistency"]
    mixed = measured([sentence * 5 + "WOW!!! Buy now!!! You rock!!! Go go go!!! " * 6], "style_consistency")
    assert 1.0 >= same > mixed["style_consistency"]
    assert measured(["Too short to tell."], "style_consistency") == {}


def test_answers_are_judged_by_the_scorer_of_every_voice_that_takes_part(tmp_path: Path) -> None:
    loud = [f"WOW! Number {i} is great! Buy {i} now! You will love it!" for i in range(12)]
    calm = [f"The {i} houses stand by the river, and nobody has painted them for years." for i in range(12)]
    for name in ("loud", "plain"):
        (tmp_path / name).mkdir()
    StyleScorer.fit(loud, calm).save(tmp_path / "loud")
    contestants = [Duet(name, "duet-mini", "creative", name, tmp_path) for name in ("loud", "plain")]
    scorers = voice_scorers([*contestants, Duet("base", "duet-mini"), Scripted()])
    assert scorers.keys() == {"loud"}
    found = measured([loud[0], calm[0], loud[1], ""], "taken_for", voices=scorers)
    assert found == {"taken_for_loud": pytest.approx(2 / 3)}


def test_every_sample_is_a_line_and_every_prompt_a_number(tmp_path: Path) -> None:
    results = run([Scripted("a"), Scripted("b")], task_file(tmp_path), tmp_path / "out", seed=3, show=False)
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2 * 10 * 5
    first = rows[0]
    assert (first["contestant"], first["task"], first["index"], first["sample"]) == ("a", "mine", 0, 0)
    assert first["text"] == Scripted().write([first["prompt"]], [first["seed"]], 6)[0]
    values = scores_of(results)
    assert values["a", "distinct_2"] == values["b", "distinct_2"] and len(values["a", "distinct_2"]) == 10
    assert values["a", "words"] == [6.0] * 10


def test_an_interrupted_run_goes_on_with_the_same_bytes(tmp_path: Path) -> None:
    task = task_file(tmp_path)
    whole = run([Scripted()], task, tmp_path / "whole", show=False)
    stopped, again = Scripted(stop_after=20), Scripted()
    with pytest.raises(RuntimeError, match="gone"):
        run([stopped], task, tmp_path / "out", show=False)
    results = run([again], task, tmp_path / "out", show=False)
    assert stopped.asked + again.asked == list(range(50))  # whole blocks, none of them twice
    assert results.read_bytes() == whole.read_bytes()
    assert results.with_name("scores.json").read_bytes() == whole.with_name("scores.json").read_bytes()
    idle = Scripted()
    run([idle], task, tmp_path / "out", show=False)
    assert idle.asked == [] and results.read_bytes() == whole.read_bytes()


def test_a_line_that_was_cut_is_written_again_with_its_block(tmp_path: Path) -> None:
    task = task_file(tmp_path)
    results = run([Scripted()], task, tmp_path / "out", show=False)
    whole = results.read_bytes()
    os.truncate(results, len(b"".join(whole.splitlines(keepends=True)[:20])) + 30)
    again = Scripted()
    run([again], task, tmp_path / "out", show=False)
    assert again.asked == list(range(16, 50))  # the block of the lost line as a whole
    assert results.read_bytes() == whole


def test_a_run_that_is_killed_goes_on_with_the_same_bytes(tmp_path: Path) -> None:
    task = task_file(tmp_path)
    whole = run([Scripted()], task, tmp_path / "whole", show=False)
    results = tmp_path / "out" / "results.jsonl"
    script = [sys.executable, str(ROOT / "tests" / "contestant_script.py"), task, str(tmp_path / "out"), "0.3"]
    process = subprocess.Popen(script, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 120
    while not (results.is_file() and results.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = len(read_results(results))
    assert 0 < kept < 50 and not results.with_name("scores.json").exists()
    again = Scripted()
    run([again], task, tmp_path / "out", show=False)
    assert len(again.asked) == 50 - kept
    assert results.read_bytes() == whole.read_bytes()
    assert results.with_name("scores.json").read_bytes() == whole.with_name("scores.json").read_bytes()


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    task = task_file(tmp_path)
    results = run([Scripted()], task, tmp_path / "out", show=False)
    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join([*lines[:2], b'{"contestant": 1\n', *lines[3:]]))
    with pytest.raises(ValueError, match="line 3 is damaged"):
        run([Scripted()], task, tmp_path / "out", show=False)


@pytest.mark.parametrize(
    ("changes", "settings", "told"),
    [
        ({}, {"seed": 1}, "for seed 0; now it is 100003"),
        ({"samples": 4}, {}, "for seed"),
        ({"prompts": ["Another"]}, {}, "for prompt 'Tell me of number 0'"),
        ({"version": 2}, {}, "for version 1; now it is 2"),
    ],
)
def test_answers_to_something_else_are_not_mixed_in(changes: dict, settings: dict, told: str, tmp_path: Path) -> None:
    results = run([Scripted()], task_file(tmp_path), tmp_path / "out", show=False)
    before = results.read_bytes()
    with pytest.raises(ValueError, match=told):
        run([Scripted()], task_file(tmp_path, **changes), tmp_path / "out", show=False, **settings)
    assert results.read_bytes() == before


def test_a_contestant_that_has_changed_is_not_mixed_in(tmp_path: Path) -> None:
    class Filed(Scripted):
        digest = "1"

        def fingerprint(self) -> str:
            return self.digest

    filed = Filed()
    run([filed], task_file(tmp_path), tmp_path / "out", show=False)
    run([Scripted("other"), filed], task_file(tmp_path), tmp_path / "out", show=False)
    filed.digest = "2"
    with pytest.raises(ValueError, match="'scripted' have changed"):
        run([filed], task_file(tmp_path), tmp_path / "out", show=False)


def test_contestants_need_names_of_their_own(tmp_path: Path) -> None:
    for wrong in ([], [Scripted(), Scripted()]):
        with pytest.raises(ValueError, match="at least one, and none twice"):
            run(wrong, task_file(tmp_path), tmp_path / "out", show=False)


def test_too_few_answers_are_refused(tmp_path: Path) -> None:
    class Short(Scripted):
        def write(self, *args: object) -> list[str]:
            return super().write(*args)[1:]

    with pytest.raises(ValueError, match="15 answers to 16 prompts"):
        run([Short()], task_file(tmp_path), tmp_path / "out", show=False)
    assert not read_results(tmp_path / "out" / "results.jsonl")


def test_choices_and_costs_are_measured_on_those_who_can(tmp_path: Path) -> None:
    contestants = [Scripted("plain"), Measured("able")]
    questions = [
        {"question": "One?", "answer": "right", "options": ["wrong", "right"]},
        {"question": "Two?", "answer": "wrong", "options": ["wrong", "right"]},
    ]
    chosen = task_file(tmp_path, prompts=[], questions=questions, samples=1, metrics={"multiple_choice": "higher"})
    assert scores_of(run(contestants, chosen, tmp_path / "choice", show=False)) == {
        ("able", "multiple_choice"): [1.0, 0.0]
    }
    metrics = ("tokens_per_second", "seconds_to_first_token", "active_parameters", "dollars_per_million_tokens")
    timed = task_file(tmp_path, prompts=["Go"], samples=3, metrics=dict.fromkeys(metrics, "none"))
    found = scores_of(run(contestants, timed, tmp_path / "cost", dollars_per_hour=2.0, show=False))
    assert found == {
        ("able", "tokens_per_second"): [101.0],  # the median of seeds 0, 1 and 2
        ("able", "seconds_to_first_token"): [0.25],
        ("able", "active_parameters"): [5.0],
        ("able", "dollars_per_million_tokens"): [pytest.approx(price_per_million(101.0, 2.0))],
    }
    without = scores_of(run(contestants, timed, tmp_path / "cost", show=False))
    assert ("able", "dollars_per_million_tokens") not in without
