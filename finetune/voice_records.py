"""Collect the records of a voice's corpus: from a file, a folder, a `datasets.Dataset` or a sequence of dicts.

Prose becomes records of 20 to 200 words, whole paragraphs where they fit. A row becomes one record, or one for every
assistant turn of its `messages`. What cannot be used is named by file and line; files are only ever read.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from duet_moe.finetune.leaks import normalise
from duet_moe.finetune.voice_formats import (
    MAX_BYTES,
    csv_rows,
    docx_paragraphs,
    is_binary,
    json_rows,
    jsonl_rows,
    markdown_paragraphs,
    text_paragraphs,
)

Rows = Iterator[tuple[int, object]]
ROW_FILES: Mapping[str, Callable[[Path], Rows]] = {".csv": csv_rows, ".jsonl": jsonl_rows, ".json": json_rows}
PROSE_FILES: Mapping[str, Callable[[Path], Rows]] = {
    ".txt": text_paragraphs,
    ".md": markdown_paragraphs,
    ".docx": docx_paragraphs,
}
FORMATS = tuple(sorted([*ROW_FILES, *PROSE_FILES]))
MIN_WORDS, MAX_WORDS = 20, 200

_SENTENCE = re.compile(r"\S.*?(?:[.!?…]['\"”’)]*(?=\s)|\Z)\s*", re.DOTALL)
_STRETCH = re.compile(rf"(?:\S+\s*){{1,{MAX_WORDS}}}")
_NO_FIELDS = "no 'text', 'response' or 'messages'; name the column of the texts with text_column"


class CorpusError(ValueError):
    """A corpus that no voice can be trained on; says why and what to do."""


@dataclass(frozen=True)
class Skipped:
    """What was left out: a row, a paragraph or a whole file, by the name of the file, the line and the reason."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class Record:
    """A text, the prompt that it answers, if any, and the file and line where it begins."""

    file: str
    line: int
    prompt: str | None
    text: str


@dataclass
class Reading:
    """All that was found: records and what was skipped, both in the order of reading."""

    records: list[Record] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: int = 0

    def skip(self, file: str, line: int, reason: object) -> None:
        """Name what is left out."""
        self.skipped.append(Skipped(file, line, str(reason)))


def read_records(
    corpus: object, *, text_column: str | None = None, prompt_column: str | None = None, name: str = "corpus"
) -> Reading:
    """Read every record of a file, of a folder's files, or of rows.

    Args:
        corpus: path of a file or folder, a `datasets.Dataset` or another iterable of dicts.
        text_column (`str`, *optional*): field of the texts; by default `text`, else `response`, else `messages`.
        prompt_column (`str`, *optional*): field of the prompts; by default `prompt`, beside `response`.
        name (`str`): stands for the file where the rows come from no file.

    Raises:
        CorpusError: the path leads nowhere, the file's format is unknown, a named column is in no row of a file, or
            `corpus` is nothing that has rows.
        ImportError: a .docx file, and python-docx is not installed.
    """
    reading = Reading()
    columns = (text_column, prompt_column)
    if isinstance(corpus, str | os.PathLike):
        path = Path(corpus)
        for file in _files(path, reading):
            _read_file(file, file.relative_to(path).as_posix() if path.is_dir() else file.name, columns, reading)
    elif isinstance(corpus, Mapping) or not isinstance(corpus, Iterable):
        splits = f" of {', '.join(map(repr, list(corpus)[:10]))}" if isinstance(corpus, Mapping) else ""
        allowed = "give a file, a folder, one datasets.Dataset or a list of dicts"
        raise CorpusError(f"the corpus is a {type(corpus).__name__}{splits}; {allowed}")
    else:
        _add_rows(enumerate(corpus, 1), name, columns, reading)
    return reading


