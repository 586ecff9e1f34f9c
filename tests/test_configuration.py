"""The configuration refuses every shape that cannot exist, says what is allowed, and survives JSON."""

import doctest
import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_config, tiny_model, tokens
from transformers import AutoConfig

from duet_moe import DuetMoeConfig
from duet_moe.configuration import configuration_duet_moe

AT_LEAST_ONE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "prompt_chunk_size",
    "num_local_experts",
    "num_experts_per_tok",
    "head_intermediate_size",
    "max_position_embeddings",
)
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def refusal(**changes: object) -> str:
    with pytest.raises(ValueError) as raised:
        tiny_config(**changes)
    return str(raised.value)


@pytest.mark.parametrize("name", AT_LEAST_ONE)
@pytest.mark.parametrize("bad", [0, -3])
def test_a_size_below_one_is_refused_with_its_name_and_value(name: str, bad: int) -> None:
    message = refusal(**{name: bad})
    assert f"{name}={bad}" in message
    assert ">= 1" in message


def test_a_norm_over_all_heads_has_them_all_on_every_rank() -> None:
    plan = tiny_config(qk_norm="all_heads").base_model_tp_plan
    assert plan["layers.*.self_attn.q_proj"] == plan["layers.*.self_attn.v_proj"] == "colwise_gather_output"
    assert plan["layers.*.self_attn.o_proj"] == "rowwise_split_input"
    for qk_norm in (True, False):
        assert tiny_config(qk_norm=qk_norm).base_model_tp_plan["layers.*.self_attn.q_proj"] == "colwise"


@pytest.mark.parametrize("name", ["num_shared_experts", "plan_size"])
def test_optional_sizes_may_be_zero_but_not_negative(name: str) -> None:
    assert getattr(tiny_config(**{name: 0}), name) == 0
    message = refusal(**{name: -1})
    assert f"{name}=-1" in message
    assert ">= 0" in message


@pytest.mark.parametrize(
    "changes, bad, allowed",
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5", "num_local_experts=4"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3", "num_attention_heads=4"),
        ({"head_dim": 7}, "head_dim=7", "even"),
        ({"layer_types": ["sliding_attention", "linear"]}, "'linear'", "full_attention"),
        ({"layer_types": ["full_attention"]}, "['full_attention']", "num_hidden_layers=2"),
        ({"qk_norm": "heads"}, "qk_norm='heads'", "all_heads"),
        ({"head_mix": -0.1}, "head_mix=-0.1", "between 0"),
        ({"head_mix": 1.5}, "head_mix=1.5", "between 0"),
        ({"head_mix": float("nan")}, "head_mix=nan", "between 0"),
        ({"hybrid_gate": 1}, "hybrid_gate=1", "True or False"),
        ({"default_mode": "poetic"}, "'poetic'", "factual"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True", "False"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_what_is_allowed(changes: dict, bad: str, allowed: str) -> None:
    message = refusal(**changes)
    assert bad in message
    assert allowed in message


@pytest.mark.parametrize("bad", [2.5, "two"])
def test_a_size_that_is_no_whole_number_is_refused(bad: object) -> None:
    with pytest.raises((ValueError, TypeError), match="num_local_experts"):
        tiny_config(num_local_experts=bad)


def test_the_limits_themselves_are_allowed() -> None:
    config = tiny_config(num_experts_per_tok=4, num_key_value_heads=4, sliding_window=1, head_mix=1.0)
    assert (config.num_experts_per_tok, config.sliding_window, config.head_mix) == (4, 1, 1.0)


def test_what_is_left_out_follows_from_the_rest() -> None:
    config = tiny_config(num_key_value_heads=None, num_hidden_layers=3)
    assert config.head_dim == 32 // 4
    assert config.num_key_value_heads == 4
    assert config.layer_types == ["sliding_attention"] * 3
    assert config.head_intermediate_size == 32
    assert config.num_experts == config.num_local_experts


def test_defaults_are_those_of_the_design() -> None:
    config = DuetMoeConfig()
    assert (config.model_type, config.num_experts_per_tok) == ("duet_moe", 4)
    assert (config.sliding_window, config.max_position_embeddings) == (32_768, 131_072)
    assert set(config.layer_types) == {"sliding_attention"}


def test_yarn_is_accepted_and_reaches_the_attention() -> None:
    plain, stretched = tiny_model(), tiny_model(rope_parameters=YARN)
    assert stretched.config.rope_parameters["rope_type"] == "yarn"
    ids = tokens(1, 20)
    with torch.no_grad():
        first, second = plain(ids).logits, stretched(ids).logits
    assert second.isfinite().all()
    assert not torch.allclose(first, second, atol=1e-3)


def test_an_unknown_rope_type_is_refused() -> None:
    with pytest.raises((KeyError, ValueError), match="spiral"):
        tiny_model(rope_parameters={"rope_type": "spiral", "rope_theta": 10_000.0})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_types": ["full_attention", "sliding_attention"], "qk_norm": True, "num_shared_experts": 2},
        {"rope_parameters": YARN, "head_mix": 0.25, "default_mode": "factual", "head_dim": 16},
    ],
)
def test_json_keeps_every_field(changes: dict, tmp_path: Path) -> None:
    config = tiny_config(**changes)
    again = DuetMoeConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is DuetMoeConfig
    for name in {*config.to_dict()} - {"architectures", "auto_map", "transformers_version", "_name_or_path"}:
        assert getattr(loaded, name) == getattr(config, name), name


def test_a_broken_file_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_experts_per_tok": 9}))
    with pytest.raises(ValueError, match="num_experts_per_tok=9"):
        AutoConfig.from_pretrained(tmp_path)


def test_the_example_in_the_documentation_runs() -> None:
    results = doctest.testmod(configuration_duet_moe)
    assert results.attempted > 0
    assert results.failed == 0
