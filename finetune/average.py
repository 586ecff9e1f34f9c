"""Average the weights of models that went on from the same one: a "model soup".

    python -m duet_moe.finetune.average runs/heads/model runs/anneal/model runs/sft/model --out runs/average

Runs that start from one model stay in one basin, where the mean of their weights often does better on unseen text than
any of them (Wortsman et al., "Model soups", ICML 2022, https://arxiv.org/abs/2203.05482; the uniform soup).
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from duet_moe.finetune.pretrain import save_model
from duet_moe.finetune.tokenizer import load_tokenizer
from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM


@torch.no_grad()
def average(models: Sequence[str | Path], out: str | Path) -> Path:
    """Write the mean of the models' weights, taken in float32 and saved in bf16, to `out`, with the first's tokenizer.

    Args:
        models: two or more folders of models with equal configurations and tokenizers.
        out: folder that must not exist yet.

    Raises:
        ValueError: for fewer than two models, or models that differ in configuration or tokenizer.
        FileExistsError: if `out` exists.
    """
    if len(models) < 2:
        raise ValueError(f"{len(models)} model(s) given; an average takes two or more.")
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; name a new folder.")
    first, *others = models
    tokenizer = load_tokenizer(first)
    mean = DuetMoeForCausalLM.from_pretrained(first, dtype=torch.float32)
    for count, other in enumerate(others, start=2):
        model = DuetMoeForCausalLM.from_pretrained(other, dtype=torch.float32)
        _refuse_different(str(first), str(other), mean.config.to_dict(), model.config.to_dict())
        _refuse_different(str(first), str(other), tokenizer.get_vocab(), load_tokenizer(other).get_vocab())
        for total, weight in zip(mean.parameters(), model.parameters(), strict=True):
            total.lerp_(weight, 1 / count)
    unfinished = out.with_name(f"unfinished-{out.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    save_model(mean, tokenizer, unfinished)
    os.replace(unfinished, out)
    return out


def _refuse_different(first: str, other: str, wanted: dict, found: dict) -> None:
    names = [name for name in wanted | found if name != "_name_or_path" and wanted.get(name) != found.get(name)]
    if names:
        name = names[0]
        raise ValueError(
            f"{other} has {name}={found.get(name)!r} where {first} has {wanted.get(name)!r}; "
            "only models of one configuration and one tokenizer can be averaged."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m duet_moe.finetune.average", description="Average models' weights."
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder of a model")
    parser.add_argument("--out", required=True, help="new folder for the mean")
    options = parser.parse_args(arguments)
    try:
        print(f"The model is in {average(options.models, options.out)}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
