"""Every format gives the same records; what is broken is named by file and line, and the rest goes on."""

import builtins
import json
import sys
import tracemalloc
import zipfile
from pathlib import Path

import docx
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from duet_moe.finetune.voice_formats import MAX_BYTES, MAX_WHOLE
from duet_moe.finetune.voice_records import MAX_WORDS, MIN_WORDS, CorpusError, Reading, read_records, split_prose

PAIRS = [("Write a tagline.", "Coffee from the north."), ("And, now?", 'He said "fine",\nthen left. äöü')]


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(folder: Path, name: str, content: str | bytes, **columns: str) -> Reading:
    return read_records(put(folder, name, content), **columns)


def texts(reading: Reading) -> list[str]:
    return [record.text for record in reading.records]


def skipped(reading: Reading) -> list[tuple[int, str]]:
    return [(item.line, item.reason) for item in reading.skipped]


def as_csv(separator: str = ",", end: str = "\n") -> str:
    quoted = [(prompt, text.replace('"', '""')) for prompt, text in PAIRS]
    rows = [f"prompt{separator}response", *(f'"{prompt}"{separator}"{text}"' for prompt, text in quoted)]
    return end.join(row.replace("\n", end) for row in rows) + end


ROWS = [{"prompt": prompt, "response": text} for prompt, text in PAIRS]
CHATS = [
    {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]}
    for prompt, text in PAIRS
]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n".join(map(json.dumps, ROWS))),
        ("a.JSONL", "\ufeff" + "\r\n\r\n".join(map(json.dumps, ROWS))),
        ("a.jsonl", "\n".join(map(json.dumps, CHATS))),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json", "\n".join(map(json.dumps, ROWS))),
        ("a.csv", as_csv()),
        ("a.csv", "\ufeff" + as_csv(";", "\r\n")),
        ("a.csv", as_csv("\t")),
    ],
)
def test_every_row_format_gives_the_same_records(tmp_path: Path, name: str, content: str) -> None:
    reading = read(tmp_path, name, content)
    assert [(record.prompt, record.text) for record in reading.records] == PAIRS
    assert reading.skipped == [] and reading.files == 1


