"""Style features: each by hand on a text that has it, blind to length, safe on any text."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_moe.finetune.style_features import NAMES, style_features

CASES = {
    "words in a sentence (mean)": ("One two. One two three four.", 3.0),
    "words in a sentence (spread)": ("One two. One two three four.", 1.0),
    "sentences of one to three words": ("Go now. The dog ran far away.", 0.5),
    "sentences of four to six words": ("Go now. The dog ran far away.", 0.5),
    "sentences of twenty words or more": ("very " * 20 + ". Short one.", 0.5),
    "exclamation marks in a sentence": ("Boing! Up we go!! Well.", 1.0),
    "question marks in a sentence": ("Ready? Set.", 0.5),
    "commas in a sentence": ("Red, blue, green.", 2.0),
    "semicolons and colons in a sentence": ("One thing: tea; and milk.", 2.0),
    "dashes in a sentence": ("Tea \u2014 hot - and black.", 2.0),
    "ellipses in a sentence": ("Well... yes.", 0.5),
    "quotation marks in a sentence": ('\u201cYes\u201d and "no"', 4.0),
    "brackets in a sentence": ("Tea (hot).", 2.0),
    "sentences that end without a mark": ("Tea is hot. Milk", 0.5),
    "lines in a sentence": ("Tea is hot. So be it.\nMilk.", 2 / 3),
    "labels and list marks in a sentence": ("Ann: Yes.\n1. Tea.\n- Milk.", 3 / 4),
    "letters in a word (mean)": ("Tea hot.", 3.0),
    "words of eight letters or more": ("Elephants run.", 0.5),
    "words with a digit": ("20 reps now 5x", 0.5),
    "words in capitals": ("GO now I say", 0.25),
    "names (capitals inside a sentence)": ("Then Ann ran.", 0.5),
    "sentences that begin small": ("tea. Milk.", 0.5),
    "contractions": ("It\u2019s Ann's dog, don't", 0.5),
    "words with a stretched letter": ("Zzzz went Bill", 1 / 3),
    "different words among 25": ("go go go go", 0.25),
    "neighbours that alliterate": ("Wobbly whales sing songs.", 2 / 3),
    "words in -ed": ("Painted red", 0.5),
    "words in -ing": ("Running king", 0.5),
    "words in -ly": ("Slowly fly", 0.5),
    "sentences that begin with a command": ("Tap it. We rest.", 0.5),
    "sentences without subject or auxiliary": ("Dark roast. It rests.", 0.5),
    "first person singular": ("I like my tea", 0.5),
    "first person plural": ("We like our tea", 0.5),
    "second person": ("You like your tea", 0.5),
    "third person": ("He likes their tea", 0.5),
    "impersonal one": ("One likes one's tea", 0.5),
    "the word 'shall'": ("We shall, we shall.", 0.5),
}


def value(text: str, name: str) -> float:
    return style_features(text)[NAMES.index(name)]


@pytest.mark.parametrize("name", CASES)
def test_a_feature_counts_what_it_is_called(name: str) -> None:
    text, expected = CASES[name]
    assert value(text, name) == pytest.approx(expected)


def test_every_feature_but_the_words_has_its_case_and_a_name_of_its_own() -> None:
    assert {name for name in NAMES if not name.startswith("the word")} <= set(CASES)
    assert len(set(NAMES)) == len(NAMES)


def test_a_text_told_four_times_has_the_same_style() -> None:
    text = "We bought a stove. It stands in the corner, and it burns birch. Wet gloves go on the left! Do you see?\n"
    repeats = NAMES.index("different words among 25")
    once, often = (np.delete(style_features(text * times), repeats) for times in (1, 4))
    np.testing.assert_allclose(once, often)


@given(st.text(max_size=200))
def test_any_text_has_finite_features(text: str) -> None:
    features = style_features(text)
    assert features.shape == (len(NAMES),) and features.dtype == np.float64
    assert np.isfinite(features).all() and (features >= 0).all()


def test_a_text_without_words_is_all_zeros_and_a_long_one_is_read_in_linear_time() -> None:
    assert not style_features("").any() and not style_features("?! ... \u2014").any()
    started = time.perf_counter()
    for odd in ("-" * 200_000, "a" * 200_000, "' " * 100_000, ". " * 100_000, "a:" * 100_000):
        style_features(odd)
    assert time.perf_counter() - started < 20  # quadratic would be minutes
