"""What a token costs, by counting: parameters, operations, bytes read, key-value cache, dollars.

    python -m duet_moe.evaluation.cost

prints the bundled model beside two published shapes, and what halving the active experts saves. A multiply-add is two
operations (FLOPs); norms, activations, rotary embeddings and softmax are left out, as torch.utils.flop_counter leaves
them out. Bytes are the fewest that a decode step reads: the weights in use once per batch, and every sequence's cache.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

from duet_moe.evaluation.shapes import SHAPES, Shape, require

PHASES = ("decode", "prefill")
BATCHES = (1, 8, 64, 512)
MIXTRAL = SHAPES["mixtral-8x7b"]
QUARTERS = replace(MIXTRAL, experts=32, active=8, intermediate=MIXTRAL.intermediate // 4)
# What is halved: shapes with the larger number of active experts.
HALVED: Mapping[str, Shape] = {
    "duet-mini, 8 to 4 of 16": replace(SHAPES["duet-mini"], active=8),
    "mixtral-8x7b, 2 to 1 of 8": MIXTRAL,
    "in quarters, 8 to 4 of 32": QUARTERS,
    "in quarters, 16 to 8 of 32": replace(QUARTERS, active=16),
    "deepseek-v3, 8 to 4 of 256": SHAPES["deepseek-v3"],
}


def total_parameters(shape: Shape) -> int:
    """Return the number of weights of the whole model."""
    used = _trunk(shape, shape.experts) + _output(shape, shape.output_heads) + _norms(shape, shape.output_heads)
    return int(used) + shape.vocab * shape.hidden


def active_parameters(shape: Shape, heads: int = 1) -> int:
    """Return the number of weights that one token uses, of the embedding table one row.

    Args:
        heads: output heads in use: 1 is the first one, 2 are both with the plan.

    Raises:
        ValueError: if the shape has fewer output heads.
    """
    return int(_trunk(shape, shape.active) + _output(shape, heads)) + _norms(shape, heads) + shape.hidden


def flops_per_token(shape: Shape, context: int, phase: str = "decode", heads: int = 1) -> float:
    """Return the floating-point operations of one token.

    Args:
        context: tokens, the one in question included. In `"decode"` it is the last of them; `"prefill"` is the mean
            over a prompt of so many, whose last token alone reaches the output heads.
        heads: output heads in use, as in `active_parameters`.

    Latent attention decodes on the compressed cache, with the maps of keys and values absorbed in those of queries and
    outputs, and expands keys and values in prefill (arXiv 2405.04434, section 2.1.2).

    Raises:
        ValueError: on an unknown phase, or a context below 1.
    """
    require(phase in PHASES, "phase", phase, f"one of {PHASES}")
    spoken = 1 if phase == "decode" else 1 / _at_least_one("context", context)
    matrices = _trunk(shape, shape.active) + _output(shape, heads) * spoken
    seen = sum(_keys(window, context, phase) for window in _windows(shape))
    return 2 * matrices + 2 * shape.heads * _width_per_key(shape, phase) * seen


def experts_read(shape: Shape, batch: int) -> float:
    """Return how many different experts of a layer a step reads for `batch` tokens, expected for even routing.

    Each token picks `active` of `experts` by itself, so an expert stays unread with probability (1 - active /
    experts)^batch. Uneven routing reads fewer.
    """
    return shape.experts * (1 - (1 - shape.active / shape.experts) ** _at_least_one("batch", batch))


def bytes_per_token(
    shape: Shape,
    context: int,
    batch: int = 1,
    bytes_per_weight: float = 2,
    bytes_per_value: float = 2,
    heads: int = 1,
) -> float:
    """Return the bytes that decoding one token reads: its share of the weights of a step, and its own cache.

    Args:
        context: tokens of every sequence; 0 leaves the cache out.
        batch: sequences that a step decodes together.
        bytes_per_weight, bytes_per_value: of the weights, and of the cache.
        heads: output heads in use, as in `active_parameters`.

    Raises:
        ValueError: on a number that cannot be; the message has it and what is allowed.
    """
    require(bytes_per_weight > 0, "bytes_per_weight", bytes_per_weight, "above 0")
    read = _trunk(shape, experts_read(shape, batch)) + _output(shape, heads) + _norms(shape, heads)
    return bytes_per_weight * (read / batch + shape.hidden) + kv_bytes(shape, context, bytes_per_value)


def kv_bytes(shape: Shape, context: int, bytes_per_value: float = 2) -> float:
    """Return the bytes of keys and values that one sequence of `context` tokens holds.

    Latent attention holds the compressed keys and values and the shared key with position.

    Raises:
        ValueError: on a context below 0, or values of no bytes.
    """
    require(context >= 0, "context", context, "0 or more")
    require(bytes_per_value > 0, "bytes_per_value", bytes_per_value, "above 0")
    latent = shape.latent
    width = latent.key_value_rank + latent.rope_dim if latent else 2 * shape.kv_heads * shape.head_dim
    return bytes_per_value * width * sum(min(context, window or context) for window in _windows(shape))


def price_per_million(tokens_per_second: float, dollars_per_hour: float) -> float:
    """Return the dollars of a million tokens on a machine that costs `dollars_per_hour`.

    Raises:
        ValueError: on a rate that is not above 0, or a negative price.
    """
    require(tokens_per_second > 0, "tokens_per_second", tokens_per_second, "above 0")
    require(dollars_per_hour >= 0, "dollars_per_hour", dollars_per_hour, "0 or more")
    return 1e6 / tokens_per_second * dollars_per_hour / 3600


def savings(shape: Shape, active: int, context: int = 4096, batches: Sequence[int] = BATCHES) -> dict[str, float]:
    """Return the shares of cost that `active` experts save against the shape's own number, one output head in use.

    Returns:
        `decode` and `prefill`: of the operations; `weights, batch B`: of the bytes of weights that a step reads;
        `weights and cache, batch B`: the same with the caches of `context` tokens. Both are of 2 bytes a number.
    """
    fewer = replace(shape, active=active)
    cuts = {name: 1 - flops_per_token(fewer, context, name) / flops_per_token(shape, context, name) for name in PHASES}
    for name, tokens in (("weights", 0), ("weights and cache", context)):
        for batch in batches:
            before, after = (bytes_per_token(each, tokens, batch) for each in (shape, fewer))
            cuts[f"{name}, batch {batch}"] = 1 - after / before
    return cuts


def _trunk(shape: Shape, experts: float) -> float:
    """Count the weights of the trunk's matrices with `experts` routed experts in each sparse layer."""
    sparse = shape.layers - shape.dense_layers
    widths = sparse * (experts + shape.shared) * shape.intermediate + shape.dense_layers * shape.dense_intermediate
    router = sparse * shape.experts * shape.hidden
    return shape.layers * _attention(shape) + router + 3 * shape.hidden * widths


