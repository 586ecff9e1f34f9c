"""Train an independent evaluator: a tokenizer and a small Llama, on text that the judged model never saw.

    python -m duet_moe.evaluation.train_evaluator --data FOLDER --out FOLDER --minutes 20

`duet_moe.evaluation.unread` writes such text for models that this package trained. The steps that fit into the minutes
are measured once and then fixed, so that a run that was killed goes on, by the same command, to the same end. What the
evaluator learnt from, and its held-out bits per character, are in `evaluator.json` beside the weights.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from duet_moe.evaluation.card import environment
from duet_moe.evaluation.evaluator import Evaluator
from duet_moe.evaluation.evaluator_corpus import Rows, find_files, pack, read_texts, train_tokenizer
from duet_moe.finetune.checkpoints import last_whole_checkpoint
from duet_moe.finetune.muon import has_fast_bf16
from duet_moe.finetune.pretrain import sigterm_interrupts
from duet_moe.finetune.progress import Progress

JUDGED = 200  # held-out texts of the card
EVALUATIONS = 10  # times that a run is measured and saved
EVALUATION_ROWS = 64  # held-out rows of each of them


@dataclass(frozen=True)
class EvaluatorSettings:
    """Shape and schedule; the defaults give 4.3 million parameters.

    Args:
        window (`int`): tokens of a row, and the longest context.
        batch_size (`int`): rows of a step.
        steps (`int`, *optional*): as many as fit into the minutes when not given.
        heldout (`float`): share of the texts that is not learnt from.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    window: int = 512
    batch_size: int = 8
    lr: float = 2e-3
    steps: int | None = None
    heldout: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is {self.steps}; give 1 or more, or none and the minutes to train for.")


def train_evaluator(
    data: Sequence[str | Path],
    out: str | Path,
    minutes: float = 20.0,
    settings: EvaluatorSettings = EvaluatorSettings(),
    note: str = "",
    show: bool = True,
) -> Path:
    """Train an evaluator, measure it, and return its folder, which `Evaluator.load` reads.

    Args:
        data: files and folders of `.txt`, `.json`, `.jsonl` and `.jsonl.xz` whose rows have `text`.
        out: folder that is made; what is unfinished stands beside it, under `OUT.unfinished`.
        note: kept in the card, such as where the text is from and what of it the judged model may have seen.

    Raises:
        FileExistsError: if `out` is there.
        ValueError: on data without usable text or too little of it, and if an unfinished run had other data or
            settings.
    """
    out, work = Path(out), Path(f"{out}.unfinished")
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another folder, or delete it to train anew.")
    if minutes <= 0:
        raise ValueError(f"minutes is {minutes}; give a number above 0.")
    files = find_files(data)
    train, heldout = read_texts(files, settings.heldout)
    work.mkdir(parents=True, exist_ok=True)
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    tokenizer = _begin(work, {"data": hashes, "settings": asdict(settings)}, train, settings)
    set_seed(settings.seed)
    model = LlamaForCausalLM(_config(settings, tokenizer))
    rows, unseen = (pack(side, tokenizer, settings.window, settings.seed) for side in (train, heldout))
    steps = settings.steps or _fixed_steps(work, model, settings, minutes)
    figures = _fit(model, rows, Rows(unseen.ids[:EVALUATION_ROWS]), work, settings, steps, show)
    built = work / "evaluator"
    model.save_pretrained(built)
    tokenizer.save_pretrained(built)
    card = {
        "created": date.today().isoformat(),
        "note": note,
        "data": [{"file": name, "sha256": digest} for name, digest in hashes.items()],
        "texts": {"train": len(train), "characters": sum(map(len, train)), "tokens": rows.ids.numel()},
        "heldout": _heldout(built, heldout),
        "settings": asdict(settings),
        "parameters": model.num_parameters(),
        **figures,
        "environment": environment(),
    }
    _write(built / "evaluator.json", card)
    os.replace(built, out)
    shutil.rmtree(work)
    return out


