"""Modes are small frozen records that check themselves and survive a JSON file."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from duet_moe.configuration.modes import BUILT_IN_MODES, Mode, modes_as_dict, resolve_mode

SHARES = st.floats(0, 1)
MODES = st.builds(
    Mode,
    name=st.text(min_size=1, max_size=8),
    head_mix=SHARES,
    gated=st.booleans(),
    plausible_min=SHARES,
    plan_guidance=st.floats(0, 5),
    num_experts_per_tok=st.none() | st.integers(1, 8),
    do_sample=st.booleans(),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.05, 1),
    min_p=SHARES,
    repetition_penalty=st.floats(0.5, 2),
)


@pytest.mark.parametrize("name", ["head_mix", "plausible_min", "top_p", "min_p"])
@pytest.mark.parametrize("bad", [-0.01, 1.01, float("nan")])
def test_a_share_outside_zero_to_one_is_refused(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=rf"'mine'.*{name}={bad}.*between 0 and 1"):
        Mode("mine", **{name: bad})


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty"])
@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}={bad}.*above 0"):
        Mode("mine", **{name: bad})


@pytest.mark.parametrize("name, bad", [("plan_guidance", -0.5), ("top_k", -1)])
def test_a_negative_weight_or_count_is_refused(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}={bad}.*not be negative"):
        Mode("mine", **{name: bad})


@pytest.mark.parametrize("bad", [0, -2])
def test_a_mode_without_experts_is_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=f"num_experts_per_tok={bad}"):
        Mode("mine", num_experts_per_tok=bad)


def test_a_mode_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        BUILT_IN_MODES["factual"].head_mix = 1.0  # type: ignore[misc]


def test_factual_is_the_greedy_coherence_head_and_creative_leans_to_the_diversity_head_within_bounds() -> None:
    factual, creative, hybrid = (BUILT_IN_MODES[name] for name in ("factual", "creative", "hybrid"))
    assert (factual.head_mix, factual.do_sample, factual.plausible_min) == (0.0, False, 0.0)
    assert 0.5 < creative.head_mix <= 1.0 and creative.do_sample
    assert 0 < creative.plausible_min < 1
    assert 0 < hybrid.head_mix < 1


@given(MODES)
def test_sampling_settings_are_given_only_where_the_mode_samples(mode: Mode) -> None:
    kwargs = mode.sampling_kwargs()
    assert kwargs["do_sample"] is mode.do_sample
    assert kwargs["repetition_penalty"] == mode.repetition_penalty
    assert ("temperature" in kwargs) is mode.do_sample
    assert ("min_p" in kwargs) is (mode.do_sample and mode.min_p > 0)
    saved = GenerationConfig(**kwargs)
    assert all(getattr(saved, name) == value for name, value in kwargs.items())


@given(MODES)
def test_forward_gets_the_heads_and_the_experts_that_the_mode_names(mode: Mode) -> None:
    names = ("head_mix", "gated", "plausible_min", "plan_guidance")
    expected = {name: getattr(mode, name) for name in names}
    if mode.num_experts_per_tok is not None:
        expected["num_experts_per_tok"] = mode.num_experts_per_tok
    assert mode.forward_kwargs() == expected


@given(MODES, SHARES)
def test_a_mix_that_a_call_names_takes_the_place_of_the_gate(mode: Mode, mix: float) -> None:
    assert mode.changed(head_mix=mix) == replace(mode, head_mix=mix, gated=False)
    assert mode.changed(head_mix=mix, gated=True) == replace(mode, head_mix=mix, gated=True)
    assert mode.changed(temperature=0.5) == replace(mode, temperature=0.5)


@given(MODES)
def test_a_mode_survives_json_and_is_found_by_its_name(mode: Mode) -> None:
    saved = json.loads(json.dumps(modes_as_dict({mode.name: mode})))
    assert resolve_mode(mode.name, saved) == mode
    assert resolve_mode(mode) is mode


def test_a_saved_mode_wins_over_the_built_in_one_of_its_name() -> None:
    mine = Mode("factual", head_mix=0.25)
    assert resolve_mode("factual", modes_as_dict({"factual": mine})) == mine
    assert resolve_mode("factual") == BUILT_IN_MODES["factual"]


def test_an_unknown_mode_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match="'poetic'") as raised:
        resolve_mode("poetic", modes_as_dict({"dry": Mode("dry")}))
    assert all(name in str(raised.value) for name in ("creative", "dry", "factual", "hybrid"))


def test_auto_without_a_prompt_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match="'auto' is chosen by a prompt.*factual"):
        resolve_mode("auto")
