"""Grouped-query attention with rotary embeddings, and the one mask that all layers and caches share.

Rotary frequencies come from the library's `rope_parameters` (default, linear, YaRN, ...). The mask is built from the
*positions* of queries and keys, so rings, growing and static caches need no special case, and its size is
chunk x keys, never prompt x prompt.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import apply_rotary_pos_emb, eager_attention_forward

from .configuration_duet_moe import DuetMoeConfig


def key_positions(cache: Cache | None, layer_idx: int, queries: int, device: torch.device) -> torch.Tensor:
    """Return the position (keys,) of every key that layer `layer_idx` will hand to its next `queries` queries."""
    if cache is None:
        return torch.arange(queries, device=device)
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if hasattr(layer, "key_positions"):
        return layer.key_positions(queries, device)
    keys, offset = cache.get_mask_sizes(queries, layer_idx)
    return torch.arange(keys, device=device) + offset


def visible_keys(
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    window: int | None,
    padding_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Say which key every query may see.

    Args:
        query_positions (`torch.Tensor` of shape (queries,)), key_positions (`torch.Tensor` of shape (keys,)).
        window (`int`, *optional*): a query sees this many positions, itself included; `None` sees all before it.
        padding_mask (`torch.Tensor` of shape (batch, positions), *optional*): false where a position is padding.
        document_ids (`torch.Tensor` of shape (batch, positions), *optional*): packed rows; no view across documents.

    Returns:
        `torch.Tensor` of bool, shape (batch or 1, 1, queries, keys). Every query sees itself, so no row is empty.
    """
    distance = query_positions[:, None] - key_positions[None, :]  # (queries, keys)
    seen = distance >= 0
    if window is not None:
        seen = seen & (distance < window)
    seen = seen[None, None]
    if padding_mask is not None:
        last = padding_mask.shape[1] - 1
        real = padding_mask.bool()[:, key_positions.clamp(max=last)] & (key_positions <= last)  # (batch, keys)
        seen = seen & real[:, None, None, :]
    if document_ids is not None:
        same = document_ids[:, query_positions, None] == document_ids[:, None, key_positions]
        seen = seen & same[:, None]
    return seen | (distance == 0)


def packed_document_ids(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Number the documents of packed rows: a new one starts wherever `position_ids` (batch, seq) does not count on."""
    starts = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1
    if not torch.compiler.is_compiling() and not starts.any():
        return None
    return starts.cumsum(dim=1)


def attention_masks(
    config: DuetMoeConfig,
    hidden_states: torch.Tensor,
    cache: Cache | None,
    padding_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> dict[str, torch.Tensor | BlockMask | None]:
    """Build one mask per layer type for the next `hidden_states` (batch, queries, hidden).

    All layers of a type have seen the same positions, so they share it. The form is what the attention implementation
    takes: `None` where sdpa's own causal mask says it all, bool for sdpa, a block mask for flex_attention, else a
    float that is added to the scores. A `padding_mask` of shape (batch, 1, queries, keys) is taken as it is.
    """
    if padding_mask is not None and padding_mask.ndim == 4:
        return dict.fromkeys(config.layer_types, padding_mask)
    queries, device = hidden_states.shape[1], hidden_states.device
    masks: dict[str, torch.Tensor | BlockMask | None] = {}
    for layer_type in sorted(set(config.layer_types)):
        layer_idx = config.layer_types.index(layer_type)
        window = config.sliding_window if layer_type == "sliding_attention" else None
        past_length = cache.get_seq_length(layer_idx) if cache is not None else 0
        keys = key_positions(cache, layer_idx, queries, device)
        query_positions = torch.arange(queries, device=device) + past_length
        if (
            config._attn_implementation == "sdpa"
            and padding_mask is None
            and document_ids is None
            and not torch.compiler.is_exporting()  # an exported program serves lengths on both sides of the window
            and queries == len(keys) <= (window or queries)
        ):
            masks[layer_type] = None
            continue
        seen = visible_keys(query_positions, keys, window, padding_mask, document_ids)
        if config._attn_implementation == "sdpa":
            masks[layer_type] = seen
        elif config._attn_implementation == "flex_attention":
            masks[layer_type] = _block_mask(seen.expand(len(hidden_states), -1, -1, -1))
        else:
            lowest = torch.finfo(hidden_states.dtype).min
            masks[layer_type] = torch.zeros_like(seen, dtype=hidden_states.dtype).masked_fill(~seen, lowest)
    return masks


def _block_mask(seen: torch.Tensor) -> BlockMask:
    def mask_mod(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return seen[batch, 0, query, key]

    batch, _, queries, keys = seen.shape
    return create_block_mask(mask_mod, batch, None, queries, keys, device=seen.device)


class DuetMoeAttention(nn.Module):
    """Attention of one layer; `attention_mask` is one of those that `attention_masks` builds."""

    def __init__(self, config: DuetMoeConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        self.is_causal = True
        query_width, key_width = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)
        # features that one RMS is taken over: of a head, or of all heads of the token
        self.norm_widths = (query_width, key_width) if config.qk_norm == "all_heads" else (self.head_dim,) * 2
        self.q_norm, self.k_norm = (
            nn.RMSNorm(width, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
            for width in self.norm_widths
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        queries = self.q_norm(self.q_proj(hidden_states).view(*input_shape, -1, self.norm_widths[0]))
        keys = self.k_norm(self.k_proj(hidden_states).view(*input_shape, -1, self.norm_widths[1]))
        queries, keys = queries.view(hidden_shape).transpose(1, 2), keys.view(hidden_shape).transpose(1, 2)
        values = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)

        queries, keys = apply_rotary_pos_emb(queries, keys, *position_embeddings)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_idx)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            queries,
            keys,
            values,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*input_shape, -1)), weights
