"""Adapters of the tiny model as PEFT saves them, without a card: one of every kind."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_model

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'duet-moe[finetune]'")

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
