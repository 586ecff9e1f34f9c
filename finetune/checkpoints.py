"""Checkpoints of `transformers.Trainer` that a killed process left: which of them are whole."""

import json
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open


def last_whole_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole `checkpoint-N` in `folder` and remove broken ones, which `Trainer` would fall over."""
    found = None
    numbered = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-[0-9]*")}
    for _, path in sorted(numbered.items()):
        if _is_whole(path):
            found = path
        else:
            shutil.rmtree(path)
    return found


def _is_whole(checkpoint: Path) -> bool:
    """Say whether all files can be read; `Trainer` writes its state last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        for file in checkpoint.glob("*.safetensors"):
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    written_by_torch = [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]
    names = {file.name.split("_")[0] for file in written_by_torch}
    return {"optimizer.pt", "scheduler.pt", "rng"} <= names and all(map(zipfile.is_zipfile, written_by_torch))
