"""The task router: reads a prompt whatever its padding, makes a mode of its thresholds, and `auto` follows it."""

import json
from pathlib import Path

import pytest
import torch
from quantized import SHAPE
from tiny import SENTENCES, pad_rows, tiny_config, tiny_model, tiny_writer_of, tokens
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from duet_moe import DuetMoeForCausalLM, Mode, Writer
from duet_moe.cli import main
from duet_moe.configuration.modes import BUILT_IN_MODES, modes_as_dict
from duet_moe.evaluation.contestants import Duet
from duet_moe.modeling.export import export_mixtral
from duet_moe.modeling.info import parameter_counts
from duet_moe.modeling.task_router import ROUTED, DuetMoeTaskRouter, Route, read_depths
from duet_moe.modeling.voice_files import base_hashes

SIZE = 12


def routed_model(seed: int = 0, **changes: object) -> DuetMoeForCausalLM:
    """Return a tiny model whose router has opinions that differ from prompt to prompt."""
    model = tiny_model(seed, task_router_size=SIZE, **changes)
    open_wide(model)
    return model


def open_wide(model: DuetMoeForCausalLM) -> None:
    torch.manual_seed(1)
    for name, weight in model.task_router.named_parameters():
        if name.endswith("weight") and weight.ndim == 2:
            nn.init.normal_(weight, std=0.6)


def between(model: DuetMoeForCausalLM, odds: torch.Tensor) -> None:
    """Set thresholds so that the least of three or more log-odds is factual, the greatest creative, others neither."""
    low, *_, high = odds.sort().values.tolist()
    span = (high - low) * 0.01
    model.task_router.thresholds.copy_(torch.tensor([low + span, high - span]))


