"""Read training text into documents and split off held-out ones.

A `Source` names files, a weight in the mix and the head that learns from it. Files are `.txt`, `.json` (a list),
`.jsonl` and `.jsonl.xz`; rows that cannot be used are logged by file and line and skipped. What is held out depends on
a hash of the text itself, never on order, so adding files moves no document from one side to the other.
"""

import glob
import hashlib
import json
import logging
import lzma
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from duet_moe.finetune.fact_wordings import extra_wordings, group_facts, read_templates
from duet_moe.finetune.leaks import normalise, without_leaks
from duet_moe.finetune.story_prompts import story_prompts

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parent / "recipes"
HEADS = ("coherence", "diversity", "both")
KINDS = ("text", "chat")
SUFFIXES = (".txt", ".json", ".jsonl", ".jsonl.xz")
PACKAGE = "package:"  # begins a path that starts in this package instead of the data root
_META = ("answer", "fact", "subcategory", "kind", "title")


@dataclass(frozen=True)
class Document:
    """One training text: plain text when `prompt` is None, else a prompt and its response."""

    prompt: str | None
    response: str
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A group of files that share a weight, a head and rules.

    Args:
        path (`str` or sequence of `str`): files, folders or globs, relative to the data root; `package:written/...`
            are texts that come with this package.
        weight (`float`): share of the training tokens, relative to the other sources.
        head (`str`): `coherence`, `diversity` or `both` (documents are dealt to the two heads in turn).
        kind (`str`): `text` rows have `text`; `chat` rows have `prompt`, `response` and maybe `context`.
        holdout (`float` or `"wording"`): share of groups kept out of training, or one wording of every fact.
        group (`str`, *optional*): field whose equal values stay on one side; by default the prompt or text.
        where (`dict`): field -> value, list of values, `{not: [...]}` or `{max: number}`.
        fields (`dict`): our field -> field of the row, such as `{text: summary}`.
        context (`str`): put a row's context `before` or `after` its prompt.
        prompts (`str`, *optional*): `story` makes up prompts that ask for the text.
        prompts_per_text (`int`): how many of them per text.
        templates (`str`, *optional*): YAML of further fact wordings, beside the recipes.
    """

    name: str
    path: str | Sequence[str]
    weight: float
    head: str = "both"
    kind: str = "text"
    holdout: float | str = 0.02
    group: str | None = None
    where: Mapping[str, object] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    context: str = "before"
    max_response_words: int | None = None
    prompts: str | None = None
    prompts_per_text: int = 2
    templates: str | None = None

    def __post_init__(self) -> None:
        checks = (
            ("head", self.head, HEADS),
            ("kind", self.kind, KINDS),
            ("context", self.context, ("before", "after")),
            ("prompts", self.prompts, (None, "story")),
        )
        for option, value, allowed in checks:
            if value not in allowed:
                raise ValueError(f"source {self.name!r}: {option} is {value!r}; choose one of {allowed}")
        if self.weight <= 0:
            raise ValueError(f"source {self.name!r}: weight is {self.weight}; give a number above 0")
        if self.holdout != "wording" and not (isinstance(self.holdout, int | float) and 0 <= self.holdout < 1):
            raise ValueError(f"source {self.name!r}: holdout is {self.holdout!r}; give 0 <= share < 1 or 'wording'")


def read_sources(recipe: str | Path | Mapping[str, object]) -> list[Source]:
    """Return the sources of a recipe (a YAML file, the name of a bundled one, or an already read mapping)."""
    if isinstance(recipe, Mapping):
        content: Mapping[str, object] = recipe
    else:
        path = Path(recipe)
        path = path if path.suffix else RECIPES / f"{recipe}.yaml"
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    entries = content.get("sources")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"recipe {recipe!r} has no sources; list at least one under 'sources:'")
    sources = [Source(**entry) for entry in entries]
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"source names repeat: {names}; give every source its own name")
    return sources


def source_files(source: Source, root: str | Path) -> list[Path]:
    """Return the files of a source in a fixed order; ValueError when a pattern matches none."""
    patterns = [source.path] if isinstance(source.path, str) else list(source.path)
    files: set[Path] = set()
    for pattern in patterns:
        base = Path(__file__).parent if pattern.startswith(PACKAGE) else Path(root)
        found = [Path(match) for match in glob.glob(str(base / pattern.removeprefix(PACKAGE)))]
        inside = [file for path in found if path.is_dir() for file in path.rglob("*")]
        usable = {path for path in found + inside if path.is_file() and path.name.endswith(SUFFIXES)}
        if not usable:
            raise ValueError(f"source {source.name!r}: no {', '.join(SUFFIXES)} file matches {pattern!r} under {root}")
        files |= usable
    return sorted(files)


def read_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield (line number, row) of one file; a line that is not JSON comes as its ValueError."""
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as stream:
        if path.suffix == ".txt":
            texts = stream.read().split("<|endoftext|>")
            yield from ((number, {"text": text}) for number, text in enumerate(texts, 1))
        elif path.suffix == ".json":
            yield from enumerate(json.load(stream), 1)
        else:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, _parse(line)


