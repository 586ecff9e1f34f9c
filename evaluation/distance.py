"""Distance of two sets of texts, such as a model's and people's, from their embeddings.

Both measures need sets of about equal size, and the same sizes in everything that is compared: few samples look
further apart than many. MAUVE's differences mean little below a thousand samples a set.
"""

import numpy as np

from duet_moe.evaluation.semantic import checked, unit_rows

_CLUSTER = 10  # samples of the smaller set for each cluster, as the paper's authors do
_WEIGHTS = 25  # mixtures along the divergence frontier
_SCALING = 5.0  # c of the paper


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Return the squared Frechet distance of two normal distributions fitted to the sets (Heusel et al. 2017,
    arXiv 1706.08500, equation 6): |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); 0 for equal sets.

    The covariances are shrunk towards a multiple of the identity (Ledoit and Wolf 2004, doi
    10.1016/S0047-259X(03)00096-4), so that sets of fewer samples than dimensions can be compared.

    Args:
        first, second: real numbers (samples, dim), two samples or more each; not scaled here.

    Raises:
        ValueError: fewer samples, different dims, or a number that is not finite.
    """
    first, second = _pair(first, second, 2)
    covariance, other = _covariance(first), _covariance(second)
    # (C1 C2)^(1/2) has the trace of the singular values of C1^(1/2) C2^(1/2).
    overlap = np.linalg.norm(_root(covariance) @ _root(other), "nuc")
    means = np.square(first.mean(axis=0) - second.mean(axis=0)).sum()
    return max(0.0, float(means + np.trace(covariance) + np.trace(other) - 2 * overlap))


def mauve(first: np.ndarray, second: np.ndarray, seed: int = 0) -> float:
    """Return MAUVE (Pillutla et al. 2021, arXiv 2102.01454): the area under the divergence frontier of two sets.

    The directions of all embeddings are clustered by k-means, a tenth as many clusters as the smaller set has samples;
    the frontier is that of the two histograms over the clusters. Unlike the paper's program, no principal components
    are taken first.

    Args:
        first, second: real numbers (samples, dim), twenty samples or more each.
        seed: of k-means; values vary with it.

    Returns:
        From 0.004 (no cluster in common) to 1 (equal histograms).

    Raises:
        ValueError: fewer samples, different dims, a row of zeros, or a number that is not finite.
    """
    from sklearn.cluster import KMeans

    first, second = _pair(first, second, 2 * _CLUSTER)
    rows = unit_rows(np.concatenate([first, second]))
    wanted = round(min(len(first), len(second)) / _CLUSTER)
    clusters = min(wanted, len(np.unique(rows, axis=0)))
    labels = KMeans(clusters, n_init=5, max_iter=500, random_state=seed).fit_predict(rows)
    p, q = (np.bincount(part, minlength=clusters) / len(part) for part in (labels[: len(first)], labels[len(first) :]))
    return _frontier_area(p, q)


def _frontier_area(p: np.ndarray, q: np.ndarray) -> float:
    """Return the area under (exp(-c KL(q|r)), exp(-c KL(p|r))) for the mixtures r of p and q, and the two axes."""
    weights = np.linspace(1e-6, 1 - 1e-6, _WEIGHTS)
    points = [(_divergence(q, w * p + (1 - w) * q), _divergence(p, w * p + (1 - w) * q)) for w in weights]
    # The weight of p grows from point to point: x falls from 1 and y grows to 1.
    x, y = np.exp(-_SCALING * np.array([(0.0, np.inf), *points, (np.inf, 0.0)])).T
    return float(-np.diff(x) @ (y[1:] + y[:-1]) / 2)


def _divergence(p: np.ndarray, r: np.ndarray) -> float:
    """Return the Kullback-Leibler divergence of p from r in nats; r is positive wherever p is."""
    some = p > 0
    return float((p[some] * np.log(p[some] / r[some])).sum())


def _covariance(rows: np.ndarray) -> np.ndarray:
    from sklearn.covariance import ledoit_wolf

    return ledoit_wolf(rows)[0]


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def _pair(first: np.ndarray, second: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    first, second = checked(first), checked(second)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"embeddings of dim {first.shape[1]} and {second.shape[1]}; take both from one encoder.")
    if min(len(first), len(second)) < least:
        raise ValueError(f"sets of {len(first)} and {len(second)} samples are too few; give {least} or more of each.")
    return first, second
