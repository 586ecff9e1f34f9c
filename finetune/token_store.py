"""Encode documents into flat token arrays, once, and keep them on disk.

A store is three arrays per source; `encode_corpus` caches them under a key of everything that could change a token, so
a second run starts in a moment and several processes read the same memory-mapped files.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from duet_moe.finetune.corpus import RECIPES, Document, Source, load_corpus, source_files
from duet_moe.finetune.tokenizer import ASSISTANT, END, TEXT, USER

_CODE_VERSION = 2  # raise when documents or their encoding change, so that old caches are not used


def encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> list[tuple[np.ndarray, int]]:
    """Return (ids, loss_start) per document: int32 ids with special tokens, and the first token of the response.

    Special tokens written inside a text are encoded as plain characters.
    """
    prompts = _encode_texts([document.prompt or "" for document in documents], tokenizer)
    responses = _encode_texts([document.response for document in documents], tokenizer)
    encoded = []
    for document, prompt, response in zip(documents, prompts, responses, strict=True):
        head = [TEXT] if document.prompt is None else [USER, *prompt, ASSISTANT]
        encoded.append((np.array([*head, *response, END], dtype=np.int32), len(head)))
    return encoded


@dataclass(frozen=True)
class TokenStore:
    """The encoded documents of one source: flat ids, and where each document and its response begin."""

    source: Source
    ids: np.ndarray  # (tokens,) int32, memory-mapped
    offsets: np.ndarray  # (documents + 1,) int64
    loss_starts: np.ndarray  # (documents,) int32

    def __len__(self) -> int:
        return len(self.loss_starts)

    @property
    def tokens(self) -> int:
        """Number of tokens, special ones included."""
        return int(self.offsets[-1])

    def document(self, index: int) -> tuple[np.ndarray, int]:
        """Return (ids, loss_start) of one document."""
        return self.ids[self.offsets[index] : self.offsets[index + 1]], int(self.loss_starts[index])

    def save(self, folder: Path) -> None:
        """Write the arrays to `folder`."""
        folder.mkdir(parents=True)
        for name in ("ids", "offsets", "loss_starts"):
            np.save(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, source: Source, folder: Path) -> "TokenStore":
        """Open the arrays of `save`, ids memory-mapped."""
        # numpy cannot map an empty file, which a source without held-out documents has.
        ids = np.load(folder / "ids.npy", mmap_mode="r" if (folder / "ids.npy").stat().st_size > 1024 else None)
        return cls(source, ids, np.load(folder / "offsets.npy"), np.load(folder / "loss_starts.npy"))

    @classmethod
    def of(cls, source: Source, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> "TokenStore":
        """Encode `documents` into a store."""
        encoded = encode(documents, tokenizer)
        offsets = np.cumsum([0, *(len(ids) for ids, _ in encoded)], dtype=np.int64)
        ids = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in encoded)])
        return cls(source, ids, offsets, np.array([start for _, start in encoded], dtype=np.int32))


def encode_corpus(
    sources: Sequence[Source], root: str | Path, tokenizer: PreTrainedTokenizerBase, cache: str | Path
) -> tuple[list[TokenStore], list[TokenStore]]:
    """Return the (training, held-out) stores of all sources, encoded once and then read from `cache`.

    The cache is keyed by recipe, tokenizer and the bytes of every file; it appears under its name only when complete.
    """
    folder = Path(cache) / _cache_key(sources, root, tokenizer)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unfinished-"))
        try:
            for name, split in load_corpus(sources, root).items():
                source = next(source for source in sources if source.name == name)
                for side, documents in zip(("train", "heldout"), split, strict=True):
                    TokenStore.of(source, documents, tokenizer).save(unfinished / side / name)
            _publish(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    train, heldout = (
        [TokenStore.load(source, folder / side / source.name) for source in sources] for side in ("train", "heldout")
    )
    return train, heldout


def _encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    stripped = [text.strip() for text in texts]
    return tokenizer(stripped, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def _cache_key(sources: Sequence[Source], root: str | Path, tokenizer: PreTrainedTokenizerBase) -> str:
    digest = hashlib.sha256(f"{_CODE_VERSION}".encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for source in sources:
        described = {**asdict(source), "weight": None, "head": None}  # neither changes a token
        digest.update(json.dumps(described, sort_keys=True).encode())
        data = [RECIPES / source.templates] if source.templates else []
        data += [RECIPES / "story_prompts.yaml"] if source.prompts else []
        for file in [*source_files(source, root), *data]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:20]


def _publish(unfinished: Path, folder: Path) -> None:
    try:
        os.replace(unfinished, folder)
    except OSError:
        # Another process finished the same cache first.
        if not folder.is_dir():
            raise
