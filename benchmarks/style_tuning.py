"""Training a voice on trunk states that are computed once, against plain PEFT LoRA with `Trainer` on whole texts.

    python benchmarks/style_tuning.py

Same model, adapters, texts (all four example brands), order, steps and optimiser; no dropout, so that the losses can
be compared step by step. The time of ours includes computing the states. Each side runs in a process of its own, in
turns. Reported are the medians of the wall times, their ratio and the largest difference of a step's loss.

Two shapes: duet-mini, whose head is a third of the work of its trunk, and one of random weights that has the
proportions of large models, where the trunk is nearly all of the work (Mixtral-8x7B: 12.7B active parameters before an
output matrix of 0.13B, 97 times). What can be gained depends on that: with E epochs, a trunk of T and a head of H
operations a token (H counts the backward pass) it is at most E (T + H) / (T + E H), padding and prompts aside.
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
SHAPES: dict[str, dict[str, int] | None] = {
    "duet-mini": None,
    "trunk-heavy": dict(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=16, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, sliding_window=512,
        max_position_embeddings=2048, head_intermediate_size=256,
    ),
}  # fmt: skip


def train(side: str, shape: str) -> dict[str, object]:
    """Train one side and return its seconds, from the loaded model on, and the loss of every step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

    from duet_moe import DuetMoeConfig, DuetMoeForCausalLM, bundled
    from duet_moe.finetune import features
    from duet_moe.finetune.corpus import Document
    from duet_moe.finetune.features import collate, trunk_states
    from duet_moe.finetune.token_store import encode

    files = sorted(EXAMPLES.glob("*/train.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    documents = [Document(row["prompt"], row["response"]) for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(bundled("duet-mini"))
    set_seed(0)
    if sizes := SHAPES[shape]:
        model = DuetMoeForCausalLM(DuetMoeConfig(**sizes)).requires_grad_(False)
    else:
        model = DuetMoeForCausalLM.from_pretrained(bundled("duet-mini"), dtype=torch.float32).requires_grad_(False)
    encoded = [(ids % model.config.vocab_size, start) for ids, start in encode(documents, tokenizer)]
    features.encode = lambda *_: encoded  # the same ids for both sides, within the vocabulary
    model.config.head_mix = 1.0
    target = r"diversity_head\.(gate_proj|up_proj|down_proj)"
    tuned = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=32, target_modules=target, task_type="CAUSAL_LM"))
    with tempfile.TemporaryDirectory() as work:
        started = time.perf_counter()
        if side == "ours":
            dataset, collator = trunk_states(model, documents, tokenizer, work, show=False), collate
        else:
            dataset, collator = plain(encoded, tokenizer)
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


def plain(encoded, tokenizer):  # type: ignore[no-untyped-def]
    """Return whole texts with labels on their responses, and transformers' collator that pads a batch."""
    from transformers import DataCollatorForSeq2Seq

    rows = [{"input_ids": ids.tolist(), "labels": [-100] * start + ids[start:].tolist()} for ids, start in encoded]
    return rows, DataCollatorForSeq2Seq(tokenizer, padding=True)


def main() -> None:
    """Run both sides in turns for each shape and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=["ours", "plain"], help="one side in this process")
    parser.add_argument("--shape", choices=list(SHAPES), help="one shape only, and no result file")
    asked = parser.parse_args()
    if asked.side:
        print(json.dumps(train(asked.side, asked.shape)))
        return
    figures = {shape: compare(shape) for shape in ([asked.shape] if asked.shape else SHAPES)}
    print(json.dumps(figures, indent=1))
    if not asked.shape:
        write_result("style_tuning", figures, ("peft",))


def compare(shape: str) -> dict[str, object]:
    """Return what the two sides took and how far their losses differ."""
    runs: dict[str, list[dict]] = {"ours": [], "plain": []}
    for _ in range(ROUNDS):
        for name, found in runs.items():
            command = [sys.executable, __file__, "--side", name, "--shape", shape]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(shape, name, round(found[-1]["seconds"], 2), file=sys.stderr, flush=True)
    seconds = {name: statistics.median(run["seconds"] for run in found) for name, found in runs.items()}
    losses = {name: found[0]["losses"] for name, found in runs.items()}
    return {
        "epochs": EPOCHS,
        "steps": len(losses["ours"]),
        "seconds": seconds,
        "ratio": seconds["plain"] / seconds["ours"],
        "largest_loss_difference": max(abs(a - b) for a, b in zip(losses["ours"], losses["plain"], strict=True)),
        "first_and_last_loss": [losses["ours"][0], losses["ours"][-1]],
    }


if __name__ == "__main__":
    main()
