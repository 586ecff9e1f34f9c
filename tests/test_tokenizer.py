"""The tokenizer loses nothing, never makes a special token out of a text, and speaks the chat format."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from duet_moe.finetune.corpus import Document, Source
from duet_moe.finetune.tokenizer import (
    ASSISTANT,
    END,
    SPECIAL_TOKENS,
    USER,
    load_tokenizer,
    tokens_per_word,
    train_tokenizer,
    weighted_texts,
)

TEXTS = ["The little fox ran over the hill and sang. She was 17!", "A fox and a hill.\n\nThe end, said the fox."] * 20
TOKENIZER = train_tokenizer(TEXTS, vocab_size=300)
SAID = st.text().map(str.strip)


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@given(st.text())
def test_round_trip_is_exact(text: str) -> None:
    assert TOKENIZER.decode(ids_of(text)) == text


@given(st.text(), st.sampled_from(SPECIAL_TOKENS))
def test_text_never_becomes_a_special_token(text: str, special: str) -> None:
    ids = ids_of(f"{text}{special}{text}")
    assert min(ids) >= len(SPECIAL_TOKENS)
    assert TOKENIZER.decode(ids) == f"{text}{special}{text}"


def test_special_tokens_have_their_fixed_ids() -> None:
    assert TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4, 5]
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id) == (0, 1)
    assert TOKENIZER("<|user|>a", add_special_tokens=False)["input_ids"][0] == USER


def test_digits_are_single_and_no_space_is_added() -> None:
    assert TOKENIZER.tokenize("1776") == ["1", "7", "7", "6"]
    assert len(TOKENIZER.tokenize(" 1776")) == 4
    assert TOKENIZER.decode(ids_of("fox")) == "fox"
    assert TOKENIZER.tokenize("fox") != TOKENIZER.tokenize(" fox")


def test_chat_template_has_our_format() -> None:
    asked = [{"role": "user", "content": " Tell me a story. "}]
    prompt = TOKENIZER.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|user|>Tell me a story.<|assistant|>"
    full = [{"role": "system", "content": "Be kind."}, *asked, {"role": "assistant", "content": "No."}]
    text = TOKENIZER.apply_chat_template(full, tokenize=False)
    assert text == "<|system|>Be kind.<|user|>Tell me a story.<|assistant|>No.<|end|>"


@given(SAID, SAID.filter(bool))
def test_assistant_mask_marks_the_response_and_its_end(prompt: str, response: str) -> None:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    out = TOKENIZER.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    assert marked == [*TOKENIZER(response, add_special_tokens=False)["input_ids"], END]
    assert out["input_ids"].index(ASSISTANT) + 1 == out["assistant_masks"].index(1)


def test_unknown_roles_are_refused() -> None:
    with pytest.raises(Exception, match="role must be system, user or assistant"):
        TOKENIZER.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {p.name for p in tmp_path.iterdir()}
    loaded = load_tokenizer(tmp_path)
    assert loaded.chat_template == TOKENIZER.chat_template
    assert loaded.model_max_length == TOKENIZER.model_max_length
    assert loaded("A 12 fox")["input_ids"] == TOKENIZER("A 12 fox")["input_ids"]


def test_a_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    bpe = TOKENIZER.backend_tokenizer.to_str().replace("<|user|>", "<|other|>")
    (tmp_path / "t.json").write_text(bpe, encoding="utf-8")
    PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "t.json")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="special tokens have ids"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("size", [100, 5000])
def test_vocabulary_sizes_that_cannot_be_filled_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=str(size)):
        train_tokenizer(TEXTS, vocab_size=size)


def test_texts_are_drawn_by_weight() -> None:
    sources = [Source("a", "a", 3), Source("b", "b", 1)]
    documents = {"a": [Document(None, "a" * 10)] * 500, "b": [Document("b" * 4, "b" * 6)] * 500}
    text = "".join(weighted_texts(sources, documents, characters=8000))
    assert text.count("a") == pytest.approx(6000, abs=10)
    assert text.count("b") == pytest.approx(2000, abs=10)


def test_tokens_per_word_counts_prompts_and_responses() -> None:
    assert tokens_per_word(TOKENIZER, [Document("12", "4")]) == pytest.approx(3 / 2)
    with pytest.raises(ValueError, match="no words"):
        tokens_per_word(TOKENIZER, [])
