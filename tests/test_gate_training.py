"""Training a gate: it finds the head to trust without being told, and nothing else of the model changes."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from test_gate import GREEDY
from tiny import save_tiny, tiny_model, tiny_tokenizer, tokens

from duet_moe import DuetMoeForCausalLM, Writer
from duet_moe.configuration.modes import BUILT_IN_MODES, modes_as_dict
from duet_moe.finetune import gate_training
from duet_moe.finetune.corpus import Document, read_sources
from duet_moe.finetune.gate import documents_of, main
from duet_moe.finetune.gate_training import GateSettings, Scored, bernoulli_divergence, train_gate
from duet_moe.finetune.settled import settled_tokens
from duet_moe.modeling.gate import DuetMoeGate

QUICK = GateSettings(steps=60, batch_size=64, lr=0.05)
DOCUMENTS = {
    "creative": (
        [
            Document("Tell me a story.", "The little fox ran over the hill."),
            Document("Sing.", "La, la, sang the cat."),
        ],
        [Document("Tell a tale.", "Once upon a time there was a cat by the sea.")],
    ),
    "factual": (
        [Document("What is the capital of Portugal?", "Lisbon."), Document("How many moons has Mars?", "Mars has 2.")],
        [Document("Which is the capital of Portugal?", "The capital of Portugal is Lisbon.")],
    ),
}


def split_case(positions: int = 400, seed: int = 0) -> Scored:
    """Return positions where the first coordinate says which head is right: 0.9 against 0.1."""
    states = torch.randn(positions, 32, generator=torch.Generator().manual_seed(seed))
    diverse = states[:, 0] > 0
    coherence = torch.where(diverse, 0.1, 0.9)
    return Scored(states, coherence, 1 - coherence, torch.full((positions,), 0.5), torch.ones(positions))


def learnt(settings: GateSettings, **cases: Scored) -> DuetMoeGate:
    gate = DuetMoeGate(tiny_model().config)
    gate_training._learn(gate, cases, settings)
    return gate


def test_a_gate_learns_where_each_head_is_right_and_beats_every_constant() -> None:
    settings = GateSettings(steps=200, batch_size=128, lr=0.05, prior_weight=0.0)
    gate = learnt(settings, creative=split_case(), factual=split_case(seed=1))
    fresh = split_case(seed=2)
    shares = gate_training._inclinations(gate, fresh)
    constants = [float(fresh.loss(share / 20)) for share in range(21)]
    assert float(fresh.loss(shares)) < 0.4 < 0.65 < min(constants)
    assert (shares[fresh.diversity > 0.5].mean() > 0.8) and (shares[fresh.diversity < 0.5].mean() < 0.2)


def test_a_loss_by_hand() -> None:
    scored = Scored(torch.zeros(2, 32), torch.tensor([0.5, 0.0]), torch.tensor([0.1, 0.0]), *torch.ones(2, 2))
    assert float(scored.loss(0.25, torch.tensor([0]))) == pytest.approx(0.916291, abs=1e-5)  # -ln(0.4)
    assert float(scored.loss(torch.tensor([0.25]), torch.tensor([1]))) == pytest.approx(
        69.0776, abs=1e-3
    )  # -ln(1e-30)


def test_where_the_heads_agree_the_gate_goes_to_the_prior_of_the_kind() -> None:
    states = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    same = torch.full((300,), 0.3)
    cases = {}
    for kind, sign in (("creative", 1.0), ("factual", -1.0)):
        told = torch.cat([torch.full((300, 1), 6 * sign), states[:, 1:]], 1)
        cases[kind] = Scored(told, same, same, same, torch.ones(300))
    gate = learnt(GateSettings(steps=300, batch_size=64, lr=0.05), **cases)
    assert float(gate_training._inclinations(gate, cases["creative"]).mean()) == pytest.approx(0.8, abs=0.05)
    assert float(gate_training._inclinations(gate, cases["factual"]).mean()) == pytest.approx(0.2, abs=0.05)


def test_the_divergence_from_a_prior_by_hand() -> None:
    found = bernoulli_divergence(torch.tensor([0.2, 0.5, 0.0, 1.0]), 0.2)
    assert found.tolist() == pytest.approx([0.0, 0.223144, 0.223144, 1.609438], abs=1e-5)


def test_what_is_settled_teaches_the_gate_nothing() -> None:
    case = split_case()
    settled = Scored(case.states, case.coherence, case.diversity, case.geometric, torch.zeros(400))
    gate = learnt(GateSettings(steps=20, prior_weight=0.0, lr=0.05), creative=settled, factual=settled)
    assert not any(weight.any() for weight in gate.linear.parameters())


def test_only_the_gate_changes_and_the_report_is_of_the_other_documents(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    before = copy.deepcopy(model.state_dict())
    report = train_gate(model, DOCUMENTS, tokenizer, tmp_path, QUICK, show=False)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert after.keys() - before.keys() == {
        f"token_gate.{name}" for name in ("settled", "linear.weight", "linear.bias")
    }
    assert torch.equal(model.token_gate.settled, settled_tokens(tokenizer, len(tokenizer)))
    assert report.documents == {"creative": 1, "factual": 1}
    assert all(weight.requires_grad for weight in model.diversity_head.parameters())
    for kind, (_, others) in DOCUMENTS.items():
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": others[0].prompt}, {"role": "assistant", "content": others[0].response}],
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        start = (ids[0] == tokenizer.convert_tokens_to_ids("<|assistant|>")).nonzero().item() + 1
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < start, -100)
        for name, settings in {
            "gate": {"gated": True},
            "coherence": {"head_mix": 0.0},
            "diversity": {"head_mix": 1.0},
            "geometric": {"head_mix": 0.5},
        }.items():
            with torch.no_grad():
                wanted = float(model(ids, labels=labels, **settings).loss)
            assert report.losses[kind][name] == pytest.approx(wanted, abs=1e-4), name
        assert report.tokens[kind] == ids.shape[1] - start
    for name, loss in report.losses["mean"].items():
        assert loss == pytest.approx((report.losses["creative"][name] + report.losses["factual"][name]) / 2)


def test_a_gate_that_is_there_is_learnt_anew_and_the_same_seed_gives_the_same(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    found = []
    for seed in (0, 0, 1):
        settings = GateSettings(steps=20, batch_size=8, seed=seed)
        train_gate(model, DOCUMENTS, tokenizer, tmp_path, settings, show=False)
        found.append(model.token_gate.linear.weight.detach().clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("kind, side", [("creative", 0), ("factual", 1)])
def test_documents_of_both_kinds_are_needed_on_both_sides(tmp_path: Path, kind: str, side: int) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    lacking = DOCUMENTS | {kind: tuple([] if place == side else part for place, part in enumerate(DOCUMENTS[kind]))}
    with pytest.raises(ValueError, match=f"needs {kind} documents"):
        train_gate(model, lacking, tokenizer, tmp_path, QUICK, show=False)
    assert model.token_gate is None and not model.config.hybrid_gate


@pytest.mark.parametrize(
    "name, bad", [("creative_prior", 1.0), ("factual_prior", 0.0), ("steps", 0), ("lr", 0.0), ("prior_weight", -0.1)]
)
def test_a_setting_that_cannot_be_is_refused(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={bad}"):
        GateSettings(**{name: bad})


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe with sixty stories and sixty facts, a third of them held out by response, and its data beside it."""
    rows = {
        "stories": [(f"Tell a tale of {n} cats.", f"The {n} cats sang by the sea.") for n in range(60)],
        "facts": [(f"What is {n} + 1?", f"The sum is {n + 1}.") for n in range(60)],
    }
    for name, content in rows.items():
        lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in content]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = [
        {
            "name": name,
            "path": f"{name}.jsonl",
            "weight": 1,
            "head": head,
            "kind": "chat",
            "holdout": 0.35,
            "group": "response",
        }
        for name, head in (("stories", "diversity"), ("facts", "coherence"))
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"sources": sources}))
    return path


