"""The two voices: two instances of one head, and the rules that join their distributions.

A head is `hidden + adapter(norm(hidden))`, a norm of its own and an output matrix `unembed`. The adapter's
down-projection starts at zero, so two heads with the same `unembed` start equal. Joining happens in log-probability
space, because heads have different scales once one of them has been tuned.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from .configuration_duet_moe import DuetMoeConfig
from .voices import VoiceRows


class ZeroLinear(nn.Linear):
    """A linear layer whose weights start at zero, so that what it feeds into starts unchanged."""


class DuetMoeHead(nn.Module):
    """Maps trunk states to logits, optionally steered by a `plan` that is drawn once per sample."""

    def __init__(self, config: DuetMoeConfig, plan_size: int = 0):
        super().__init__()
        self.input_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gate_proj = nn.Linear(config.hidden_size, config.head_intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.head_intermediate_size, bias=False)
        self.down_proj = ZeroLinear(config.head_intermediate_size, config.hidden_size, bias=False)
        self.plan_proj = ZeroLinear(plan_size, 2 * config.hidden_size, bias=False) if plan_size else None
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.unembed = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def features(
        self, hidden_states: torch.Tensor, plan: torch.Tensor | None = None, voices: VoiceRows | None = None
    ) -> torch.Tensor:
        """Return what `unembed` multiplies, in the shape of `hidden_states` (..., hidden).

        Args:
            plan (`torch.Tensor` of shape (..., plan_size), *optional*): scale and shift of the states (FiLM, Perez et
                al. 2018, arXiv 1709.07871); zeros leave them as they are, bit for bit.
            voices (`VoiceRows`, *optional*): adapters of the linear layers, one voice per row.
        """
        normed = self.input_norm(hidden_states)
        gate, up = self._adapted("gate_proj", normed, voices), self._adapted("up_proj", normed, voices)
        states = hidden_states + self._adapted("down_proj", self.act_fn(gate) * up, voices)
        if plan is not None:
            scale, shift = self.plan_proj(plan.to(states.dtype)).chunk(2, dim=-1)
            states = states * (1 + scale) + shift
        return self.norm(states)

    def forward(
        self,
        hidden_states: torch.Tensor,
        plan: torch.Tensor | None = None,
        only_features: bool = False,
        voices: VoiceRows | None = None,
    ) -> torch.Tensor:
        """Return logits (..., vocab), or with `only_features` what `unembed` would multiply (..., hidden)."""
        features = self.features(hidden_states, plan, voices)
        return features if only_features else self._adapted("unembed", features, voices)

    def _adapted(self, layer: str, inputs: torch.Tensor, voices: VoiceRows | None) -> torch.Tensor:
        outputs = getattr(self, layer)(inputs)
        return outputs if voices is None else voices.adapt(layer, inputs, outputs)


def mix_logits(
    coherence_logits: torch.Tensor, diversity_logits: torch.Tensor, head_mix: float | torch.Tensor
) -> torch.Tensor:
    """Blend two heads geometrically, `p_coh^(1-a) * p_div^a` up to a constant (decode rule R3).

    Args:
        coherence_logits, diversity_logits (`torch.Tensor` of shape (..., vocab)).
        head_mix (`float` or `torch.Tensor` of shape (..., 1)): a; 0 and 1 return that head's logits untouched.
    """
    if isinstance(head_mix, (int, float)):
        if head_mix in (0, 1):
            return diversity_logits if head_mix else coherence_logits
        head_mix = torch.tensor(float(head_mix), device=coherence_logits.device)
    blend = torch.lerp(coherence_logits.float().log_softmax(-1), diversity_logits.float().log_softmax(-1), head_mix)
    blend = torch.where(head_mix == 0, coherence_logits, blend.to(coherence_logits.dtype))
    return torch.where(head_mix == 1, diversity_logits, blend)


def guide_by_plan(
    planned_logits: torch.Tensor, plain_logits: torch.Tensor, weight: float | torch.Tensor
) -> torch.Tensor:
    """Push away from what the diversity head says without a plan (decode rule R2).

    `log p(y|plan) + w * [log p(y|plan) - log p(y|0)]`: classifier-free guidance (Ho & Salimans 2022,
    arXiv 2207.12598) on logits (..., vocab); `weight` is a float or a tensor of shape (..., 1), where 0 leaves the
    logits untouched.
    """
    planned = planned_logits.float().log_softmax(-1)
    guided = (planned + weight * (planned - plain_logits.float().log_softmax(-1))).to(planned_logits.dtype)
    return torch.where(weight == 0, planned_logits, guided) if isinstance(weight, torch.Tensor) else guided


def keep_plausible(
    logits: torch.Tensor, coherence_logits: torch.Tensor, plausible_min: float | torch.Tensor
) -> torch.Tensor:
    """Forbid every token y with `p_coh(y) < plausible_min * max p_coh` (decode rule R1).

    Both logits have shape (..., vocab); `plausible_min` is a float in [0, 1] or a tensor of shape (..., 1), where 0
    forbids nothing. The set is min-p's (Nguyen et al. 2024, arXiv 2407.01082), taken from the *other* head.
    """
    log_min = torch.as_tensor(plausible_min, dtype=torch.float32, device=logits.device).log()
    scores = coherence_logits.float()
    return logits.masked_fill(scores < scores.amax(-1, keepdim=True) + log_min, -math.inf)


def head_disagreement(coherence_logits: torch.Tensor, diversity_logits: torch.Tensor) -> torch.Tensor:
    """Return the Jensen-Shannon divergence of two heads in bits, 0 (equal) to 1 (disjoint); (..., vocab) -> (...)."""
    first, second = (logits.float().log_softmax(-1) for logits in (coherence_logits, diversity_logits))
    middle = torch.logaddexp(first, second) - math.log(2)
    divergence = [F.kl_div(middle, head, log_target=True, reduction="none").sum(-1) for head in (first, second)]
    return (0.5 * (divergence[0] + divergence[1]) / math.log(2)).clamp(0, 1)
