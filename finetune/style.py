"""Train a voice: LoRA on the diversity head, and on nothing else.

The trunk's states are computed once, so that an epoch costs only the head; `transformers.Trainer` does the rest. The
same call goes on after an interruption, from the last whole checkpoint, to the same adapter. What comes out is
published only after its checks: factual mode bit-identical, every key consumed on reload, a style report.
"""

import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import replace as replaced
from datetime import UTC, datetime
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from duet_moe.finetune.checkpoints import last_whole_checkpoint
from duet_moe.finetune.features import TrunkStates, collate, trunk_states
from duet_moe.finetune.voice_corpus import VoiceCorpus, read_texts, read_voice_corpus
from duet_moe.finetune.voice_recipe import VoiceRecipe, read_voice_recipe
from duet_moe.finetune.voice_report import factual_logits, require_same_factual_logits, style_report
from duet_moe.finetune.voices import VoiceCard, VoiceStore
from duet_moe.modeling.checkpoints import locate
from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM
from duet_moe.modeling.voice_files import base_hashes, check_name, load_voice

ADAPTED = re.compile(r"diversity_head\.\w+\.lora_")  # the only weights that a voice may train


def train_voice(
    corpus: object,
    name: str,
    base: str = "duet-mini",
    recipe: str | Path | VoiceRecipe = "standard",
    store: str | Path | None = None,
    *,
    heldout: object = None,
    neutral: str | Path | Sequence[str] | None = None,
    author: str = "",
    licence: str = "",
    personal_data: str = "mask",
    text_column: str | None = None,
    prompt_column: str | None = None,
    language: str = "en",
    load_in_4bit: bool = False,
    replace: bool = False,
    seed: int = 0,
    show: bool = True,
) -> Path:
    """Train a voice on `corpus` and publish it in the store.

    Under `torchrun` all processes train together (data parallel), with the loss of one process.

    Args:
        corpus: path of a file or folder, a `datasets.Dataset`, or a sequence of dicts; see `read_voice_corpus`, which
            also explains `heldout`, `personal_data`, `text_column`, `prompt_column` and `language`.
        name: of the voice.
        base: bundled name, folder or Hub id of the model that will speak with the voice.
        recipe: `quick`, `standard`, `careful`, a YAML file, or settings.
        store: folder of voices; see [`VoiceStore`].
        neutral: texts on the same matters in nobody's style, as a path or a list; they sharpen the style report.
        load_in_4bit: train on a 4-bit trunk (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).
        replace: a voice of that name may go once the new one is there.

    Returns:
        The folder of the voice.

    Raises:
        CorpusError: if the corpus cannot be used; the message says why and what is needed.
        FileExistsError: if the name is taken and `replace` is not set.
        ValueError, OSError: on a bad name, recipe, base or a full disk; nothing half-written stays.
    """
    from accelerate import PartialState

    check_name(name)
    recipe = recipe if isinstance(recipe, VoiceRecipe) else read_voice_recipe(recipe)
    voices = VoiceStore(store)
    if name in voices.names() and not replace:
        raise FileExistsError(
            f"There is a voice {name!r} in {voices.root} already: choose another name, or replace it."
        )
    texts = read_voice_corpus(
        corpus, heldout, personal_data=personal_data, text_column=text_column, prompt_column=prompt_column,
        language=language,
    )  # fmt: skip
    neutral = read_texts(neutral) if isinstance(neutral, str | Path) else neutral
    process = PartialState()
    show = show and process.is_main_process
    if show:
        print("\n".join(texts.report.lines()), flush=True)
    model, tokenizer = _base(base, load_in_4bit)
    with process.main_process_first():  # the others then find the states on disk
        states = [
            trunk_states(model, documents, tokenizer, voices.root / ".cache" / "states", show)
            for documents in (texts.train, texts.heldout)
        ]
    before = factual_logits(model, tokenizer)
    hashes = base_hashes(model)
    run = _run_folder(voices.root, name, states, recipe, seed)
    tuned, losses = _fit(model, states, recipe, run, seed, show)
    folder = voices.root / name
    if process.is_main_process:
        require_same_factual_logits(tuned, tokenizer, before)
        built = Path(tempfile.mkdtemp(dir=run.parent, prefix=f"{name}-built-"))
        try:
            base_name = Path(base).name if Path(base).is_dir() else base  # not where it lies on this machine
            _save_adapter(tuned, base_name, built)
            card = _card(name, base_name, hashes, texts, recipe, losses, author, licence, built)
            card.save(built)
            fresh, _ = _base(base, load_in_4bit)
            load_voice(fresh, built)  # reads every key, or says which not
            require_same_factual_logits(fresh, tokenizer, before)
            style = style_report(fresh, tokenizer, name, texts, neutral or (), recipe, built, seed, show)
            replaced(card, figures=losses | style).save(built)
            folder = voices.publish(name, built, replace=replace)
        finally:
            shutil.rmtree(built, ignore_errors=True)
        shutil.rmtree(run, ignore_errors=True)
    process.wait_for_everyone()
    return folder


