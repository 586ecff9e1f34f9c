"""Lexical diversity of a set of texts: distinct-n, self-BLEU and repetition, each a number in [0, 1]."""

from collections.abc import Sequence


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Return unique n-grams over all n-grams of the texts together (Li et al. 2016, arXiv 1510.03055); more is better.

    Texts shorter than n words add nothing; 0 when there is no n-gram at all.
    """
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """Return the mean BLEU-4 of every text against the others (Zhu et al. 2018, arXiv 1802.01886); less is better.

    Raises:
        ValueError: with fewer than two texts.
    """
    from sacrebleu.metrics import BLEU

    if len(texts) < 2:
        raise ValueError(f"self-BLEU compares texts with each other: {len(texts)} is too few, give two or more.")
    bleu = BLEU(effective_order=True)
    scores = [bleu.sentence_score(text, [*texts[:i], *texts[i + 1 :]]).score for i, text in enumerate(texts)]
    return sum(scores) / len(scores) / 100


def repetition(text: str, n: int = 3) -> float:
    """Return the share of a text's n-grams that it has said before; 0 is none, and texts under n words have none."""
    grams = _ngrams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
