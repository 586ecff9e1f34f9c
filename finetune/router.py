"""Teach a model's task router: does a prompt ask for invention or for facts?

    python -m duet_moe.finetune.router --checkpoint duet-mini --data DATA --out runs/routed

The trunk stays as it is; its states of the prompts are computed once. The router learns from labelled prompts, its
probability is calibrated on others (Platt 1999), and there the thresholds are chosen too. What is reported comes from
prompts that neither saw, beside a bag of words that learnt from the same prompts.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from duet_moe.finetune.progress import Progress
from duet_moe.finetune.publish import publish, refuse_existing
from duet_moe.finetune.router_prompts import Prompt, read_prompt_recipe, read_prompts
from duet_moe.finetune.router_report import choose_thresholds, report, show
from duet_moe.finetune.tokenizer import load_tokenizer
from duet_moe.modeling.checkpoints import locate
from duet_moe.modeling.task_router import DuetMoeTaskRouter
from duet_moe.modeling.writer import Writer

WARMUP = 50  # steps


@dataclass(frozen=True)
class RouterSettings:
    """How the router learns.

    Args:
        width (`int`): of the router's inner layers.
        epochs (`int`): passes over the prompts that mislead, with as many others beside them, drawn anew each time.
        batch_size (`int`): prompts. lr, weight_decay (`float`): AdamW's; the rate falls to zero in a line.

    Raises:
        ValueError: on a setting that cannot be.
    """

    width: int = 192
    epochs: int = 6
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "epochs", "batch_size"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name}={value!r} cannot be: give a whole number from 1 on.")
        if not self.lr > 0 or not self.weight_decay >= 0:
            raise ValueError(f"lr={self.lr!r} must be above 0, weight_decay={self.weight_decay!r} not below it.")


class PromptStates:
    """The trunk's states of prompts, half precision, in memory: item i is (tokens, depths * hidden)."""

    def __init__(self, writer: Writer, texts: Sequence[str], show: bool = True) -> None:
        """Compute them, as of prompts that a chat begins with."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        self.items: list[torch.Tensor] = [torch.empty(0)] * len(texts)
        with Progress(len(texts), show=show) as progress:
            for start in range(0, len(texts), 64):
                picks = order[start : start + 64]
                batch, _ = writer.encode([texts[index] for index in picks], 1)
                for index, row, mask in zip(picks, *writer.model.prompt_states(**batch), strict=True):
                    self.items[index] = row[mask.bool()].half()
                progress.update(start + len(picks), {})

    def batch(self, picks: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return states (batch, seq, depths * hidden), padded on the right, and their mask (batch, seq)."""
        rows = [self.items[index] for index in picks]
        states = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).float()
        lengths = torch.tensor([len(row) for row in rows])
        return states, (torch.arange(states.shape[1]) < lengths[:, None]).long()


