"""A trained voice changes the diversity head and nothing else, whatever happens on the way."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny, tiny_model, tiny_tokenizer, tokens
from tiny_voice import recorded_starts

from duet_moe import DuetMoeForCausalLM
from duet_moe.finetune import style, voice_job
from duet_moe.finetune.corpus import Document
from duet_moe.finetune.features import collate, trunk_states
from duet_moe.finetune.style import adapted, train_voice
from duet_moe.finetune.voice_recipe import VoiceRecipe
from duet_moe.finetune.voices import VoiceStore
from duet_moe.modeling.voice_files import WrongBaseError

ROWS = [
    {"prompt": f"Say line {i}.", "response": f"Boing number {i}! The {w} fox hops over the {w} moon and sings a song."}
    for i, w in enumerate(
        "red big old new wet dry hot shy sly coy raw fat fit mad sad odd wry tan low icy".split() * 2
    )
]
RECIPE = VoiceRecipe(rank=4, epochs=3, samples_per_prompt=1, lr=1e-2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duet_moe.finetune.voice_report.ANSWER_TOKENS", 8)


def train(base: Path, store: Path, name: str = "fox", **changes: object) -> Path:
    return train_voice(ROWS, name, str(base), **({"recipe": RECIPE, "store": store, "show": False} | changes))


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(base, tmp_path_factory.mktemp("store"))


def test_a_voice_is_learnt_published_and_leaves_no_trace_of_its_making(trained: Path, base: Path) -> None:
    store = VoiceStore(trained.parent)
    assert store.names() == ["fox"]
    store.check("fox")
    card = store.card("fox")
    assert card.base["name"] == base.name
    assert card.figures["heldout_loss_after"] < 0.95 * card.figures["heldout_loss_before"]
    assert str(base.parent) not in (trained / "adapter_config.json").read_text() + (trained / "voice.json").read_text()
    told = "".join((trained / name).read_text() for name in ("voice.json", "README.md", "style.json"))
    assert not any(row["prompt"] in told or row["response"] in told for row in ROWS)
    assert not list((trained.parent / ".training").iterdir())
    assert 0 <= card.figures["style_share_after"] <= 1
    assert any(sample["before"] != sample["after"] for sample in card.figures["samples"])


def test_factual_mode_is_bit_identical_and_creative_is_not(trained: Path, base: Path) -> None:
    model, ids = DuetMoeForCausalLM.from_pretrained(base), tokens(2, 12)
    before = {mix: model(ids, head_mix=mix).logits for mix in (0.0, 1.0)}
    model.load_voice(trained)
    voice = torch.tensor([0, 0])
    assert torch.equal(model(ids, head_mix=0.0, voice=voice).logits, before[0.0])
    assert not torch.allclose(model(ids, head_mix=1.0, voice=voice).logits, before[1.0], atol=1e-2)


@pytest.mark.parametrize("method", ["rslora", "dora"])
def test_other_methods_are_learnt_too(base: Path, tmp_path: Path, method: str) -> None:
    recipe = VoiceRecipe(method=method, rank=4, epochs=2, samples_per_prompt=1, layers=("down_proj", "unembed"))
    voice = train(base, tmp_path, recipe=recipe)
    settings = json.loads((voice / "adapter_config.json").read_text())
    assert [settings[f"use_{name}"] for name in ("rslora", "dora")] == [method == "rslora", method == "dora"]
    figures = VoiceStore(tmp_path).card("fox").figures
    assert figures["heldout_loss_after"] < figures["heldout_loss_before"]


def test_the_same_seed_gives_the_same_voice_and_another_does_not(trained: Path, base: Path, tmp_path: Path) -> None:
    same, other = train(base, tmp_path, "same"), train(base, tmp_path, "other", seed=1)
    digest = [
        hashlib.sha256((f / "adapter_model.safetensors").read_bytes()).hexdigest() for f in (trained, same, other)
    ]
    assert digest[0] == digest[1] != digest[2]


CHILD = """
import sys
from test_style import RECIPE, ROWS
from duet_moe.finetune import voice_report
from duet_moe.finetune.style import train_voice
import torch
torch.set_num_threads(1)
voice_report.ANSWER_TOKENS = 8
train_voice(ROWS, "fox", sys.argv[1], RECIPE, sys.argv[2], show=False)
"""


@pytest.mark.slow
def test_a_training_that_is_killed_goes_on_to_the_very_same_voice(
    trained: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(base), str(tmp_path)], env=environment)
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob(".training/fox-*/checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < deadline, "the training ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert VoiceStore(tmp_path).names() == []
    started = recorded_starts(monkeypatch)
    train(base, tmp_path)
    assert "checkpoint-" in str(started[0])
    expected = load_file(trained / "adapter_model.safetensors")
    found = load_file(tmp_path / "fox" / "adapter_model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_best_epoch_is_published_not_the_last(base: Path, tmp_path: Path) -> None:
    # unlike the corpus, so that after a while learning the one is unlearning the other
    heldout = [Document(f"Count {i}.", f"Mars has {i} moons, and {i} + {i} is {2 * i} in {place}.") for i, place in
               enumerate(("Lisbon", "Rome", "Oslo", "Paris", "Quito", "Lima"))]  # fmt: skip
    recipe = VoiceRecipe(rank=4, epochs=12, patience=2, samples_per_prompt=1, lr=0.03)
    rows = [{"prompt": document.prompt, "response": document.response} for document in heldout]
    voice = train_voice(ROWS, "fox", str(base), recipe, tmp_path, heldout=rows, show=False)
    figures = VoiceStore(tmp_path).card("fox").figures
    assert 2 < figures["epochs"] < 12  # it stopped early, two epochs after its best
    model = DuetMoeForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False)
    model.load_voice(voice)
    states = trunk_states(model, heldout, tiny_tokenizer(), tmp_path / "states", show=False)
    batch = collate([states[index] for index in range(len(states))])
    loss = model(**batch, head_mix=1.0, voice=torch.tensor([0])).loss.item()
    assert loss == pytest.approx(figures["heldout_loss_after"], abs=1e-4)


def test_only_the_diversity_head_may_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = adapted(tiny_model(), VoiceRecipe(rank=2))
    assert all("diversity_head" in name for name, p in tuned.named_parameters() if p.requires_grad)
    monkeypatch.setattr(VoiceRecipe, "target_modules", property(lambda _: ["gate_proj"]))  # both heads have one
    with pytest.raises(RuntimeError, match="coherence_head.*would be trained too"):
        adapted(tiny_model(), VoiceRecipe(rank=2))


def test_dora_on_a_layer_of_zeros_is_refused_and_lora_learns_it() -> None:
    model = tiny_model()
    torch.nn.init.zeros_(model.diversity_head.down_proj.weight)
    with pytest.raises(ValueError, match="down_proj of this head has rows of zeros"):
        adapted(model, VoiceRecipe(rank=2, method="dora"))
    tuned = adapted(model, VoiceRecipe(rank=2, method="dora", layers=("gate_proj", "unembed")))
    assert torch.isfinite(tuned(tokens(1, 4), head_mix=1.0).logits).all()
    adapted(tiny_model(), VoiceRecipe(rank=2, method="dora"))
    adapted(model, VoiceRecipe(rank=2))


def test_a_changed_factual_mode_is_not_published(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = style._fit

    def sabotaged(job, model, *arguments):  # type: ignore[no-untyped-def]
        tuned, figures = fit(job, model, *arguments)
        model.coherence_head.unembed.weight.data[0, 0] += 1e-3
        return tuned, figures

    monkeypatch.setattr(style, "_fit", sabotaged)
    with pytest.raises(RuntimeError, match="Factual mode has changed on"):
        train(base, tmp_path)
    assert VoiceStore(tmp_path).names() == []


def test_a_full_disk_leaves_the_old_voice(
    trained: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = VoiceStore(tmp_path)
    store.publish("fox", trained)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(voice_job, "_save_adapter", full)
    with pytest.raises(OSError, match="No space"):
        train(base, tmp_path, replace=True, seed=3)
    store.check("fox")
    assert not list(tmp_path.glob(".training/*built*"))


def test_bad_names_and_names_that_are_taken_are_refused_before_any_work(
    trained: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(style, "read_voice_corpus", lambda *_, **__: pytest.fail("the corpus was read"))
    with pytest.raises(ValueError, match="no name for a voice"):
        train(base, tmp_path, "../fox")
    with pytest.raises(FileExistsError, match="There is a voice 'fox'"):
        train(base, trained.parent)
    assert not list(tmp_path.iterdir())


def test_a_voice_of_another_base_is_refused(trained: Path) -> None:
    other = tiny_model(seed=1, vocab_size=len(tiny_tokenizer()))
    with pytest.raises(WrongBaseError):
        other.load_voice(trained)


def test_a_voice_learnt_on_a_4_bit_trunk_speaks_on_the_whole_one_too(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tokenizer, base = tiny_tokenizer(), tmp_path / "wide"
    tiny_model(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64).bfloat16().save_pretrained(base)
    tokenizer.save_pretrained(base)
    voice = train(base, tmp_path / "store", load_in_4bit=True)
    card = VoiceStore(voice.parent).card("fox")
    assert card.figures["heldout_loss_after"] < card.figures["heldout_loss_before"]
    assert card.base["hashes"]["trunk"] is None
    assert DuetMoeForCausalLM.from_pretrained(base).load_voice(voice) == "fox"
