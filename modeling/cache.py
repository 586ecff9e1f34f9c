"""Key-value cache whose sliding layers are rings: memory stays at the window, whatever the length.

Position p lives in slot p % capacity. A single new token is written in place and the whole ring is returned in slot
order, since attention does not care about the order of keys; `key_positions` tells the mask which position each
returned key has. Several new tokens (a prefill chunk, drafted tokens) get the past in order, then themselves.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from .configuration_duet_moe import DuetMoeConfig


class RingLayer(CacheLayerMixin):
    """Keys and values (batch, kv_heads, slots, head_dim) of the last `sliding_window` positions of one layer."""

    is_croppable = True
    is_sliding = True

    def __init__(self, sliding_window: int):
        super().__init__()
        self.sliding_window = sliding_window
        self.capacity = sliding_window  # slots of the full ring; fewer are allocated while the text is short
        self.cumulative_length = 0  # tokens seen
        self.record_past = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values (batch, kv_heads, new, head_dim) and return those that the new tokens may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        if self.record_past and self.capacity < self.sliding_window - 1 + new:
            self._set_capacity(self.sliding_window - 1 + new)
        past = None if new == 1 else self._last(self._past_length())
        self._write(key_states, value_states)
        if past is None:
            return self.keys[:, :, : self.cumulative_length], self.values[:, :, : self.cumulative_length]
        return torch.cat([past[0], key_states], dim=-2), torch.cat([past[1], value_states], dim=-2)

    def key_positions(self, query_length: int, device: torch.device) -> torch.Tensor:
        """Positions (keys,) of the keys that the next `update` with `query_length` tokens returns."""
        length = self.cumulative_length + query_length
        if query_length > 1:
            return torch.arange(self.cumulative_length - self._past_length(), length, device=device)
        slots = torch.arange(min(length, self.capacity), device=device)
        return length - 1 - (length - 1 - slots) % self.capacity

    def _past_length(self) -> int:
        return min(self.cumulative_length, self.sliding_window - 1)

    def _last(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(self.cumulative_length - count, self.cumulative_length, device=self.keys.device)
        slots = positions % self.capacity
        return self.keys.index_select(2, slots), self.values.index_select(2, slots)

    def _write(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        length = self.cumulative_length + key_states.shape[-2]
        kept = min(key_states.shape[-2], self.capacity)
        self._allocate(min(length, self.capacity))
        slots = torch.arange(length - kept, length, device=self.keys.device) % self.capacity
        self.keys.index_copy_(2, slots, key_states[:, :, -kept:])
        self.values.index_copy_(2, slots, value_states[:, :, -kept:])
        self.cumulative_length = length

    def _allocate(self, slots: int) -> None:
        allocated = self.keys.shape[2]
        if slots <= allocated:
            return
        # doubling keeps the number of copies logarithmic; the ring itself is never larger than its capacity
        slots = min(self.capacity, max(slots, 2 * allocated))
        shape = (*self.keys.shape[:2], slots - allocated)
        self.keys = torch.cat([self.keys, self.keys.new_zeros(*shape, self.keys.shape[3])], dim=2)
        self.values = torch.cat([self.values, self.values.new_zeros(*shape, self.values.shape[3])], dim=2)

    def _set_capacity(self, capacity: int) -> None:
        count = min(self.cumulative_length, self.capacity, capacity)
        keys, values = self._last(count)
        self.capacity = capacity
        self.keys, self.values = self.keys[:, :, :0], self.values[:, :, :0]
        self.cumulative_length -= count
        self._allocate(min(self.cumulative_length + count, capacity))
        self._write(keys, values)

    def activate_past_recording(self) -> None:
        """Keep room to take back drafted tokens, as prompt-lookup and assisted decoding do through `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (a number <= 0).

        Raises:
            ValueError: if the ring no longer holds the window before the tokens that are to go.
        """
        count = abs(tokens_to_remove)
        overwritten = max(0, self.cumulative_length - self.capacity)  # positions that are gone
        first_needed = max(0, self.cumulative_length - count - self.sliding_window + 1)
        if count and overwritten > first_needed:
            raise ValueError(
                f"Cannot take back {count} tokens: the ring of {self.capacity} slots has overwritten the window "
                "before them. Call `activate_past_recording()` on the cache before the tokens are added."
            )
        self.cumulative_length -= count

    def reset(self) -> None:
        """Forget everything, and the batch size with it."""
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._past_length() + query_length, self.cumulative_length - self._past_length()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.is_initialized:
            self.keys = self.keys.repeat_interleave(repeats, dim=0)
            self.values = self.values.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        if self.is_initialized:
            self.keys, self.values = self.keys[indices], self.values[indices]


class DuetMoeCache(Cache):
    """A ring for every sliding layer, a growing cache for every full layer."""

    def __init__(self, config: DuetMoeConfig):
        super().__init__(
            layers=[
                RingLayer(config.sliding_window) if layer_type == "sliding_attention" else DynamicLayer()
                for layer_type in config.layer_types
            ]
        )
