"""Semantic diversity: values by hand, bounds, and blindness to order and scale."""

import math
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from duet_moe.evaluation.semantic import dispersion, obedience, vendi

# Exact in binary, none near zero: a row's direction is well defined.
number = st.integers(-8, 8).map(lambda n: n / 4)
embeddings = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=number).filter(
    lambda rows: rows.any(axis=1).all()
)


def test_two_samples_have_the_vendi_score_of_their_angle() -> None:
    # At 60 degrees K is [[1, .5], [.5, 1]]; K / 2 has the eigenvalues 3/4 and 1/4.
    rows = np.array([[1, 0], [0.5, math.sqrt(0.75)]], dtype=np.float32)
    assert vendi(rows) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert dispersion(rows) == pytest.approx(0.5)


def test_one_of_four_that_differs() -> None:
    rows = np.array([[1, 0]] * 3 + [[0, 1]])  # eigenvalues 3/4 and 1/4; three of six pairs are orthogonal
    assert vendi(rows) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert dispersion(rows) == pytest.approx(0.5)


def test_texts_near_their_own_prompt_obey() -> None:
    prompts = np.array([[1.0, 0], [0, 1], [0, -1]])
    texts = np.array(
        [[2.0, 0], [0.6, 0.8]]
    )  # similarities 1 and 0.6 to the first; 0 and 0.8, 0 and -0.8 to the others
    assert obedience(texts, prompts, 0) == pytest.approx(0.8)
    assert obedience(texts, prompts, 1) == pytest.approx(0.4 - (0.8 - 0.4) / 2)
    assert obedience(texts[:1], prompts[1:], 0) == 0.0  # one sample that has nothing to do with any prompt


@given(embeddings)
def test_equal_prompts_are_obeyed_alike(rows: np.ndarray) -> None:
    assert obedience(rows, np.repeat(rows[:1], 3, axis=0), 1) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("prompts", "own"), [(1, 0), (3, 3), (3, -1)])
def test_obedience_needs_the_own_prompt_and_another(prompts: int, own: int) -> None:
    with pytest.raises(ValueError, match=rf"own={own} of {prompts} prompts"):
        obedience(np.eye(4), np.eye(4)[:prompts], own)


def test_opposite_samples_are_two_apart_and_count_once() -> None:
    rows = np.array([[2.0, 0], [-3, 0]])
    assert dispersion(rows) == pytest.approx(2.0)
    assert vendi(rows) == pytest.approx(1.0)  # K has an eigenvalue of exactly 0


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_numbers_whose_squares_are_out_of_range_have_a_direction(scale: float) -> None:
    assert vendi(np.eye(2) * scale) == pytest.approx(2.0)
    assert dispersion(np.eye(2) * scale) == pytest.approx(1.0)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_equal_samples_count_once_and_orthogonal_ones_all(count: int) -> None:
    equal = np.tile(np.float32([0.3, 0.1, 0.7]), (count, 1))
    assert vendi(equal) == pytest.approx(1.0)
    assert dispersion(equal) == pytest.approx(0.0, abs=1e-9)
    assert vendi(np.eye(count)) == pytest.approx(count)
    assert dispersion(np.eye(count)) == pytest.approx(float(count > 1))


@given(embeddings)
def test_scores_stay_in_their_bounds(rows: np.ndarray) -> None:
    assert 1 - 1e-9 <= vendi(rows) <= min(rows.shape) + 1e-9  # no more than dim are orthogonal
    assert 0 <= dispersion(rows) <= 2 + 1e-9


@given(embeddings, st.randoms(), st.sampled_from([1e-30, 0.5, 3.0, 1e30]))
def test_order_and_scale_do_not_matter(rows: np.ndarray, random: Random, scale: float) -> None:
    order = random.sample(range(len(rows)), len(rows))
    scales = np.array([scale, 1.0])[np.arange(len(rows)) % 2, None]
    changed = (rows * scales)[order].astype(np.float32)
    assert vendi(changed) == pytest.approx(vendi(rows), abs=1e-6)
    assert dispersion(changed) == pytest.approx(dispersion(rows), abs=1e-6)


@given(embeddings)
def test_dispersion_is_the_mean_over_the_pairs(rows: np.ndarray) -> None:
    units = [row / np.linalg.norm(row) for row in rows.astype(np.float64)]
    pairs = [1 - units[i] @ units[j] for i in range(len(units)) for j in range(i)]
    assert dispersion(rows) == pytest.approx(sum(pairs) / len(pairs) if pairs else 0.0, abs=1e-9)


@pytest.mark.parametrize("score", [vendi, dispersion])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((0, 3)), r"shape \(0, 3\)"),
        (np.zeros((3, 0)), r"shape \(3, 0\)"),
        (np.ones(3), r"shape \(3,\)"),
        (np.array([[1.0, 2], [np.nan, 1]]), "embedding 1 has a number that is not finite"),
        (np.array([[np.inf, 2], [0, 1]]), "embedding 0 has a number that is not finite"),
        (np.array([[1.0, 2], [3, 4], [0, 0]]), "embedding 2 is all zeros"),
    ],
)
def test_embeddings_that_make_no_sense_are_refused(
    score: Callable[[np.ndarray], float], rows: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score(rows)
