"""The report of a run: tables with confidence intervals, differences from the first contestant, bars, some answers.

`report.md` is written first, `report.html` is made of it, and the plots stand beside both as SVG.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from duet_moe.evaluation.bootstrap import interval, paired_interval
from duet_moe.evaluation.suite import SCORES, SETTINGS, read_results, write_whole

ARROWS = {"higher": "\u2191", "lower": "\u2193", "none": ""}
SHOWN = 3  # prompts whose answers are quoted
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Evaluation</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
th, td {{ border: 1px solid #bbb; padding: .3rem .6rem; text-align: left; }}
pre {{ white-space: pre-wrap; }} img {{ max-width: 100%; }}
</style></head><body>
{body}</body></html>
"""


@dataclass(frozen=True)
class Figure:
    """One metric of one contestant.

    Args:
        direction (`str`): which is better, `higher`, `lower` or `none`. mean (`float`), low, high (*optional*): with
            the ends of the 95% interval over prompts; None for a single prompt. prompts (`int`): that it was told of.
        difference (`tuple[float, float, float]`, *optional*): from the first contestant, with its interval.
    """

    task: str
    contestant: str
    metric: str
    direction: str
    mean: float
    low: float | None
    high: float | None
    prompts: int
    difference: tuple[float, float, float] | None = None


def figures(results: str | Path) -> list[Figure]:
    """Return every figure of the scores beside `results.jsonl`, paired with the first contestant where it can be.

    Raises:
        FileNotFoundError: if there are no scores.
    """
    path = Path(results).with_name(SCORES)
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist: finish the run first, with the same command.")
    entries = json.loads(path.read_text(encoding="utf-8"))
    first: dict[tuple[str, str], dict] = {}
    found = []
    for entry in entries:
        base = first.setdefault((entry["task"], entry["metric"]), entry)
        found.append(_figure(entry, None if base is entry else base))
    return found


def _figure(entry: dict, base: dict | None) -> Figure:
    values = [value for value in entry["values"] if value is not None]
    mean, low, high = interval(values) if len(values) > 1 else (values[0], None, None)
    names = (entry["task"], entry["contestant"], entry["metric"], entry["direction"])
    difference = None if base is None else _difference(entry["values"], base["values"])
    return Figure(*names, mean, low, high, len(values), difference)


def _difference(values: Sequence[float | None], base: Sequence[float | None]) -> tuple[float, float, float] | None:
    pairs = [(a, b) for a, b in zip(values, base, strict=True) if a is not None and b is not None]
    return paired_interval([a for a, _ in pairs], [b for _, b in pairs]) if len(pairs) > 1 else None


def report(results: str | Path, out: str | Path | None = None) -> Path:
    """Write `report.md`, `report.html` and one plot for each task, and return the path of `report.md`.

    Args:
        results: a `results.jsonl`, with the run's other files beside it.
        out: folder to write to; that of the results when not given.

    Raises:
        FileNotFoundError: if the run is not finished.
        ImportError: if matplotlib is not installed.
    """
    results = Path(results)
    out = results.parent if out is None else Path(out)
    out.mkdir(parents=True, exist_ok=True)
    found = figures(results)
    tasks = list(dict.fromkeys(figure.task for figure in found))
    parts = [_head(results)]
    for task in tasks:
        own = [figure for figure in found if figure.task == task]
        _plot(own, out / f"{task}.svg")
        parts += [f"## {task}", *_tables(own), f"![bars of every metric of {task}]({task}.svg)"]
    parts += _quotes(results, tasks, list(dict.fromkeys(figure.contestant for figure in found)))
    text = "\n\n".join(parts) + "\n"
    write_whole(out / "report.html", PAGE.format(body=_to_html(text)))
    write_whole(out / "report.md", text)
    return out / "report.md"


def summary(results: str | Path) -> list[dict]:
    """Return the figures as plain data."""
    return [asdict(figure) for figure in figures(results)]


def _head(results: Path) -> str:
    settings = json.loads(results.with_name(SETTINGS).read_text(encoding="utf-8"))
    facts = {"date": settings["date"], "seed": settings["seed"]} | settings["judges"] | settings["environment"]
    lines = [f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items()]
    return "\n".join(
        [
            "# Evaluation",
            "",
            *lines,
            "",
            "Mean over prompts, and in brackets the 95% bootstrap interval over prompts. \u2191: more is better, "
            "\u2193: less is better. \u2013: not measured.",
        ]
    )


