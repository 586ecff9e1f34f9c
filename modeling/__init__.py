"""The model: experts, attention, heads, cache, generation and the `Writer`."""
