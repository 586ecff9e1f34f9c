"""Counts that `duet info` prints, against counts by hand."""

from duet_moe.modeling.info import cache_bytes, parameter_counts


def test_active_parameters_leave_out_idle_experts_the_other_head_and_the_table(tiny_writer) -> None:
    model, config = tiny_writer.model, tiny_writer.model.config
    expert = 3 * config.hidden_size * config.intermediate_size
    idle = config.num_hidden_layers * (config.num_local_experts - 1) * expert
    head = sum(p.numel() for p in model.diversity_head.parameters())
    table = (config.vocab_size - 1) * config.hidden_size
    total = sum(p.numel() for p in model.parameters())
    assert parameter_counts(model, num_experts_per_tok=1)["active"] == total - idle - head - table


def test_cache_bytes_equal_what_a_cache_holds(tiny_writer) -> None:
    import torch

    model = tiny_writer.model
    for length in (3, model.config.sliding_window, model.config.sliding_window + 9):
        ids = torch.randint(6, model.config.vocab_size, (1, length))
        with torch.no_grad():
            cache = model(ids, use_cache=True).cache
        held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        assert held == cache_bytes(model, length)
