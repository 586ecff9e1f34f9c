"""Bytes by group are those of the saved file."""

from pathlib import Path

import pytest
import torch
from quantized import FORMS, load
from tiny import tiny_model

from duet_moe import DuetMoeForCausalLM
from duet_moe.modeling.footprint import bytes_by_group
from duet_moe.modeling.info import describe, parameter_counts

pytest.importorskip("bitsandbytes")


def test_bytes_by_group_are_those_of_the_saved_file(quantisable: Path, tmp_path: Path) -> None:
    for form in FORMS:
        model = load(quantisable, form)
        model.save_pretrained(tmp_path / form)
        with open(tmp_path / form / "model.safetensors", "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        sizes = bytes_by_group(model)
        assert sizes["total"] == (tmp_path / form / "model.safetensors").stat().st_size - 8 - header
        assert sizes["total"] == sum(size for name, size in sizes.items() if "total" not in name)
        packed = (8 if form == "int8" else 4) * 2 * 4 * 3 * 128 * 64 / 8  # layers, experts, projections
        shared = packed / 4
        assert packed + shared < sizes["experts"] < 1.3 * (packed + shared)
    whole = DuetMoeForCausalLM.from_pretrained(quantisable)
    assert bytes_by_group(whole)["total"] == sizes["bf16_total"] == 2 * sum(p.numel() for p in whole.parameters())


def test_a_mixtral_shape_takes_less_than_a_third(tmp_path: Path) -> None:
    # Mixtral 8x7B with every width divided by 32; one of its 32 layers, so a 32nd of the vocabulary and the adapters
    shape = dict(
        vocab_size=32_000 // 32 // 32, hidden_size=4096 // 32, intermediate_size=14_336 // 32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=1, num_local_experts=8, head_intermediate_size=4096 // 32 // 32,
    )  # fmt: skip
    tiny_model(**shape).to(torch.bfloat16).save_pretrained(tmp_path)
    sizes = bytes_by_group(load(tmp_path))
    assert sizes["total"] <= 0.32 * sizes["bf16_total"]


def test_info_counts_parameters_and_not_packed_bytes(quantisable: Path) -> None:
    model = load(quantisable)
    assert parameter_counts(model) == parameter_counts(DuetMoeForCausalLM.from_pretrained(quantisable))
    facts = describe(model)
    assert facts["bytes"] == bytes_by_group(model)
    assert facts["share_of_bf16"] == round(facts["bytes"]["total"] / facts["bytes"]["bf16_total"], 3) < 1
