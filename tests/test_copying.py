"""Runs shared with a corpus: equal to a search by brute force, blind to case and punctuation, and linear."""

import doctest
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_moe.finetune import copying
from duet_moe.finetune.copying import Runs, words_of

# Two or three different words, so that runs repeat, overlap and end inside others.
text = st.lists(st.sampled_from("ab"), max_size=14).map(" ".join) | st.lists(st.sampled_from("abc"), max_size=30).map(
    " ".join
)


def brute_force(corpus: list[str], asked: str) -> tuple[int, str]:
    words = asked.split()
    known = {tuple(c[i:j]) for c in map(str.split, corpus) for i in range(len(c)) for j in range(i + 1, len(c) + 1)}
    for length in range(len(words), 0, -1):
        for start in range(len(words) - length + 1):
            if tuple(words[start : start + length]) in known:
                return length, " ".join(words[start : start + length])
    return 0, ""


@given(st.lists(text, max_size=6), text)
def test_the_longest_run_is_the_one_that_brute_force_finds(corpus: list[str], asked: str) -> None:
    assert Runs(corpus).longest(asked) == brute_force(corpus, asked)


@given(st.lists(text, max_size=4), st.lists(text, min_size=1, max_size=5), st.integers(1, 6))
def test_the_share_counts_texts_whose_run_is_long_enough(corpus: list[str], asked: list[str], words: int) -> None:
    expected = sum(brute_force(corpus, one)[0] >= words for one in asked) / len(asked)
    assert Runs(corpus).share_at_least(asked, words) == expected


@given(text.filter(bool), st.sampled_from([" ", "\n\t ", ", ", "... ", " \u2014 ", "! \u201c"]))
def test_case_punctuation_and_space_do_not_matter(corpus: str, between: str) -> None:
    asked = between.join(corpus.upper().split()) + "?"
    assert Runs([corpus]).longest(asked) == (len(corpus.split()), corpus)


def test_words_keep_their_apostrophes_in_either_form() -> None:
    assert words_of("Don\u2019t STOP, it's the dogs' 24-7 caf\u00e9_bar!") == [
        *("don't", "stop", "it's", "the", "dogs", "24", "7", "caf\u00e9", "bar")
    ]
    assert words_of("cafe\u0301 \ufb01ne") == ["caf\u00e9", "fine"]


def test_a_run_does_not_cross_from_one_text_to_the_next() -> None:
    assert Runs(["the fog came in", "over the hill"]).longest("came in over the hill") == (3, "over the hill")


def test_texts_or_words_that_make_no_sense_are_refused() -> None:
    runs = Runs(["a b"])
    with pytest.raises(ValueError, match="words=0"):
        runs.share_at_least(["a"], 0)
    with pytest.raises(ValueError, match="at least one"):
        runs.share_at_least([])
    assert runs.longest("") == Runs([]).longest("a b") == (0, "")


def test_a_corpus_of_one_word_and_one_without_repeats_take_linear_time() -> None:
    started = time.perf_counter()
    same = " ".join(["again"] * 50_000)
    assert Runs([same]).longest(same + " and")[0] == 50_000
    different = " ".join(map(str, range(50_000)))
    assert Runs([different, different]).longest(different)[0] == 50_000
    assert time.perf_counter() - started < 20  # quadratic would be minutes


def test_the_example_of_the_docstring_is_right() -> None:
    assert doctest.testmod(copying).failed == 0 and doctest.testmod(copying).attempted == 2
