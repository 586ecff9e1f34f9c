"""Training runs on a corpus of a few sentences: they learn, survive a kill, skip what is not finite, and export."""

import copy
import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from tiny import SENTENCES, tiny_model, tiny_tokenizer
from torch import nn

import duet_moe
from duet_moe import DuetMoeForCausalLM, Writer
from duet_moe.finetune.corpus import Document, Source
from duet_moe.finetune.heldout import heldout_losses
from duet_moe.finetune.packing import Packer, TokenStore
from duet_moe.finetune.pretrain import Trainer, pretrain

pytest.importorskip("accelerate", reason="training needs the `finetune` extra")
ROOT = Path(duet_moe.__file__).resolve().parent.parent
MODEL = dict(
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    sliding_window=8,
    max_position_embeddings=128,
    plan_size=4,
)
TRAINING = dict(
    steps=8,
    batch_size=4,
    seq_len=32,
    lr=0.01,
    matrix_lr=0.02,
    warmup_steps=2,
    compile=False,
    precision="no",
    eval_every=1000.0,
    eval_documents=4,
    checkpoint_every=1000.0,
    experts_per_tok={1: 0.2, 2: 0.5, 4: 0.3},
)


@pytest.fixture
def recipe(tmp_path: Path) -> dict:
    """A recipe over a folder of prose and one of questions, with a tokenizer of its own."""
    data = tmp_path / "data"
    data.mkdir()
    prose = [f"{sentence} Story {number}." for number in range(30) for sentence in SENTENCES]
    chats = [{"prompt": f"What is {a} + {b}?", "response": f"It is {a + b}."} for a in range(9) for b in range(9)]
    (data / "prose.txt").write_text("<|endoftext|>".join(prose))
    (data / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return {
        "model": MODEL,
        "tokenizer": str(tmp_path / "tokenizer"),
        "training": dict(TRAINING),
        "sources": [
            {"name": "prose", "path": "prose.txt", "weight": 1, "head": "diversity", "holdout": 0.1},
            {"name": "chats", "path": "chats.jsonl", "weight": 1, "head": "coherence", "kind": "chat", "holdout": 0.1},
        ],
    }


def trainer(recipe: dict, tmp_path: Path, out: str = "run", **changes: object) -> Trainer:
    recipe = recipe | {"training": recipe["training"] | changes}
    return Trainer(recipe, tmp_path / "data", tmp_path / out, cache=tmp_path / "tokens")


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def log_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_loss_of_both_heads_goes_down_and_the_run_leaves_a_trace(recipe: dict, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "run"
    folder = pretrain(str(tmp_path / "recipe.yaml"), str(tmp_path / "data"), str(out), max_steps=40)
    log = log_of(out)
    assert [int(row["step"]) for row in log] == list(range(1, 41))
    for name in ("coherence_loss", "diversity_loss"):
        assert float(log[-1][name]) < 0.7 * float(log[0][name])
    heldout = json.loads((out / "heldout.jsonl").read_text().splitlines()[-1])
    assert heldout["heldout"].keys() == {"prose", "chats"}
    assert heldout["heldout"]["chats"]["coherence"] < float(log[0]["coherence_loss"])
    assert yaml.safe_load((out / "recipe.yaml").read_text())["sources"] == recipe["sources"]
    assert folder == out / "model"


def test_the_exported_model_is_the_trained_one_in_bf16_and_writes(recipe: dict, tmp_path: Path) -> None:
    run = trainer(recipe, tmp_path, steps=2)
    folder = run.run()
    loaded = DuetMoeForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    rounded = {name: weight.to(torch.bfloat16) for name, weight in weights(run.model).items()}
    assert same_weights(weights(loaded), rounded)
    assert loaded.generation_config.modes.keys() == {"factual", "creative", "hybrid"}
    assert "AutoModel" in json.loads((folder / "config.json").read_text())["auto_map"]
    written = Writer.load(folder).write("What is 1 + 1?", mode="factual", max_new_tokens=4)
    assert len(written.tokens) > 0
    again = Trainer(
        run.recipe, tmp_path / "data", tmp_path / "next", start_from=str(folder), cache=tmp_path / "tokens"
    )
    assert same_weights(weights(again.model), {name: weight.float() for name, weight in rounded.items()})
    assert again.step == 0


# A run that takes a checkpoint after step 3, trains two more steps, and is then killed halfway through its next one.
KILLED = """
import sys, time, yaml
from pathlib import Path
import torch
from duet_moe.finetune.pretrain import Trainer
recipe, data, out, cache = yaml.safe_load(open(sys.argv[1])), *sys.argv[2:]
trainer = Trainer(recipe, data, out, cache=cache)
train_step = trainer._train_step
def save_half(state, path):
    Path(path).write_bytes(b"half a checkpoint")
    print("ready", flush=True)
    time.sleep(600)
def watched_step():
    if trainer.step == 3:
        trainer.save_checkpoint()
    if trainer.step == 5:
        torch.save = save_half
        trainer.save_checkpoint()
    return train_step()
trainer._train_step = watched_step
trainer.run()
"""


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_very_same_weights(recipe: dict, tmp_path: Path) -> None:
    whole = trainer(recipe, tmp_path, "whole")
    whole.run()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = [str(tmp_path / name) for name in ("recipe.yaml", "data", "killed", "tokens")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    lines = iter(child.stdout.readline, "")
    ready = any(line.strip() == "ready" for line in lines)
    child.send_signal(signal.SIGKILL)
    _, errors = child.communicate()
    assert ready, errors
    out = tmp_path / "killed"
    assert {path.name for path in out.glob("*-00*")} == {"checkpoint-0000003", "unfinished-0000005"}
    assert len(log_of(out)) == 5

    resumed = trainer(recipe, tmp_path, "killed")
    resumed.run()
    assert same_weights(weights(resumed.model), weights(whole.model))
    assert not list(out.glob("unfinished-*"))
    assert [row["step"] for row in log_of(out)] == [str(step) for step in range(1, 9)]
    for first, second in zip(log_of(tmp_path / "whole"), log_of(out), strict=True):
        assert {**first, "seconds": ""} == {**second, "seconds": ""}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_saves_where_it_is(
    recipe: dict, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background starts without it
    run = trainer(recipe, tmp_path)
    train_step = run._train_step

    def step() -> dict[str, float]:
        if run.step == 2:
            signal.raise_signal(number)
        return train_step()

    monkeypatch.setattr(run, "_train_step", step)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.run()
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    assert [path.name for path in (tmp_path / "run").glob("*-00*")] == ["checkpoint-0000002"]


def test_a_finished_run_starts_no_further_step(recipe: dict, tmp_path: Path) -> None:
    first = trainer(recipe, tmp_path, steps=2)
    first.run()
    again = trainer(recipe, tmp_path, steps=2)
    again.run()
    assert (again.step, again.tokens) == (2, first.tokens)
    assert same_weights(weights(first.model), weights(again.model))
    assert len(log_of(tmp_path / "run")) == 2


def test_only_the_two_newest_checkpoints_are_kept_and_half_written_ones_ignored(recipe: dict, tmp_path: Path) -> None:
    run = trainer(recipe, tmp_path, steps=4, checkpoint_every=1e-9)
    half = tmp_path / "run" / "unfinished-0000009"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half a checkpoint")
    run.run()
    names = sorted(path.name for path in (tmp_path / "run").glob("*-00*"))
    assert names == ["checkpoint-0000003", "checkpoint-0000004"]


class Poisoned(nn.Module):
    """Passes the objective through, notes the weights at every call, and spoils the call number `at`."""

    def __init__(self, objective: nn.Module, at: int, where: str) -> None:
        super().__init__()
        self.objective, self.at, self.where = objective, at, where
        self.seen: list[dict[str, torch.Tensor]] = []

    def forward(self, *args: object) -> dict[str, torch.Tensor]:
        self.seen.append(weights(self.objective))
        losses = self.objective(*args)
        if len(self.seen) == self.at:
            if self.where == "loss":
                losses["loss"] = losses["loss"] * float("nan")
            else:
                losses["loss"].register_hook(lambda gradient: gradient * float("inf"))
        return losses


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(recipe: dict, tmp_path: Path, where: str) -> None:
    run = trainer(recipe, tmp_path, steps=4)
    run.objective = poisoned = Poisoned(run.objective, 2, where)
    run.run()
    first, second, third, fourth = poisoned.seen
    assert not same_weights(first, second)
    assert same_weights(second, third)
    assert not same_weights(third, fourth)
    assert all(weight.isfinite().all() for weight in weights(run.model).values())
    assert [row["skipped"] for row in log_of(tmp_path / "run")] == ["0", "1", "1", "1"]


def test_one_head_trains_a_single_head_and_ends_with_two_equal_ones(recipe: dict, tmp_path: Path) -> None:
    run = trainer(recipe, tmp_path, steps=3, one_head=True)
    before = weights(run.model)
    loaded = DuetMoeForCausalLM.from_pretrained(run.run(), dtype=torch.float32)
    coherence, diversity = weights(loaded.coherence_head), weights(loaded.diversity_head)
    assert same_weights(coherence, {name: weight for name, weight in diversity.items() if name != "plan_proj.weight"})
    assert torch.equal(coherence["unembed.weight"], loaded.model.embed_tokens.weight)
    assert not torch.equal(run.model.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    ids = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        assert torch.equal(loaded(ids, head_mix=0.0).logits, loaded(ids, head_mix=1.0).logits)
    assert {row["diversity_loss"] for row in log_of(tmp_path / "run")} == {"0.0"}


@pytest.mark.parametrize("response_only", [False, True])
def test_only_responses_are_learned_when_asked(recipe: dict, tmp_path: Path, response_only: bool) -> None:
    recipe = recipe | {"sources": recipe["sources"][1:]}
    run = trainer(recipe, tmp_path, steps=1, response_only=response_only, experts_per_tok=None)
    model, packer = copy.deepcopy(run.model), copy.deepcopy(run.packer)
    run.run()
    batch = next(packer)
    total, count, tokenizer = 0.0, 0, run.tokenizer
    for row, documents in zip(batch["input_ids"], batch["document_ids"], strict=True):
        for number in range(int(documents.max()) + 1):
            ids = row[documents == number]
            start = int((ids == tokenizer.convert_tokens_to_ids("<|assistant|>")).nonzero()[0]) if response_only else 0
            with torch.no_grad():
                logits = model(ids[None], head_mix=0.0).logits[0, start:-1]
            total += float(F.cross_entropy(logits, ids[start + 1 :], reduction="sum"))
            count += len(ids) - start - 1
    (logged,) = log_of(tmp_path / "run")
    assert int(logged["tokens"]) == count
    assert float(logged["coherence_loss"]) == pytest.approx(total / count, rel=1e-4)


def test_heldout_loss_is_each_heads_own_on_whole_texts_and_on_responses() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    documents = [
        Document("What is 1 + 1?", "It is 2."),
        Document(None, SENTENCES[0]),
        Document("Hi", "Good day, fox!"),
    ]
    store = TokenStore.of(Source("all", "all", 1), documents, tokenizer)
    found = heldout_losses(model.train(), [store], documents=10, max_tokens=24)["all"]
    totals, count = {"coherence": 0.0, "diversity": 0.0}, 0
    for index in range(3):
        ids, start = store.document(index)
        ids = torch.from_numpy(ids[:24].astype(np.int64))
        for mix, name in enumerate(totals):
            with torch.no_grad():
                logits = model.eval()(ids[None], head_mix=float(mix)).logits[0, start - 1 : -1]
            totals[name] += float(F.cross_entropy(logits, ids[start:], reduction="sum"))
        count += len(ids) - start
    assert found["tokens"] == count
    for name, total in totals.items():
        assert found[name] == pytest.approx(total / count, rel=1e-4)


def test_packing_settings_reach_the_packer(recipe: dict, tmp_path: Path) -> None:
    run = trainer(recipe, tmp_path, coherence_rows=3)
    assert isinstance(run.packer, Packer)
    assert next(run.packer)["head"].tolist() == [0, 0, 0, 1]


@pytest.mark.slow
def test_two_processes_train_one_model(recipe: dict, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "duet_moe.cli", "pretrain", "--recipe", str(tmp_path / "recipe.yaml")]
    command += ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("The model is in") == 1
    steps = TRAINING["steps"]
    assert [row["step"] for row in log_of(tmp_path / "run")] == [str(step + 1) for step in range(steps)]
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    states = [json.loads((checkpoint / f"packer-{rank}.json").read_text()) for rank in (0, 1)]
    assert states[0] != states[1]
    DuetMoeForCausalLM.from_pretrained(tmp_path / "run" / "model")
