"""The hard prompts of the task router: whole rows, balanced, and no label to be read off their first words."""

import json
from collections import Counter
from pathlib import Path

import duet_moe.finetune
from duet_moe.evaluation.task import TASKS, read_task
from duet_moe.finetune.leaks import normalise

ROWS = [
    json.loads(line)
    for line in (Path(duet_moe.finetune.__file__).parent / "written" / "router" / "hard.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]


def test_rows_are_whole_different_and_balanced() -> None:
    assert len(ROWS) > 1500
    for row in ROWS:
        assert row.keys() == {"prompt", "mode", "why"} and row["mode"] in ("creative", "factual")
        assert 3 <= len(row["prompt"].split()) <= 40 and row["why"]
    assert len({normalise(row["prompt"]) for row in ROWS}) == len(ROWS)
    counts = Counter(row["mode"] for row in ROWS)
    assert abs(counts["creative"] - counts["factual"]) < 0.02 * len(ROWS)


def test_no_opening_is_common() -> None:
    openings = Counter(" ".join(row["prompt"].lower().split()[:2]) for row in ROWS)
    assert openings.most_common(1)[0][1] <= 0.015 * len(ROWS)


def test_none_is_a_prompt_that_models_are_evaluated_on() -> None:
    ours = {normalise(row["prompt"]) for row in ROWS}
    tasks = [
        read_task(TASKS / f"{name}.yaml") for name in ("creative", "creative_confirmatory", "factual_choices", "style")
    ]
    assert not ours & {normalise(prompt) for task in tasks for prompt in task.prompts}
