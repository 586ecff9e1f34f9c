"""One mix of the heads as a plain Mixtral checkpoint, which every engine serves.

Exact, or refused. A head whose adapter adds nothing is a norm and a matrix, like Mixtral's output layer; the geometric
mix of two such heads is again one, because the softmax of a weighted sum of logits is that mix.
"""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM

from duet_moe.configuration.configuration_duet_moe import DuetMoeConfig
from duet_moe.configuration.modes import BUILT_IN_MODES, Mode
from duet_moe.modeling.checkpoints import bundled
from duet_moe.modeling.convert import (
    copy_companions,
    model_folder,
    saved_config,
    saved_generation_config,
    tokenizer_notes,
)
from duet_moe.modeling.shards import ShardSource, ShardWriter
from duet_moe.modeling.weights import Piece, Weight

SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "rope_parameters", "pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout", "num_local_experts",
    "router_aux_loss_coef",
)  # fmt: skip
UNEMBED, NORM = "lm_head.weight", "model.norm.weight"


def export_mixtral(
    source: str | Path,
    out: str | Path,
    mode: str | float = "factual",
    dtype: torch.dtype | None = None,
    show: bool = True,
) -> dict[str, object]:
    """Write what `source` answers in one mode as a `MixtralForCausalLM` checkpoint.

    Memory is that of the largest layer; an interrupted call goes on where it stopped, as in `convert`.

    Args:
        source: name of a bundled model, folder, or a name on the Hub.
        out: folder to make.
        mode: name of a mode of the model, whose mix, experts and sampling are exported, or a mix between 0
            (coherence head) and 1 (diversity head).
        dtype: of the new weights; that of the source's when not given.
        show: show progress on standard error.

    Returns:
        What `duet export --json` prints: folder, head_mix, sizes, seconds and notes to the user.

    Raises:
        FileNotFoundError: if the source or a part of it does not exist.
        ValueError: on a model that Mixtral cannot represent, naming the part and the nearest that it can.
        OSError: if `out` exists, or the disk is too small.
    """
    started = time.monotonic()
    is_bundled = not Path(source).is_dir() and "/" not in str(source)
    folder = model_folder(bundled(str(source)) if is_bundled else source)
    config = saved_config(folder)
    if not isinstance(config, DuetMoeConfig):
        raise ValueError(f"{folder} has model_type={config.model_type!r}: only Duet-MoE models can be exported.")
    settings = saved_generation_config(folder, config)
    chosen = _mode(mode, settings)
    shards = ShardSource(folder)
    _refuse_gate(config, chosen)
    _refuse_trunk(config)
    _refuse_heads(shards, chosen.head_mix)
    dtype = dtype or shards.dtype
    mixtral = _mixtral_config(config, chosen, dtype)
    weights = _recipes(config, mixtral, shards, chosen.head_mix)
    settings = _single_head_settings(settings, chosen.sampling_kwargs() if chosen.name == mode else {})
    notes = tokenizer_notes(folder)
    if chosen.plausible_min:
        notes.append(
            f"plausible_min={chosen.plausible_min} of mode {chosen.name!r} compares both heads and is not exported."
        )

    def finish(partial: Path) -> None:
        copy_companions(folder, partial)
        settings.save_pretrained(partial)
        mixtral.save_pretrained(partial)

    identity = {"source": shards.fingerprint(), "config": mixtral.to_dict(), "head_mix": chosen.head_mix}
    writer = ShardWriter(Path(out), weights, dtype, identity)
    writer.write(shards, 0, finish, show)
    return {
        "folder": str(out),
        "head_mix": chosen.head_mix,
        "parameters": writer.bytes // dtype.itemsize,
        "bytes": writer.bytes,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": round(time.monotonic() - started, 2),
        "notes": notes,
    }


def _mode(mode: str | float, settings: GenerationConfig) -> Mode:
    saved = {name: Mode(**fields) for name, fields in (getattr(settings, "modes", None) or {}).items()}
    modes = BUILT_IN_MODES | saved
    if mode in modes:
        return modes[mode]
    try:
        return Mode(f"mix {mode}", head_mix=float(mode))
    except ValueError as error:
        raise ValueError(f"mode={mode!r} must be one of {sorted(modes)} or a number from 0 to 1.") from error


def _refuse_gate(config: DuetMoeConfig, mode: Mode) -> None:
    """Refuse a mix that changes from token to token."""
    if config.hybrid_gate and mode.gated:
        raise ValueError(
            f"Mode {mode.name!r} lets the gate weigh the heads at every token, and Mixtral has one head. Nearest: "
            f"export the geometric mix, mode={mode.head_mix}, or serve this model with `transformers`."
        )


