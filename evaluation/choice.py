"""Right or wrong: an answer against the gold one, and the option that a model takes."""

import math
from collections.abc import Callable, Sequence

from duet_moe.finetune.fact_wordings import is_right
from duet_moe.finetune.leaks import normalise


def exact_match(answer: str, gold: str) -> bool:
    """Say whether `gold` stands in `answer` as whole words, whatever the case, punctuation and space.

    Raises:
        ValueError: `gold` has no letter or digit.
    """
    if not normalise(gold):
        raise ValueError(f"gold answer {gold!r} has no letter or digit, so that nothing can match it.")
    return is_right(answer, gold)


def multiple_choice(prompt: str, options: Sequence[str], log_likelihood: Callable[[str, str], float]) -> int:
    """Return the index of the option that is likeliest per byte after the prompt; the first of equals.

    Bytes of UTF-8, as in the `acc_norm` of lm-evaluation-harness, favour neither long options nor a tokenizer.

    Args:
        log_likelihood: called with the prompt and an option, returns the natural logarithm of the probability that
            the option follows.

    Raises:
        ValueError: fewer than two options, an empty one, or a log-likelihood that is not a number or above 0.
    """
    if len(options) < 2 or not all(options):
        raise ValueError(f"options {list(options)!r}: give two or more, none of them empty.")
    scores = []
    for option in options:
        score = log_likelihood(prompt, option)
        if math.isnan(score) or score > 0:
            raise ValueError(f"log-likelihood of {option!r} is {score}; it has to be a number of at most 0.")
        scores.append(score / len(option.encode()))
    return max(range(len(scores)), key=scores.__getitem__)