def adapted(model: DuetMoeForCausalLM, recipe: VoiceRecipe):  # type: ignore[no-untyped-def]
    """Return a `peft.PeftModel` of `model` in which only adapters on the diversity head can learn.

    Raises:
        RuntimeError: if anything else could.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        use_rslora=recipe.method == "rslora",
        use_dora=recipe.method == "dora",
        target_modules=recipe.target_modules,
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(model, config)
    learning = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    if foreign := [name for name in learning if not ADAPTED.search(name)]:
        raise RuntimeError(f"{foreign[0]} would be trained too: a voice may only change the diversity head.")
    return tuned


def _base(base: str, load_in_4bit: bool) -> tuple[DuetMoeForCausalLM, PreTrainedTokenizerBase]:
    source = locate(base)
    settings: dict[str, object] = {"dtype": torch.float32}
    if load_in_4bit:
        from transformers import BitsAndBytesConfig

        quantised = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        settings = {"dtype": torch.bfloat16, "quantization_config": quantised}
    model = DuetMoeForCausalLM.from_pretrained(source, **settings).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(source)


def _run_folder(root: Path, name: str, states: Sequence[TrunkStates], recipe: VoiceRecipe, seed: int) -> Path:
    """Return where this very training keeps its checkpoints; other texts, settings or bases have another place."""
    identity = [[str(part.folder.name) for part in states], asdict(recipe), seed]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    folder = root / ".training" / f"{name}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _fit(  # type: ignore[no-untyped-def]
    model: DuetMoeForCausalLM, states: Sequence[TrunkStates], recipe: VoiceRecipe, run: Path, seed: int, show: bool
):
    """Train and return the tuned model with its best adapter, and the losses on held-out texts."""
    from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments, set_seed

    class VoiceTrainer(Trainer):
        """Computes the loss of the diversity head alone."""

        def compute_loss(self, model, inputs, *args, **kwargs):  # type: ignore[no-untyped-def]
            return super().compute_loss(model, inputs | {"head_mix": 1.0}, *args, **kwargs)

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if recipe.batch_size % world:
        raise ValueError(f"batch_size is {recipe.batch_size}; {world} processes need a multiple of their number.")
    set_seed(seed)  # the adapters start from random numbers
    tuned = adapted(model, recipe)
    train, heldout = states
    arguments = TrainingArguments(
        output_dir=str(run),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size // world,
        per_device_eval_batch_size=len(heldout),
        learning_rate=recipe.lr,
        weight_decay=recipe.weight_decay,
        warmup_steps=recipe.warmup,
        lr_scheduler_type="cosine",
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        remove_unused_columns=False,
        prediction_loss_only=True,
        report_to=[],
        disable_tqdm=not (show and sys.stderr.isatty()),
        dataloader_pin_memory=False,
        seed=seed,
        data_seed=seed,
    )
    trainer = VoiceTrainer(
        model=tuned,
        args=arguments,
        data_collator=collate,
        train_dataset=train,
        eval_dataset=heldout,
        callbacks=[EarlyStoppingCallback(recipe.patience)],
    )
    if not show:
        trainer.remove_callback(PrinterCallback)
    before = trainer.evaluate()["eval_loss"]
    checkpoint = last_whole_checkpoint(run)
    resumed_from = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    seconds = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics["train_runtime"]
    epochs = (trainer.state.global_step - resumed_from) / math.ceil(len(train) / recipe.batch_size)  # of this process
    figures = {
        "heldout_loss_before": before,
        "heldout_loss_after": trainer.state.best_metric,
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "training_seconds": seconds,  # of this process, evaluations and checkpoints included
        "heldout_tokens": heldout.positions,
        "training_tokens_per_epoch": train.positions,
        "targets_per_second": train.positions * epochs / seconds,
    }
    return tuned.eval(), figures


def _save_adapter(tuned, base: str, folder: Path) -> None:  # type: ignore[no-untyped-def]
    config = tuned.peft_config["default"]
    config.base_model_name_or_path = base
    tuned.save_pretrained(folder, save_embedding_layers=False)  # or PEFT looks for the base on the Hub
    (folder / "README.md").unlink(missing_ok=True)


def _card(
    name: str,
    base: str,
    hashes: dict,
    texts: VoiceCorpus,
    recipe: VoiceRecipe,
    figures: dict,
    author: str,
    licence: str,
    folder: Path,
) -> VoiceCard:
    from importlib.metadata import version

    return VoiceCard(
        name=name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        author=author,
        licence=licence,
        base={"name": base, "hashes": hashes},
        corpus=texts.report.to_dict()
        | {"skipped": len(texts.report.skipped)},  # which rows those were has been shown before
        recipe=asdict(recipe),
        figures=figures,
        environment={library: version(library) for library in ("torch", "transformers", "peft")},
        adapter_sha256=hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest(),
    )
