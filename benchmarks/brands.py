"""Train a voice for each of the four example brands and print what its report says, as one table.

    python benchmarks/brands.py

Trains with `--recipe standard` (another with `--recipe`) into a temporary store. The time is that of the whole
command: corpus checks, trunk states, training, proofs, classifier, and answers before and after. A result file with
hardware and versions goes to `benchmarks/results/`.
"""

import argparse
import tempfile
import time
from pathlib import Path

from result_file import write_result

from duet_moe.finetune.style import train_voice
from duet_moe.finetune.voices import VoiceStore

EXAMPLES = Path(__file__).resolve().parent.parent / "finetune" / "examples"
BRANDS = ("halden", "northpine", "volt", "zuzu")
ROWS = {
    "whole command, seconds": lambda f: f"{f['seconds']:.0f}",
    "training, seconds": lambda f: f"{f['training_seconds']:.1f}",
    "training, thousand targets/s": lambda f: f"{f['targets_per_second'] / 1000:.1f}",
    "epochs": lambda f: f"{f['epochs']:.0f}",
    "adapter, bytes": lambda f: f"{f['adapter_bytes']:,}",
    "held-out loss, base": lambda f: f"{f['heldout_loss_before']:.3f}",
    "held-out loss, voice": lambda f: (
        f"{f['heldout_loss_after']:.3f} ({f['heldout_loss_after'] / f['heldout_loss_before'] - 1:+.1%})"
    ),
    "classifier, accuracy (balanced)": lambda f: f"{f['style_accuracy']:.1%} ({f['style_balanced_accuracy']:.1%})",
    "held-out texts taken for the brand": lambda f: f"{f['style_share_heldout']:.0%}",
    "answers taken for it, base": lambda f: f"{f['style_share_before']:.0%}",
    "answers taken for it, voice": lambda f: f"{f['style_share_after']:.0%}",
    "distinct-2, base": lambda f: f"{f['distinct_2_before']:.3f}",
    "distinct-2, voice": lambda f: f"{f['distinct_2_after']:.3f}",
    "answers with 8 words of the corpus": lambda f: f"{f['copied_share_after']:.0%}",
    "held-out texts with 8 words of it": lambda f: f"{f['copied_share_heldout']:.0%}",
    "longest copy, words": lambda f: f"{f['longest_copy']}",
    "factual mode bit-identical": lambda f: "proved",  # or nothing would have been published
}


def measure(brand: str, recipe: str, store: Path) -> dict[str, object]:
    """Train one brand's voice and return its figures and its first answers."""
    folder = EXAMPLES / brand
    started = time.monotonic()
    made = train_voice(
        folder / "train.jsonl",
        brand,
        recipe=recipe,
        store=store,
        heldout=folder / "heldout.jsonl",
        neutral=folder / "neutral.jsonl",
        show=False,
    )
    seconds = time.monotonic() - started
    size = (made / "adapter_model.safetensors").stat().st_size
    return {"seconds": seconds, "adapter_bytes": size} | VoiceStore(store).card(brand).figures


def main() -> None:
    """Train all four and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="standard", help="quick, standard, careful or a YAML file (standard)")
    recipe = parser.parse_args().recipe
    with tempfile.TemporaryDirectory() as store:
        figures = {brand: measure(brand, recipe, Path(store)) for brand in BRANDS}
    print("|  | " + " | ".join(BRANDS) + " |", "|---" + "|---:" * len(BRANDS) + "|", sep="\n")
    for label, shown in ROWS.items():
        print(f"| {label} | " + " | ".join(shown(figures[brand]) for brand in BRANDS) + " |")
    write_result("brands", {"recipe": recipe, "brands": figures}, ("peft", "scikit-learn"))


if __name__ == "__main__":
    main()
