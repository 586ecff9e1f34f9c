"""Repetition across a set of texts as a compressor sees it."""

import gzip
from collections.abc import Sequence


def compression_ratio(texts: Sequence[str]) -> float:
    """Return bytes before over bytes after gzip of the texts joined by spaces; higher is more repetitive.

    Shaib et al. 2024, arXiv 2403.00553: it finds repeated structure that n-gram counts miss. It grows with the amount
    of text, and gzip's own 20 bytes weigh on very short ones (below 1), so compare sets of about equal size.

    Raises:
        ValueError: there is no text, or nothing but empty ones.
    """
    if not any(texts):
        raise ValueError(f"{len(texts)} texts without a character cannot be compressed; give at least one with some.")
    content = " ".join(texts).encode()
    return len(content) / len(gzip.compress(content, compresslevel=9, mtime=0))
