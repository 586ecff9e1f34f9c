"""What the two tasks beside this file share: the questions, and when a written answer is right."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from duet_moe.finetune.fact_wordings import is_right

if TYPE_CHECKING:
    from datasets import Dataset


def load(**kwargs: object) -> "dict[str, Dataset]":
    """Return the split `test`, wherever the command runs; `kwargs` are what lm-eval hands to every loader."""
    from datasets import Dataset

    lines = Path(__file__).with_name("facts.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def contains_answer(doc: dict, results: list[str]) -> dict[str, float]:
    """Score one answer."""
    return {"contains_answer": float(is_right(results[0], doc["answer"]))}
