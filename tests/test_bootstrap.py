"""Intervals and adjusted p-values: by hand for small cases, as laws for all."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_moe.evaluation.bootstrap import holm, interval, paired_interval

numbers = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20)
p_values = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def test_the_ends_are_quantiles_of_the_means_of_all_draws() -> None:
    # Of 0 and 1 the mean of two draws is 0, 1/2 or 1, with the chances 1/4, 1/2 and 1/4.
    assert interval([0, 1], level=0.95) == (0.5, 0.0, 1.0)
    assert interval([0, 1], level=0.4) == (0.5, 0.5, 0.5)  # from the 30th to the 70th of a hundred


def test_many_values_have_the_interval_of_a_normal_mean() -> None:
    values = np.random.default_rng(1).normal(3, 2, size=400)
    mean, low, high = interval(values)
    error = values.std() / np.sqrt(400)
    assert mean == pytest.approx(values.mean())
    assert (low - mean, high - mean) == pytest.approx((-1.96 * error, 1.96 * error), rel=0.05)


@given(numbers, st.integers(0, 99))
def test_the_interval_holds_the_mean_and_lies_within_the_values(values: list[float], seed: int) -> None:
    mean, low, high = interval(values, seed, draws=500)
    rounding = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - rounding <= low <= mean + rounding and mean - rounding <= high <= max(values) + rounding


@given(st.floats(-1e6, 1e6), st.integers(2, 9))
def test_equal_values_leave_no_doubt(value: float, count: int) -> None:
    assert interval([value] * count, draws=20) == pytest.approx((value,) * 3)


@given(numbers, st.floats(-100, 100))
def test_pairs_that_differ_by_a_constant_leave_no_doubt(values: list[float], shift: float) -> None:
    found = paired_interval(np.array(values) + shift, values, draws=20)
    assert found == pytest.approx((shift,) * 3, abs=1e-6)


def test_a_paired_interval_is_that_of_the_differences() -> None:
    first, second = [3.0, 1.0, 4.0, 1.0, 5.0], [2.0, 7.0, 1.0, 8.0, 2.0]
    wanted = interval([1.0, -6.0, 3.0, -7.0, 3.0], seed=5, draws=300, level=0.9)
    assert paired_interval(first, second, seed=5, draws=300, level=0.9) == wanted
    assert wanted.low < wanted.mean == pytest.approx(-1.2) and wanted.high > 0


def test_a_seed_repeats_and_a_higher_level_is_wider() -> None:
    values = np.random.default_rng(2).normal(size=30)
    assert interval(values, seed=1) == interval(values, seed=1) != interval(values, seed=2)
    narrow, wide = interval(values, level=0.5), interval(values, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_draws_are_as_many_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    quantile = np.quantile
    monkeypatch.setattr(np, "quantile", lambda means, at: seen.append(len(means)) or quantile(means, at))
    for draws in (1, 999, 1000, 2500):
        interval([1.0, 2.0], draws=draws)
    assert seen == [1, 999, 1000, 2500]


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        ([], {}, "0 values"),
        ([1.0], {}, "1 values"),
        ([1.0, float("nan")], {}, "finite"),
        ([[1.0, 2.0]], {}, "flat"),
        ([1.0, 2.0], {"draws": 0}, "draws=0"),
        ([1.0, 2.0], {"level": 1.0}, "level=1.0"),
        ([1.0, 2.0], {"level": 0.0}, "level=0.0"),
    ],
)
def test_values_that_have_no_interval_are_refused(values: list, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interval(values, **settings)


def test_values_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="3 and 2 values are no pairs"):
        paired_interval([1.0, 2.0, 3.0], [1.0, 2.0])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([0.2]) == pytest.approx([0.2])


@given(p_values)
def test_holm_keeps_the_order_and_lowers_none(found: list[float]) -> None:
    adjusted = holm(found)
    assert ((np.array(found) <= adjusted) & (adjusted <= 1)).all()
    order = np.argsort(found)
    assert (np.diff(adjusted[order]) >= 0).all()
    assert adjusted.min() == pytest.approx(min(1.0, min(found) * len(found)))


@given(p_values, st.data())
def test_holm_rises_with_every_p_value_and_follows_their_order(found: list[float], data: st.DataObject) -> None:
    raised = [data.draw(st.floats(p, 1)) for p in found]
    assert (holm(raised) >= holm(found)).all()
    order = data.draw(st.permutations(range(len(found))))
    assert holm([found[i] for i in order]).tolist() == holm(found)[list(order)].tolist()


@pytest.mark.parametrize("found", [[], [0.1, -0.1], [1.1], [float("nan")], [[0.1]]])
def test_what_are_no_p_values_is_refused(found: list) -> None:
    with pytest.raises(ValueError, match="values"):
        holm(found)
