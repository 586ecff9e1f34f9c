"""Voices of the tiny model: random adapters, made by PEFT as a training would save them."""

import json
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from transformers import Trainer

from duet_moe.finetune.voice_adapter import ADAPTER, CONFIG, sha256_of
from duet_moe.finetune.voice_card import VoiceCard
from duet_moe.finetune.voices import VoiceStore
from duet_moe.modeling.voice_files import base_hashes

HEAD = r"diversity_head\.(gate_proj|up_proj|down_proj|unembed)"


def make_voice(folder: Path, name: str = "acme", seed: int = 1, **settings: object) -> Path:
    """Write a voice of `tiny_model()` to `folder`; `settings` are PEFT's."""
    model = tiny_model()
    hashes = base_hashes(model)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": HEAD, "task_type": "CAUSAL_LM"} | settings)
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink()
    make_card(folder, name, base={"name": "tiny", "hashes": hashes}).save(folder)
    return folder


def make_card(folder: Path, name: str = "acme", **changes: object) -> VoiceCard:
    """Return a card that fits the adapter in `folder`."""
    fields = {
        "name": name,
        "created": "2026-01-31T12:00:00+00:00",
        "author": "Ana Lima",
        "licence": "cc0-1.0",
        "base": {"name": "tiny", "hashes": {"shared": "0" * 64, "trunk": None}},
        "corpus": {"records": 120, "words": 4321, "masked": {"email": 2}},
        "recipe": {"r": 4, "epochs": 3},
        "figures": {"heldout_loss": {"before": 3.5, "after": 2.25}, "command": "duet voice train --corpus x"},
        "environment": {"torch": "2.13"},
        "adapter_sha256": sha256_of(folder / ADAPTER),
    }
    return VoiceCard(**(fields | changes))


def digest(folder: Path) -> str:
    return VoiceCard.load(folder).adapter_sha256


def reconfigure(folder: Path, **changes: object) -> None:
    settings = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(settings))


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def hidden(store: VoiceStore) -> list[str]:
    return [path.name for path in store.root.iterdir() if path.name.startswith(".")] if store.root.exists() else []


def recorded_starts(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Return a list that will tell from which checkpoint every training began."""
    started: list[str | None] = []
    train = Trainer.train

    def recorded(self, resume_from_checkpoint=None, **options):  # type: ignore[no-untyped-def]
        started.append(resume_from_checkpoint)
        return train(self, resume_from_checkpoint, **options)

    monkeypatch.setattr(Trainer, "train", recorded)
    return started
