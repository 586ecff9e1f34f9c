"""Distances of two sets: by hand where the fit is known, ordered where it is not, and refused for too few."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_moe.evaluation.distance import frechet, mauve

# Two points on each axis: covariance a^2 / 2 times the identity, which shrinkage leaves as it is.
CROSS = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])


def cloud(count: int, dim: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dim)) + shift


def test_frechet_of_two_normals_with_known_covariance() -> None:
    # Means (3, 4) apart; standard deviations sqrt(1/2) and 3 sqrt(1/2) on both axes: 25 + 2 (2 sqrt(1/2))^2.
    assert frechet(CROSS, 3 * CROSS + [3, 4]) == pytest.approx(25 + 4)
    assert frechet(CROSS, CROSS + [3, 4]) == pytest.approx(25)


def test_frechet_in_one_dimension_is_the_difference_of_means_and_deviations() -> None:
    first, second = np.array([[0.0], [2]]), np.array([[1.0], [7], [1], [7]])  # 1 +- 1 and 4 +- 3
    assert frechet(first, second) == pytest.approx((4 - 1) ** 2 + (3 - 1) ** 2)


def test_frechet_sees_which_way_a_set_is_long() -> None:
    along = cloud(4000, 2, 0) * [3, 1]
    assert frechet(along, along[:, ::-1]) == pytest.approx(2 * (3 - 1) ** 2, rel=0.05)  # same means, traces and sizes


@given(st.integers(0, 5), st.integers(2, 6), st.integers(1, 4))
def test_frechet_is_symmetric_not_negative_and_zero_for_equal_sets(seed: int, count: int, dim: int) -> None:
    first, second = cloud(count, dim, seed), cloud(count, dim, seed + 100)
    assert frechet(first, second) == pytest.approx(frechet(second, first), abs=1e-9)
    assert frechet(first, second) >= 0
    assert frechet(first, first[::-1]) == pytest.approx(0.0, abs=1e-6)


def test_frechet_of_samples_that_are_all_alike_is_the_distance_of_the_two() -> None:
    assert frechet(np.full((3, 2), 1.0), np.full((5, 2), 2.0)) == pytest.approx(2.0)


def test_shrinkage_lets_fewer_samples_than_dimensions_be_compared() -> None:
    first, again, other = cloud(40, 100, 0), cloud(40, 100, 1), cloud(40, 100, 2, shift=0.5)
    assert frechet(first, again) < 10 < frechet(first, other)  # without it the first would be over 100


def test_mauve_is_one_for_equal_sets_and_almost_nothing_for_sets_apart() -> None:
    first = cloud(100, 4, 0, shift=5)
    assert mauve(first, first.copy()) == pytest.approx(1.0)
    assert mauve(first, -first) == pytest.approx(1 / 252, rel=0.1)  # integral of (1 - x^(1/5))^5 over [0, 1]


def test_mauve_of_half_a_mixture() -> None:
    # Two far directions: p has both as often, q one of them. x = exp(-5 KL(q|r)), y = exp(-5 KL(p|r)).
    first = np.repeat([[1.0, 0], [0, 1]], 10, axis=0)
    second = np.repeat([[1.0, 0]], 20, axis=0)
    w = np.linspace(1e-6, 1 - 1e-6, 200_001)
    r = 1 - w / 2  # of the direction that both have
    x, y = r**5, np.exp(-5 * (0.5 * np.log(0.5 / r) + 0.5 * np.log(0.5 / (w / 2))))
    area = 0.5**5 * 1 + ((y[1:] + y[:-1]) / 2 * -np.diff(x)).sum()  # beyond the curve's end y goes on at 1
    assert mauve(first, second) == pytest.approx(area, rel=0.02)


def test_mauve_falls_with_the_distance_and_repeats_with_the_seed() -> None:
    first = cloud(300, 3, 0, shift=2)
    near, far = cloud(300, 3, 1, shift=2), cloud(300, 3, 1, shift=2) + [3, 0, 0]
    assert mauve(first, near) > 0.9 > 0.5 > mauve(first, far)
    assert mauve(first, far, seed=3) == mauve(first, far, seed=3)


def test_mauve_sees_directions_and_not_lengths() -> None:
    first, second = cloud(60, 3, 0, shift=1), cloud(60, 3, 1, shift=1)
    assert mauve(100 * first, second) == pytest.approx(mauve(first, second))


@pytest.mark.filterwarnings("error")  # k-means warns of more clusters than different samples
def test_mauve_of_samples_that_are_all_alike_is_one() -> None:
    assert mauve(np.ones((20, 3)), np.ones((20, 3))) == pytest.approx(1.0)


@pytest.mark.parametrize(("distance", "least"), [(frechet, 2), (mauve, 20)])
def test_sets_that_cannot_be_compared_are_refused(distance: Callable[..., float], least: int) -> None:
    enough, few = cloud(least, 3, 0), cloud(least - 1, 3, 1)
    assert np.isfinite(distance(enough, enough))
    with pytest.raises(ValueError, match=f"{least} and {least - 1} samples are too few; give {least}"):
        distance(enough, few)
    with pytest.raises(ValueError, match="dim 3 and 2"):
        distance(enough, enough[:, :2])
    with pytest.raises(ValueError, match="not finite"):
        distance(enough, np.where(enough == enough.max(), np.nan, enough))
    with pytest.raises(ValueError, match="shape"):
        distance(enough[0], enough)
