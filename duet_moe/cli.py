"""The `duet` program: each command is a thin layer over a function that Python users call too.

Exit status 0 is success, 1 a failure, 2 wrong use. Heavy imports happen inside the commands: `--help` is quick.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from duet_moe.eval_cli import add_eval_command, add_frontier_command
from duet_moe.voice_cli import add_voice_commands

LATER = {
    "guard": "check and index texts for guardrails",
    "bench": "measure speed against peers",
    "serve": "serve an OpenAI-compatible API",
    "plan": "estimate cost of a shape on a cluster",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    arguments, extra = make_parser().parse_known_args(argv)
    if extra and not arguments.passes_on:
        make_parser().error(f"unrecognized arguments: {' '.join(extra)}")
    arguments.extra = extra
    try:
        return arguments.run(arguments) or 0
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"duet {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="duet", description="One sparse trunk, two voices.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    write = _command(commands, "write", "answer a prompt", _write)
    _add_prompt(write)
    write.add_argument("--mode", help="factual, creative, hybrid or auto (the model's default mode)")

    compare = _command(commands, "compare", "answer a prompt in two modes, side by side", _compare)
    _add_prompt(compare)
    compare.add_argument("--modes", nargs="+", default=["factual", "creative"], metavar="MODE")

    info = _command(commands, "info", "show parameters, cache and size of a model", _info)
    info.add_argument("model", nargs="?", default="duet-mini", help="bundled name, folder or Hub id (duet-mini)")
    info.add_argument("--json", action="store_true", help="print JSON")

    pretrain = _command(commands, "pretrain", "train trunk and heads; the same command resumes", _pretrain)
    pretrain.add_argument("--recipe", default="mini", help="a recipe of the package or a YAML file (mini)")
    pretrain.add_argument("--data", required=True, help="folder that the recipe's paths start from")
    pretrain.add_argument("--out", required=True, help="folder of the run")
    pretrain.add_argument("--from", dest="start_from", help="start from this model, with a fresh optimiser")
    pretrain.add_argument("--max-steps", type=int, help="instead of the recipe's number of steps")
    pretrain.add_argument("--cache", help="folder of tokenised text, to share between runs")
    pretrain.add_argument("--seed", type=int, help="instead of the recipe's seed")

    convert = _command(commands, "convert", "turn a model of another family into Duet-MoE", _convert)
    convert.add_argument("source", help="folder or Hub id of a Mixtral, Qwen3-MoE, OLMoE, Llama or Mistral model")
    _add_result(convert)
    convert.add_argument("--experts-per-tok", type=_count, metavar="K", help="active experts (the source's; dense: 2)")
    convert.add_argument("--window", type=_count, metavar="N", help="tokens that every layer sees (as in the source)")
    convert.add_argument("--experts", type=_count, metavar="N", help="copies of a dense model's MLP (8)")
    convert.add_argument("--renormalize", action="store_true", help="chosen experts' weights sum to 1 (OLMoE: not)")
    convert.add_argument("--seed", type=int, default=0, help="for a dense model's router and the heads' adapters (0)")

    export = _command(commands, "export", "write one mix of the heads as a plain Mixtral", _export)
    export.add_argument("source", help="bundled name, folder or Hub id of a Duet-MoE model")
    _add_result(export)
    export.add_argument("--mode", type=_mode_or_mix, required=True, help="a mode, or a mix from 0 to 1")
    export.add_argument("--to", choices=["mixtral"], default="mixtral", help="family to write (mixtral)")

    add_voice_commands(commands)
    add_eval_command(commands)
    add_frontier_command(commands)

    space = _command(commands, "space", "serve the web demo (further arguments: duet space --help)", _space)
    space.set_defaults(passes_on=True)
    for name, purpose in LATER.items():
        later = _command(commands, name, f"{purpose} (not in this version)", _later)
        later.set_defaults(passes_on=True)
    return parser


def _command(commands, name: str, purpose: str, run: Callable) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
    own_help = name != "space"  # the Space's own parser answers --help
    parser = commands.add_parser(name, help=purpose, description=purpose.capitalize() + ".", add_help=own_help)
    parser.set_defaults(run=run, passes_on=False)
    return parser


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="what to write, or a question; - reads standard input")
    parser.add_argument("--model", default="duet-mini", help="bundled name, folder or Hub id (duet-mini)")
    parser.add_argument("--max-new-tokens", type=int, default=160, metavar="N")
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--voice", metavar="NAME", help="a voice of the store, or the folder of one")
    parser.add_argument("--store", metavar="DIR", help="folder of the voice store ($DUET_MOE_VOICES, or your own)")
    parser.add_argument("--experts", type=int, dest="num_experts_per_tok", metavar="K", help="active experts a token")
    parser.add_argument("--json", action="store_true", help="print text, tokens and both heads' evidence as JSON")


def _add_result(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", help="folder to make; the same command goes on after an interruption")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the new weights (the source's)"
    )
    parser.add_argument("--json", action="store_true", help="print sizes, time and notes as JSON")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _mode_or_mix(text: str) -> str | float:
    try:
        mix = float(text)
    except ValueError:
        return text
    if not 0.0 <= mix <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not a mix from 0 (coherence head) to 1 (diversity head)")
    return mix


def _settings(arguments: argparse.Namespace) -> dict[str, object]:
    names = ("temperature", "num_experts_per_tok")
    own = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return {"max_new_tokens": arguments.max_new_tokens, "seed": arguments.seed, **own}


def _prompt(arguments: argparse.Namespace) -> str:
    return sys.stdin.read() if arguments.prompt == "-" else arguments.prompt


def _write(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from duet_moe import Writer
    from duet_moe.configuration.modes import AUTO

    writer = Writer.load(arguments.model, arguments.voice, store=arguments.store)
    settings = _settings(arguments) | {"mode": arguments.mode}
    if arguments.json:
        print(json.dumps(asdict(writer.write(_prompt(arguments), **settings))))  # type: ignore[arg-type]
        return
    prompt = _prompt(arguments)
    if (arguments.mode or writer.model.config.default_mode) == AUTO:
        route = writer.route(prompt)
        settings["mode"] = route.mode
        print(f"mode: {route.mode} (creative with probability {route.probability:.2f})", file=sys.stderr)
    for piece in writer.stream(prompt, evidence=False, **settings):  # type: ignore[arg-type]
        print(piece.text, end="", flush=True)
    print()


def _compare(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from rich.columns import Columns
    from rich.console import Console
    from rich.live import Live
    from rich.panel import Panel
    from rich.text import Text as RichText

    from duet_moe import Writer

    writer = Writer.load(arguments.model, arguments.voice, store=arguments.store)
    prompt, settings = _prompt(arguments), _settings(arguments)
    if arguments.json:
        answers = writer.compare(prompt, arguments.modes, **settings)  # type: ignore[arg-type]
        print(json.dumps({name: asdict(text) for name, text in answers.items()}))
        return
    console = Console()
    with Live(console=console, refresh_per_second=8) as live:
        for texts in writer.stream_compare(prompt, arguments.modes, **settings):  # type: ignore[arg-type]
            width = max(20, console.width // len(texts) - 1)
            panels = [
                Panel(
                    RichText(text.text),
                    title=name,
                    subtitle=f"{text.tokens_per_second:.0f} tokens/s, seed {text.seed}",
                    width=width,
                )
                for name, text in texts.items()
            ]
            live.update(Columns(panels, padding=0))


def _info(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from duet_moe import DuetMoeForCausalLM
    from duet_moe.modeling.checkpoints import locate
    from duet_moe.modeling.info import describe

    source = locate(arguments.model)
    model = DuetMoeForCausalLM.from_pretrained(source)
    facts = describe(model, source if Path(source).is_dir() else None)
    if arguments.json:
        print(json.dumps(facts))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=arguments.model, show_header=False)
    for name, value in facts.items():
        if isinstance(value, dict):
            for part, count in value.items():
                table.add_row(f"{name}: {part.replace('_', ' ')}", f"{count:,}")
        else:
            table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)


def _pretrain(arguments: argparse.Namespace) -> None:
    with needs_extra("finetune"):
        from duet_moe.finetune.pretrain import pretrain
    folder = pretrain(
        arguments.recipe,
        arguments.data,
        arguments.out,
        arguments.start_from,
        arguments.max_steps,
        arguments.cache,
        arguments.seed,
    )
    if int(os.environ.get("RANK", "0")) == 0:  # under torchrun every process comes here
        print(f"The model is in {folder}")


def _convert(arguments: argparse.Namespace) -> None:
    from duet_moe.modeling.convert import convert

    report = convert(
        arguments.source,
        arguments.out,
        arguments.experts_per_tok,
        arguments.window,
        arguments.experts,
        arguments.renormalize,
        _dtype(arguments.dtype),
        arguments.seed,
    )
    _print_report(report, arguments.json)


def _export(arguments: argparse.Namespace) -> None:
    from duet_moe.modeling.export import export_mixtral

    report = export_mixtral(arguments.source, arguments.out, arguments.mode, _dtype(arguments.dtype))
    _print_report(report, arguments.json)


def _dtype(name: str | None):  # type: ignore[no-untyped-def]
    import torch

    return getattr(torch, name) if name else None


def _print_report(report: dict[str, object], as_json: bool) -> None:
    if as_json:
        print(json.dumps(report))
        return
    for note in report["notes"]:  # type: ignore[attr-defined]
        print(f"note: {note}")
    print(f"The model is in {report['folder']}: {report['parameters']:,} parameters, {report['bytes']:,} bytes")


def _space(arguments: argparse.Namespace) -> int | None:
    with needs_extra("space"):
        from duet_moe.space.app import main as serve
    return serve(arguments.extra)


@contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """Explain a missing library by the extra that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise RuntimeError(f"This needs {error.name}: pip install 'duet-moe[{name}]'") from error


def _later(arguments: argparse.Namespace) -> None:
    from duet_moe import NotInThisVersionError

    raise NotInThisVersionError(f"duet {arguments.command}", "It arrives in a later one.")


if __name__ == "__main__":
    sys.exit(main())
