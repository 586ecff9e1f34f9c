"""What a voice folder may hold and which base it is for: all else is refused, by name."""

import copy
import hashlib
import json
import logging
from pathlib import Path

import pytest
import torch
from adapters import ALL, GATE_A, KINDS, make_voice, peft
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from duet_moe import DuetMoeForCausalLM
from duet_moe.modeling.voice_files import WrongBaseError, base_hashes


@pytest.fixture(scope="session")
def voices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a voice of every kind."""
    root = tmp_path_factory.mktemp("voices")
    for seed, (name, settings) in enumerate(KINDS.items()):
        make_voice(root / name, seed, **settings)
    return root


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