def train_router(
    router: DuetMoeTaskRouter,
    states: PromptStates,
    prompts: Sequence[Prompt],
    settings: RouterSettings,
    show: bool = True,
) -> None:
    """Fit `router` to the prompts of part `train`, then its calibration and thresholds to those of `calibration`.

    Raises:
        ValueError: if a part that is needed has not both kinds of prompts.
    """
    labels = torch.tensor([float(prompt.creative) for prompt in prompts])
    parts = np.array([prompt.part for prompt in prompts])
    for part in ("train", "calibration"):
        if not 0 < labels[parts == part].mean() < 1:
            raise ValueError(f"The {part} prompts are not of both kinds; give creative and factual ones.")
    misleads = np.array([prompt.misleads for prompt in prompts])
    hard, plain = (np.flatnonzero((parts == "train") & (misleads == kind)) for kind in (True, False))
    generator = np.random.default_rng(settings.seed)
    torch.manual_seed(settings.seed)  # of the dropout
    router.train()
    optimizer = torch.optim.AdamW(router.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    batches = [batch for _ in range(settings.epochs) for batch in _epoch(hard, plain, states, settings, generator)]
    with Progress(len(batches), show=show) as progress:
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * min((step + 1) / WARMUP, 1 - step / len(batches))
            loss = F.binary_cross_entropy_with_logits(router(*states.batch(batch)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.update(step + 1, {"loss": loss.item()})
    router.eval().bfloat16().float()  # rounded as it may be saved, before it is calibrated
    picks = np.flatnonzero(parts == "calibration")
    _calibrate(router, log_odds(router, states, picks), labels[picks].bool().numpy(), misleads[picks])


def _epoch(
    hard: np.ndarray, plain: np.ndarray, states: PromptStates, settings: RouterSettings, generator: np.random.Generator
) -> list[list[int]]:
    """Return batches of prompts of like length: all that mislead and as many others."""
    count = min(len(plain), len(hard)) if len(hard) else len(plain)
    picks = generator.permutation(np.concatenate([hard, generator.choice(plain, count, replace=False)]))
    size, pool = settings.batch_size, 32 * settings.batch_size
    batches = []
    for start in range(0, len(picks), pool):
        by_length = sorted(picks[start : start + pool].tolist(), key=lambda index: len(states.items[index]))
        batches += [by_length[first : first + size] for first in range(0, len(by_length), size)]
    return [batches[index] for index in generator.permutation(len(batches))]


@torch.no_grad()
def log_odds(router: DuetMoeTaskRouter, states: PromptStates, picks: Sequence[int] | np.ndarray) -> torch.Tensor:
    """Return the router's log-odds (len(picks),)."""
    order = sorted(range(len(picks)), key=lambda place: len(states.items[picks[place]]))
    odds = torch.empty(len(picks))
    for start in range(0, len(order), 256):
        places = order[start : start + 256]
        odds[places] = router(*states.batch([int(picks[place]) for place in places]))
    return odds


@torch.no_grad()
def _calibrate(router: DuetMoeTaskRouter, odds: torch.Tensor, creative: np.ndarray, misleads: np.ndarray) -> None:
    """Fit slope and offset of the log-odds, and take the thresholds that keep both kinds of error rare.

    All are numbers that bfloat16 has, so that a model saved in half precision decides as it did here.
    """
    from sklearn.linear_model import LogisticRegression

    # Platt's targets: not 1 and 0, which would drive the slope of a set that is told apart without error to infinity
    count, total = creative.sum(), len(creative)
    targets = np.where(creative, (count + 1) / (count + 2), 1 / (total - count + 2))
    fit = LogisticRegression(C=1e6).fit(
        odds[:, None].double().numpy().repeat(2, axis=0),
        np.tile([True, False], total),
        np.stack([targets, 1 - targets], axis=1).ravel(),
    )
    router.calibration.copy_(torch.tensor([fit.coef_[0, 0], fit.intercept_[0]]).bfloat16())
    slope, offset = router.calibration
    bounds = torch.tensor(choose_thresholds((slope * odds + offset).numpy(), creative, misleads))
    outward = bounds + bounds.abs() * torch.tensor([-1.0, 1.0]) / 256  # by more than rounding can move them
    router.thresholds.copy_(outward.bfloat16())


def route_model(
    checkpoint: str | Path, data: str | Path, out: str | Path, recipe: str | Path = "mini-router", show: bool = True
) -> dict:
    """Write `checkpoint` with a router to the new folder `out`; return the report.

    Raises:
        FileExistsError: if `out` exists.
        OSError, ValueError: if the checkpoint or the prompts cannot be used.
    """
    out = refuse_existing(out)
    content = read_prompt_recipe(recipe)
    settings = _settings(content["training"])
    prompts = read_prompts(content, data)
    writer = Writer.load(checkpoint, dtype=torch.float32, device="cpu")
    model = writer.model
    model.config.task_router_size = settings.width
    torch.manual_seed(settings.seed)
    model.task_router = DuetMoeTaskRouter(model.config)
    states = PromptStates(writer, [prompt.text for prompt in prompts], show)
    train_router(model.task_router, states, prompts, settings, show)
    odds = log_odds(model.task_router, states, range(len(prompts)))
    thresholds = model.task_router.thresholds.double().sigmoid().tolist()
    figures = report(prompts, odds.double().sigmoid().numpy(), (thresholds[0], thresholds[1]))
    publish(model, load_tokenizer(locate(checkpoint)), locate(checkpoint), out)
    return figures


def _settings(training: Mapping) -> RouterSettings:
    try:
        return RouterSettings(**training)
    except TypeError as error:
        known = list(RouterSettings.__dataclass_fields__)
        raise ValueError(f"The recipe's training is {training!r}: give numbers for some of {known}.") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, write and report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m duet_moe.finetune.router", description="Teach the task router.")
    parser.add_argument("--checkpoint", default="duet-mini", help="bundled name or folder of a model")
    parser.add_argument("--data", required=True, help="folder that the recipe's paths start from")
    parser.add_argument("--out", required=True, help="new folder for the model with its router")
    parser.add_argument("--recipe", default="mini-router", help="recipe of prompts: a bundled name or a YAML file")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    try:
        with redirect_stdout(sys.stderr):
            figures = route_model(options.checkpoint, options.data, options.out, options.recipe)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures) if options.json else show(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
