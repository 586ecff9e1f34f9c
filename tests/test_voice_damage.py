"""Voices that are not whole, or are something else, are refused with the reason."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_voice import cut, hidden, make_card, make_voice, reconfigure

from duet_moe.finetune.voice_adapter import ADAPTER, CONFIG, FILES
from duet_moe.finetune.voices import VoiceStore

PREFIX = "base_model.model.diversity_head.unembed"


@pytest.fixture(scope="session")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_voice(tmp_path_factory.mktemp("built") / "old", seed=1)


@pytest.fixture
def store(tmp_path: Path) -> VoiceStore:
    return VoiceStore(tmp_path / "store")


@pytest.fixture
def built(old: Path, tmp_path: Path) -> Path:
    """A voice that a test may damage."""
    return Path(shutil.copytree(old, tmp_path / "built"))


def rewrite(folder: Path, change) -> None:
    """Change the adapter's tensors and have the card agree."""
    tensors = load_file(folder / ADAPTER)
    change(tensors)
    save_file(tensors, folder / ADAPTER)
    make_card(folder).save(folder)


def recard(folder: Path, **changes: object) -> None:
    card = json.loads((folder / "voice.json").read_text()) | changes
    (folder / "voice.json").write_text(json.dumps({name: value for name, value in card.items() if value != "GONE"}))


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def same_size_other_bytes(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


DAMAGE = {
    "no adapter": (lambda f: (f / ADAPTER).unlink(), "missing"),
    "no settings": (lambda f: (f / CONFIG).unlink(), "missing"),
    "no card": (lambda f: (f / "voice.json").unlink(), "missing"),
    "cut adapter": (lambda f: cut(f / ADAPTER, 2000), "bytes and should have"),
    "cut header": (lambda f: cut(f / ADAPTER, 50), "cut off"),
    "empty adapter": (lambda f: cut(f / ADAPTER, 0), "not a safetensors file"),
    "pickle": (lambda f: torch.save({"a": torch.zeros(2)}, f / ADAPTER), "not a safetensors file"),
    "one bit": (lambda f: same_size_other_bytes(f / ADAPTER), "sha256"),
    "linked adapter": (lambda f: link(f / ADAPTER), "link"),
    "linked card": (lambda f: link(f / "voice.json"), "link"),
    "a folder": (lambda f: (f / "recipe.yaml").mkdir(), "no file of at most"),
    "huge card": (lambda f: (f / "voice.json").write_text(" " * (1 << 20) + "{}"), "no file of at most"),
    "trunk": (lambda f: rewrite(f, lambda t: t.update(x=torch.zeros(2))), "not LoRA on the diversity head"),
    "coherence": (lambda f: rewrite(f, lambda t: t.update({
        PREFIX.replace("diversity", "coherence") + ".lora_A.weight": torch.zeros(4, 32)})), "coherence_head"),
    "whole layer": (lambda f: rewrite(f, lambda t: t.update({PREFIX + ".weight": torch.zeros(4)})), "not LoRA"),
    "nan": (lambda f: rewrite(f, lambda t: t[PREFIX + ".lora_B.weight"][0].fill_(torch.nan)), "not finite"),
    "integers": (lambda f: rewrite(f, lambda t: t.update({
        PREFIX + ".lora_A.weight": torch.zeros(4, 32, dtype=torch.int32)})), "not finite"),
    "half a pair": (lambda f: rewrite(f, lambda t: t.pop(PREFIX + ".lora_B.weight")), r"lacks lora_B\.weight"),
    "no tensors": (lambda f: rewrite(f, lambda t: t.clear()), "holds no tensors"),
    "another rank": (lambda f: rewrite(f, lambda t: t.update({
        PREFIX + ".lora_A.weight": torch.zeros(5, 32)})), "does not fit rank 4"),
    "settings no json": (lambda f: (f / CONFIG).write_text("{"), "damaged"),
    "settings deep": (lambda f: (f / CONFIG).write_text("[" * 200_000), "damaged"),
    "settings a list": (lambda f: (f / CONFIG).write_text("[]"), "list, not settings"),
    "both heads": (lambda f: reconfigure(f, target_modules=["gate_proj"]), "target_modules"),
    "slow pattern": (lambda f: reconfigure(f, target_modules="(a*)*b"), "target_modules"),
    "no targets": (lambda f: reconfigure(f, target_modules=[]), "target_modules"),
    "code": (lambda f: reconfigure(f, auto_mapping={"parent_library": "os"}), "auto_mapping"),
    "whole modules": (lambda f: reconfigure(f, modules_to_save=["unembed"]), "modules_to_save"),
    "megatron": (lambda f: reconfigure(f, megatron_core="evil"), "megatron_core"),
    "other method": (lambda f: reconfigure(f, peft_type="IA3"), "peft_type"),
    "bias": (lambda f: reconfigure(f, bias="all"), "bias"),
    "no rank": (lambda f: reconfigure(f, r=0), "rank"),
    "card no json": (lambda f: (f / "voice.json").write_text("{"), "damaged"),
    "card deep": (lambda f: (f / "voice.json").write_text("[" * 200_000), "damaged"),
    "card a list": (lambda f: (f / "voice.json").write_text("[]"), "list, not a card"),
    "card binary": (lambda f: (f / "voice.json").write_bytes(b"\xff\xfe\x00"), "damaged"),
    "newer": (lambda f: recard(f, format_version=2, more=1), "upgrade"),
    "no version": (lambda f: recard(f, format_version="GONE"), "format_version None"),
    "lacking digest": (lambda f: recard(f, adapter_sha256="GONE"), "adapter_sha256"),
    "digest no digest": (lambda f: recard(f, adapter_sha256="x"), "64 hexadecimal"),
    "unknown field": (lambda f: recard(f, more=1), "more"),
    "name a path": (lambda f: recard(f, name="../x"), "no name for a voice"),
    "terminal codes": (lambda f: recard(f, author="\x1b[2J"), "author"),
    "author a number": (lambda f: recard(f, author=7), "author"),
    "local time": (lambda f: recard(f, created="2026-01-31T12:00:00"), "UTC"),
    "no time": (lambda f: recard(f, created="yesterday"), "UTC"),
    "base a path": (lambda f: recard(f, base={"name": "/home/me/x"}), "base name"),
    "no hashes": (lambda f: recard(f, base={"name": "x"}), "base hashes"),
    "hash no digest": (lambda f: recard(f, base={"name": "x", "hashes": {"shared": None, "trunk": None}}), "shared"),
    "corpus a text": (lambda f: recard(f, corpus="once upon a time"), "corpus"),
    "infinite figure": (lambda f: recard(f, figures={"loss": float("inf")}), "not plain data"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_voice_is_refused_with_the_reason(store: VoiceStore, built: Path, damage: str) -> None:
    act, told = DAMAGE[damage]
    store.publish("acme", built)
    for folder in (built, store.root / "acme"):
        act(folder)
    with pytest.raises((ValueError, OSError), match=told):
        store.check("acme")
    with pytest.raises((ValueError, OSError), match=told):
        store.export("acme", store.root.parent / "acme.zip")
    assert not [path for path in store.root.parent.iterdir() if "zip" in path.name]
    shutil.rmtree(store.root)
    with pytest.raises((ValueError, OSError), match=told):
        store.publish("acme", built)
    assert not store.root.exists()


def test_a_voice_under_another_name_is_refused(store: VoiceStore, old: Path) -> None:
    with pytest.raises(ValueError, match="'acme', not 'other'"):
        store.publish("other", old)
    store.publish("acme", old)
    (store.root / "acme").rename(store.root / "other")
    with pytest.raises(ValueError, match="holds the voice 'acme'"):
        store.check("other")


def test_a_link_in_the_store_leads_nowhere(store: VoiceStore, old: Path) -> None:
    store.root.mkdir()
    (store.root / "acme").symlink_to(old)
    for act in (lambda: store.path("acme"), lambda: store.delete("acme"), lambda: store.publish("acme", old, True)):
        with pytest.raises(ValueError, match="is a link"):
            act()
    assert store.names() == ["acme"] and (old / ADAPTER).is_file() and hidden(store) == []


def test_dora_and_rslora_and_single_layers_are_voices_too(store: VoiceStore, tmp_path: Path) -> None:
    for number, settings in enumerate(({"use_dora": True}, {"use_rslora": True},
                                       {"target_modules": ["diversity_head.unembed"]})):  # fmt: skip
        store.publish(f"v{number}", make_voice(tmp_path / f"v{number}", f"v{number}", **settings))
    assert store.names() == ["v0", "v1", "v2"]


def test_every_file_of_a_voice_has_a_limit() -> None:
    assert FILES.keys() >= {ADAPTER, CONFIG, "voice.json", "README.md", "style.safetensors", "style.json"}
    assert sum(FILES.values()) < 1 << 30
