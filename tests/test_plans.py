"""Plans: made of a text, drawn by seed, spread out; they steer the diversity head alone."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_config, tiny_model, tiny_writer_of, tokens
from transformers import PreTrainedTokenizerFast

from duet_moe import DuetMoeForCausalLM, Mode, Writer
from duet_moe.modeling.plans import DuetMoePlanner

BANK = 40
CREATIVE = Mode("planned", head_mix=1.0, do_sample=True, draw_plan=True, plan_guidance=1.0)


def fill(planner: DuetMoePlanner) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, buffer in planner.named_buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=generator) if name != "token_weights" else 1.0)


@pytest.fixture
def planned() -> DuetMoeForCausalLM:
    model = tiny_model(plan_bank_size=BANK)
    fill(model.planner)
    torch.nn.init.normal_(model.diversity_head.plan_proj.weight, std=0.2)
    return model


@pytest.fixture
def writer(tokenizer: PreTrainedTokenizerFast) -> Writer:
    writer = tiny_writer_of(tokenizer)
    model = tiny_model(vocab_size=len(tokenizer), plan_bank_size=BANK)
    fill(model.planner)
    torch.nn.init.normal_(model.diversity_head.plan_proj.weight, std=0.2)
    return Writer(model, writer.tokenizer)


def test_the_plan_of_a_text_by_hand() -> None:
    planner = DuetMoePlanner(tiny_config(vocab_size=4, hidden_size=2, plan_size=1, plan_bank_size=1, head_dim=2))
    planner.token_weights.copy_(torch.tensor([0.0, 1.0, 3.0, 5.0]))
    planner.projection.copy_(torch.tensor([[2.0, 1.0]]))
    planner.offset.fill_(0.5)
    vectors = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 2.0], [7.0, 7.0]])
    # (1 * (1, 0) + 3 * (0, 2)) / 4 = (0.25, 1.5); 2 * 0.25 + 1.5 - 0.5 = 1.5
    assert planner.of_tokens(torch.tensor([0, 1, 2]), vectors).tolist() == [1.5]
    assert planner.of_tokens(torch.tensor([2, 0, 1]), vectors).tolist() == [1.5]  # order says nothing
    for silent in ([0, 0], []):
        assert planner.of_tokens(torch.tensor(silent, dtype=torch.long), vectors).tolist() == [0.0]


def test_a_seed_draws_one_plan_of_the_bank_and_seeds_differ(planned: DuetMoeForCausalLM) -> None:
    planner, seeds = planned.planner, list(range(200))
    drawn = planner.draw(seeds)
    assert torch.equal(drawn, planner.draw(seeds))
    assert all((planner.bank == plan).all(dim=1).any() for plan in drawn)
    assert len(drawn.unique(dim=0)) > BANK * 0.9


def test_spread_plans_lie_farther_apart_than_drawn_ones(planned: DuetMoeForCausalLM) -> None:
    def closest(plans: torch.Tensor) -> float:
        unit = torch.nn.functional.normalize(plans, dim=1)
        return float((unit @ unit.T - 2 * torch.eye(len(plans))).max())

    for seed in range(5):
        spread = planned.planner.spread(6, seed)
        assert torch.equal(spread, planned.planner.spread(6, seed)) and len(spread.unique(dim=0)) == 6
        assert closest(spread) < closest(planned.planner.draw([100 * seed + i for i in range(6)]))
    assert planned.planner.spread(BANK + 3, 0).shape == (BANK + 3, 8)
    assert len(planned.planner.spread(BANK + 3, 0).unique(dim=0)) == BANK


def test_a_mode_that_draws_plans_is_the_mode_with_that_plan_given(planned: DuetMoeForCausalLM) -> None:
    ids = tokens(3, 5)
    drawn = planned.generate(ids, mode=CREATIVE, seed=7, max_new_tokens=8)
    plan = planned.planner.draw([7, 8, 9])
    given = planned.generate(ids, mode=replace(CREATIVE, draw_plan=False), seed=7, plan=plan, max_new_tokens=8)
    assert torch.equal(drawn, given)
    off = planned.generate(ids, mode=CREATIVE, seed=7, plan=torch.zeros(3, 8), max_new_tokens=8)
    none = planned.generate(ids, mode=replace(CREATIVE, draw_plan=False), seed=7, max_new_tokens=8)
    assert torch.equal(off, none) and not torch.equal(off, drawn)


def test_rows_that_draw_none_are_as_alone_beside_rows_that_do(planned: DuetMoeForCausalLM) -> None:
    ids, modes = tokens(3, 5), [CREATIVE, "factual", replace(CREATIVE, draw_plan=False)]
    together = planned.generate(ids, mode=modes, seed=[1, 2, 3], max_new_tokens=6)
    alone = [
        planned.generate(ids[row : row + 1], mode=mode, seed=row + 1, max_new_tokens=6)
        for row, mode in enumerate(modes)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_without_seeds_every_row_draws_a_plan_of_its_own(
    planned: DuetMoeForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    draw = planned.planner.draw
    monkeypatch.setattr(planned.planner, "draw", lambda seeds: asked.append(seeds) or draw(seeds))
    planned.generate(tokens(4, 5), mode=CREATIVE, max_new_tokens=2)
    assert len(asked[0]) == 4 and len(set(asked[0])) == 4


def test_a_model_without_a_bank_draws_none() -> None:
    model = tiny_model()
    assert model.planner is None
    ids = tokens(2, 5)
    found = model.generate(ids, mode=CREATIVE, seed=1, max_new_tokens=4)
    assert torch.equal(found, model.generate(ids, mode=replace(CREATIVE, draw_plan=False), seed=1, max_new_tokens=4))


def test_the_bank_is_saved_with_the_model_and_is_no_weight(planned: DuetMoeForCausalLM, tmp_path: Path) -> None:
    planned.save_pretrained(tmp_path)
    again = DuetMoeForCausalLM.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["plan_bank_size"] == BANK
    assert all(torch.equal(a, b) for a, b in zip(planned.planner.buffers(), again.planner.buffers(), strict=True))
    assert not any("planner" in name for name, _ in planned.named_parameters())


def test_no_plan_reaches_the_coherence_head(planned: DuetMoeForCausalLM) -> None:
    ids, plan = tokens(2, 6), planned.planner.draw([1, 2])
    with torch.no_grad():
        assert torch.equal(planned(ids, head_mix=0.0, plan=plan).logits, planned(ids, head_mix=0.0).logits)


def test_a_text_sets_the_theme(writer: Writer) -> None:
    plan = writer.plan("The fox sang to the moon.")
    assert plan.shape == (1, 8) and plan.abs().sum() > 0
    assert torch.equal(writer.plan(""), torch.zeros(1, 8))
    mode = replace(CREATIVE, draw_plan=False)
    themed = writer.write("Hello fox", mode, 12, seed=3, plan="The fox sang to the moon.").text
    assert themed == writer.write("Hello fox", mode, 12, seed=3, plan=plan).text
    assert themed != writer.write("Hello fox", mode, 12, seed=3).text
    assert (
        writer.write("Hello fox", CREATIVE, 12, seed=3, plan="").text
        == writer.write("Hello fox", mode, 12, seed=3).text
    )


def test_a_model_that_learnt_no_plans_says_so(tiny_writer: Writer) -> None:
    with pytest.raises(ValueError, match="has learnt no plans"):
        tiny_writer.write("Hello", plan="the sea")


def test_ideas_are_spread_out_unless_a_plan_is_given(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    spread = writer.model.planner.spread
    monkeypatch.setattr(writer.model.planner, "spread", lambda n, seed: asked.append((n, seed)) or spread(n, seed))
    ideas = writer.brainstorm("Hello fox", n=3, mode=CREATIVE, max_new_tokens=6, seed=5)
    assert asked == [(3, 5)] and [idea.seed for idea in ideas] == [5, 6, 7]
    writer.brainstorm("Hello fox", n=2, mode=CREATIVE, max_new_tokens=6, seed=5, plan="the moon")
    writer.brainstorm("Hello fox", n=2, mode="factual", max_new_tokens=6, seed=5)
    assert len(asked) == 1


def test_ideas_of_a_mode_without_plans_are_guided_strongly_and_can_do_without(writer: Writer) -> None:
    plain = replace(CREATIVE, draw_plan=False, plan_guidance=0.0)
    prompts, own = ["Hello fox"] * 3, dict(max_new_tokens=8, seed=5)
    ideas = [idea.text for idea in writer.brainstorm("Hello fox", 3, plain, **own)]
    plans = writer.model.planner.spread(3, 5)
    guided = writer.write_batch(prompts, plain, plan=plans, plan_guidance=3.0, **own)
    alone = writer.write_batch(prompts, plain, **own)
    assert ideas == [text.text for text in guided] != [text.text for text in alone]
    without = writer.brainstorm("Hello fox", 3, plain, plan="", **own)
    assert [text.text for text in without] == [text.text for text in alone]


def test_a_voice_never_draws_plans_which_it_has_not_learnt(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'duet-moe[finetune]'")
    target = r"diversity_head\.(up_proj|down_proj)"
    config = peft.LoraConfig(r=2, target_modules=target, init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(copy.deepcopy(writer.model), config).save_pretrained(tmp_path / "acme")
    writer.model.load_voice(tmp_path / "acme")
    for method in ("draw", "spread"):
        monkeypatch.setattr(writer.model.planner, method, lambda *_: pytest.fail("a plan was drawn"))
    plain = replace(CREATIVE, draw_plan=False)
    asked = dict(max_new_tokens=6, seed=5, voice="acme")
    assert writer.write("Hello fox", CREATIVE, **asked).text == writer.write("Hello fox", plain, **asked).text
    assert len(writer.brainstorm("Hello fox", 2, CREATIVE, **asked)) == 2
