"""A frontier measured: one head alone at every sampling setting, and the modes of a model beside it.

The prompts on which settings were chosen (`exploratory`) and those on which a claim is made (`confirmatory`) are two
sets. Every seed is a run of `duet_moe.evaluation.suite`, which goes on after an interruption; a prompt's figures are
the means over the seeds.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml

from duet_moe.configuration.modes import Mode
from duet_moe.evaluation.bootstrap import Interval
from duet_moe.evaluation.contestants import Duet
from duet_moe.evaluation.frontier import Points, difference, may_claim_better
from duet_moe.evaluation.scores import BitsPerCharacter, Embeds
from duet_moe.evaluation.suite import SCORES, run, write_whole
from duet_moe.evaluation.task import TASKS

SETS = {"exploratory": "creative", "confirmatory": "confirmatory"}  # set -> suite
BASELINE = "one head"
PLAN = TASKS / "frontier.yaml"


@dataclass(frozen=True)
class Plan:
    """What is compared, read from YAML.

    Args:
        families (`dict[str, dict[str, Mode]]`): modes by setting by family; the first family is the baseline.
        axes (`tuple[str, ...]`): metrics of diversity. quality (`str`): a metric of which less is better.
        beside (`tuple[str, ...]`): metrics that the table has too.
    """

    families: Mapping[str, Mapping[str, Mode]]
    axes: tuple[str, ...]
    quality: str
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came out.

    Args:
        points (`dict[str, Points]`): by family, the baseline first.
        differences (`dict[str, dict[str, Interval | None]]`): quality above the baseline by axis by arm, in bits per
            character.
        dropped (`int`): prompts that some setting answered without a word in every sample; they are left out.
    """

    points: Mapping[str, Points]
    differences: Mapping[str, Mapping[str, Interval | None]]
    dropped: int


def read_plan(modes: Mapping[str, Mode], path: str | Path = PLAN) -> Plan:
    """Read the families; `modes` are those of the model.

    Raises:
        ValueError: if the file names a mode or a setting that is not known.
    """
    entry = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    try:
        one, families = entry["baseline"], {}
        families[BASELINE] = {
            f"{head} T={temperature:g} {name}": Mode(
                "sampled", head_mix=mix, do_sample=True, **truncation | {"temperature": temperature}
            )
            for head, mix in one["heads"].items()
            for name, truncation in one["truncation"].items()
            for temperature in truncation["temperature"]
        }
        for arm, settings in entry["arms"].items():
            changes = {name: value for name, value in settings.items() if name not in ("mode", "temperature")}
            families[arm] = {
                f"{arm} T={temperature:g}": replace(modes[settings["mode"]], temperature=temperature, **changes)
                for temperature in settings["temperature"]
            }
        return Plan(families, tuple(entry["axes"]), entry["quality"], tuple(entry.get("beside", ())))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no plan of a frontier: {error}; modes are {sorted(modes)}.") from error


def sweep(
    source: str,
    plan: Plan,
    out: str | Path,
    evaluator: BitsPerCharacter,
    encoder: Embeds,
    prompts: str = "exploratory",
    seeds: Sequence[int] = (0, 1, 2),
    samples: int | None = None,
    told: Mapping[str, str] | None = None,
    show: bool = True,
) -> Outcome:
    """Sample every setting, and compare every arm with the baseline.

    Args:
        source: bundled name, folder or Hub id of a Duet-MoE model.
        out: folder of the run; the same call goes on in it.
        prompts: `exploratory` or `confirmatory`.
        samples: answers to each prompt from each seed, in the place of the task's own.

    Raises:
        ValueError: on another set of prompts, no seeds, or fewer than two prompts that every setting answered.
    """
    if prompts not in SETS or not seeds:
        raise ValueError(
            f"prompts={prompts!r}, seeds={list(seeds)}: choose one of {list(SETS)}, and one seed or more."
        )
    contestants = [
        Duet(setting, source, mode) for settings in plan.families.values() for setting, mode in settings.items()
    ]
    tables = []
    for seed in seeds:
        folder = Path(out) / prompts / f"seed-{seed}"
        results = run(
            contestants, SETS[prompts], folder, seed, evaluator, encoder, samples=samples, told=told, show=show
        )
        tables.append(_read(results.with_name(SCORES), plan))
    means = {key: np.mean([table[key] for table in tables], axis=0) for key in tables[0]}
    answered = np.isfinite(np.stack(list(means.values()))).all(axis=0)
    if answered.sum() < 2:
        raise ValueError(f"Only {answered.sum()} prompts were answered in every setting; two or more are needed.")
    points = {
        family: Points(
            tuple(settings),
            -np.stack([means[setting, plan.quality][answered] for setting in settings]),
            {name: np.stack([means[setting, name][answered] for setting in settings]) for name in _told(plan)},
        )
        for family, settings in plan.families.items()
    }
    differences = {
        arm: {axis: difference(own, points[BASELINE], axis) for axis in plan.axes}
        for arm, own in points.items()
        if arm != BASELINE
    }
    return Outcome(points, differences, int((~answered).sum()))