def _begin(
    work: Path, described: dict[str, object], train: Sequence[str], settings: EvaluatorSettings
) -> PreTrainedTokenizerFast:
    """Begin the run in `work`, or check that the one begun there is this very one; return its tokenizer."""
    begun = work / "run.json"
    if not begun.is_file():
        tokenizer = train_tokenizer(train, settings.vocab_size)
        tokenizer.save_pretrained(work / "tokenizer")
        _write(begun, described)
    elif json.loads(begun.read_text()) != described:
        raise ValueError(f"{work} was begun with other data or settings: give those again, or delete the folder.")
    return PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")


def _write(path: Path, content: object) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(unfinished, path)


def _config(settings: EvaluatorSettings, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_attention_heads,
        max_position_embeddings=settings.window,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _fixed_steps(work: Path, model: LlamaForCausalLM, settings: EvaluatorSettings, minutes: float) -> int:
    """Return the steps that fit into `minutes`: measured when a run begins, and the same when it goes on."""
    path = work / "steps.json"
    if not path.is_file():
        ids = torch.randint(model.config.vocab_size, (settings.batch_size, settings.window), device=_device())
        model = model.to(_device())
        seconds = []
        for _ in range(6):
            started = time.perf_counter()
            with torch.autocast(_device(), torch.bfloat16, enabled=_bf16()):
                loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            loss.item()  # waits for a GPU
            seconds.append(time.perf_counter() - started)
        model.zero_grad(set_to_none=True)
        _write(path, max(1, round(60 * minutes / sorted(seconds)[3])))
    return json.loads(path.read_text())


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _bf16() -> bool:
    return has_fast_bf16(torch.device(_device()))


def _fit(
    model: LlamaForCausalLM,
    train: Rows,
    heldout: Rows,
    work: Path,
    settings: EvaluatorSettings,
    steps: int,
    show: bool,
) -> dict[str, float]:
    """Train `model` to `steps`, leave it at its best evaluation, and return what was measured."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    every = max(1, steps // EVALUATIONS)
    arguments = TrainingArguments(
        output_dir=str(work),
        use_cpu=_device() == "cpu",
        bf16=_bf16(),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.1,
        adam_beta2=0.95,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=min(10, every),
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=settings.seed,
        data_seed=settings.seed,
    )
    trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=heldout)
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_whole_checkpoint(work)
    begun = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    with Progress(steps, begun, show) as progress, sigterm_interrupts():
        trainer.add_callback(_shown(progress))
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "training_seconds": result.metrics["train_runtime"],
        "seconds_from_step": begun,
    }


def _shown(progress: Progress):  # type: ignore[no-untyped-def]
    """Return a callback of `Trainer` that shows its loss in `progress`."""
    from transformers import TrainerCallback

    class Shown(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):  # type: ignore[no-untyped-def]
            progress.update(state.global_step, logs)

    return Shown()


def _heldout(folder: Path, texts: Sequence[str]) -> dict[str, float]:
    # as saved: what `Trainer` has held computes in bf16 from then on
    chosen = [texts[int(i)] for i in np.unique(np.linspace(0, len(texts) - 1, JUDGED).astype(int))]
    sizes = np.array([len(text) for text in chosen])
    bits = Evaluator.load(str(folder)).bits_per_character(chosen)
    return {
        "texts": len(chosen),
        "characters": int(sizes.sum()),
        "bits_per_character": float((bits * sizes).sum() / sizes.sum()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and print what the evaluator needs for held-out text; returns the exit status."""
    parser = argparse.ArgumentParser(description="Train an independent evaluator of texts.")
    parser.add_argument(
        "--data", nargs="+", required=True, help="files and folders of text the judged model never saw"
    )
    parser.add_argument("--out", required=True, help="folder of the evaluator; run again to go on after a stop")
    parser.add_argument("--minutes", type=float, default=20.0, help="about how long to train")
    parser.add_argument("--steps", type=int, help="train so many steps instead")
    parser.add_argument("--note", default="", help="text for the card: where the data is from, what it overlaps with")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        settings = EvaluatorSettings(steps=arguments.steps, seed=arguments.seed)
        out = train_evaluator(arguments.data, arguments.out, arguments.minutes, settings, arguments.note)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped; run the same command again to go on.", file=sys.stderr)
        return 130
    heldout = json.loads((out / "evaluator.json").read_text())["heldout"]
    print(f"{out}: {heldout['bits_per_character']:.3f} bits per character on {heldout['texts']} held-out texts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
