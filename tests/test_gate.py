"""The gate: a sum of the heads weighed at every token, where what is settled stays the coherence head's."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantized import SHAPE
from tiny import CLOSE, pad_rows, save_tiny, tiny_config, tiny_model, tiny_writer_of, tokens
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast

from duet_moe import DuetMoeForCausalLM, Mode, Writer
from duet_moe.configuration.modes import BUILT_IN_MODES, modes_as_dict
from duet_moe.evaluation.contestants import Duet
from duet_moe.modeling.export import export_mixtral
from duet_moe.modeling.gate import DuetMoeGate, add_by_share
from duet_moe.modeling.hub import model_card
from duet_moe.modeling.info import parameter_counts
from duet_moe.modeling.voice_files import base_hashes

GREEDY = Mode("weighed", head_mix=0.5, gated=True)
PLAIN = BUILT_IN_MODES["hybrid"]
WEIGHED = replace(PLAIN, name="weighed", gated=True)
SAVED = modes_as_dict(BUILT_IN_MODES | {"weighed": WEIGHED})


def gated_model(seed: int = 0, **changes: object) -> DuetMoeForCausalLM:
    """Return a tiny model whose gate opens differently at every token and settles a third of them."""
    model = tiny_model(seed, hybrid_gate=True, **changes)
    nn.init.normal_(model.token_gate.linear.weight, std=0.4)
    model.token_gate.settled[::3] = 1
    return model


def set_gate(model: DuetMoeForCausalLM, bias: float, settled: float = 0.0) -> None:
    """Let the gate be the same everywhere."""
    with torch.no_grad():
        model.token_gate.linear.weight.zero_()
        model.token_gate.linear.bias.fill_(bias)
        model.token_gate.settled.fill_(settled)


@pytest.fixture
def gated() -> DuetMoeForCausalLM:
    return gated_model()


@pytest.fixture
def gated_writer(tokenizer: PreTrainedTokenizerFast) -> Writer:
    writer = tiny_writer_of(tokenizer, hybrid_gate=True)
    nn.init.normal_(writer.model.token_gate.linear.weight, std=0.4)
    writer.model.token_gate.settled[::3] = 1
    return writer


def test_a_sum_of_two_distributions_is_what_the_hand_computes() -> None:
    coherence, diversity = torch.tensor([[0.5, 0.25, 0.25]]).log() + 3, torch.tensor([[0.1, 0.1, 0.8]]).log() - 1
    found = add_by_share(coherence, diversity, torch.tensor([[0.25]])).exp()
    torch.testing.assert_close(found, torch.tensor([[0.4, 0.2125, 0.3875]]))


def test_the_share_is_the_gate_less_what_is_settled_by_hand() -> None:
    gate = DuetMoeGate(tiny_config(vocab_size=3, hidden_size=2, head_dim=2, hybrid_gate=True))
    nn.init.zeros_(gate.linear.bias)
    gate.linear.weight.data = torch.tensor([[math.log(3), 5.0]])
    gate.settled.copy_(torch.tensor([0.0, 1.0, 1.0]))
    states = torch.tensor([[7.0, 0.0], [0.0, 0.0]])  # of norm sqrt(2) and 0
    logits = torch.tensor([[0.5, 0.25, 0.25], [1.0, 1e-9, 1e-9]]).log()
    inclined = 1 / (1 + 3 ** -math.sqrt(2))
    torch.testing.assert_close(gate(states, logits), torch.tensor([[inclined / 2], [0.5]]))


@given(st.lists(st.tuples(*[st.floats(-12, 12, width=32)] * 2), min_size=2, max_size=8), st.floats(0, 1))
def test_the_sum_is_a_distribution_between_both(pairs: list[tuple[float, float]], share: float) -> None:
    coherence, diversity = (torch.tensor(column)[None] for column in zip(*pairs, strict=True))
    found = add_by_share(coherence, diversity, torch.tensor([[share]])).exp()
    expected = share * diversity.softmax(-1) + (1 - share) * coherence.softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_ends_of_the_gate_are_the_heads(gated: DuetMoeForCausalLM) -> None:
    ids = tokens(2, 9)
    for bias, mix in ((-200.0, 0.0), (200.0, 1.0)):
        set_gate(gated, bias)
        expected = gated(ids, head_mix=mix).logits.log_softmax(-1)
        torch.testing.assert_close(gated(ids, head_mix=0.5, gated=True).logits, expected, **CLOSE)


@torch.no_grad()
def test_where_all_is_settled_the_coherence_head_speaks_alone(gated: DuetMoeForCausalLM) -> None:
    ids = tokens(2, 9)
    set_gate(gated, 200.0, settled=1.0)
    outputs = gated(ids, gated=True, output_head_logits=True)
    torch.testing.assert_close(outputs.logits.exp(), gated(ids, head_mix=0.0).logits.softmax(-1), **CLOSE)
    assert outputs.diversity_share.max() < 1e-5


@torch.no_grad()
def test_a_model_weighs_its_heads_by_its_gate_in_the_place_of_the_mix(gated: DuetMoeForCausalLM) -> None:
    ids, plan = tokens(2, 9), torch.randn(2, 8)
    outputs = gated(ids, plan=plan, head_mix=0.9, gated=True, output_head_logits=True)
    share = outputs.diversity_share
    assert share.shape == (2, 9) and share.std() > 0.05
    p, q = outputs.coherence_logits.softmax(-1), outputs.diversity_logits.softmax(-1)
    expected = share[..., None] * q + (1 - share[..., None]) * p
    torch.testing.assert_close(outputs.logits.exp(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(outputs.logits, gated(ids, plan=plan, head_mix=0.0, gated=True).logits, **CLOSE)
    settled = p[..., ::3].sum(-1)
    inclined = gated.token_gate.inclination(gated.model(ids).last_hidden_state)[..., 0]
    torch.testing.assert_close(share, inclined * (1 - settled), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_guidance_and_the_plausible_set_go_on_working(gated: DuetMoeForCausalLM) -> None:
    ids, plan = tokens(2, 9), torch.randn(2, 8)
    plain = gated(ids, plan=plan, gated=True).logits
    guided = gated(ids, plan=plan, gated=True, plan_guidance=1.5).logits
    assert (guided - plain).abs().max() > 0.1
    bounded = gated(ids, plan=plan, gated=True, plausible_min=0.2).logits
    coherence = gated(ids, head_mix=0.0).logits
    plausible = coherence >= coherence.amax(-1, keepdim=True) + math.log(0.2)
    assert torch.equal(bounded.isfinite(), plausible) and torch.equal(bounded[plausible], plain[plausible])


@torch.no_grad()
def test_rows_of_a_mixed_batch_are_as_alone_and_factual_ones_bit_for_bit(gated: DuetMoeForCausalLM) -> None:
    ids, plan = tokens(4, 12), torch.randn(4, 8)
    mixes, opened = torch.tensor([0.0, 0.5, 1.0, 0.3]), torch.tensor([False, True, False, False])
    together = gated(ids, plan=plan, head_mix=mixes, gated=opened, output_head_logits=True)
    for row in range(4):
        own = slice(row, row + 1)
        alone = gated(
            ids[own], plan=plan[own], head_mix=float(mixes[row]), gated=bool(opened[row]), output_head_logits=True
        )
        torch.testing.assert_close(together.logits[own], alone.logits, **CLOSE)
        torch.testing.assert_close(together.diversity_share[own], alone.diversity_share, **CLOSE)
    assert torch.equal(together.logits[0], gated(ids, head_mix=0.0).logits[0])
    assert torch.equal(together.diversity_share[[0, 2, 3]], mixes[[0, 2, 3], None].expand(3, 12))
    for weight in [*gated.diversity_head.parameters(), *gated.token_gate.parameters()]:
        weight.fill_(math.nan)
    broken = gated(ids, head_mix=mixes, gated=opened).logits
    assert torch.equal(broken[0], together.logits[0]) and broken[1].isnan().all()


@given(st.integers(1, 17), st.integers(0, 5))
@torch.no_grad()
def test_decoding_with_a_cache_equals_the_full_pass(prompt: int, seed: int) -> None:
    model, ids = gated_model(seed), tokens(2, 18, seed)
    full = model(ids, gated=True).logits
    outputs = model(ids[:, :prompt], gated=True, use_cache=True)
    steps = [outputs.logits]
    for position in range(prompt, 18):
        outputs = model(ids[:, position : position + 1], gated=True, cache=outputs.cache, use_cache=True)
        steps.append(outputs.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, **CLOSE)


def test_every_decoding_strategy_writes_what_greedy_decoding_writes(gated: DuetMoeForCausalLM) -> None:
    ids = torch.tensor([[7, 8, 9, 10, 11, 12] * 4])
    expected = ids
    with torch.no_grad():
        for _ in range(12):
            best = gated(expected, gated=True, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, best], 1)
    for settings in ({}, {"prompt_lookup_num_tokens": 4}, {"assistant_model": tiny_model(5, num_hidden_layers=1)}):
        assert torch.equal(gated.generate(ids, mode=GREEDY, max_new_tokens=12, **settings), expected)
    beams = gated.generate(ids.repeat(2, 1), gated=[True, False], num_beams=3, max_new_tokens=6)
    assert torch.equal(beams[:1], gated.generate(ids, gated=True, num_beams=3, max_new_tokens=6))
    assert torch.equal(beams[1:], gated.generate(ids, num_beams=3, max_new_tokens=6))


def test_modes_of_a_batch_write_as_alone(gated: DuetMoeForCausalLM) -> None:
    ids, mask = pad_rows([tokens(1, length, length)[0] for length in (5, 12, 7)], "left")
    modes, seeds = ["factual", WEIGHED, "creative"], [4, 9, 2]
    together = gated.generate(ids, attention_mask=mask, mode=modes, seed=seeds, max_new_tokens=10)[:, -10:]
    for row, length in enumerate((5, 12, 7)):
        alone = gated.generate(ids[row : row + 1, -length:], mode=modes[row], seed=[seeds[row]], max_new_tokens=10)
        assert torch.equal(alone[0, -10:], together[row])


def test_a_mode_asks_the_gate_unless_the_call_names_a_mix(gated: DuetMoeForCausalLM) -> None:
    ids, asked = tokens(2, 5), dict(mode=WEIGHED, seed=3, max_new_tokens=8)
    weighed = gated.generate(ids, **asked)
    geometric = gated.generate(ids, **asked | {"mode": PLAIN})
    assert not torch.equal(weighed, geometric)
    assert torch.equal(gated.generate(ids, **asked, head_mix=0.5), geometric)
    assert torch.equal(gated.generate(ids, **asked, gated=False), geometric)
    assert torch.equal(gated.generate(ids, **asked, head_mix=0.5, gated=True), weighed)
    torch.manual_seed(1)
    sampled = gated.generate(ids, mode=WEIGHED, head_mix=0.5, max_new_tokens=8)
    torch.manual_seed(1)
    assert torch.equal(sampled, gated.generate(ids, mode=PLAIN, max_new_tokens=8))


def test_a_mode_falls_back_to_its_mix_where_there_is_no_gate_and_a_call_does_not(model: DuetMoeForCausalLM) -> None:
    ids = tokens(2, 5)
    assert model.token_gate is None
    for seed in (None, 3):
        texts = []
        for mode in (WEIGHED, PLAIN):
            torch.manual_seed(1)
            texts.append(model.generate(ids, mode=mode, seed=seed, max_new_tokens=8))
        assert torch.equal(*texts)
    for call in (lambda: model(ids, gated=True), lambda: model.generate(ids, gated=True, max_new_tokens=2)):
        with pytest.raises(ValueError, match="no gate.*duet_moe.finetune.gate"):
            call()


@pytest.mark.parametrize("bad", [0.5, torch.tensor([1.0, 0.5]), math.nan])
def test_a_gate_that_is_half_asked_for_is_refused(gated: DuetMoeForCausalLM, bad: float | torch.Tensor) -> None:
    with pytest.raises(ValueError, match="gated must be true or false"):
        gated(tokens(2, 3), gated=bad)


def test_evidence_tells_the_share_that_the_diversity_head_had(gated_writer: Writer) -> None:
    texts = gated_writer.compare("Hello fox", ("factual", WEIGHED, "creative"), max_new_tokens=8, seed=3)
    assert {item.diversity_share for item in texts["factual"].evidence} == {0.0}
    mix = BUILT_IN_MODES["creative"].head_mix
    assert [item.diversity_share for item in texts["creative"].evidence] == pytest.approx([mix] * 8)
    text = texts["weighed"]
    prompt = gated_writer.encode(["Hello fox"], 8)[0]["input_ids"]
    ids = torch.cat([prompt, torch.tensor([text.tokens])], 1)
    with torch.no_grad():
        shares = gated_writer.model(ids, gated=True, output_head_logits=True).diversity_share[0]
    told = torch.tensor([item.diversity_share for item in text.evidence])
    torch.testing.assert_close(told, shares[prompt.shape[1] - 1 : -1], **CLOSE)
    mixed = gated_writer.compare("Hello fox", ("factual", WEIGHED), max_new_tokens=4, seed=3, head_mix=0.25)
    assert {item.diversity_share for item in mixed["weighed"].evidence} == {0.25}


def test_a_gate_is_saved_with_the_model(gated: DuetMoeForCausalLM, tmp_path: Path) -> None:
    gated.generation_config.modes = SAVED
    gated.save_pretrained(tmp_path)
    again = DuetMoeForCausalLM.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hybrid_gate"] is True
    assert (tmp_path / "gate.py").is_file()
    ids = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(again(ids, gated=True).logits, gated(ids, gated=True).logits)
    assert again.resolved("weighed").gated and not tiny_model().resolved(WEIGHED).gated


def test_a_new_gate_is_one_half_everywhere() -> None:
    model = DuetMoeForCausalLM(tiny_config(hybrid_gate=True)).eval()
    with torch.no_grad():
        share = model(tokens(1, 5), gated=True, output_head_logits=True).diversity_share
    assert torch.equal(share, torch.full((1, 5), 0.5))


def test_a_gate_runs_in_half_precision_and_follows_the_vocabulary(gated: DuetMoeForCausalLM) -> None:
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = gated(ids, gated=True).logits
        half = copy.deepcopy(gated).to(torch.bfloat16)(ids, gated=True)
    assert half.logits.dtype == torch.bfloat16
    torch.testing.assert_close(half.logits.float().exp(), expected.exp(), rtol=0, atol=0.2)
    settled = gated.token_gate.settled.clone()
    for size in (120, 60):
        gated.resize_token_embeddings(size)
        assert gated(ids.clamp(max=59), gated=True).logits.shape[-1] == size
        kept = min(size, 97)
        assert torch.equal(gated.token_gate.settled[:kept], settled[:kept])
        assert not gated.token_gate.settled[97:].any()


def test_gradients_stay_finite_where_everything_is_settled(gated: DuetMoeForCausalLM) -> None:
    set_gate(gated, 200.0, settled=1.0)
    ids = tokens(2, 6)
    gated(ids, labels=ids, gated=True).loss.backward()
    assert all(weight.grad.isfinite().all() for weight in gated.parameters() if weight.grad is not None)


def test_voices_of_the_ungated_model_fit_the_gated_one(gated: DuetMoeForCausalLM, model: DuetMoeForCausalLM) -> None:
    gated.load_state_dict(model.state_dict(), strict=False)
    assert base_hashes(gated) == base_hashes(model)
    with torch.no_grad():
        gated.coherence_head.unembed.weight[0, 0] += 1
    assert base_hashes(gated)["shared"] != base_hashes(model)["shared"]


def test_a_one_head_mode_uses_no_gate(gated: DuetMoeForCausalLM, model: DuetMoeForCausalLM) -> None:
    with_gate, without = parameter_counts(gated), parameter_counts(model)
    assert with_gate["active"] == without["active"]
    assert (
        with_gate["active_both_heads"]
        == without["active_both_heads"] + 33
        == without["active_both_heads"] + sum(weight.numel() for weight in gated.token_gate.parameters())
    )


def test_quantisers_leave_the_gate_alone(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'duet-moe[finetune]'")
    model = gated_model(**SHAPE).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    for form in ({"load_in_4bit": True}, {"load_in_8bit": True}):
        loaded = DuetMoeForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**form))
        for name, weight in model.token_gate.state_dict().items():
            assert torch.equal(loaded.token_gate.state_dict()[name], weight)


def test_the_gate_is_not_exported_but_the_mix_is_named(tmp_path: Path) -> None:
    gated = gated_model()
    gated.generation_config.modes = SAVED
    gated.save_pretrained(tmp_path / "gated")
    with pytest.raises(ValueError, match=r"'weighed'.*gate.*mode=0.5"):
        export_mixtral(tmp_path / "gated", tmp_path / "out", "weighed", show=False)
    assert not (tmp_path / "out").exists()


def test_the_card_says_where_the_gate_weighs(gated: DuetMoeForCausalLM, model: DuetMoeForCausalLM) -> None:
    gated.generation_config.modes = model.generation_config.modes = SAVED
    assert "| `weighed` | gate |" in str(model_card(gated, "me/gated"))
    assert "| `weighed` | 0.5 |" in str(model_card(model, "me/plain"))


def test_a_contestant_is_judged_by_the_mix_that_it_writes_with(tmp_path: Path) -> None:
    duet = Duet("weighed", str(save_tiny(tmp_path / "gated", hybrid_gate=True)), WEIGHED)
    model = duet.writer.model
    gated = duet.log_likelihood("Hello", " fox")
    set_gate(model, 200.0)
    assert duet.log_likelihood("Hello", " fox") != pytest.approx(gated, abs=1e-4)
    assert duet.weights()["active_parameters"] == parameter_counts(model)["active_both_heads"]
