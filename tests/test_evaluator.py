"""Bits per character: by hand for a uniform model, by the chain rule for others, and never of the prompt."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sources import source_model
from tiny import tiny_tokenizer, tiny_writer_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from duet_moe.evaluation import evaluator as module
from duet_moe.evaluation.evaluator import Evaluator

TEXTS = [
    "The fox sang.",
    "Q",
    "A cat who kept the door of the café by the sea, and 17 moons over the hill.",
    "Once upon a time there was a fox. " * 4,
]
CLOSE = dict(rtol=0.0, atol=1e-4)


def uniform(vocab_size: int = 512, window: int | None = None) -> Evaluator:
    """A model to which all tokens are equally likely: nine bits for each of 512."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    torch.nn.init.zeros_(model.lm_head.weight)
    return Evaluator(model, tiny_tokenizer(), window)


def opinionated(window: int | None = None) -> Evaluator:
    return Evaluator(source_model("llama"), tiny_tokenizer(), window)


def ids_of(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def chain_rule(evaluator: Evaluator, context: list[int], text: list[int], first: int = 0) -> float:
    """Return the bits of `text[first:]` after `context`, asking the model for one token at a time."""
    bits = 0.0
    with torch.no_grad():
        for index in range(first, len(text)):
            logits = evaluator.model(torch.tensor([context + text[:index]])).logits[0, -1]
            bits -= logits.double().log_softmax(0)[text[index]].item() / math.log(2)
    return bits


def test_a_uniform_model_needs_nine_bits_for_each_token_of_512() -> None:
    # Each byte of Q, Z, é and the emoji is a token; the last text has four.
    bits = uniform().bits_per_character(["Q", "QZ", "é", "🦊", "The fox"])
    assert [len(ids_of(text)) for text in ("Q", "QZ", "é", "🦊", "The fox")] == [1, 2, 2, 4, 4]
    assert bits == pytest.approx([9, 9, 18, 36, 36 / 7], abs=1e-5)
    assert bits.dtype == np.float64


def test_every_token_of_a_text_is_judged_once_however_many_windows_it_takes() -> None:
    text = "Zq7 " * 60
    expected = 9 * len(ids_of(text)) / len(text)
    for window in (2, 3, 8, 17, 64):
        assert uniform(window=window).bits_per_character([text]) == pytest.approx([expected], abs=1e-4)
        assert uniform(window=window).bits_per_character([text], ["A prompt. " * 9]) == pytest.approx(
            [expected], abs=1e-4
        )


def test_it_is_the_chain_rule_after_the_token_that_begins_a_text() -> None:
    judge = opinionated()
    for text in TEXTS:
        expected = chain_rule(judge, [tiny_tokenizer().eos_token_id], ids_of(text)) / len(text)
        assert judge.bits_per_character([text]) == pytest.approx([expected], **{"abs": 1e-4})


def test_a_prompt_and_what_separates_it_are_read_but_not_counted() -> None:
    judge, prompt, text = opinionated(), "Tell of a fox.", "The fox sang to the moon."
    start = [tiny_tokenizer().eos_token_id]
    for separator in ("\n\n", "", " "):
        context = start + ids_of(prompt + separator)
        expected = chain_rule(judge, context, ids_of(text)) / len(text)
        assert judge.bits_per_character([text], [prompt], separator) == pytest.approx([expected], abs=1e-4)
    assert judge.bits_per_character([text], [prompt]) == judge.bits_per_character([text], [prompt], "\n\n")
    assert abs(judge.bits_per_character([text], [prompt]) - judge.bits_per_character([text])) > 0.01


def test_long_texts_are_judged_with_at_least_half_a_window_before_each_token() -> None:
    judge, window, half = opinionated(window=8), 8, 4
    text = TEXTS[2]
    tokens = [tiny_tokenizer().eos_token_id, *ids_of(text)]
    assert len(tokens) > 3 * window
    expected = 0.0
    for index in range(1, len(tokens)):
        begin = 0 if index < window else ((index - window) // half + 1) * half
        assert index - begin >= min(index, half)
        expected += chain_rule(judge, tokens[begin:index], tokens[index : index + 1])
    assert judge.bits_per_character([text]) == pytest.approx([expected / len(text)], abs=1e-4)


def test_a_batch_gives_the_figures_of_its_texts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = opinionated(window=32)
    prompts = ["", "A long prompt about a fox, the sea and a door. " * 3, "Go.", "Once"]
    together = judge.bits_per_character(TEXTS, prompts)
    alone = [judge.bits_per_character([text], [prompt])[0] for text, prompt in zip(TEXTS, prompts, strict=True)]
    assert len({round(bits, 3) for bits in alone}) == 4
    np.testing.assert_allclose(together, alone, **CLOSE)
    np.testing.assert_allclose(judge.bits_per_character(TEXTS[::-1], prompts[::-1]), alone[::-1], **CLOSE)
    monkeypatch.setattr(module, "_MOST_LOGITS", 1)  # a row at a time
    np.testing.assert_allclose(judge.bits_per_character(TEXTS, prompts), alone, **CLOSE)


def test_little_memory_means_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    judge, seen = uniform(window=8), []
    forward = judge._window_nats
    monkeypatch.setattr(judge, "_window_nats", lambda batch: seen.append(len(batch)) or forward(batch))
    monkeypatch.setattr(module, "_MOST_LOGITS", 2 * 8 * 512)
    judge.bits_per_character(["Q"] * 5)
    assert seen == [2, 2, 1]


def test_special_tokens_in_a_text_or_prompt_are_plain_characters() -> None:
    text = "<|end|>"
    assert len(ids_of(text)) > 1
    assert uniform().bits_per_character([text]) == pytest.approx([9 * len(ids_of(text)) / 7], abs=1e-5)
    judge = opinionated()
    expected = chain_rule(judge, [tiny_tokenizer().eos_token_id, *ids_of("<|user|>")], ids_of("A fox.")) / 6
    assert judge.bits_per_character(["A fox."], ["<|user|>"], "") == pytest.approx([expected], abs=1e-4)


def test_spaces_and_line_breaks_of_a_text_count() -> None:
    plain, spaced = uniform().bits_per_character(["Q", "\n Q \n"])
    assert spaced == pytest.approx(9 * len(ids_of("\n Q \n")) / 5, abs=1e-5)
    assert plain == pytest.approx(9, abs=1e-5)


@pytest.mark.parametrize(
    ("texts", "prompts", "message"),
    [
        ([], None, "no texts"),
        (["A", ""], None, "Text 1 is ''"),
        ([" \n"], None, "empty text"),
        (["A", "B"], ["C"], "1 prompts do not go with 2 texts"),
        ("one string", None, "put it into a list"),
        (["A"], "B", "put it into a list"),
    ],
)
def test_impossible_input_is_refused(texts: list[str], prompts: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        uniform().bits_per_character(texts, prompts)


def test_weights_that_give_no_figure_are_named() -> None:
    judge = uniform()
    torch.nn.init.constant_(judge.model.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="text 0 nan bits"):
        judge.bits_per_character(["A fox."])


def test_characters_that_the_tokenizer_does_not_know_are_refused() -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "fox": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>")
    judge = Evaluator(uniform().model, tokenizer)
    assert judge.bits_per_character(["fox fox"]) == pytest.approx([18 / 7], abs=1e-5)
    with pytest.raises(ValueError, match="does not know every character of 'fox cat'"):
        judge.bits_per_character(["fox", "fox cat"])


def test_a_tokenizer_must_have_a_token_that_begins_a_text() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match="neither bos_token nor eos_token"):
        Evaluator(uniform().model, bare)
    both = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, bos_token="<|text|>", eos_token="<|end|>"
    )
    assert Evaluator(uniform().model, both).start == both.bos_token_id != both.eos_token_id


@pytest.mark.parametrize("window", [0, 1, 65])
def test_windows_that_the_model_cannot_read_are_refused(window: int) -> None:
    with pytest.raises(ValueError, match=f"window is {window}; give 2 to 64"):
        uniform(window=window)


def test_the_window_is_the_context_up_to_1024() -> None:
    assert uniform().window == 64
    long = LlamaConfig(
        vocab_size=97, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=4096,
    )  # fmt: skip
    assert Evaluator(LlamaForCausalLM(long), tiny_tokenizer()).window == 1024


def test_any_causal_model_can_be_loaded_from_its_folder(tmp_path: Path) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=48))
    for name, model in {"gpt2": gpt2, "duet": tiny_writer_of(tiny_tokenizer()).model}.items():
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        expected = Evaluator(model, tiny_tokenizer()).bits_per_character(TEXTS)
        loaded = Evaluator.load(str(tmp_path / name))
        assert not loaded.model.training
        np.testing.assert_allclose(loaded.bits_per_character(TEXTS), expected, **CLOSE)
    assert Evaluator.load(str(tmp_path / "gpt2")).window == 48


def test_a_model_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        Evaluator.load(str(tmp_path / "absent"))
