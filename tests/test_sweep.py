"""`duet frontier` on a tiny model with judges by hand: what it compares, what it says, and that it goes on."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny import save_tiny

from duet_moe.cli import main
from duet_moe.configuration.modes import BUILT_IN_MODES
from duet_moe.evaluation import suite, sweep
from duet_moe.evaluation.contestants import Duet
from duet_moe.evaluation.sweep import BASELINE, PLAN, read_plan, write_outcome

SETTINGS = {
    "version": 1,
    "quality": "bits_per_character",
    "axes": ["distinct_3", "dispersion"],
    "beside": ["repetition"],
    "baseline": {
        "heads": {"coherence": 0.0},
        "truncation": {
            "none": {"temperature": [0.5, 1.5]},
            "min-p 0.1": {"min_p": 0.1, "temperature": [0.5, 1.5]},
        },
    },
    "arms": {
        "mine": {"mode": "creative", "temperature": [1.0]},
        "its twin": {"mode": "creative", "temperature": [1.0]},
    },
}


class Encoder:
    name = "by hand"

    def embed(self, texts: list[str]) -> np.ndarray:
        return np.array([[len(text), 1 + text.count("e")] for text in texts], dtype=float)


class Evaluator:
    def bits_per_character(self, texts: list[str], prompts: list[str]) -> np.ndarray:
        return np.array([1 + text.count("a") / len(text) for text in texts])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Three prompts, eight tokens; returns the file of settings."""
    tasks = suite.tasks_of

    def fewer(name: str, samples: int | None = None):  # type: ignore[no-untyped-def]
        from dataclasses import replace

        return [replace(task, prompts=task.prompts[:3], max_new_tokens=8) for task in tasks(name, samples)]

    monkeypatch.setattr(suite, "tasks_of", fewer)
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(SETTINGS, sort_keys=False))
    return path


def outcome_of(base: Path, short: Path, out: Path, prompts: str = "exploratory", seeds: object = (0, 1)):  # type: ignore[no-untyped-def]
    plan = read_plan(BUILT_IN_MODES, short)
    told = sweep.sweep(str(base), plan, out, Evaluator(), Encoder(), prompts, seeds, 2, show=False)
    return plan, told


def test_every_setting_is_sampled_and_every_arm_compared(base: Path, short: Path, tmp_path: Path) -> None:
    plan, outcome = outcome_of(base, short, tmp_path / "out")
    assert list(outcome.points) == [BASELINE, "mine", "its twin"]
    assert outcome.points[BASELINE].settings == (
        "coherence T=0.5 none", "coherence T=1.5 none", "coherence T=0.5 min-p 0.1", "coherence T=1.5 min-p 0.1",
    )  # fmt: skip
    assert outcome.points[BASELINE].quality.shape == (4, 3) and outcome.dropped == 0
    assert (outcome.points["mine"].quality <= -1).all()
    for arm, twin in zip(
        outcome.points["mine"].diversity.values(), outcome.points["its twin"].diversity.values(), strict=True
    ):
        assert np.array_equal(arm, twin)  # the same mode and seeds
    assert outcome.differences["mine"] == outcome.differences["its twin"]
    page = write_outcome(outcome, plan, tmp_path / "out", "exploratory").read_text()
    assert "| setting | bits | distinct_3 | dispersion | repetition |" in page
    assert "| mine |" in page and "coherence T=1.5 min-p 0.1" in page and "over 3 prompts (0 left out)" in page
    assert all((tmp_path / "out" / "exploratory" / f"{axis}.svg").is_file() for axis in plan.axes)


def test_prompts_that_a_setting_leaves_without_a_word_are_left_out(
    base: Path, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self, prompts, seeds, max_new_tokens):  # type: ignore[no-untyped-def]
        first = suite.tasks_of("creative")[0].prompts[0]
        silent = self.name.startswith("mine")
        return ["" if silent and p == first else f"A tale number {s}." for p, s in zip(prompts, seeds, strict=True)]

    monkeypatch.setattr(Duet, "write", write)
    plan, outcome = outcome_of(base, short, tmp_path / "out")
    assert outcome.dropped == 1 and all(own.quality.shape[1] == 2 for own in outcome.points.values())
    assert "(1 left out)" in write_outcome(outcome, plan, tmp_path / "out", "exploratory").read_text()


