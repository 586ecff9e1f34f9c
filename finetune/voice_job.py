"""What every training of a voice does around its learning: load the base, go on from a checkpoint, prove, publish."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import replace as replaced
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from duet_moe.finetune.checkpoints import last_whole_checkpoint
from duet_moe.finetune.voice_corpus import VoiceCorpus
from duet_moe.finetune.voice_recipe import VoiceRecipe
from duet_moe.finetune.voice_report import require_same_factual_logits, style_report
from duet_moe.finetune.voices import VoiceCard, VoiceStore
from duet_moe.modeling.checkpoints import locate
from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM
from duet_moe.modeling.voice_files import base_hashes, check_name, load_voice


@dataclass(frozen=True)
class VoiceJob:
    """The voice that is to be made.

    Raises:
        FileExistsError: if the name is taken and `replace` is not set.
        ValueError: on a bad name or recipe.
    """

    name: str
    base: str  # bundled name, folder or Hub id
    recipe: VoiceRecipe
    voices: VoiceStore
    author: str = ""
    licence: str = ""
    load_in_4bit: bool = False
    replace: bool = False
    seed: int = 0
    show: bool = True

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.name in self.voices.names() and not self.replace:
            raise FileExistsError(
                f"There is a voice {self.name!r} in {self.voices.root} already: choose another name, or replace it."
            )

    def load(self) -> tuple[DuetMoeForCausalLM, PreTrainedTokenizerBase]:
        """Return the base, frozen, on this process' device, and its tokenizer."""
        from accelerate import PartialState

        source, device = locate(self.base), PartialState().device
        settings: dict[str, object] = {"dtype": torch.float32}
        if self.load_in_4bit:
            from transformers import BitsAndBytesConfig

            quantised = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
            settings = {"dtype": torch.bfloat16, "quantization_config": quantised, "device_map": {"": device}}
        model = DuetMoeForCausalLM.from_pretrained(source, **settings).eval().requires_grad_(False)
        if not self.load_in_4bit:
            model.to(device)
        return model, AutoTokenizer.from_pretrained(source)

    def run_folder(self, *identity: object) -> Path:
        """Return where this very training keeps its checkpoints; other texts, settings or bases have another place."""
        key = hashlib.sha256(json.dumps([*identity, asdict(self.recipe), self.seed]).encode()).hexdigest()[:12]
        folder = self.voices.root / ".training" / f"{self.name}-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def trainer_settings(self, run: Path, texts: int) -> dict[str, Any]:
        """Return the settings that every `Trainer` of a voice has: epochs that are measured, the best one kept.

        A step has `batch_size` of the `texts` over all processes. What an epoch has left over is left out,
        so that the steps are the same for any number of processes.

        Raises:
            ValueError: if there are fewer texts than that, or they cannot be shared among the processes.
        """
        recipe, world = self.recipe, int(os.environ.get("WORLD_SIZE", "1"))
        if recipe.batch_size % world or recipe.batch_size > texts:
            raise ValueError(
                f"batch_size is {recipe.batch_size}; a multiple of the {world} processes, at most {texts}, is "
                "possible, since that is the number of texts to train on."
            )
        return {
            "output_dir": str(run),
            "use_cpu": not torch.cuda.is_available(),
            "num_train_epochs": recipe.epochs,
            "per_device_train_batch_size": recipe.batch_size // world,
            "dataloader_drop_last": True,
            "learning_rate": recipe.lr,
            "weight_decay": recipe.weight_decay,
            "warmup_steps": recipe.warmup,
            "lr_scheduler_type": "cosine",
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "logging_strategy": "epoch",
            "save_total_limit": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
            "report_to": [],
            "disable_tqdm": True,  # `learn` shows a line an epoch
            "dataloader_pin_memory": False,
            "seed": self.seed,
            "data_seed": self.seed,
        }

    def learn(self, trainer, run: Path, before: float) -> dict[str, float]:  # type: ignore[no-untyped-def]
        """Train, from the last whole checkpoint in `run` if there is one.

        Args:
            before: loss on held-out texts. It is not for the trainer to measure: a `Trainer` that has evaluated first
                takes its model for prepared and trains each process on its own.

        Returns:
            `loss_before`, `loss_after`: on held-out texts, of the best epoch; `epochs`, `steps`; `training_seconds`
            and `epochs_here`, both of this process alone where another one began.
        """
        from transformers import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        checkpoint = last_whole_checkpoint(run)
        begun = int(checkpoint.name.split("-")[1]) if checkpoint else 0
        if self.show:
            print(f"Held-out loss before: {before:.3f}", flush=True)
            trainer.add_callback(_epoch_lines())
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        state = trainer.state
        return {
            "loss_before": before,
            "loss_after": state.best_metric,
            "epochs": state.epoch,
            "steps": state.global_step,
            "training_seconds": result.metrics["train_runtime"],  # evaluations and checkpoints included
            "epochs_here": state.epoch * (state.global_step - begun) / state.global_step,
        }

    def publish(  # type: ignore[no-untyped-def]
        self,
        tuned,
        factual: Sequence[torch.Tensor],
        figures: Mapping[str, object],
        texts: VoiceCorpus,
        neutral: Sequence[str],
        run: Path,
        parent: Path | None = None,
    ) -> Path:
        """Prove what has to hold, measure the style, and put the voice into the store.

        Args:
            tuned (`peft.PeftModel`): with the adapter in it.
            factual: logits of factual mode from before the training.
            parent: folder of the voice that this one came from; the report compares with it instead of the base.

        Raises:
            RuntimeError: if factual mode has changed.
            OSError: if the disk is full; the store is as it was.
        """
        is_folder = Path(self.base).is_dir()
        base_name = Path(self.base).name if is_folder else self.base  # not where it lies on this machine
        fresh, tokenizer = self.load()
        require_same_factual_logits(tuned, tokenizer, factual)
        built = Path(tempfile.mkdtemp(dir=run.parent, prefix=f"{self.name}-built-"))
        try:
            _save_adapter(tuned, base_name, built)
            card = VoiceCard(
                name=self.name,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                author=self.author,
                licence=self.licence,
                base={"name": base_name, "hashes": base_hashes(fresh)},
                corpus=texts.report.to_dict()
                | {"skipped": len(texts.report.skipped)},  # which rows those were has been shown before
                recipe=asdict(self.recipe),
                figures=dict(figures),
                environment={library: version(library) for library in ("torch", "transformers", "peft")},
                adapter_sha256=hashlib.sha256((built / "adapter_model.safetensors").read_bytes()).hexdigest(),
            )
            card.save(built)
            self.recipe.save(built / "recipe.yaml")
            load_voice(fresh, built)  # reads every key, or says which not
            require_same_factual_logits(fresh, tokenizer, factual)
            earlier = None if parent is None else load_voice(fresh, parent, "earlier-voice")
            style = style_report(
                fresh, tokenizer, self.name, texts, neutral, self.recipe, built, self.seed, self.show, earlier
            )
            replaced(card, figures={**figures, **style}).save(built)
            folder = self.voices.publish(self.name, built, replace=self.replace)
        finally:
            shutil.rmtree(built, ignore_errors=True)
        shutil.rmtree(run, ignore_errors=True)
        return folder


