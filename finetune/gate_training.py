"""How the gate of hybrid mode learns, without labels, which head to trust at which token.

It learns from human texts of two kinds, creative and factual, how likely the weighed sum of the heads makes them:
where one head foresees the next token better, its share grows. A weak pull keeps the gate's mean on each kind near a
prior. Trunk and heads are frozen, so their part is computed once; the gate's linear layer then learns in seconds.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from duet_moe.finetune.corpus import Document
from duet_moe.finetune.features import TrunkStates, trunk_states
from duet_moe.finetune.settled import settled_tokens
from duet_moe.modeling.gate import DuetMoeGate
from duet_moe.modeling.heads import mix_logits
from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM

KINDS = ("creative", "factual")
CHUNK = 1024  # positions whose logits are in memory at a time
LEAST = 1e-30  # below this probability of a token its loss grows no further
AT_START = 0.5  # what the gate is everywhere before it learns
Split = tuple[list[Document], list[Document]]  # to learn from, to report on


@dataclass(frozen=True)
class GateSettings:
    """How the gate learns.

    Args:
        creative_prior, factual_prior (`float`): what the gate's mean on documents of each kind is pulled to.
        prior_weight (`float`): of the pull, in nats of loss per nat of divergence from the prior; 0 is off.
        steps, batch_size (`int`): of AdamW; positions of each kind in a step.
        lr (`float`): rate at the start, from which it falls to 0 in a line.

    Raises:
        ValueError: on a value out of range, naming it.
    """

    creative_prior: float = 0.8
    factual_prior: float = 0.2
    prior_weight: float = 0.1
    steps: int = 300
    batch_size: int = 4096
    lr: float = 0.001
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("creative_prior", "factual_prior"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and below 1.")
        for name in ("steps", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        if not self.prior_weight >= 0:
            raise ValueError(f"prior_weight={self.prior_weight} must not be negative.")

    def prior(self, kind: str) -> float:
        """Return the prior of a kind of document."""
        return self.creative_prior if kind == "creative" else self.factual_prior


@dataclass(frozen=True)
class Scored:
    """What the gate needs of every position of some documents, float32 on the CPU but for the states.

    Args:
        states (`torch.Tensor` of shape (positions, hidden)): the trunk's, in its dtype.
        coherence, diversity, geometric (`torch.Tensor` of shape (positions,)): probability that each head, and their
            even geometric mix, gave to the token that came next.
        unsettled (`torch.Tensor` of shape (positions,)): probability that the coherence head leaves to
            tokens that are not settled.
    """

    states: torch.Tensor
    coherence: torch.Tensor
    diversity: torch.Tensor
    geometric: torch.Tensor
    unsettled: torch.Tensor

    def loss(self, share: torch.Tensor | float, index: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Return the mean loss in nats of the heads weighed by `share`, of the positions `index`."""
        return _nats(share * self.diversity[index] + (1 - share) * self.coherence[index])


@dataclass(frozen=True)
class GateReport:
    """What the gate does on documents that it did not learn from.

    Args:
        losses (`dict`): kind of document, or their `mean` -> nats per token of `gate`, `gate_at_start` (one half, less
            what is settled), `coherence`, `diversity`, `geometric` (their even mix) and `constant_share`.
        constant_share (`float`): the one share that does best on the documents to learn from.
        mean_gate, mean_share (`dict`): kind -> mean of the gate, before and after what is settled is taken off it.
        documents, tokens (`dict`): kind -> how many were measured; tokens are those that have a loss.
    """

    losses: dict[str, dict[str, float]]
    constant_share: float
    mean_gate: dict[str, float]
    mean_share: dict[str, float]
    documents: dict[str, int]
    tokens: dict[str, int]
    settings: GateSettings
    seconds: float

    def __str__(self) -> str:
        rows = [["nats per token", *self.losses]]
        for name in self.losses["mean"]:
            rows.append([name.replace("_", " "), *(f"{row[name]:.4f}" for row in self.losses.values())])
        rows.append(["mean gate", *(f"{value:.3f}" for value in self.mean_gate.values())])
        rows.append(["mean share", *(f"{value:.3f}" for value in self.mean_share.values())])
        rows.append(["tokens", *(f"{count:,}" for count in self.tokens.values())])
        lines = [f"{name:16}" + "".join(f"{cell:>12}" for cell in cells) for name, *cells in rows]
        return "\n".join([*lines, f"constant share: {self.constant_share:.2f}; {self.seconds:.0f} s"])


