"""Training settings: the `training:` part of a recipe, checked when it is read."""

import math
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from duet_moe.finetune.corpus import RECIPES


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    Args:
        steps (`int`): optimiser steps; the cosine ends here.
        batch_size (`int`): packed rows of `seq_len` tokens per step, over all processes.
        coherence_rows (`int`, *optional*): how many of them teach the coherence head; by weight when not given.
        one_head (`bool`): teach a single head that shares its matrix with the embedding; both voices start as its
            copies when the run ends.
        response_only (`bool`): learn from responses only (supervised fine-tuning).
        matrix_lr, lr (`float`): peak rates of Muon and of AdamW.
        final_lr_ratio (`float`): share of the peak that the cosine ends at.
        experts_per_tok (`dict[int, float]`): chance of each number of active experts, drawn once a step.
        eval_every, checkpoint_every (`float`): minutes.
        eval_documents (`int`): held-out documents per source.
        precision (`str`): `bf16` (autocast over float32 weights), `no`, or `auto`: bf16 where hardware has it.
    """

    steps: int
    batch_size: int = 16
    seq_len: int = 512
    coherence_rows: int | None = None
    one_head: bool = False
    response_only: bool = False
    matrix_lr: float = 6e-3
    lr: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    final_lr_ratio: float = 0.1
    max_grad_norm: float = 1.0
    router_aux_loss_coef: float = 0.01
    experts_per_tok: dict[int, float] | None = None
    eval_every: float = 10.0
    eval_documents: int = 48
    checkpoint_every: float = 5.0
    precision: str = "auto"
    compile: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "matrix_lr", "lr", "max_grad_norm", "checkpoint_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"training.{name} is {getattr(self, name)}; it must be above 0.")
        if self.precision not in ("auto", "bf16", "no"):
            raise ValueError(f"training.precision is {self.precision!r}; choose 'auto', 'bf16' or 'no'.")
        if not 0 <= self.final_lr_ratio <= 1:
            raise ValueError(f"training.final_lr_ratio is {self.final_lr_ratio}; it must be between 0 and 1.")

    def lr_scale(self, step: int) -> float:
        """Return the share of the peak rate at `step`: linear warm-up, then a cosine to `final_lr_ratio`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return self.final_lr_ratio + (1 - self.final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def read_recipe(name_or_path: str | Path) -> dict:
    """Return a recipe as plain data; a bare name is one of the package's own.

    `sources` may be the name of another recipe, whose sources are then taken.

    Raises:
        FileNotFoundError: listing the recipes that there are.
        ValueError: on a part or a setting that does not exist, or without `training` and `sources`.
    """
    path = Path(name_or_path)
    if not path.suffix:
        path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        own = sorted(file.stem for file in RECIPES.glob("*.yaml") if "sources:" in file.read_text())
        raise FileNotFoundError(f"No recipe {str(name_or_path)!r}: give a YAML file or one of {own}.")
    recipe = yaml.safe_load(path.read_text())
    parts = ("model", "tokenizer", "training", "sources")
    if not isinstance(recipe, dict) or not {"training", "sources"} <= recipe.keys() <= set(parts):
        raise ValueError(f"{path.name} must have the parts training and sources, and may have only {parts}.")
    if isinstance(recipe["sources"], str):
        recipe["sources"] = read_recipe(recipe["sources"])["sources"]
    allowed = {field.name for field in fields(TrainingSettings)}
    if unknown := recipe["training"].keys() - allowed:
        raise ValueError(f"{path.name}: training has no settings {sorted(unknown)}; it has {sorted(allowed)}.")
    return recipe
