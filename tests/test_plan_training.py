"""Training plans: made of what rare words say, learnt where they tell the words; nothing else of the model moves."""

import copy
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny import save_tiny, tiny_model, tiny_tokenizer, tokens

from duet_moe import DuetMoeForCausalLM, Writer
from duet_moe.finetune.corpus import Document
from duet_moe.finetune.plans import (
    PASSAGE,
    PlanSettings,
    fit_planner,
    main,
    passages,
    plan_losses,
    plan_model,
    train_plans,
)
from duet_moe.modeling.plans import DuetMoePlanner

TOPICS = ("sea", "moon", "door", "hill", "cat", "fox", "café", "Mars")


class Passages:
    """Passages in memory, as `TrunkStates` hands them out."""

    def __init__(self, labels: Sequence[torch.Tensor], states: Sequence[torch.Tensor]) -> None:
        self.labels, self.states = labels, states

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"trunk_states": self.states[index], "shift_labels": self.labels[index]}


def of_topics(model: DuetMoeForCausalLM, count: int, seed: int, length: int = 24) -> Passages:
    """Return passages of the words of one of ten topics each, after states that say nothing of it."""
    generator = torch.Generator().manual_seed(seed)
    labels, states = [], []
    for index in range(count):
        topic = 7 + 9 * (index % 10)
        labels.append(topic + torch.randint(9, (length,), generator=generator))
        states.append(torch.randn(length, model.config.hidden_size, generator=generator))
    return Passages(labels, states)


@pytest.fixture
def planned() -> DuetMoeForCausalLM:
    model = tiny_model(plan_bank_size=4).requires_grad_(False)
    torch.nn.init.zeros_(model.diversity_head.plan_proj.weight)
    return model


def vectors_of(model: DuetMoeForCausalLM) -> torch.Tensor:
    return model.coherence_head.unembed.weight


