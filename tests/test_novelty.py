"""Novelty: counts by hand, equal to the automaton of small corpora, and fast on large ones."""

import doctest
import random
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_moe.evaluation import novelty
from duet_moe.evaluation.novelty import TrainingNgrams
from duet_moe.finetune.copying import Runs

# Two or three different words, so that runs repeat, overlap and end inside others.
text = st.lists(st.sampled_from("abc"), max_size=20).map(" ".join)


def test_unseen_share_counts_ngrams_wherever_they_stand() -> None:
    ngrams = TrainingNgrams.from_texts(["one two three four five six", "nine ten"], n=5)
    assert ngrams.unseen_share("one two three four five six") == 0.0
    assert ngrams.unseen_share("two three four five six seven") == 0.5
    assert ngrams.unseen_share("a b c d e f") == 1.0
    assert ngrams.unseen_share("zero one two three four five, one two three four five six!") == pytest.approx(5 / 8)


def test_the_longest_run_is_in_words_whatever_the_case_and_punctuation() -> None:
    ngrams = TrainingNgrams.from_texts(["The fox, he said, isn't late.", "Late again"])
    assert ngrams.longest_run("THE FOX he said isn\u2019t early") == 5
    assert ngrams.longest_run("Is the fox late?") == 2
    assert ngrams.longest_run("nothing like it") == 0


def test_runs_do_not_cross_from_one_text_to_the_next() -> None:
    ngrams = TrainingNgrams.from_texts(["the fog came in", "over the hill"], n=3)
    assert ngrams.longest_run("fog came in over the hill") == 3
    assert ngrams.unseen_share("fog came in over the hill") == 0.5


@pytest.mark.parametrize("short", ["", "?!", "one two three four"])
def test_a_text_of_fewer_than_n_words_has_nothing_unseen(short: str) -> None:
    assert TrainingNgrams.from_texts(["other words than these"], n=5).unseen_share(short) == 0.0
    assert TrainingNgrams.from_texts(["other words than these"]).longest_run(short) == 0


@given(st.lists(text, max_size=5).filter(any), text, st.integers(1, 6))
def test_a_suffix_array_finds_what_the_automaton_finds(corpus: list[str], asked: str, n: int) -> None:
    ngrams, runs = TrainingNgrams.from_texts(iter(corpus), n), Runs(corpus)
    assert ngrams.longest_run(asked) == runs.longest(asked)[0]
    words = asked.split()
    pieces = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
    unseen = [runs.longest(piece)[0] < n for piece in pieces]
    assert ngrams.unseen_share(asked) == (sum(unseen) / len(unseen) if unseen else 0.0)


@given(st.lists(text, max_size=4).filter(any), text, st.integers(1, 5))
def test_a_text_that_joins_the_corpus_has_nothing_unseen(corpus: list[str], asked: str, n: int) -> None:
    ngrams = TrainingNgrams.from_texts(corpus, n)
    known = TrainingNgrams.from_texts([*corpus, asked], n)
    assert known.unseen_share(asked) == 0.0 <= ngrams.unseen_share(asked) <= 1
    assert ngrams.longest_run(asked) <= known.longest_run(asked) == len(asked.split())


def test_a_corpus_or_n_that_makes_no_sense_is_refused() -> None:
    for texts in ([], [""], ["?!", " "]):
        with pytest.raises(ValueError, match="no word"):
            TrainingNgrams.from_texts(texts)
    with pytest.raises(ValueError, match="n=0"):
        TrainingNgrams.from_texts(["a"], n=0)


def test_large_corpora_of_all_kinds_are_read_and_asked_in_time() -> None:
    draw = random.Random(0)
    natural = [" ".join(str(int(draw.paretovariate(1))) for _ in range(100)) for _ in range(1500)]
    started = time.perf_counter()
    ngrams = TrainingNgrams.from_texts(natural + natural[:100])
    assert all(ngrams.unseen_share(one) == 0.0 and ngrams.longest_run(one) == 100 for one in natural[:20])
    same = TrainingNgrams.from_texts([" ".join(["again"] * 50_000)])
    assert same.longest_run("again " * 300 + "and") == 300
    assert time.perf_counter() - started < 20  # quadratic would be minutes


def test_suffixes_are_in_the_order_of_a_plain_sort() -> None:
    words = np.array([1, 0, 1, 0, 1, -1, 0, 0, -1, -1], dtype=np.int32)
    wanted = sorted(range(len(words)), key=lambda start: words[start:].tolist())
    assert novelty._sorted_suffixes(words).tolist() == wanted


def test_the_example_of_the_docstring_is_right() -> None:
    assert doctest.testmod(novelty).failed == 0 and doctest.testmod(novelty).attempted == 3
