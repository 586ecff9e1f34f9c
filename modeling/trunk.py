"""The trunk: a pre-norm sparse-MoE decoder without a final norm, which belongs to the heads that read its states.

A long prompt passes in chunks over a bounded cache, so neither masks nor keys grow with it; positions that start again
without a cache mark packed documents, which do not see each other. The experts, under `@use_experts_implementation`,
are in moe.py.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs
from transformers.utils.quantization_config import QuantizationConfigMixin

from .attention import DuetMoeAttention, attention_masks, packed_document_ids
from .cache import DuetMoeCache
from .configuration_duet_moe import DuetMoeConfig
from .heads import ZeroLinear
from .moe import DuetMoeExperts, DuetMoeSparseBlock, DuetMoeTopKRouter
from .persistence import CheckedPreTrainedModel
from .quantization import finish_quantized, reaching_experts


class DuetMoeRotaryEmbedding(MixtralRotaryEmbedding):
    """Cosines and sines for `position_ids`, from the configuration's `rope_parameters` (default, YaRN, ...)."""


class DuetMoeDecoderLayer(GradientCheckpointingLayer):
    """Attention and experts, each behind a norm and a residual connection."""

    def __init__(self, config: DuetMoeConfig, layer_idx: int):
        super().__init__()
        self.self_attn = DuetMoeAttention(config, layer_idx)
        self.mlp = DuetMoeSparseBlock(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        num_experts_per_tok: int | torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings, attention_mask, cache, **kwargs
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), num_experts_per_tok)


class DuetMoePreTrainedModel(CheckedPreTrainedModel):
    """How weights start, and what the library may do with the model; loading and saving are in the parent."""

    config: DuetMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DuetMoeDecoderLayer", "DuetMoeHead", "DuetMoeTaskRouter"]
    _skip_keys_device_placement = ["cache"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(DuetMoeTopKRouter, index=0),
        "hidden_states": DuetMoeDecoderLayer,
        "attentions": DuetMoeAttention,
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the library looks for its decorator in this file; ours is in moe.py

    @classmethod
    def from_pretrained(
        cls, *args: Any, quantization_config: QuantizationConfigMixin | dict | None = None, **kwargs: Any
    ) -> "DuetMoePreTrainedModel":
        """Load as in transformers; a `quantization_config` reaches the experts and never the heads.

        Raises:
            ValueError: if experts would stay or have stayed unquantised; the message says what is possible.
        """
        loaded = super().from_pretrained(*args, quantization_config=reaching_experts(quantization_config), **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if hasattr(model, "hf_quantizer"):
            finish_quantized(model)
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DuetMoeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, DuetMoeTopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, ZeroLinear):
            init.zeros_(module.weight)


class DuetMoeModel(DuetMoePreTrainedModel):
    """The trunk: token ids to states, without a final norm, which belongs to the heads."""

    def __init__(self, config: DuetMoeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DuetMoeDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.rotary_emb = DuetMoeRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=True)
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_experts_per_tok: int | torch.Tensor | None = None,
        **kwargs: object,
    ) -> MoeModelOutputWithPast:
        """Run the trunk.

        Args:
            attention_mask (`torch.Tensor` of shape (batch, positions), *optional*): 0 where a position is padding; a
                ready mask of shape (batch, 1, queries, keys) is taken as it is.
            position_ids (`torch.LongTensor` of shape (batch, seq), *optional*): where they start again without a
                cache, a new document starts, which sees nothing of the one before it.
            num_experts_per_tok (`int` or `torch.Tensor` of shape (batch,), *optional*): active experts of this call.

        Returns:
            `last_hidden_state` (batch, seq, hidden), the cache, and what was asked to be recorded.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        num_experts_per_tok = self._checked_top_k(num_experts_per_tok, inputs_embeds.device)
        if use_cache and cache is None:
            cache = DuetMoeCache(self.config)
        length = inputs_embeds.shape[1]
        past_length = cache.get_seq_length() if cache is not None else 0
        document_ids = None
        if position_ids is None:
            position_ids = (torch.arange(length, device=inputs_embeds.device) + past_length).unsqueeze(0)
        elif cache is None and attention_mask is None and length > 1:
            document_ids = packed_document_ids(position_ids)
        if attention_mask is not None and not torch.compiler.is_compiling() and attention_mask.all():
            attention_mask = None if attention_mask.ndim == 2 else attention_mask

        pieces, filled = [(inputs_embeds, position_ids)], cache
        if self._passes_in_chunks(length, attention_mask, kwargs):
            chunks = (tensor.split(self.config.prompt_chunk_size, dim=1) for tensor in pieces[0])
            pieces = list(zip(*chunks, strict=True))
            filled = DuetMoeCache(self.config) if cache is None else cache
        states = [
            self._run_layers(embeds, positions, attention_mask, document_ids, filled, num_experts_per_tok, **kwargs)
            for embeds, positions in pieces
        ]
        return MoeModelOutputWithPast(
            last_hidden_state=states[0] if len(states) == 1 else torch.cat(states, dim=1),
            cache=cache,
        )

    def _checked_top_k(
        self, k: int | list[int] | torch.Tensor | None, device: torch.device
    ) -> int | torch.Tensor | None:
        if k is None or (isinstance(k, torch.Tensor) and torch.compiler.is_compiling()):
            return k
        values = k.tolist() if isinstance(k, torch.Tensor) else k
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, int) or not 1 <= value <= self.config.num_local_experts:
                raise ValueError(
                    f"num_experts_per_tok={value} is not possible: this model has {self.config.num_local_experts} "
                    "experts per layer, so choose a whole number from 1 to that."
                )
        return torch.tensor(values, device=device) if isinstance(values, list) else values

    def _passes_in_chunks(self, length: int, attention_mask: torch.Tensor | None, kwargs: dict) -> bool:
        if torch.compiler.is_exporting():  # one program for all lengths
            return False
        recorded = any(kwargs.get(f"output_{name}") for name in self._can_record_outputs)
        ready_mask = attention_mask is not None and attention_mask.ndim == 4
        return length > self.config.prompt_chunk_size and not (torch.is_grad_enabled() or recorded or ready_mask)

    def _run_layers(
        self,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        document_ids: torch.Tensor | None,
        cache: Cache | None,
        num_experts_per_tok: int | torch.Tensor | None,
        **kwargs: object,
    ) -> torch.Tensor:
        masks = attention_masks(self.config, hidden_states, cache, attention_mask, document_ids)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer, layer_type in zip(self.layers, self.config.layer_types, strict=True):
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=masks[layer_type],
                cache=cache,
                num_experts_per_tok=num_experts_per_tok,
                **kwargs,
            )
        return hidden_states
