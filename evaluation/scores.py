"""What is measured on the answers to one prompt; the mean over prompts, with its interval, is the report's.

Answers without a word are counted as `empty` and kept out of every metric of text, which they could only flatter.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

from duet_moe.evaluation.choice import exact_match
from duet_moe.evaluation.compression import compression_ratio
from duet_moe.evaluation.consistency import style_consistency
from duet_moe.evaluation.cost import price_per_million
from duet_moe.evaluation.semantic import dispersion, obedience, vendi
from duet_moe.finetune.leaks import normalise
from duet_moe.finetune.lexical import distinct_n, repetition, self_bleu

if TYPE_CHECKING:
    from duet_moe.evaluation.task import Task

STYLE_WINDOW = 20  # words; shorter than consistency's default, because answers are
TAKEN_FOR = "taken_for"


class Embeds(Protocol):
    """What an encoder does."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return one embedding per text, (texts, dim)."""
        ...


class BitsPerCharacter(Protocol):
    """What an evaluator does."""

    def bits_per_character(self, texts: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
        """Return the bits per character of each text after its prompt, (texts,)."""
        ...


class Novelty(Protocol):
    """What is known of the training text."""

    def unseen_share(self, text: str) -> float:
        """Return the share of the text's n-grams that training has not."""
        ...

    def longest_run(self, text: str) -> int:
        """Return the words of the longest run that training has."""
        ...


class Style(Protocol):
    """What the scorer of a voice does."""

    def share(self, texts: Sequence[str]) -> float:
        """Return the share of texts that are taken for the voice."""
        ...


@dataclass(frozen=True)
class Judges:
    """Those who judge; a metric whose judge is missing is left out.

    Args:
        voices (`Mapping[str, Style]`): scorers by voice. dollars_per_hour (`float`): of the machine.
    """

    encoder: Embeds | None = None
    evaluator: BitsPerCharacter | None = None
    training: Novelty | None = None
    voices: Mapping[str, Style] = field(default_factory=dict)
    dollars_per_hour: float | None = None


@dataclass(frozen=True)
class Answers:
    """One contestant's answers to one prompt.

    Args:
        rows (`Sequence[dict]`): lines of `results.jsonl`. gold (`str`, *optional*): the right answer.
        asked (`tuple[str, ...]`): every prompt of the task.
    """

    prompt: str
    rows: Sequence[Mapping]
    gold: str | None = None
    judges: Judges = Judges()
    asked: tuple[str, ...] = ()

    @cached_property
    def texts(self) -> list[str]:
        """All of them."""
        return [row["text"] for row in self.rows]

    @cached_property
    def spoken(self) -> list[str]:
        """Those with a word."""
        return [text for text in self.texts if normalise(text)]

    @cached_property
    def embeddings(self) -> np.ndarray:
        """Of those with a word, (spoken, dim)."""
        return self.judges.encoder.embed(self.spoken)  # type: ignore[union-attr]

    def numbers(self, name: str) -> list[float]:
        """Return what was measured while they were written, where it was."""
        return [float(row[name]) for row in self.rows if row.get(name) is not None]


@dataclass(frozen=True)
class Metric:
    """A number for the answers to one prompt.

    Args:
        measure (`Callable`): returns None where it cannot be told. judge (`str`, *optional*): the field of `Judges`
            that it needs. texts (`int`): answers with a word that it needs.
    """

    measure: Callable[[Answers], float | None]
    judge: str | None = None
    texts: int = 1


def score(task: "Task", answers: Sequence[Answers]) -> dict[str, list[float | None]]:
    """Return, by metric, one number per prompt; None where it cannot be told.

    `taken_for` becomes one metric for each voice. Metrics that cannot be told of any prompt are left out.

    Args:
        answers: of one contestant to the task's prompts, in their order.
    """
    judges = answers[0].judges if answers else Judges()
    table: dict[str, list[float | None]] = {}
    for name in task.metrics:
        if name == TAKEN_FOR:
            table |= {f"{TAKEN_FOR}_{v}": [_share(a, s) for a in answers] for v, s in judges.voices.items()}
        else:
            table[name] = [_measure(METRICS[name], a) for a in answers]
    return {name: values for name, values in table.items() if any(value is not None for value in values)}


def direction(task: "Task", metric: str) -> str:
    """Return which is better of a metric that `score` returned: `higher`, `lower` or `none`."""
    return task.metrics.get(metric) or task.metrics[TAKEN_FOR]


def _measure(metric: Metric, answers: Answers) -> float | None:
    if metric.judge and getattr(answers.judges, metric.judge) is None:
        return None
    if metric.texts and len(answers.spoken) < metric.texts:
        return None
    return metric.measure(answers)


def _share(answers: Answers, style: Style) -> float | None:
    return style.share(answers.spoken) if answers.spoken else None


def _each(measure: Callable[[str], float]) -> Callable[[Answers], float]:
    return lambda answers: statistics.fmean(map(measure, answers.spoken))


def _bits(answers: Answers) -> float:
    prompts = [answers.prompt] * len(answers.spoken)
    return float(answers.judges.evaluator.bits_per_character(answers.spoken, prompts).mean())  # type: ignore[union-attr]


def _obedience(answers: Answers) -> float | None:
    if len(answers.asked) < 2:
        return None
    prompts = _embedded(answers.judges.encoder, answers.asked)  # type: ignore[arg-type]
    return obedience(answers.embeddings, prompts, answers.asked.index(answers.prompt))


@lru_cache(maxsize=8)
def _embedded(encoder: Embeds, prompts: tuple[str, ...]) -> np.ndarray:
    return encoder.embed(prompts)


def _consistency(answers: Answers) -> float | None:
    long = [text for text in answers.spoken if len(text.split()) >= 2 * STYLE_WINDOW]
    return statistics.fmean(style_consistency(text, STYLE_WINDOW) for text in long) if long else None


def _right(answers: Answers) -> float | None:
    gold = answers.gold
    return None if gold is None else statistics.fmean(exact_match(text, gold) for text in answers.texts)


def _chosen(answers: Answers) -> float:
    return statistics.fmean(text == answers.gold for text in answers.texts)


def _measured(name: str) -> Metric:
    """Return the median of a number that was taken while the answers were written."""

    def median(answers: Answers) -> float | None:
        numbers = answers.numbers(name)
        return statistics.median(numbers) if numbers else None

    return Metric(median, texts=0)


def _price(answers: Answers) -> float | None:
    rates = answers.numbers("tokens_per_second")
    rate = statistics.median(rates) if rates else 0.0
    return price_per_million(rate, answers.judges.dollars_per_hour) if rate > 0 else None  # type: ignore[arg-type]


# What a task may name; TAKEN_FOR stands beside them, because it becomes one for each voice.
METRICS: dict[str, Metric] = {
    "distinct_2": Metric(lambda answers: distinct_n(answers.spoken, 2)),
    "distinct_3": Metric(lambda answers: distinct_n(answers.spoken, 3)),
    "self_bleu": Metric(lambda answers: self_bleu(answers.spoken), texts=2),
    "compression_ratio": Metric(lambda answers: compression_ratio(answers.spoken)),
    "vendi": Metric(lambda answers: vendi(answers.embeddings), "encoder"),
    "dispersion": Metric(lambda answers: dispersion(answers.embeddings), "encoder"),
    "obedience": Metric(_obedience, "encoder"),
    "repetition": Metric(_each(repetition)),
    "bits_per_character": Metric(_bits, "evaluator"),
    "unseen_5grams": Metric(lambda answers: _each(answers.judges.training.unseen_share)(answers), "training"),  # type: ignore[union-attr]
    "longest_copy": Metric(lambda answers: _each(answers.judges.training.longest_run)(answers), "training"),  # type: ignore[union-attr]
    "words": Metric(lambda answers: statistics.fmean(len(text.split()) for text in answers.texts), texts=0),
    "empty": Metric(lambda answers: 1 - len(answers.spoken) / len(answers.texts), texts=0),
    "style_consistency": Metric(_consistency),
    "exact_match": Metric(_right, texts=0),
    "multiple_choice": Metric(_chosen, texts=0),
    "tokens_per_second": _measured("tokens_per_second"),
    "seconds_to_first_token": _measured("seconds_to_first_token"),
    "active_parameters": _measured("active_parameters"),
    "weight_bytes": _measured("weight_bytes"),
    "peak_memory_bytes": _measured("peak_memory_bytes"),
    "dollars_per_million_tokens": Metric(_price, "dollars_per_hour", texts=0),
}