def _tables(own: Sequence[Figure]) -> Iterator[str]:
    names = list(dict.fromkeys(figure.contestant for figure in own))
    metrics = {figure.metric: figure.direction for figure in own}
    cells = {(figure.contestant, figure.metric): figure for figure in own}
    heads = [f"{metric.replace('_', ' ')} {ARROWS[better]}".strip() for metric, better in metrics.items()]
    rows = [[_cell(name), *(_value(cells.get((name, metric))) for metric in metrics)] for name in names]
    yield _table(["contestant", *heads], rows)
    if len(names) > 1:
        yield f"Difference from {_cell(names[0])}, prompt by prompt; **bold** where the interval is without 0:"
        rows = [[_cell(name), *(_change(cells.get((name, metric))) for metric in metrics)] for name in names[1:]]
        yield _table(["contestant", *heads], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Return a name as code, which nothing in it can break."""
    return f"`{text.replace('|', ' ').replace('`', ' ')}`"


def _value(figure: Figure | None) -> str:
    if figure is None:
        return "\u2013"
    mean = _number(figure.mean)
    if figure.low is None or figure.high is None:
        return mean
    low, high = _number(figure.low), _number(figure.high)
    return mean if low == high else f"{mean} [{low}, {high}]"


def _change(figure: Figure | None) -> str:
    if figure is None or figure.difference is None:
        return "\u2013"
    mean, low, high = figure.difference
    shown = f"{mean:+.3g} [{low:+.3g}, {high:+.3g}]"
    return f"**{shown}**" if low > 0 or high < 0 else shown


def _number(value: float) -> str:
    if abs(value) < 1e-12:  # what rounding leaves of 0
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _quotes(results: Path, tasks: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    """Yield the first answers of every contestant to the first prompts of tasks that write, as they came."""
    rows = read_results(results)
    yield "## Answers, not selected"
    for task in tasks:
        for index in range(SHOWN):
            found = [rows[key] for name in names if (key := (name, task, index, 0)) in rows and "text" in rows[key]]
            if found:
                yield f"{task}: {_cell(found[0]['prompt'])}"
            for row in found:
                yield f"{_cell(row['contestant'])}:\n\n{_quote(row['text'])}"


def _quote(text: str) -> str:
    """Return a text as indented code, which nothing in it can end."""
    return "\n".join(f"    {line}" for line in text.splitlines()) or "    (empty)"


def _plot(own: Sequence[Figure], path: Path) -> None:
    """Draw one panel of bars for each metric, with the intervals."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    metrics = list(dict.fromkeys(figure.metric for figure in own))
    names = list(dict.fromkeys(figure.contestant for figure in own))
    columns = min(4, len(metrics))
    lines = -(-len(metrics) // columns)
    labels = 0.1 * max(map(len, names))  # inches
    size = (3.0 * columns + labels, (0.9 + 0.35 * len(names)) * lines + 0.4)
    canvas = Canvas(figsize=size, layout="constrained")
    panels = canvas.subplots(lines, columns, squeeze=False, sharey=True).flat
    for panel, metric in zip(panels, metrics, strict=False):
        bars = [figure for figure in own if figure.metric == metric]
        where = [names.index(figure.contestant) for figure in bars]
        means = [figure.mean for figure in bars]
        ends = [(figure.low, figure.high) for figure in bars]
        reach = [
            [0.0 if low is None else mean - low for mean, (low, _) in zip(means, ends, strict=True)],
            [0.0 if high is None else high - mean for mean, (_, high) in zip(means, ends, strict=True)],
        ]
        panel.barh(where, means, xerr=reach, color=[f"C{i}" for i in where], capsize=3)
        panel.set_yticks(range(len(names)), names, parse_math=False)
        panel.set_title(f"{metric.replace('_', ' ')} {ARROWS[bars[0].direction]}", fontsize=9)
        panel.tick_params(labelsize=8)
    canvas.axes[0].invert_yaxis()  # the first contestant on top
    for panel in list(canvas.axes)[len(metrics) :]:
        panel.set_visible(False)
    unfinished = path.with_name(f".{path.name}.unfinished")
    with matplotlib.rc_context({"svg.hashsalt": "duet"}):  # the same figures give the same file
        canvas.savefig(unfinished, format="svg", metadata={"Date": None})
    os.replace(unfinished, path)


def _to_html(text: str) -> str:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