def load_source(source: Source, root: str | Path) -> tuple[list[Document], list[Document]]:
    """Read one source and return its training and its held-out documents.

    Raises:
        ValueError: no file matches, or no row of any file could be used.
    """
    rows = list(_usable_rows(source, root))
    if not rows:
        raise ValueError(f"source {source.name!r}: nothing usable in {source.path!r}; the log names the bad rows")
    if source.holdout == "wording":
        return _split_wordings(source, [document for document, _ in rows])
    train: list[Document] = []
    heldout: list[Document] = []
    for document, group in rows:
        side = heldout if is_held_out(group, float(source.holdout)) else train
        side.extend(story_prompts(document, source.prompts_per_text) if source.prompts else [document])
    return train, heldout


def load_corpus(sources: Sequence[Source], root: str | Path) -> dict[str, tuple[list[Document], list[Document]]]:
    """Read all sources as name -> (train, heldout) and drop what would leak from one side to the other."""
    return without_leaks({source.name: load_source(source, root) for source in sources})


def is_held_out(key: str, share: float) -> bool:
    """Decide by hash whether the group `key` belongs to the held-out `share`."""
    digest = hashlib.blake2b(normalise(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _parse(line: str) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        return error


def _usable_rows(source: Source, root: str | Path) -> Iterator[tuple[Document, str]]:
    seen: set[tuple[str | None, str]] = set()
    for path in source_files(source, root):
        bad = 0
        for number, row in read_rows(path):
            if isinstance(row, dict) and not _matches(row, source.where):
                continue
            document = _document(row, source)
            if document is None:
                bad += 1
                logger.warning("%s line %d: not a usable %s row, skipped", path, number, source.kind)
            elif (document.prompt, document.response) not in seen:
                seen.add((document.prompt, document.response))
                if source.max_response_words is None or len(document.response.split()) <= source.max_response_words:
                    yield document, _group(row, document, source)
        if bad:
            logger.warning("%s: %d rows skipped", path, bad)


def _document(row: object, source: Source) -> Document | None:
    if not isinstance(row, dict):
        return None
    wanted = ("text",) if source.kind == "text" else ("prompt", "response")
    values = [row.get(source.fields.get(name, name)) for name in wanted]
    texts = [value.strip() for value in values if isinstance(value, str)]
    if len(texts) < len(wanted) or not all(texts):
        return None
    meta = {key: str(row[key]) for key in _META if row.get(key)}
    if source.kind == "text":
        return Document(None, texts[0], meta)
    context = str(row.get("context") or "").strip()
    parts = [context, texts[0]] if source.context == "before" else [texts[0], context]
    return Document("\n".join(part for part in parts if part), texts[1], meta)


def _group(row: object, document: Document, source: Source) -> str:
    value = row.get(source.group) if source.group and isinstance(row, dict) else None
    # "fairytaleqa:snow-man" in one file is the story "snow man" of another.
    return str(value).split(":")[-1] if value else document.prompt or document.response


def _matches(row: Mapping[str, object], where: Mapping[str, object]) -> bool:
    for name, rule in where.items():
        value = row.get(name)
        if isinstance(rule, Mapping):
            number = value if isinstance(value, int | float) else None
            if value in rule.get("not", ()) or ("max" in rule and (number is None or number > rule["max"])):
                return False
        elif value not in (rule if isinstance(rule, list) else [rule]):
            return False
    return True


def _split_wordings(source: Source, documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """Hold out one wording of every fact that has three or more; train on the rest and on further wordings."""
    templates = read_templates(RECIPES / source.templates) if source.templates else {}
    train: list[Document] = []
    heldout: list[Document] = []
    for fact in group_facts(documents, templates):
        kept_out = fact.held_out_wording()
        wordings = [document for document in fact.wordings if document is not kept_out]
        heldout.extend([kept_out] if kept_out else [])
        train.extend(wordings)
        if fact.subcategory in templates:
            train.extend(extra_wordings(fact, templates[fact.subcategory], wordings))
    return train, heldout