def test_a_prompts_figures_are_means_over_the_seeds(base: Path, short: Path, tmp_path: Path) -> None:
    both = outcome_of(base, short, tmp_path / "out")[1].points["mine"].quality
    alone = [outcome_of(base, short, tmp_path / "out", seeds=[seed])[1].points["mine"].quality for seed in (0, 1)]
    np.testing.assert_allclose(both, (alone[0] + alone[1]) / 2)
    assert not np.array_equal(*alone)


def test_the_two_sets_of_prompts_are_two_runs(base: Path, short: Path, tmp_path: Path) -> None:
    for prompts in ("exploratory", "confirmatory"):
        outcome_of(base, short, tmp_path / "out", prompts, [0])
    asked = [
        {row["prompt"] for row in suite.read_results(tmp_path / "out" / prompts / "seed-0" / "results.jsonl").values()}
        for prompts in ("exploratory", "confirmatory")
    ]
    assert len(asked[0]) == len(asked[1]) == 3 and not asked[0] & asked[1]


def test_what_was_sampled_is_not_sampled_again(
    base: Path, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = outcome_of(base, short, tmp_path / "out")
    monkeypatch.setattr(Duet, "write", lambda *_: pytest.fail("sampled again"))
    _, second = outcome_of(base, short, tmp_path / "out")
    assert first.differences == second.differences


def test_the_bundled_plan_sweeps_both_heads_and_takes_the_creative_mode_apart() -> None:
    plan = read_plan(BUILT_IN_MODES)
    one = plan.families[BASELINE]
    assert len(one) == 38 and {mode.head_mix for mode in one.values()} == {0.0, 1.0}
    assert all(mode.do_sample and not mode.draw_plan and mode.plausible_min == 0 for mode in one.values())
    assert all(mode.draw_plan for mode in plan.families["creative with a drawn plan"].values())
    assert {mode.head_mix for mode in plan.families["creative from the diversity head alone"].values()} == {1.0}
    assert [mode.gated for mode in plan.families["hybrid by the gate"].values()] == [True] * 3
    arms = [len(own) for family, own in plan.families.items() if family != BASELINE]
    assert max(arms) <= len(one) / 2  # no arm has more settings to choose from than one head


@pytest.mark.parametrize("change", [{"arms": {"mine": {"mode": "wild", "temperature": [1]}}}, {"baseline": None}])
def test_a_plan_that_cannot_be_read_is_refused(short: Path, change: dict) -> None:
    short.write_text(yaml.safe_dump(SETTINGS | change))
    with pytest.raises(ValueError, match="no plan of a frontier"):
        read_plan(BUILT_IN_MODES, short)


def test_without_seeds_or_prompts_there_is_nothing_to_sweep(base: Path, short: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one seed or more"):
        outcome_of(base, short, tmp_path / "out", seeds=[])
    with pytest.raises(ValueError, match="choose one of"):
        outcome_of(base, short, tmp_path / "out", prompts="both")


def test_the_command_says_what_may_be_claimed(
    base: Path, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("duet_moe.evaluation.encoder.Encoder", Encoder)
    monkeypatch.setattr("duet_moe.evaluation.evaluator.Evaluator.load", lambda name: Evaluator())
    command = ["frontier", str(base), "--evaluator", "judge", "--out", str(tmp_path / "out"), "--settings", str(short),
               "--seeds", "1", "--samples", "2"]  # fmt: skip
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["may_claim_better"].keys() == {"mine", "its twin"} and Path(told["page"]).is_file()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert '"Better" may' in said and "of mine." in said
    assert main([*command, "--seeds", "0"]) == 1
    assert "--seeds 0" in capsys.readouterr().err


def test_the_bundled_plan_is_no_task() -> None:
    assert PLAN.is_file()
    assert "frontier" not in {task.name for task in suite.tasks_of("all")}
