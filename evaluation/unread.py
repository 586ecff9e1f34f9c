"""Find the documents that a model's training never read: text for an evaluator that is to judge it.

    python -m duet_moe.evaluation.unread --run runs/base runs/heads --data DATA --out unread/

A weighted mix goes through a small part of its largest sources. Which part follows from the recipe, the seed and the
position that `duet pretrain` keeps in its checkpoints, so it is worked out and not guessed: data or a recipe that has
changed since is refused. What shares sentences with text that was read, or that the recipes hold out, is left out too.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from duet_moe.finetune.corpus import Document, read_sources
from duet_moe.finetune.leaks import Split, without_leaks
from duet_moe.finetune.packing import Packer, TokenStore, encode_corpus
from duet_moe.finetune.settings import TrainingSettings, read_recipe
from duet_moe.finetune.tokenizer import load_tokenizer


def unread_texts(runs: Sequence[str | Path], data: str | Path, cache: str | Path) -> dict[str, list[str]]:
    """Return, by source, the plain texts that no run has read and that repeat nothing which one has read or held out.

    Args:
        runs: folders of `duet pretrain`, with their newest checkpoint.
        data: folder that the recipes' paths start from.
        cache: folder of tokenised text, as that of the runs.

    Raises:
        FileNotFoundError: if a folder is not that of a run.
        ValueError: if data, recipe or tokenizer are not those of the run.
    """
    offered: dict[str, set[str]] = {}
    known: set[str] = set()
    for run in map(Path, runs):
        tokenizer = load_tokenizer(run / "model")
        train, heldout = encode_corpus(read_sources(read_recipe(run / "recipe.yaml")), data, tokenizer, cache)
        read = _documents_read(run, train)
        known.update(text for store in heldout for text in _texts(store, range(len(store)), tokenizer))
        for store in train:
            name = store.source.name
            known.update(_texts(store, read[name], tokenizer))
            if store.source.kind == "text" and store.source.prompts is None:
                offered.setdefault(name, set()).update(_texts(store, range(len(store)), tokenizer))
    splits: dict[str, Split] = {"": ([], [Document(None, text) for text in known])}
    for name, texts in offered.items():
        splits[name] = ([Document(None, text) for text in sorted(texts)], [])
    fresh = without_leaks(splits)
    return {name: [document.response for document in fresh[name][0]] for name in offered}


def _documents_read(run: Path, train: Sequence[TokenStore]) -> dict[str, set[int]]:
    checkpoints = sorted(run.glob("checkpoint-*"))
    if not checkpoints:
        raise FileNotFoundError(f"{run} has no checkpoint-*: give a folder of `duet pretrain`.")
    world = len(list(checkpoints[-1].glob("packer-*.json")))
    settings = TrainingSettings(**read_recipe(run / "recipe.yaml")["training"])
    rows = settings.coherence_rows
    read: dict[str, set[int]] = {store.source.name: set() for store in train}
    for rank in range(world):
        packer = Packer(
            train,
            batch_size=settings.batch_size // world,
            seq_len=settings.seq_len,
            seed=settings.seed,
            coherence_rows=None if rows is None else rows // world,
            response_only=settings.response_only,
            rank=rank,
            world=world,
        )
        packer.load_state_dict(json.loads((checkpoints[-1] / f"packer-{rank}.json").read_text()))
        for name, documents in packer.documents_read().items():
            read[name] |= documents
    return read


def _texts(store: TokenStore, documents: Iterable[int], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the texts of documents, exactly; of a chat the prompt, a line break and the response."""
    texts = []
    for ids, start in map(store.document, documents):
        prompt, response = tokenizer.decode(ids[1 : start - 1]), tokenizer.decode(ids[start:-1])
        texts.append(f"{prompt}\n{response}" if prompt else response)
    return texts


def write_texts(texts: Mapping[str, Sequence[str]], out: str | Path) -> Path:
    """Write `NAME.jsonl` for every source into the new folder `out`; FileExistsError if it is there."""
    out, unfinished = Path(out), Path(f"{out}.unfinished")
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another folder.")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name, rows in texts.items():
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in rows]
        (unfinished / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    os.replace(unfinished, out)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Write what was never read, and say how much it is; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the texts that a model's training never read.")
    parser.add_argument("--run", nargs="+", required=True, help="folders of every run that the model came from")
    parser.add_argument("--data", required=True, help="folder that the recipes' paths start from")
    parser.add_argument("--out", required=True, help="new folder; gets a .jsonl file per source")
    parser.add_argument("--cache", default="runs/tokens", help="folder of tokenised text")
    arguments = parser.parse_args(argv)
    try:
        texts = unread_texts(arguments.run, arguments.data, arguments.cache)
        write_texts(texts, arguments.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, rows in texts.items():
        print(f"{name}: {len(rows)} texts, {sum(map(len, rows)):,} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
