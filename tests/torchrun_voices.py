"""What `test_voice_distributed.py` runs, as one process and as two under torchrun: BASE STORE are its arguments."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_prefer import ROWS as PAIRS
from test_style import ROWS
from tiny import tiny_model, tiny_tokenizer
from torch.distributed.fsdp import fully_shard

from duet_moe.finetune import voice_report
from duet_moe.finetune.corpus import Document
from duet_moe.finetune.features import collate, trunk_states
from duet_moe.finetune.prefer import prefer_voice
from duet_moe.finetune.style import adapted, train_voice
from duet_moe.finetune.voice_corpus import read_voice_corpus
from duet_moe.finetune.voice_pairs import read_voice_pairs
from duet_moe.finetune.voice_recipe import VoiceRecipe

torch.set_num_threads(1)
voice_report.ANSWER_TOKENS = 4
RECIPE = VoiceRecipe(rank=4, dropout=0.0, epochs=2, samples_per_prompt=1, lr=1e-2)


def sharded(store: Path) -> list[float]:
    """Train the adapters for five steps with everything sharded (FSDP2); return the loss of each step."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer)).eval().requires_grad_(False)
    documents = [Document(row["prompt"], row["response"]) for row in ROWS]
    states = trunk_states(model, documents, tokenizer, store / f"states-{rank}", show=False)
    torch.manual_seed(0)
    tuned = adapted(model, RECIPE)
    if world > 1:
        fully_shard(model.diversity_head)
        fully_shard(tuned)
    optimizer = torch.optim.AdamW([weight for weight in tuned.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for step in range(5):
        rows = list(range(8 * step, 8 * step + 8))
        batch, targets = collate([states[row] for row in rows[rank::world]]), collate([states[row] for row in rows])
        share = batch["labels"].numel() / targets["labels"].numel()
        loss = tuned(**batch, head_mix=1.0).loss * share * world  # gradients are averaged over the processes
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / world
        if world > 1:
            dist.all_reduce(total)
        losses.append(total.item())
    return losses


if __name__ == "__main__":
    base, store = sys.argv[1], Path(sys.argv[2])
    texts, pairs = read_voice_corpus(ROWS[:-2]).train, read_voice_pairs(PAIRS[:-2]).train
    assert len(texts) % RECIPE.batch_size and len(pairs) % RECIPE.batch_size, "an epoch has to have some left over"
    train_voice(ROWS[:-2], "fox", base, RECIPE, store, show=False)
    prefer_voice(PAIRS[:-2], "taste", base, RECIPE, store, show=False)
    losses = sharded(store)
    if int(os.environ.get("RANK", "0")) == 0:
        (store / "sharded.json").write_text(json.dumps(losses))
    if dist.is_initialized():
        dist.destroy_process_group()
