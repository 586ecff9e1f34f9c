"""How sure a mean is: bootstrap intervals over prompts, and p-values of several tests together.

Resample prompts, not samples: the samples of one prompt are not independent of each other.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_AT_A_TIME = 1000  # draws; bounds the memory


class Interval(NamedTuple):
    """A mean with the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def interval(
    values: Sequence[float] | np.ndarray, seed: int = 0, draws: int = 10_000, level: float = 0.95
) -> Interval:
    """Return the mean and its percentile bootstrap interval (Efron 1979, doi 10.1214/aos/1176344552).

    Args:
        values: one number per prompt, (prompts,).
        draws: how often the prompts are drawn again, with replacement.
        level: share of the draws' means inside the interval, between 0 and 1.

    Raises:
        ValueError: fewer than two values, one that is not finite, or `draws` or `level` out of range.
    """
    numbers = _numbers(values)
    if len(numbers) < 2:
        raise ValueError(f"{len(numbers)} values say nothing of how far others would lie; give two or more.")
    if draws < 1 or not 0 < level < 1:
        raise ValueError(f"draws={draws}, level={level}: draws start at 1 and level lies between 0 and 1.")
    generator = np.random.default_rng(seed)
    means = [
        numbers[generator.integers(len(numbers), size=(min(_AT_A_TIME, draws - done), len(numbers)))].mean(axis=1)
        for done in range(0, draws, _AT_A_TIME)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(numbers.mean()), float(low), float(high))


def paired_interval(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    seed: int = 0,
    draws: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Return the interval of the mean of `first` - `second`, two values of the same prompts.

    Raises:
        ValueError: the lengths differ, or as `interval`.
    """
    first, second = _numbers(first), _numbers(second)
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values are no pairs; give both for the same prompts.")
    return interval(first - second, seed, draws, level)


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return p-values adjusted for their number (Holm 1979, JSTOR 4615733), in the order given, float64 (tests,).

    Reject what is at most alpha: the chance of one false rejection or more is then at most alpha.

    Raises:
        ValueError: there is none, or one outside of [0, 1].
    """
    found = _numbers(p_values)
    if not len(found) or found.min() < 0 or found.max() > 1:
        raise ValueError(f"p-values {found.tolist()}: give one or more, each from 0 to 1.")
    order = np.argsort(found)
    scaled = found[order] * np.arange(len(found), 0, -1)
    adjusted = np.empty_like(found)
    adjusted[order] = np.maximum.accumulate(scaled).clip(max=1)
    return adjusted


def _numbers(values: Sequence[float] | np.ndarray) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        raise ValueError(f"values {numbers.tolist()}: give a flat list of finite numbers.")
    return numbers
