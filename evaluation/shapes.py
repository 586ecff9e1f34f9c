"""The shapes that cost is counted for: ours, read from a configuration, and two published ones."""

from collections.abc import Mapping
from dataclasses import dataclass

from duet_moe.configuration.configuration_duet_moe import DuetMoeConfig
from duet_moe.modeling.checkpoints import bundled


def require(holds: bool, name: str, value: object, allowed: str) -> None:
    """Refuse a value by name, saying what is allowed."""
    if not holds:
        raise ValueError(f"{name}={value!r} is not possible: it must be {allowed}.")


@dataclass(frozen=True)
class Latent:
    """Widths of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Args:
        query_rank, key_value_rank (`int`): widths of the compressed queries, and of the compressed keys and values.
        nope_dim, rope_dim (`int`): a head's query and key without position, and with it; the latter key is shared.
        value_dim (`int`): of a head's value.
    """

    query_rank: int
    key_value_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that its cost depends on.

    Args:
        heads, kv_heads, head_dim (`int`): of the attention; the last two say nothing where there is a `latent`.
        intermediate (`int`): width of one expert's SwiGLU.
        experts, active, shared (`int`): routed experts of a layer, those that answer for a token, and those that
            always do.
        dense_layers, dense_intermediate (`int`): layers with one SwiGLU in place of experts, and its width.
        window (`int`, *optional*): tokens that a query sees, itself included; all when not given.
        full_layers (`int`): layers that the window does not hold for.
        latent (`Latent`, *optional*): latent attention in place of grouped queries.
        qk_norm (`int`): weights of the norms of queries and keys in one layer.
        output_heads, adapter, plan (`int`): output heads, the width of each one's SwiGLU, and the width of the plan
            that steers the second.

    Raises:
        ValueError: on sizes that cannot exist together; the message has the bad value and what is allowed.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    experts: int
    active: int
    vocab: int
    shared: int = 0
    dense_layers: int = 0
    dense_intermediate: int = 0
    window: int | None = None
    full_layers: int = 0
    latent: Latent | None = None
    qk_norm: int = 0
    output_heads: int = 1
    adapter: int = 0
    plan: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "experts", "vocab"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(1 <= self.active <= self.experts, "active", self.active, f"between 1 and experts={self.experts}")
        for name in ("dense_layers", "full_layers"):
            value = getattr(self, name)
            require(0 <= value <= self.layers, name, value, f"between 0 and layers={self.layers}")
        require(self.window is None or self.window >= 1, "window", self.window, "1 or more, or None for no window")
        require(self.output_heads in (1, 2), "output_heads", self.output_heads, "1 or 2")


def shape_of(config: DuetMoeConfig) -> Shape:
    """Return the shape of a Duet-MoE model."""
    norm_widths = {
        False: 0,
        True: 2 * config.head_dim,
        "all_heads": (config.num_attention_heads + config.num_key_value_heads) * config.head_dim,
    }
    return Shape(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        intermediate=config.intermediate_size,
        experts=config.num_local_experts,
        active=config.num_experts_per_tok,
        vocab=config.vocab_size,
        shared=config.num_shared_experts,
        window=config.sliding_window,
        full_layers=config.layer_types.count("full_attention"),
        qk_norm=norm_widths[config.qk_norm],
        output_heads=2,
        adapter=config.head_intermediate_size,
        plan=config.plan_size,
    )


# Published shapes from the models' own config.json; DeepSeek-V3 without its module for multi-token prediction.
SHAPES: Mapping[str, Shape] = {
    "duet-mini": shape_of(DuetMoeConfig.from_pretrained(bundled("duet-mini"))),
    "mixtral-8x7b": Shape(
        hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, intermediate=14_336, experts=8, active=2,
        vocab=32_000,
    ),
    "deepseek-v3": Shape(
        hidden=7168, layers=61, heads=128, kv_heads=128, head_dim=192, intermediate=2048, experts=256, active=8,
        vocab=129_280, shared=1, dense_layers=3, dense_intermediate=18_432, latent=Latent(1536, 512, 128, 64, 128),
    ),
}  # fmt: skip
