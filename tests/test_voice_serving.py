"""Voices while writing: equal to PEFT and to themselves alone, in any batch; factual mode and base never change."""

import copy
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CLOSE, SENTENCES, pad_rows, tiny_model, tiny_tokenizer, tiny_writer_of, tokens

from duet_moe import DuetMoeForCausalLM, Mode, Writer
from duet_moe.cli import main
from duet_moe.configuration.modes import BUILT_IN_MODES
from duet_moe.modeling.voice_files import WrongBaseError, base_hashes, voice_folder

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'duet-moe[finetune]'")

NEAR = dict(rtol=0.0, atol=1e-5)
ALL = r"diversity_head\.(gate_proj|up_proj|down_proj|unembed)"
KINDS = {
    "plain": dict(r=4, lora_alpha=8),
    "rslora": dict(r=3, lora_alpha=6, use_rslora=True),
    "dora": dict(r=2, lora_alpha=3, use_dora=True),
    "narrow": dict(r=6, lora_alpha=4, target_modules=r"diversity_head\.(up_proj|down_proj)"),
}
NAMES = tuple(KINDS)
GATE_A = "base_model.model.diversity_head.gate_proj.lora_A.weight"


def make_voice(folder: Path, seed: int, **settings: object) -> Path:
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **({"target_modules": ALL} | settings))
    model = peft.get_peft_model(tiny_model(), config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data += 0.2 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def voices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a voice of every kind."""
    root = tmp_path_factory.mktemp("voices")
    for seed, (name, settings) in enumerate(KINDS.items()):
        make_voice(root / name, seed, **settings)
    return root


@pytest.fixture
def speaking(voices: Path) -> DuetMoeForCausalLM:
    """The tiny model with all voices loaded."""
    model = tiny_model()
    for name in NAMES:
        assert model.load_voice(voices / name) == name
    return model


def answer(model: DuetMoeForCausalLM, ids: torch.Tensor, *voice: int, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **({"head_mix": 1.0} | kwargs), voice=torch.tensor(voice) if voice else None).logits


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_voice_equals_peft_on_the_same_adapter(speaking: DuetMoeForCausalLM, voices: Path, name: str) -> None:
    ids, plan, index = tokens(2, 12), torch.randn(2, 8), NAMES.index(name)
    theirs = peft.PeftModel.from_pretrained(tiny_model(), voices / name).eval()
    for settings in ({}, {"plan": plan, "plan_guidance": 0.7}, {"head_mix": 0.4}):
        expected = theirs(ids, **({"head_mix": 1.0} | settings)).logits
        torch.testing.assert_close(answer(speaking, ids, index, index, **settings), expected, **NEAR)
        torch.testing.assert_close(answer(speaking, ids, -1, index, **settings)[1], expected[1], **NEAR)
    assert (answer(speaking, ids, index, index) - answer(speaking, ids)).abs().max() > 0.1


def test_every_row_of_a_mixed_batch_is_as_alone_and_the_base_is_bit_identical(speaking: DuetMoeForCausalLM) -> None:
    ids, order = tokens(7, 12), (2, -1, 0, 3, 1, -1, 2)
    mixed, base = answer(speaking, ids, *order), answer(tiny_model(), ids)
    for row, index in enumerate(order):
        if index == -1:
            assert torch.equal(mixed[row], base[row])
        else:
            alone = answer(speaking, ids[row : row + 1], index)[0]
            torch.testing.assert_close(mixed[row], alone, **NEAR)
            assert (alone - base[row]).abs().max() > 0.1
    assert torch.equal(answer(speaking, ids, *[-1] * 7), base)
    assert torch.equal(answer(speaking, ids), base)


def test_no_voice_reaches_the_coherence_head(speaking: DuetMoeForCausalLM) -> None:
    ids, base = tokens(4, 12), tiny_model()
    assert torch.equal(answer(speaking, ids, 0, 1, 2, 3, head_mix=0.0), answer(base, ids, head_mix=0.0))
    mix = torch.tensor([0.0, 1.0, 0.0, 0.5])
    mixed, plain = answer(speaking, ids, 0, 1, 2, 3, head_mix=mix), answer(base, ids, head_mix=mix)
    assert [torch.equal(mixed[row], plain[row]) for row in range(4)] == [True, False, True, False]
    with torch.no_grad():
        outputs = speaking(ids, head_mix=0.0, output_head_logits=True, voice=torch.tensor([0, 1, 2, 3]))
    assert torch.equal(outputs.logits, answer(base, ids, head_mix=0.0))
    assert torch.equal(outputs.diversity_logits, answer(speaking, ids, 0, 1, 2, 3))


def test_voices_are_no_weights_and_are_not_saved(speaking: DuetMoeForCausalLM, tmp_path: Path) -> None:
    assert speaking.state_dict().keys() == tiny_model().state_dict().keys()
    speaking.save_pretrained(tmp_path)
    assert (tmp_path / "voices.py").is_file()  # the mathematics travels; no voice does
    assert DuetMoeForCausalLM.from_pretrained(tmp_path).voice_names == ()


def test_voices_follow_the_dtype_of_the_model_and_keep_their_own_digits(
    speaking: DuetMoeForCausalLM, voices: Path
) -> None:
    ids, order = tokens(3, 6), (0, 1, -1)
    answer(speaking, ids, *order)
    low = answer(speaking.to(torch.bfloat16), ids, *order)
    assert low.dtype == torch.bfloat16
    rounded = tiny_model().to(torch.bfloat16).float()
    for name in NAMES:
        rounded.load_voice(voices / name)
    assert torch.equal(answer(speaking.float(), ids, *order), answer(rounded, ids, *order))


def test_loading_under_a_known_name_swaps_the_voice(speaking: DuetMoeForCausalLM, voices: Path) -> None:
    ids, dora = tokens(1, 6), NAMES.index("dora")
    expected = answer(speaking, ids, dora)
    assert not torch.equal(answer(speaking, ids, 0), expected)
    assert speaking.load_voice(voices / "dora", name="plain") == "plain"
    assert speaking.voice_names == NAMES
    torch.testing.assert_close(answer(speaking, ids, 0), expected, rtol=0.0, atol=0.0)


def test_an_unloaded_voice_is_gone_and_the_others_stay(speaking: DuetMoeForCausalLM) -> None:
    ids = tokens(1, 6)
    expected = answer(speaking, ids, 3)
    speaking.unload_voice("rslora")
    assert speaking.voice_names == ("plain", "dora", "narrow")
    torch.testing.assert_close(answer(speaking, ids, 2), expected, **NEAR)
    with pytest.raises(ValueError, match="No voice 'rslora' is loaded: loaded are 'plain', 'dora', 'narrow'"):
        speaking.unload_voice("rslora")
    with pytest.raises(ValueError, match="none is loaded.*load_voice"):
        tiny_model().generate(ids, voice="rslora")


@pytest.mark.parametrize("voice", [[4], [-2], [0, 1], [0.0], [True]])
def test_what_is_no_voice_of_the_batch_is_refused(speaking: DuetMoeForCausalLM, voice: list) -> None:
    with pytest.raises(ValueError, match="voice"):
        answer(speaking, tokens(1, 6), *voice)


@torch.no_grad()
def test_a_compiled_forward_needs_one_graph_for_all_voices(speaking: DuetMoeForCausalLM) -> None:
    torch.compiler.reset()
    graphs, ids = [], tokens(3, 6)

    def count(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    speaking(ids, head_mix=1.0, voice=torch.tensor([0, 1, 2]))
    compiled = torch.compile(speaking, backend=count, fullgraph=True)
    for order in ((0, -1, 2), (3, 1, -1), (2, 2, 2)):
        found = compiled(ids, head_mix=1.0, voice=torch.tensor(order)).logits
        torch.testing.assert_close(found, answer(speaking, ids, *order), **CLOSE)
    assert len(graphs) == 1


def test_rows_generate_in_their_own_voices_and_modes(speaking: DuetMoeForCausalLM) -> None:
    rows = [tokens(1, length, seed=length)[0] for length in (5, 12, 7, 9)]
    ids, mask = pad_rows(rows, "left")
    order, modes, seeds = ["dora", None, "plain", "plain"], ["creative", "creative", "factual", "hybrid"], [4, 9, 2, 7]
    settings = dict(max_new_tokens=12, attention_mask=mask)
    together = speaking.generate(ids, voice=order, mode=modes, seed=seeds, **settings)
    plain = tiny_model().generate(ids, mode=modes, seed=seeds, **settings)
    for number, row in enumerate(rows):
        alone = speaking.generate(
            row[None], voice=order[number], mode=modes[number], seed=seeds[number], max_new_tokens=12
        )
        assert torch.equal(together[number, ids.shape[1] :], alone[0, len(row) :])
    assert [torch.equal(*pair) for pair in zip(together, plain, strict=True)] == [False, True, True, False]


def test_beams_and_expansions_keep_the_voice_of_their_row(speaking: DuetMoeForCausalLM) -> None:
    ids = tokens(2, 5)
    settings = dict(head_mix=1.0, max_new_tokens=8)
    together = speaking.generate(ids, voice=["dora", "plain"], num_beams=3, num_return_sequences=2, **settings)
    for row, name in enumerate(("dora", "plain")):
        alone = speaking.generate(ids[row : row + 1], voice=name, num_beams=3, num_return_sequences=2, **settings)
        assert torch.equal(together[2 * row : 2 * row + 2], alone)


def test_drafting_writes_what_greedy_decoding_writes_in_a_voice(speaking: DuetMoeForCausalLM) -> None:
    ids, settings = torch.tensor([[7, 8, 9, 10, 11, 12] * 3]), dict(voice="dora", head_mix=1.0, max_new_tokens=12)
    expected = speaking.generate(ids, **settings)
    assert torch.equal(speaking.generate(ids, prompt_lookup_num_tokens=4, **settings), expected)
    assert torch.equal(speaking.generate(ids, assistant_model=copy.deepcopy(speaking), **settings), expected)


def test_generate_names_what_it_does_not_know(speaking: DuetMoeForCausalLM) -> None:
    with pytest.raises(ValueError, match="No voice 'acme' is loaded: loaded are 'plain'"):
        speaking.generate(tokens(2, 5), voice=["plain", "acme"])
    with pytest.raises(ValueError, match="voice has 1 entries for 2 rows"):
        speaking.generate(tokens(2, 5), voice=["plain"])


# What a voice folder may hold.


def broken(voices: Path, folder: Path, settings: dict | None = None, **weights: torch.Tensor | None) -> Path:
    """Copy the plain LoRA voice with other settings and weights; `None` leaves a weight out."""
    folder.mkdir()
    config = json.loads((voices / "plain" / "adapter_config.json").read_text()) | (settings or {})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(voices / "plain" / "adapter_model.safetensors") | weights
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ({"base_model.model.coherence_head.unembed.lora_A.weight": torch.ones(4, 32)}, "coherence_head.unembed"),
        ({"base_model.model.diversity_head.unembed.weight": torch.ones(97, 32)}, "diversity_head.unembed.weight"),
        ({"base_model.model.diversity_head.plan_proj.lora_A.weight": torch.ones(4, 8)}, "plan_proj"),
        ({GATE_A: torch.full((4, 32), torch.nan)}, f"{GATE_A}.*finite"),
        ({GATE_A: torch.full((4, 32), torch.inf)}, f"{GATE_A}.*finite"),
        ({GATE_A: torch.ones(4, 31)}, r"gate_proj.lora_A.weight has shape \(4, 31\).*\(4, 32\)"),
        ({GATE_A: torch.ones(3, 32)}, r"gate_proj.lora_A.weight has shape \(3, 32\)"),
        ({GATE_A: None}, "gate_proj.lora_A.weight has shape None"),
        (
            {"base_model.model.diversity_head.gate_proj.lora_magnitude_vector": torch.ones(32)},
            "lora_magnitude_vector.*None in this model",
        ),
    ],
)
def test_a_weight_that_is_no_part_of_a_voice_is_named(
    model: DuetMoeForCausalLM, voices: Path, tmp_path: Path, weights: dict, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        model.load_voice(broken(voices, tmp_path / "voice", **weights))
    assert model.voice_names == ()


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "LOHA"},
        {"modules_to_save": ["diversity_head.unembed"]},
        {"lora_bias": True},
        {"bias": "lora_only"},
        {"rank_pattern": {"unembed": 2}},
        {"alpha_pattern": {"unembed": 2}},
        {"alora_invocation_tokens": [5]},
        {"r": 0},
        {"r": "4"},
        {"lora_alpha": None},
    ],
)
def test_a_setting_that_a_voice_cannot_have_is_named(
    model: DuetMoeForCausalLM, voices: Path, tmp_path: Path, settings: dict
) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        model.load_voice(broken(voices, tmp_path / "voice", settings))
    assert model.voice_names == ()


def test_an_adapter_without_weights_is_refused(model: DuetMoeForCausalLM, voices: Path, tmp_path: Path) -> None:
    nothing = dict.fromkeys(load_file(voices / "plain" / "adapter_model.safetensors"))
    with pytest.raises(ValueError, match="no weights"):
        model.load_voice(broken(voices, tmp_path / "voice", **nothing))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "voice.json"])
def test_a_damaged_or_missing_file_is_named(
    model: DuetMoeForCausalLM, voices: Path, tmp_path: Path, name: str
) -> None:
    folder = broken(voices, tmp_path / "voice")
    (folder / "voice.json").write_text(json.dumps({"name": "acme", "base": {"hashes": base_hashes(model)}}))
    file = folder / name
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises((OSError, ValueError), match=name):
        model.load_voice(folder)
    if name != "voice.json":
        file.unlink()
        with pytest.raises(FileNotFoundError, match=name):
            model.load_voice(folder)
    assert model.voice_names == ()


def test_a_checkpoints_own_code_alone_says_what_voices_need(
    model: DuetMoeForCausalLM, voices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("duet_moe.modeling.voices.VOICE_FILES", "no_such_package.voice_files")
    with pytest.raises(ImportError, match="pip install duet-moe"):
        model.load_voice(voices / "plain")


def test_one_changed_bit_is_noticed(model: DuetMoeForCausalLM, voices: Path, tmp_path: Path) -> None:
    folder = broken(voices, tmp_path / "voice")
    file = folder / "adapter_model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    card = {"name": "acme", "base": {"hashes": base_hashes(model)}, "adapter_sha256": digest}
    (folder / "voice.json").write_text(json.dumps(card))
    assert model.load_voice(folder) == "acme"
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    with pytest.raises(OSError, match=f"is damaged.*{digest}"):
        model.load_voice(folder)


# Which base a voice is for.


def with_card(voices: Path, folder: Path, hashes: object) -> Path:
    broken(voices, folder)
    card = {"format_version": 1, "name": "acme", "base": {"name": "tiny", "hashes": hashes}}
    (folder / "voice.json").write_text(json.dumps(card))
    return folder


def test_a_voice_of_another_base_is_refused_with_both_hashes(
    model: DuetMoeForCausalLM, voices: Path, tmp_path: Path
) -> None:
    folder = with_card(voices, tmp_path / "folder", base_hashes(model))
    assert model.load_voice(folder) == "acme"
    assert model.load_voice(folder, "other") == "other"
    for part, weight in (
        ("shared", "coherence_head.norm.weight"),
        ("trunk", "model.layers.1.self_attn.q_proj.weight"),
    ):
        changed = tiny_model()
        changed.get_parameter(weight).data[0] += 1.0
        mine, theirs = base_hashes(changed)[part], base_hashes(model)[part]
        with pytest.raises(WrongBaseError, match=f"'acme'.*'tiny'.*{part}.*{theirs}.*{mine}.*duet voice train"):
            changed.load_voice(folder)
        assert changed.voice_names == ()


def test_the_hashes_are_the_same_in_every_dtype_and_under_an_adapter(model: DuetMoeForCausalLM) -> None:
    model.to(torch.bfloat16)
    expected = base_hashes(model)
    assert base_hashes(copy.deepcopy(model).float()) == expected
    tuned = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=ALL, use_dora=True))
    assert base_hashes(tuned) == expected
    assert len(expected["shared"]) == len(expected["trunk"]) == 64 and expected["shared"] != expected["trunk"]


def test_a_quantised_base_takes_the_voices_of_the_whole_one(quantisable: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'duet-moe[finetune]'")
    from transformers import BitsAndBytesConfig

    whole = DuetMoeForCausalLM.from_pretrained(quantisable)
    settings = BitsAndBytesConfig(load_in_4bit=True)
    quantised = DuetMoeForCausalLM.from_pretrained(quantisable, quantization_config=settings)
    assert base_hashes(quantised) == {"shared": base_hashes(whole)["shared"], "trunk": None}


def test_weights_are_hashed_once_until_one_changes(model: DuetMoeForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    hashing = "duet_moe.modeling.voice_files._hash"
    monkeypatch.setattr(hashing, lambda weights: calls.append(len(weights)) or str(len(calls)))
    first = base_hashes(model)
    assert base_hashes(model) == first and len(calls) == 2
    with torch.no_grad():
        model.coherence_head.norm.weight.add_(1.0)
    assert base_hashes(model) != first


@pytest.mark.parametrize("hashes", [None, {}, {"shared": None}, "abc"])
def test_a_card_that_names_no_base_is_refused(
    model: DuetMoeForCausalLM, voices: Path, tmp_path: Path, hashes: object
) -> None:
    folder = with_card(voices, tmp_path / "folder", hashes)
    for card in ((folder / "voice.json").read_text(), "{}"):
        (folder / "voice.json").write_text(card)
        with pytest.raises(ValueError, match=r"voice\.json does not say which base"):
            model.load_voice(folder)


def test_an_adapter_without_a_card_loads_and_says_once_what_was_not_checked(
    model: DuetMoeForCausalLM, voices: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = broken(voices, tmp_path / "cardless")
    logger = logging.getLogger("transformers.duet_moe")
    logger.addHandler(caplog.handler)  # transformers may keep its records from the root's
    try:
        for _ in range(2):
            model.load_voice(folder)
    finally:
        logger.removeHandler(caplog.handler)
    (record,) = {id(record): record for record in caplog.records if "cardless" in record.getMessage()}.values()
    assert "only the shapes" in record.getMessage()


# Writer and command line.

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
