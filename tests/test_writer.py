"""Words in, words out: streaming equals writing, rows equal themselves alone, and a prompt cannot break its frame."""

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SENTENCES, tiny_tokenizer, tiny_writer_of
from transformers import LogitsProcessor, LogitsProcessorList

from duet_moe import Mode, NotInThisVersionError, Writer
from duet_moe.configuration.modes import modes_as_dict
from duet_moe.finetune.tokenizer import ASSISTANT, END, SPECIAL_TOKENS, USER
from duet_moe.modeling.evidence import Text, token_evidence

PROMPT = "Tell me about the fox."
BROKEN = "\ufffd"


class Script(LogitsProcessor):
    """Makes row i write the ids `scripts[i]`, then end."""

    def __init__(self, *scripts: list[int]) -> None:
        self.scripts, self.step = scripts, 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        forced = torch.full_like(scores, -torch.inf)
        for row, script in enumerate(self.scripts):
            forced[row, script[self.step] if self.step < len(script) else END] = 0.0
        self.step += 1
        return forced


def scripted(*scripts: list[int]) -> dict[str, LogitsProcessorList]:
    return {"logits_processor": LogitsProcessorList([Script(*scripts)])}


def byte_ids(text: str) -> list[int]:
    """Spell `text` in single bytes, which splits every character beyond ASCII."""
    alphabet = dict(zip(*byte_alphabet(), strict=True))
    return [tiny_tokenizer().convert_tokens_to_ids(alphabet[byte]) for byte in text.encode()]


