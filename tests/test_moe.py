"""Experts: the same answer from every implementation, any number of them active, and a balance loss that counts."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CLOSE, tiny_config, tiny_model, tokens

from duet_moe import DuetMoeForCausalLM
from duet_moe.finetune.grouped_experts import grouped_linear
from duet_moe.finetune.objective import balance_loss
from duet_moe.modeling.moe import DuetMoeExperts, DuetMoeSparseBlock, DuetMoeTopKRouter

IMPLEMENTATIONS = ("batched_mm", "grouped_mm", "grouped_cpu")


def block(**changes: object) -> DuetMoeSparseBlock:
    made = DuetMoeSparseBlock(tiny_config(**changes))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def test_the_router_keeps_the_best_experts_and_shares_all_the_weight_among_them() -> None:
    router, states = block().gate, torch.randn(5, 32)
    logits, weights, experts = router(states)
    torch.testing.assert_close(logits, states @ router.weight.T)
    for token in range(5):
        shares = logits[token].softmax(0)
        best = shares.argsort(descending=True)[:2]
        assert experts[token].tolist() == best.tolist()
        torch.testing.assert_close(weights[token], shares[best] / shares[best].sum())


def test_a_block_is_the_weighted_sum_of_its_experts() -> None:
    layer, states = block(), torch.randn(1, 5, 32)
    _, weights, chosen = layer.gate(states[0])
    for token in range(5):
        total = torch.zeros(32)
        for weight, expert in zip(weights[token], chosen[token], strict=True):
            gate, up = (layer.experts.gate_up_proj[expert] @ states[0, token]).chunk(2)
            total += weight * (layer.experts.down_proj[expert] @ (F.silu(gate) * up))
        torch.testing.assert_close(layer(states)[0, token], total, **CLOSE)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_an_elastic_number_of_experts_equals_a_model_configured_with_it(model: DuetMoeForCausalLM, k: int) -> None:
    configured = tiny_model(num_experts_per_tok=k)
    configured.load_state_dict(model.state_dict())
    ids = tokens(2, 12)
    with torch.no_grad():
        assert torch.equal(model(ids, num_experts_per_tok=k).logits, configured(ids).logits)
        assert torch.equal(model(ids, num_experts_per_tok=k).logits, model(ids).logits) is (k == 2)


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_every_row_may_have_its_own_number_of_experts(model: DuetMoeForCausalLM, kind: type) -> None:
    wanted, ids = [3, 1, 4, 2], tokens(4, 12)
    with torch.no_grad():
        together = model(ids, num_experts_per_tok=kind(wanted)).logits
        for row, k in enumerate(wanted):
            alone = model(ids[row : row + 1], num_experts_per_tok=k).logits
            torch.testing.assert_close(together[row : row + 1], alone, **CLOSE)


@pytest.mark.parametrize("bad", [0, 5, [2, 5], torch.tensor([0, 1])])
def test_an_impossible_number_of_experts_is_refused(model: DuetMoeForCausalLM, bad: object) -> None:
    with pytest.raises(ValueError, match=r"num_experts_per_tok=(0|5).*4 experts"):
        model(tokens(2, 3), num_experts_per_tok=bad)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("k", [2, torch.tensor([1, 4, 2])])
def test_every_implementation_of_the_experts_agrees_with_the_plain_loop(
    model: DuetMoeForCausalLM, implementation: str, k: int | torch.Tensor
) -> None:
    ids = tokens(3, 50)
    with torch.no_grad():
        model.set_experts_implementation("eager")
        expected = model(ids, num_experts_per_tok=k).logits
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(model(ids, num_experts_per_tok=k).logits, expected, **CLOSE)


@pytest.mark.parametrize("implementation", ["grouped_mm", "grouped_cpu"])
def test_grouped_experts_have_the_gradients_of_the_plain_loop(implementation: str) -> None:
    gradients = []
    for chosen in ("eager", implementation):
        model = tiny_model().train()
        model.set_experts_implementation(chosen)
        ids = tokens(3, 100)  # 150 rows an expert: more than one block of 64
        model(ids, labels=ids, head_mix=0.5, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("experts.gate_up_proj" in name for name in gradients[0])
    for name, expected in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@given(st.lists(st.sampled_from([0, 1, 2, 63, 64, 65, 130]), min_size=1, max_size=5).filter(any), st.integers(0, 99))
@settings(max_examples=40)
def test_rows_sorted_by_expert_meet_their_own_matrix_only(counts: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(sum(counts), 6, requires_grad=True)
    weight = torch.randn(len(counts), 5, 6, requires_grad=True)
    upstream = torch.randn(sum(counts), 5)
    y = grouped_linear(x, weight, torch.tensor(counts))
    owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    expected = torch.einsum("ri,roi->ro", x, weight[owners])
    torch.testing.assert_close(y, expected, **CLOSE)
    found = torch.autograd.grad(y, (x, weight), upstream)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, (x, weight), upstream), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ("eager", *IMPLEMENTATIONS))
def test_experts_that_nobody_chose_do_no_harm(implementation: str) -> None:
    config = tiny_config()
    config._experts_implementation = implementation
    experts = DuetMoeExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    states, weights = torch.randn(70, 32), torch.rand(70, 2)
    answer = experts(states, torch.tensor([[3, 1]]).expand(70, 2).contiguous(), weights)
    expected = torch.zeros_like(states)
    for slot, expert in enumerate((3, 1)):
        gate, up = (states @ experts.gate_up_proj[expert].T).chunk(2, -1)
        expected += weights[:, slot, None] * ((F.silu(gate) * up) @ experts.down_proj[expert].T)
    torch.testing.assert_close(answer, expected, **CLOSE)


def test_shared_experts_answer_for_every_token_beside_the_routed_ones() -> None:
    layer, states = block(num_shared_experts=2), torch.randn(2, 5, 32)
    shared = layer.shared_experts
    assert shared.gate_proj.weight.shape == (2 * 24, 32)
    answer = layer(states)
    layer.shared_experts = None
    hidden = F.silu(states @ shared.gate_proj.weight.T) * (states @ shared.up_proj.weight.T)
    torch.testing.assert_close(answer, layer(states) + hidden @ shared.down_proj.weight.T, **CLOSE)


def test_without_shared_experts_there_are_none() -> None:
    assert block().shared_experts is None
    assert not any("shared" in name for name in tiny_model().state_dict())


def counted(logits: torch.Tensor, k: int) -> tuple[list[float], list[float]]:
    """Count by hand: how many of the tokens chose each expert, and how much probability it got on average."""
    chosen, probability = [0.0] * logits.shape[1], [0.0] * logits.shape[1]
    for row in logits.tolist():
        shares = torch.tensor(row).softmax(0).tolist()
        for expert in sorted(range(len(row)), key=lambda e: -shares[e])[:k]:
            chosen[expert] += 1 / len(logits)
        probability = [p + share / len(logits) for p, share in zip(probability, shares, strict=True)]
    return chosen, probability


@pytest.mark.parametrize("k", [None, 3])
def test_the_reported_balance_loss_equals_a_count_by_hand(model: DuetMoeForCausalLM, k: int | None) -> None:
    ids = tokens(2, 10)
    outputs = model(ids, output_router_logits=True, num_experts_per_tok=k)
    assert [logits.shape for logits in outputs.router_logits] == [(20, 4), (20, 4)]
    chosen, probability = counted(torch.cat(outputs.router_logits), k or 2)
    expected = 4 * sum(c * p for c, p in zip(chosen, probability, strict=True))
    assert float(outputs.aux_loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_padding_does_not_count_in_the_balance_loss(model: DuetMoeForCausalLM) -> None:
    ids, mask = tokens(1, 10), torch.tensor([[0] * 4 + [1] * 6])
    outputs = model(ids, attention_mask=mask, output_router_logits=True)
    chosen, probability = counted(torch.cat([logits[4:] for logits in outputs.router_logits]), 2)
    expected = 4 * sum(c * p for c, p in zip(chosen, probability, strict=True))
    assert float(outputs.aux_loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_the_balance_loss_is_added_to_the_loss_by_its_coefficient() -> None:
    model, ids = tiny_model(router_aux_loss_coef=0.5), tokens(2, 10)
    plain = model(ids, labels=ids)
    balanced = model(ids, labels=ids, output_router_logits=True)
    assert plain.aux_loss is None
    torch.testing.assert_close(balanced.loss, plain.loss + 0.5 * balanced.aux_loss)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(0, 999))
def test_the_training_balance_loss_equals_a_count_by_hand(layers: int, k: int, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    router_logits = tuple(torch.randn(rows, 4) for _ in range(layers))
    by_layer = []
    for logits in router_logits:
        chosen, probability = counted(logits, k)
        by_layer.append(4 / k * sum(c * p for c, p in zip(chosen, probability, strict=True)))
    assert float(balance_loss(router_logits, k)) == pytest.approx(sum(by_layer) / layers, rel=1e-4)


def test_the_training_balance_loss_is_one_when_even_and_the_number_of_experts_when_one_takes_all() -> None:
    even = 9 * torch.eye(4).repeat(5, 1)
    assert float(balance_loss((even,), 1)) == pytest.approx(1.0)
    assert float(balance_loss((torch.tensor([[50.0, 0, 0, 0]] * 8),), 1)) == pytest.approx(4.0)


def test_the_router_can_be_taught_by_the_balance_loss() -> None:
    router = DuetMoeTopKRouter(tiny_config())
    torch.nn.init.normal_(router.weight)
    logits, _, _ = router(torch.randn(20, 32))
    balance_loss((logits,), 2).backward()
    assert router.weight.grad.abs().sum() > 0


def test_weights_of_the_chosen_experts_sum_to_one_or_stay_as_they_are() -> None:
    hidden_states = torch.randn(20, 32)
    for norm_topk_prob in (True, False):
        router = DuetMoeTopKRouter(tiny_config(norm_topk_prob=norm_topk_prob))
        torch.manual_seed(0)
        torch.nn.init.normal_(router.weight, std=0.1)
        logits, weights, experts = router(hidden_states)
        chosen = logits.softmax(-1).gather(-1, experts)
        expected = chosen / chosen.sum(-1, keepdim=True) if norm_topk_prob else chosen
        torch.testing.assert_close(weights, expected)
