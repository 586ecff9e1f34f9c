"""`duet eval` and `duet frontier`, over `duet_moe.evaluation.suite`, `report` and `sweep`."""

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


def add_frontier_command(commands) -> None:  # type: ignore[no-untyped-def]
    """Add `frontier` to the subparsers of the program."""
    purpose = "say whether a model's modes reach more quality at equal diversity than one head, however it is sampled"
    parser = commands.add_parser("frontier", help=purpose, description=purpose.capitalize() + ".")
    parser.set_defaults(run=_frontier, passes_on=False)
    parser.add_argument("model", nargs="?", default="duet-mini", help="a Duet-MoE model (duet-mini)")
    parser.add_argument(
        "--evaluator", required=True, metavar="MODEL", help="folder or Hub id of the independent judge"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder of the run; the same command goes on in it"
    )
    parser.add_argument(
        "--prompts", choices=["exploratory", "confirmatory"], default="exploratory",
        help="choose settings on the first set, and judge once on the second (exploratory)",
    )  # fmt: skip
    parser.add_argument(
        "--settings", metavar="FILE", help="YAML of other settings than evaluation/tasks/frontier.yaml"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs with seeds of their own (3)")
    parser.add_argument("--samples", type=int, metavar="N", help="answers to each prompt and seed (as the task says)")
    parser.add_argument("--json", action="store_true", help="print the differences as JSON")


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


def _frontier(arguments: argparse.Namespace) -> None:
    from duet_moe.cli import needs_extra

    if arguments.seeds < 1:
        raise ValueError(f"--seeds {arguments.seeds}: ask for one or more.")
    with needs_extra("eval"):
        from duet_moe.evaluation.contestants import Duet
        from duet_moe.evaluation.encoder import Encoder
        from duet_moe.evaluation.evaluator import Evaluator
        from duet_moe.evaluation.frontier import may_claim_better
        from duet_moe.evaluation.sweep import PLAN, read_plan, sweep, write_outcome

        evaluator, encoder = Evaluator.load(arguments.evaluator), Encoder()
        plan = read_plan(Duet("model", arguments.model).writer.modes, arguments.settings or PLAN)
        told = {"evaluator": arguments.evaluator, "encoder": encoder.name}
        with redirect_stdout(sys.stderr):  # progress is no part of the answer
            outcome = sweep(
                arguments.model, plan, arguments.out, evaluator, encoder, arguments.prompts,
                range(arguments.seeds), arguments.samples, told,
            )  # fmt: skip
        page = write_outcome(outcome, plan, arguments.out, arguments.prompts)
    verdicts = {arm: may_claim_better(found) for arm, found in outcome.differences.items()}
    if arguments.json:
        differences = {
            arm: {axis: each and each._asdict() for axis, each in found.items()}
            for arm, found in outcome.differences.items()
        }
        print(json.dumps({"page": str(page), "differences": differences, "may_claim_better": verdicts}))
        return
    print(page.read_text(encoding="utf-8"))
    for arm, better in verdicts.items():
        print(f'"Better" {"may" if better else "may not"} be claimed of {arm}.')
    print(f"The page is {page}")


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
