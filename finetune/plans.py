"""Teach the diversity head to follow plans, and fill the bank that they are drawn from.

    python -m duet_moe.finetune.plans --checkpoint duet-mini --data DATA --out runs/planned

A plan says coarsely what a text is about (`DuetMoePlanner`). The head sees the plan of every passage that it learns,
with noise. Only the layer that takes plans learns: without a plan the head stays what it was, bit for bit. Passages
are of prose that the model has read once or twice; of texts that it knows by heart, plans tell it nothing.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from duet_moe.finetune.corpus import Document, Source, load_corpus, load_source, read_sources
from duet_moe.finetune.features import TrunkStates, trunk_states
from duet_moe.finetune.leaks import normalise
from duet_moe.finetune.objective import ChunkedCrossEntropy
from duet_moe.finetune.progress import Progress
from duet_moe.finetune.publish import publish, refuse_existing
from duet_moe.finetune.tokenizer import load_tokenizer
from duet_moe.modeling.checkpoints import locate
from duet_moe.modeling.heads import DuetMoeHead
from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM
from duet_moe.modeling.plans import DuetMoePlanner

SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["'”’]))(?=\s)""")
PASSAGE = 150  # words
WARMUP = 20  # steps


@dataclass(frozen=True)
class PlanSettings:
    """How plans are learnt.

    Args:
        passages (`int`): to learn from. bank (`int`): plans of theirs that are kept to draw from.
        steps (`int`): optimiser steps. positions (`int`): targets of a step, at least.
        lr (`float`): AdamW's peak rate, a cosine to zero.
        noise (`float`): standard deviation of what is added to plans, whose axes have 1.
        dropout (`float`): share of passages that are shown no plan.

    Raises:
        ValueError: on a setting that cannot be.
    """

    passages: int = 4500
    bank: int = 2048
    steps: int = 400
    positions: int = 2048
    lr: float = 3e-3
    noise: float = 0.3
    dropout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("passages", "bank", "steps", "positions"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name}={value!r} cannot be: give a whole number from 1 on.")
        if not (self.lr > 0 and self.noise >= 0 and 0 <= self.dropout < 1):
            raise ValueError(
                f"lr={self.lr}, noise={self.noise}, dropout={self.dropout} cannot be: lr must be above 0, noise 0 or "
                "more, dropout from 0 to below 1."
            )


def passages(documents: Sequence[Document], count: int, seed: int) -> list[Document]:
    """Return `count` passages of whole sentences, about 150 words each, drawn from plain texts (all of fewer)."""
    pool = [Document(None, piece) for document in documents if document.prompt is None for piece in _cut(document)]
    order = np.random.default_rng(seed).permutation(len(pool))[:count]
    return [pool[index] for index in order]


def _cut(document: Document) -> Iterator[str]:
    piece: list[str] = []
    for sentence in SENTENCE_END.split(document.response):
        piece.append(sentence)
        if sum(len(part.split()) for part in piece) >= PASSAGE:
            yield "".join(piece).strip()
            piece = []


@torch.no_grad()
def fit_planner(
    planner: DuetMoePlanner, states: TrunkStates, vectors: torch.Tensor, special: Sequence[int]
) -> torch.Tensor:
    """Fill the planner's weights and axes from passages; return the passages' plans (passages, plan_size).

    A token weighs log(passages / (1 + passages that have it)), 0 where no passage has it; the axes are the principal
    ones of the passages' means.

    Args:
        vectors (`torch.Tensor` of shape (vocab, hidden)): the coherence head's output matrix.
        special: ids of tokens that say nothing.

    Raises:
        ValueError: if the passages span too few axes.
    """
    size = len(planner.offset)
    seen = torch.zeros(len(vectors))
    for index in range(len(states)):
        seen[states[index]["shift_labels"].unique()] += 1
    weights = torch.where(seen > 0, (len(states) / (1 + seen)).log().clamp(min=0), 0.0)
    weights[list(special)] = 0.0
    planner.token_weights.copy_(weights)
    labels = [states[index]["shift_labels"] for index in range(len(states))]
    means = torch.stack([weights[ids] @ vectors[ids].float() / weights[ids].sum().clamp(min=1e-6) for ids in labels])
    centre = means.mean(0)
    _, values, axes = torch.linalg.svd(means - centre, full_matrices=False)
    if (spanned := int((values > 1e-5 * values[0]).sum())) < size:
        raise ValueError(f"{len(states)} passages span {spanned} axes, and plans have {size}: give more text.")
    projection = axes[:size] / (values[:size, None] / math.sqrt(len(states)))
    planner.projection.copy_(projection)
    planner.offset.copy_(projection @ centre)
    return torch.stack([planner.of_tokens(ids, vectors) for ids in labels])


