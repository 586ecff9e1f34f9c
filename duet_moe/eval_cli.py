"""`duet eval`: a suite of tasks for any number of contestants, over `duet_moe.evaluation.suite` and `report`."""

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from duet_moe.evaluation.report import Figure

SUITES = ("creative", "factual", "style", "cost", "confirmatory", "all")


def add_eval_command(commands) -> None:  # type: ignore[no-untyped-def]
    """Add `eval` to the subparsers of the program."""
    purpose = "evaluate models by task; the same command goes on after an interruption"
    parser = commands.add_parser("eval", help=purpose, description=purpose.capitalize() + ".")
    parser.set_defaults(run=_eval, passes_on=False)
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="duet-mini, duet-mini:creative, duet-mini:voice-NAME, hf:FOLDER, hf:FOLDER:greedy, "
        "openai:http://HOST:PORT/v1#NAME; the first is what the others are compared with",
    )
    parser.add_argument("--suite", type=_suite, required=True, help=f"{', '.join(SUITES)}, or a task's YAML file")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run, its results and its report")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same texts (0)")
    parser.add_argument("--samples", type=int, metavar="N", help="answers to each prompt (as the task says)")
    parser.add_argument("--evaluator", metavar="MODEL", help="folder or Hub id of a model that judges bits/character")
    parser.add_argument("--training-text", metavar="PATH", help="what the models were trained on, to measure novelty")
    parser.add_argument("--store", metavar="DIR", help="folder of the voice store ($DUET_MOE_VOICES, or your own)")
    parser.add_argument("--dollars-per-hour", type=float, metavar="D", help="of this machine, for the price of tokens")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def _suite(text: str) -> str:
    if text not in SUITES and Path(text).suffix not in (".yaml", ".yml"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(SUITES)}, and no YAML file")
    return text


def _eval(arguments: argparse.Namespace) -> None:
    from duet_moe.cli import needs_extra

    if arguments.dollars_per_hour is not None and not arguments.dollars_per_hour > 0:
        raise ValueError(f"--dollars-per-hour {arguments.dollars_per_hour:g}: give a price above 0, such as 1.5.")
    with needs_extra("eval"):
        from duet_moe.evaluation.contestants import contestant
        from duet_moe.evaluation.report import figures, report, summary
        from duet_moe.evaluation.suite import run

        contestants = [contestant(spec, arguments.store) for spec in arguments.models]
        judges, told = _judges(arguments)
        with redirect_stdout(sys.stderr):  # progress is no part of the answer
            results = run(
                contestants,
                arguments.suite,
                arguments.out,
                arguments.seed,
                samples=arguments.samples,
                dollars_per_hour=arguments.dollars_per_hour,
                told=told,
                **judges,
            )
        path = report(results)
    if arguments.json:
        print(json.dumps({"results": str(results), "report": str(path), "figures": summary(results)}))
        return
    _print_figures(figures(results))
    print(f"The report is {path}")


def _judges(arguments: argparse.Namespace) -> tuple[dict, dict[str, str]]:
    """Return the judges that the suite needs and that were named, and what the report says of them."""
    from duet_moe.evaluation.scores import METRICS
    from duet_moe.evaluation.task import tasks_of

    judges: dict[str, object] = {}
    told: dict[str, str] = {}
    metrics = {metric for task in tasks_of(arguments.suite) for metric in task.metrics}
    if any(METRICS[metric].judge == "encoder" for metric in metrics & METRICS.keys()):
        from duet_moe.evaluation.encoder import Encoder

        encoder = Encoder()
        judges["encoder"], told["encoder"] = encoder, encoder.name
    if arguments.evaluator is not None:
        from duet_moe.evaluation.evaluator import Evaluator

        judges["evaluator"], told["evaluator"] = Evaluator.load(arguments.evaluator), arguments.evaluator
    if arguments.training_text is not None:
        from duet_moe.evaluation.novelty import TrainingNgrams
        from duet_moe.finetune.voice_corpus import read_texts

        judges["training"] = TrainingNgrams.from_texts(read_texts(arguments.training_text))
        told["training_text"] = arguments.training_text
    if arguments.dollars_per_hour is not None:
        told["dollars_per_hour"] = f"{arguments.dollars_per_hour:g}"
    return judges, told


def _print_figures(found: "list[Figure]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    for task in dict.fromkeys(figure.task for figure in found):
        table = Table("contestant", title=task)
        table.add_column("metric", no_wrap=True)
        table.add_column("mean", no_wrap=True)
        table.add_column("95% interval", no_wrap=True)
        for figure in (figure for figure in found if figure.task == task):
            ends = "" if figure.low is None else f"{figure.low:.4g} to {figure.high:.4g}"
            # no markup: a name's brackets are brackets
            table.add_row(*map(Text, (figure.contestant, figure.metric, f"{figure.mean:.4g}", ends)))
        Console().print(table)