def _told(plan: Plan) -> tuple[str, ...]:
    return (*plan.axes, *plan.beside)


def _read(scores: Path, plan: Plan) -> dict[tuple[str, str], np.ndarray]:
    """Return the values (prompts,) by setting and metric, NaN where one could not be told."""
    wanted = {*_told(plan), plan.quality}
    entries = json.loads(scores.read_text(encoding="utf-8"))
    table = {
        (entry["contestant"], entry["metric"]): np.array(entry["values"], dtype=float)
        for entry in entries
        if entry["metric"] in wanted
    }
    if missing := {(s, m) for own in plan.families.values() for s in own for m in wanted} - table.keys():
        raise ValueError(f"{scores} has no {sorted(missing)[0]}: is there a judge for every metric?")
    return table


def write_outcome(outcome: Outcome, plan: Plan, out: str | Path, prompts: str) -> Path:
    """Write `frontier.md`, the table and what may be claimed, with a plot for each axis; return its path."""
    folder = Path(out) / prompts
    count = next(iter(outcome.points.values())).quality.shape[1]
    lines = [
        f"# Frontier, {prompts} prompts",
        "",
        f"Quality is minus {plan.quality.replace('_', ' ')}. A difference is quality above the best that one head "
        f"reaches at the same diversity, with its 95% interval over {count} prompts ({outcome.dropped} left out).",
        "",
        "| | " + " | ".join(plan.axes) + " | better? |",
        "|---|" + "---:|" * len(plan.axes) + "---|",
    ]
    for arm, found in outcome.differences.items():
        cells = [_shown(found[axis]) for axis in plan.axes]
        lines.append(f"| {arm} | " + " | ".join(cells) + f" | {'yes' if may_claim_better(found) else 'no'} |")
    told = _told(plan)
    lines += ["", "| setting | bits | " + " | ".join(told) + " |", "|---|---:|" + "---:|" * len(told)]
    for own in outcome.points.values():
        for row, setting in enumerate(own.settings):
            figures = [-own.quality[row].mean(), *(own.diversity[name][row].mean() for name in told)]
            lines.append(f"| {setting} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |")
    for axis in plan.axes:
        _plot(outcome, axis, folder / f"{axis}.svg")
        lines += ["", f"![Quality against {axis}]({axis}.svg)"]
    write_whole(folder / "frontier.md", "\n".join(lines) + "\n")
    return folder / "frontier.md"


def _shown(told: Interval | None) -> str:
    return "never meet" if told is None else f"{told.mean:+.3f} [{told.low:+.3f}, {told.high:+.3f}]"


def _plot(outcome: Outcome, axis: str, path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    from duet_moe.evaluation.frontier import frontier

    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    for family, own in outcome.points.items():
        x, y = own.diversity[axis].mean(axis=1), own.quality.mean(axis=1)
        (line,) = panel.plot(*frontier(x, y).T, label=family)
        panel.plot(x, y, "." if family == BASELINE else "o", color=line.get_color(), alpha=0.6)
    panel.set_xlabel(axis.replace("_", " "))
    panel.set_ylabel("minus bits per character")
    panel.legend()
    with matplotlib.rc_context({"svg.hashsalt": "duet"}):  # the same figures give the same file
        figure.savefig(path, format="svg", metadata={"Date": None})
