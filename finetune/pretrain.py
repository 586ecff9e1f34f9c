"""Train trunk and heads: `duet pretrain --recipe mini-base --data DATA --out OUT`.

One process or several under `torchrun`, CPU or GPU, through accelerate. A run writes checkpoints under temporary names
and renames them when complete, so `kill -9` at any time loses minutes, and the same command goes on exactly where the
last checkpoint was. A step whose loss or gradient is not finite is skipped and counted.
"""

import csv
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from transformers import PreTrainedTokenizerBase

from duet_moe.configuration.configuration_duet_moe import DuetMoeConfig
from duet_moe.configuration.modes import BUILT_IN_MODES, modes_as_dict
from duet_moe.finetune import grouped_experts  # noqa: F401  registers "grouped_cpu"
from duet_moe.finetune.corpus import read_sources
from duet_moe.finetune.heldout import heldout_losses
from duet_moe.finetune.muon import build_optimizers, has_fast_bf16
from duet_moe.finetune.objective import TwoVoicesLoss
from duet_moe.finetune.packing import Packer, encode_corpus
from duet_moe.finetune.progress import Progress
from duet_moe.finetune.settings import TrainingSettings, read_recipe
from duet_moe.finetune.tokenizer import load_tokenizer
from duet_moe.modeling import checkpoints
from duet_moe.modeling.checkpoints import bundled
from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM


