"""The `duet` program: exit statuses, JSON, and what is not there yet."""

import json
from pathlib import Path

import pytest

from duet_moe.cli import LATER, main, make_parser


@pytest.fixture
def saved(tmp_path: Path, tiny_writer) -> str:
    tiny_writer.model.save_pretrained(tmp_path / "model")
    tiny_writer.tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_write_prints_the_same_text_for_the_same_seed(saved: str, capsys: pytest.CaptureFixture) -> None:
    command = ["write", "Hello there", "--model", saved, "--max-new-tokens", "8", "--seed", "3"]
    texts = []
    for _ in range(2):
        assert main(command) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_write_json_has_evidence_for_every_token(saved: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["write", "Hello", "--model", saved, "--max-new-tokens", "5", "--mode", "factual", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["mode"] == "factual"
    assert len(answer["evidence"]) == len(answer["tokens"]) > 0


def test_compare_shows_both_modes(saved: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["compare", "Hello", "--model", saved, "--max-new-tokens", "5"]) == 0
    shown = capsys.readouterr().out
    assert "factual" in shown and "creative" in shown


def test_compare_json_is_keyed_by_mode(saved: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["compare", "Hello", "--model", saved, "--max-new-tokens", "4", "--seed", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"factual", "creative"}


def test_info_json_counts_every_parameter(saved: str, capsys: pytest.CaptureFixture, tiny_writer) -> None:
    assert main(["info", saved, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"]["total"] == sum(p.numel() for p in tiny_writer.model.parameters())
    assert facts["parameters"]["active"] < facts["parameters"]["active_both_heads"] < facts["parameters"]["total"]
    assert facts["bytes_on_disk"] > 0


def test_info_table_names_the_modes(saved: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["info", saved]) == 0
    assert "parameters: total" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["write", "   "], "prompt is empty"),
        (["write", "x", "--mode", "poetic"], "poetic"),
        (["write", "x", "--mode", "auto"], "no task router: choose a mode yourself"),
    ],
)
def test_a_bad_request_says_why_and_exits_with_1(
    saved: str, capsys: pytest.CaptureFixture, command: list[str], told: str
) -> None:
    assert main([*command, "--model", saved]) == 1
    assert told in capsys.readouterr().err


def test_a_missing_model_names_the_bundled_ones(capsys: pytest.CaptureFixture) -> None:
    assert main(["write", "x", "--model", "no-such-model"]) == 1
    assert "no-such-model" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["write"], ["sing"], ["write", "x", "--loud"]])
def test_wrong_use_exits_with_2(command: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    assert "usage: duet" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(LATER))
def test_later_commands_say_so(name: str, capsys: pytest.CaptureFixture) -> None:
    assert main([name, "--anything", "1"]) == 1
    assert "not in this version" in capsys.readouterr().err


def test_every_command_has_help(capsys: pytest.CaptureFixture) -> None:
    for name in ("write", "compare", "info", "pretrain", "convert", "export", "voice", "eval", "frontier", *LATER):
        with pytest.raises(SystemExit) as stop:
            make_parser().parse_args([name, "--help"])
        assert stop.value.code == 0
    assert "--recipe" in capsys.readouterr().out


def test_a_missing_library_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ImportError("needs bitsandbytes: pip install -U bitsandbytes")

    monkeypatch.setattr("duet_moe.DuetMoeForCausalLM.from_pretrained", fail)
    assert main(["info"]) == 1
    assert capsys.readouterr().err == "duet info: needs bitsandbytes: pip install -U bitsandbytes\n"
