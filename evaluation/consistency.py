"""Style consistency of one text: how much its style wanders from part to part."""

import re
from functools import lru_cache

import numpy as np

from duet_moe.finetune.style_features import NAMES, style_features
from duet_moe.finetune.style_score import neutral_texts

_WORD = re.compile(r"\S+")
_CLIP = 4.0  # standard deviations; one very odd feature must not decide alone
# In a window of some forty words single function words come and go by chance.
_USED = np.array([not name.startswith("the word ") for name in NAMES])


def style_consistency(text: str, window: int = 40) -> float:
    """Return how much less the style varies within a text than among windows of unrelated texts.

    The text is cut into windows of about `window` words, and 1 minus the variance of their style over that of windows
    of the neutral texts that come with this package is the consistency. Style is the features of `style_features`
    without single function words: their roots, so that frequent marks do not count as unsteady, in standard deviations
    of the neutral windows, at most four from the mean.

    Args:
        window: words in a window; values of different windows cannot be compared.

    Returns:
        1 for the same style throughout, 0 for a text as varied as a mixture of anything, less for more. A text too
        short for two windows has nothing to differ from and gets 1: leave such texts out of means.

    Raises:
        ValueError: `window` is below 1, or so large that no neutral text fills two.
    """
    if window < 1:
        raise ValueError(f"window={window}: a window has at least one word.")
    windows = _windows(text, window)
    if len(windows) < 2:
        return 1.0
    mean, scale, variance = _neutral(window)
    return float(1 - _standard(_roots(windows), mean, scale).var(axis=0, ddof=1).sum() / variance)


def _windows(text: str, size: int) -> list[str]:
    """Return the text in parts of equal numbers of words, `size` or the nearest that fits; space inside is kept."""
    starts = [found.start() for found in _WORD.finditer(text)]
    count = round(len(starts) / size)
    cuts = [starts[len(starts) * i // count] for i in range(count)]
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=False)]


def _roots(windows: list[str]) -> np.ndarray:
    """Return the square roots of the features in use, float64 (windows, features)."""
    return np.sqrt(np.stack([style_features(part)[_USED] for part in windows]))


def _standard(features: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.clip((features - mean) / scale, -_CLIP, _CLIP)


@lru_cache
def _neutral(size: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return mean and deviation of the features over neutral windows, and the sum of their variances as measured."""
    windows = [part for text in neutral_texts() for part in _windows(text, size)]
    if len(windows) < 2:
        raise ValueError(f"window={size}: no neutral text is that long, so there is no scale; take a smaller one.")
    features = _roots(windows)
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale[scale == 0] = 1.0
    return mean, scale, float(_standard(features, mean, scale).var(axis=0).sum())
