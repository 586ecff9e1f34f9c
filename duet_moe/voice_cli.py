"""`duet voice`: what is done with voices once they are made, each command over a method of the voice store."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from duet_moe.finetune.voices import VoiceStore


def add_voice_commands(commands) -> None:  # type: ignore[no-untyped-def]
    """Add `voice` and its commands to the subparsers of the program."""
    purpose = "keep, look at and pass on voices, which adapt the diversity head to a style"
    group = commands.add_parser("voice", help=purpose, description=purpose.capitalize() + ".")
    voice = group.add_subparsers(dest="voice_command", required=True, metavar="COMMAND")

    train = _command(voice, "train", "train a voice; the same command goes on after an interruption", _train)
    train.add_argument("--corpus", required=True, help="file or folder of texts in the style")
    train.add_argument("--name", required=True, type=_name, help="what to call the voice")
    train.add_argument("--base", default="duet-mini", help="bundled name, folder or Hub id of the model (duet-mini)")
    train.add_argument("--recipe", default="standard", help="quick, standard, careful or a YAML file (standard)")
    train.add_argument("--heldout", help="texts to measure on (some of the corpus, set apart)")
    train.add_argument("--neutral", help="texts on the same matters in nobody's style, for the style score")
    train.add_argument("--text-column", help="of a csv (text, or prompt and response)")
    train.add_argument("--prompt-column", help="of a csv")
    train.add_argument("--language", default="en", help="that the corpus should be in (en)")
    _add_training_options(train)

    prefer = _command(voice, "prefer", "teach a voice by chosen and rejected answers; goes on as train does", _prefer)
    prefer.add_argument("--pairs", required=True, help="file or folder of rows with prompt, chosen and rejected")
    prefer.add_argument("--name", required=True, type=_name, help="what to call the voice that is made")
    prefer.add_argument("--voice", type=_name, help="a voice of the store to go on from (the base)")
    prefer.add_argument("--base", help="bundled name, folder or Hub id of the model (the voice's, else duet-mini)")
    prefer.add_argument("--recipe", default="prefer", help="prefer, another recipe's name or a YAML file (prefer)")
    prefer.add_argument("--heldout", help="pairs to measure on (those of some prompts, set apart)")
    _add_training_options(prefer)

    _command(voice, "list", "list the voices of the store, damaged ones too", _list, as_json=True)
    show = _command(voice, "show", "show the card of a voice", _show, as_json=True)
    show.add_argument("name", type=_name, help="a voice of the store")
    delete = _command(voice, "delete", "delete voices, without asking", _delete)
    delete.add_argument("names", type=_name, nargs="+", metavar="name", help="a voice of the store")

    export = _command(voice, "export", "write a voice to a zip archive", _export)
    export.add_argument("name", type=_name, help="a voice of the store")
    export.add_argument("out", type=Path, help="archive to make, such as acme.zip")

    import_ = _command(voice, "import", "take a voice from a zip archive into the store", _import)
    import_.add_argument("archive", type=Path, help="what `duet voice export` wrote")
    import_.add_argument("--name", type=_name, help="instead of the voice's own name")
    import_.add_argument("--replace", action="store_true", help="in place of a voice of that name")

    merge = _command(voice, "merge", "write the base with the voice in it as one checkpoint", _merge)
    merge.add_argument("name", help="a voice of the store, or its folder")
    merge.add_argument("out", type=Path, help="folder to make")
    merge.add_argument("--base", help="bundled name, folder or Hub id of the base (the one that the card names)")

    score = _command(voice, "score", "say how much texts sound like a voice", _score, as_json=True)
    score.add_argument("name", help="a voice of the store, or its folder")
    score.add_argument("texts", type=Path, help="file or folder of texts, as for training")


def _command(voice, name: str, purpose: str, run: Callable, as_json: bool = False) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
    parser = voice.add_parser(name, help=purpose, description=purpose.capitalize() + ".")
    parser.add_argument("--store", help="folder of voices ($DUET_MOE_VOICES, or duet-moe/voices in your data folder)")
    if as_json:
        parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run, passes_on=False)
    return parser


def _add_training_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--personal-data", choices=["mask", "refuse", "keep"], default="mask", help="(mask)")
    command.add_argument("--author", default="", help="for the card")
    command.add_argument("--licence", default="", help="for the card")
    command.add_argument("--load-in-4bit", action="store_true", help="train on a 4-bit trunk")
    command.add_argument("--replace", action="store_true", help="in place of a voice of that name")
    command.add_argument("--seed", type=int, default=0, help="the same seed gives the same voice (0)")


def _name(text: str) -> str:
    from duet_moe.modeling.voice_files import check_name

    try:
        return check_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _store(arguments: argparse.Namespace) -> "VoiceStore":
    from duet_moe.finetune.voices import VoiceStore

    return VoiceStore(arguments.store)


OPTIONS = ("name", "base", "recipe", "store", "heldout", "personal_data", "author", "licence", "load_in_4bit",
           "replace", "seed")  # fmt: skip


def _train(arguments: argparse.Namespace) -> None:
    from duet_moe.cli import needs_extra

    names = (*OPTIONS, "corpus", "neutral", "text_column", "prompt_column", "language")
    with needs_extra("finetune"):
        from duet_moe.finetune.style import train_voice
    _say(arguments, train_voice(**{name: getattr(arguments, name) for name in names}), "Held-out loss", "heldout_loss")


def _prefer(arguments: argparse.Namespace) -> None:
    from duet_moe.cli import needs_extra

    with needs_extra("finetune"):
        from duet_moe.finetune.prefer import prefer_voice
    folder = prefer_voice(**{name: getattr(arguments, name) for name in (*OPTIONS, "pairs", "voice")})
    _say(arguments, folder, "Held-out pairs whose chosen answer is likelier", "preferred")


def _say(arguments: argparse.Namespace, folder: Path, what: str, figure: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:  # under torchrun every process comes here
        figures = _store(arguments).card(arguments.name).figures
        form = ".0%" if figure == "preferred" else ".3f"
        told = ", ".join(f"{figures[f'{figure}_{when}']:{form}} {when}" for when in ("before", "after"))
        share = ", ".join(f"{figures[f'style_share_{when}']:.0%} {when}" for when in ("before", "after"))
        print(f"{what}: {told}. Answers taken for the style: {share}.")
        print(f"The voice {arguments.name} is in {folder}: duet voice show {arguments.name}")


def _list(arguments: argparse.Namespace) -> None:
    store = _store(arguments)
    rows = [_summary(store, name) for name in store.names()]
    if arguments.json:
        print(json.dumps(rows))
        return
    if not rows:
        print(f"No voices in {store.root}")
        return
    _print_table(
        f"Voices in {store.root}",
        [
            [_printable(row[column]) for column in ("name", "base", "created", "licence", "bytes", "state")]
            for row in rows
        ],
        ["voice", "base", "created", "licence", "bytes", "state"],
    )


def _summary(store: "VoiceStore", name: str) -> dict[str, object]:
    """Return one row of the list; a voice that cannot be used is a row as well, which says why."""
    row: dict[str, object] = dict.fromkeys(("base", "created", "licence", "bytes"))
    try:
        card = store.card(name)
        size = sum(file.stat().st_size for file in store.path(name).iterdir() if file.is_file())
        row |= {"base": card.base["name"], "created": card.created, "licence": card.licence, "bytes": size}
        store.check(name)
    except (ValueError, OSError) as error:
        return {"name": name, **row, "state": f"damaged: {error}"}
    return {"name": name, **row, "state": "whole"}


def _show(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from duet_moe.finetune.voice_card import flat_rows

    store = _store(arguments)
    store.check(arguments.name)
    facts = asdict(store.card(arguments.name)) | {"folder": str(store.path(arguments.name))}
    if arguments.json:
        print(json.dumps(facts))
        return
    _print_table(arguments.name, [[_printable(cell) for cell in row] for row in flat_rows(facts)])


def _delete(arguments: argparse.Namespace) -> None:
    store = _store(arguments)
    for name in arguments.names:
        store.path(name)  # all or none, as far as one can know before
    for name in arguments.names:
        store.delete(name)
        print(f"Deleted {name}")


def _export(arguments: argparse.Namespace) -> None:
    out = _store(arguments).export(arguments.name, arguments.out)
    print(f"The voice {arguments.name} is in {out}: {out.stat().st_size:,} bytes")


def _import(arguments: argparse.Namespace) -> None:
    store = _store(arguments)
    name = store.import_(arguments.archive, arguments.name, arguments.replace)
    print(f"The voice {name} is in {store.path(name)}")


def _merge(arguments: argparse.Namespace) -> None:
    from duet_moe.cli import needs_extra
    from duet_moe.finetune.voices import VoiceCard, merge_voice, voice_folder

    folder = voice_folder(arguments.name, arguments.store)
    with needs_extra("finetune"):
        out = merge_voice(folder, arguments.base or VoiceCard.load(folder).base["name"], arguments.out)
    print(f"The model is in {out}")


def _score(arguments: argparse.Namespace) -> None:
    from duet_moe.cli import needs_extra
    from duet_moe.modeling.voice_files import voice_folder

    folder = voice_folder(arguments.name, arguments.store)
    if not (folder / "style.json").is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no style score (style.json): train the voice to get one.")
    with needs_extra("finetune"):
        from duet_moe.finetune.style_score import StyleScorer
        from duet_moe.finetune.voice_corpus import read_texts
    scorer, texts = StyleScorer.load(folder), read_texts(arguments.texts)
    probabilities = [float(value) for value in scorer.probabilities(texts)]
    answer = {
        "voice": arguments.name,
        "texts": len(texts),
        "share": scorer.share(texts),
        "accuracy": scorer.accuracy,
        "probabilities": probabilities,
    }
    if arguments.json:
        print(json.dumps(answer))
        return
    rows = [[f"{number:.3f}", _printable(text)[:80]] for number, text in zip(probabilities, texts, strict=True)]
    _print_table(
        f"{answer['share']:.1%} of {len(texts)} texts are taken for {arguments.name} (accuracy {scorer.accuracy:.1%})",
        rows,
        ["probability", "text"],
    )


def _printable(value: object) -> str:
    """Return a cell's text without what could move a terminal's cursor; cards come from anywhere."""
    text = "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _print_table(title: str, rows: list[list[str]], columns: list[str] | None = None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), show_header=columns is not None)
    for column in columns or ("", ""):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # no markup: a card's brackets are brackets
    Console().print(table)