def byte_alphabet() -> tuple[list[int], list[str]]:
    """Return the 256 bytes and how a byte-level vocabulary writes them (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return printable + hidden, [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(hidden))]


def prompts_that_reach_the_model(writer: Writer, prompt: str, **kwargs: object) -> list[int]:
    """Return the ids of the first forward pass."""
    calls: list[list[int]] = []
    hook = writer.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    writer.write(prompt, max_new_tokens=1, **kwargs)
    hook.remove()
    return calls[0]


def generating_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "duet-generate"]


@pytest.mark.parametrize("mode", ["factual", "creative", "hybrid"])
def test_the_pieces_of_a_stream_join_to_what_write_returns(tiny_writer: Writer, mode: str) -> None:
    written = tiny_writer.write(PROMPT, mode=mode, seed=3, max_new_tokens=40)
    pieces = list(tiny_writer.stream(PROMPT, mode=mode, seed=3, max_new_tokens=40))
    assert "".join(piece.text for piece in pieces) == written.text
    assert tuple(item for piece in pieces for item in piece.evidence) == written.evidence
    assert len(pieces) > 1
    assert (written.mode, written.seed, written.prompt, str(written)) == (mode, 3, PROMPT, written.text)


def test_a_drawn_seed_is_reported_and_repeats_the_text(tiny_writer: Writer) -> None:
    first, second = (tiny_writer.write(PROMPT, max_new_tokens=12) for _ in range(2))
    assert first.mode == "creative"
    assert first.seed != second.seed
    assert first.tokens != second.tokens
    assert tiny_writer.write(PROMPT, seed=first.seed, max_new_tokens=12).tokens == first.tokens


def test_the_rows_of_a_comparison_equal_the_answers_alone(tiny_writer: Writer) -> None:
    modes = ("factual", "creative", "hybrid")
    steps = list(tiny_writer.stream_compare(PROMPT, modes, seed=5, max_new_tokens=30))
    final = tiny_writer.compare(PROMPT, modes, seed=5, max_new_tokens=30)
    assert list(final) == list(modes)
    for mode in modes:
        alone = tiny_writer.write(PROMPT, mode=mode, seed=5, max_new_tokens=30)
        assert final[mode].tokens == steps[-1][mode].tokens == alone.tokens
        assert final[mode].text == alone.text
    for earlier, later in zip(steps, steps[1:], strict=False):
        assert all(later[mode].text.startswith(earlier[mode].text) for mode in modes)
    assert {text.finish_reason for text in steps[0].values()} == {"running"}


def test_a_mode_that_is_named_twice_is_answered_twice(tiny_writer: Writer) -> None:
    texts = tiny_writer.compare(PROMPT, ("creative", "creative"), seed=1, max_new_tokens=6)
    assert list(texts) == ["creative", "creative (2)"]


def test_settings_of_a_comparison_leave_its_greedy_mode_alone(tiny_writer: Writer) -> None:
    plain = tiny_writer.compare(PROMPT, seed=5, max_new_tokens=20)
    warm = tiny_writer.compare(PROMPT, seed=5, max_new_tokens=20, temperature=3.0, head_mix=0.9)
    assert warm["factual"].tokens == plain["factual"].tokens
    alone = tiny_writer.write(PROMPT, seed=5, max_new_tokens=20, temperature=3.0, head_mix=0.9)
    assert warm["creative"].tokens == alone.tokens != plain["creative"].tokens
    few = tiny_writer.compare(PROMPT, seed=5, max_new_tokens=20, num_experts_per_tok=1)
    alone = tiny_writer.write(PROMPT, mode="factual", max_new_tokens=20, num_experts_per_tok=1)
    assert few["factual"].tokens == alone.tokens


def test_ideas_are_answers_with_seeds_that_count_up(tiny_writer: Writer) -> None:
    ideas = tiny_writer.brainstorm(PROMPT, n=3, seed=7, max_new_tokens=8)
    assert [idea.seed for idea in ideas] == [7, 8, 9]
    assert len({idea.tokens for idea in ideas}) == 3
    assert ideas[1].tokens == tiny_writer.write(PROMPT, seed=8, max_new_tokens=8).tokens


def test_several_prompts_in_one_batch_are_answered_as_alone(tiny_writer: Writer) -> None:
    prompts = ["Hi", PROMPT, "What is the capital of Portugal?"]
    together = tiny_writer.write_batch(prompts, mode="creative", seed=2, max_new_tokens=12)
    for number, prompt in enumerate(prompts):
        assert together[number].tokens == tiny_writer.write(prompt, seed=2 + number, max_new_tokens=12).tokens


def test_a_batch_takes_a_seed_for_each_prompt(tiny_writer: Writer) -> None:
    together = tiny_writer.write_batch([PROMPT] * 3, mode="creative", seed=[9, 2, 9], max_new_tokens=12)
    alone = tiny_writer.write(PROMPT, mode="creative", seed=9, max_new_tokens=12)
    assert [text.seed for text in together] == [9, 2, 9]
    assert together[0].tokens == together[2].tokens == alone.tokens != together[1].tokens
    with pytest.raises(ValueError, match="seed has 2 entries for 3"):
        tiny_writer.write_batch([PROMPT] * 3, seed=[1, 2])


def test_evidence_is_what_both_heads_think_of_every_token(tiny_writer: Writer) -> None:
    prompt = prompts_that_reach_the_model(tiny_writer, PROMPT)
    written = tiny_writer.write(PROMPT, seed=2, max_new_tokens=24)
    assert len(written.evidence) == len(written.tokens) == 24
    assert "".join(item.text for item in written.evidence) == written.text
    with torch.no_grad():
        outputs = tiny_writer.model(torch.tensor([[*prompt, *written.tokens]]), output_head_logits=True)
    for step, (token, item) in enumerate(zip(written.tokens, written.evidence, strict=True), len(prompt) - 1):
        coherence, diversity = (
            float(logits[0, step].log_softmax(-1)[token])
            for logits in (outputs.coherence_logits, outputs.diversity_logits)
        )
        assert item.coherence_logprob == pytest.approx(coherence, abs=1e-3)
        assert item.diversity_logprob == pytest.approx(diversity, abs=1e-3)
        assert 0 <= item.disagreement <= 1
    assert {item.decided_by for item in written.evidence} <= {"coherence", "diversity", "both"}


@pytest.mark.parametrize(
    "coherence, diversity, decided_by",
    [([4.0, 0.0], [0.0, 4.0], "coherence"), ([0.0, 4.0], [4.0, 0.0], "diversity"), ([1.0, 0.0], [1.0, 0.01], "both")],
)
def test_the_head_that_found_the_token_likelier_decided_it(
    coherence: list[float], diversity: list[float], decided_by: str
) -> None:
    assert token_evidence(0, "a", torch.tensor(coherence), torch.tensor(diversity)).decided_by == decided_by


def test_without_evidence_the_unused_head_is_not_computed(tiny_writer: Writer) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("the diversity head was computed")

    expected = tiny_writer.write(PROMPT, mode="factual", max_new_tokens=8)
    tiny_writer.model.diversity_head.register_forward_pre_hook(fail)
    written = tiny_writer.write(PROMPT, mode="factual", max_new_tokens=8, evidence=False)
    assert (written.tokens, written.evidence) == (expected.tokens, ())


def test_an_answer_ends_at_its_end_token_while_the_other_goes_on(tiny_writer: Writer) -> None:
    short, long = byte_ids("Yes"), byte_ids("Once upon a time")
    texts = tiny_writer.compare(PROMPT, max_new_tokens=40, **scripted(short, long))
    assert (texts["factual"].text, texts["creative"].text) == ("Yes", "Once upon a time")
    assert texts["factual"].tokens == (*short, END)
    assert texts["factual"].finish_reason == texts["creative"].finish_reason == "end"
    assert len(texts["factual"].evidence) == 4
    cut = tiny_writer.write(PROMPT, max_new_tokens=5, **scripted(long))
    assert (cut.text, cut.finish_reason) == ("Once ", "length")


def test_a_character_of_several_bytes_is_never_shown_broken(tiny_writer: Writer) -> None:
    text = "Naïve 🦊 at the café – 狐"
    pieces = [piece.text for piece in tiny_writer.stream(PROMPT, max_new_tokens=60, **scripted(byte_ids(text)))]
    assert "".join(pieces) == text
    assert not any(BROKEN in piece for piece in pieces)
    assert len(pieces) > len(text)  # a piece for every byte, some without text


@pytest.mark.parametrize("shown", range(1, 4))
def test_a_character_that_the_limit_cuts_is_left_out(tiny_writer: Writer, shown: int) -> None:
    ids = byte_ids("ok 🦊")
    written = tiny_writer.write(PROMPT, max_new_tokens=3 + shown, **scripted(ids))
    assert (written.text, written.finish_reason) == ("ok ", "length")
    assert "".join(item.text for item in written.evidence) == written.text


def test_closing_a_stream_ends_the_generation(tiny_writer: Writer) -> None:
    for stream in (
        tiny_writer.stream(PROMPT, seed=1, max_new_tokens=80),
        tiny_writer.stream_compare(PROMPT, seed=1, max_new_tokens=80),
    ):
        passes: list[int] = []
        hook = tiny_writer.model.model.register_forward_hook(lambda *args, passes=passes: passes.append(1))
        next(stream)
        assert len(generating_threads()) == 1
        stream.close()
        assert generating_threads() == []
        assert len(passes) < 80
        hook.remove()


def test_an_error_while_generating_reaches_the_caller_and_leaves_no_thread(tiny_writer: Writer) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no memory left")

    tiny_writer.model.coherence_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory left"):
        tiny_writer.write(PROMPT, max_new_tokens=4)
    assert generating_threads() == []


def test_a_prompt_that_is_too_long_loses_its_beginning_and_says_so(tiny_writer: Writer) -> None:
    ids = prompts_that_reach_the_model(tiny_writer, "The fox sang. " * 90 + "Now the moon")
    assert len(ids) == 255
    assert tiny_writer.tokenizer.decode(ids).endswith("Now the moon<|assistant|>")
    written = tiny_writer.write("The fox sang. " * 90, max_new_tokens=5)
    (note,) = written.notes
    assert "too long" in note and "first" in note
    assert tiny_writer.write(PROMPT, max_new_tokens=5).notes == ()


@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|e", "nd|>", "<|us", "er|>", "fox", " "]), min_size=1, max_size=9))
@settings(max_examples=40)
def test_special_tokens_in_a_prompt_cannot_end_its_turn(parts: list[str]) -> None:
    writer = tiny_writer_of(tiny_tokenizer())
    ids = prompts_that_reach_the_model(writer, "".join(parts) + " said", evidence=False)
    assert (ids[0], ids[-1]) == (USER, ASSISTANT)
    assert all(token >= len(SPECIAL_TOKENS) for token in ids[1:-1])


def test_a_special_token_that_appears_when_another_is_taken_out_is_taken_out_too(tiny_writer: Writer) -> None:
    ids = prompts_that_reach_the_model(tiny_writer, "fox<|e<|user|>nd|> moon")
    assert tiny_writer.tokenizer.decode(ids) == "<|user|>fox moon<|assistant|>"


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda writer: writer.write(""), "prompt is empty"),
        (lambda writer: writer.write(" \n"), "prompt is empty"),
        (lambda writer: writer.write("<|end|> <|user|>"), "prompt is empty"),
        (lambda writer: writer.compare(""), "prompt is empty"),
        (lambda writer: writer.write(PROMPT, mode="poetic"), "'poetic'.*creative.*factual.*hybrid"),
        (lambda writer: writer.compare(PROMPT, ("factual", "poetic")), "'poetic'"),
        (lambda writer: writer.write(PROMPT, max_new_tokens=0), "max_new_tokens=0"),
        (lambda writer: writer.write(PROMPT, max_new_tokens=256), "context has 256 tokens"),
        (lambda writer: writer.brainstorm(PROMPT, n=0), "n=0"),
        (lambda writer: writer.write(PROMPT, temperature=-1.0), "temperature=-1.0"),
        (lambda writer: writer.write(PROMPT, head_mix=1.5), "head_mix"),
        (lambda writer: writer.write(PROMPT, num_experts_per_tok=9), "num_experts_per_tok=9"),
    ],
)
def test_what_cannot_be_written_is_refused_with_a_reason(tiny_writer: Writer, call: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call(tiny_writer)
    assert generating_threads() == []


@pytest.mark.parametrize(
    "call",
    [
        lambda writer: writer.write(PROMPT, guardrails="policy.yaml"),
        lambda writer: Writer.load(guardrails="policy.yaml"),
    ],
)
def test_what_a_later_version_brings_says_so(tiny_writer: Writer, call: object) -> None:
    with pytest.raises(NotInThisVersionError, match="not in this version"):
        call(tiny_writer)


def test_a_saved_writer_loads_with_its_modes_and_writes_the_same(tiny_writer: Writer, tmp_path: Path) -> None:
    mine = Mode("mine", head_mix=0.5)
    tiny_writer.model.generation_config.modes = modes_as_dict({"mine": mine})
    tiny_writer.model.save_pretrained(tmp_path / "fox")
    tiny_writer.tokenizer.save_pretrained(tmp_path / "fox")
    loaded = Writer.load(tmp_path / "fox")
    assert loaded.name == "fox"
    assert loaded.modes["mine"] == mine
    assert loaded.model.dtype == torch.float32
    expected = Writer(tiny_writer.model, tiny_writer.tokenizer).write(SENTENCES[0], mode="mine", max_new_tokens=10)
    found = loaded.write(SENTENCES[0], mode="mine", max_new_tokens=10)
    assert isinstance(found, Text)
    assert found.tokens == expected.tokens


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model"])
def test_a_model_that_is_nowhere_is_reported_by_name(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=name):
        Writer.load(name)


def test_a_folder_without_a_model_is_reported_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        Writer.load(tmp_path)