def train_gate(
    model: DuetMoeForCausalLM,
    documents: Mapping[str, Split],
    tokenizer: PreTrainedTokenizerBase,
    cache: str | Path,
    settings: GateSettings | None = None,
    show: bool = True,
) -> GateReport:
    """Give the model a gate, in the place of one that it has, and train it; no other weight changes.

    The trunk's weights no longer require gradients afterwards.

    Args:
        documents: `creative` and `factual` -> documents to learn from, and others for the report alone. Neither should
            be what the heads were trained on, of which they know too much.
        cache: folder where the trunk's states are kept, as in `duet_moe.finetune.features`.

    Raises:
        ValueError: without documents of both kinds on both sides, or with a tokenizer of more tokens than the model.
    """
    started, settings = time.monotonic(), settings or GateSettings()
    for kind in KINDS:
        if not all(documents.get(kind, ((), ()))):
            raise ValueError(
                f"The gate needs {kind} documents, to learn from and to report on: give at least one of each."
            )
    gate = DuetMoeGate(model.config).to(model.device)
    gate.settled.copy_(settled_tokens(tokenizer, model.config.vocab_size))
    model.eval().model.requires_grad_(False)
    train, others = (
        {
            kind: _scored(model, gate, trunk_states(model, documents[kind][side], tokenizer, cache, show))
            for kind in KINDS
        }
        for side in (0, 1)
    )
    _learn(gate, train, settings)
    gates = {kind: _inclinations(gate, scored) for kind, scored in others.items()}
    shares = {kind: gates[kind] * scored.unsettled for kind, scored in others.items()}
    constant = _best_constant(train)
    losses = {
        kind: {
            "gate": float(scored.loss(shares[kind])),
            "gate_at_start": float(scored.loss(AT_START * scored.unsettled)),
            "coherence": float(scored.loss(0.0)),
            "diversity": float(scored.loss(1.0)),
            "geometric": float(_nats(scored.geometric)),
            "constant_share": float(scored.loss(constant)),
        }
        for kind, scored in others.items()
    }
    mean = {name: sum(row[name] for row in losses.values()) / len(losses) for name in losses["creative"]}
    model.config.hybrid_gate, model.token_gate = True, gate.to(model.dtype)
    return GateReport(
        losses | {"mean": mean},
        constant,
        {kind: float(values.mean()) for kind, values in gates.items()},
        {kind: float(values.mean()) for kind, values in shares.items()},
        {kind: len(documents[kind][1]) for kind in KINDS},
        {kind: len(values) for kind, values in shares.items()},
        settings,
        round(time.monotonic() - started, 1),
    )


@torch.no_grad()
def _scored(model: DuetMoeForCausalLM, gate: DuetMoeGate, found: TrunkStates) -> Scored:
    columns: list[list[torch.Tensor]] = [[] for _ in range(4)]
    for states, labels in zip(found.states.split(CHUNK), found.labels.split(CHUNK), strict=True):
        hidden, targets = states.to(model.device), labels.to(model.device)[:, None]
        coherence, diversity = model.coherence_head(hidden), model.diversity_head(hidden)
        for column, logits in zip(
            columns, (coherence, diversity, mix_logits(coherence, diversity, 0.5)), strict=False
        ):
            column.append(logits.float().softmax(-1).gather(1, targets)[:, 0].cpu())
        columns[3].append(gate.unsettled(coherence)[:, 0].cpu())
    return Scored(found.states, *map(torch.cat, columns))


def _learn(gate: DuetMoeGate, train: Mapping[str, Scored], settings: GateSettings) -> None:
    """Train the gate's linear layer, from zero."""
    for weight in gate.linear.parameters():
        nn.init.zeros_(weight)
    optimizer = torch.optim.AdamW(gate.linear.parameters(), settings.lr)
    generator = torch.Generator().manual_seed(settings.seed)
    for step in range(settings.steps):
        optimizer.param_groups[0]["lr"] = settings.lr * (1 - step / settings.steps)
        loss = torch.zeros(())
        for kind, scored in train.items():
            index = torch.randint(len(scored.states), (settings.batch_size,), generator=generator)
            inclination = _inclination(gate, scored.states[index])
            loss = loss + scored.loss(inclination * scored.unsettled[index], index)
            loss = loss + settings.prior_weight * bernoulli_divergence(inclination.mean(), settings.prior(kind))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def bernoulli_divergence(mean: torch.Tensor, prior: float) -> torch.Tensor:
    """Return KL(Bernoulli(mean) || Bernoulli(prior)) in nats; `mean` (...) in [0, 1], `prior` inside (0, 1)."""
    return torch.xlogy(mean, mean / prior) + torch.xlogy(1 - mean, (1 - mean) / (1 - prior))


def _nats(probabilities: torch.Tensor) -> torch.Tensor:
    return -probabilities.clamp(min=LEAST).log().mean()


def _inclination(gate: DuetMoeGate, states: torch.Tensor) -> torch.Tensor:
    return gate.inclination(states.to(gate.linear.weight))[:, 0].cpu()


@torch.no_grad()
def _inclinations(gate: DuetMoeGate, scored: Scored) -> torch.Tensor:
    return torch.cat([_inclination(gate, states) for states in scored.states.split(64 * CHUNK)])


def _best_constant(train: Mapping[str, Scored]) -> float:
    shares = [hundredth / 100 for hundredth in range(101)]
    return min(shares, key=lambda share: sum(float(scored.loss(share)) for scored in train.values()))
