"""Style consistency: 1 for a style that stays, about 0 for a mixture of anything, lower where two voices alternate."""

import json
import random
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_moe.evaluation import consistency
from duet_moe.evaluation.consistency import style_consistency
from duet_moe.finetune.style_score import EXAMPLES, neutral_texts


def voice(name: str) -> list[str]:
    lines = (EXAMPLES / name / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["response"] for line in lines]


def test_it_is_one_minus_the_variance_in_that_of_neutral_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two features in use: capitals, and question marks; the third is a function word.
    monkeypatch.setattr(consistency, "_USED", np.array([True, True, False]))
    monkeypatch.setattr(
        consistency, "style_features", lambda text: np.array([text.count("X"), text.count("?"), len(text)], float)
    )
    # 0 and 4 capitals: roots 0 and 2, mean 1, deviation 1, variance 1. Question marks never vary.
    monkeypatch.setattr(consistency, "neutral_texts", lambda: ["a b ?", "X X XX?"])
    consistency._neutral.cache_clear()
    # Windows with 1 and 4 capitals: roots 1 and 2, deviations 0 and 1, unbiased variance 1/2.
    assert style_consistency("a ? X X X XX?", window=3) == pytest.approx(1 - 1 / 2)
    # 0 and 100 capitals: deviations -1 and 9, of which 4 count; variance 25/2.
    assert style_consistency("a b ? c ? " + 100 * "X", window=3) == pytest.approx(1 - 25 / 2)
    # 4, 4, 4 capitals and 1, 1, 1 question marks.
    assert style_consistency("X X XX? " * 3, window=3) == 1.0
    consistency._neutral.cache_clear()


@pytest.mark.parametrize("times", [2, 5])
def test_a_text_that_repeats_itself_is_wholly_consistent(times: int) -> None:
    text = "We bought a stove, and it burns birch! Wet gloves go on the left. "  # 13 words
    assert style_consistency(text * times, window=13) == pytest.approx(1.0)


def test_a_mixture_of_unrelated_texts_has_none() -> None:
    windows = [part for text in neutral_texts() for part in consistency._windows(text, 40)]
    random.Random(0).shuffle(windows)
    mixtures = [" ".join(windows[i : i + 8]) for i in range(0, 400, 8)]
    assert np.mean([style_consistency(text) for text in mixtures]) == pytest.approx(0.0, abs=0.2)


def test_one_voice_is_more_consistent_than_two_by_turns() -> None:
    playful, formal = voice("zuzu"), voice("halden")

    def mean(texts: list[str]) -> float:
        return float(np.mean([style_consistency(" ".join(texts[i : i + 16])) for i in range(0, 96, 16)]))

    by_turns = list(chain.from_iterable(zip(playful, formal, strict=False)))
    assert mean(by_turns) < min(mean(playful), mean(formal)) - 0.1


@pytest.mark.parametrize("text", ["", " \n ", "?!", "one", "word " * 14])
def test_a_text_too_short_for_two_windows_has_nothing_to_differ_from(text: str) -> None:
    assert style_consistency(text, window=10) == 1.0


def test_windows_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="window=0"):
        style_consistency("a b", window=0)
    with pytest.raises(ValueError, match="window=5000: no neutral text is that long"):
        style_consistency("word " * 10_000, window=5000)


@given(st.lists(st.sampled_from(["a", "bb.", "\n", "  "]), max_size=60).map(" ".join), st.integers(1, 12))
def test_windows_hold_the_whole_text_in_like_numbers_of_words(text: str, size: int) -> None:
    windows = consistency._windows(text, size)
    counts = [len(window.split()) for window in windows]
    assert not windows or "".join(windows) == text.lstrip()
    assert len(windows) == round(len(text.split()) / size)
    assert not counts or max(counts) - min(counts) <= 1