@torch.no_grad()
def odds_of(model: DuetMoeForCausalLM, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return model.task_router(*model.prompt_states(ids, mask))


@pytest.fixture
def routed() -> DuetMoeForCausalLM:
    return routed_model()


@pytest.fixture
def writer(tokenizer: PreTrainedTokenizerFast) -> Writer:
    """A writer that finds the second sentence factual and the first creative."""
    writer = tiny_writer_of(tokenizer, task_router_size=SIZE)
    open_wide(writer.model)
    batch, _ = writer.encode(SENTENCES, 1)
    odds = odds_of(writer.model, batch["input_ids"], batch["attention_mask"])
    if odds[1] > odds[0]:
        writer.model.task_router.calibration.mul_(-1)
        odds = -odds
    middle = float(odds[:2].mean())
    gap = float(odds[0] - odds[1]) / 10
    writer.model.task_router.thresholds.copy_(torch.tensor([middle - gap, middle + gap]))
    return writer


CREATIVE, FACTUAL = SENTENCES[:2]


def test_the_states_read_are_spread_from_the_first_to_the_last() -> None:
    assert read_depths(12) == [0, 3, 6, 9, 12]
    assert read_depths(4) == [0, 1, 2, 3, 4]
    assert read_depths(2) == [0, 1, 2]
    assert read_depths(1) == [0, 1]


@torch.no_grad()
def test_the_states_are_those_of_the_trunk_side_by_side(routed: DuetMoeForCausalLM) -> None:
    ids = tokens(2, 7)
    states, mask = routed.prompt_states(ids)
    outputs = routed.model(ids, output_hidden_states=True)
    assert states.shape == (2, 7, 3 * 32) and mask.tolist() == [[1] * 7] * 2
    torch.testing.assert_close(states[..., :32], routed.model.embed_tokens(ids))
    torch.testing.assert_close(states[..., -32:], outputs.last_hidden_state)


def test_padding_on_either_side_or_none_gives_equal_log_odds(routed: DuetMoeForCausalLM) -> None:
    rows = [tokens(1, length, seed=length)[0] for length in (3, 11, 20, 7)]
    alone = torch.cat([odds_of(routed, row[None]) for row in rows])
    assert alone.std() > 0.1
    for side in ("left", "right"):
        torch.testing.assert_close(odds_of(routed, *pad_rows(rows, side)), alone, rtol=0, atol=1e-4)
    # the router itself takes states with padding on the right too, as it meets them in training
    states = [routed.prompt_states(row[None])[0][0] for row in rows]
    mask = pad_rows(rows, "right")[1]
    padded = nn.utils.rnn.pad_sequence(states, batch_first=True)
    padded = torch.where(mask.bool()[..., None], padded, 1e4 * torch.randn_like(padded))
    with torch.no_grad():
        torch.testing.assert_close(routed.task_router(padded, mask), alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_of_a_long_prompt_the_end_is_read_and_short_rows_beside_it_keep_theirs(
    side: str, monkeypatch: pytest.MonkeyPatch, routed: DuetMoeForCausalLM
) -> None:
    monkeypatch.setattr("duet_moe.modeling.task_router.LONGEST", 10)
    rows = [tokens(1, 40)[0], tokens(1, 4, seed=2)[0]]
    found = odds_of(routed, *pad_rows(rows, side))
    expected = torch.cat([odds_of(routed, rows[0][None, -10:]), odds_of(routed, rows[1][None])])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_calibration_is_slope_and_offset_of_the_log_odds(routed: DuetMoeForCausalLM) -> None:
    ids = tokens(3, 6)
    plain = odds_of(routed, ids)
    routed.task_router.calibration.copy_(torch.tensor([0.5, -1.25]))
    torch.testing.assert_close(odds_of(routed, ids), 0.5 * plain - 1.25)


def test_thresholds_make_modes_and_the_upper_one_counts_as_creative() -> None:
    router = DuetMoeTaskRouter(tiny_config(task_router_size=SIZE))
    router.thresholds.copy_(torch.tensor([-1.0, 2.0]))
    routes = router.route(torch.tensor([-1.5, -1.0, 0.0, 1.9, 2.0, 30.0]))
    assert [route.mode for route in routes] == ["factual", "hybrid", "hybrid", "hybrid", "creative", "creative"]
    assert routes[2].probability == 0.5 and routes[0].probability == pytest.approx(0.182426, abs=1e-5)
    assert {route.mode for route in routes} == set(ROUTED) <= BUILT_IN_MODES.keys()


def test_high_thresholds_survive_half_precision() -> None:
    router = DuetMoeTaskRouter(tiny_config(task_router_size=SIZE))
    router.thresholds.copy_(torch.tensor([-9.0, 7.0]))  # a probability of 0.9991, which bfloat16 would round to 1
    for dtype in (torch.bfloat16, torch.float16):
        modes = [route.mode for route in router.to(dtype).route(torch.tensor([-9.5, 6.5, 7.5]))]
        assert modes == ["factual", "hybrid", "creative"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_router_in_half_precision_agrees_within_its_rounding(dtype: torch.dtype, routed: DuetMoeForCausalLM) -> None:
    ids, mask = pad_rows([tokens(1, 9)[0], tokens(1, 4, seed=2)[0]], "left")
    full = odds_of(routed, ids, mask)
    found = odds_of(routed.to(dtype), ids, mask)
    assert found.dtype == torch.float32 and torch.isfinite(found).all()
    torch.testing.assert_close(found, full, rtol=0.1, atol=0.15)


def test_nothing_but_a_prompt_of_tokens_can_be_routed(model: DuetMoeForCausalLM, routed: DuetMoeForCausalLM) -> None:
    with pytest.raises(ValueError, match="no task router: choose a mode yourself, or train one"):
        model.route(tokens(1, 4))
    for ids, mask in ((tokens(2, 4), torch.tensor([[1] * 4, [0] * 4])), (tokens(2, 4)[:, :0], None)):
        with pytest.raises(ValueError, match="no tokens"):
            routed.route(ids, mask)


@pytest.mark.parametrize("side", ["left", "right"])
def test_auto_is_the_chosen_modes_row_by_row(side: str, routed: DuetMoeForCausalLM) -> None:
    rows = [tokens(1, length, seed=length)[0] for length in (4, 6, 9)]
    ids, mask = pad_rows(rows, side)
    between(routed, odds_of(routed, ids, mask))
    modes = [route.mode for route in routed.route(ids, mask)]
    assert sorted(modes) == sorted(ROUTED)
    found = routed.generate(ids, attention_mask=mask, mode="auto", seed=3, max_new_tokens=6)
    assert torch.equal(found, routed.generate(ids, attention_mask=mask, mode=modes, seed=3, max_new_tokens=6))
    mixed = routed.generate(ids, attention_mask=mask, mode=["creative", "auto", "auto"], seed=3, max_new_tokens=6)
    expected = routed.generate(ids, attention_mask=mask, mode=["creative", *modes[1:]], seed=3, max_new_tokens=6)
    assert torch.equal(mixed, expected)


def test_auto_takes_the_checkpoints_own_mode_of_that_name_and_a_calls_settings_win(routed: DuetMoeForCausalLM) -> None:
    ids = tokens(1, 5)
    routed.task_router.thresholds.copy_(torch.tensor([99.0, 99.0]))  # all factual
    routed.generation_config.modes = modes_as_dict({"factual": Mode("factual", head_mix=1.0)})
    bold = routed.generate(ids, mode=Mode("bold", head_mix=1.0), max_new_tokens=8)
    plain = routed.generate(ids, mode=Mode("plain", head_mix=0.0), max_new_tokens=8)
    assert not torch.equal(bold, plain)
    assert torch.equal(routed.generate(ids, mode="auto", max_new_tokens=8), bold)
    assert torch.equal(routed.generate(ids, mode="auto", head_mix=0.0, max_new_tokens=8), plain)


def test_an_explicit_mode_never_asks_the_router(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DuetMoeTaskRouter, "forward", lambda *_: pytest.fail("the router was asked"))
    writer.model.generate(tokens(2, 5), mode=["factual", "creative"], seed=1, max_new_tokens=2)
    assert writer.write(FACTUAL, "creative", 4, seed=1).route is None
    with pytest.raises(pytest.fail.Exception, match="was asked"):
        writer.write(FACTUAL, "auto", 4, seed=1)


@pytest.mark.parametrize(
    "kwargs, told",
    [
        ({"mode": "auto", "num_beams": 2}, 'mode="auto".*num_beams must be 1: name one mode'),
        ({"mode": "auto", "num_return_sequences": 2, "seed": 1}, "num_return_sequences must be 1"),
        ({"mode": ["auto"]}, "1 entries for 2 rows"),
        ({"mode": ["auto", "factual", "poetic"]}, "3 entries for 2 rows"),
    ],
)
def test_what_auto_cannot_do_is_refused(routed: DuetMoeForCausalLM, kwargs: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        routed.generate(tokens(2, 5), max_new_tokens=2, **kwargs)


def test_auto_needs_ids_to_read(routed: DuetMoeForCausalLM) -> None:
    with pytest.raises(ValueError, match="give input_ids"):
        routed.generate(inputs_embeds=torch.randn(1, 5, 32), mode="auto", max_new_tokens=2)


def test_a_router_is_saved_with_its_model(routed: DuetMoeForCausalLM, tmp_path: Path) -> None:
    routed.task_router.calibration.copy_(torch.tensor([0.5, 0.25]))
    routed.task_router.thresholds.copy_(torch.tensor([-2.0, 3.0]))
    routed.save_pretrained(tmp_path)
    assert (tmp_path / "task_router.py").is_file()
    for dtype in (torch.float32, torch.bfloat16):
        again = DuetMoeForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert again.config.task_router_size == SIZE
        for name, tensor in routed.task_router.state_dict().items():
            assert torch.equal(again.task_router.state_dict()[name], tensor.to(dtype)), name
    again = DuetMoeForCausalLM.from_pretrained(tmp_path)
    assert again.route(tokens(2, 6)) == routed.route(tokens(2, 6))


def test_quantising_leaves_the_router_alone(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'duet-moe[quantization]'")
    model = routed_model(**SHAPE).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = DuetMoeForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    for name, tensor in model.task_router.state_dict().items():
        assert torch.equal(loaded.task_router.state_dict()[name], tensor), name
    assert torch.isfinite(odds_of(loaded, tokens(1, 5))).all()


def test_a_router_changes_no_voices_base_and_counts_in_no_tokens_cost() -> None:
    model, routed = tiny_model(), routed_model()
    routed.load_state_dict(model.state_dict(), strict=False)
    assert base_hashes(routed) == base_hashes(model)
    with_router, without = parameter_counts(routed), parameter_counts(model)
    own = sum(p.numel() for p in routed.task_router.parameters())
    assert own > 0 and with_router.pop("total") == without.pop("total") + own
    assert with_router == without


def test_a_router_does_not_stand_in_the_way_of_export(tmp_path: Path) -> None:
    model = routed_model()
    for head in (model.coherence_head, model.diversity_head):
        nn.init.zeros_(head.down_proj.weight)
    model.save_pretrained(tmp_path / "model")
    export_mixtral(tmp_path / "model", tmp_path / "out", "factual", show=False)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "mixtral"
    with pytest.raises(ValueError, match="mode='auto' must be one of"):
        export_mixtral(tmp_path / "model", tmp_path / "other", "auto", show=False)


def test_a_writer_says_what_it_makes_of_a_prompt(writer: Writer) -> None:
    creative, factual = writer.route(CREATIVE), writer.route(FACTUAL)
    assert isinstance(creative, Route) and (creative.mode, factual.mode) == ("creative", "factual")
    assert 0 <= factual.probability < creative.probability <= 1
    assert writer.mode_names == ["factual", "creative", "hybrid", "auto"]
    with pytest.raises(ValueError, match="prompt is empty"):
        writer.route(" ")


@pytest.mark.parametrize("prompt", [CREATIVE, FACTUAL])
def test_auto_writes_and_streams_what_its_mode_writes_and_tells_the_route(writer: Writer, prompt: str) -> None:
    route = writer.route(prompt)
    text = writer.write(prompt, "auto", 10, seed=4)
    assert (text.mode, text.route) == (route.mode, route)
    assert text.text == writer.write(prompt, route.mode, 10, seed=4).text
    assert "".join(piece.text for piece in writer.stream(prompt, "auto", 10, seed=4)) == text.text
    writer.model.config.default_mode = "auto"
    assert writer.write(prompt, max_new_tokens=10, seed=4).tokens == text.tokens


def test_a_long_prompt_is_routed_alike_however_long_its_answer_may_be(writer: Writer) -> None:
    prompt = " ".join(SENTENCES * 3)
    text = writer.write(prompt, "auto", 200, seed=4)
    assert text.notes and text.route == writer.route(prompt)


def test_a_batch_has_the_routes_of_its_prompts_alone(writer: Writer) -> None:
    texts = writer.write_batch([CREATIVE, FACTUAL, CREATIVE], "auto", 6, seed=[1, 2, 3])
    assert [text.mode for text in texts] == ["creative", "factual", "creative"]
    for text in texts:
        alone = writer.write(text.prompt, "auto", 6, seed=text.seed)
        assert text.text == alone.text
        assert text.route.probability == pytest.approx(alone.route.probability, abs=1e-4)


def test_auto_is_compared_under_its_own_name_even_with_the_mode_that_it_chose(writer: Writer) -> None:
    found = writer.compare(FACTUAL, ("auto", "factual", "creative"), 8, seed=2)
    assert list(found) == ["auto", "factual", "creative"]
    assert found["auto"].mode == "factual" and found["auto"].route == writer.route(FACTUAL)
    assert found["auto"].tokens == found["factual"].tokens and found["factual"].route is None
    hot = writer.compare(CREATIVE, ("auto", "auto"), 8, seed=2, temperature=0.01)
    assert list(hot) == ["auto", "auto (2)"]
    assert hot["auto"].tokens == writer.write(CREATIVE, "creative", 8, seed=2, temperature=0.01).tokens


def test_ideas_under_auto_are_those_of_its_mode_and_the_prompt_is_read_once(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    forward = DuetMoeTaskRouter.forward
    monkeypatch.setattr(
        DuetMoeTaskRouter, "forward", lambda self, states, mask: rows.append(len(mask)) or forward(self, states, mask)
    )
    ideas = writer.brainstorm(CREATIVE, 3, "auto", 6, seed=5)
    assert rows == [1]
    expected = writer.brainstorm(CREATIVE, 3, "creative", 6, seed=5)
    assert [idea.tokens for idea in ideas] == [idea.tokens for idea in expected]
    assert [idea.route.mode for idea in ideas] == ["creative"] * 3 and expected[0].route is None


def test_auto_on_a_model_without_a_router_is_refused_and_named_modes_still_work(tiny_writer: Writer) -> None:
    tiny_writer.model.config.default_mode = "auto"
    for call in (
        lambda: tiny_writer.write(FACTUAL),
        lambda: next(tiny_writer.stream(FACTUAL, "auto")),
        lambda: tiny_writer.compare(FACTUAL, ("auto", "factual")),
        lambda: tiny_writer.brainstorm(FACTUAL, 2),
        lambda: tiny_writer.route(FACTUAL),
    ):
        with pytest.raises(ValueError, match="no task router: choose a mode yourself"):
            call()
    assert tiny_writer.write(FACTUAL, "factual", 4).mode == "factual"
    assert tiny_writer.mode_names == ["factual", "creative", "hybrid"]


@pytest.fixture
def saved(writer: Writer, tmp_path: Path) -> str:
    writer.model.save_pretrained(tmp_path / "model")
    writer.tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_command_line_says_what_it_chose_beside_the_text(
    saved: str, writer: Writer, capsys: pytest.CaptureFixture
) -> None:
    command = ["write", FACTUAL, "--model", saved, "--mode", "auto", "--max-new-tokens", "6", "--seed", "1"]
    assert main(command) == 0
    shown = capsys.readouterr()
    route = writer.route(FACTUAL)
    assert shown.out == writer.write(FACTUAL, "factual", 6, seed=1).text + "\n"
    assert f"mode: factual (creative with probability {route.probability:.2f})" in shown.err
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["mode"] == "factual"
    assert told["route"] == {"mode": "factual", "probability": pytest.approx(route.probability, abs=1e-5)}
    assert main([*command[:4], "--mode", "factual", *command[6:]]) == 0
    assert "mode:" not in capsys.readouterr().err


def test_a_contestant_on_auto_costs_what_its_costliest_mode_does_and_scores_by_the_prompt(saved: str) -> None:
    auto, factual, creative = (Duet(f"tiny:{mode}", saved, mode) for mode in ("auto", "factual", "creative"))
    cost = auto.weights()["active_parameters"]
    assert cost == creative.weights()["active_parameters"] > factual.weights()["active_parameters"]
    for prompt, chosen, other in ((FACTUAL, factual, creative), (CREATIVE, creative, factual)):
        assert auto.log_likelihood(prompt, "Lisbon") == chosen.log_likelihood(prompt, "Lisbon")
        assert auto.log_likelihood(prompt, "Lisbon") != other.log_likelihood(prompt, "Lisbon")
        assert auto.write([prompt], [3], 6) == chosen.write([prompt], [3], 6)


def test_a_model_has_no_router_unless_its_configuration_says_so() -> None:
    assert tiny_model().task_router is None
    with pytest.raises(ValueError, match="task_router_size"):
        tiny_config(task_router_size=-1)