class WholeEvaluation:
    """Part of a `Trainer`: every process measures all held-out texts, so that no split can change the loss."""

    eval_dataset: Any
    args: Any
    data_collator: Any

    def get_eval_dataloader(self, eval_dataset: object = None) -> DataLoader:
        """Return the whole set in batches."""
        return DataLoader(self.eval_dataset, self.args.per_device_eval_batch_size, collate_fn=self.data_collator)


def _epoch_lines():  # type: ignore[no-untyped-def]
    """Return a callback of `Trainer` that tells of every epoch in a line, with the time that is left at most."""
    from transformers import TrainerCallback

    class EpochLines(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            self.begun, self.started = state.global_step, time.monotonic()

        def on_evaluate(self, args, state, control, metrics, **kwargs):  # type: ignore[no-untyped-def]
            pace = (time.monotonic() - self.started) / max(1, state.global_step - self.begun)
            left = pace * (state.max_steps - state.global_step)
            loss, epochs = metrics["eval_loss"], f"{round(state.epoch)} of at most {round(args.num_train_epochs)}"
            print(f"Epoch {epochs}: held-out loss {loss:.3f}, at most {left:.0f} s left", flush=True)

    return EpochLines()


def _save_adapter(tuned, base: str, folder: Path) -> None:  # type: ignore[no-untyped-def]
    tuned.peft_config["default"].base_model_name_or_path = base
    # without save_embedding_layers PEFT looks for the base on the Hub
    tuned.save_pretrained(folder, save_embedding_layers=False, selected_adapters=["default"])
    (folder / "README.md").unlink(missing_ok=True)


__all__ = ["VoiceJob", "WholeEvaluation"]
