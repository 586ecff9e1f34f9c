"""`Writer` and the command line speak in voices."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters import ALL, peft
from tiny import SENTENCES, tiny_tokenizer, tiny_writer_of

from duet_moe import Mode, Writer
from duet_moe.cli import main
from duet_moe.configuration.modes import BUILT_IN_MODES
from duet_moe.modeling.voice_files import voice_folder

PROMPT = SENTENCES[0]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A voice store with `acme` and `globex`, for the model of `tiny_writer`."""
    model = tiny_writer_of(tiny_tokenizer()).model
    for seed, name in enumerate(("acme", "globex")):
        torch.manual_seed(seed)
        tuned = peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig(r=4, lora_alpha=40, target_modules=ALL, init_lora_weights=False)
        )
        tuned.save_pretrained(tmp_path / "store" / name)
    return tmp_path / "store"


def test_a_writer_speaks_in_the_voice_that_a_call_names(store: Path, tiny_writer: Writer) -> None:
    writer = Writer(tiny_writer.model, tiny_writer.tokenizer, voice="acme", store=store)
    settings = dict(seed=3, max_new_tokens=10)
    own, named = writer.write(PROMPT, **settings), writer.write(PROMPT, voice="acme", **settings)
    assert (own.voice, own.tokens) == ("acme", named.tokens)
    other = writer.write(PROMPT, voice=store / "globex", **settings)
    base = writer.write(PROMPT, voice="base", **settings)
    assert (other.voice, base.voice) == ("globex", None)
    assert base.tokens == Writer(tiny_writer.model, tiny_writer.tokenizer).write(PROMPT, **settings).tokens
    assert len({own.tokens, other.tokens, base.tokens}) == 3
    assert writer.model.voice_names == ("acme", "globex")
    assert "".join(piece.text for piece in writer.stream(PROMPT, voice="globex", **settings)) == other.text
    ideas = writer.brainstorm(PROMPT, n=2, voice="globex", **settings)
    assert ideas[0].tokens == other.tokens and ideas[1].voice == "globex"
    batch = writer.write_batch([PROMPT] * 3, seed=3, max_new_tokens=10, voice=["base", None, "globex"])
    assert [text.voice for text in batch] == [None, "acme", "globex"]
    assert batch[0].tokens == base.tokens
    assert batch[2].tokens == writer.write(PROMPT, voice="globex", seed=5, max_new_tokens=10).tokens


def test_a_voice_leaves_the_factual_panel_of_a_comparison_alone(store: Path, tiny_writer: Writer) -> None:
    writer = Writer(tiny_writer.model, tiny_writer.tokenizer, store=store)
    plain, voiced = (writer.compare(PROMPT, seed=5, max_new_tokens=12, voice=voice) for voice in (None, "acme"))
    assert voiced["factual"].tokens == plain["factual"].tokens
    assert voiced["creative"].tokens == writer.write(PROMPT, voice="acme", seed=5, max_new_tokens=12).tokens
    assert voiced["creative"].tokens != plain["creative"].tokens


def test_only_without_a_voice_must_the_coherence_head_find_a_word_plausible(store: Path, tiny_writer: Writer) -> None:
    writer = Writer(tiny_writer.model, tiny_writer.tokenizer, store=store)
    strict = replace(BUILT_IN_MODES["creative"], plausible_min=1.0)  # all that the coherence head leaves is its best
    ask = dict(max_new_tokens=6, seed=3)
    base, free = (writer.write(PROMPT, strict, voice=voice, **ask) for voice in ("base", "acme"))
    ruled = writer.write(PROMPT, strict, voice="acme", plausible_min=1.0, **ask)
    greedy = writer.write(PROMPT, Mode("best"), max_new_tokens=6)
    assert base.tokens == greedy.tokens == ruled.tokens
    assert free.tokens != greedy.tokens


def test_a_writer_names_a_voice_that_is_nowhere(store: Path, tiny_writer: Writer) -> None:
    writer = Writer(tiny_writer.model, tiny_writer.tokenizer, store=store)
    with pytest.raises(FileNotFoundError, match="'initech'"):
        writer.write(PROMPT, voice="initech")
    with pytest.raises(ValueError, match=r"\.\./acme"):
        writer.write(PROMPT, voice="../acme")
    with pytest.raises(ValueError, match="voice has 1 entries for 2 prompts"):
        writer.write_batch([PROMPT] * 2, voice=["acme"])
    assert voice_folder("acme", store) == store / "acme"


def test_the_commands_write_and_compare_take_a_voice(
    store: Path, tiny_writer: Writer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tiny_writer.model.save_pretrained(tmp_path / "model")
    tiny_writer.tokenizer.save_pretrained(tmp_path / "model")
    settings = ["--model", str(tmp_path / "model"), "--max-new-tokens", "6", "--seed", "3", "--json"]
    spoken = ["--voice", "acme", "--store", str(store)]
    answers = []
    for extra in (spoken, []):
        assert main(["write", PROMPT, *settings, *extra]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert [answer["voice"] for answer in answers] == ["acme", None]
    assert answers[0]["tokens"] != answers[1]["tokens"]
    assert main(["compare", PROMPT, *settings, *spoken]) == 0
    assert json.loads(capsys.readouterr().out)["creative"]["tokens"] == answers[0]["tokens"]
    assert main(["write", PROMPT, *settings, "--voice", "initech", "--store", str(store)]) == 1
    assert "initech" in capsys.readouterr().err
