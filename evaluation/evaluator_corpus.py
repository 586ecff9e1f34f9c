"""What an evaluator learns from: texts of files, split by a hash, in its own tokens and in rows of one length."""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from duet_moe.finetune.corpus import SUFFIXES, Document, Source, is_held_out, load_source, source_files
from duet_moe.finetune.leaks import without_leaks

BEGIN = "<|begin|>"  # begins every text, and pads


def find_files(data: Sequence[str | Path]) -> dict[str, Path]:
    """Return name -> file of everything usable in `data`; a name begins with the file or folder that was given.

    Raises:
        ValueError: naming what does not exist or has no usable file.
    """
    files = {}
    for given in map(Path, data):
        if not given.exists():
            raise ValueError(f"There is no {given}: give files or folders of {', '.join(SUFFIXES)}.")
        for path in source_files(Source("evaluator", glob.escape(str(given.resolve())), 1.0), "."):
            name = str(path.relative_to(given.resolve().parent))
            if name in files:
                raise ValueError(
                    f"{name} is given twice, or two folders have one name: give each once, under its own."
                )
            files[name] = path
    return files


def read_texts(files: Mapping[str, Path], heldout_share: float) -> tuple[list[str], list[str]]:
    """Return texts to train on and held-out ones, parted by a hash of the text; none of one side repeats the other.

    Raises:
        ValueError: if one side is empty.
    """
    paths = [glob.escape(str(path)) for path in files.values()]
    documents, _ = load_source(Source("evaluator", paths, 1.0, holdout=0), ".")
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        # another hash than that of recipes, by which text that a recipe trains on is never held out
        sides[is_held_out(f"evaluator {document.response}", heldout_share)].append(document)
    train, heldout = ([d.response for d in side] for side in without_leaks({"": sides})[""])
    if not train or not heldout:
        raise ValueError(
            f"{len(train)} texts to train on and {len(heldout)} held out ({heldout_share:.0%}): give more texts."
        )
    return train, heldout


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose one special token begins a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BEGIN], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BEGIN, eos_token=BEGIN, pad_token=BEGIN, clean_up_tokenization_spaces=False
    )


class Rows(Dataset):
    """Rows (window,) of token ids, each its own label."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids  # (rows, window)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, window: int, seed: int) -> Rows:
    """Lay the texts end to end, shuffled and each after a begin token; what the last row lacks comes from the front.

    Special tokens written out in a text are encoded as plain characters.
    """
    order = np.random.default_rng(seed).permutation(len(texts))
    shuffled = [texts[int(index)] for index in order]
    encoded = tokenizer(shuffled, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    begin = tokenizer.bos_token_id
    flat = np.concatenate([[begin, *ids] for ids in encoded])
    rows = -(-len(flat) // window)
    return Rows(torch.from_numpy(np.resize(flat, (rows, window))))