def train_plans(
    head: DuetMoeHead, states: TrunkStates, plans: torch.Tensor, settings: PlanSettings, show: bool = True
) -> None:
    """Fit `head.plan_proj` to passages with their plans (passages, plan_size); nothing else of the head changes."""
    torch.manual_seed(settings.seed)
    generator = np.random.default_rng(settings.seed)
    # the plan shifts states that are far from 1 in size, and AdamW's steps are not
    size = float(
        torch.cat([states[index]["trunk_states"] for index in range(min(8, len(states)))]).pow(2).mean().sqrt()
    )
    unit = torch.tensor([1.0, size]).repeat_interleave(head.plan_proj.out_features // 2)[:, None]
    learnt = (head.plan_proj.weight.detach() / unit).requires_grad_()
    optimizer = torch.optim.AdamW([learnt], lr=settings.lr, weight_decay=0.0, betas=(0.9, 0.98))
    order: list[int] = []
    with Progress(settings.steps, show=show) as progress:
        for step in range(settings.steps):
            picks: list[int] = []
            while sum(len(states[index]["shift_labels"]) for index in picks) < settings.positions:
                order = order or generator.permutation(len(states)).tolist()
                picks.append(order.pop())
            shown = plans[picks] + settings.noise * torch.randn(len(picks), plans.shape[1])
            shown = shown * (torch.rand(len(picks), 1) >= settings.dropout)
            cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
            optimizer.param_groups[0]["lr"] = settings.lr * min(1.0, (step + 1) / WARMUP) * cosine
            loss = _loss(head, learnt * unit, states, picks, shown)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.update(step + 1, {"loss": loss.item()})
    with torch.no_grad():
        head.plan_proj.weight.copy_(learnt * unit)


def _loss(
    head: DuetMoeHead, weight: torch.Tensor, states: TrunkStates, picks: Sequence[int], plans: torch.Tensor
) -> torch.Tensor:
    """Return the mean nats per target of passages under their plans (len(picks), plan_size)."""
    items = [states[index] for index in picks]
    labels = torch.cat([item["shift_labels"] for item in items])
    lengths = torch.tensor([len(item["shift_labels"]) for item in items])
    each = plans.repeat_interleave(lengths, 0)
    inputs = torch.cat([item["trunk_states"] for item in items])
    features = torch.func.functional_call(head, {"plan_proj.weight": weight}, (inputs, each, True))
    return ChunkedCrossEntropy.apply(features, head.unembed.weight, labels, False) / len(labels)


@torch.no_grad()
def plan_losses(head: DuetMoeHead, states: TrunkStates, plans: torch.Tensor) -> dict[str, float]:
    """Return nats per target with a passage's own plan, with none, and with another passage's."""
    shown = {"own plan": plans, "no plan": torch.zeros_like(plans), "another's plan": plans.roll(len(plans) // 2, 0)}
    lengths = torch.tensor([len(states[index]["shift_labels"]) for index in range(len(states))])
    losses = {}
    for name, each in shown.items():
        nats = [
            _loss(head, head.plan_proj.weight, states, [index], each[index : index + 1])
            for index in range(len(states))
        ]
        losses[name] = float((torch.stack(nats) * lengths).sum() / lengths.sum())
    return losses


def plan_model(
    checkpoint: str | Path,
    data: str | Path,
    out: str | Path,
    recipe: str | Path = "mini",
    cache: str | Path = "runs/states",
    without: str | Path | None = None,
    settings: PlanSettings | None = None,
    show: bool = True,
) -> dict:
    """Write `checkpoint` with plans to the new folder `out`; return losses on held-out passages.

    Args:
        without: folder of texts to leave out, such as those of an evaluator that is to judge the model.

    Raises:
        FileExistsError: if `out` exists.
        OSError, ValueError: if the checkpoint or the texts cannot be used.
    """
    settings, out = settings or PlanSettings(), refuse_existing(out)
    tokenizer = load_tokenizer(locate(checkpoint))
    model = DuetMoeForCausalLM.from_pretrained(locate(checkpoint), dtype=torch.float32).eval().requires_grad_(False)
    if not model.config.plan_size:
        raise ValueError(f"{checkpoint} has plan_size=0: its diversity head takes no plans.")
    learnt, held = _passages(recipe, data, without, settings)
    states, heldout = (trunk_states(model, texts, tokenizer, cache, show) for texts in (learnt, held))
    model.config.plan_bank_size = min(settings.bank, len(states))
    model.planner = DuetMoePlanner(model.config)
    vectors = model.coherence_head.unembed.weight
    plans = fit_planner(model.planner, states, vectors, tokenizer.all_special_ids)
    picks = torch.randperm(len(plans), generator=torch.Generator().manual_seed(settings.seed))
    model.planner.bank.copy_(plans[picks[: model.config.plan_bank_size]])
    train_plans(model.diversity_head, states, plans, settings, show)
    own = torch.stack([model.planner.of_tokens(heldout[i]["shift_labels"], vectors) for i in range(len(heldout))])
    report = {
        "passages": len(states),
        "held out": len(heldout),
        "nats": plan_losses(model.diversity_head, heldout, own),
    }
    publish(model, tokenizer, locate(checkpoint), out)
    return report


def _passages(
    recipe: str | Path, data: str | Path, without: str | Path | None, settings: PlanSettings
) -> tuple[list[Document], list[Document]]:
    """Return passages to learn from, and passages of held-out texts."""
    prose = [source for source in read_sources(recipe) if source.kind == "text" and source.head != "coherence"]
    corpus = load_corpus(prose, data)
    left_out = set() if without is None else {normalise(text) for text in _texts(without)}
    found = []
    for side, count, least in ((0, settings.passages, 1), (1, max(2, settings.passages // 20), 2)):
        documents = [document for split in corpus.values() for document in split[side]]
        kept = [document for document in documents if normalise(document.response) not in left_out]
        found.append(passages(kept, count, settings.seed))
        if len(found[side]) < least:
            raise ValueError(
                f"{len(found[side])} passages of {PASSAGE} words {'to learn from' if side == 0 else 'are held out'}: "
                f"recipe {str(recipe)!r} needs {least} or more, in sources of kind text for the diversity head."
            )
    return found[0], found[1]


def _texts(folder: str | Path) -> list[str]:
    source = Source("left out", str(Path(folder).resolve()), 1.0, holdout=0.0)
    return [document.response for document in load_source(source, "")[0]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, write and report; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m duet_moe.finetune.plans", description="Teach a head to follow plans."
    )
    parser.add_argument("--checkpoint", default="duet-mini", help="bundled name or folder of a model")
    parser.add_argument("--data", required=True, help="folder that the recipe's paths start from")
    parser.add_argument("--out", required=True, help="new folder for the model with plans")
    parser.add_argument(
        "--recipe", default="mini", help="recipe whose plain texts are read: a bundled name or a YAML file"
    )
    parser.add_argument("--cache", default="runs/states", help="folder of the trunk's states")
    parser.add_argument("--without", help="folder of texts to leave out, such as an evaluator's")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    try:
        with redirect_stdout(sys.stderr):
            report = plan_model(
                options.checkpoint, options.data, options.out, options.recipe, options.cache, options.without
            )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(report))
        return 0
    print(f"Learnt from {report['passages']} passages; nats per token on {report['held out']} others:")
    for name, nats in report["nats"].items():
        print(f"  {name}: {nats:.4f}")
    print(f"The model is in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
