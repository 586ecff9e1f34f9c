"""Quantised tiny models: the forms that are tested, and how to load them."""

from pathlib import Path

import torch
from tiny import tokens
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from duet_moe import DuetMoeForCausalLM
from duet_moe.modeling.packed_experts import PackedExperts

# Rows of two 4-bit blocks in `gate_up_proj`, of one in `down_proj`.
SHAPE = dict(hidden_size=128, intermediate_size=64, head_dim=16, num_shared_experts=1, qk_norm=True)
FORMS = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4": dict(load_in_4bit=True),
    "nf4 double": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": dict(load_in_8bit=True),
}
IDS = tokens(2, 12)


def load(folder: Path, form: str = "nf4", dtype: torch.dtype | None = None, **more: object) -> DuetMoeForCausalLM:
    config = BitsAndBytesConfig(**FORMS[form], **more)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def experts_of(model: nn.Module) -> list[PackedExperts]:
    return [module for module in model.modules() if isinstance(module, PackedExperts)]


@torch.no_grad()
def logits(model: DuetMoeForCausalLM, **settings: object) -> torch.Tensor:
    return model(IDS, **({"head_mix": 0.5} | settings)).logits
