"""Every block of docs/neighbours.md runs as it stands, in order, in one empty folder."""

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "neighbours.md").read_text(encoding="utf-8")
SECTIONS = dict(section.split("\n", 1) for section in TEXT.split("\n## ")[1:])
NEEDS = {"TRL": "trl", "PEFT": "trl", "accelerate": "accelerate", "lm-eval": "lm_eval"}  # PEFT loads what TRL saved
SHOWS = {
    "accelerate": "Lisbon",
    "torch.compile": "Lisbon",
    "transformers pipeline": "Lisbon",
    "torch.export": "[1, 3, ",
}


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", SECTIONS[section], re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("neighbours")


@pytest.mark.parametrize("section", [name for name in SECTIONS if "```python" in SECTIONS[name]])
def test_the_examples_run(
    section: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    if section in NEEDS:
        pytest.importorskip(NEEDS[section], reason=f"{NEEDS[section]} is not installed")
    monkeypatch.chdir(folder)
    # Only the graphs are made here; test_neighbours.py compiles one to machine code.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for code in blocks(section, "python"):
        assert len([line for line in code.splitlines() if line]) <= 10
        exec(code, {})  # noqa: S102
    assert SHOWS.get(section, "") in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_of_lm_eval_runs() -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'duet-moe[eval]'")
    command, *_ = blocks("lm-eval", "bash")
    program, *arguments = shlex.split(command.replace("\\\n", " "))
    assert program == "python"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments, "--limit", "1"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"duet_facts_written\|.*contains_answer", done.stdout)


def test_the_commands_for_those_who_are_online_are_ones_that_lm_eval_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = pytest.importorskip("lm_eval._cli", reason="lm-eval is not installed: pip install 'duet-moe[eval]'")
    tasks = Path(harness.__file__).parent.parent / "tasks"
    lines = [line for line in blocks("lm-eval", "bash")[-1].splitlines() if "lm_eval_model" in line]
    assert len(lines) == 3
    for line in lines:
        _, arguments = line.split("lm_eval_model ")
        monkeypatch.setattr(sys, "argv", ["lm_eval", *shlex.split(arguments)])
        parsed = harness.HarnessCLI().parse_args()
        assert parsed.model == "duet_moe"
        assert (tasks / "".join(parsed.tasks)).is_dir()
