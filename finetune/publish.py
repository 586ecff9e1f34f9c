"""A model that has learnt something more, in a folder of its own beside the one that it came from."""

import os
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from duet_moe.configuration.configuration_duet_moe import DuetMoeConfig
from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM


def refuse_existing(out: str | Path) -> Path:
    """Return `out` as a path.

    Raises:
        FileExistsError: if it exists.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; name a new folder.")
    return out


def publish(model: DuetMoeForCausalLM, tokenizer: PreTrainedTokenizerBase, source: str | Path, out: Path) -> None:
    """Save `model` in the dtype of the checkpoint `source`, so that what has not learnt stays; `out` appears whole."""
    unfinished = out.with_name(f"unfinished-{out.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.to(DuetMoeConfig.from_pretrained(source).dtype or torch.float32).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    os.replace(unfinished, out)
