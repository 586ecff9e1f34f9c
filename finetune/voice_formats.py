"""Read one file of a voice's texts as rows (.csv, .jsonl, .json) or as paragraphs (.txt, .md, .docx).

Every reader yields (line, value); what cannot be used comes as a `ValueError` whose message never quotes the file.
Lines are read with a bound, so that a file without line ends costs no memory.
"""

import codecs
import csv
import itertools
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

MAX_BYTES = 1_000_000  # of one line, and of one record
MAX_WHOLE = 64_000_000  # of a file that has to be read at once

_CONTROL = bytes(set(range(32)) - set(b"\t\n\r\f\x1b")) + b"\x7f"
_MARKUP = (b"%PDF-", b"{\\rtf")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_WRAPPED = 50  # characters; shorter lines end where their author ended them
_BETWEEN_VALUES = re.compile(r"[\s,]*")


class Lines:
    """The lines of a UTF-8 file, with or without a byte order mark.

    An unusable line keeps its place, so that counts stay right; `problem` says what is wrong with it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._problems: dict[int, str] = {}

    def __iter__(self) -> Iterator[str]:
        with open(self.path, "rb") as stream:
            for number in itertools.count(1):
                line = stream.readline(MAX_BYTES + 1)
                if not line:
                    return
                if len(line) > MAX_BYTES:
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(MAX_BYTES)
                    self._problems[number] = f"a line over {MAX_BYTES:,} bytes"
                    yield "\n"
                else:
                    yield self._decode(number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)

    def problem(self, first: int, last: int) -> tuple[int, ValueError] | None:
        """Return the first unusable line of those read from `first` to `last`, and why."""
        bad = min((number for number in self._problems if first <= number <= last), default=None)
        return None if bad is None else (bad, ValueError(self._problems[bad]))

    def _decode(self, number: int, line: bytes) -> str:
        if b"\0" in line:
            self._problems[number] = "a NUL byte"
        try:
            return line.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            self._problems[number] = f"byte 0x{line[error.start]:02x} is not UTF-8; save the file as UTF-8"
            return line.decode("utf-8", "replace").replace("\r\n", "\n")


def is_binary(path: Path) -> bool:
    """Say whether a file is no plain text: over 5% control characters at its start (UTF-16 too), PDF or RTF."""
    with open(path, "rb") as stream:
        start = stream.read(8192)
    controls = len(start) - len(start.translate(None, _CONTROL))
    return controls > len(start) / 20 or start.startswith(_MARKUP)


def csv_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield the rows under the header as dicts; the header's most frequent of `,` `;` and tab separates columns."""
    lines = Lines(path)
    source = iter(lines)
    head = next(source, "")
    reader = csv.reader(itertools.chain([head], source), delimiter=max(",;\t", key=head.count), strict=True)
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield lines.problem(first, reader.line_num) or (first, ValueError(f"not CSV: {error}"))
            continue
        if problem := lines.problem(first, reader.line_num):
            yield problem
            if header is None:
                return
        elif header is None:
            header = [name.strip() for name in row] or None
        elif len(row) > len(header):
            yield first, ValueError(f"{len(row)} fields under {len(header)} columns; put texts in double quotes")
        elif row:
            yield first, dict(zip(header, row, strict=False))


def jsonl_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield the value of every line that is not blank."""
    lines = Lines(path)
    for number, line in enumerate(lines, 1):
        if problem := lines.problem(number, number):
            yield problem
        elif line.strip():
            yield number, _json_value(line, 0)[0]


def json_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield the items of a list, or the values that follow each other, with the line on which each begins."""
    with open(path, "rb") as stream:
        content = stream.read(MAX_WHOLE + 1)
    if len(content) > MAX_WHOLE:
        yield 1, ValueError(f"a JSON file over {MAX_WHOLE:,} bytes; write it as .jsonl, one record a line")
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8"
        yield content.count(b"\n", 0, error.start) + 1, ValueError(reason)
        return
    listed = text.lstrip().startswith("[")
    position = text.find("[") + 1 if listed else 0
    line, counted = 1, 0
    while True:
        position = _BETWEEN_VALUES.match(text, position).end()  # type: ignore[union-attr]  # matches nothing, too
        line, counted = line + text.count("\n", counted, position), position
        if position == len(text) or (listed and text[position] == "]"):
            break
        value, position = _json_value(text, position)
        yield line, value
        if isinstance(value, ValueError):
            return
    if listed and text[position:].strip() != "]":
        yield line, ValueError("not JSON: the list does not end here, or the file goes on after it")


