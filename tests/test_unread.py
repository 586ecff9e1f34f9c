"""What no run has read: worked out from a run's checkpoint, and the same as its batches show."""

import json
from pathlib import Path

import pytest
import yaml
from tiny import tiny_tokenizer

from duet_moe.evaluation.unread import main, unread_texts
from duet_moe.finetune.corpus import read_sources
from duet_moe.finetune.packing import Packer, encode_corpus

STORIES = [f"Story {number} is about a fox who found {number * 7} moons in the sea." for number in range(60)]
LONG = [
    f"Long ago the {animal} of the north went over the hill to look for a door that nobody had closed.\n"
    f"All through the night the {animal} of the north sang to the moon, and no one in the town could sleep.\n"
    f"In the morning the {animal} of the north came home with a lantern, a spoon and a very small orange cat."
    for animal in ("bear", "owl")
]
TRAINING = {"steps": 3, "batch_size": 2, "seq_len": 64, "coherence_rows": 1, "seed": 5}


def sources(**changes: object) -> list[dict]:
    stories = {"name": "stories", "path": "stories.jsonl", "weight": 3, "head": "both", "holdout": 0.1}
    chats = {"name": "chats", "path": "chats.jsonl", "weight": 1, "head": "coherence", "kind": "chat", "holdout": 0}
    return [stories | changes, chats]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "stories.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in STORIES))
    (folder / "chats.jsonl").write_text(json.dumps({"prompt": "Who?", "response": "A fox."}))
    return folder


def train(
    tmp_path: Path, name: str, rows: list[dict], batches: int, ranks: int = 1, **training: object
) -> tuple[Path, set[str]]:
    """Draw the batches of a run, leave its folder as `duet pretrain` does, and return it and the texts drawn."""
    run, settings = tmp_path / name, TRAINING | training
    checkpoint = run / "checkpoint-0000003"
    checkpoint.mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump({"training": settings, "sources": rows}))
    tiny_tokenizer().save_pretrained(run / "model")
    stores, _ = encode_corpus(
        read_sources({"sources": rows}), tmp_path / "data", tiny_tokenizer(), tmp_path / "tokens"
    )
    said = ""
    for rank in range(ranks):
        packer = Packer(
            stores, batch_size=settings["batch_size"] // ranks, seq_len=64, seed=settings["seed"], rank=rank,
            world=ranks, coherence_rows=1,
        )  # fmt: skip
        for _ in range(batches):
            said += "".join(tiny_tokenizer().decode(row) for row in next(packer)["input_ids"])
        # pieces in waiting have been drawn, and would be read next
        waiting = [piece for lane in packer.state_dict()["lanes"] for piece in lane["buffer"]]
        said += "".join(tiny_tokenizer().decode(stores[piece[0]].document(piece[1])[0]) for piece in waiting)
        (checkpoint / f"packer-{rank}.json").write_text(json.dumps(packer.state_dict()))
    return run, {text for text in STORIES if text in said}


def offered(tmp_path: Path, *runs: Path) -> set[str]:
    return set(unread_texts(runs, tmp_path / "data", tmp_path / "tokens")["stories"])


def trained_side(tmp_path: Path) -> set[str]:
    stores, _ = encode_corpus(
        read_sources({"sources": sources()}), tmp_path / "data", tiny_tokenizer(), tmp_path / "tokens"
    )
    decoded = (tiny_tokenizer().decode(stores[0].document(i)[0][1:-1]) for i in range(len(stores[0])))
    return set(decoded)


