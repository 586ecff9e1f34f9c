"""Tasks as data: what is asked, how often, and what is measured, in YAML files that a version belongs to."""

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from duet_moe.evaluation.scores import METRICS, TAKEN_FOR
from duet_moe.finetune.fact_wordings import SLOT

TASKS = Path(__file__).parent / "tasks"
ALL = ("creative", "factual", "style", "cost")
SUITES = (*ALL, "confirmatory", "all")
DIRECTIONS = ("higher", "lower", "none")
_PROMPTS_APART = 100_003  # seeds of two runs do not meet
_FORMS = {"prompts", "questions", "facts", "wordings"}


@dataclass(frozen=True)
class Task:
    """What is asked, and what is measured.

    Args:
        name (`str`), suite (`str`). version (`int`): grows when a change moves scores.
        prompts (`tuple[str, ...]`). samples (`int`): answers to each. max_new_tokens (`int`): tokens.
        metrics (`dict[str, str]`): which is better, `higher`, `lower` or `none`, by metric of `scores.METRICS`.
        answers (`tuple[str, ...]`): the right one for each prompt, if there is one.
        options (`tuple[tuple[str, ...], ...]`): to choose from for each prompt, if the task is to choose.

    Raises:
        ValueError: on values that do not fit, naming them.
    """

    name: str
    version: int
    suite: str
    prompts: tuple[str, ...]
    samples: int
    max_new_tokens: int
    metrics: dict[str, str]
    answers: tuple[str, ...] = ()
    options: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        known = {*METRICS, TAKEN_FOR}
        if unknown := self.metrics.keys() - known:
            raise ValueError(f"Task {self.name!r}: unknown metrics {sorted(unknown)}; known are {sorted(known)}.")
        for metric, direction in self.metrics.items():
            if direction not in DIRECTIONS:
                raise ValueError(f"Task {self.name!r}: {metric} is {direction!r}; give one of {DIRECTIONS}.")
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", str(self.name)):
            raise ValueError(
                f"Task {self.name!r}: a name has letters a-z, digits, - and _, because files are named by it."
            )
        if not self.prompts or any(not isinstance(p, str) or not p.strip() for p in self.prompts):
            raise ValueError(f"Task {self.name!r} needs prompts, none of them empty; put numbers in quotes.")
        if len(set(self.prompts)) < len(self.prompts):
            twice = next(p for p in self.prompts if self.prompts.count(p) > 1)
            raise ValueError(f"Task {self.name!r} asks {twice!r} twice: take one out.")
        for number in ("samples", "max_new_tokens"):
            if not isinstance(getattr(self, number), int) or getattr(self, number) < 1:
                raise ValueError(f"Task {self.name!r}: {number}={getattr(self, number)!r} must be 1 or more.")
        if any(not isinstance(text, str) for text in (*self.answers, *(o for given in self.options for o in given))):
            raise ValueError(f"Task {self.name!r}: answers and options are texts; put numbers in quotes.")
        for name in ("answers", "options"):
            if len(getattr(self, name)) not in (0, len(self.prompts)):
                raise ValueError(f"Task {self.name!r}: give {name} for all {len(self.prompts)} prompts, or for none.")
        for answer, options in zip(self.answers, self.options, strict=False):
            if answer not in options:
                raise ValueError(f"Task {self.name!r}: the answer {answer!r} is not one of the options {options}.")

    @property
    def kind(self) -> str:
        """`choose` among options, `time` answers, or `write` them."""
        return "choose" if self.options else "time" if "tokens_per_second" in self.metrics else "write"

    def rows(self, seed: int) -> list[dict]:
        """Return what is asked for every sample, in order: prompt, its index, the sample's number and its seed."""
        first = seed * _PROMPTS_APART
        return [
            {"index": i, "sample": j, "seed": first + i * self.samples + j, "prompt": prompt}
            for i, prompt in enumerate(self.prompts)
            for j in range(self.samples)
        ]


def read_task(path: str | Path) -> Task:
    """Read a task from YAML: the fields of `Task`, with the prompts as one of three forms.

    `prompts`: a list. `questions`: a list of `question`, `answer` and, to choose from, `options`. `facts`: answers by
    entity by topic, asked in every wording that the file `wordings` beside it has for the topic.

    Raises:
        OSError: if it cannot be read.
        ValueError: if a field is missing, unknown or out of range.
    """
    path = Path(path)
    try:
        entry = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(entry, dict):
            raise ValueError("it is no mapping")
        known = {f.name for f in fields(Task)} - {"answers", "options"}
        if unknown := entry.keys() - known - _FORMS:
            raise ValueError(f"unknown fields {sorted(unknown)}; known are {sorted(known | _FORMS)}")
        if missing := known - entry.keys() - {"prompts"}:
            raise ValueError(f"no {sorted(missing)}")
        return Task(**{name: entry[name] for name in known - {"prompts"}}, **_asked(entry, path.parent))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{str(path)!r} is not a task: {error}") from error
    except KeyError as error:
        raise ValueError(f"{str(path)!r} is not a task: there is no {error}") from error


def _asked(entry: dict, folder: Path) -> dict[str, Any]:
    if "facts" in entry:
        wordings = yaml.safe_load((folder / entry["wordings"]).read_text(encoding="utf-8"))["wordings"]
        asked = [
            (wording.replace(SLOT, entity), answer)
            for topic, facts in entry["facts"].items()
            for entity, answer in facts.items()
            for wording in wordings[topic]
        ]
        return {"prompts": tuple(p for p, _ in asked), "answers": tuple(a for _, a in asked)}
    questions = entry.get("questions", ())
    return {
        "prompts": tuple(entry.get("prompts") or [q["question"] for q in questions]),
        "answers": tuple(q["answer"] for q in questions),
        "options": tuple(tuple(q["options"]) for q in questions if "options" in q),
    }


def tasks_of(suite: str, samples: int | None = None) -> list[Task]:
    """Return the tasks of a suite by name, `all` but the confirmatory ones, or the one of a YAML file.

    Args:
        samples: answers to each prompt, in the place of the tasks' own where that is above 1.

    Raises:
        ValueError: if there is no such suite, or `samples` is below 1.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"samples={samples}: ask for at least one answer to each prompt.")
    if Path(suite).suffix in (".yaml", ".yml"):
        tasks = [read_task(suite)]
    elif suite in SUITES:
        wanted = ALL if suite == "all" else (suite,)
        files = [p for p in sorted(TASKS.glob("*.yaml")) if "suite" in yaml.safe_load(p.read_text(encoding="utf-8"))]
        tasks = [task for name in wanted for task in map(read_task, files) if task.suite == name]
    else:
        raise ValueError(f"There is no suite {suite!r}: choose one of {SUITES}, or give the YAML file of a task.")
    return [replace(task, samples=samples) if samples and task.samples > 1 else task for task in tasks]
