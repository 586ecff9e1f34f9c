"""What the weights of a model weigh: bytes by group, as they are held and as bf16.

This file travels inside saved checkpoints, so it imports only torch and transformers.
"""

import copy

import torch
from transformers.modeling_utils import PreTrainedModel

# The first part that stands in a weight's name says its group; a head's norms belong to the head.
PARTS = {
    "coherence_head.": "coherence_head",
    "diversity_head.": "diversity_head",
    "embed_tokens.": "embedding",
    "_norm.": "router_and_norms",
    "self_attn.": "attention",
    "experts.": "experts",
}
GROUPS = ("embedding", "attention", "experts", "router_and_norms", "coherence_head", "diversity_head")


def group_of(name: str) -> str:
    """Return the group of the weight `name`; the norms and routers of the layers are what no other group has."""
    return next((group for part, group in PARTS.items() if part in name), "router_and_norms")


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same configuration without storage and never quantised, to count its parameters."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def bytes_by_group(model: PreTrainedModel) -> dict[str, int]:
    """Return the bytes of all saved tensors by group, scales of quantised weights included, on this rank.

    Args:
        model ([`DuetMoeForCausalLM`] or [`DuetMoeModel`]): quantised or not, on any device.

    Returns:
        One entry per group of `GROUPS`, their `total`, and `bf16_total`, what two bytes a parameter would be.
    """
    held = dict.fromkeys(GROUPS, 0)
    for name, tensor in model.state_dict().items():
        held[group_of(name)] += _bytes(tensor)
    bf16 = sum(2 * parameter.numel() for parameter in skeleton(model).parameters())
    return held | {"total": sum(held.values()), "bf16_total": bf16}


def _bytes(tensor: torch.Tensor) -> int:
    # torchao's tensors say the bytes of what they stand for, not of what they hold; sharded ones those of all ranks
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    parts = [part for name in names if isinstance(part := getattr(tensor, name), torch.Tensor)]
    return sum(map(_bytes, parts)) if parts else tensor.nbytes


def footprint_table(model: PreTrainedModel) -> str:
    """Return `bytes_by_group` as lines to read."""
    sizes = bytes_by_group(model)
    bf16 = sizes.pop("bf16_total")
    lines = [f"  {name.replace('_', ' '):18}{size:>16,}" for name, size in sizes.items()]
    return "\n".join([*lines, f"  {'share of bf16':18}{sizes['total'] / bf16:>16.3f}"])
