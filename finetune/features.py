"""The trunk's states of a corpus, computed once: while only a head learns, the epochs need nothing else of the model.

Only positions that have a loss are kept: no prompts, no padding. The arrays lie on disk, memory-mapped, under a key of
everything that could change them: the trunk's weights as they are in memory, the tokens and the dtype.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from duet_moe.finetune.corpus import Document
from duet_moe.finetune.progress import Progress
from duet_moe.finetune.token_store import encode
from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM, DuetMoeModel

BATCH_TOKENS = 4096  # of one pass through the trunk, padding included
_CODE_VERSION = 1  # raise when the states of a text change, so that old caches are not used
_STORED = {torch.float32: torch.float32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class TrunkStates(Dataset):
    """States and targets of documents.

    Item i is `{"trunk_states": (positions, hidden), "shift_labels": (positions,)}`: the states of document i that have
    a target, in the trunk's dtype, and those targets, int64.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder = folder
        self.states = torch.from_numpy(np.load(folder / "states.npy", mmap_mode="c")).view(dtype)
        self.labels = torch.from_numpy(np.load(folder / "labels.npy"))
        self.offsets = np.load(folder / "offsets.npy")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def positions(self) -> int:
        """Number of targets of all documents."""
        return int(self.offsets[-1])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        span = slice(self.offsets[index], self.offsets[index + 1])
        return {"trunk_states": self.states[span], "shift_labels": self.labels[span]}


def collate(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Join documents end to end as one row, which needs no padding, since a head sees every position by itself.

    `labels` are there because `Trainer` counts targets only where it finds that name.
    """
    batch = {name: torch.cat([item[name] for item in items])[None] for name in ("trunk_states", "shift_labels")}
    return batch | {"labels": batch["shift_labels"]}


def trunk_states(
    model: DuetMoeForCausalLM,
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    cache: str | Path,
    show: bool = True,
) -> TrunkStates:
    """Return the trunk's states of `documents`, from `cache` if they are there.

    Args:
        model: its trunk may be quantised; it must not be in training.
        cache: folder of many such sets; a set appears under its name only when complete.

    Raises:
        ValueError: without documents, or with a trunk that is to be trained.
    """
    if not documents:
        raise ValueError("There are no documents to compute the trunk's states of.")
    if any(parameter.requires_grad for parameter in model.model.parameters()):
        raise ValueError("The trunk's weights require gradients: states that are computed once would be out of date.")
    room = model.config.max_position_embeddings
    encoded = [(ids[:room], start) for ids, start in encode(documents, tokenizer) if start < room]
    folder = Path(cache) / _key(model.model, encoded)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unfinished-"))
        try:
            _compute(model, encoded, unfinished, show)
            _publish(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return TrunkStates(folder, _dtype(model))


def _dtype(model: DuetMoeForCausalLM) -> torch.dtype:
    return model.model.embed_tokens.weight.dtype


def _key(trunk: DuetMoeModel, encoded: Sequence[tuple[np.ndarray, int]]) -> str:
    digest = hashlib.sha256(f"{_CODE_VERSION} {trunk.config.to_json_string()}".encode())
    for name, tensor in sorted(trunk.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for ids, start in encoded:
        digest.update(np.array([len(ids), start]).tobytes() + ids.tobytes())
    return digest.hexdigest()[:20]


@torch.no_grad()
def _compute(model: DuetMoeForCausalLM, encoded: Sequence[tuple[np.ndarray, int]], folder: Path, show: bool) -> None:
    model.eval()
    offsets = np.cumsum([0, *(len(ids) - start for ids, start in encoded)], dtype=np.int64)
    labels = np.concatenate([ids[start:] for ids, start in encoded]).astype(np.int64)
    stored = torch.empty(0, dtype=_STORED[_dtype(model)]).numpy().dtype
    shape = (int(offsets[-1]), model.config.hidden_size)
    states = np.lib.format.open_memmap(folder / "states.npy", mode="w+", dtype=stored, shape=shape)
    done = 0
    with Progress(len(labels), show=show) as progress:
        progress.say(f"Trunk states of {len(encoded)} texts, {len(labels):,} targets")
        for batch in _batches([len(ids) for ids, _ in encoded]):
            width = max(len(encoded[index][0]) for index in batch)
            input_ids = torch.zeros(len(batch), width, dtype=torch.long)  # padded at the end, where no token looks
            for row, index in enumerate(batch):
                ids = encoded[index][0]
                input_ids[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            hidden = model.model(input_ids.to(model.device), use_cache=False).last_hidden_state.cpu()
            for row, index in enumerate(batch):
                ids, start = encoded[index]
                kept = hidden[row, start - 1 : len(ids) - 1].contiguous().view(_STORED[_dtype(model)])
                states[offsets[index] : offsets[index + 1]] = kept.numpy()
                done += len(ids) - start
            progress.update(done, {})
    states.flush()
    np.save(folder / "labels.npy", labels)
    np.save(folder / "offsets.npy", offsets)


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Group texts of like length, as many as fill `BATCH_TOKENS`."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(index)
    return batches


def _publish(unfinished: Path, folder: Path) -> None:
    try:
        os.replace(unfinished, folder)
    except OSError:
        if not folder.is_dir():  # else another process finished the same states first
            raise
