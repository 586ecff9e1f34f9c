"""Give a checkpoint a gate, which weighs the heads token by token in modes with `gated`.

    python -m duet_moe.finetune.gate --checkpoint duet-mini --data data --out runs/gated

The gate learns within minutes (see gate_training.py), and nothing else of the model changes. It learns from documents
that a recipe holds out, and is measured on others of them: what the heads have learnt by heart says nothing of which
one to trust on new text (stacking, Wolpert 1992, https://doi.org/10.1016/S0893-6080(05)80023-1).
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from duet_moe.finetune.corpus import Document, Source, is_held_out, load_corpus, read_sources
from duet_moe.finetune.gate_training import GateReport, GateSettings, Split, train_gate
from duet_moe.finetune.publish import publish, refuse_existing
from duet_moe.finetune.tokenizer import load_tokenizer
from duet_moe.modeling.checkpoints import locate
from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM

HEAD_OF = {"creative": "diversity", "factual": "coherence"}  # kind of document -> head of its sources in a recipe


def documents_of(sources: Sequence[Source], data: str | Path, count: int = 1500, seed: int = 0) -> dict[str, Split]:
    """Return documents for `train_gate` by kind: held-out ones of the sources of the head that goes with it.

    About half of them are to learn from and half to report on; equal responses are on one side.

    Args:
        data: folder that the sources' paths start from.
        count: documents of each kind, drawn by the sources' weights; fewer where there are fewer.
    """
    corpus = load_corpus(sources, data)
    found: dict[str, Split] = {}
    for kind, head in HEAD_OF.items():
        drawn = _drawn([source for source in sources if source.head == head], corpus, count, seed)
        sides: Split = ([], [])
        for document in drawn:
            # a key of its own: that of the hold-out puts all that is held out on one side
            sides[is_held_out(f"gate: {document.response}", 0.5)].append(document)
        found[kind] = sides
    return found


def _drawn(
    sources: Sequence[Source], corpus: Mapping[str, tuple[list[Document], list[Document]]], count: int, seed: int
) -> list[Document]:
    sources = [source for source in sources if corpus[source.name][1]]
    total = sum(source.weight for source in sources)
    drawn: list[Document] = []
    for source in sources:
        heldout, wanted = corpus[source.name][1], math.ceil(count * source.weight / total)
        drawn += random.Random(f"{seed}-{source.name}").sample(heldout, min(wanted, len(heldout)))
    return drawn


def gate_checkpoint(
    source: str | Path,
    documents: Mapping[str, Split],
    out: str | Path,
    cache: str | Path = "runs/states",
    settings: GateSettings | None = None,
    show: bool = True,
) -> GateReport:
    """Write the model `source` with a trained gate to the new folder `out`; its modes stay as they are.

    Args:
        source: name of a bundled model, folder or Hub id; all else of it stays, in its dtype.
        documents, cache, settings: as in `train_gate`.

    Raises:
        FileExistsError: if `out` exists.
        ValueError: as in `train_gate`, or if the tokenizer is not one of ours.
    """
    out, source = refuse_existing(out), locate(source)
    tokenizer = load_tokenizer(source)
    model = DuetMoeForCausalLM.from_pretrained(source, dtype=torch.float32)
    report = train_gate(model, documents, tokenizer, cache, settings, show)
    publish(model, tokenizer, source, out)
    return report


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m duet_moe.finetune.gate", description="Train a gate; only the gate changes."
    )
    parser.add_argument("--checkpoint", required=True, help="name of a bundled model, folder or Hub id")
    parser.add_argument("--data", required=True, help="folder that the recipe's paths start from")
    parser.add_argument("--out", required=True, help="new folder for the model with its gate")
    parser.add_argument("--recipe", default="mini-sft", help="YAML file, or the name of one of ours, with the sources")
    parser.add_argument("--cache", default="runs/states", help="folder for the trunk's states (runs/states)")
    parser.add_argument("--documents", type=int, default=1500, help="held-out documents of each kind (1500)")
    parser.add_argument("--seed", type=int, default=0, help="of the documents drawn and of the training (0)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    try:
        sources = read_sources(options.recipe)
        report = gate_checkpoint(
            options.checkpoint,
            documents_of(sources, options.data, options.documents, options.seed),
            options.out,
            options.cache,
            GateSettings(seed=options.seed),
            show=not options.json,
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(report)) if options.json else report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
