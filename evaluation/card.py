"""Measure a checkpoint and write its model card.

    python -m duet_moe.evaluation.card --checkpoint duet-mini --data DATA

The figures go to `evaluation.json` in the checkpoint's folder, what is told of its training to `history.md` and
`notes.md`, and the card, which `duet_moe.modeling.hub` makes of all three, to `README.md`. Without `--data` nothing is
measured and the card is written from what is there.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
import transformers

from duet_moe.evaluation.measure import creative_diversity, fact_accuracy, held_out_prompts, speed, text_loss
from duet_moe.finetune.corpus import read_sources
from duet_moe.finetune.packing import encode_corpus
from duet_moe.finetune.settings import read_recipe
from duet_moe.modeling.checkpoints import locate
from duet_moe.modeling.hub import write_card
from duet_moe.modeling.info import describe
from duet_moe.modeling.writer import Writer

CREATIVE_SOURCES = ("written_stories", "written_short", "written_dialogue")


def measure(writer: Writer, recipe: str, data: str, cache: str, quick: bool = False, seed: int = 0) -> dict:
    """Return every figure of the card as plain data; `quick` measures a tenth, to try the path."""
    sources = read_sources(read_recipe(recipe))
    share = 10 if quick else 1
    prompts = held_out_prompts(sources, data, CREATIVE_SOURCES, 50 // share)
    facts = next(source for source in sources if source.holdout == "wording")
    _, heldout = encode_corpus(sources, data, writer.tokenizer, cache)
    figures: dict = {"seed": seed, "date": date.today().isoformat(), "environment": environment()}
    steps = {
        "model": lambda: describe(writer.model),
        "speed": lambda: speed(writer),
        "facts": lambda: fact_accuracy(writer, facts, data, limit=2000 // share, seed=seed),
        "loss": lambda: text_loss(writer, heldout, documents=200 // share),
        "diversity": lambda: creative_diversity(writer, prompts, samples=8, seed=seed),
        "samples": lambda: samples(writer, prompts[:10], seed),
    }
    for name, step in steps.items():
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        figures[name] = step()
    return figures


def samples(writer: Writer, prompts: Sequence[str], seed: int) -> dict[str, list[dict[str, str]]]:
    """Return one unselected answer to every prompt in both modes."""
    table = {}
    for mode in ("factual", "creative"):
        answers = writer.write_batch(prompts, mode=mode, max_new_tokens=120, seed=seed)
        table[mode] = [{"prompt": a.prompt, "text": a.text} for a in answers]
    return table


def environment() -> dict[str, str]:
    """Return the hardware and versions that the figures were measured on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "cpu": f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; returns the exit status."""
    parser = argparse.ArgumentParser(description="Measure a checkpoint and write its model card.")
    parser.add_argument("--checkpoint", default="duet-mini", help="bundled name or folder")
    parser.add_argument("--recipe", default="mini", help="recipe whose sources and held-out sides are used")
    parser.add_argument("--data", help="folder that the recipe's paths start from; measures nothing when not given")
    parser.add_argument("--cache", default="runs/tokens", help="folder of tokenised text")
    parser.add_argument("--history", help="text file that says how the checkpoint was trained; kept in the folder")
    parser.add_argument("--notes", help="text file about use, limits and data; kept in the folder")
    parser.add_argument("--quick", action="store_true", help="measure a tenth, to try the path")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    folder = Path(locate(arguments.checkpoint))
    told = {"history.md": arguments.history, "notes.md": arguments.notes}
    files = {name: Path(path).read_text() for name, path in told.items() if path is not None}
    if arguments.data is not None:
        figures = measure(
            Writer.load(folder), arguments.recipe, arguments.data, arguments.cache, arguments.quick, arguments.seed
        )
        files["evaluation.json"] = json.dumps(figures, indent=1) + "\n"
    for name, content in files.items():
        unfinished = folder / f".{name}.unfinished"
        unfinished.write_text(content)
        os.replace(unfinished, folder / name)
    print(f"The card is {write_card(folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
