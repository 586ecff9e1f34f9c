"""The run of a suite: resumable, seeded, one line of JSON per sample.

Answers are written in blocks whose limits depend on the task alone. A block that was interrupted is written again as a
whole, so that every text has the same neighbours in its batch, and with them the same last bits, in any run.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TextIO

from duet_moe.evaluation.card import environment
from duet_moe.evaluation.choice import multiple_choice
from duet_moe.evaluation.contestants import Contestant, Duet, Local, Scoring, Timed
from duet_moe.evaluation.scores import Answers, BitsPerCharacter, Embeds, Judges, Novelty, direction, score
from duet_moe.evaluation.task import Task, tasks_of
from duet_moe.finetune.progress import Progress
from duet_moe.finetune.style_score import StyleScorer
from duet_moe.modeling.voice_files import voice_folder

BLOCK = 16  # samples written at a time
WARM_UP = 8  # tokens that are written and not timed
RESULTS, SCORES, SETTINGS = "results.jsonl", "scores.json", "settings.json"
Key = tuple[str, str, int, int]  # contestant, task, index of the prompt, number of the sample


def run(
    contestants: Sequence[Contestant],
    suite: str,
    out: str | Path,
    seed: int = 0,
    evaluator: BitsPerCharacter | None = None,
    encoder: Embeds | None = None,
    *,
    samples: int | None = None,
    training: Novelty | None = None,
    dollars_per_hour: float | None = None,
    told: Mapping[str, str] | None = None,
    show: bool = True,
) -> Path:
    """Let the contestants answer a suite, score the answers, and return the path of `results.jsonl` in `out`.

    The same call goes on after an interruption. A folder takes further contestants and suites; `scores.json` holds
    those of the last call. A contestant that cannot do a task is left out of it, a metric without its judge too.

    Args:
        suite: as in `tasks_of`.
        out: folder to make or to go on in.
        evaluator: judges bits per character, such as `duet_moe.evaluation.evaluator.Evaluator`.
        encoder: embeds texts, such as `duet_moe.evaluation.encoder.Encoder`.
        samples: answers to each prompt, in the place of the tasks' own.
        training: knows the training text, such as `duet_moe.evaluation.novelty.TrainingNgrams`.
        dollars_per_hour: of the machine, for the price of tokens.
        told: what `settings.json` and the report say of the judges.
        show: show progress.

    Raises:
        ValueError: on two contestants of one name, or a folder that was begun with another seed, other prompts, other
            samples or another state of a contestant's files.
    """
    tasks = tasks_of(suite, samples)
    names = [contestant.name for contestant in contestants]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"The contestants are {names}: name at least one, and none twice.")
    judges = Judges(encoder, evaluator, training, voice_scorers(contestants), dollars_per_hour)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    results = out / RESULTS
    done = read_results(results)
    _check(done, names, tasks, seed)
    _settle(out / SETTINGS, seed, contestants, told or {})
    _answer_all(contestants, tasks, seed, done, results, show)
    scores = [
        {"contestant": name, "task": task.name, "suite": task.suite, "version": task.version}
        | {"metric": metric, "direction": direction(task, metric), "values": values}
        for task in tasks
        for name in names
        for metric, values in score(task, _groups(task, name, done, judges)).items()
    ]
    write_whole(out / SCORES, json.dumps(scores, indent=1) + "\n")
    return results


def read_results(path: str | Path) -> dict[Key, dict]:
    """Return the samples of a `results.jsonl` by contestant, task, index of the prompt and number of the sample.

    A last line that a crash cut off does not count; of a sample that is there twice the first does.

    Raises:
        ValueError: if another line is damaged.
    """
    path = Path(path)
    rows: dict[Key, dict] = {}
    for number, line in enumerate(_whole_lines(path).splitlines(), 1):
        try:
            row = json.loads(line)
            rows.setdefault((row["contestant"], row["task"], row["index"], row["sample"]), row)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is damaged ({error}): delete that line to have it made again."
            ) from error
    return rows


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes() if path.is_file() else b""
    return content[: content.rfind(b"\n") + 1]


def _check(done: Mapping[Key, dict], names: Sequence[str], tasks: Sequence[Task], seed: int) -> None:
    """Refuse answers to something else than what is asked now."""
    for name in names:
        for task in tasks:
            for row in task.rows(seed):
                old = done.get((name, task.name, row["index"], row["sample"]), row | {"version": task.version})
                for what, now in (row | {"version": task.version}).items():
                    if old[what] != now:
                        raise ValueError(
                            f"The folder has an answer of {name!r} in {task.name!r} for {what} {old[what]!r}; "
                            f"now it is {now!r}. Take the same seed, samples and task, or another folder."
                        )


def _settle(path: Path, seed: int, contestants: Sequence[Contestant], told: Mapping[str, str]) -> None:
    """Write the settings; refuse contestants whose files are not those of their earlier answers."""
    digests = json.loads(path.read_text(encoding="utf-8"))["contestants"] if path.is_file() else {}
    for contestant in contestants:
        now = contestant.fingerprint() if isinstance(contestant, Local) else ""
        if digests.setdefault(contestant.name, now) != now:
            raise ValueError(
                f"The files of {contestant.name!r} have changed since {str(path.parent)!r} was begun: take another "
                "folder, or delete this one."
            )
    settings = {"seed": seed, "date": date.today().isoformat(), "contestants": digests, "judges": dict(told)}
    write_whole(path, json.dumps(settings | {"environment": environment()}, indent=1) + "\n")


def _answer_all(
    contestants: Sequence[Contestant],
    tasks: Sequence[Task],
    seed: int,
    done: dict[Key, dict],
    results: Path,
    show: bool,
) -> None:
    """Write what is missing in `done` to the file and to `done`, contestant after contestant."""
    step = 0
    total = len(contestants) * sum(len(task.rows(seed)) for task in tasks)
    if results.is_file():
        os.truncate(results, len(_whole_lines(results)))
    with Progress(total, show=show) as progress, results.open("a", encoding="utf-8") as log:
        for contestant in contestants:
            for task in tasks:
                rows = task.rows(seed)
                for block in (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)):
                    _answer_block(contestant, task, block, done, log)
                    step += len(block)
                    progress.update(step, {})


def _answer_block(contestant: Contestant, task: Task, block: list[dict], done: dict[Key, dict], log: TextIO) -> None:
    keys: list[Key] = [(contestant.name, task.name, row["index"], row["sample"]) for row in block]
    if all(key in done for key in keys):
        return
    for key, row, answer in zip(keys, block, _answers(contestant, task, block), strict=False):
        if key not in done:
            done[key] = {"contestant": contestant.name, "task": task.name, "version": task.version} | row | answer
            log.write(json.dumps(done[key], ensure_ascii=False) + "\n")
    log.flush()
    os.fsync(log.fileno())


def _answers(contestant: Contestant, task: Task, block: list[dict]) -> list[dict]:
    """Return what each row of the block adds to its line; nothing where the contestant cannot do such a task."""
    if task.kind == "choose":
        if not isinstance(contestant, Scoring):
            return []
        options = [task.options[row["index"]] for row in block]
        chosen = [
            multiple_choice(row["prompt"], given, contestant.log_likelihood)
            for row, given in zip(block, options, strict=True)
        ]
        return [{"text": given[index]} for given, index in zip(options, chosen, strict=True)]
    if task.kind == "time":
        if not isinstance(contestant, Timed):
            return []
        contestant.time(block[0]["prompt"], block[0]["seed"], WARM_UP)
        weights = contestant.weights()
        return [asdict(contestant.time(row["prompt"], row["seed"], task.max_new_tokens)) | weights for row in block]
    texts = contestant.write([row["prompt"] for row in block], [row["seed"] for row in block], task.max_new_tokens)
    if len(texts) != len(block):
        raise ValueError(
            f"{contestant.name!r} gave {len(texts)} answers to {len(block)} prompts: it needs one to each."
        )
    return [{"text": text} for text in texts]


def _groups(task: Task, name: str, done: Mapping[Key, dict], judges: Judges) -> list[Answers]:
    """Return the answers of one contestant by prompt; none where it did not take part."""
    groups = []
    for index, prompt in enumerate(task.prompts):
        keys = [(name, task.name, index, sample) for sample in range(task.samples)]
        gold = task.answers[index] if task.answers else None
        rows = [done[key] for key in keys if key in done]
        groups += [Answers(prompt, rows, gold, judges, tuple(task.prompts))] if rows else []
    return groups


def voice_scorers(contestants: Sequence[Contestant]) -> dict[str, StyleScorer]:
    """Return the style scorers of the voices that take part and have one."""
    folders = {c.voice: voice_folder(c.voice, c.store) for c in contestants if isinstance(c, Duet) and c.voice}
    return {name: StyleScorer.load(folder) for name, folder in folders.items() if (folder / "style.json").is_file()}


def write_whole(path: Path, content: str) -> None:
    """Write a file that is there as a whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(content, encoding="utf-8")
    os.replace(unfinished, path)
