"""What an evaluator learns from: files by name, two sides that share nothing, rows that lose no token."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import SENTENCES

from duet_moe.evaluation.evaluator_corpus import BEGIN, find_files, pack, read_texts, train_tokenizer
from duet_moe.finetune.corpus import is_held_out

TOKENIZER = train_tokenizer(SENTENCES * 5, vocab_size=300)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_files_are_named_from_what_was_given_on(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "data" / "deep" / "a.jsonl", ["A"])
    second = write_jsonl(tmp_path / "b [1].jsonl", ["B"])
    (tmp_path / "data" / "notes.md").write_text("no text")
    files = find_files([tmp_path / "data", second])
    assert files == {"data/deep/a.jsonl": first, "b [1].jsonl": second}
    assert read_texts(files, 0.5)[0] + read_texts(files, 0.5)[1]


def test_data_that_is_not_there_or_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no .*absent"):
        find_files([tmp_path / "absent"])
    path = write_jsonl(tmp_path / "one" / "x.jsonl", ["A"])
    other = write_jsonl(tmp_path / "two" / "x.jsonl", ["B"])
    with pytest.raises(ValueError, match="x.jsonl is given twice"):
        find_files([path, other])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="matches"):
        find_files([tmp_path / "empty"])


def test_no_text_of_one_side_repeats_one_of_the_other(tmp_path: Path) -> None:
    texts = [f"Number {number} is a story of its own." for number in range(200)]
    files = find_files([write_jsonl(tmp_path / "a.jsonl", texts), write_jsonl(tmp_path / "b.jsonl", texts[:50])])
    train, heldout = read_texts(files, 0.2)
    assert sorted(train + heldout) == sorted(texts)
    assert 20 < len(heldout) < 60


def test_text_that_a_recipe_trains_on_is_parted_too(tmp_path: Path) -> None:
    texts = [text for n in range(300) if not is_held_out(text := f"Number {n} is a story of its own.", 0.1)]
    train, heldout = read_texts(find_files([write_jsonl(tmp_path / "a.jsonl", texts)]), 0.1)
    assert len(heldout) > 10 and len(train) > 200


def test_passages_of_one_text_are_not_parted(tmp_path: Path) -> None:
    lines = [f"The {n}th of these lines is long enough to be told from the others by its words." for n in range(9)]
    texts = ["\n".join(lines[start : start + 4]) for start in range(6)]
    train, heldout = read_texts(find_files([write_jsonl(tmp_path / "a.jsonl", [*texts, *SENTENCES])]), 0.4)
    shared = [len(set(a.split("\n")) & set(b.split("\n"))) for a in train for b in heldout]
    assert heldout and train and max(shared) < 3


def test_too_few_texts_are_refused(tmp_path: Path) -> None:
    files = find_files([write_jsonl(tmp_path / "a.jsonl", ["Only one."])])
    with pytest.raises(ValueError, match="1 texts to train on and 0 held out .2%.: give more"):
        read_texts(files, 0.02)


@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert TOKENIZER.decode(ids) == text


def test_one_special_token_begins_and_pads() -> None:
    assert len(TOKENIZER) == 300
    assert TOKENIZER.bos_token == TOKENIZER.eos_token == TOKENIZER.pad_token == BEGIN
    assert TOKENIZER.bos_token_id == 0


def test_rows_hold_every_text_once_after_its_begin_token() -> None:
    texts = [*SENTENCES, f"A {BEGIN} is plain."]
    rows = pack(texts, TOKENIZER, window=16, seed=0)
    assert rows.ids.shape[1] == 16 and rows.ids.dtype.is_signed
    flat = rows.ids.flatten().tolist()
    used = sum(1 + len(TOKENIZER(t, add_special_tokens=False, split_special_tokens=True)["input_ids"]) for t in texts)
    assert len(flat) - used < 16
    assert flat[used:] == flat[: len(flat) - used]  # the last row ends with the front
    parts = TOKENIZER.decode(flat[:used]).split(BEGIN)
    plain = parts.index(next(part for part in parts if part.endswith("A ")))
    parts[plain : plain + 2] = [f"{parts[plain]}{BEGIN}{parts[plain + 1]}"]
    assert parts[0] == "" and sorted(parts[1:]) == sorted(texts)
    assert np.array_equal(rows[1]["labels"], rows[1]["input_ids"])


def test_the_order_of_texts_is_drawn_from_the_seed() -> None:
    first, again, other = (pack(SENTENCES * 4, TOKENIZER, 16, seed).ids.tolist() for seed in (0, 0, 1))
    assert first == again != other
