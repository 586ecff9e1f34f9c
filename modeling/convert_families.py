"""The model families that become Duet-MoE: their settings in ours, their tensors' names in ours.

Everything that Duet-MoE cannot represent exactly is refused by the name of the setting; nothing is approximated.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig

from duet_moe.configuration.configuration_duet_moe import DuetMoeConfig
from duet_moe.modeling.weights import Index, Piece, Weight


@dataclass(frozen=True)
class Family:
    """What sets one model type apart from Mixtral.

    Args:
        is_sparse (`bool`): has experts; a dense model's MLP is copied into each new expert.
        expert_width (`str`): setting with the width of one expert.
        qk_norm (`bool` or `str`): as in [`DuetMoeConfig`].
        norm_topk_prob (`bool`, *optional*): as in [`DuetMoeConfig`]; the model's own setting when `None`.
        slides (`bool`): the setting `sliding_window` counts.
    """

    is_sparse: bool = True
    expert_width: str = "intermediate_size"
    qk_norm: bool | str = False
    norm_topk_prob: bool | None = True
    slides: bool = True


FAMILIES = {
    "mixtral": Family(),
    "qwen3_moe": Family(expert_width="moe_intermediate_size", qk_norm=True, norm_topk_prob=None),
    "olmoe": Family(qk_norm="all_heads", norm_topk_prob=None, slides=False),
    "llama": Family(is_sparse=False, slides=False),
    "mistral": Family(is_sparse=False),
}

# The only value of a setting that Duet-MoE has; a setting that is absent, None or empty counts as off.
REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "clip_qkv": None,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "quantization_config": None,
}
ROPE_TYPES = ("default", "linear", "yarn", "llama3")  # the others change with the length of the text
SAME = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
    "attention_dropout",
)  # fmt: skip
RENAMED = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}
UPCYCLED_EXPERTS, UPCYCLED_PER_TOKEN = 8, 2


def family_of(model_type: str) -> Family:
    """Return the family of a model type.

    Raises:
        ValueError: if it is none of ours, naming those.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type!r} cannot be converted: it must be one of {sorted(FAMILIES)}.")
    return FAMILIES[model_type]


def duet_config(
    source: PreTrainedConfig,
    experts_per_tok: int | None = None,
    window: int | None = None,
    experts: int | None = None,
    renormalize: bool = False,
) -> DuetMoeConfig:
    """Return the configuration that computes what `source` computes.

    Args:
        experts_per_tok: instead of the source's number.
        window: tokens that every layer sees, instead of what the source's layers see.
        experts: number of experts that a dense source gets.
        renormalize: scale the weights of the chosen experts to a sum of 1 also where the source does not.

    Raises:
        ValueError: on a setting that Duet-MoE does not have, naming it.
    """
    family = family_of(source.model_type)
    _refuse(source)
    if family.is_sparse and experts is not None:
        raise ValueError(f"experts={experts} is for dense models: {source.model_type} has its own experts.")
    if window is not None and window < 1:
        raise ValueError(f"window={window} is not possible: it must be 1 or more tokens.")
    own_experts, own_per_tok = experts or UPCYCLED_EXPERTS, min(UPCYCLED_PER_TOKEN, experts or UPCYCLED_EXPERTS)
    if family.is_sparse:
        own_experts, own_per_tok = source.num_local_experts, source.num_experts_per_tok
    own_window = source.sliding_window if family.slides else None
    layer_type = "sliding_attention" if window or own_window else "full_attention"
    norm_topk_prob = source.norm_topk_prob if family.norm_topk_prob is None else family.norm_topk_prob
    optional = {name: getattr(source, name) for name in ("router_aux_loss_coef",) if hasattr(source, name)}
    return DuetMoeConfig(
        **{name: getattr(source, name) for name in SAME},
        **optional,
        intermediate_size=getattr(source, family.expert_width),
        head_dim=getattr(source, "head_dim", None),
        rope_parameters=dict(source.rope_parameters),
        layer_types=[layer_type] * source.num_hidden_layers,
        sliding_window=window or own_window or source.max_position_embeddings,
        qk_norm=family.qk_norm,
        num_local_experts=own_experts,
        num_experts_per_tok=own_per_tok if experts_per_tok is None else experts_per_tok,
        norm_topk_prob=norm_topk_prob or renormalize,
    )


