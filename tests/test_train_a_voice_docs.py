"""The first page of docs/train-a-voice.md works as it stands, up to the length of the training."""

import re
import shlex
from pathlib import Path

import pytest

from duet_moe.cli import main

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "train-a-voice.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_first_voice_is_trained_shown_and_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DUET_MOE_VOICES", str(tmp_path))
    monkeypatch.setattr("duet_moe.finetune.voice_report.ANSWER_TOKENS", 8)
    (tmp_path / "one-epoch.yaml").write_text("epochs: 1\nsamples_per_prompt: 1\n")
    commands = re.search(r"```bash\n(.*?)```", TEXT, re.DOTALL)[1].replace("\\\n", " ").splitlines()
    assert commands[0].startswith("pip install")
    for command in commands[1:]:
        program, *arguments = shlex.split(command)
        assert program == "duet"
        short = ["--recipe", str(tmp_path / "one-epoch.yaml")] if "train" in arguments else []
        assert main([*arguments, *short]) == 0
    said = capsys.readouterr().out
    assert re.search(r"Held-out loss: 5\.\d+ before, [45]\.\d+ after", said)
    assert "adapter sha256" in said
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1], names)
    assert [text.voice for text in names["both"]] == ["volt", None]
    assert names["both"][0].text != names["both"][1].text


@pytest.mark.slow
def test_the_cells_of_the_example_run_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("duet_moe.finetune.voice_report.ANSWER_TOKENS", 8)
    monkeypatch.setattr("duet_moe.finetune.voice_recipe.RECIPES", tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("quick", "prefer"):
        (tmp_path / f"voice-{name}.yaml").write_text("epochs: 1\nsamples_per_prompt: 1\ndropout: 0.0\n")
    exec((ROOT / "finetune" / "examples" / "train_a_voice.py").read_text(encoding="utf-8"), {})
    said = capsys.readouterr().out
    assert re.search(r"held-out loss 5\.\d+ -> [45]\.\d+", said)
    assert "The capital of Portugal is Lisbon. == The capital of Portugal is Lisbon." in said
    assert re.search(r"chosen answers likelier \d+% -> \d+%", said) and "imported as zuzu-two" in said
    assert {path.name for path in tmp_path.iterdir()} == {"voice-quick.yaml", "voice-prefer.yaml"}


def test_every_option_of_the_page_exists(capsys: pytest.CaptureFixture) -> None:
    for command in ("train", "prefer"):
        with pytest.raises(SystemExit):
            main(["voice", command, "--help"])
    help_text = capsys.readouterr().out
    for option in set(re.findall(r"(?<=[ `])--[a-z][a-z0-9-]+", TEXT)) - {"--mode", "--nproc"}:
        assert option in help_text, option
