"""Answers right or wrong, and the option that is likeliest per byte."""

import math
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_moe.evaluation.choice import exact_match, multiple_choice


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("The capital is Paris.", "paris", True),
        ("PARIS", "Paris", True),
        ("Comparison", "Paris", False),
        ("Seven hundred and two", "seven hundred", True),
        ("Seven, hundred", "seven-hundred", True),
        ("It is 12.", "1", False),
        ("Rome", "Paris", False),
        ("", "Paris", False),
    ],
)
def test_an_answer_matches_when_the_gold_one_stands_in_it_as_whole_words(answer: str, gold: str, right: bool) -> None:
    assert exact_match(answer, gold) is right


@pytest.mark.parametrize("gold", ["", " ", "?!"])
def test_a_gold_answer_without_a_word_is_refused(gold: str) -> None:
    with pytest.raises(ValueError, match="no letter or digit"):
        exact_match("", gold)


def scorer(table: dict[str, float]) -> Callable[[str, str], float]:
    def log_likelihood(prompt: str, option: str) -> float:
        assert prompt == "Capital of France?"
        return table[option]

    return log_likelihood


@pytest.mark.parametrize(
    ("table", "best"),
    [
        ({"Rome": -4.0, "Paris": -3.0, "Oslo": -5.0}, 1),
        ({"Rome": -4.0, "Constantinople": -7.0}, 1),  # 1 and 1/2 nat a byte
        ({"Rome": -4.0, "\u00e4\u00e4": -3.0}, 1),  # two letters of two bytes: 3/4 nat a byte
        ({"Rome": -4.0, "Oslo": -4.0}, 0),
        ({"Rome": -math.inf, "Oslo": -9.0}, 1),
    ],
)
def test_the_option_with_most_likelihood_per_byte_is_taken(table: dict[str, float], best: int) -> None:
    assert multiple_choice("Capital of France?", list(table), scorer(table)) == best


@given(st.lists(st.floats(-50, 0), min_size=2, max_size=5), st.randoms())
def test_the_order_of_the_options_does_not_matter(scores: list[float], random: Random) -> None:
    table = {"abcdefgh"[i] * (i + 1): score for i, score in enumerate(scores)}
    options = random.sample(list(table), len(table))
    taken = options[multiple_choice("Capital of France?", options, scorer(table))]
    assert table[taken] / len(taken) == max(score / len(option) for option, score in table.items())


@pytest.mark.parametrize("options", [[], ["one"], ["one", ""]])
def test_options_that_are_no_choice_are_refused(options: list[str]) -> None:
    with pytest.raises(ValueError, match="two or more, none of them empty"):
        multiple_choice("Which?", options, lambda prompt, option: -1.0)


@pytest.mark.parametrize("score", [math.nan, 0.5])
def test_what_is_no_log_likelihood_is_refused(score: float) -> None:
    with pytest.raises(ValueError, match=f"log-likelihood of 'two' is {score}"):
        multiple_choice("Which?", ["one", "two"], lambda prompt, option: score if option == "two" else -1.0)
