"""The gate: how much of the next token each head decides, token by token.

A share g of the diversity head is read off the trunk's state. What the coherence head would settle itself (digits, the
rest of a word that has begun, names) is taken off it: by as much as that head leans to such tokens. This is smooth and
keeps no state, so decoding with a cache equals the full pass.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_duet_moe import DuetMoeConfig
from .heads import ZeroLinear


class DuetMoeGate(nn.Module):
    """A linear layer on the trunk's normed state; it starts at one half everywhere.

    Buffer, filled by training and saved with the model: `settled` (vocab,), 1 for tokens that are the coherence head's
    to choose and 0 for others.
    """

    settled: torch.Tensor

    def __init__(self, config: DuetMoeConfig):
        super().__init__()
        self.linear = ZeroLinear(config.hidden_size, 1)
        self.eps = config.rms_norm_eps
        self.register_buffer("settled", torch.zeros(config.vocab_size))

    def inclination(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return g, the share before settled tokens are taken off it: (..., hidden) -> (..., 1), float32."""
        # the trunk has no final norm, and the size of its states varies far more than a linear layer should see
        return self.linear(F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=self.eps)).float().sigmoid()

    def unsettled(self, coherence_logits: torch.Tensor) -> torch.Tensor:
        """Return the probability that the coherence head leaves to tokens that are not settled, (..., 1), float32."""
        settled = coherence_logits.float().softmax(-1) @ self.settled.float()
        return (1 - settled).clamp(0, 1).unsqueeze(-1)

    def forward(self, hidden_states: torch.Tensor, coherence_logits: torch.Tensor) -> torch.Tensor:
        """Return the share of the diversity head in the next token.

        Args:
            hidden_states (`torch.Tensor` of shape (..., hidden)): the trunk's.
            coherence_logits (`torch.Tensor` of shape (..., vocab)).

        Returns:
            `torch.Tensor` of shape (..., 1), float32, in [0, 1].
        """
        return self.inclination(hidden_states) * self.unsettled(coherence_logits)

    def resize(self, vocab_size: int) -> None:
        """Follow a vocabulary of another size; no new token is settled."""
        self.settled = F.pad(self.settled, (0, vocab_size - len(self.settled)))


def add_by_share(coherence_logits: torch.Tensor, diversity_logits: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Return `log[g * p_div + (1 - g) * p_coh]`, computed in float32.

    Args:
        coherence_logits, diversity_logits (`torch.Tensor` of shape (..., vocab)).
        share (`torch.Tensor` of shape (..., 1)): g, in [0, 1].
    """
    coherence, diversity = coherence_logits.float().log_softmax(-1), diversity_logits.float().log_softmax(-1)
    # a share of exactly 0 or 1 keeps a finite gradient; what this adds is less than float32 can tell
    least = torch.finfo(torch.float32).tiny
    parts = coherence + (1 - share).clamp(min=least).log(), diversity + share.clamp(min=least).log()
    return torch.logaddexp(*parts).to(coherence_logits.dtype)