class Trainer:
    """One training run in the folder `out`."""

    def __init__(
        self,
        recipe: dict,
        data: str | Path,
        out: str | Path,
        start_from: str | None = None,
        max_steps: int | None = None,
        cache: str | Path | None = None,
    ) -> None:
        settings = TrainingSettings(**recipe["training"])
        self.settings = replace(settings, steps=max_steps) if max_steps else settings
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.recipe = recipe
        self.accelerator = _accelerator(self.settings.precision)
        torch.manual_seed(self.settings.seed)
        torch.set_flush_denormal(True)
        source = _checkpoint_folder(start_from) if start_from else None
        self.tokenizer = load_tokenizer(source or _tokenizer_folder(recipe.get("tokenizer", "duet-mini")))
        self.model = self._build_model(source)
        train, self.heldout = self._read_corpus(data, cache or self.out / "tokens")
        self.packer = self._build_packer(train)
        optimizers = build_optimizers(
            self.model, self.settings.matrix_lr, self.settings.lr, self.settings.weight_decay
        )
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        objective = TwoVoicesLoss(self.model, self.settings.router_aux_loss_coef, self.settings.compile)
        self.objective, *self.optimizers = self.accelerator.prepare(objective, *optimizers)
        self.step = self.skipped = self.tokens = 0
        self.seconds = 0.0

    def _build_model(self, source: Path | None) -> DuetMoeForCausalLM:
        if source is not None:
            model = DuetMoeForCausalLM.from_pretrained(source, dtype=torch.float32)
        else:
            model = DuetMoeForCausalLM(DuetMoeConfig(vocab_size=len(self.tokenizer), **self.recipe.get("model", {})))
        model.generation_config.modes = modes_as_dict(BUILT_IN_MODES)
        if self.settings.one_head:
            model.coherence_head.unembed.weight = model.model.embed_tokens.weight
        on_cpu = self.accelerator.device.type == "cpu"
        model.set_experts_implementation("grouped_cpu" if on_cpu else "grouped_mm")
        if on_cpu:
            model.set_attn_implementation("eager")  # on short rows faster than sdpa, whose CPU kernel likes long ones
        if self.settings.compile:
            torch._dynamo.config.cache_size_limit = 64  # one graph per number of active experts
            for layer in model.model.layers:
                layer.compile(dynamic=False)
        return model.train()

    def _read_corpus(self, data: str | Path, cache: str | Path) -> tuple[list, list]:
        with self.accelerator.main_process_first():
            return encode_corpus(read_sources(self.recipe), data, self.tokenizer, cache)

    def _build_packer(self, train: list) -> Packer:
        world, rows = self.accelerator.num_processes, self.settings.batch_size
        if rows % world:
            raise ValueError(f"training.batch_size is {rows}; it must be a multiple of the {world} processes.")
        coherence_rows = self.settings.coherence_rows
        return Packer(
            train,
            batch_size=rows // world,
            seq_len=self.settings.seq_len,
            seed=self.settings.seed,
            coherence_rows=None if coherence_rows is None else coherence_rows // world,
            response_only=self.settings.response_only,
            rank=self.accelerator.process_index,
            world=world,
        )

    def run(self) -> Path:
        """Train to the last step, going on from the newest checkpoint if there is one; returns the model's folder."""
        self._resume()
        self._write_recipe()
        last_saved = last_evaluated = time.monotonic()
        shown = Progress(self.settings.steps, self.step, show=self.accelerator.is_main_process)
        with shown as progress, sigterm_interrupts():
            try:
                while self.step < self.settings.steps:
                    row = self._train_step()
                    progress.update(self.step, row)
                    self._log(row)
                    if time.monotonic() - last_evaluated > 60 * self.settings.eval_every:
                        self._evaluate(progress)
                        last_evaluated = time.monotonic()
                    if time.monotonic() - last_saved > 60 * self.settings.checkpoint_every:
                        self.save_checkpoint()
                        last_saved = time.monotonic()
            except KeyboardInterrupt:
                self.save_checkpoint()
                progress.say(f"Interrupted at step {self.step}; run the same command again to go on.")
                raise
            self._evaluate(progress)
        self.save_checkpoint()
        return self.export()

    def _train_step(self) -> dict[str, float]:
        started = time.monotonic()
        scale = self.settings.lr_scale(self.step)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * scale
        batch = {name: tensor.to(self.accelerator.device) for name, tensor in next(self.packer).items()}
        if self.settings.one_head:
            batch["head"] = torch.zeros_like(batch["head"])
        with self.accelerator.autocast():
            losses = self.objective(batch, self._draw_experts())
        self.accelerator.backward(losses["loss"])
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.settings.max_grad_norm)
        finite = bool(torch.isfinite(losses["loss"]) and torch.isfinite(norm))
        for optimizer in self.optimizers:
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.skipped += not finite
        self.step += 1
        self.tokens += int((batch["labels"] != -100).sum()) * self.accelerator.num_processes
        self.seconds += time.monotonic() - started
        row = {name: float(value.detach()) for name, value in losses.items()}
        return row | {"grad_norm": float(norm), "lr_scale": scale, "skipped": self.skipped}

    def _draw_experts(self) -> int:
        chances = self.settings.experts_per_tok or {self.model.config.num_experts_per_tok: 1.0}
        draw = random.Random(f"{self.settings.seed}:{self.step}")  # the same on every process and after a resume
        return draw.choices(list(chances), list(chances.values()))[0]

    def _evaluate(self, progress: Progress) -> None:
        if not self.accelerator.is_main_process:
            return
        self._share_the_head()
        with torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
            losses = heldout_losses(self.model, self.heldout, self.settings.eval_documents, self.settings.seq_len)
        self.model.train()
        row = {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds), "heldout": losses}
        with open(self.out / "heldout.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        progress.say("held-out nats per token (coherence / diversity): " + ", ".join(
            f"{name} {pair['coherence']:.3f}/{pair['diversity']:.3f}" for name, pair in losses.items()
        ))  # fmt: skip

    def _log(self, row: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        row = {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 1)} | row
        path = self.out / "log.csv"
        is_new = not path.exists()
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if is_new:
                writer.writeheader()
            writer.writerow(row)

    def _write_recipe(self) -> None:
        if self.accelerator.is_main_process:
            (self.out / "recipe.yaml").write_text(yaml.safe_dump(self.recipe, sort_keys=False))

    def save_checkpoint(self) -> None:
        """Write the full state under a temporary name, rename it, and drop all but the two newest."""
        folder = self.out / f"checkpoint-{self.step:07d}"
        unfinished = self.out / f"unfinished-{self.step:07d}"
        if self.accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
        self.accelerator.wait_for_everyone()
        rank = self.accelerator.process_index
        (unfinished / f"packer-{rank}.json").write_text(json.dumps(self.packer.state_dict()))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            torch.save(
                {
                    "model": self.model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                    "step": self.step,
                    "skipped": self.skipped,
                    "tokens": self.tokens,
                    "seconds": self.seconds,
                },
                unfinished / "state.pt",
            )
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(unfinished, folder)
            for old in sorted(self.out.glob("checkpoint-*"))[:-2]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        for stale in self.out.glob("unfinished-*"):
            shutil.rmtree(stale, ignore_errors=True)
        checkpoints = sorted(self.out.glob("checkpoint-*"))
        if not checkpoints:
            return
        folder = checkpoints[-1]
        state = torch.load(folder / "state.pt", map_location=self.accelerator.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.packer.load_state_dict(json.loads((folder / f"packer-{self.accelerator.process_index}.json").read_text()))
        for name in ("step", "skipped", "tokens", "seconds"):
            setattr(self, name, state[name])
        self._cut_log()

    def _cut_log(self) -> None:
        """Drop logged steps after the checkpoint, which are about to be run again."""
        path = self.out / "log.csv"
        if self.accelerator.is_main_process and path.exists():
            with open(path, newline="") as file:
                header, *rows = csv.reader(file)
            with open(path, "w", newline="") as file:
                csv.writer(file).writerows([header, *(row for row in rows if row and int(row[0]) <= self.step)])

    @torch.no_grad()
    def _share_the_head(self) -> None:
        """Let the diversity head be what the single head has become (only with `one_head`)."""
        if self.settings.one_head:
            self.model.diversity_head.load_state_dict(self.model.coherence_head.state_dict(), strict=False)

    def export(self) -> Path:
        """Write the model in bf16 and its tokenizer to `out/model`, for `from_pretrained`; returns that folder."""
        folder, unfinished = self.out / "model", self.out / "unfinished-model"
        self._share_the_head()
        if self.accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            save_model(self.model, self.tokenizer, unfinished)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(unfinished, folder)
        self.accelerator.wait_for_everyone()
        return folder


def save_model(model: DuetMoeForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a bf16 copy of `model` with its tokenizer; shared matrices are written once per owner."""
    copy = DuetMoeForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Treat the stop that schedulers send as one that a person typed (signals reach the main thread only)."""

    def interrupt(signal_number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _accelerator(precision: str) -> Accelerator:
    on_cpu = not torch.cuda.is_available()
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(torch.device("cpu" if on_cpu else "cuda")) else "no"
    # a step leaves out what it does not teach: the plan's projection, or the second head
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # without cpu=True, processes on a machine without a GPU would not find each other
    return Accelerator(mixed_precision=precision, cpu=on_cpu, kwargs_handlers=[unused])


def _checkpoint_folder(name: str | Path) -> Path:
    return Path(name) if (Path(name) / "config.json").is_file() else bundled(str(name))


def _tokenizer_folder(name: str | Path) -> Path:
    beside = Path(checkpoints.__file__).parent / name
    return beside if (beside / "tokenizer.json").is_file() else Path(name)


def pretrain(
    recipe: str,
    data: str,
    out: str,
    start_from: str | None = None,
    max_steps: int | None = None,
    cache: str | None = None,
    seed: int | None = None,
) -> Path:
    """Train by a recipe and return the folder of the finished model.

    Args:
        recipe: name of one of the package's recipes, or a YAML file.
        data: folder that the recipe's paths start from.
        out: folder of the run; if it holds a checkpoint, the run goes on from there.
        start_from: bundled name or folder of a model whose weights are the start; the optimiser is fresh.
        max_steps: overrides the recipe's number of steps.
        cache: folder of tokenised text, to share between runs; `out/tokens` when not given.
        seed: overrides the recipe's.
    """
    plan = read_recipe(recipe)
    if seed is not None:
        plan["training"]["seed"] = seed
    return Trainer(plan, data, out, start_from, max_steps, cache).run()
