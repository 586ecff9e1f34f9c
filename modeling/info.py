"""What a model weighs: parameters, memory of the cache, bytes on disk."""

from pathlib import Path

from duet_moe.modeling.footprint import bytes_by_group, skeleton
from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM


def parameter_counts(model: DuetMoeForCausalLM, num_experts_per_tok: int | None = None) -> dict[str, int]:
    """Count parameters, as many in a quantised model as in the one it was made of.

    Returns:
        `total`; `active`: those that a token of a one-head mode uses, with `num_experts_per_tok` experts (the
        configuration's when not given), the embedding table not counted but for one row; `active_both_heads`; and
        `embedding`, `experts`, `coherence_head`, `diversity_head`.
    """
    config = model.config
    k = num_experts_per_tok or config.num_experts_per_tok
    whole = skeleton(model)  # packed weights have fewer elements than parameters
    parts = {
        "total": sum(p.numel() for p in whole.parameters()),
        "embedding": whole.model.embed_tokens.weight.numel(),
        "experts": sum(p.numel() for name, p in whole.named_parameters() if ".mlp.experts." in name),
        "coherence_head": sum(p.numel() for p in whole.coherence_head.parameters()),
        "diversity_head": sum(p.numel() for p in whole.diversity_head.parameters()),
    }
    idle_experts = parts["experts"] * (config.num_local_experts - k) // config.num_local_experts
    gate = config.hidden_size + 1 if config.hybrid_gate else 0
    router = sum(p.numel() for name, p in whole.named_parameters() if name.startswith("task_router."))  # of prompts
    both = parts["total"] - idle_experts - parts["embedding"] + config.hidden_size - router
    return parts | {"active": both - parts["diversity_head"] - gate, "active_both_heads": both}


def cache_bytes(model: DuetMoeForCausalLM, tokens: int) -> int:
    """Return the bytes of keys and values that a sequence of `tokens` holds in the model's dtype."""
    config = model.config
    slots = sum(
        min(tokens, config.sliding_window) if layer_type == "sliding_attention" else tokens
        for layer_type in config.layer_types
    )
    return 2 * slots * config.num_key_value_heads * config.head_dim * model.dtype.itemsize


def describe(model: DuetMoeForCausalLM, folder: str | Path | None = None) -> dict[str, object]:
    """Return what `duet info` prints, as plain data; `folder` adds the bytes on disk."""
    config = model.config
    counts = parameter_counts(model)
    sizes = bytes_by_group(model)
    context = config.max_position_embeddings
    facts: dict[str, object] = {
        "parameters": counts,
        "bytes": sizes,
        "share_of_bf16": round(sizes["total"] / sizes["bf16_total"], 3),
        "experts": f"{config.num_experts_per_tok} of {config.num_local_experts} per token and layer",
        "layers": config.num_hidden_layers,
        "sliding_window": config.sliding_window,
        "context": context,
        "vocabulary": config.vocab_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "cache_bytes_per_token": cache_bytes(model, 1),
        "cache_bytes_full_context": cache_bytes(model, context),
        "modes": sorted(getattr(model.generation_config, "modes", None) or {}),
    }
    if folder is not None:
        facts["bytes_on_disk"] = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return facts
