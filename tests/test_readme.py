"""What README tells people to type works."""

import re
from pathlib import Path

import pytest

from duet_moe.cli import make_parser

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MAKEFILE = (Path(__file__).resolve().parent.parent / "Makefile").read_text()


def test_the_python_examples_run_in_order(capsys: pytest.CaptureFixture) -> None:
    assert len(PYTHON) >= 2
    names: dict[str, object] = {}
    for code in PYTHON:
        exec(code, names)  # noqa: S102
    assert capsys.readouterr().out.strip()


def test_every_duet_command_parses() -> None:
    commands = re.findall(r"`duet ([^`]+)`", README)
    assert commands
    for command in commands:
        words = re.findall(r'"[^"]*"|\S+', command)
        if words[0] in ("pretrain",) and len(words) == 1:
            continue
        make_parser().parse_args([word.strip('"') for word in words])


def test_every_make_target_and_linked_file_exists() -> None:
    for target in set(re.findall(r"`?make (\w+)", README)):
        assert re.search(rf"^[\w ]*\b{target}\b[\w ]*:", MAKEFILE, re.MULTILINE), target
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (Path(__file__).resolve().parent.parent / link).exists(), link
