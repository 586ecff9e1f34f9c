"""Packed experts compute what their weights do, but for rounding, and keep nothing unpacked."""

from pathlib import Path

import pytest
import torch
from quantized import FORMS, IDS, SHAPE, experts_of, load, logits
from tiny import tiny_model
from torch import nn

from duet_moe import DuetMoeForCausalLM
from duet_moe.modeling.moe import DuetMoeExperts

pytest.importorskip("bitsandbytes")

# Largest relative error of weights drawn from a normal distribution.
ERRORS = {"nf4": 0.1, "fp4": 0.14, "nf4 double": 0.1, "int8": 0.01}


@pytest.mark.parametrize("form", FORMS)
def test_packed_experts_are_the_weights_but_for_rounding(quantisable: Path, form: str) -> None:
    whole, model = DuetMoeForCausalLM.from_pretrained(quantisable), load(quantisable, form)
    for layer, packed in zip(whole.model.layers, experts_of(model), strict=True):
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(layer.mlp.experts, name).float()
            for one, again in zip(weight, packed.unpacked(name, torch.float32), strict=True):
                assert (again - one).norm() / one.norm() < ERRORS[form]


@pytest.mark.parametrize("form", FORMS)
def test_packed_experts_compute_what_their_unpacked_weights_compute(quantisable: Path, form: str) -> None:
    packed = experts_of(load(quantisable, form, torch.float32))[0]
    plain = DuetMoeExperts(tiny_model(**SHAPE).config)
    for name in ("gate_up_proj", "down_proj"):
        setattr(plain, name, nn.Parameter(packed.unpacked(name, torch.float32)))
    plain.config._experts_implementation = "eager"
    chosen = torch.tensor([[0, 3], [2, 1], [3, 4]])  # 4 is another rank's expert
    states, weights = torch.randn(2, 3, 128), torch.rand(3, 2)
    first, second = (x.clone().requires_grad_() for x in (states[0], states[0]))
    found, expected = packed(first, chosen, weights), plain(second, chosen, weights)
    torch.testing.assert_close(found, expected)
    (found * states[1]).sum().backward()
    (expected * states[1]).sum().backward()
    torch.testing.assert_close(first.grad, second.grad)


def test_the_backward_pass_keeps_no_unpacked_weight(quantisable: Path) -> None:
    packed, kept = experts_of(load(quantisable))[0], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        packed(torch.randn(1, 128, requires_grad=True), torch.tensor([[0, 3]]), torch.rand(1, 2))
    assert any(t.dtype == torch.uint8 for t in kept)
    assert max(t.numel() for t in kept if t.is_floating_point()) < 128 * 64 / 2


def test_a_row_all_zero_stays_zero(tmp_path: Path) -> None:
    model = tiny_model(**SHAPE)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[1, 5] = 0
    model.save_pretrained(tmp_path)
    for form in FORMS:
        assert not experts_of(load(tmp_path, form))[0].unpacked("down_proj", torch.float32)[1, 5].any()


def test_the_compute_dtype_is_that_of_the_configuration(quantisable: Path) -> None:
    slow, fast = (load(quantisable, bnb_4bit_compute_dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    states = torch.randn(1, 128, dtype=torch.bfloat16)
    arguments = states, torch.tensor([[0, 3]]), torch.full((1, 2), 0.5)
    assert [experts_of(model)[0](*arguments).dtype for model in (slow, fast)] == [torch.bfloat16] * 2
    seen = []
    for model in (slow, fast):
        experts = experts_of(model)[0]
        experts.act_fn.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].dtype))
        experts(*arguments)
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_double_quantisation_moves_weights_by_less_than_half_a_percent(quantisable: Path) -> None:
    packed = [experts_of(load(quantisable, form))[0] for form in ("nf4", "nf4 double")]
    one, two = (experts.unpacked("gate_up_proj", torch.float32) for experts in packed)
    assert 0 < (one - two).norm() / one.norm() < 0.002


def test_experts_are_elastic_and_decoding_with_a_cache_equals_a_full_pass(quantisable: Path) -> None:
    model = load(quantisable, dtype=torch.float32)
    rows = logits(model, num_experts_per_tok=[1, 4])
    for row, k in enumerate((1, 4)):
        torch.testing.assert_close(rows[row], logits(model, num_experts_per_tok=k)[row], rtol=0, atol=5e-4)
    assert not torch.allclose(rows, logits(model))
    text = model.generate(IDS, mode="factual", max_new_tokens=8, num_experts_per_tok=3)
    with torch.no_grad():
        whole = model(text, head_mix=0.0, num_experts_per_tok=3).logits
    assert torch.equal(whole[:, 11:-1].argmax(-1), text[:, 12:])
