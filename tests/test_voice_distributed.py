"""Two processes learn what one learns: data parallel by `train_voice` and `prefer_voice`, sharded by FSDP2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny

from duet_moe.finetune.voice_job import VoiceJob
from duet_moe.finetune.voice_recipe import VoiceRecipe
from duet_moe.finetune.voices import VoiceStore

SCRIPT = Path(__file__).with_name("torchrun_voices.py")
CLOSE = 2e-4  # sums in another order, then a dozen steps of AdamW


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("runs")
    save_tiny(folder / "tiny")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for world in (1, 2):
        command = [sys.executable, *(torchrun if world > 1 else []), str(SCRIPT), str(folder / "tiny")]
        done = subprocess.run([*command, str(folder / str(world))], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    return {world: folder / str(world) for world in (1, 2)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "loss"), [("fox", "heldout_loss"), ("taste", "preference_loss")])
def test_two_processes_make_the_voice_that_one_makes(stores: dict[int, Path], name: str, loss: str) -> None:
    figures = {world: VoiceStore(store).card(name).figures for world, store in stores.items()}
    for figure in (f"{loss}_before", f"{loss}_after", "steps", "epochs"):
        assert figures[2][figure] == pytest.approx(figures[1][figure], abs=CLOSE), figure
    assert figures[2][f"{loss}_after"] < 0.97 * figures[2][f"{loss}_before"]
    one, two = (load_file(stores[world] / name / "adapter_model.safetensors") for world in (1, 2))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=2e-3, msg=key)


@pytest.mark.slow
def test_sharded_adapters_learn_as_whole_ones_do(stores: dict[int, Path]) -> None:
    losses = {world: json.loads((store / "sharded.json").read_text()) for world, store in stores.items()}
    assert losses[2] == pytest.approx(losses[1], abs=CLOSE)
    assert losses[1][-1] < losses[1][0] - 0.2


@pytest.mark.parametrize(("world", "size"), [("1", 64), ("3", 8)])
def test_a_batch_that_cannot_be_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: str, size: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    job = VoiceJob("fox", "duet-mini", VoiceRecipe(batch_size=size), VoiceStore(tmp_path))
    with pytest.raises(ValueError, match=f"batch_size is {size}; a multiple of the {world} processes, at most 40, is"):
        job.trainer_settings(tmp_path, 40)
