"""`duet voice`: tables and JSON, damaged voices in sight, exit statuses."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tiny import tiny_model
from tiny_voice import make_card, make_voice

from duet_moe.cli import main
from duet_moe.finetune.voice_adapter import ADAPTER
from duet_moe.finetune.voices import VoiceStore


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_voice(tmp_path_factory.mktemp("built") / "acme")


@pytest.fixture
def store(tmp_path: Path, built: Path) -> VoiceStore:
    store = VoiceStore(tmp_path / "store")
    store.publish("acme", built)
    return store


def run(store: VoiceStore, *arguments: object) -> int:
    return main(["voice", str(arguments[0]), "--store", str(store.root), *map(str, arguments[1:])])


def add(store: VoiceStore, name: str, **card: object) -> Path:
    folder = Path(shutil.copytree(store.path("acme"), store.root / name))
    make_card(folder, name, **card).save(folder)
    return folder


def test_list_shows_whole_and_damaged_voices(store: VoiceStore, capsys: pytest.CaptureFixture) -> None:
    (add(store, "broken") / ADAPTER).write_bytes(b"")
    (add(store, "empty") / "voice.json").unlink()
    assert run(store, "list", "--json") == 0
    rows = {row.pop("name"): row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == ["acme", "broken", "empty"]
    assert (rows["acme"]["state"], rows["acme"]["base"], rows["acme"]["licence"]) == ("whole", "tiny", "cc0-1.0")
    assert rows["acme"]["bytes"] == sum(path.stat().st_size for path in store.path("acme").iterdir())
    assert "damaged" in rows["broken"]["state"] and "not a safetensors file" in rows["broken"]["state"]
    assert "damaged" in rows["empty"]["state"] and rows["empty"]["base"] is None


def test_the_list_is_a_table_for_people(
    store: VoiceStore, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    add(store, "loud", licence="[bold]mine[/bold]")
    assert run(store, "list") == 0
    shown = capsys.readouterr().out
    assert "acme" in shown and "whole" in shown and "[bold]mine[/bold]" in shown


def test_an_empty_store_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["voice", "list", "--store", str(tmp_path / "none")]) == 0
    assert "No voices in" in capsys.readouterr().out
    assert main(["voice", "list", "--store", str(tmp_path / "none"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert not (tmp_path / "none").exists()


def test_the_store_is_that_of_the_environment(
    store: VoiceStore, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUET_MOE_VOICES", str(store.root))
    assert main(["voice", "list", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["acme"]


def test_show_tells_the_card(
    store: VoiceStore, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(store, "show", "acme", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["figures"]["heldout_loss"]["after"] == 2.25 and facts["folder"] == str(store.path("acme"))
    assert run(store, "show", "acme") == 0
    shown = capsys.readouterr().out
    assert "Ana Lima" in shown and "corpus: words" in shown and "4,321" in shown


def test_no_card_moves_the_cursor(store: VoiceStore, capsys: pytest.CaptureFixture) -> None:
    add(store, "evil", figures={"note": "\x1b[2Jgone\r"})
    assert run(store, "show", "evil") == 0
    shown = capsys.readouterr().out
    assert "gone" in shown and "\x1b[2J" not in shown and "\r" not in shown


def test_delete_takes_all_or_none(store: VoiceStore, capsys: pytest.CaptureFixture) -> None:
    add(store, "b")
    assert run(store, "delete", "acme", "nobody") == 1
    assert "nobody" in capsys.readouterr().err
    assert store.names() == ["acme", "b"]
    assert run(store, "delete", "acme", "b") == 0
    assert store.names() == []


def test_export_and_import(store: VoiceStore, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    archive = tmp_path / "acme.zip"
    assert run(store, "export", "acme", archive) == 0
    assert run(store, "import", archive) == 1
    assert "--replace" in capsys.readouterr().err
    assert run(store, "import", archive, "--replace") == 0
    assert run(store, "import", archive, "--name", "second") == 0
    assert store.names() == ["acme", "second"]
    store.check("second")


def test_merge_takes_a_base(store: VoiceStore, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny_model().save_pretrained(tmp_path / "tiny")
    assert run(store, "merge", "acme", tmp_path / "out", "--base", tmp_path / "tiny") == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert run(store, "merge", "acme", tmp_path / "out2") == 1
    assert "'tiny'" in capsys.readouterr().err  # the card's base, which is not bundled


def test_score_reports_the_share(
    store: VoiceStore, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts.txt"
    assert run(store, "score", "acme", texts) == 1
    assert "style.json" in capsys.readouterr().err
    (store.path("acme") / "style.json").write_text("{}")

    class Scorer:
        accuracy = 0.95

        @classmethod
        def load(cls, folder: Path) -> "Scorer":
            assert folder == store.path("acme")
            return cls()

        def probabilities(self, texts: list[str]) -> np.ndarray:
            return np.array([0.9, 0.2])

        def share(self, texts: list[str]) -> float:
            return 0.5

    scores, corpus = ModuleType("style_score"), ModuleType("voice_corpus")
    scores.StyleScorer = Scorer
    corpus.read_texts = lambda path: ["Hot bread!", "A cold report."] if path == texts else []
    monkeypatch.setitem(sys.modules, "duet_moe.finetune.style_score", scores)
    monkeypatch.setitem(sys.modules, "duet_moe.finetune.voice_corpus", corpus)
    assert run(store, "score", "acme", texts, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"voice": "acme", "texts": 2, "share": 0.5, "accuracy": 0.95, "probabilities": [0.9, 0.2]}
    assert run(store, "score", "acme", texts) == 0
    shown = capsys.readouterr().out
    assert "50.0%" in shown and "0.900" in shown and "Hot bread!" in shown


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["sing"],
        ["show"],
        ["show", "../x"],
        ["delete"],
        ["delete", "a.b"],
        ["export", "acme"],
        ["import", "x.zip", "--name", "a/b"],
        ["list", "--loud"],
    ],
)
def test_wrong_use_exits_with_2(command: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["voice", *command])
    assert stop.value.code == 2
    assert "usage: duet" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["show", "no"], ["delete", "no"], ["export", "no", "x.zip"], ["import", "no.zip"]]
)
def test_a_failure_exits_with_1_and_says_why(
    store: VoiceStore, command: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert run(store, *command) == 1
    error = capsys.readouterr().err
    assert error.startswith("duet voice: ") and "'no" in error


@pytest.mark.parametrize("name", ["list", "show", "delete", "export", "import", "merge", "score"])
def test_every_command_has_help_and_a_store(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["voice", name, "--help"])
    assert stop.value.code == 0
    assert "--store" in capsys.readouterr().out
