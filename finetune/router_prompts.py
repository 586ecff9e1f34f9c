"""Prompts that teach and test the task router: labelled, and split so that neighbours stay together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from duet_moe.finetune.corpus import RECIPES, Source, is_held_out, read_rows, source_files
from duet_moe.finetune.leaks import normalise

LABELS = {"creative": True, "factual": False}
ROLES = ("train", "unseen", "hard")
CALIBRATION, HELD_OUT = 0.08, 0.08  # shares of the groups of a `train` source


@dataclass(frozen=True)
class PromptSource:
    """Files of prompts.

    Args:
        path (`str` or sequence of `str`): as in `Source`.
        role (`str`): `train`, `unseen` or `hard`; only the first is trained on.
        label (`str`): field that says `creative` or `factual`.
        rows (`int`): neighbouring rows of a file that stay on one side of a split; more than 1 also marks prompts
            that mislead on purpose, which are calibrated for apart from the others.
    """

    name: str
    path: str | Sequence[str]
    role: str = "train"
    label: str = "mode"
    rows: int = 1

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"source {self.name!r}: role is {self.role!r}; choose one of {ROLES}")
        if self.rows < 1:
            raise ValueError(f"source {self.name!r}: rows is {self.rows}; give 1 or more")


@dataclass(frozen=True)
class Prompt:
    """A labelled prompt.

    Args:
        part (`str`): `train`, `calibration`, `held_out`, `unseen` or `hard`.
        misleads (`bool`): written so that its surface misleads.
    """

    text: str
    creative: bool
    part: str
    misleads: bool


def read_prompt_recipe(recipe: str | Path) -> dict:
    """Return a recipe with the parts `training` and `prompts`; a bare name is one of the package's own.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no YAML or has other parts.
    """
    path = Path(recipe)
    path = path if path.suffix else RECIPES / f"{recipe}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict) or content.keys() != {"training", "prompts"} or not content["prompts"]:
        raise ValueError(f"{path} must have the parts training and prompts, and no others.")
    return content


def read_prompts(recipe: Mapping, data: str | Path) -> list[Prompt]:
    """Return the prompts of a recipe, each once; of the same prompt in two parts a test keeps it.

    Raises:
        ValueError: if a source is not described well, matches no file, or a row has no prompt or another label.
    """
    try:
        sources = [PromptSource(**entry) for entry in recipe["prompts"]]
    except TypeError as error:
        raise ValueError(f"A source of prompts is not described well: {error}") from error
    sources.sort(key=lambda source: -ROLES.index(source.role))
    found: dict[str, Prompt] = {}
    for source in sources:
        for prompt in _of_source(source, data):
            found.setdefault(normalise(prompt.text), prompt)
    found.pop("", None)
    return list(found.values())


def _of_source(source: PromptSource, data: str | Path) -> Iterator[Prompt]:
    for path in source_files(Source(source.name, source.path, 1.0), data):
        for number, row in read_rows(path):
            text = row.get("prompt") if isinstance(row, dict) else None
            label = row.get(source.label) if isinstance(row, dict) else None
            if not isinstance(text, str) or label not in LABELS:
                raise ValueError(
                    f"{path}, line {number}: give a row with a prompt and {source.label}: one of {list(LABELS)}."
                )
            group = f"{path.name} {(number - 1) // source.rows}" if source.rows > 1 else text
            yield Prompt(text.strip(), LABELS[label], _part(source, group), source.rows > 1 or source.role == "hard")


def _part(source: PromptSource, group: str) -> str:
    if source.role != "train":
        return source.role
    if is_held_out(group, CALIBRATION):
        return "calibration"
    return "held_out" if is_held_out(group, CALIBRATION + HELD_OUT) else "train"
