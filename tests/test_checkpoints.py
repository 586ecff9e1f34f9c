"""Of the checkpoints that a killed training leaves, the newest whole one is taken."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from duet_moe.finetune.checkpoints import last_whole_checkpoint


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    save_file({"a": torch.zeros(100)}, path / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"a": torch.zeros(100)}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def test_the_newest_is_taken_by_number(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        checkpoint(tmp_path, step)
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-100"


WRITTEN = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize(
    ("file", "damage"),
    [*((name, "cut") for name in WRITTEN), *((name, "absent") for name in WRITTEN if "adapter" not in name)],
)
def test_a_broken_one_is_removed_and_the_one_before_taken(tmp_path: Path, file: str, damage: str) -> None:
    checkpoint(tmp_path, 5)
    broken = checkpoint(tmp_path, 10) / file
    if damage == "cut":
        broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    else:
        broken.unlink()
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-5"
    assert not broken.parent.exists()


def test_without_any_there_is_none(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(tmp_path / "absent") is None