def test_what_no_batch_had_is_left(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duet_moe.finetune.packing._BUFFER", 4)
    run, read = train(tmp_path, "run", sources(), batches=3)
    everything = trained_side(tmp_path)
    left = offered(tmp_path, run)
    assert left == everything - read
    assert 10 < len(left) < len(everything) - 10
    assert len(everything) < len(STORIES)  # what is held out is not offered either


def test_all_runs_that_a_model_came_from_count(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duet_moe.finetune.packing._BUFFER", 4)
    first, read = train(tmp_path, "first", sources(), batches=1)
    second, also_read = train(tmp_path, "second", sources(), batches=1, seed=6)
    assert offered(tmp_path, first, second) == trained_side(tmp_path) - read - also_read
    assert also_read - read


def test_all_processes_of_a_run_count(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duet_moe.finetune.packing._BUFFER", 4)
    run, read = train(tmp_path, "run", sources(), batches=1, ranks=2, batch_size=4, coherence_rows=2)
    assert offered(tmp_path, run) == trained_side(tmp_path) - read


def test_after_a_whole_epoch_nothing_is_left(data: Path, tmp_path: Path) -> None:
    run, _ = train(tmp_path, "run", sources(), batches=60)
    assert offered(tmp_path, run) == set()


def test_texts_that_a_question_was_asked_about_are_left_out(data: Path, tmp_path: Path) -> None:
    (data / "more.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in LONG))
    rows = [*sources(), {"name": "more", "path": "more.jsonl", "weight": 1e-6, "head": "coherence", "holdout": 0}]
    run, _ = train(tmp_path, "run", rows, batches=2)  # which reads the first that it draws, and no more
    (left,) = unread_texts([run], data, tmp_path / "tokens")["more"]
    (data / "chats.jsonl").write_text(json.dumps({"prompt": f"{left}\nWho sang?", "response": "Nobody."}))
    run, _ = train(tmp_path, "asked", rows, batches=2)
    assert unread_texts([run], data, tmp_path / "tokens")["more"] == []


def test_texts_that_repeat_what_a_run_held_out_are_left_out(data: Path, tmp_path: Path) -> None:
    # each run's own hold-out: what the second keeps for its measurements, the first has neither read nor kept
    rows = [{"name": "more", "path": "more.jsonl", "weight": 1e-6, "head": "coherence", "holdout": 0}]
    (data / "more.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in LONG))
    first, _ = train(tmp_path, "first", [*sources(), *rows], batches=2)
    (left,) = unread_texts([first], data, tmp_path / "tokens")["more"]
    (data / "kept.jsonl").write_text(json.dumps({"text": f"{left}\nThe end."}))
    kept = {"name": "kept", "path": "kept.jsonl", "weight": 1, "holdout": 1 - 1e-9}
    second, _ = train(tmp_path, "second", [*sources(), kept], batches=2, seed=6)
    assert unread_texts([first, second], data, tmp_path / "tokens")["more"] == []


def test_sources_of_chats_and_made_up_prompts_offer_nothing(data: Path, tmp_path: Path) -> None:
    run, _ = train(tmp_path, "run", sources(), batches=1)
    assert unread_texts([run], data, tmp_path / "tokens").keys() == {"stories"}


def test_data_that_changed_since_is_refused(data: Path, tmp_path: Path) -> None:
    run, _ = train(tmp_path, "run", sources(), batches=1)
    with open(data / "stories.jsonl", "a") as file:
        file.writelines(f'\n{{"text": "One more, {number}."}}' for number in range(9))
    with pytest.raises(ValueError, match="same recipe, data"):
        offered(tmp_path, run)


def test_a_folder_without_a_run_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = train(tmp_path, "run", sources(), batches=1)
    (run / "checkpoint-0000003").rename(run / "other")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        offered(tmp_path, run)
    assert main(["--run", str(run), "--data", str(data), "--out", str(tmp_path / "out"), "--cache", "x"]) == 1
    assert "no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_writes_a_file_for_every_source(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("duet_moe.finetune.packing._BUFFER", 4)
    run, _ = train(tmp_path, "run", sources(), batches=3)
    command = ["--run", str(run), "--data", str(data), "--out", str(tmp_path / "out"), "--cache"]
    assert main([*command, str(tmp_path / "tokens")]) == 0
    lines = (tmp_path / "out" / "stories.jsonl").read_text().splitlines()
    assert {json.loads(line)["text"] for line in lines} == offered(tmp_path, run)
    assert f"stories: {len(lines)} texts" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "tokens")]) == 1  # the folder is there already
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["stories.jsonl"]
