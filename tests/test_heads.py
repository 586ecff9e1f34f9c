"""Two voices: which head speaks, how they are joined, and the decode rules against plain formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CLOSE, tiny_model, tokens
from torch import nn

from duet_moe import DuetMoeForCausalLM
from duet_moe.modeling.heads import guide_by_plan, head_disagreement, keep_plausible, mix_logits

LOGITS = st.lists(st.tuples(*[st.floats(-12, 12, width=32)] * 2), min_size=2, max_size=8)


def log_softmax(logits: list[float]) -> list[float]:
    total = math.log(sum(math.exp(value) for value in logits))
    return [value - total for value in logits]


def columns(pairs: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def forbid(head: nn.Module) -> None:
    """Let any use of this head fail."""

    def fail(*args: object) -> None:
        raise AssertionError("a head that is not needed was computed")

    for part in (head, head.input_norm, head.down_proj, head.norm, head.unembed):
        part.register_forward_pre_hook(fail)


@torch.no_grad()
def test_mix_zero_is_the_coherence_head_alone_bit_for_bit(model: DuetMoeForCausalLM) -> None:
    ids = tokens(2, 12)
    expected = model.coherence_head(model.model(ids).last_hidden_state)
    forbid(model.diversity_head)
    for mix in (0, 0.0, torch.tensor([0.0, 0.0]), torch.zeros(2, 12), None):
        assert torch.equal(model(ids, head_mix=mix).logits, expected)


@torch.no_grad()
def test_mix_one_is_the_diversity_head_alone_bit_for_bit(model: DuetMoeForCausalLM) -> None:
    ids = tokens(2, 12)
    expected = model.diversity_head(model.model(ids).last_hidden_state)
    forbid(model.coherence_head)
    for mix in (1, 1.0, torch.tensor([1.0, 1.0]), torch.ones(2, 12)):
        assert torch.equal(model(ids, head_mix=mix).logits, expected)


@torch.no_grad()
def test_a_broken_diversity_head_cannot_reach_factual_rows(model: DuetMoeForCausalLM) -> None:
    ids = tokens(2, 12)
    expected = model(ids, head_mix=0.0).logits
    for parameter in model.diversity_head.parameters():
        parameter.fill_(math.nan)
    assert torch.equal(model(ids, head_mix=0.0).logits, expected)
    mixed = model(ids, head_mix=torch.tensor([0.0, 0.5])).logits
    assert torch.equal(mixed[0], expected[0])
    assert mixed[1].isnan().all()


@torch.no_grad()
def test_the_configured_mix_is_what_a_call_without_one_uses() -> None:
    model, ids = tiny_model(head_mix=0.25), tokens(2, 5)
    assert torch.equal(model(ids).logits, model(ids, head_mix=0.25).logits)
    assert not torch.equal(model(ids).logits, model(ids, head_mix=0.0).logits)


@torch.no_grad()
def test_rows_with_their_own_settings_equal_the_rows_alone(model: DuetMoeForCausalLM) -> None:
    ids, plan = tokens(4, 12), torch.randn(4, 8)
    settings = {
        "head_mix": torch.tensor([0.0, 0.3, 1.0, 1.0]),
        "plausible_min": torch.tensor([0.0, 0.0, 0.1, 0.0]),
        "plan_guidance": torch.tensor([0.0, 2.0, 0.0, 0.7]),
    }
    together = model(ids, plan=plan, **settings).logits
    for row in range(4):
        own = {name: float(value[row]) for name, value in settings.items()}
        alone = model(ids[row : row + 1], plan=plan[row : row + 1], **own).logits
        torch.testing.assert_close(together[row : row + 1], alone, **CLOSE)
    as_list = model(ids, head_mix=[0.0, 0.3, 1.0, 1.0]).logits
    assert torch.equal(as_list, model(ids, head_mix=settings["head_mix"]).logits)


@torch.no_grad()
def test_tokens_with_their_own_mix_equal_the_tokens_alone(model: DuetMoeForCausalLM) -> None:
    ids, mix = tokens(2, 5), torch.tensor([[0.0, 0.2, 1.0, 0.5, 0.9], [1.0, 0.0, 0.0, 0.7, 0.1]])
    found = model(ids, head_mix=mix).logits
    for row, column in torch.ones_like(mix).nonzero().tolist():
        alone = model(ids, head_mix=float(mix[row, column])).logits
        torch.testing.assert_close(found[row, column], alone[row, column], **CLOSE)
    torch.testing.assert_close(model(ids, head_mix=mix, logits_to_keep=2).logits, found[:, -2:], **CLOSE)


@torch.no_grad()
def test_both_heads_are_reported_on_request_whatever_the_mix(model: DuetMoeForCausalLM) -> None:
    ids = tokens(2, 5)
    for mix in (0.0, 0.4, 1.0):
        outputs = model(ids, head_mix=mix, output_head_logits=True)
        assert torch.equal(outputs.coherence_logits, model(ids, head_mix=0.0).logits)
        assert torch.equal(outputs.diversity_logits, model(ids, head_mix=1.0).logits)
        assert torch.equal(outputs.logits, model(ids, head_mix=mix).logits)


@given(LOGITS, st.floats(0, 1))
def test_mixing_is_the_geometric_mean_of_the_probabilities(pairs: list[tuple[float, float]], mix: float) -> None:
    coherence, diversity = columns(pairs)
    found = mix_logits(torch.tensor(coherence), torch.tensor(diversity), mix).log_softmax(-1)
    blend = [(1 - mix) * c + mix * d for c, d in zip(log_softmax(coherence), log_softmax(diversity), strict=True)]
    torch.testing.assert_close(found, torch.tensor(log_softmax(blend)), rtol=1e-4, atol=1e-4)


@given(LOGITS, st.floats(0, 1))
def test_exactly_the_tokens_that_the_coherence_head_finds_plausible_stay(
    pairs: list[tuple[float, float]], share: float
) -> None:
    coherence, diversity = columns(pairs)
    found = keep_plausible(torch.tensor(diversity), torch.tensor(coherence), share).tolist()
    best = max(log_softmax(coherence))
    for score, before, after in zip(log_softmax(coherence), diversity, found, strict=True):
        threshold = math.log(share) if share > 0 else -math.inf
        if abs(score - best - threshold) > 1e-4:  # on the edge itself rounding decides
            assert after == (before if score - best >= threshold else -math.inf)
    assert max(found) > -math.inf


def test_a_plausible_share_of_zero_forbids_nothing_and_of_one_leaves_the_best() -> None:
    coherence, diversity = torch.tensor([3.0, 1.0, -9.0]), torch.tensor([0.1, 5.0, 2.0])
    assert torch.equal(keep_plausible(diversity, coherence, 0.0), diversity)
    assert torch.equal(keep_plausible(diversity, coherence, torch.tensor([0.0])), diversity)
    assert keep_plausible(diversity, coherence, 1.0).tolist() == [pytest.approx(0.1), -math.inf, -math.inf]


@given(LOGITS, st.floats(0, 4))
def test_plan_guidance_pushes_away_from_what_is_said_without_a_plan(
    pairs: list[tuple[float, float]], weight: float
) -> None:
    planned, plain = columns(pairs)
    found = guide_by_plan(torch.tensor(planned), torch.tensor(plain), weight).log_softmax(-1)
    with_plan, without = log_softmax(planned), log_softmax(plain)
    pushed = [p + weight * (p - q) for p, q in zip(with_plan, without, strict=True)]
    torch.testing.assert_close(found, torch.tensor(log_softmax(pushed)), rtol=1e-4, atol=2e-4)


@torch.no_grad()
def test_the_model_applies_the_rules_one_after_the_other(model: DuetMoeForCausalLM) -> None:
    ids, plan = tokens(2, 6), torch.randn(2, 8)
    states = model.model(ids).last_hidden_state
    coherence = model.coherence_head(states)
    planned, plain = model.diversity_head(states, plan[:, None]), model.diversity_head(states)
    guided = guide_by_plan(planned, plain, 1.5)
    expected = keep_plausible(mix_logits(coherence, guided, 0.6), coherence, 0.05)
    found = model(ids, head_mix=0.6, plan=plan, plan_guidance=1.5, plausible_min=0.05).logits
    assert torch.equal(found, expected)
    assert found.isinf().any()
    only_plausible = model(ids, head_mix=1.0, plausible_min=0.05).logits
    assert torch.equal(only_plausible, keep_plausible(plain, coherence, 0.05))


@torch.no_grad()
def test_a_plan_of_zeros_changes_no_bit_and_another_plan_does(model: DuetMoeForCausalLM) -> None:
    ids = tokens(2, 6)
    plain = model(ids, head_mix=1.0).logits
    assert torch.equal(model(ids, head_mix=1.0, plan=torch.zeros(2, 8)).logits, plain)
    half = torch.stack([torch.zeros(8), torch.ones(8)])
    steered = model(ids, head_mix=1.0, plan=half).logits
    torch.testing.assert_close(steered[0], plain[0], **CLOSE)
    assert (steered[1] - plain[1]).abs().max() > 1e-2
    assert torch.equal(model(ids, head_mix=0.0, plan=half).logits, model(ids, head_mix=0.0).logits)


@given(LOGITS)
def test_disagreement_is_the_jensen_shannon_divergence_in_bits(pairs: list[tuple[float, float]]) -> None:
    first, second = (torch.tensor(values) for values in columns(pairs))
    found = float(head_disagreement(first, second))
    p, q = ([math.exp(value) for value in log_softmax(values)] for values in columns(pairs))
    expected = 0.0
    for a, b in zip(p, q, strict=True):
        middle = (a + b) / 2
        expected += sum(0.5 * share * math.log2(share / middle) for share in (a, b) if share > 0)
    assert 0 <= found <= 1
    assert found == pytest.approx(expected, abs=1e-4)
    assert float(head_disagreement(second, first)) == pytest.approx(found, abs=1e-6)
    assert float(head_disagreement(first, first)) == pytest.approx(0, abs=1e-6)


def test_disagreement_of_disjoint_heads_is_one_bit() -> None:
    assert float(head_disagreement(torch.tensor([90.0, 0.0]), torch.tensor([0.0, 90.0]))) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["head_mix", "plausible_min"])
@pytest.mark.parametrize("bad", [-0.1, 1.5, math.nan, torch.tensor([0.5, 1.5])])
def test_a_setting_outside_zero_to_one_is_refused(
    model: DuetMoeForCausalLM, name: str, bad: float | torch.Tensor
) -> None:
    with pytest.raises(ValueError, match=f"{name} must be between 0 and 1"):
        model(tokens(2, 3), **{name: bad})


@pytest.mark.parametrize("shape", [(2, 7), (8,), (2, 3, 8)])
def test_a_plan_of_another_shape_is_refused_with_the_right_one(
    model: DuetMoeForCausalLM, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"plan has shape \(.*plan_size=8"):
        model(tokens(2, 3), head_mix=1.0, plan=torch.zeros(shape))


def test_a_model_without_plans_refuses_one() -> None:
    model = tiny_model(plan_size=0)
    assert model.diversity_head.plan_proj is None
    with pytest.raises(ValueError, match="plan_size=0"):
        model(tokens(2, 3), head_mix=1.0, plan=torch.zeros(2, 0))


def test_gradients_reach_both_heads_through_a_mix(model: DuetMoeForCausalLM) -> None:
    ids = tokens(2, 6)
    model(ids, labels=ids, head_mix=torch.tensor([0.5, 0.2])).loss.backward()
    assert all(head.unembed.weight.grad.abs().sum() > 0 for head in (model.coherence_head, model.diversity_head))
