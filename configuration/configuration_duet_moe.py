"""The shape of a Duet-MoE model: a flat, typed record that is checked when it is made.

Defaults describe a model of about 30M parameters that trains on a laptop. Names follow Mixtral where Mixtral has
the thing; ours are `layer_types`, `num_shared_experts`, `qk_norm` and the two heads' settings.
This file travels inside saved checkpoints, so it imports only transformers and its flat siblings.
"""

from typing import ClassVar

from transformers import PreTrainedConfig

from .modes import BUILT_IN_MODES

FORMAT_VERSION = 1  # of what save_pretrained writes; grows when an older version would misread a checkpoint


class DuetMoeConfig(PreTrainedConfig):
    r"""Configuration of [`DuetMoeModel`] and [`DuetMoeForCausalLM`].

    Args:
        intermediate_size (`int`): width of one expert's SwiGLU.
        num_local_experts (`int`): experts per layer.
        num_experts_per_tok (`int`): experts that answer for a token; a call may override it.
        num_shared_experts (`int`): experts that answer for every token (0 for Mixtral shapes).
        layer_types (`list[str]`, *optional*): `"sliding_attention"` or `"full_attention"` per layer; all sliding
            when not given.
        sliding_window (`int`): tokens a query of a sliding layer can see, itself included.
        prompt_chunk_size (`int`): tokens of a long prompt that pass the trunk at a time.
        qk_norm (`bool` or `str`): RMS-normalise queries and keys: `True` each attention head alone (Qwen3),
            `"all_heads"` all heads of a token at once (OLMoE).
        norm_topk_prob (`bool`): scale the weights of the chosen experts so that they sum to 1.
        head_intermediate_size (`int`, *optional*): width of each head's SwiGLU adapter; `hidden_size` when not given.
        plan_size (`int`): width of the plan vector that steers the diversity head; 0 builds none.
        plan_bank_size (`int`): plans to draw from that are saved with the model; 0 for a head that has not learnt any.
        task_router_size (`int`): width of the router that reads a prompt's task for `auto`; 0 builds none.
        hybrid_gate (`bool`): whether the model has a gate, which weighs the heads token by token in hybrid mode.
        head_mix (`float`): mix when a call names none; 0 is the coherence head, 1 the diversity head.
        default_mode (`str`): mode that [`Writer`] uses when a call names none.
        format_version (`int`): of the checkpoint; one that is newer than this package is refused.

    Raises:
        ValueError: on a shape that cannot exist; the message has the bad value and what is allowed.

    Example:

    ```python
    >>> from duet_moe import DuetMoeConfig, DuetMoeForCausalLM
    >>> config = DuetMoeConfig(vocab_size=97, hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    >>> model = DuetMoeForCausalLM(config)
    >>> model.config.layer_types
    ['sliding_attention', 'sliding_attention']

    ```
    """

    model_type = "duet_moe"
    keys_to_ignore_at_inference = ["cache"]
    default_theta = 10_000.0
    attribute_map: ClassVar[dict[str, str]] = {"num_experts": "num_local_experts"}
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    base_model_ep_plan: ClassVar[dict[str, str]] = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan: ClassVar[dict[str, tuple]] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
    }

    vocab_size: int = 8192
    hidden_size: int = 384
    intermediate_size: int = 192
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int | None = 2
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 131_072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 1
    tie_word_embeddings: bool = False
    attention_dropout: float = 0.0
    rope_parameters: dict | None = None

    layer_types: list[str] | None = None
    sliding_window: int = 32_768
    prompt_chunk_size: int = 1024
    qk_norm: bool | str = False

    num_local_experts: int = 16
    num_experts_per_tok: int = 4
    num_shared_experts: int = 0
    norm_topk_prob: bool = True
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.01

    head_intermediate_size: int | None = None
    plan_size: int = 32
    plan_bank_size: int = 0
    hybrid_gate: bool = False
    task_router_size: int = 0
    head_mix: float = 0.0
    default_mode: str = "creative"
    format_version: int = FORMAT_VERSION

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs: object) -> "DuetMoeConfig":
        """Read what `to_dict` wrote, as in transformers.

        Raises:
            ValueError: if it is the configuration of another family, or none.
        """
        if (found := config_dict.get("model_type")) != cls.model_type:
            raise ValueError(
                f"This is not a Duet-MoE checkpoint: its config.json has model_type={found!r}, not {cls.model_type!r}."
            )
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs: object) -> None:
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"format_version={self.format_version!r}: this checkpoint was saved by a newer version of duet-moe; "
                f"this one reads up to {FORMAT_VERSION}. Upgrade it: pip install --upgrade duet-moe."
            )
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = ["sliding_attention"] * self.num_hidden_layers
        if self.head_intermediate_size is None:
            self.head_intermediate_size = self.hidden_size
        self._check_sizes()
        self._check_choices()
        if self.qk_norm == "all_heads":  # a norm over all heads needs them all on every rank
            gathered = {f"layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "qkv"}
            o_proj = {"layers.*.self_attn.o_proj": "rowwise_split_input"}
            plan = self.base_model_tp_plan | gathered | o_proj
            self.base_model_tp_plan = plan  # type: ignore[misc]
        super().__post_init__(**kwargs)

    def _check_sizes(self) -> None:
        positive = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "sliding_window", "prompt_chunk_size", "num_local_experts",
            "num_experts_per_tok", "head_intermediate_size", "max_position_embeddings",
        )  # fmt: skip
        for name in positive:
            _require(isinstance(value := getattr(self, name), int) and value >= 1, name, value, "a whole number >= 1")
        for name in ("num_shared_experts", "plan_size", "plan_bank_size", "task_router_size"):
            _require(isinstance(value := getattr(self, name), int) and value >= 0, name, value, "a whole number >= 0")
        _require(
            self.plan_size > 0 or not self.plan_bank_size,
            "plan_bank_size",
            self.plan_bank_size,
            "0 where plan_size is 0",
        )
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even (rotary embeddings turn pairs)")
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            self.num_key_value_heads,
            f"a divisor of num_attention_heads={self.num_attention_heads}",
        )
        _require(
            self.num_experts_per_tok <= self.num_local_experts,
            "num_experts_per_tok",
            self.num_experts_per_tok,
            f"at most num_local_experts={self.num_local_experts}",
        )

    def _check_choices(self) -> None:
        allowed_types = ("sliding_attention", "full_attention")
        for layer_type in self.layer_types:
            _require(layer_type in allowed_types, "layer_types", layer_type, f"one of {allowed_types}")
        _require(
            len(self.layer_types) == self.num_hidden_layers,
            "layer_types",
            self.layer_types,
            f"a list of num_hidden_layers={self.num_hidden_layers} entries",
        )
        allowed_norms = (False, True, "all_heads")
        _require(self.qk_norm in allowed_norms, "qk_norm", self.qk_norm, f"one of {allowed_norms}")
        _require(isinstance(self.hybrid_gate, bool), "hybrid_gate", self.hybrid_gate, "True or False")
        _require(0.0 <= self.head_mix <= 1.0, "head_mix", self.head_mix, "between 0 (coherence) and 1 (diversity)")
        allowed_modes = (*BUILT_IN_MODES, "auto")
        _require(self.default_mode in allowed_modes, "default_mode", self.default_mode, f"one of {allowed_modes}")
        _require(not self.tie_word_embeddings, "tie_word_embeddings", True, "False: each head owns its output matrix")


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r} is not possible: it must be {allowed}.")


__all__ = ["DuetMoeConfig"]