def split_prose(paragraphs: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Join short paragraphs and cut long ones into (line, text) of 20 to 200 words; no word is lost or moved.

    The last text may be shorter, as may one that stands before a long paragraph.
    """
    first, joined = 0, ""
    for line, paragraph in paragraphs:
        for piece in _pieces(paragraph):
            words = len(joined.split())
            if joined and (words >= MIN_WORDS or words + len(piece.split()) > MAX_WORDS):
                yield first, joined
                joined = ""
            first = first if joined else line
            joined = f"{joined}\n\n{piece}" if joined else piece
    if joined:
        yield first, joined


def _pieces(paragraph: str) -> Iterator[str]:
    if len(paragraph.split()) <= MAX_WORDS:
        yield paragraph
        return
    current = ""
    for sentence in _SENTENCE.findall(paragraph):
        for stretch in _STRETCH.findall(sentence):
            if current and len(current.split()) + len(stretch.split()) > MAX_WORDS:
                yield current.strip()
                current = ""
            current += stretch
    yield current.strip()


def _files(path: Path, reading: Reading) -> list[Path]:
    if path.is_file():
        if path.suffix.lower() not in FORMATS:
            raise CorpusError(f"cannot read {path.name}: its ending is none of {', '.join(FORMATS)}")
        return [path]
    if not path.is_dir():
        raise CorpusError(f"there is no file or folder {str(path)!r}")
    # "~$" begins the lock files of Word.
    found = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith("~$")]
    seen = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    endings = Counter(file.suffix.lower() or "none" for file in seen if file.suffix.lower() not in FORMATS)
    if endings:
        listed = ", ".join(f"{ending} ({count})" for ending, count in sorted(endings.items()))
        reading.notes.append(f"files with other endings were left out: {listed}; readable are {', '.join(FORMATS)}")
    return [file for file in seen if file.suffix.lower() in FORMATS]


def _read_file(path: Path, name: str, columns: tuple[str | None, str | None], reading: Reading) -> None:
    suffix = path.suffix.lower()
    reading.files += 1
    found = len(reading.records) + len(reading.skipped)
    try:
        if suffix != ".docx" and is_binary(path):
            reading.skip(name, 1, "a binary file, or UTF-16; save it as plain text in UTF-8")
        elif suffix in ROW_FILES:
            _add_rows(ROW_FILES[suffix](path), name, columns, reading)
        else:
            _add_prose(PROSE_FILES[suffix](path), name, reading)
    except OSError as error:
        reading.skip(name, 1, f"cannot be read: {error.strerror}")
    if len(reading.records) + len(reading.skipped) == found:
        reading.skip(name, 1, "nothing in it")


def _add_prose(paragraphs: Rows, name: str, reading: Reading) -> None:
    def usable() -> Iterator[tuple[int, str]]:
        for line, paragraph in paragraphs:
            if isinstance(paragraph, ValueError):
                reading.skip(name, line, paragraph)
            else:
                yield line, str(paragraph)

    for line, text in split_prose(usable()):
        _add(reading, name, line, None, text)


def _add_rows(
    rows: Iterable[tuple[int, object]], name: str, columns: tuple[str | None, str | None], into: Reading
) -> None:
    missing: list[tuple[int, Mapping]] = []
    some_have_it = False
    for line, row in rows:
        if not isinstance(row, Mapping):
            into.skip(name, line, row if isinstance(row, ValueError) else f"not an object but {_kind(row)}")
            continue
        if not _has_columns(row, *columns):
            missing.append((line, row))
            continue
        some_have_it = True
        try:
            pairs = _pairs(row, *columns)
        except ValueError as error:
            into.skip(name, line, error)
            continue
        for prompt, text in pairs:
            _add(into, name, line, prompt, text)
    if missing and not some_have_it:
        _refuse_columns(name, missing[0][1], columns)
        into.skip(name, missing[0][0], f"in no row of the file: {_NO_FIELDS}")
        return
    wanted = " and ".join(repr(column) for column in columns if column)
    for line, _ in missing:
        into.skip(name, line, f"no column {wanted}" if wanted else _NO_FIELDS)


def _refuse_columns(name: str, row: Mapping, columns: tuple[str | None, str | None]) -> None:
    absent = [column for column in columns if column and column not in row]
    if absent:
        listed = ", ".join(repr(str(key)[:40]) for key in list(row)[:20])
        raise CorpusError(f"{name} has no column {' and '.join(map(repr, absent))}; its columns are {listed}")


def _has_columns(row: Mapping, text_column: str | None, prompt_column: str | None) -> bool:
    has_text = text_column in row if text_column else any(key in row for key in ("text", "response", "messages"))
    return has_text and (prompt_column is None or prompt_column in row)


def _pairs(row: Mapping, text_column: str | None, prompt_column: str | None) -> list[tuple[object, object]]:
    if text_column:
        return [(row[prompt_column] if prompt_column else None, row[text_column])]
    # Joined data sets hold null in the fields of the others.
    if row.get("text") is None and row.get("response") is None and row.get("messages") is not None:
        return _assistant_turns(row["messages"])
    if prompt_column or row.get("text") is None:
        text = row.get("text") if row.get("response") is None else row["response"]
        return [(row.get(prompt_column or "prompt"), text)]
    return [(None, row["text"])]


def _assistant_turns(messages: object) -> list[tuple[object, object]]:
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError("'messages' is not a list of objects with 'role' and 'content'")
    turns = []
    for before, message in zip([{}, *messages], messages, strict=False):
        if message.get("role") == "assistant" and message.get("content") is not None:
            prompt = _content(before.get("content")) if before.get("role") == "user" else None
            turns.append((prompt, _content(message["content"])))
    if not turns:
        raise ValueError("'messages' has no turn of the assistant with text")
    return turns


def _content(content: object) -> object:
    """Join the text parts of a message whose content is a list of parts."""
    if not isinstance(content, list):
        return content
    parts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    return "\n".join(part for part in parts if isinstance(part, str))


def _add(reading: Reading, name: str, line: int, prompt: object, text: object) -> None:
    for field_name, value in (("prompt", prompt), ("text", text)):
        if reason := _unusable(field_name, value):
            reading.skip(name, line, reason)
            return
    asked = str(prompt).strip() if prompt else ""
    reading.records.append(Record(name, line, asked or None, str(text).strip()))


def _unusable(field_name: str, value: object) -> str | None:
    if field_name == "prompt" and value is None:
        return None
    if not isinstance(value, str):
        return f"the {field_name} is {_kind(value)}, not a string"
    if field_name == "text" and not normalise(value):
        return "the text is empty"
    if len(value.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        return f"the {field_name} is over {MAX_BYTES:,} bytes"
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        return f"the {field_name} has a NUL or half a surrogate pair"
    return None


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
