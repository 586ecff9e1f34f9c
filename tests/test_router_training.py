"""Training a task router: it learns what decides, its figures are what a hand computes, and no test is trained on."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tiny import save_tiny, tiny_tokenizer, tiny_writer_of

from duet_moe import DuetMoeForCausalLM, Writer
from duet_moe.finetune.leaks import normalise
from duet_moe.finetune.router import PromptStates, RouterSettings, log_odds, main, route_model, train_router
from duet_moe.finetune.router_prompts import Prompt, PromptSource, read_prompt_recipe, read_prompts
from duet_moe.finetune.router_report import bag_of_words, calibration_error, choose_thresholds, report, show
from duet_moe.modeling.task_router import DuetMoeTaskRouter

QUICK = RouterSettings(width=16, epochs=12, batch_size=16, lr=5e-3)
THINGS = ("fox", "hill", "moon", "cat", "sea", "door", "café", "capital", "Lisbon", "Mars")
FIGURES = {"accuracy", "calibration_error", "false_creative", "false_factual", "hybrid"}


def cases(part: str, count: int, seed: int, misleads: bool = False) -> list[Prompt]:
    """Return prompts in which one word, Sing or Count, decides; what surrounds it does not."""
    generator = np.random.default_rng(seed)
    prompts = []
    for index in range(count):
        first, second = generator.choice(THINGS, 2)
        word = ("Count", "Sing")[index % 2]
        prompts.append(Prompt(f"The {first} {seed}-{index}. {word} the {second}.", bool(index % 2), part, misleads))
    return prompts


PROMPTS = [
    *cases("train", 160, 0),
    *cases("train", 40, 1, misleads=True),
    *cases("calibration", 60, 2),
    *cases("calibration", 20, 3, misleads=True),
    *cases("held_out", 60, 4),
    *cases("held_out", 20, 5, misleads=True),
    *cases("unseen", 20, 6),
    *cases("hard", 20, 7, misleads=True),
]
PARTS = np.array([prompt.part for prompt in PROMPTS])
CREATIVE = np.array([prompt.creative for prompt in PROMPTS])


@pytest.fixture(scope="module")
def states() -> PromptStates:
    return PromptStates(routed_writer(), [prompt.text for prompt in PROMPTS], show=False)


def routed_writer() -> Writer:
    return tiny_writer_of(tiny_tokenizer(), task_router_size=16)


def fresh_router() -> DuetMoeTaskRouter:
    torch.manual_seed(0)
    return DuetMoeTaskRouter(routed_writer().model.config)


@pytest.fixture(scope="module")
def learnt(states: PromptStates) -> DuetMoeTaskRouter:
    router = fresh_router()
    train_router(router, states, PROMPTS, QUICK, show=False)
    return router


def test_states_are_those_of_each_prompt_alone(states: PromptStates) -> None:
    writer = routed_writer()
    for index in (0, 201, 350):
        batch, _ = writer.encode([PROMPTS[index].text], 1)
        expected = writer.model.prompt_states(**batch)[0][0]
        torch.testing.assert_close(states.items[index].float(), expected, rtol=1e-3, atol=5e-3)


def test_padding_of_a_batch_changes_no_log_odds(states: PromptStates, learnt: DuetMoeTaskRouter) -> None:
    picks = [3, 150, 77, 320, 9]
    alone = torch.cat([log_odds(learnt, states, [pick]) for pick in picks])
    torch.testing.assert_close(log_odds(learnt, states, picks), alone, rtol=1e-4, atol=1e-4)


def test_a_word_that_decides_is_learnt_and_prompts_never_seen_are_told_apart(
    states: PromptStates, learnt: DuetMoeTaskRouter
) -> None:
    assert not learnt.training
    for part in ("held_out", "unseen", "hard"):
        picks = np.flatnonzero(PARTS == part)
        right = (log_odds(learnt, states, picks) > 0).numpy() == CREATIVE[picks]
        assert right.mean() > 0.95, part


def test_the_same_seed_learns_the_same_and_another_does_not(states: PromptStates, learnt: DuetMoeTaskRouter) -> None:
    again, other = fresh_router(), fresh_router()
    train_router(again, states, PROMPTS, QUICK, show=False)
    train_router(other, states, PROMPTS, RouterSettings(**(vars(QUICK) | {"seed": 1})), show=False)
    assert all(torch.equal(value, learnt.state_dict()[name]) for name, value in again.state_dict().items())
    assert not torch.equal(other.output.weight, learnt.output.weight)


def test_calibration_is_finite_and_good_where_all_is_told_apart(
    states: PromptStates, learnt: DuetMoeTaskRouter
) -> None:
    slope, offset = learnt.calibration.tolist()
    assert 0 < slope < 50 and abs(offset) < 50
    picks = np.flatnonzero(PARTS == "held_out")
    assert calibration_error(log_odds(learnt, states, picks).sigmoid().numpy(), CREATIVE[picks]) < 0.1


class Marked(DuetMoeTaskRouter):
    """A router whose log-odds are the first number of a prompt's states."""

    def forward(self, states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        slope, offset = self.calibration
        return slope * states[:, 0, 0] + offset + 0 * self.output.bias


def calibrated(odds: Sequence[float], prompts: Sequence[Prompt]) -> tuple[DuetMoeTaskRouter, torch.Tensor]:
    """Return a router of these log-odds once it is calibrated, and what it then says of the calibration prompts."""
    states = PromptStates.__new__(PromptStates)
    states.items = [torch.full((1, 3), float(each)) for each in odds]
    router = Marked(routed_writer().model.config)
    train_router(router, states, prompts, RouterSettings(width=16, epochs=1), show=False)
    picks = [index for index, prompt in enumerate(prompts) if prompt.part == "calibration"]
    return router, log_odds(router, states, picks)


def test_calibration_mends_probabilities_that_are_too_sure() -> None:
    wrong = [index % 20 < 2 for index in range(len(PROMPTS))]  # every tenth
    odds = [8.0 if kind != mistaken else -8.0 for kind, mistaken in zip(CREATIVE, wrong, strict=True)]
    _, said = calibrated(odds, PROMPTS)
    sure = said.sigmoid().numpy()
    assert sure.max() == pytest.approx(0.9, abs=0.03) and sure.min() == pytest.approx(0.1, abs=0.03)
    assert calibration_error(sure, CREATIVE[PARTS == "calibration"]) < 0.03


def test_calibration_is_never_surer_than_the_number_of_prompts_allows() -> None:
    _, said = calibrated(np.where(CREATIVE, 8.0, -8.0).tolist(), PROMPTS)
    assert said.sigmoid().max() == pytest.approx(41 / 42, abs=1e-3)  # Platt's target of 40 creative prompts


@pytest.mark.parametrize("seed", range(8))
def test_errors_stay_rare_where_the_kinds_overlap_and_thresholds_are_rounded(seed: int) -> None:
    generator = np.random.default_rng(seed)
    prompts = [*cases("train", 20, 0), *cases("calibration", 100, 1)]
    creative = np.array([prompt.creative for prompt in prompts])
    router, said = calibrated((generator.normal(size=120) * 3 + np.where(creative, 2, -2)).tolist(), prompts)
    modes = np.array([route.mode for route in router.bfloat16().route(said)])
    assert not (modes[~creative[20:]] == "creative").any()  # of 50 prompts, one would be 2 percent
    assert (modes[creative[20:]] == "factual").mean() <= 0.02
    assert (modes == "hybrid").any()


def test_thresholds_keep_the_errors_rare_on_calibration_prompts_also_when_they_are_saved_as_bfloat16(
    states: PromptStates, learnt: DuetMoeTaskRouter
) -> None:
    picks = np.flatnonzero(PARTS == "calibration")
    odds = log_odds(learnt, states, picks)
    modes = np.array([route.mode for route in learnt.route(odds)])
    assert (modes[~CREATIVE[picks]] == "creative").mean() <= 0.01
    assert (modes[CREATIVE[picks]] == "factual").mean() <= 0.02
    for tensor in learnt.state_dict().values():
        assert torch.equal(tensor, tensor.bfloat16().float())


@pytest.mark.parametrize("part", ["train", "calibration"])
def test_both_kinds_of_prompt_are_needed(states: PromptStates, part: str) -> None:
    one_sided = [
        Prompt(prompt.text, prompt.creative or prompt.part == part, prompt.part, prompt.misleads) for prompt in PROMPTS
    ]
    with pytest.raises(ValueError, match=f"The {part} prompts are not of both kinds"):
        train_router(fresh_router(), states, one_sided, QUICK, show=False)
    none = [Prompt(prompt.text, prompt.creative, "hard", False) for prompt in PROMPTS]
    with pytest.raises(ValueError, match="The train prompts are not of both kinds"):
        train_router(fresh_router(), states, none, QUICK, show=False)


@pytest.mark.parametrize("misleads", [True, False])
def test_prompts_may_be_all_of_one_sort(misleads: bool, states: PromptStates) -> None:
    prompts = [Prompt(prompt.text, prompt.creative, prompt.part, misleads) for prompt in PROMPTS]
    router = fresh_router()
    train_router(router, states, prompts, RouterSettings(width=16, epochs=1), show=False)
    assert torch.isfinite(router.thresholds).all()


@pytest.mark.parametrize("name, bad", [("epochs", 0), ("width", 1.5), ("lr", 0.0), ("weight_decay", -0.1)])
def test_a_setting_that_cannot_be_is_refused(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={bad}"):
        RouterSettings(**{name: bad})


def test_thresholds_by_hand() -> None:
    scores = np.array([0.1, 0.2, 0.3, 0.6, 0.4, 0.7, 0.8, 0.9])
    creative = np.array([False] * 4 + [True] * 4)
    low, high = choose_thresholds(scores, creative, np.zeros(8, bool))
    assert low == 0.4 and 0.6 < high < 0.6001  # no factual prompt is creative, no creative one factual
    low, high = choose_thresholds(scores, creative, np.zeros(8, bool), false_creative=0.34, false_factual=0.34)
    assert high < 0.6001 and low == pytest.approx(min(0.7, high))
    # prompts that mislead are kept to the same bounds apart from the others
    misleads = np.array([False, False, False, True, True, False, False, False])
    low, high = choose_thresholds(scores, creative, misleads, false_creative=0.5, false_factual=0.5)
    assert low == 0.4 and 0.6 < high < 0.6001
    # where the kinds lie apart, nothing is left between
    assert choose_thresholds(np.array([0.1, 0.9]), np.array([False, True]), np.zeros(2, bool))[0] == pytest.approx(0.1)


@given(
    st.lists(
        st.tuples(st.floats(-9, 9, width=32, allow_subnormal=False), st.booleans(), st.booleans()),
        min_size=2,
        max_size=60,
    ),
    st.floats(0, 0.5, allow_subnormal=False),
    st.floats(0, 0.5, allow_subnormal=False),
)
def test_thresholds_keep_both_errors_as_rare_as_asked(
    rows: list[tuple[float, bool, bool]], false_creative: float, false_factual: float
) -> None:
    rows += [(0.0, True, False), (0.0, False, False)]
    scores, creative, misleads = (np.array(column) for column in zip(*rows, strict=True))
    low, high = choose_thresholds(scores, creative, misleads, false_creative, false_factual)
    assert low <= high
    for sort in (misleads, ~misleads):
        for kind, wrong, allowed in (
            (~creative, scores >= high, false_creative),
            (creative, scores < low, false_factual),
        ):
            if (sort & kind).any():
                assert wrong[sort & kind].mean() <= allowed + 1e-9


def test_calibration_error_by_hand() -> None:
    probabilities = np.array([0.05, 0.05, 0.75, 0.75, 0.72, 0.95, 1.0])
    creative = np.array([False, True, True, True, False, True, False])
    # bins: two of mean 0.05, three of mean 0.74, two of mean 0.975, of which a half, two thirds, a half are creative
    expected = 2 / 7 * 0.45 + 3 / 7 * abs(0.74 - 2 / 3) + 2 / 7 * 0.475
    assert calibration_error(probabilities, creative) == pytest.approx(expected)


@pytest.mark.parametrize(
    "probabilities, creative, expected",
    [
        ([1.0], [True], 0.0),
        ([1.0], [False], 1.0),
        ([0.0, 0.0], [False, False], 0.0),
        ([0.5] * 4, [True, False] * 2, 0),
    ],
)
def test_calibration_error_of_extremes(probabilities: list[float], creative: list[bool], expected: float) -> None:
    assert calibration_error(np.array(probabilities), np.array(creative)) == pytest.approx(expected)


def test_the_bag_of_words_learns_the_same_word() -> None:
    probabilities, (low, high) = bag_of_words(PROMPTS)
    held = PARTS == "held_out"
    assert ((probabilities >= 0.5) == CREATIVE)[held].mean() > 0.95 and 0 < low <= high < 1


def test_a_report_has_figures_for_every_test_and_both_readers() -> None:
    sure = np.where(CREATIVE, 0.9, 0.1)
    hard = np.flatnonzero(PARTS == "hard")
    sure[hard[:2]] = [0.9, 0.1]  # a factual one sent to creative, and the other way round
    sure[hard[2:6]] = 0.45
    figures = report(PROMPTS, sure, (0.3, 0.7))
    assert figures["trained_on"] == 200 and figures["thresholds"] == [0.3, 0.7]
    counts = {name: test["prompts"] for name, test in figures["tests"].items()}
    assert counts == {"held out, ordinary": 60, "held out, misleading": 20, "other sources": 20, "hard": 20}
    for test in figures["tests"].values():
        assert test["router"].keys() == test["bag_of_words"].keys() == FIGURES
    hardest = figures["tests"]["hard"]["router"]
    assert hardest["false_creative"] == hardest["false_factual"] == 0.1 and hardest["hybrid"] == 0.2
    assert hardest["accuracy"] == pytest.approx(16 / 20)
    assert figures["tests"]["other sources"]["router"]["accuracy"] == 1.0
    rows = [line.split(" | ") for line in show(figures).splitlines()]
    assert ["| hard (20)", "router", "0.800"] == rows[8][:3] and rows[9][1] == "bag of words"
    assert "200 prompts trained on; thresholds 0.300 and 0.700." in show(figures)


def test_parts_without_prompts_are_left_out_of_the_report() -> None:
    prompts = [prompt for prompt in PROMPTS if prompt.part in ("train", "calibration", "hard") and prompt.text]
    figures = report(prompts, np.full(len(prompts), 0.5), (0.3, 0.7))
    assert list(figures["tests"]) == ["hard"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with ordinary prompts, contrast pairs in neighbouring rows, other prompts and hard ones."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = {
        "plain": [(prompt.text, prompt.creative) for prompt in cases("", 240, 0)],
        "pairs": [(prompt.text, prompt.creative) for prompt in cases("", 240, 1)],
        "unseen": [(prompt.text, prompt.creative) for prompt in cases("", 20, 2)],
        "hard": [(prompt.text, prompt.creative) for prompt in cases("", 20, 3)],
    }
    for name, content in rows.items():
        lines = [json.dumps({"prompt": text, "mode": ("factual", "creative")[kind]}) for text, kind in content]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


RECIPE = {
    "training": {"width": 16, "epochs": 6, "batch_size": 16, "lr": 0.005},
    "prompts": [
        {"name": "plain", "path": "plain.jsonl"},
        {"name": "pairs", "path": "pairs.jsonl", "rows": 4},
        {"name": "unseen", "path": "unseen.jsonl", "role": "unseen"},
        {"name": "hard", "path": "hard.jsonl", "role": "hard"},
    ],
}


def test_neighbouring_rows_stay_on_one_side_and_every_part_gets_some(data: Path) -> None:
    prompts = read_prompts(RECIPE, data)
    part = {prompt.text: prompt.part for prompt in prompts}
    rows = [json.loads(line)["prompt"] for line in (data / "pairs.jsonl").read_text().splitlines()]
    groups = [{part[text] for text in rows[start : start + 4]} for start in range(0, len(rows), 4)]
    assert all(len(group) == 1 for group in groups)
    assert set().union(*groups) == {"train", "calibration", "held_out"}
    shares = {name: np.mean([prompt.part == name for prompt in prompts]) for name in set(part.values())}
    assert 0.02 < shares["calibration"] < 0.2 and 0.02 < shares["held_out"] < 0.2 and shares["train"] > 0.6
    assert {prompt.part for prompt in prompts if prompt.text.startswith(("The", "the"))} == {
        "train", "calibration", "held_out", "unseen", "hard"
    }  # fmt: skip
    assert {prompt.misleads for prompt in prompts if prompt.part == "hard"} == {True}
    assert sum(prompt.misleads for prompt in prompts) == 260


def test_a_tests_prompt_never_trains_whatever_its_case_and_punctuation(data: Path) -> None:
    hard = json.loads((data / "hard.jsonl").read_text().splitlines()[0])
    unseen = json.loads((data / "unseen.jsonl").read_text().splitlines()[0])
    extra = [
        {"prompt": text.upper().replace(".", " !"), "mode": "creative"} for text in (hard["prompt"], unseen["prompt"])
    ]
    with (data / "plain.jsonl").open("a", encoding="utf-8") as file:
        file.writelines("\n" + json.dumps(row) for row in [*extra, hard])
    prompts = read_prompts(RECIPE, data)
    assert len({normalise(prompt.text) for prompt in prompts}) == len(prompts)
    found = {normalise(prompt.text): prompt.part for prompt in prompts}
    assert found[normalise(hard["prompt"])] == "hard" and found[normalise(unseen["prompt"])] == "unseen"


def test_adding_prompts_moves_none_to_another_part(data: Path) -> None:
    before = {prompt.text: prompt.part for prompt in read_prompts(RECIPE, data)}
    lines = (data / "plain.jsonl").read_text().splitlines()
    (data / "plain.jsonl").write_text("\n".join([json.dumps({"prompt": "Sing!", "mode": "creative"}), *lines]))
    after = {prompt.text: prompt.part for prompt in read_prompts(RECIPE, data)}
    assert before.items() <= after.items() and len(after) == len(before) + 1


@pytest.mark.parametrize(
    "row", ['{"prompt": "Sing."}', '{"prompt": "Sing.", "mode": "loud"}', '{"mode": "creative"}', "[1]", "no JSON"]
)
def test_a_bad_row_is_named_by_file_and_line(row: str, data: Path) -> None:
    with (data / "unseen.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n" + row)
    with pytest.raises(ValueError, match=r"unseen\.jsonl, line 21: give a row with a prompt and mode: one of"):
        read_prompts(RECIPE, data)


@pytest.mark.parametrize(
    "entry, told",
    [
        ({"name": "x", "path": "plain.jsonl", "role": "exam"}, "role is 'exam'"),
        ({"name": "x", "path": "plain.jsonl", "rows": 0}, "rows is 0"),
        ({"name": "x", "path": "plain.jsonl", "colour": "red"}, "not described well.*colour"),
        ({"path": "plain.jsonl"}, "not described well.*name"),
        ("plain.jsonl", "not described well"),
        ({"name": "x", "path": "missing.jsonl"}, "no .* file matches 'missing.jsonl'"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused(entry: object, told: str, data: Path) -> None:
    with pytest.raises(ValueError, match=told):
        read_prompts({"prompts": [entry]}, data)


@pytest.mark.parametrize(
    "content, told",
    [
        ("prompts: []", "must have the parts"),
        ("training: {}\nprompts: []", "must have the parts"),
        ("training: {}\nprompts: [1]\nmore: 1", "must have the parts"),
        ("- 1", "must have the parts"),
        ("a: [", "is no YAML"),
    ],
)
def test_a_recipe_that_is_none_is_refused(content: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=told):
        read_prompt_recipe(path)


def test_the_bundled_recipe_is_whole() -> None:
    content = read_prompt_recipe("mini-router")
    RouterSettings(**content["training"])
    roles = {PromptSource(**entry).role for entry in content["prompts"]}
    assert roles == {"train", "unseen", "hard"}
    with pytest.raises(FileNotFoundError):
        read_prompt_recipe("no-such-recipe")


@pytest.fixture
def command(data: Path, tmp_path: Path) -> list[str]:
    save_tiny(tmp_path / "base")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    names = {"checkpoint": tmp_path / "base", "data": data, "recipe": tmp_path / "recipe.yaml"}
    return [text for name, path in names.items() for text in (f"--{name}", str(path))]


def test_the_command_writes_a_whole_model_that_routes_as_it_reports(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "new" / "routed"
    assert main([*command, "--out", str(out), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["tests"].keys() == {"held out, ordinary", "held out, misleading", "other sources", "hard"}
    assert figures["tests"]["hard"]["router"]["accuracy"] > 0.9
    assert not list(out.parent.glob("unfinished-*"))
    before, after = (DuetMoeForCausalLM.from_pretrained(path) for path in (tmp_path / "base", out))
    assert before.dtype == after.dtype == torch.float32
    assert all(torch.equal(after.state_dict()[name], value) for name, value in before.state_dict().items())
    new = after.state_dict().keys() - before.state_dict().keys()
    assert new and all(name.startswith("task_router.") for name in new)
    writer = Writer.load(out)
    hard = [prompt for prompt in read_prompts(RECIPE, tmp_path / "data") if prompt.part == "hard"]
    routes = [writer.route(prompt.text) for prompt in hard]
    right = np.mean(
        [(route.probability >= 0.5) == prompt.creative for route, prompt in zip(routes, hard, strict=True)]
    )
    assert right == figures["tests"]["hard"]["router"]["accuracy"]
    hybrid = np.mean([route.mode == "hybrid" for route in routes])
    assert hybrid == pytest.approx(figures["tests"]["hard"]["router"]["hybrid"])
    assert main([*command, "--out", str(out)]) == 1
    assert "exists; name a new folder" in capsys.readouterr().err


def test_a_model_that_has_a_router_learns_another(command: list[str], tmp_path: Path) -> None:
    names = dict(zip([name.removeprefix("--") for name in command[::2]], command[1::2], strict=True))
    first = route_model(names["checkpoint"], names["data"], tmp_path / "first", names["recipe"], show=False)
    second = route_model(tmp_path / "first", names["data"], tmp_path / "second", names["recipe"], show=False)
    assert first == second
    one, two = (DuetMoeForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("first", "second"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("training, told", [({"speed": 3}, "speed"), ({"lr": "quick"}, "quick"), (None, "None")])
def test_a_recipe_of_other_settings_fails_in_one_line_and_writes_nothing(
    training: object, told: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"training": training}))
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: The recipe's training is") and told in shown and shown.count("\n") == 1
    assert not (tmp_path / "out").exists()
