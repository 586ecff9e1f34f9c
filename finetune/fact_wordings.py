"""Ask one fact in many wordings: some for training, one per fact held out, two new templates for the evaluation.

A fact is (topic, entity, answer) with the questions that a file asks about it. Templates are YAML, one entry a topic:
`pattern` finds the entity in a known question, `sentence` wordings are answered in a sentence and `short` ones in a
word or two, as the data does.
"""

import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from duet_moe.finetune.leaks import normalise

if TYPE_CHECKING:
    from duet_moe.finetune.corpus import Document

SLOT = "{entity}"


@dataclass(frozen=True)
class Templates:
    """What the YAML says about one topic: patterns that find the entity, and wordings by the form of their answer."""

    pattern: tuple[str, ...] = ()
    sentence: tuple[str, ...] = ()
    short: tuple[str, ...] = ()
    keep_case: bool = False  # lower case would change what is asked


@dataclass(frozen=True)
class Fact:
    """One fact: what the questions ask about (`entity`), the short answer and the questions themselves."""

    name: str
    subcategory: str
    entity: str | None
    answer: str
    wordings: tuple["Document", ...]

    @property
    def sentence(self) -> str:
        """The fullest answer that the data gives."""
        return max((document.response for document in self.wordings), key=len)

    @property
    def short(self) -> str:
        """The shortest answer that the data gives."""
        return min((document.response for document in self.wordings), key=len)

    def held_out_wording(self) -> "Document | None":
        """Return the wording that no training may see, chosen by hash; None for a fact with fewer than three."""
        if len(self.wordings) < 3:
            return None
        chosen = zlib.crc32(f"{self.subcategory}|{self.name}".encode()) % len(self.wordings)
        return sorted(self.wordings, key=lambda document: document.prompt or "")[chosen]


def read_templates(path: str | Path) -> dict[str, Templates]:
    """Read a YAML file of templates by topic; ValueError when a template has no place for the entity."""
    templates = {}
    for topic, entry in yaml.safe_load(Path(path).read_text(encoding="utf-8"))["wordings"].items():
        pattern = entry.get("pattern", ())
        topic_templates = Templates(
            pattern=(pattern,) if isinstance(pattern, str) else tuple(pattern),
            sentence=tuple(entry.get("sentence", ())),
            short=tuple(entry.get("short", ())),
            keep_case=entry.get("keep_case", False),
        )
        for wording in topic_templates.pattern + topic_templates.sentence + topic_templates.short:
            if SLOT not in wording:
                raise ValueError(f"{path}: {topic} wording {wording!r} has no {SLOT}; add it")
        templates[topic] = topic_templates
    return templates


def group_facts(documents: Iterable["Document"], templates: Mapping[str, Templates]) -> list[Fact]:
    """Gather documents that carry `fact`, `subcategory` and `answer` into facts, in order of first appearance."""
    groups: dict[tuple[str, str], list[Document]] = defaultdict(list)
    for document in documents:
        missing = [key for key in ("fact", "subcategory", "answer") if key not in document.meta]
        if missing:
            raise ValueError(f"{document.prompt!r} has no {missing}; holdout 'wording' needs fact tables")
        groups[document.meta["subcategory"], document.meta["fact"]].append(document)
    facts = []
    for (topic, name), wordings in groups.items():
        entity = _entity(wordings, templates.get(topic, Templates()).pattern)
        facts.append(Fact(name, topic, entity, wordings[0].meta["answer"], tuple(wordings)))
    return facts


def ask(fact: Fact, wordings: Sequence[str], response: str) -> list["Document"]:
    """Return one question per template; none when the entity is unknown."""
    entity = fact.entity
    if entity is None:
        return []
    prompts = [_capital(wording.replace(SLOT, entity)) for wording in wordings]
    return [replace(fact.wordings[0], prompt=prompt, response=response) for prompt in prompts]


def extra_wordings(fact: Fact, templates: Templates, known: Sequence["Document"] = ()) -> list["Document"]:
    """Return further training questions: the topic's templates, and half of all wordings as people type them."""
    extra = ask(fact, templates.sentence, fact.sentence) + ask(fact, templates.short, fact.short)
    casual = [] if templates.keep_case else [_typed(document) for document in [*known, *extra] if _odd(document)]
    return extra + casual


def evaluation_questions(path: str | Path, facts: Iterable[Fact]) -> list["Document"]:
    """Fill the evaluation's own templates: `meta["answer"]` is what a right answer must contain."""
    wordings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["wordings"]
    return [question for fact in facts for question in ask(fact, wordings.get(fact.subcategory, []), fact.sentence)]


def is_right(output: str, answer: str) -> bool:
    """Say whether the normalised answer stands in the output as whole words."""
    return f" {normalise(answer)} " in f" {normalise(output)} "


def _entity(wordings: Sequence["Document"], patterns: Sequence[str]) -> str | None:
    """Find the entity by the patterns; a pattern that is only the slot takes the whole first question."""
    for pattern in patterns:
        before, after = pattern.split(SLOT)
        expression = re.compile(re.escape(before) + "(.+)" + re.escape(after))
        for document in wordings:
            match = expression.fullmatch(document.prompt or "")
            if match:
                return match[1] if before or after else match[1][0].lower() + match[1][1:]
    return None


def _odd(document: "Document") -> bool:
    return zlib.crc32((document.prompt or "").encode()) % 2 == 1


def _typed(document: "Document") -> "Document":
    return replace(document, prompt=(document.prompt or "").lower().rstrip("?.").strip())


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
