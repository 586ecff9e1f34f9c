"""Training a voice on trunk states that are computed once, against plain PEFT LoRA with `Trainer` on whole texts.

    python benchmarks/style_tuning.py

Same model, adapters, texts (all four example brands), order, steps and optimiser; no dropout, so that the losses can
be compared step by step. The time of ours includes computing the states. Each side runs in a process of its own, in
turns. Reported are the medians of the wall times, their ratio and the largest difference of a step's loss.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from result_file import write_result

EXAMPLES = Path(__file__).resolve().parent.parent / "finetune" / "examples"
EPOCHS, BATCH, RANK = 5, 8, 16
ROUNDS = 3


def train(side: str) -> dict[str, object]:
    """Train one side and return its seconds, from the loaded model on, and the loss of every step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

    from duet_moe import DuetMoeForCausalLM, bundled
    from duet_moe.finetune.corpus import Document
    from duet_moe.finetune.features import collate, trunk_states

    files = sorted(EXAMPLES.glob("*/train.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    documents = [Document(row["prompt"], row["response"]) for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(bundled("duet-mini"))
    model = DuetMoeForCausalLM.from_pretrained(bundled("duet-mini"), dtype=torch.float32).requires_grad_(False)
    model.config.head_mix = 1.0
    set_seed(0)
    target = r"diversity_head\.(gate_proj|up_proj|down_proj)"
    tuned = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=32, target_modules=target, task_type="CAUSAL_LM"))
    with tempfile.TemporaryDirectory() as work:
        started = time.perf_counter()
        if side == "ours":
            dataset, collator = trunk_states(model, documents, tokenizer, work, show=False), collate
        else:
            dataset, collator = plain(documents, tokenizer)
        arguments = TrainingArguments(
            output_dir=work, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, learning_rate=3e-3,
            lr_scheduler_type="cosine", logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
            remove_unused_columns=False, seed=0, data_seed=0,
        )  # fmt: skip
        trainer = Trainer(model=tuned, args=arguments, train_dataset=dataset, data_collator=collator)
        trainer.train()
        seconds = time.perf_counter() - started
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"seconds": seconds, "losses": losses}


def plain(documents, tokenizer):  # type: ignore[no-untyped-def]
    """Return whole texts with labels on their responses, and transformers' collator that pads a batch."""
    from transformers import DataCollatorForSeq2Seq

    from duet_moe.finetune.token_store import encode

    rows = [
        {"input_ids": ids.tolist(), "labels": [-100] * start + ids[start:].tolist()}
        for ids, start in encode(documents, tokenizer)
    ]
    return rows, DataCollatorForSeq2Seq(tokenizer, padding=True)


def main() -> None:
    """Run both sides in turns and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=["ours", "plain"], help="one side in this process")
    side = parser.parse_args().side
    if side:
        print(json.dumps(train(side)))
        return
    runs: dict[str, list[dict]] = {"ours": [], "plain": []}
    for _ in range(ROUNDS):
        for name, found in runs.items():
            done = subprocess.run(
                [sys.executable, __file__, "--side", name], check=True, stdout=subprocess.PIPE, text=True
            )
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(name, round(found[-1]["seconds"], 2), file=sys.stderr, flush=True)
    seconds = {name: statistics.median(run["seconds"] for run in found) for name, found in runs.items()}
    pairs = zip(runs["ours"][0]["losses"], runs["plain"][0]["losses"], strict=True)
    figures = {
        "epochs": EPOCHS,
        "steps": len(runs["ours"][0]["losses"]),
        "seconds": seconds,
        "ratio": seconds["plain"] / seconds["ours"],
        "largest_loss_difference": max(abs(ours - peer) for ours, peer in pairs),
        "first_and_last_loss": [runs["ours"][0]["losses"][0], runs["ours"][0]["losses"][-1]],
    }
    print(json.dumps(figures, indent=1))
    write_result("style_tuning", figures, ("peft",))


if __name__ == "__main__":
    main()
