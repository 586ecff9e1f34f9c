"""Loss of both heads on held-out documents, per source."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from duet_moe.finetune.packing import TokenStore
from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM

ROWS = 8  # documents per forward pass


@torch.no_grad()
def heldout_losses(
    model: DuetMoeForCausalLM, stores: Sequence[TokenStore], documents: int, max_tokens: int
) -> dict[str, dict[str, float]]:
    """Return, per source, nats per token of each head, on responses of chats and on whole texts.

    Args:
        documents: how many of each source, spread evenly over it; fewer where there are fewer.
        max_tokens: a document's later tokens are left out.
    """
    model.eval()
    return {store.source.name: _store_loss(model, store, documents, max_tokens) for store in stores if len(store)}


def _store_loss(model: DuetMoeForCausalLM, store: TokenStore, documents: int, max_tokens: int) -> dict[str, float]:
    chosen = spread(store, documents)
    totals = {"coherence": 0.0, "diversity": 0.0}
    count = 0
    for start in range(0, len(chosen), ROWS):
        batch = [store.document(int(index)) for index in chosen[start : start + ROWS]]
        length = min(max_tokens, max(len(ids) for ids, _ in batch))
        input_ids = torch.zeros(len(batch), length, dtype=torch.long)
        scored = torch.zeros(len(batch), length, dtype=torch.bool)
        for row, (ids, loss_start) in enumerate(batch):
            kept = torch.from_numpy(ids[:length].astype(np.int64))
            input_ids[row, : len(kept)] = kept
            scored[row, max(1, loss_start) : len(kept)] = True
        input_ids, scored = input_ids.to(model.device), scored.to(model.device)
        hidden = model.model(input_ids, use_cache=False).last_hidden_state[:, :-1][scored[:, 1:]]
        targets = input_ids[:, 1:][scored[:, 1:]]
        count += len(targets)
        for name in totals:
            logits = getattr(model, f"{name}_head")(hidden)
            totals[name] += float(F.cross_entropy(logits.float(), targets, reduction="sum"))
    return {name: total / max(1, count) for name, total in totals.items()} | {"tokens": count}


def spread(store: TokenStore, documents: int) -> np.ndarray:
    """Return the indices of at most `documents` documents, spread evenly over the store."""
    return np.unique(np.linspace(0, len(store) - 1, documents).astype(int))
