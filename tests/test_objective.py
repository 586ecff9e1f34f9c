"""The training objective and its optimiser, against plain formulas."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CLOSE, tiny_model, tokens
from torch import nn

from duet_moe import DuetMoeForCausalLM
from duet_moe.finetune import muon, objective
from duet_moe.finetune.muon import Muon, build_optimizers, orthogonalise
from duet_moe.finetune.objective import ChunkedCrossEntropy, TwoVoicesLoss, position_ids


@pytest.fixture(autouse=True, scope="module")
def muon_in_float32() -> Iterator[None]:
    """Muon multiplies in bf16 where hardware has it; formulas are compared where rounding is not in the way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "has_fast_bf16", lambda device: False)
        yield


def batch_of(ids: torch.Tensor, heads: list[int], document_ids: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    documents = torch.zeros_like(ids) if document_ids is None else document_ids
    return {"input_ids": ids, "labels": ids.clone(), "document_ids": documents, "head": torch.tensor(heads)}


@given(st.integers(1, 12), st.integers(2, 9), st.integers(1, 5), st.floats(0.1, 3), st.integers(0, 99))
@settings(max_examples=30)
def test_chunked_cross_entropy_equals_the_plain_one_with_its_gradients(
    rows: int, vocab: int, chunk: int, upstream: float, seed: int
) -> None:
    torch.manual_seed(seed)
    features, weight = torch.randn(rows, 6, requires_grad=True), torch.randn(vocab, 6, requires_grad=True)
    targets = torch.randint(vocab, (rows,)).masked_fill(torch.rand(rows) < 0.3, -100)
    before, objective.CHUNK = objective.CHUNK, chunk
    try:
        loss = ChunkedCrossEntropy.apply(features, weight, targets)
    finally:
        objective.CHUNK = before
    expected = F.cross_entropy(features @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(upstream * loss, (features, weight))
    for gradient, wanted in zip(found, torch.autograd.grad(upstream * expected, (features, weight)), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_positions_count_from_zero_in_every_document() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 1, 1, 2, 2, 2]])
    assert position_ids(documents).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 0, 1, 2]]


@pytest.mark.parametrize("k", [None, 1, 3])
def test_each_row_teaches_its_own_head_as_the_model_alone_would(model: DuetMoeForCausalLM, k: int | None) -> None:
    ids = tokens(3, 12)
    losses = TwoVoicesLoss(model, router_aux_loss_coef=0.0)(batch_of(ids, [0, 0, 1]), k)
    settings = dict(use_cache=False, num_experts_per_tok=k)
    coherence = model(ids[:2], labels=ids[:2], head_mix=0.0, **settings).loss
    diversity = model(ids[2:], labels=ids[2:], head_mix=1.0, **settings).loss
    torch.testing.assert_close(losses["coherence_loss"], coherence)
    torch.testing.assert_close(losses["diversity_loss"], diversity)
    torch.testing.assert_close(losses["loss"], (22 * coherence + 11 * diversity) / 33)


def test_the_gradients_are_those_of_the_two_heads_apart() -> None:
    gradients, ids = [], tokens(2, 12)
    for joint in (True, False):
        model = tiny_model().train()
        if joint:
            loss = TwoVoicesLoss(model, router_aux_loss_coef=0.0)(batch_of(ids, [0, 1]))["loss"]
        else:
            loss = sum(model(ids[i : i + 1], labels=ids[i : i + 1], head_mix=float(i)).loss for i in (0, 1)) / 2
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-4, atol=1e-5)


def test_packed_documents_lose_what_they_lose_alone(model: DuetMoeForCausalLM) -> None:
    first, second = tokens(1, 7, seed=1), tokens(1, 11, seed=2)
    ids = torch.cat([first, second, torch.zeros(1, 2, dtype=torch.long)], 1)
    batch = batch_of(ids, [1], torch.tensor([[0] * 7 + [1] * 11 + [-1] * 2]))
    batch["labels"][0, [0, 7, 18, 19]] = -100
    found = TwoVoicesLoss(model)(batch)["diversity_loss"]
    alone = [model(document, labels=document, head_mix=1.0).loss for document in (first, second)]
    torch.testing.assert_close(found, (6 * alone[0] + 10 * alone[1]) / 16)


