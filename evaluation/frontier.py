"""Does one way of writing give more quality at the same diversity than the best of another?

The baseline is a family of settings of one head (temperature x min-p x top-p); its frontier is the most quality that
it reaches at each diversity. Another family is better by how far its own frontier lies above, on average over the
diversities that both reach. Prompts are drawn again, all settings together, for the interval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from duet_moe.evaluation.bootstrap import Interval

GRID = 64  # diversities at which two frontiers are compared


@dataclass(frozen=True)
class Points:
    """What the settings of a family reached.

    Args:
        settings (`tuple[str, ...]`): their names.
        quality (`np.ndarray` of shape (settings, prompts), float): higher is better, such as minus bits per character.
        diversity (`dict[str, np.ndarray]` of the same shape): by axis, higher is more diverse.

    Raises:
        ValueError: on shapes that differ, or values that are not finite.
    """

    settings: tuple[str, ...]
    quality: np.ndarray
    diversity: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        shape = (len(self.settings), self.quality.shape[-1])
        for name, values in {"quality": self.quality, **self.diversity}.items():
            if values.shape != shape or not shape[0] or not np.isfinite(values).all():
                raise ValueError(f"{name} has shape {values.shape}; give finite numbers of shape {shape}.")


def difference(
    ours: Points, baseline: Points, axis: str, seed: int = 0, draws: int = 2000, level: float = 0.95
) -> Interval | None:
    """Compare two families on one axis of diversity.

    Args:
        draws: how often the prompts are drawn again (percentile bootstrap, paired: both families see the same draw).

    Returns:
        How far ours lies above the baseline, in units of quality. A draw in which the two reach no common diversity
        says nothing and is left out; if that is the case of all prompts together, or of more than a tenth of the
        draws, there is nothing to tell and the answer is None.

    Raises:
        ValueError: if the two were not asked the same number of prompts, or fewer than two.
    """
    prompts = ours.quality.shape[1]
    if prompts != baseline.quality.shape[1] or prompts < 2:
        raise ValueError(f"{prompts} and {baseline.quality.shape[1]} prompts: give two or more, the same to both.")
    whole = _above(ours, baseline, axis, np.arange(prompts))
    generator = np.random.default_rng(seed)
    resamples = generator.integers(prompts, size=(draws, prompts))
    drawn = [_above(ours, baseline, axis, resample) for resample in resamples]
    told = [value for value in drawn if value is not None]
    if whole is None or len(told) < 0.9 * draws:
        return None
    low, high = np.quantile(told, [(1 - level) / 2, (1 + level) / 2])
    return Interval(whole, float(low), float(high))


def may_claim_better(differences: Mapping[str, Interval | None]) -> bool:
    """Say whether "better" may be claimed: an interval above zero on one axis, and none below zero on the others.

    An axis on which the two families never meet (None) bars the claim: nothing is known there.
    """
    known = [each for each in differences.values() if each is not None]
    none_worse = len(known) == len(differences) and all(each.high >= 0 for each in known)
    return none_worse and any(each.low > 0 for each in known)


def frontier(diversity: Sequence[float] | np.ndarray, quality: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the corners (n, 2) of the upper concave hull of points, by rising diversity, quality never rising.

    A setting that is both less diverse and worse than a mixture of two others has no place on it: requests may be
    answered by either.
    """
    points = np.stack([np.asarray(diversity, float), np.asarray(quality, float)], axis=1)
    hull: list[np.ndarray] = []
    for point in points[np.lexsort((points[:, 1], points[:, 0]))]:
        while hull and hull[-1][1] <= point[1]:
            hull.pop()
        while len(hull) > 1 and _turn(hull[-2], hull[-1], point) >= 0:
            hull.pop()
        hull.append(point)
    return np.stack(hull)


def attainable(corners: np.ndarray, diversity: np.ndarray) -> np.ndarray:
    """Return the most quality on a frontier at each diversity (n,) or more; NaN beyond its last corner."""
    return np.interp(diversity, corners[:, 0], corners[:, 1], right=np.nan)


def _turn(first: np.ndarray, second: np.ndarray, third: np.ndarray) -> float:
    """Above zero for a left turn, zero on a line."""
    a, b = second - first, third - second
    return float(a[0] * b[1] - a[1] * b[0])


def _above(ours: Points, baseline: Points, axis: str, prompts: np.ndarray) -> float | None:
    means = [
        (family.diversity[axis][:, prompts].mean(axis=1), family.quality[:, prompts].mean(axis=1))
        for family in (ours, baseline)
    ]
    own, other = (frontier(*mean) for mean in means)
    # Where we start: a less diverse setting of ours would only repeat what the first corner reaches.
    low, high = own[0, 0], min(own[-1, 0], other[-1, 0])
    if low > high:
        return None
    at = np.linspace(low, high, GRID)
    return float((attainable(own, at) - attainable(other, at)).mean())
