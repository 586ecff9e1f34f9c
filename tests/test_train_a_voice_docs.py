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


def test_every_option_of_the_page_exists(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["voice", "train", "--help"])
    help_text = capsys.readouterr().out
    for option in set(re.findall(r"(?<=[ `])--[a-z][a-z0-9-]+", TEXT)) - {"--mode", "--voice"}:
        assert option in help_text, option