def test_documents_are_held_out_ones_by_the_head_of_their_source(recipe: Path) -> None:
    sources = read_sources(recipe)
    found = documents_of(sources, recipe.parent, count=12)
    assert all("cats" in document.response for side in found["creative"] for document in side)
    assert all("sum" in document.response for side in found["factual"] for document in side)
    for learn, others in found.values():
        assert min(len(learn), len(others)) >= 2 and len(learn) + len(others) == 12
        assert not {document.response for document in learn} & {document.response for document in others}
    assert found == documents_of(sources, recipe.parent, count=12)


def test_the_command_writes_a_whole_model_and_leaves_its_modes_alone(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, out = tmp_path / "base", tmp_path / "new" / "gated"
    save_tiny(folder)
    saved = DuetMoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    saved.generation_config.modes = modes_as_dict(BUILT_IN_MODES | {"mine": GREEDY})
    saved.save_pretrained(folder)
    command = ["--checkpoint", str(folder), "--data", str(recipe.parent), "--recipe", str(recipe), "--out", str(out)]
    assert main([*command, "--cache", str(tmp_path / "states"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["losses"].keys() == {"creative", "factual", "mean"} and report["settings"]["seed"] == 0
    assert not list(out.parent.glob("unfinished-*"))
    before, after = (DuetMoeForCausalLM.from_pretrained(path) for path in (folder, out))
    assert after.dtype == before.dtype == torch.bfloat16
    assert all(torch.equal(after.state_dict()[name], value) for name, value in before.state_dict().items())
    writer = Writer.load(out)
    assert not writer.modes["hybrid"].gated and writer.modes["mine"] == GREEDY
    weighed = replace(writer.modes["hybrid"], gated=True)
    shares = {item.diversity_share for item in writer.write("Hello fox", weighed, 8, seed=1).evidence}
    assert len(shares) > 1
    assert main([*command, "--json"]) == 1
    assert "exists; name a new folder" in capsys.readouterr().err


def test_the_report_is_a_table_of_what_was_measured(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    report = train_gate(model, DOCUMENTS, tokenizer, tmp_path, QUICK, show=False)
    rows = {line[:16].strip(): line[16:].split() for line in str(report).splitlines()}
    assert rows["gate"] == [f"{row['gate']:.4f}" for row in report.losses.values()]
    assert rows["mean share"] == [f"{value:.3f}" for value in report.mean_share.values()]
    assert torch.isfinite(model(tokens(1, 4), gated=True).logits).all()