@pytest.mark.parametrize("rows", [ROWS, CHATS, Dataset.from_list(ROWS), iter(ROWS)])
def test_rows_in_memory_are_read_like_files(rows: object) -> None:
    reading = read_records(rows)
    assert [(record.prompt, record.text) for record in reading.records] == PAIRS
    assert [(record.file, record.line) for record in reading.records] == [("corpus", 1), ("corpus", 2)]


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (DatasetDict({"train": Dataset.from_list(ROWS)}), "a DatasetDict of 'train'; give .* one datasets.Dataset"),
        (7, "is a int; give a file"),
        ("/nowhere/at/all", "no file or folder '/nowhere/at/all'"),
        (__file__, "test_voice_records.py: its ending is none of .csv, .docx"),
    ],
)
def test_what_has_no_rows_is_refused(corpus: object, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        read_records(corpus)


def test_every_assistant_turn_is_a_record() -> None:
    turns = [
        ("system", "Be brief."),
        ("user", "One?"),
        ("assistant", "First."),
        ("assistant", "More."),
        ("user", [{"type": "text", "text": "Two?"}, {"type": "image"}]),
        ("assistant", [{"type": "text", "text": "Second."}]),
        ("assistant", None),
    ]
    reading = read_records([{"messages": [{"role": role, "content": content} for role, content in turns]}])
    found = [(record.prompt, record.text) for record in reading.records]
    assert found == [("One?", "First."), (None, "More."), ("Two?", "Second.")]


def test_named_columns_win_and_absent_ones_are_listed(tmp_path: Path) -> None:
    content = "text,body,ask\nno,yes,why\n"
    (record,) = read(tmp_path, "a.csv", content, text_column="body", prompt_column="ask").records
    assert (record.prompt, record.text) == ("why", "yes")
    with pytest.raises(CorpusError, match="a.csv has no column 'story'; its columns are 'text', 'body', 'ask'"):
        read(tmp_path, "a.csv", content, text_column="story")
    with pytest.raises(CorpusError, match="no column 'question'"):
        read_records([{"text": "a"}], prompt_column="question")


def test_a_file_without_known_columns_is_named_once_and_not_quoted(tmp_path: Path) -> None:
    reading = read(tmp_path, "a.csv", "secret,b\n1,2\n3,4\n")
    ((line, reason),) = skipped(reading)
    assert line == 2 and "text_column" in reason and "secret" not in reason


def test_csv_rows_are_named_by_the_line_where_they_begin(tmp_path: Path) -> None:
    content = b'text,n\n"a\nlong one",1\n\n"x" y,2\nfine,3\n"caf\n\xe9",4\ntoo,many,5\n\x00,6\n"never closed,7\nx,8\n'
    reading = read(tmp_path, "a.csv", content)
    assert [(record.line, record.text) for record in reading.records] == [(2, "a\nlong one"), (6, "fine")]
    lines = skipped(reading)
    assert [line for line, _ in lines] == [5, 8, 9, 10, 11]
    for (_, reason), expected in zip(
        lines, ["not CSV", "0xe9 is not UTF-8", "3 fields under 2", "NUL", "not CSV"], strict=True
    ):
        assert expected in reason


def test_bad_jsonl_rows_are_named_and_skipped(tmp_path: Path) -> None:
    rows = [
        b'{"text": "good"}',
        b"{broken",
        b"",
        b'["list"]',
        b'{"text": null}',
        b'{"text": 7}',
        b'{"text": " ... "}',
        b'{"other": "x"}',
        b'{"text": "caf\xc3"}',
        b'{"text": "\\ud800"}',
        b'{"text": "\\u0000"}',
        b'{"messages": "hello"}',
        b'{"messages": [[1]]}',
        b'{"messages": [{"role": "user", "content": "x"}]}',
        b'{"prompt": 3, "response": "x"}',
        b"[" * 100_000,
        b'{"text": ' + b"9" * 10_000 + b"}",
        b'{"text": "' + b"a" * MAX_BYTES + b'"}',
        b'{"text": "good too", "prompt": null}',
    ]
    reading = read(tmp_path, "a.jsonl", b"\r\n".join(rows))
    assert [(record.line, record.text) for record in reading.records] == [(1, "good"), (19, "good too")]
    assert sorted(line for line, _ in skipped(reading)) == [2, *range(4, 19)]
    assert all(item.file == "a.jsonl" for item in reading.skipped)
    assert "hello" not in str(reading.skipped)


@pytest.mark.parametrize(
    ("content", "found", "line"),
    [
        ('[\n{"text": "a"},\n{"text": "b"},\n', ["a", "b"], 4),
        ('[\n{"text": "a"},\n{"text": }\n]', ["a"], 3),
        ('[\n{"text": "a"}\n]\n]', ["a"], 3),
        ('{"text": "a"}\n]', ["a"], 2),
        (b'[\n{"text": "caf\xe9"}]', [], 2),
        ("[]", [], 1),
        ("[1]", [], 1),
    ],
)
def test_broken_json_is_named_by_line(tmp_path: Path, content: str | bytes, found: list[str], line: int) -> None:
    reading = read(tmp_path, "a.json", content)
    assert texts(reading) == found
    assert [number for number, _ in skipped(reading)] == [line]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.csv", "a.jsonl", "a.json"])
@pytest.mark.parametrize("content", [b"", b"\n\r\n  \n", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "text".encode("utf-16")])
def test_empty_and_binary_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    reading = read(tmp_path, name, content)
    assert reading.records == []
    ((line, reason),) = skipped(reading)
    assert line == 1 and ("nothing in it" if not content.strip() else "binary") in reason


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.json"])
def test_an_endless_line_costs_no_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with path.open("wb") as stream:
        stream.write(b"text\n" + b"a " * (MAX_WHOLE // 2 + 100) + b"\nlast\n")
    tracemalloc.start()
    reading = read_records(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (1.2 * MAX_WHOLE if name == "a.json" else 8 * MAX_BYTES)
    over = [item for item in reading.skipped if "over" in item.reason]
    assert [item.line for item in over] == [1 if name == "a.json" else 2]
    if name in ("a.txt", "a.csv"):
        assert texts(reading)[-1].endswith("last")


def test_markdown_without_front_matter_and_code(tmp_path: Path) -> None:
    content = "---\ntitle: x\n---\nFirst.\n````py\ncode\n```\nmore code\n````\nSecond.\n\n~~~\nopen\n"
    (record,) = read(tmp_path, "a.md", content).records
    assert record.text == "First.\n\nSecond." and record.line == 4
    (record,) = read(tmp_path, "b.md", "---\nNot front matter, for nothing ends it.\n").records
    assert record.text.startswith("---\nNot front")


def test_wrapped_lines_are_joined_and_verses_are_not(tmp_path: Path) -> None:
    long = "a line that somebody's editor broke at some seventy characters, as"
    reading = read(tmp_path, "a.txt", f"{long}\n{long}\nthe end\r\n \r\nRoses are red\r\nviolets are not\n")
    assert texts(reading) == [f"{long} {long} the end", "Roses are red\nviolets are not"]
    assert [record.line for record in reading.records] == [1, 5]


def test_a_bad_byte_costs_its_paragraph_only(tmp_path: Path) -> None:
    reading = read(tmp_path, "a.txt", b"one\n\ntwo\ncaf\xe9\n\nthree\n")
    assert texts(reading) == ["one\n\nthree"]
    assert skipped(reading) == [(4, "byte 0xe9 is not UTF-8; save the file as UTF-8")]


WORDS = st.lists(st.sampled_from(["a", "word.", "Yes!", "äö", "x?”"]), min_size=1, max_size=500).map(" ".join)


@given(st.lists(WORDS, max_size=8))
@settings(deadline=None)
def test_prose_keeps_every_word_in_order_and_sizes_within_bounds(paragraphs: list[str]) -> None:
    pieces = list(split_prose(enumerate(paragraphs, 1)))
    assert " ".join(text for _, text in pieces).split() == " ".join(paragraphs).split()
    sizes = [len(text.split()) for _, text in pieces]
    assert all(size <= MAX_WORDS for size in sizes)
    # A short one is the last, or stands where joining would have made too long a text.
    assert all(a >= MIN_WORDS or a + b > MAX_WORDS for a, b in zip(sizes, sizes[1:], strict=False))
    assert [line for line, _ in pieces] == sorted(line for line, _ in pieces)


def test_a_long_paragraph_is_cut_between_sentences() -> None:
    pieces = [text for _, text in split_prose([(1, "This one has five words. " * 90)])]
    assert len(pieces) == 3 and all(text.endswith("words.") for text in pieces)


def test_a_short_paragraph_is_not_joined_beyond_the_bound() -> None:
    pieces = [text for _, text in split_prose([(1, "a " * (MIN_WORDS - 1)), (2, "b " * MAX_WORDS)])]
    assert [len(text.split()) for text in pieces] == [MIN_WORDS - 1, MAX_WORDS]


def test_a_folder_is_read_sorted_without_hidden_and_foreign_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", ".git/x.txt", ".hidden.txt", "~$c.docx", "photo.png", "a/more.png", "README"):
        put(tmp_path, name, f"text of {name}")
    reading = read_records(tmp_path)
    assert [record.file for record in reading.records] == ["a/z.txt", "b.txt"]  # and never joined
    assert reading.files == 2 and reading.skipped == []
    assert len(reading.notes) == 1 and ".png (2), none (1)" in reading.notes[0]


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "a.txt", "good")
    put(tmp_path, "b.txt", "locked")
    opened = builtins.open

    def locked(path: Path, *args: object, **kwargs: object) -> object:
        if Path(path).name == "b.txt":
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", locked)
    reading = read_records(tmp_path)
    assert texts(reading) == ["good"] and skipped(reading) == [(1, "cannot be read: Permission denied")]


def test_word_documents(tmp_path: Path) -> None:
    document = docx.Document()
    for paragraph in ("First.", "", "Second."):
        document.add_paragraph(paragraph)
    document.save(str(tmp_path / "a.docx"))
    assert texts(read_records(tmp_path / "a.docx")) == ["First.\n\nSecond."]
    document.add_table(1, 1).cell(0, 0).text = "In a table."
    document.save(str(tmp_path / "table.docx"))
    reading = read_records(tmp_path / "table.docx")
    assert [record.text for record in reading.records] == ["First.\n\nSecond."]
    assert [item.reason for item in reading.skipped] == ["text in tables cannot be read; this document has 1"]
    (tmp_path / "table.docx").unlink()
    whole = (tmp_path / "a.docx").read_bytes()
    put(tmp_path, "b.docx", whole[: len(whole) // 2])
    put(tmp_path, "c.docx", b"")
    with zipfile.ZipFile(tmp_path / "d.docx", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("word/document.xml", b" " * (MAX_WHOLE + 1))
    reading = read_records(tmp_path)
    assert [item.file for item in reading.skipped] == ["b.docx", "c.docx", "d.docx"]
    assert "split the document" in reading.skipped[-1].reason


def test_word_documents_need_python_docx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "docx", None)
    with pytest.raises(ImportError, match=r"a.docx needs python-docx: pip install 'duet-moe\[finetune\]'"):
        read(tmp_path, "a.docx", b"")


@given(st.sampled_from([".txt", ".md", ".csv", ".jsonl", ".json", ".docx"]), st.binary(max_size=300))
@settings(deadline=None, max_examples=300)
def test_any_bytes_are_read_or_named(tmp_path_factory: pytest.TempPathFactory, ending: str, content: bytes) -> None:
    path = put(tmp_path_factory.getbasetemp(), f"fuzz{ending}", content)
    reading = read_records(path)
    assert reading.records or reading.skipped
    for item in (*reading.records, *reading.skipped):
        assert 1 <= item.line <= content.count(b"\n") + 1
    assert path.read_bytes() == content


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["text", "prompt", "response", "messages", "role", "content"]), inner)
        ),
        max_leaves=12,
    )
)
@settings(deadline=None, max_examples=300)
def test_any_json_is_read_or_named(value: object) -> None:
    reading = read_records([value])
    assert reading.records or reading.skipped
    assert all(record.text.strip() for record in reading.records)
