"""A tiny evaluator learns, goes on after a kill to the very same weights, and says in its card what it is."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import SENTENCES
from transformers import LlamaForCausalLM, Trainer

from duet_moe.evaluation import train_evaluator as module
from duet_moe.evaluation.evaluator import Evaluator
from duet_moe.evaluation.evaluator_corpus import find_files, read_texts
from duet_moe.evaluation.train_evaluator import EvaluatorSettings, main, train_evaluator
from duet_moe.finetune.progress import Progress

pytest.importorskip("accelerate", reason="transformers.Trainer needs the `finetune` extra")
SETTINGS = EvaluatorSettings(
    vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, window=32,
    batch_size=4, lr=0.02, steps=30, heldout=0.1,
)  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    rows = [{"text": f"{sentence} It is story {number}."} for number in range(30) for sentence in SENTENCES]
    (folder / "stories.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the process, as far as a test can, when training reports `step`."""

    def update(self: Progress, at: int, row: dict[str, float]) -> None:
        if at == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "update", update)


def test_an_evaluator_learns_and_its_card_says_from_what(data: Path, tmp_path: Path) -> None:
    out = train_evaluator([data], tmp_path / "evaluator", settings=SETTINGS, note="All made up.", show=False)
    card = json.loads((out / "evaluator.json").read_text())
    train, heldout = read_texts(find_files([data]), SETTINGS.heldout)
    judge = Evaluator.load(str(out))
    bits, sizes = judge.bits_per_character(heldout), np.array([len(text) for text in heldout])
    assert card["heldout"]["bits_per_character"] == pytest.approx((bits * sizes).sum() / sizes.sum(), abs=1e-4)
    assert card["heldout"]["texts"] == len(heldout) and card["heldout"]["characters"] == sizes.sum()
    tokens = sum(len(ids) for ids in judge.tokenizer(heldout, add_special_tokens=False)["input_ids"])
    assert card["heldout"]["bits_per_character"] < 0.7 * tokens * math.log2(300) / sizes.sum()
    content = (data / "stories.jsonl").read_bytes()
    assert card["data"] == [{"file": "texts/stories.jsonl", "sha256": hashlib.sha256(content).hexdigest()}]
    assert card["texts"]["train"] == len(train) and card["texts"]["characters"] == sum(map(len, train))
    assert card["note"] == "All made up." and card["steps"] == 30 and card["settings"]["seed"] == 0
    assert card["parameters"] == LlamaForCausalLM.from_pretrained(out).num_parameters()
    assert card["training_seconds"] > 0 and {"cpu", "torch", "transformers"} <= card["environment"].keys()
    assert str(tmp_path) not in "".join(path.read_text() for path in out.glob("*.json"))
    assert [path.name for path in tmp_path.iterdir() if "evaluator" in path.name] == ["evaluator"]


def test_a_killed_run_goes_on_to_the_weights_of_a_whole_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_evaluator([data], tmp_path / "whole", settings=SETTINGS, show=False)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_at(15, patched)  # measured and saved at every third step, which it is about to do
        train_evaluator([data], tmp_path / "killed", settings=SETTINGS, show=False)
    assert not (tmp_path / "killed").exists()
    steps = []
    with monkeypatch.context() as patched:
        patched.setattr(Progress, "update", lambda self, step, row: steps.append(step))
        killed = train_evaluator([data], tmp_path / "killed", settings=SETTINGS, show=False)
    assert min(steps) == 15
    assert json.loads((killed / "evaluator.json").read_text())["seconds_from_step"] == 12
    assert same(killed, whole)


def test_another_seed_gives_other_weights(data: Path, tmp_path: Path) -> None:
    short = replace(SETTINGS, steps=2)
    first = train_evaluator([data], tmp_path / "first", settings=short, show=False)
    again = train_evaluator([data], tmp_path / "again", settings=short, show=False)
    other = train_evaluator([data], tmp_path / "other", settings=replace(short, seed=1), show=False)
    assert same(first, again) and not same(first, other)


def test_the_best_evaluation_is_kept(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = []
    evaluate = Trainer.evaluate

    def grows_worse(self: Trainer, *given: object, **named: object) -> dict[str, float]:
        evaluated.append({name: value.clone() for name, value in self.model.state_dict().items()})
        return evaluate(self, *given, **named) | {"eval_loss": abs(len(evaluated) - 2.0)}

    monkeypatch.setattr(Trainer, "evaluate", grows_worse)
    out = train_evaluator([data], tmp_path / "out", settings=SETTINGS, show=False)
    assert len(evaluated) == 10
    assert all(torch.equal(value, evaluated[1][name]) for name, value in weights(out).items())
    assert not torch.equal(evaluated[1]["model.norm.weight"], evaluated[-1]["model.norm.weight"])


def test_an_unfinished_run_is_not_mixed_with_other_data_or_settings(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_at(3, patched)
        train_evaluator([data], tmp_path / "out", settings=SETTINGS, show=False)
    with pytest.raises(ValueError, match="begun with other data or settings"):
        train_evaluator([data], tmp_path / "out", settings=replace(SETTINGS, lr=0.01), show=False)
    with open(data / "stories.jsonl", "a") as file:
        file.write('\n{"text": "One more story."}')
    with pytest.raises(ValueError, match="begun with other data or settings"):
        train_evaluator([data], tmp_path / "out", settings=SETTINGS, show=False)


def test_what_is_there_is_not_written_over(data: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError, match="taken exists"):
        train_evaluator([data], tmp_path / "taken", settings=SETTINGS, show=False)
    with pytest.raises(ValueError, match="minutes is 0"):
        train_evaluator([data], tmp_path / "new", 0, settings=SETTINGS, show=False)
    with pytest.raises(ValueError, match="steps is 0"):
        replace(SETTINGS, steps=0)
    assert not list(tmp_path.glob("*.unfinished"))


def test_steps_fill_the_minutes_and_are_fixed_when_a_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))  # every step takes two seconds
    tokenizer = module.train_tokenizer(SENTENCES, 300)
    model = LlamaForCausalLM(module._config(SETTINGS, tokenizer))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert module._fixed_steps(tmp_path, model, SETTINGS, minutes=3) == 90
    assert module._fixed_steps(tmp_path, model, SETTINGS, minutes=50) == 90
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_command_trains_and_says_what_it_did(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = []
    monkeypatch.setattr(module, "EvaluatorSettings", lambda **given: taken.append(given) or SETTINGS)
    with monkeypatch.context() as patched:
        stop_at(3, patched)
        assert main(["--data", str(data), "--out", str(tmp_path / "out")]) == 130
    assert "again to go on" in capsys.readouterr().err
    taken.clear()
    assert main(["--data", str(data), "--out", str(tmp_path / "out"), "--steps", "30", "--seed", "3"]) == 0
    assert taken == [{"steps": 30, "seed": 3}]
    said = capsys.readouterr().out
    assert "bits per character on" in said and "step 30/30" in said
    assert main(["--data", str(tmp_path / "absent"), "--out", str(tmp_path / "none")]) == 1
    assert "error: There is no" in capsys.readouterr().err
