"""Frontiers by hand, and the rule by which "better" may be claimed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from duet_moe.evaluation.bootstrap import Interval
from duet_moe.evaluation.frontier import Points, attainable, difference, frontier, may_claim_better

NUMBERS = st.floats(-10, 10, allow_subnormal=False)


def points(diversity: object, quality: object, noise: np.ndarray | None = None) -> Points:
    """Settings with these means; `noise` (prompts,) is each prompt's own, on quality and diversity alike."""
    noise = np.zeros(8) if noise is None else noise
    table = {name: np.asarray(v, float)[:, None] + noise for name, v in {"d": diversity, "q": quality}.items()}
    return Points(tuple(map(str, range(len(table["q"])))), table["q"], {"d": table["d"]})


def test_a_frontier_by_hand() -> None:
    # (2, 1) lies under the line from (1, 2) to (4, 0); (0, 1) is beaten by (1, 2), which is more diverse and better
    assert frontier([2, 0, 1, 4], [1, 1, 2, 0]).tolist() == [[1, 2], [4, 0]]
    assert frontier([1, 1], [3, 5]).tolist() == [[1, 5]]
    assert frontier([0, 1, 2], [2, 1.5, 0]).tolist() == [[0, 2], [1, 1.5], [2, 0]]
    corners = frontier([1, 3], [2, 0])
    at = attainable(corners, np.array([0.0, 1.0, 2.0, 3.0, 3.1]))
    assert at[:4].tolist() == [2, 2, 1, 0] and np.isnan(at[4])


@given(arrays(float, (7, 2), elements=NUMBERS))
def test_a_frontier_never_rises_is_concave_and_lies_above_every_point(found: np.ndarray) -> None:
    corners = frontier(found[:, 0], found[:, 1])
    assert (np.diff(corners[:, 0]) > 0).all() and (np.diff(corners[:, 1]) < 0).all()
    slopes = np.diff(corners[:, 1]) / np.diff(corners[:, 0])
    assert (np.diff(slopes) <= 1e-9 * (1 + np.abs(slopes[1:]))).all()
    assert (attainable(corners, found[:, 0]) >= found[:, 1] - 1e-6).all()


def test_a_difference_by_hand() -> None:
    baseline = points([0, 2], [2, 0])  # quality 2 - d
    assert difference(points([1], [1.5]), baseline, "d") == Interval(0.5, 0.5, 0.5)
    assert difference(points([1], [0.25]), baseline, "d") == Interval(-0.75, -0.75, -0.75)
    # ours 3 - d from 1 to 2: one above all along
    assert difference(points([1, 2], [2, 1]), baseline, "d").mean == pytest.approx(1)
    # less diverse than all of the baseline: compared with the best quality there
    assert difference(points([-1], [2.5]), baseline, "d").mean == pytest.approx(0.5)


def test_a_family_that_never_meets_the_baseline_says_nothing() -> None:
    nothing = difference(points([3], [9]), points([0, 2], [2, 0]), "d")
    assert nothing is None
    assert not may_claim_better({"d": nothing})


def test_families_that_meet_by_luck_of_the_prompts_say_nothing() -> None:
    baseline = Points(("a", "b"), np.array([[2.0, 2.0], [0.0, 0.0]]), {"d": np.array([[0.0, 0.0], [5.0, 5.0]])})
    ours = Points(("c",), np.array([[1.0, 1.0]]), {"d": np.array([[0.0, 10.0]])})
    assert (
        difference(ours, baseline, "d") is None
    )  # a quarter of the draws has the second prompt twice: 10 is beyond 5


def test_a_family_against_itself_differs_by_nothing() -> None:
    noise = np.random.default_rng(0).normal(size=8)
    family = points([0, 1, 2], [2, 1.5, 0], noise)
    assert difference(family, family, "d") == Interval(0, 0, 0)


def test_the_interval_is_paired_and_holds_the_mean() -> None:
    generator = np.random.default_rng(0)
    shared, own = generator.normal(size=40), 0.1 * generator.normal(size=40)
    baseline = Points(("a", "b"), np.stack([2 + shared, 0 + shared]), {"d": np.stack([np.zeros(40), 2 * np.ones(40)])})
    ours = Points(("c",), (1.5 + shared + own)[None], {"d": np.ones((1, 40))})
    found = difference(ours, baseline, "d", seed=1)
    assert found.low < found.mean < found.high
    assert found.mean == pytest.approx(0.5 + own.mean(), abs=1e-9)
    assert found.high - found.low < 0.2  # of unpaired prompts it would be wider than 0.6
    assert difference(ours, baseline, "d", seed=1) == found
    assert difference(ours, baseline, "d", seed=2) != found


@pytest.mark.parametrize(
    ("axes", "allowed"),
    [
        ({"a": (0.1, 0.3), "b": (-0.1, 0.2)}, True),
        ({"a": (0.1, 0.3)}, True),
        ({"a": (-0.1, 0.3), "b": (-0.1, 0.2)}, False),
        ({"a": (0.1, 0.3), "b": (-0.3, -0.1)}, False),
        ({"a": (0.1, 0.3), "b": (None, None)}, False),
        ({"a": (0.0, 0.3)}, False),
    ],
)
def test_when_better_may_be_claimed(axes: dict, allowed: bool) -> None:
    told = {a: None if low is None else Interval((low + high) / 2, low, high) for a, (low, high) in axes.items()}
    assert may_claim_better(told) is allowed


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="d has shape"):
        Points(("a",), np.zeros((1, 3)), {"d": np.zeros((1, 4))})
    with pytest.raises(ValueError, match="finite"):
        Points(("a",), np.full((1, 3), np.nan), {"d": np.zeros((1, 3))})
    with pytest.raises(ValueError, match="3 and 8 prompts"):
        difference(Points(("a",), np.zeros((1, 3)), {"d": np.zeros((1, 3))}), points([0], [0]), "d")
