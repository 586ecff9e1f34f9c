"""Diversity metrics: values by hand, and bounds as properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_moe.finetune.lexical import distinct_n, repetition, self_bleu

texts = st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12).map(" ".join), min_size=2, max_size=5)


def test_distinct_counts_pairs_over_all_texts() -> None:
    assert distinct_n(["a b c", "a b d"]) == pytest.approx(3 / 4)
    assert distinct_n(["one", "two"]) == 0.0


def test_equal_texts_have_self_bleu_one_and_disjoint_texts_almost_none() -> None:
    assert self_bleu(["the cat sat on the mat"] * 3) == pytest.approx(1.0)
    assert self_bleu(["the cat sat on the mat", "un chien dort sous une table"]) < 0.05
    with pytest.raises(ValueError, match="two or more"):
        self_bleu(["alone"])


def test_repetition_is_the_share_of_trigrams_said_before() -> None:
    assert repetition("a b c a b c") == pytest.approx(1 / 4)
    assert repetition("a b") == 0.0


@given(texts)
def test_scores_stay_between_0_and_1(sample: list[str]) -> None:
    assert 0 <= distinct_n(sample) <= 1
    assert 0 <= self_bleu(sample) <= 1 + 1e-9
    assert all(0 <= repetition(text) < 1 for text in sample)