def text_paragraphs(path: Path) -> Iterator[tuple[int, object]]:
    """Yield what blank lines separate; lines that were wrapped come as one."""
    lines = Lines(path)
    return _paragraphs(lines, enumerate(lines, 1))


def markdown_paragraphs(path: Path) -> Iterator[tuple[int, object]]:
    """Yield the paragraphs of Markdown, without front matter and fenced code."""
    lines = Lines(path)
    return _paragraphs(lines, _without_fences(_without_front_matter(enumerate(lines, 1))))


def docx_paragraphs(path: Path) -> Iterator[tuple[int, object]]:
    """Yield the paragraphs of a Word document, with their number as line; tables cannot be used.

    Raises:
        ImportError: python-docx is not installed.
    """
    try:
        import docx
    except ImportError as error:
        raise ImportError(f"{path.name} needs python-docx: pip install 'duet-moe[finetune]'") from error
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(item.file_size for item in archive.infolist())
        if size > MAX_WHOLE:
            raise ValueError(f"over {MAX_WHOLE:,} bytes when unpacked; split the document")
        document = docx.Document(str(path))
        paragraphs, tables = document.paragraphs, len(document.tables)
    except Exception as error:  # a damaged document ends in errors of zip, zlib, lxml and python-docx
        reason = str(error) if type(error) is ValueError else type(error).__name__
        yield 1, ValueError(f"not a readable .docx document ({reason})")
        return
    for number, paragraph in enumerate(paragraphs, 1):
        if text := paragraph.text.strip():
            yield number, text
    if tables:
        yield len(paragraphs), ValueError(f"text in tables cannot be read; this document has {tables}")


def _json_value(text: str, position: int) -> tuple[object, int]:
    try:
        return json.JSONDecoder().raw_decode(text, position)
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON: {error.msg} (column {error.colno})"), position
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        return ValueError(f"JSON that cannot be read ({type(error).__name__})"), position


def _paragraphs(lines: Lines, numbered: Iterator[tuple[int, str]]) -> Iterator[tuple[int, object]]:
    first, last, size = 0, 0, 0
    kept: list[str] = []
    for number, line in itertools.chain(numbered, [(0, "")]):
        size += len(line)
        # A gap in the numbers is fenced code, which ends a paragraph as a blank line does.
        if kept and (not line.strip() or number != last + 1 or size > MAX_BYTES):
            yield lines.problem(first, last) or (first, _unwrapped(kept))
            kept, size = [], len(line)
        if number and not line.strip() and (problem := lines.problem(number, number)):
            yield problem
        elif line.strip():
            first = number if not kept else first
            kept.append(line.strip())
        last = number


def _unwrapped(lines: list[str]) -> str:
    wrapped = all(len(line) >= _WRAPPED for line in lines[:-1])
    return (" " if wrapped else "\n").join(lines)


def _without_front_matter(numbered: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    held = list(itertools.islice(numbered, 1))
    if held and held[0][1].rstrip() == "---":
        for number, line in numbered:
            held.append((number, line))
            if line.rstrip() in ("---", "..."):
                held = []
                break
    yield from held
    yield from numbered


def _without_fences(numbered: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    fence = ""
    for number, line in numbered:
        mark = _FENCE.match(line)
        if fence:
            closes = mark and mark[1].startswith(fence) and not line.strip().strip(fence[0])
            fence = "" if closes else fence
        elif mark:
            fence = mark[1]
        else:
            yield number, line