def _refuse_trunk(config: DuetMoeConfig) -> None:
    """Refuse what Mixtral's trunk does not have."""
    for name, allowed in (("num_shared_experts", 0), ("qk_norm", False), ("norm_topk_prob", True)):
        if (value := getattr(config, name)) != allowed:
            raise ValueError(
                f"{name}={value!r} cannot be exported to Mixtral, which only has {name}={allowed!r}. There is nothing "
                "near: serve this model with `transformers`, or train one without it."
            )
    if len(set(config.layer_types)) > 1 and config.sliding_window < config.max_position_embeddings:
        raise ValueError(
            f"layer_types={config.layer_types} cannot be exported to Mixtral, whose layers all have one window. "
            "Nearest: set all of them to one type in config.json, which changes answers beyond the window."
        )


def _refuse_heads(shards: ShardSource, head_mix: float) -> None:
    """Refuse heads that are more than a norm and a matrix."""
    for head, share in (("coherence_head", 1 - head_mix), ("diversity_head", head_mix)):
        if share == 0:
            continue
        if shards.read(f"{head}.down_proj.weight").any():
            raise ValueError(
                f"The {head}'s adapter is trained ({head}.down_proj is not zero), so the head is not linear and "
                "Mixtral cannot hold it. Nearest: train with the adapters frozen at zero (only `unembed` and `norm`), "
                "or serve this model with `transformers`."
            )
        if f"{head}.plan_proj.weight" in shards.shapes and shards.read(f"{head}.plan_proj.weight").any():
            raise ValueError(
                f"The {head} is trained to follow a plan ({head}.plan_proj is not zero), which Mixtral does not have. "
                "Nearest: export the factual mode, or set that tensor to zero for what it answers without a plan."
            )


def _mixtral_config(config: DuetMoeConfig, mode: Mode, dtype: torch.dtype) -> MixtralConfig:
    slides = set(config.layer_types) == {"sliding_attention"}
    return MixtralConfig(
        **{name: getattr(config, name) for name in SAME},
        num_experts_per_tok=mode.num_experts_per_tok or config.num_experts_per_tok,
        sliding_window=config.sliding_window if slides else None,
        architectures=["MixtralForCausalLM"],
        dtype=dtype,
    )


def _recipes(config: DuetMoeConfig, mixtral: MixtralConfig, shards: ShardSource, head_mix: float) -> list[Weight]:
    """Say how every tensor is made, under the names that published Mixtral checkpoints have."""
    with torch.device("meta"):
        state = MixtralForCausalLM(mixtral).state_dict()
    head = _head_pieces(shards, head_mix)
    weights = []
    for name, tensor in state.items():
        if ".mlp.experts." in name:
            weights += _expert_weights(name, tuple(tensor.shape))
        else:
            pieces = head[name] if name in head else (Piece(name),)
            weights.append(Weight(name.replace(".mlp.", ".block_sparse_moe."), tuple(tensor.shape), pieces, fill=1.0))
    for weight in weights:
        weight.check(shards.shapes)
    return weights


def _expert_weights(name: str, shape: tuple[int, ...]) -> list[Weight]:
    count, rows, columns = shape
    prefix = name.split(".mlp.")[0] + ".block_sparse_moe.experts"
    if name.endswith("down_proj"):
        return [Weight(f"{prefix}.{e}.w2.weight", (rows, columns), (Piece(name, part=(e,)),)) for e in range(count)]
    half = rows // 2
    parts = {"w1": slice(0, half), "w3": slice(half, rows)}
    return [
        Weight(f"{prefix}.{e}.{own}.weight", (half, columns), (Piece(name, part=(e, part)),))
        for e in range(count)
        for own, part in parts.items()
    ]


def _head_pieces(shards: ShardSource, head_mix: float) -> Mapping[str, tuple[Piece, ...]]:
    """Return how the output matrix and the norm are made; where two norms differ, each goes into its own matrix."""
    shares = {"coherence_head": 1 - head_mix, "diversity_head": head_mix}
    used = [head for head, share in shares.items() if share]
    if len(used) == 1:
        return {UNEMBED: (Piece(f"{used[0]}.unembed.weight"),), NORM: (Piece(f"{used[0]}.norm.weight"),)}
    norms = {head: f"{head}.norm.weight" for head in used}
    equal = torch.equal(*(shards.read(name) for name in norms.values()))
    matrices = tuple(
        Piece(f"{head}.unembed.weight", share=shares[head], scale=None if equal else norms[head]) for head in used
    )
    return {UNEMBED: matrices, NORM: (Piece(norms["coherence_head"]),) if equal else ()}


def _single_head_settings(settings: GenerationConfig, sampling: dict) -> GenerationConfig:
    """Return the generation settings without the table of modes; those of a named mode take the sampling's place."""
    fields = {name: value for name, value in settings.to_dict().items() if name != "modes"}
    if sampling:
        fields |= dict.fromkeys(("temperature", "top_k", "top_p", "min_p")) | sampling
    return GenerationConfig.from_dict(fields)
