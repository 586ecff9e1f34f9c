"""Duet-MoE: one trunk and two heads.

Decisions: the trunk knows nothing of heads; each head owns its norm and its output matrix; `head_mix` 0 and 1 are
branches, so the unused head is not computed and factual mode cannot be changed by the diversity head.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_duet_moe import DuetMoeConfig
from .gate import DuetMoeGate, add_by_share
from .generation_duet_moe import DuetMoeGenerationMixin
from .head_states import DuetMoeHeadStates
from .heads import DuetMoeHead, guide_by_plan, keep_plausible, mix_logits
from .plans import DuetMoePlanner
from .task_router import DuetMoeRoutingMixin, DuetMoeTaskRouter
from .trunk import DuetMoeModel, DuetMoePreTrainedModel
from .voices import DuetMoeVoicesMixin, Voices

CONVERTER = "duet_moe.modeling.convert"  # in the package only: a saved checkpoint loads without it


@dataclass
class DuetMoeCausalLMOutput(MoeCausalLMOutputWithPast):
    """What [`DuetMoeForCausalLM`] returns.

    Args:
        logits (`torch.Tensor` of shape (batch, seq, vocab)): the heads joined by `head_mix` or the gate, and the
            decode rules.
        coherence_logits, diversity_logits (`torch.Tensor` of shape (batch, seq, vocab), *optional*): each head alone,
            with `output_head_logits=True`.
        diversity_share (`torch.Tensor` of shape (batch, seq), *optional*): weight of the diversity head at every
            token, the gate's where it weighs and `head_mix` elsewhere; with `output_head_logits=True`.
    """

    coherence_logits: torch.Tensor | None = None
    diversity_logits: torch.Tensor | None = None
    diversity_share: torch.Tensor | None = None


class DuetMoeForCausalLM(DuetMoePreTrainedModel, DuetMoeGenerationMixin, DuetMoeVoicesMixin, DuetMoeRoutingMixin):
    """Trunk and two heads.

    Example:

    ```python
    >>> import torch
    >>> from duet_moe import DuetMoeConfig, DuetMoeForCausalLM
    >>> config = DuetMoeConfig(vocab_size=97, hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    >>> model = DuetMoeForCausalLM(config).eval()
    >>> model(torch.tensor([[5, 6, 7]]), head_mix=0.3, num_experts_per_tok=2).logits.shape
    torch.Size([1, 3, 97])

    ```
    """

    _tp_plan = {
        "coherence_head.unembed": "colwise_gather_output",
        "diversity_head.unembed": "colwise_gather_output",
    }
    _pp_plan = {
        "coherence_head": (["hidden_states"], ["logits"]),
        "diversity_head": (["hidden_states"], ["logits"]),
    }

    def __init__(self, config: DuetMoeConfig):
        super().__init__(config)
        self.model = DuetMoeModel(config)
        self.coherence_head = DuetMoeHead(config)
        self.diversity_head = DuetMoeHead(config, plan_size=config.plan_size)
        self.planner = DuetMoePlanner(config) if config.plan_bank_size else None
        self.token_gate = DuetMoeGate(config) if config.hybrid_gate else None
        self.task_router = DuetMoeTaskRouter(config) if config.task_router_size else None
        self.voices = Voices()
        self.generation_config.do_sample = False  # said aloud, or `pipeline` samples in every mode
        self.generation_config._from_model_config = False  # or a saved one is loaded without its modes
        self.post_init()

    @classmethod
    def from_causal_lm(cls, hf_model: PreTrainedModel, **options: int | None) -> "DuetMoeForCausalLM":
        """Turn a Mixtral, Qwen3-MoE, OLMoE, Llama or Mistral model into Duet-MoE that answers exactly as it does.

        Args:
            options: `experts_per_tok`, `window`, `experts`, `renormalize` and `seed`, as in
                `duet_moe.modeling.convert.convert_model`.

        Raises:
            ValueError: on a model that Duet-MoE cannot represent, naming the setting or tensor.
            ImportError: where only a saved checkpoint's own code is at hand, without the package duet-moe.
        """
        try:
            converter = importlib.import_module(CONVERTER)
        except ModuleNotFoundError as error:
            raise ImportError("from_causal_lm needs the whole package: pip install duet-moe") from error
        return converter.convert_model(hf_model, cls, **options)

    @property
    def base_model(self) -> DuetMoeHeadStates:
        """All but the output matrix that `get_output_embeddings` returns; the trunk alone is `model`."""
        return DuetMoeHeadStates(self)

    def _configured_head(self) -> DuetMoeHead:
        return self.diversity_head if self.config.head_mix == 1 else self.coherence_head

    def get_output_embeddings(self) -> nn.Linear:
        return self._configured_head().unembed

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self._configured_head().unembed = new_embeddings

    def _resize_token_embeddings(
        self, new_num_tokens: int, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        embeddings = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        other = self.coherence_head if self.config.head_mix == 1 else self.diversity_head
        trainable = other.unembed.weight.requires_grad
        other.unembed = self._get_resized_lm_head(
            other.unembed, embeddings.weight.shape[0], mean_resizing=mean_resizing
        ).requires_grad_(trainable)
        if self.token_gate is not None:
            self.token_gate.resize(embeddings.weight.shape[0])
        return embeddings

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        shift_labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        head_mix: float | torch.Tensor | None = None,
        gated: bool | torch.Tensor = False,
        num_experts_per_tok: int | torch.Tensor | None = None,
        plan: torch.Tensor | None = None,
        plan_guidance: float | torch.Tensor = 0.0,
        plausible_min: float | torch.Tensor = 0.0,
        output_head_logits: bool = False,
        trunk_states: torch.Tensor | None = None,
        voice: torch.LongTensor | None = None,
        **kwargs: object,
    ) -> DuetMoeCausalLMOutput:
        """Run trunk and heads.

        Args:
            labels (`torch.LongTensor` of shape (batch, seq), *optional*): targets, moved by one here; -100 is ignored.
            shift_labels (`torch.LongTensor` of shape (batch, seq), *optional*): targets that are already moved, as
                training with split sequences hands them over.
            head_mix (`float` or `torch.Tensor` of shape (batch,) or (batch, seq), *optional*, defaults to the
                configuration's): 0 is the coherence head, 1 the diversity head, between them the geometric mix.
            gated (`bool` or `torch.Tensor` of shape (batch,)): where true, the gate's weighted sum of the heads takes
                the place of `head_mix`.
            num_experts_per_tok (`int` or `torch.Tensor` of shape (batch,), *optional*): active experts of this call.
            plan (`torch.Tensor` of shape (batch, plan_size), *optional*): steers the diversity head; zeros are off.
            plan_guidance (`float` or `torch.Tensor` of shape (batch,)): weight of decode rule R2.
            plausible_min (`float` or `torch.Tensor` of shape (batch,)): share of decode rule R1, in [0, 1].
            output_head_logits (`bool`): also return each head's own logits.
            trunk_states (`torch.Tensor` of shape (batch, seq, hidden), *optional*): what `model.model` gave before, in
                place of `input_ids`: only the heads are run.
            voice (`torch.LongTensor` of shape (batch,), *optional*): the diversity head's voice for each row, an index
                into `voice_names`; -1 is the base.

        Raises:
            ValueError: on a mix outside [0, 1], `gated` where the model has no gate, a plan of another width, an
                impossible number of experts or an index that no voice has.
            TypeError: on an argument that this model does not have.
        """
        if unknown := kwargs.keys() - TransformersKwargs.__annotations__.keys():
            raise TypeError(f"{type(self).__name__}.forward does not know the arguments {sorted(unknown)}.")
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if trunk_states is None:
            outputs: MoeModelOutputWithPast = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                num_experts_per_tok=num_experts_per_tok,
                output_router_logits=output_router_logits,
                **kwargs,
            )
        elif input_ids is not None or inputs_embeds is not None or output_router_logits:
            raise ValueError("trunk_states stand in for the trunk: leave out input_ids, inputs_embeds, router logits.")
        else:
            outputs = MoeModelOutputWithPast(last_hidden_state=trunk_states)
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        head_mix = self._per_token(
            self.config.head_mix if head_mix is None else head_mix, hidden_states, logits_to_keep
        )
        logits, coherence_logits, diversity_logits, diversity_share = self._speak(
            hidden_states,
            head_mix,
            self._per_token(gated, hidden_states),
            plan,
            self._per_token(plan_guidance, hidden_states),
            self._per_token(plausible_min, hidden_states),
            output_head_logits,
            voice,
        )
        loss = aux_loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, shift_labels=shift_labels, **kwargs)
        if output_router_logits:
            k = num_experts_per_tok if isinstance(num_experts_per_tok, int) else self.config.num_experts_per_tok
            aux_loss = load_balancing_loss_func(
                outputs.router_logits, self.config.num_local_experts, k, attention_mask
            )
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return DuetMoeCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            coherence_logits=coherence_logits if output_head_logits else None,
            diversity_logits=diversity_logits if output_head_logits else None,
            diversity_share=diversity_share,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    @staticmethod
    def _per_token(
        value: float | list[float] | torch.Tensor, hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor = 0
    ) -> float | torch.Tensor:
        """Bring a setting in [0, 1] or a weight to a float, or a tensor (batch, 1 or seq, 1)."""
        if isinstance(value, list):
            value = torch.tensor(value)
        if not isinstance(value, torch.Tensor):
            return float(value)
        value = value.to(hidden_states.device, torch.float32)
        if value.ndim and len(value) not in (1, len(hidden_states)):
            raise ValueError(
                f"{len(value)} values were given for a batch of {len(hidden_states)} rows: give one for each."
            )
        if value.ndim == 2 and value.shape[1] > 1:
            return slice_logits_to_keep(value.unsqueeze(-1), logits_to_keep)
        return value.reshape(-1, 1, 1)

    def _check_joining(
        self,
        head_mix: float | torch.Tensor,
        gated: float | torch.Tensor,
        plan: torch.Tensor | None,
        plausible_min: float | torch.Tensor,
    ) -> None:
        for name, value in (("head_mix", head_mix), ("plausible_min", plausible_min)):
            if not _everywhere(value, lambda v: (v >= 0) & (v <= 1), when_compiling=True):
                raise ValueError(f"{name} must be between 0 and 1 everywhere, but it is {value}.")
        if not _everywhere(gated, lambda v: (v == 0) | (v == 1), when_compiling=True):
            raise ValueError(f"gated must be true or false for each row, but it is {gated}.")
        if self.token_gate is None and not _everywhere(gated, lambda v: v == 0):
            raise ValueError(
                "gated is true, but this model has no gate: use head_mix, or train a gate with "
                "`python -m duet_moe.finetune.gate`."
            )
        if plan is not None and (plan.ndim != 2 or plan.shape[1] != self.config.plan_size or not plan.shape[1]):
            raise ValueError(
                f"plan has shape {tuple(plan.shape)}; this model takes (batch, plan_size={self.config.plan_size})."
            )

    def _speak(
        self,
        hidden_states: torch.Tensor,
        head_mix: float | torch.Tensor,
        gated: float | torch.Tensor,
        plan: torch.Tensor | None,
        plan_guidance: float | torch.Tensor,
        plausible_min: float | torch.Tensor,
        both_heads: bool,
        voice: torch.LongTensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Compute the heads that are needed and join them.

        Returns:
            joined, coherence and diversity logits (batch, seq, vocab), and with `both_heads` the diversity head's
            share (batch, seq).
        """
        self._check_joining(head_mix, gated, plan, plausible_min)
        has_gate = not _everywhere(gated, lambda v: v == 0)
        has_rule = not _everywhere(plausible_min, lambda v: v == 0)
        coherence = diversity = None
        if both_heads or has_rule or has_gate or not _everywhere(head_mix, lambda v: v == 1):
            coherence = self.coherence_head(hidden_states)
        if both_heads or has_gate or not _everywhere(head_mix, lambda v: v == 0):
            plan = None if plan is None else plan[:, None]  # (batch, 1, plan_size)
            voices = None if voice is None else self.voices.pick(voice, hidden_states)
            diversity = self.diversity_head(hidden_states, plan, voices=voices)
        guided = diversity
        if plan is not None and diversity is not None and not _everywhere(plan_guidance, lambda v: v == 0):
            guided = guide_by_plan(diversity, self.diversity_head(hidden_states, voices=voices), plan_guidance)
        share = head_mix
        if coherence is None or guided is None:
            logits = guided if coherence is None else coherence
        else:
            logits = mix_logits(coherence, guided, head_mix)
            if has_gate:
                weighed = self.token_gate(hidden_states, coherence)
                is_gated = torch.as_tensor(gated, device=logits.device) > 0
                logits = torch.where(is_gated, add_by_share(coherence, guided, weighed), logits)
                share = torch.where(is_gated, weighed, head_mix)
        if has_rule:
            logits = keep_plausible(logits, coherence, plausible_min)
        if not both_heads:
            return logits, coherence, diversity, None
        share = torch.as_tensor(share, dtype=torch.float32, device=logits.device)
        return logits, coherence, diversity, share.expand(*hidden_states.shape[:2], 1)[..., 0]


def _everywhere(value: float | torch.Tensor, condition: Callable, when_compiling: bool = False) -> bool:
    """Say whether `condition` holds for a float, or everywhere in a tensor (a host sync, left out under compile)."""
    if not isinstance(value, torch.Tensor):
        return bool(condition(value))
    return when_compiling if torch.compiler.is_compiling() else bool(condition(value).all())


__all__ = ["DuetMoeForCausalLM", "DuetMoeModel", "DuetMoePreTrainedModel"]