def _attention(shape: Shape) -> int:
    if not (latent := shape.latent):
        return 2 * shape.hidden * shape.head_dim * (shape.heads + shape.kv_heads)
    queries = latent.query_rank * (shape.hidden + shape.heads * (latent.nope_dim + latent.rope_dim))
    compressed = shape.hidden * (latent.key_value_rank + latent.rope_dim)
    expanded = latent.key_value_rank * shape.heads * (latent.nope_dim + latent.value_dim)
    return queries + compressed + expanded + shape.heads * latent.value_dim * shape.hidden


def _output(shape: Shape, heads: int) -> int:
    require(1 <= heads <= shape.output_heads, "heads", heads, f"between 1 and output_heads={shape.output_heads}")
    plan = 2 * shape.hidden * shape.plan if heads == 2 else 0
    return heads * shape.hidden * (shape.vocab + 3 * shape.adapter) + plan


def _norms(shape: Shape, heads: int) -> int:
    latent = shape.latent.query_rank + shape.latent.key_value_rank if shape.latent else 0
    in_heads = heads * shape.hidden * (2 if shape.adapter else 1)
    return shape.layers * (2 * shape.hidden + shape.qk_norm + latent) + in_heads


def _windows(shape: Shape) -> list[int | None]:
    return [shape.window] * (shape.layers - shape.full_layers) + [None] * shape.full_layers


def _keys(window: int | None, context: int, phase: str) -> float:
    """Count the keys that a query sees in one layer, in prefill the mean over the prompt."""
    width = min(_at_least_one("context", context), window or context)
    if phase == "decode":
        return width
    return (width * (width + 1) / 2 + (context - width) * width) / context


def _width_per_key(shape: Shape, phase: str) -> int:
    """Count the multiply-adds of one head with one key and its value."""
    if not (latent := shape.latent):
        return 2 * shape.head_dim
    if phase == "decode":
        return 2 * latent.key_value_rank + latent.rope_dim
    return latent.nope_dim + latent.rope_dim + latent.value_dim


def _at_least_one(name: str, value: int) -> int:
    require(value >= 1, name, value, "1 or more")
    return value


def shapes_table(context: int = 4096) -> str:
    """Return the counts of all `SHAPES` as a markdown table, with sequences of `context` tokens."""
    shapes = SHAPES.values()
    rows = {
        "total parameters, M": [total_parameters(s) / 1e6 for s in shapes],
        "active, one output head, M": [active_parameters(s) / 1e6 for s in shapes],
        "active, all output heads, M": [active_parameters(s, s.output_heads) / 1e6 for s in shapes],
        "decode, GFLOPs a token": [flops_per_token(s, context) / 1e9 for s in shapes],
        "prefill, GFLOPs a token": [flops_per_token(s, context, "prefill") / 1e9 for s in shapes],
        "cache, MB a sequence": [kv_bytes(s, context) / 1e6 for s in shapes],
    }
    rows |= {f"read, MB a token, batch {b}": [bytes_per_token(s, context, b) / 1e6 for s in shapes] for b in BATCHES}
    return _table("", list(SHAPES), {label: [_short(value) for value in row] for label, row in rows.items()})


def savings_table(context: int = 4096) -> str:
    """Return what halving the active experts saves as a markdown table, in per cent."""
    cuts = {label: savings(shape, shape.active // 2, context) for label, shape in HALVED.items()}
    rows = {name: [f"{100 * cut[name]:.1f}" for cut in cuts.values()] for name in next(iter(cuts.values()))}
    return _table("saved, %", list(cuts), rows)


def _table(corner: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    lines = [
        (corner, *columns),
        ("---", *["---:"] * len(columns)),
        *((label, *cells) for label, cells in rows.items()),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print both tables; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=4096, help="tokens of every sequence (4096)")
    context = parser.parse_args(argv).context
    if context < 1:
        parser.error(f"--context {context} is not possible: it must be 1 or more")
    print(f"{shapes_table(context)}\n\n{savings_table(context)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
