"""Plans: what steers the diversity head for one whole sample, where temperature rolls its die at every token.

A plan is what a text is about, coarsely: the mean of its tokens' output vectors, weighted by how rare they are, on a
few principal axes. While the head is trained it is shown the plan of the text it learns; when it writes, the plan is
drawn from a bank of training texts' plans, whatever the prompt (a broad draw is what moves meaning apart), or given by
the user.
"""

import torch
from torch import nn

from .configuration_duet_moe import DuetMoeConfig


class DuetMoePlanner(nn.Module):
    """Turns texts into plans and draws plans from a bank.

    Buffers, filled by training and saved with the model: `token_weights` (vocab,), how much a token says of a text;
    `projection` (plan_size, hidden) and `offset` (plan_size,), to axes of unit variance; `bank` (plan_bank_size,
    plan_size), plans to draw from.
    """

    token_weights: torch.Tensor
    projection: torch.Tensor
    offset: torch.Tensor
    bank: torch.Tensor

    def __init__(self, config: DuetMoeConfig):
        super().__init__()
        self.register_buffer("token_weights", torch.zeros(config.vocab_size))
        self.register_buffer("projection", torch.zeros(config.plan_size, config.hidden_size))
        self.register_buffer("offset", torch.zeros(config.plan_size))
        self.register_buffer("bank", torch.zeros(config.plan_bank_size, config.plan_size))

    def of_tokens(self, input_ids: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """Return the plan (plan_size,) of a text's tokens (seq,); zeros, no plan, where none of them says anything.

        Args:
            input_ids (`torch.LongTensor` of shape (seq,)): the text.
            vectors (`torch.Tensor` of shape (vocab, hidden)): the coherence head's output matrix.
        """
        weights = self.token_weights[input_ids].float()
        if not weights.sum() > 0:
            return torch.zeros_like(self.offset)
        mean = weights @ vectors[input_ids].float() / weights.sum()
        return (self.projection.float() @ mean - self.offset.float()).to(self.offset.dtype)

    def draw(self, seeds: list[int]) -> torch.Tensor:
        """Return one plan of the bank per seed, (rows, plan_size); the same seed gives the same plan."""
        picks = [int(torch.randint(len(self.bank), (), generator=_generator(seed))) for seed in seeds]
        return self.bank[picks]

    def spread(self, n: int, seed: int, pool: int = 256) -> torch.Tensor:
        """Return `n` plans (n, plan_size) far apart: from `pool` random ones, each next the farthest from those taken.

        Farthest-first traversal (Gonzalez 1985), by cosine distance.
        """
        order = torch.randperm(len(self.bank), generator=_generator(seed))[: max(n, pool)]
        candidates = nn.functional.normalize(self.bank[order].float(), dim=1)
        taken = [0]
        nearest = candidates @ candidates[0]  # similarity to the nearest plan taken
        while len(taken) < min(n, len(candidates)):
            taken.append(int(nearest.argmin()))
            nearest = torch.maximum(nearest, candidates @ candidates[taken[-1]])
        picks = [taken[index % len(taken)] for index in range(n)]  # a bank of fewer plans begins again
        return self.bank[order[picks]]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