def test_a_batch_without_rows_for_a_head_leaves_that_head_alone(model: DuetMoeForCausalLM) -> None:
    losses = TwoVoicesLoss(model)(batch_of(tokens(2, 8), [0, 0]))
    losses["loss"].backward()
    assert float(losses["diversity_loss"]) == 0
    assert all(p.grad is None or not p.grad.any() for p in model.diversity_head.parameters())
    assert model.coherence_head.unembed.weight.grad.any()


def test_the_balance_loss_counts_by_its_coefficient(model: DuetMoeForCausalLM) -> None:
    batch = batch_of(tokens(2, 8), [0, 1])
    without, with_it = (TwoVoicesLoss(model, coefficient)(batch) for coefficient in (0.0, 0.5))
    torch.testing.assert_close(with_it["loss"], without["loss"] + 0.5 * with_it["aux_loss"])
    assert TwoVoicesLoss(model).aux_coef == model.config.router_aux_loss_coef


@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 3), st.integers(0, 99))
@settings(max_examples=40)
def test_orthogonalising_brings_every_singular_value_near_one(rows: int, columns: int, stack: int, seed: int) -> None:
    torch.manual_seed(seed)
    shape = (rows, columns) if not stack else (stack, rows, columns)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(0.05, 1.0, min(rows, columns)) * 7
    found = orthogonalise(left @ torch.diag(values) @ right)
    assert found.shape == shape
    after = torch.linalg.svdvals(found)
    assert 0.6 < after.min() and after.max() < 1.3
    inside = left.mT @ found @ right.mT  # the same directions: diagonal in the same bases
    assert (inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-3


def test_bf16_orthogonalises_to_about_the_same_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = torch.randn(3, 24, 16)
    exact = orthogonalise(matrices)
    monkeypatch.setattr(muon, "has_fast_bf16", lambda device: True)
    rough = orthogonalise(matrices)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() < 0.05 * exact.norm()


def muon_step(weight: torch.Tensor, gradients: list[torch.Tensor], **settings: object) -> torch.Tensor:
    parameter = nn.Parameter(weight.clone())
    optimizer = Muon([parameter], **settings)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    return parameter.detach()


def test_a_stack_of_fused_matrices_steps_as_its_matrices_alone() -> None:
    weight, gradients = torch.randn(3, 8, 5), [torch.randn(3, 8, 5) for _ in range(2)]
    found = muon_step(weight, gradients, parts=2)
    for expert in range(3):
        for half in (slice(0, 4), slice(4, 8)):
            alone = muon_step(weight[expert, half], [gradient[expert, half] for gradient in gradients])
            torch.testing.assert_close(found[expert, half], alone, **CLOSE)


def test_a_muon_step_is_momentum_decay_and_an_orthogonal_direction() -> None:
    weight, gradient = torch.randn(6, 4), torch.randn(6, 4)
    found = muon_step(weight, [gradient], lr=0.1, momentum=0.9, weight_decay=0.5)
    step = 0.1 * gradient * 0.9 + gradient * 0.1  # Nesterov after the first update
    expected = weight * (1 - 0.1 * 0.5) - 0.1 * 0.2 * math.sqrt(6) * orthogonalise(step)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_parameters_without_a_gradient_stay() -> None:
    parameter = nn.Parameter(torch.ones(3, 3))
    Muon([parameter], lr=0.1).step()
    assert torch.equal(parameter.detach(), torch.ones(3, 3))


def test_every_parameter_has_one_optimiser_and_tables_are_not_orthogonalised(model: DuetMoeForCausalLM) -> None:
    muon, adam = build_optimizers(model, 0.01, 0.001, 0.1)
    owned = [p for optimizer in (muon, adam) for group in optimizer.param_groups for p in group["params"]]
    assert len(owned) == len({id(p) for p in owned}) == len(list(model.parameters()))
    by_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    orthogonal = {name for name, p in model.named_parameters() if id(p) in by_muon}
    assert "model.layers.0.mlp.experts.down_proj" in orthogonal
    assert not any(word in name for name in orthogonal for word in ("embed", "gate.weight", "norm", "plan_proj"))
    fused = [group for group in muon.param_groups if group["parts"] == 2]
    assert {p.shape for p in fused[0]["params"]} == {(4, 48, 32)}
