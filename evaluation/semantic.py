"""What embeddings tell of a set of texts: how far they differ in meaning, and whether they keep to their prompt.

The measures see only the angles between embeddings, so the encoder's scale does not matter. They can disagree: noise
texts look alike to an encoder, so read diversity beside the lexical measures of `duet_moe.finetune.lexical`.
"""

import numpy as np


def vendi(embeddings: np.ndarray) -> float:
    """Return the Vendi score: how many texts that have nothing in common would be as diverse as these.

    It is exp of the Shannon entropy of the eigenvalues of K / n, where K holds the cosine similarities (Friedman and
    Dieng 2023, arXiv 2210.02410, equation 1).

    Args:
        embeddings: real numbers (samples, dim).

    Returns:
        From 1 (all alike, or one sample) to the number of samples (all orthogonal).

    Raises:
        ValueError: the array has another shape, no row, a row of zeros, or a number that is not finite.
    """
    rows = unit_rows(embeddings)
    # The squared singular values of the rows are the eigenvalues of K.
    shares = np.linalg.svd(rows, compute_uv=False) ** 2 / len(rows)
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def dispersion(embeddings: np.ndarray) -> float:
    """Return the mean over all pairs of 1 - cosine similarity: 0 for equal samples, 1 for orthogonal ones.

    Args:
        embeddings: real numbers (samples, dim).

    Returns:
        From 0 (all alike, or one sample) to 2 (two samples that point opposite ways).

    Raises:
        ValueError: the array has another shape, no row, a row of zeros, or a number that is not finite.
    """
    rows = unit_rows(embeddings)
    count = len(rows)
    if count == 1:
        return 0.0
    # The squared norm of the sum is the sum of all similarities, those of every row with itself included.
    similarity = (np.square(rows.sum(axis=0)).sum() - count) / (count * (count - 1))
    return max(0.0, float(1 - similarity))  # rounding may leave equal samples a hair below 0


def obedience(texts: np.ndarray, prompts: np.ndarray, own: int) -> float:
    """Return how much nearer texts lie to the prompt that they answer than to other prompts.

    It is the mean cosine similarity with their own prompt, less that with all the others: the true prompt's score
    against that of shuffled ones.

    Args:
        texts, prompts: embeddings (samples, dim) and (prompts, dim). own: which of the prompts they answer.

    Returns:
        From -2 to 2; 0 where the texts have nothing to do with their prompt in particular.

    Raises:
        ValueError: there is no other prompt, or `own` is none of them, or as `vendi`.
    """
    similarity = (unit_rows(texts) @ unit_rows(prompts).T).mean(axis=0)
    if len(similarity) < 2 or not 0 <= own < len(similarity):
        raise ValueError(f"own={own} of {len(similarity)} prompts: give two or more, and which one was answered.")
    return float(similarity[own] - np.delete(similarity, own).mean())


def unit_rows(embeddings: np.ndarray) -> np.ndarray:
    """Return checked embeddings with rows of length 1, float64 (samples, dim)."""
    rows = checked(embeddings)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    if not largest.all():
        raise ValueError(f"embedding {int(largest.argmin())} is all zeros and has no direction; leave it out.")
    rows = rows / largest  # squares of very small or large numbers would not be finite
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def checked(embeddings: np.ndarray) -> np.ndarray:
    """Return embeddings as float64 (samples, dim); ValueError for another shape, no row or a number not finite."""
    rows = np.asarray(embeddings, dtype=np.float64)
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"embeddings have shape {rows.shape}; give one row per text: (samples, dim), neither zero.")
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows)).any(axis=1).argmax())
        raise ValueError(f"embedding {bad} has a number that is not finite; look at what the encoder was given.")
    return rows