def test_axes_have_unit_variance_on_their_passages_and_are_not_correlated(planned: DuetMoeForCausalLM) -> None:
    states = of_topics(planned, 60, seed=0)
    plans = fit_planner(planned.planner, states, vectors_of(planned), [])
    assert plans.shape == (60, 8)
    torch.testing.assert_close(plans.mean(0), torch.zeros(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(plans.T @ plans / 60, torch.eye(8), rtol=0, atol=1e-3)


def test_plans_are_what_the_planner_makes_of_the_same_tokens(planned: DuetMoeForCausalLM) -> None:
    states = of_topics(planned, 40, seed=0)
    states.labels[3] = torch.full((5,), 3)  # special: it says nothing
    plans = fit_planner(planned.planner, states, vectors_of(planned), [3])
    for index in (0, 3, 17):
        expected = planned.planner.of_tokens(states.labels[index], vectors_of(planned))
        torch.testing.assert_close(plans[index], expected)
    assert torch.equal(plans[3], torch.zeros(8))


def test_rare_words_weigh_more_by_hand_and_special_or_unseen_ones_nothing(planned: DuetMoeForCausalLM) -> None:
    states = of_topics(planned, 40, seed=0)
    for index, labels in enumerate(states.labels):
        labels[0] = 6  # in every passage
        labels[1] = 3  # special
        labels[2] = 5 if index < 3 else 6
    fit_planner(planned.planner, states, vectors_of(planned), [3])
    weights = planned.planner.token_weights
    assert weights[5] == pytest.approx(math.log(40 / 4))
    assert weights[6] == weights[3] == weights[0] == 0.0
    shares = torch.tensor([sum(bool((labels == token).any()) for labels in states.labels) for token in range(97)])
    said = [token for token in range(7, 97) if shares[token]]
    assert min(shares[said]) < max(shares[said])
    rarest_first = sorted(said, key=lambda token: -weights[token])
    assert shares[rarest_first].tolist() == sorted(shares[said].tolist())


def test_passages_that_span_too_little_are_refused(planned: DuetMoeForCausalLM) -> None:
    few = of_topics(planned, 8, seed=0)
    with pytest.raises(ValueError, match="8 passages span 7 axes, and plans have 8: give more text"):
        fit_planner(planned.planner, few, vectors_of(planned), [])
    same = Passages([few.labels[0]] * 30, [few.states[0]] * 30)
    with pytest.raises(ValueError, match="30 passages span 0 axes"):
        fit_planner(planned.planner, same, vectors_of(planned), [])


def test_a_plan_that_tells_the_words_is_followed_and_nothing_else_moves(planned: DuetMoeForCausalLM) -> None:
    states, others = of_topics(planned, 80, seed=0), of_topics(planned, 25, seed=1)
    plans = fit_planner(planned.planner, states, vectors_of(planned), [])
    own = torch.stack([planned.planner.of_tokens(labels, vectors_of(planned)) for labels in others.labels])
    before = copy.deepcopy(planned.state_dict())
    untaught = plan_losses(planned.diversity_head, others, own)
    train_plans(planned.diversity_head, states, plans, PlanSettings(steps=120, positions=256, lr=0.03), show=False)
    losses = plan_losses(planned.diversity_head, others, own)
    assert untaught["own plan"] == untaught["no plan"] == untaught["another's plan"] == losses["no plan"]
    assert losses["own plan"] < min(losses["no plan"], losses["another's plan"]) - 0.5
    changed = {name for name, value in planned.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"diversity_head.plan_proj.weight"}
    fresh = tiny_model(plan_bank_size=4)
    fresh.load_state_dict(before)
    ids = tokens(2, 9)
    with torch.no_grad():
        for mix in (0.0, 0.5, 1.0):
            plain = planned(ids, head_mix=mix).logits
            assert torch.equal(plain, fresh(ids, head_mix=mix).logits)
            assert torch.equal(planned(ids, head_mix=mix, plan=torch.zeros(2, 8)).logits, plain)
        assert torch.equal(planned(ids, head_mix=0.0, plan=own[:2]).logits, planned(ids, head_mix=0.0).logits)
        assert not torch.equal(planned(ids, head_mix=1.0, plan=own[:2]).logits, plain)


def test_a_loss_is_the_models_own_mean_over_targets(planned: DuetMoeForCausalLM) -> None:
    torch.nn.init.normal_(planned.diversity_head.plan_proj.weight, std=0.2)
    states = of_topics(planned, 4, seed=0)
    states.labels[1], states.states[1] = states.labels[1][:5], states.states[1][:5]
    plans = torch.randn(4, 8)
    losses = plan_losses(planned.diversity_head, states, plans)
    for name, shown in {"own plan": plans, "no plan": None, "another's plan": plans[[2, 3, 0, 1]]}.items():
        nats = []
        for index in range(4):
            plan = None if shown is None else shown[index : index + 1]
            logits = planned(trunk_states=states.states[index][None], head_mix=1.0, plan=plan).logits[0]
            nats.append(torch.nn.functional.cross_entropy(logits, states.labels[index], reduction="none"))
        assert losses[name] == pytest.approx(float(torch.cat(nats).mean()), abs=1e-4), name


def test_the_same_seed_learns_the_same_and_few_passages_do(planned: DuetMoeForCausalLM) -> None:
    states, plans = of_topics(planned, 3, seed=0), torch.randn(3, 8)
    learnt = []
    for seed in (0, 0, 1):
        head = copy.deepcopy(planned.diversity_head)
        train_plans(head, states, plans, PlanSettings(steps=3, positions=100, seed=seed), show=False)
        learnt.append(head.plan_proj.weight)
    assert torch.equal(learnt[0], learnt[1]) and not torch.equal(learnt[0], learnt[2])


def test_training_goes_on_from_a_head_that_follows_plans_already(planned: DuetMoeForCausalLM) -> None:
    torch.nn.init.normal_(planned.diversity_head.plan_proj.weight, std=0.2)
    before = planned.diversity_head.plan_proj.weight.clone()
    settings = PlanSettings(steps=1, positions=24, lr=1e-6)
    train_plans(planned.diversity_head, of_topics(planned, 3, seed=0), torch.randn(3, 8), settings, show=False)
    torch.testing.assert_close(planned.diversity_head.plan_proj.weight, before, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name, bad", [("passages", 0), ("bank", 0), ("steps", 1.5), ("lr", 0.0), ("noise", -0.1), ("dropout", 1.0)]
)
def test_a_setting_that_cannot_be_is_refused(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={bad}"):
        PlanSettings(**{name: bad})


def story(index: int, sentences: int = 60) -> str:
    """Return a story of its own words about one topic, in whole sentences, with a paragraph and speech."""
    generator = np.random.default_rng(index)
    topic = TOPICS[index % len(TOPICS)]
    words = [f"{topic} sang to the {other} of tale {index}" for other in generator.choice(TOPICS, sentences)]
    ends = generator.choice([".", "!", '."', "?”"], sentences)
    marks = generator.choice([" ", "\n\n"], sentences)
    parts = [f"The {text}{end}{mark}" for text, end, mark in zip(words, ends, marks, strict=True)]
    return "".join(parts).strip()


def test_passages_are_whole_sentences_of_about_the_length_as_they_stand_in_the_text() -> None:
    texts = [story(index) for index in range(3)]
    found = passages([Document(None, text) for text in texts], 100, seed=0)
    assert len(found) == 3 * (60 * 8 // (8 * math.ceil(PASSAGE / 8)))
    for passage in found:
        assert passage.prompt is None
        assert any(passage.response in text for text in texts)  # line breaks and all
        assert passage.response.startswith("The ") and passage.response.endswith((".", "!", '."', "?”"))
        assert PASSAGE <= len(passage.response.split()) < PASSAGE + 10
    assert any("\n\n" in passage.response for passage in found)


def test_speech_inside_a_sentence_does_not_end_it_and_a_tail_is_left_out() -> None:
    sentence = 'He wrote "the sea" and "the moon" on the old door. '
    found = passages([Document(None, sentence * 30)], 9, seed=0)
    assert {passage.response for passage in found} == {(sentence * math.ceil(PASSAGE / 11)).strip()}
    assert len(found) == 30 // math.ceil(PASSAGE / 11)


def test_passages_come_of_plain_texts_alone_and_are_drawn_by_seed() -> None:
    documents = [Document(None, story(index)) for index in range(6)]
    chats = [Document("Tell a tale.", story(9))]
    every = passages([*documents, *chats], 1000, seed=0)
    assert not any("tale 9." in passage.response for passage in every)
    some = [passages(documents, 5, seed=seed) for seed in (0, 0, 1)]
    assert some[0] == some[1] != some[2] and all(len(draw) == 5 for draw in some)
    assert passages(chats, 5, seed=0) == passages([Document(None, "Too short.")], 5, seed=0) == []


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with stories, and the recipe that names them."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [json.dumps({"text": story(index)}) for index in range(40)]
    (folder / "stories.jsonl").write_text("\n".join(lines))
    (folder / "facts.jsonl").write_text(json.dumps({"text": "A fact. " * 200}))
    entry = {"name": "stories", "path": "stories.jsonl", "weight": 1, "head": "diversity", "holdout": 0.3}
    fact = {"name": "facts", "path": "facts.jsonl", "weight": 1, "head": "coherence"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"sources": [entry, fact]}))
    return folder


@pytest.fixture
def command(data: Path, tmp_path: Path) -> list[str]:
    save_tiny(tmp_path / "base", max_position_embeddings=512)
    model = DuetMoeForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    torch.nn.init.zeros_(model.diversity_head.plan_proj.weight)
    model.save_pretrained(tmp_path / "base")
    named = {
        "checkpoint": tmp_path / "base",
        "data": data,
        "recipe": data / "recipe.yaml",
        "cache": tmp_path / "cache",
    }
    return [text for name, path in named.items() for text in (f"--{name}", str(path))]


def run_quickly(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    settings = PlanSettings(**({"passages": 40, "bank": 16, "steps": 20, "positions": 256} | changes))
    monkeypatch.setattr("duet_moe.finetune.plans.PlanSettings", lambda: settings)


def test_the_command_writes_a_whole_model_that_draws_plans(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run_quickly(monkeypatch)
    out = tmp_path / "new" / "planned"
    assert main([*command, "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passages"] == 40 and report["held out"] == 2
    assert report["nats"].keys() == {"own plan", "no plan", "another's plan"}
    assert not list(out.parent.glob("unfinished-*"))
    before, after = (DuetMoeForCausalLM.from_pretrained(path) for path in (tmp_path / "base", out))
    assert before.dtype == after.dtype == torch.bfloat16 and after.config.plan_bank_size == 16
    moved = {
        name
        for name, value in after.state_dict().items()
        if name not in before.state_dict() or not torch.equal(value, before.state_dict()[name])
    }
    assert moved == {
        "diversity_head.plan_proj.weight",
        *(f"planner.{name}" for name in ("token_weights", "projection", "offset", "bank")),
    }
    assert isinstance(after.planner, DuetMoePlanner) and len(after.planner.bank.unique(dim=0)) == 16
    assert Writer.load(out).plan("The fox sang to the moon.").shape == (1, 8)
    assert main([*command, "--out", str(out)]) == 1
    assert "exists; name a new folder" in capsys.readouterr().err


def test_the_report_is_also_for_people(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run_quickly(monkeypatch, steps=1, bank=1000)
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "Learnt from 40 passages; nats per token on 2 others:"
    assert [line.split(":")[0].strip() for line in shown[1:4]] == ["own plan", "no plan", "another's plan"]
    assert DuetMoeForCausalLM.from_pretrained(tmp_path / "out").config.plan_bank_size == 40  # of fewer, all


def test_texts_that_are_to_be_left_out_are(
    command: list[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def look(model: DuetMoeForCausalLM, documents: list, *_: object) -> None:
        seen.extend(document.response for document in documents)
        raise InterruptedError("enough is seen")

    monkeypatch.setattr("duet_moe.finetune.plans.trunk_states", look)
    judge = tmp_path / "judge"
    judge.mkdir()
    lines = [json.dumps({"text": story(index).upper()}) for index in range(0, 40, 2)]
    (judge / "texts.jsonl").write_text("\n".join(lines))
    with pytest.raises(InterruptedError, match="enough is seen"):
        plan_model(tmp_path / "base", data, tmp_path / "out", data / "recipe.yaml", tmp_path, judge, show=False)
    numbers = {int(text.split(" of tale ")[1].split()[0].strip('.!?"”')) for text in seen}
    assert numbers and all(number % 2 for number in numbers)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"head": "coherence"}, "0 passages of 150 words to learn from"),
        ({"holdout": 0.0}, "0 passages of 150 words are held out"),
        ({"path": "missing.jsonl"}, "no .* file matches 'missing.jsonl'"),
    ],
)
def test_texts_that_are_not_enough_are_refused_and_nothing_is_written(
    change: dict, told: str, command: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    entry = {"name": "stories", "path": "stories.jsonl", "weight": 1, "head": "diversity", "holdout": 0.3} | change
    (data / "recipe.yaml").write_text(yaml.safe_dump({"sources": [entry]}))
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert re.search(f"error: .*{told}", shown) and not (tmp_path / "out").exists()


def test_a_head_that_takes_no_plans_is_refused(data: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tiny_model(vocab_size=len(tokenizer), plan_size=0).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="plan_size=0: its diversity head takes no plans"):
        plan_model(tmp_path / "plain", data, tmp_path / "out", data / "recipe.yaml", tmp_path, show=False)
