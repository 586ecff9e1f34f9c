"""Training settings and recipes check themselves; progress speaks where no terminal is."""

from pathlib import Path

import pytest

from duet_moe.finetune.progress import Progress
from duet_moe.finetune.settings import TrainingSettings, read_recipe


def test_the_rate_warms_up_and_falls_along_a_cosine() -> None:
    settings = TrainingSettings(steps=110, warmup_steps=10, final_lr_ratio=0.2)
    scales = [settings.lr_scale(step) for step in range(110)]
    assert scales[0] == pytest.approx(0.1)
    assert scales[9] == scales[10] == pytest.approx(1.0)
    assert settings.lr_scale(60) == pytest.approx(0.6)
    assert settings.lr_scale(110) == pytest.approx(0.2)
    assert all(earlier >= later for earlier, later in zip(scales[10:], scales[11:], strict=False))


@pytest.mark.parametrize(
    "change, told",
    [
        ({"steps": 0}, "steps is 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"precision": "fp8"}, "'fp8'.*'bf16'"),
        ({"final_lr_ratio": 2}, "final_lr_ratio is 2"),
    ],
)
def test_impossible_training_settings_are_refused(change: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        TrainingSettings(**({"steps": 5} | change))


@pytest.mark.parametrize("name", ["mini", "mini-heads", "mini-anneal", "mini-sft"])
def test_the_bundled_recipes_can_be_read(name: str) -> None:
    recipe = read_recipe(name)
    assert TrainingSettings(**recipe["training"]).steps > 0
    assert len(recipe["sources"]) > 3


def test_recipes_that_cannot_be_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="'no-such'.*mini"):
        read_recipe("no-such")
    path = tmp_path / "mine.yaml"
    path.write_text("training: {steps: 3}\n")
    with pytest.raises(ValueError, match="training and sources"):
        read_recipe(path)
    path.write_text("training: {steps: 3, epochs: 2}\nsources: mini\n")
    with pytest.raises(ValueError, match="epochs.*batch_size"):
        read_recipe(path)


def test_progress_tells_where_the_run_is_when_there_is_no_terminal(capsys: pytest.CaptureFixture) -> None:
    with Progress(4, step=2) as progress:
        progress.update(3, {"loss": 1.5})
        progress.update(4, {"loss": 1.25, "lr_scale": 0.3})
        progress.say("done")
    assert capsys.readouterr().out.splitlines() == ["step 4/4  loss 1.250  0.0 min left", "done"]
    with Progress(4, show=False) as progress:
        progress.update(4, {"loss": 1.0})
        progress.say("done")
    assert capsys.readouterr().out == ""
