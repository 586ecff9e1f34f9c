"""The task router: does a prompt ask for invention or for facts?

A small head on the trunk's states of the prompt, of several depths at once: pooled by attention, by their greatest
values and by the last one. Its probability is calibrated on prompts that it was not trained on, and two thresholds,
chosen there too, make a mode of it; between them nobody is sure, and `hybrid` answers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_duet_moe import DuetMoeConfig
from .trunk import DuetMoeModel

DEPTHS = 5  # of the trunk that are read, the embeddings and the last layer among them
POOLS = 4
DROPOUT = 0.3
ROUTED = ("factual", "hybrid", "creative")  # modes that are chosen from
LONGEST = 1024  # tokens; of a longer prompt its end is read


@dataclass(frozen=True)
class Route:
    """What the router makes of a prompt.

    Args:
        mode (`str`): `creative`, `factual`, or `hybrid` where the router is not sure.
        probability (`float`): that the task is creative.
    """

    mode: str
    probability: float


def read_depths(layers: int) -> list[int]:
    """Return which of the trunk's `layers` + 1 states are read, evenly spread, first and last among them."""
    steps = min(DEPTHS, layers + 1) - 1
    return [round(layers * step / steps) for step in range(steps + 1)]


class DuetMoeTaskRouter(nn.Module):
    """Maps the trunk's states of prompts to the log-odds that they ask for invention.

    Buffers, filled by training and saved with the model: `calibration` (2,), slope and offset of the log-odds (Platt
    1999); `thresholds` (2,), the log-odds below which a prompt is factual and those from which on it is creative
    (probabilities near 1 would all be 1 in half precision).
    """

    calibration: torch.Tensor
    thresholds: torch.Tensor

    def __init__(self, config: DuetMoeConfig):
        super().__init__()
        width = config.task_router_size
        self.depths = read_depths(config.num_hidden_layers)
        states = len(self.depths) * config.hidden_size
        self.norm = nn.LayerNorm(states)
        self.inputs = nn.Linear(states, width)
        self.attention = nn.Linear(width, POOLS)
        self.hidden = nn.Linear((POOLS + 2) * width, width)
        self.output = nn.Linear(width, 1)
        self.register_buffer("calibration", torch.tensor([1.0, 0.0]))
        self.register_buffer("thresholds", torch.tensor([0.0, 0.0]))

    def forward(self, states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the log-odds (batch,), float32.

        Args:
            states (`torch.Tensor` of shape (batch, seq, depths * hidden)): those of `depths`, side by side.
            attention_mask (`torch.Tensor` of shape (batch, seq)): 0 for padding, on whichever side.
        """
        kept = attention_mask.bool().unsqueeze(-1)
        inner = self._drop(F.gelu(self.inputs(self.norm(states.to(self.norm.weight.dtype)))))
        weights = self.attention(inner).masked_fill(~kept, float("-inf")).softmax(1)
        pooled = (weights.transpose(1, 2) @ inner).flatten(1)
        greatest = inner.masked_fill(~kept, float("-inf")).amax(1)
        places = torch.arange(inner.shape[1], device=inner.device)
        last = inner[torch.arange(len(inner), device=inner.device), (places * attention_mask.bool()).argmax(1)]
        joined = self._drop(torch.cat([pooled, greatest, last], dim=1))
        odds = self.output(self._drop(F.gelu(self.hidden(joined))))[:, 0].float()
        slope, offset = self.calibration.float()
        return slope * odds + offset

    def route(self, log_odds: torch.Tensor) -> list[Route]:
        """Turn log-odds (batch,) into modes."""
        factual_below, creative_from = self.thresholds.tolist()
        routes = []
        for odds, probability in zip(log_odds.tolist(), log_odds.sigmoid().tolist(), strict=True):
            sure = "factual" if odds < factual_below else "creative" if odds >= creative_from else None
            routes.append(Route(sure or "hybrid", probability))
        return routes

    def _drop(self, states: torch.Tensor) -> torch.Tensor:
        return F.dropout(states, DROPOUT, self.training)


class DuetMoeRoutingMixin:
    """Lets a model say what kind of task a prompt is."""

    model: DuetMoeModel
    task_router: DuetMoeTaskRouter

    @torch.no_grad()
    def prompt_states(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the router reads of prompts, as arguments of its `forward`; arguments and errors as in `route`.

        Returns:
            states (batch, seq, depths * hidden) and their mask (batch, seq), with padding on the left.
        """
        if self.task_router is None:
            raise ValueError(
                "This model has no task router: choose a mode yourself, or train one with "
                "`python -m duet_moe.finetune.router`."
            )
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask.ne(0).long()
        if not kept.any(dim=1).all():
            raise ValueError("A prompt has no tokens: there is nothing to choose a mode by.")
        order = kept.argsort(dim=1, stable=True)[:, -LONGEST:]  # padding first, so that the end of every row is kept
        kept = kept.gather(1, order)
        states = self.model(input_ids.gather(1, order), kept, use_cache=False, output_hidden_states=True).hidden_states
        # layers may be on several devices
        read = [states[depth].to(states[-1].device) for depth in self.task_router.depths]
        return torch.cat(read, dim=-1), kept

    @torch.no_grad()
    def route(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None) -> list[Route]:
        """Say of every prompt whether it asks for invention or for facts.

        Args:
            input_ids (`torch.LongTensor` of shape (batch, seq)): as the chat template writes prompts; of more than
                1,024 tokens the last ones are read.
            attention_mask (`torch.Tensor` of shape (batch, seq), *optional*): 0 for padding, on whichever side.

        Raises:
            ValueError: if the model has no task router, or a row no tokens.
        """
        states, kept = self.prompt_states(input_ids, attention_mask)
        return self.task_router.route(self.task_router(states, kept))