def _refuse(source: PreTrainedConfig) -> None:
    for name, required in REQUIRED.items():
        value = getattr(source, name, None)
        if value and value != required:
            raise ValueError(f"{name}={value!r} cannot be converted: Duet-MoE only has {name}={required!r}.")
    layer_types = getattr(source, "layer_types", None) or []
    if len(set(layer_types)) > 1:
        raise ValueError(f"layer_types={layer_types!r} cannot be converted: all layers must be of one type.")
    rope = source.rope_parameters
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(
            f"rope_parameters.rope_type={rope['rope_type']!r} cannot be converted: it must be one of {ROPE_TYPES}."
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"rope_parameters.partial_rotary_factor={rope['partial_rotary_factor']} cannot be converted: only 1.0 can."
        )


def recipes(
    targets: Mapping[str, tuple[int, ...]],
    config: DuetMoeConfig,
    source: PreTrainedConfig,
    source_shapes: Mapping[str, tuple[int, ...]],
) -> list[Weight]:
    """Say how every tensor of the new model is made, and check it against the source.

    Args:
        targets (`Mapping`): name and shape of every tensor of a `DuetMoeForCausalLM` of `config`.
        source_shapes (`Mapping`): name and shape of every tensor of the source, as saved or as in memory.

    Raises:
        ValueError: on a tensor that is missing, of the wrong size, or that has no place in Duet-MoE.
    """
    is_sparse = family_of(source.model_type).is_sparse
    in_source = {_common_name(name): name for name in source_shapes}  # Mixtral's saved names are its own
    weights = []
    for name, shape in targets.items():
        if name.startswith(("coherence_head.", "diversity_head.")):
            weight = _head_weight(name, shape, config.initializer_range, source.tie_word_embeddings)
        elif name.endswith(".mlp.gate.weight") and not is_sparse:
            weight = Weight(name, shape, std=config.initializer_range)
        elif ".mlp.experts." in name and name not in in_source:
            weight = Weight(name, shape, tuple(_expert_pieces(name, shape, is_sparse, in_source)))
        else:
            weight = Weight(name, shape, (Piece(in_source.get(name, name)),))
        weight.check(source_shapes)
        weights.append(weight)
    _refuse_unused(set(source_shapes) - set().union(*(weight.sources() for weight in weights)), source)
    return weights


def _common_name(name: str) -> str:
    for own, common in RENAMED.items():
        name = name.replace(own, common)
    return name


def _head_weight(name: str, shape: tuple[int, ...], std: float, tied: bool) -> Weight:
    """Both heads start as the source's final norm and output matrix; their adapters and the plan add nothing."""
    part = name.split(".")[1]
    if part == "norm":
        return Weight(name, shape, (Piece("model.norm.weight"),))
    if part == "unembed":
        return Weight(name, shape, (Piece("model.embed_tokens.weight" if tied else "lm_head.weight"),))
    if part in ("gate_proj", "up_proj"):
        return Weight(name, shape, std=std)
    return Weight(name, shape, fill=1.0 if part == "input_norm" else 0.0)


def _expert_pieces(name: str, shape: tuple[int, ...], is_sparse: bool, in_source: Mapping[str, str]) -> list[Piece]:
    mlp, part = name.split("experts.")
    rows: dict[str, Index] = {"down_proj": ()}
    if part == "gate_up_proj":
        half = shape[1] // 2
        rows = {"gate_proj": (slice(0, half),), "up_proj": (slice(half, 2 * half),)}
    pieces = []
    for expert in range(shape[0]):
        for projection, place in rows.items():
            plain = f"{mlp}experts.{expert}.{projection}.weight" if is_sparse else f"{mlp}{projection}.weight"
            pieces.append(Piece(in_source.get(plain, plain), into=(expert, *place)))
    return pieces


def _refuse_unused(names: Collection[str], source: PreTrainedConfig) -> None:
    # a tied output matrix is the embedding; old checkpoints hold rotary frequencies, which the configuration gives
    tied = {"lm_head.weight"} if source.tie_word_embeddings else set()
    unused = sorted(name for name in set(names) - tied if not name.endswith("rotary_emb.inv_freq"))
    if unused:
        raise ValueError(
            f"The source has {len(unused)} tensors that have no place in Duet-MoE, such as {unused[0]!r}: "
            "a bias, shared experts or another architecture under a known model_type."
        )
