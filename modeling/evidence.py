"""What a writer returns: text, and for every token what both heads thought of it."""

from dataclasses import dataclass

import torch

from duet_moe.modeling.heads import head_disagreement
from duet_moe.modeling.task_router import Route

TIE = 0.05  # nats: heads closer than this on a token decided it together


@dataclass(frozen=True)
class TokenEvidence:
    """One token of the answer.

    Args:
        text (`str`): the characters that it added; may be empty inside a multi-byte character.
        coherence_logprob, diversity_logprob (`float`): nats, of each head alone.
        disagreement (`float`): Jensen-Shannon divergence of the heads at this position, in bits, 0 to 1.
        decided_by (`str`): `coherence` or `diversity`, whichever gave the token more probability, or `both`.
        diversity_share (`float`, *optional*): weight of the diversity head at this token, 0 to 1: the gate's, less
            what it leaves to the coherence head, or the `head_mix` of the mode.
    """

    text: str
    coherence_logprob: float
    diversity_logprob: float
    disagreement: float
    decided_by: str
    diversity_share: float | None = None


@dataclass(frozen=True)
class Text:
    """An answer.

    Args:
        tokens (`tuple[int, ...]`): ids, the end token included.
        evidence (`tuple[TokenEvidence, ...]`): one per token; empty with `evidence=False`.
        time_to_first_token (`float`): seconds. tokens_per_second (`float`): of the decoding after the first token.
        finish_reason (`str`): `end`, `length`, `stopped`, or `running` while it is being written.
        voice (`str`, *optional*): that the diversity head had; `None` is the base.
        route (`Route`, *optional*): what the task router made of the prompt, where it chose the mode.
        notes (`tuple[str, ...]`): what the caller should know, such as a prompt that was cut.
    """

    text: str
    mode: str
    prompt: str
    seed: int
    tokens: tuple[int, ...] = ()
    evidence: tuple[TokenEvidence, ...] = ()
    time_to_first_token: float = 0.0
    tokens_per_second: float = 0.0
    finish_reason: str = "running"
    notes: tuple[str, ...] = ()
    voice: str | None = None
    route: Route | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Piece:
    """What one step added to an answer."""

    text: str
    evidence: tuple[TokenEvidence, ...] = ()


def token_evidence(
    token: int,
    text: str,
    coherence_logits: torch.Tensor,
    diversity_logits: torch.Tensor,
    diversity_share: float | None = None,
) -> TokenEvidence:
    """Say what both heads, logits of shape (vocab,), thought of `token`, and how much the diversity head counted."""
    coherence = float(coherence_logits.float().log_softmax(-1)[token])
    diversity = float(diversity_logits.float().log_softmax(-1)[token])
    decided_by = "both" if abs(coherence - diversity) < TIE else "coherence" if coherence > diversity else "diversity"
    disagreement = float(head_disagreement(coherence_logits, diversity_logits))
    return TokenEvidence(text, coherence, diversity, disagreement, decided_by, diversity_share)
