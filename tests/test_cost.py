"""Counted cost equals hand-made sums, the parameters of real modules, and the operations that torch counts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_model, tokens
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from duet_moe import DuetMoeConfig, DuetMoeForCausalLM, bundled
from duet_moe.evaluation.cost import (
    active_parameters,
    bytes_per_token,
    experts_read,
    flops_per_token,
    kv_bytes,
    main,
    price_per_million,
    savings,
    savings_table,
    shapes_table,
    total_parameters,
)
from duet_moe.evaluation.shapes import SHAPES, Latent, Shape, shape_of
from duet_moe.modeling.info import cache_bytes, parameter_counts

# By hand: attention 16 weights, router 8, an expert 18, output 10, norms 6, embedding 10.
HAND = Shape(hidden=2, layers=1, heads=1, kv_heads=1, head_dim=2, intermediate=3, experts=4, active=2, vocab=5)
SMALL_MIXTRAL = Shape(
    hidden=16, layers=2, heads=4, kv_heads=2, head_dim=4, intermediate=24, experts=4, active=2, vocab=50
)
SMALL_DEEPSEEK = Shape(
    hidden=16, layers=3, heads=4, kv_heads=4, head_dim=10, intermediate=8, experts=8, active=3, vocab=50, shared=2,
    dense_layers=1, dense_intermediate=20, latent=Latent(12, 8, 6, 4, 5),
)  # fmt: skip
VARIANTS: dict[str, dict] = {
    "plain": {},
    "shared experts": {"num_shared_experts": 2},
    "norms of a head": {"qk_norm": True},
    "norms of all heads": {"qk_norm": "all_heads"},
    "wide adapter, no plan": {"head_intermediate_size": 50, "plan_size": 0},
    "a full layer": {"layer_types": ["full_attention", "sliding_attention"]},
}


def mixtral_sizes(shape: Shape) -> dict[str, int]:
    return dict(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        num_local_experts=shape.experts, num_experts_per_tok=shape.active,
    )  # fmt: skip


def deepseek_sizes(shape: Shape) -> dict[str, int]:
    latent = shape.latent
    assert latent is not None
    return dict(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.dense_intermediate,
        moe_intermediate_size=shape.intermediate, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, n_shared_experts=shape.shared, n_routed_experts=shape.experts,
        num_experts_per_tok=shape.active, first_k_dense_replace=shape.dense_layers, q_lora_rank=latent.query_rank,
        kv_lora_rank=latent.key_value_rank, qk_nope_head_dim=latent.nope_dim, qk_rope_head_dim=latent.rope_dim,
        v_head_dim=latent.value_dim,
    )  # fmt: skip


def mixtral_config(shape: Shape) -> MixtralConfig:
    return MixtralConfig(**mixtral_sizes(shape))


def deepseek_config(shape: Shape) -> DeepseekV3Config:
    return DeepseekV3Config(**deepseek_sizes(shape), n_group=1, topk_group=1)


KINDS = pytest.mark.parametrize(
    ("shape", "model_class", "config"),
    [
        pytest.param(SMALL_MIXTRAL, MixtralForCausalLM, mixtral_config, id="mixtral"),
        pytest.param(SMALL_DEEPSEEK, DeepseekV3ForCausalLM, deepseek_config, id="deepseek"),
    ],
)


def on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return model_class(config)


def parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def countable(model: PreTrainedModel) -> PreTrainedModel:
    """Take the plain implementations, which are made of products that torch counts."""
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    return model.eval()


@torch.no_grad()
def counted(model: PreTrainedModel, *arguments: torch.Tensor, **kwargs: object) -> int:
    with FlopCounterMode(display=False) as counter:
        model(*arguments, **kwargs)
    return counter.get_total_flops()


@torch.no_grad()
def counted_decode(model: PreTrainedModel, context: int, **kwargs: object) -> int:
    ids = tokens(1, context) % 50
    cache = model(ids[:, :-1], use_cache=True).cache
    return counted(model, ids[:, -1:], cache=cache, **kwargs)


def masked_flops(shape: Shape, length: int) -> int:
    """Count what an eager prefill computes of the scores that a causal mask then hides."""
    width = (
        shape.latent.nope_dim + shape.latent.rope_dim + shape.latent.value_dim if shape.latent else 2 * shape.head_dim
    )
    return 2 * shape.layers * shape.heads * width * (length * (length - 1) // 2)


def test_a_shape_counted_by_hand() -> None:
    assert total_parameters(HAND) == 16 + 8 + 4 * 18 + 10 + 6 + 10
    assert active_parameters(HAND) == 16 + 8 + 2 * 18 + 10 + 6 + 2
    assert flops_per_token(HAND, 3) == 2 * (16 + 8 + 2 * 18 + 10) + 2 * 3 * 4
    assert flops_per_token(HAND, 3, "prefill") == pytest.approx(
        2 * (16 + 8 + 2 * 18 + 10 / 3) + 2 * (1 + 2 + 3) / 3 * 4
    )
    assert kv_bytes(HAND, 3) == 2 * 3 * 2 * 2
    assert experts_read(HAND, 1) == 2
    assert experts_read(HAND, 2) == 3
    assert bytes_per_token(HAND, 3, batch=2) == 2 * ((16 + 8 + 3 * 18 + 10 + 6) / 2 + 2) + 24


def test_published_shapes_are_the_real_modules_and_their_sizes() -> None:
    # the defaults of both configurations are the published models
    for name, model_class, config, sizes in (
        ("mixtral-8x7b", MixtralForCausalLM, MixtralConfig(), mixtral_sizes),
        ("deepseek-v3", DeepseekV3ForCausalLM, DeepseekV3Config(), deepseek_sizes),
    ):
        expected = sizes(SHAPES[name])
        assert {size: getattr(config, size) for size in expected} == expected
        assert total_parameters(SHAPES[name]) == parameters(on_meta(model_class, config))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_duet_has_the_parameters_and_cache_of_its_modules(variant: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    model, shape = on_meta(DuetMoeForCausalLM, config), shape_of(config)
    counts = parameter_counts(model)
    assert total_parameters(shape) == counts["total"]
    assert active_parameters(shape) == counts["active"]
    assert active_parameters(shape, heads=2) == counts["active_both_heads"]
    assert active_parameters(replace(shape, active=3)) == parameter_counts(model, 3)["active"]
    for length in (1, config.sliding_window, config.sliding_window + 5):
        assert kv_bytes(shape, length, bytes_per_value=4) == cache_bytes(model, length)


def test_duet_mini_is_read_from_its_configuration() -> None:
    model = on_meta(DuetMoeForCausalLM, DuetMoeConfig.from_pretrained(bundled("duet-mini")))
    small = parameters(model.token_gate) + parameters(model.task_router)  # which a shape leaves out
    assert total_parameters(SHAPES["duet-mini"]) == parameters(model) - small
    assert kv_bytes(SHAPES["duet-mini"], 1000) == cache_bytes(model.to(torch.bfloat16), 1000)


@KINDS
def test_active_parameters_are_those_of_a_model_without_the_idle_experts(
    shape: Shape, model_class: type, config: Callable
) -> None:
    model = on_meta(model_class, config(replace(shape, experts=shape.active)))
    routers = (shape.layers - shape.dense_layers) * (shape.experts - shape.active) * shape.hidden
    embedding = (shape.vocab - 1) * shape.hidden
    assert active_parameters(shape) == parameters(model) + routers - embedding


def test_decode_operations_are_those_that_torch_counts_in_mixtral() -> None:
    model = countable(MixtralForCausalLM(mixtral_config(SMALL_MIXTRAL)))
    for context in (2, 9):
        assert flops_per_token(SMALL_MIXTRAL, context) == counted_decode(model, context)


@pytest.mark.parametrize("variant", VARIANTS)
def test_decode_operations_are_those_that_torch_counts_in_a_duet(variant: str) -> None:
    model = countable(tiny_model(**VARIANTS[variant]))
    shape = shape_of(model.config)
    plan = torch.ones(1, shape.plan) if shape.plan else None
    for context in (2, model.config.sliding_window, model.config.sliding_window + 5):
        assert flops_per_token(shape, context) == counted_decode(model, context, head_mix=0.0)
        both = counted_decode(model, context, plan=plan, output_head_logits=True)
        assert flops_per_token(shape, context, heads=2) == both
    fewer = counted_decode(model, 4, head_mix=0.0, num_experts_per_tok=1)
    assert flops_per_token(replace(shape, active=1), 4) == fewer


@KINDS
def test_prefill_operations_are_those_that_torch_counts_less_the_masked(
    shape: Shape, model_class: type, config: Callable
) -> None:
    model, length = countable(model_class(config(shape))), 7
    found = counted(model, tokens(1, length) % 50, use_cache=False, logits_to_keep=1)
    assert length * flops_per_token(shape, length, "prefill") == pytest.approx(
        found - masked_flops(shape, length), rel=1e-9
    )


def test_prefill_in_a_window_is_the_mean_of_its_decode_steps() -> None:
    shape = replace(HAND, layers=2, window=4, full_layers=1)
    output = 2 * shape.hidden * shape.vocab
    steps = [flops_per_token(shape, context) - output for context in range(1, 11)]
    assert flops_per_token(shape, 10, "prefill") == pytest.approx((sum(steps) + output) / 10)


def test_absorbed_latent_attention_equals_the_expanded_one_and_costs_what_is_counted() -> None:
    latent, heads, keys = Latent(12, 8, 6, 4, 5), 4, 9
    query, rotated = torch.randn(heads, latent.nope_dim), torch.randn(heads, latent.rope_dim)
    cache, positions = torch.randn(keys, latent.key_value_rank), torch.randn(keys, latent.rope_dim)
    to_key = torch.randn(heads, latent.nope_dim, latent.key_value_rank)
    to_value = torch.randn(heads, latent.value_dim, latent.key_value_rank)
    scores = torch.einsum("hn,hnr,kr->hk", query, to_key, cache) + rotated @ positions.T
    expanded = torch.einsum("hk,hvr,kr->hv", scores.softmax(-1), to_value, cache)
    with FlopCounterMode(display=False) as counter:
        absorbed = torch.bmm(query[:, None], to_key)[:, 0]
        weights = (absorbed @ cache.T + rotated @ positions.T).softmax(-1)
        output = torch.bmm(to_value, (weights @ cache)[:, :, None])[:, :, 0]
    assert torch.allclose(output, expanded, rtol=1e-4, atol=1e-4)
    maps = 2 * (to_key.numel() + to_value.numel())  # counted as weights of the trunk
    per_key = (flops_per_token(SMALL_DEEPSEEK, 2 * keys) - flops_per_token(SMALL_DEEPSEEK, keys)) / keys
    assert counter.get_total_flops() - maps == per_key * keys / SMALL_DEEPSEEK.layers


def test_latent_attention_caches_what_the_real_module_does() -> None:
    model = DeepseekV3ForCausalLM(deepseek_config(SMALL_DEEPSEEK))
    with torch.no_grad():
        cache = model(tokens(1, 7) % 50, use_cache=True).cache
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert kv_bytes(SMALL_DEEPSEEK, 7, bytes_per_value=4) == held


def test_experts_read_are_those_of_even_routing() -> None:
    random = np.random.default_rng(0)
    shape = replace(HAND, experts=16, active=4)
    drawn = [len({e for _ in range(5) for e in random.permutation(16)[:4]}) for _ in range(4000)]
    assert experts_read(shape, 5) == pytest.approx(np.mean(drawn), rel=0.01)
    assert experts_read(replace(shape, active=16), 3) == 16
    assert experts_read(shape, 10_000) == pytest.approx(16)


def test_one_sequence_reads_the_active_parameters_and_its_cache() -> None:
    for shape in SHAPES.values():
        read = bytes_per_token(shape, 100, bytes_per_weight=0.5, bytes_per_value=4)
        assert read == pytest.approx(0.5 * active_parameters(shape) + kv_bytes(shape, 100, 4))
    both = bytes_per_token(SHAPES["duet-mini"], 0, heads=2)
    assert both == 2 * active_parameters(SHAPES["duet-mini"], heads=2)


def test_large_batches_read_the_cache_and_almost_no_weights() -> None:
    shape = SHAPES["mixtral-8x7b"]
    assert bytes_per_token(shape, 4096, batch=10**9) == pytest.approx(kv_bytes(shape, 4096), rel=1e-3)


def test_savings_are_shares_of_the_larger_cost() -> None:
    cuts = savings(HAND, 1, context=3, batches=(1, 2))
    assert cuts["decode"] == pytest.approx(2 * 18 / 164)
    assert cuts["prefill"] == pytest.approx(2 * 18 / flops_per_token(HAND, 3, "prefill"))
    assert cuts["weights, batch 1"] == pytest.approx(18 / active_parameters(HAND))
    assert cuts["weights, batch 2"] == pytest.approx((3 - 1.75) * 18 / (94 + 2 * 2))
    assert cuts["weights and cache, batch 1"] == pytest.approx(2 * 18 / (2 * active_parameters(HAND) + 24))
    assert not any(savings(HAND, 2).values())


def test_price_is_that_of_the_hours_a_million_tokens_take() -> None:
    assert price_per_million(tokens_per_second=1000, dollars_per_hour=3.6) == pytest.approx(1.0)
    assert price_per_million(1, 0) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: replace(HAND, active=5), r"active=5 .* between 1 and experts=4"),
        (lambda: replace(HAND, vocab=0), "vocab=0 .* 1 or more"),
        (lambda: replace(HAND, full_layers=2), r"full_layers=2 .* layers=1"),
        (lambda: replace(HAND, dense_layers=-1), r"dense_layers=-1 .* layers=1"),
        (lambda: replace(HAND, window=0), "window=0 .* None for no window"),
        (lambda: replace(HAND, output_heads=3), "output_heads=3 .* 1 or 2"),
        (lambda: active_parameters(HAND, heads=2), r"heads=2 .* output_heads=1"),
        (lambda: flops_per_token(HAND, 3, "train"), r"phase='train' .* \('decode', 'prefill'\)"),
        (lambda: flops_per_token(HAND, 0), "context=0 .* 1 or more"),
        (lambda: flops_per_token(HAND, 0, "prefill"), "context=0 .* 1 or more"),
        (lambda: kv_bytes(HAND, -1), "context=-1 .* 0 or more"),
        (lambda: kv_bytes(HAND, 1, bytes_per_value=0), "bytes_per_value=0 .* above 0"),
        (lambda: bytes_per_token(HAND, 3, batch=0), "batch=0 .* 1 or more"),
        (lambda: bytes_per_token(HAND, 3, bytes_per_weight=0), "bytes_per_weight=0 .* above 0"),
        (lambda: price_per_million(0, 1), "tokens_per_second=0 .* above 0"),
        (lambda: price_per_million(1, -1), "dollars_per_hour=-1 .* 0 or more"),
        (lambda: savings(HAND, 0), "active=0 .* between 1"),
    ],
)
def test_the_impossible_is_refused_by_name(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_page_holds_what_the_program_prints(capsys: pytest.CaptureFixture) -> None:
    page = (Path(__file__).parent.parent / "docs" / "cost.md").read_text()
    assert shapes_table() in page
    assert savings_table() in page
    assert main(["--context", "8192"]) == 0
    printed = capsys.readouterr().out
    assert shapes_table(8192) in printed
    assert savings_table(8192) in printed
    with pytest.raises(SystemExit, match="2"):
        main(["--context", "0"])


def test_the_code_on_the_page_runs() -> None:
    page = (Path(__file__).parent.parent / "docs" / "cost.md").read_text()
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    assert names["shape"] == shape_of(DuetMoeConfig())
