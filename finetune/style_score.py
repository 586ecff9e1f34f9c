"""A classifier that says whether a text is in a voice's style, and why.

Logistic regression over named style features (`style_features`) and hashed character n-grams. Hashing keeps no
vocabulary, so what is saved are numbers, none of which is a piece of the corpus. The classes weigh the same however
unequal their sizes, so 0.5 is the threshold of "rather this voice than neutral text".
"""

import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from duet_moe.finetune.leaks import normalise
from duet_moe.finetune.style_features import NAMES, style_features

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

FORMAT_VERSION = 1
EXAMPLES = Path(__file__).parent / "examples"
WRITTEN = Path(__file__).parent / "written"
THRESHOLD = 0.5
MIN_TEXTS = 10  # of each class; two in every fold
_FOLDS = 5
_NGRAM_BUCKETS = 4096
_NGRAM_WEIGHT = 6.0  # a row of n-grams has norm 1, one of the named features about the root of their number
_CLIP = 4.0  # standard deviations; one very odd feature must not decide alone
_REGULARISATION = 0.2  # scikit-learn's C


@dataclass(frozen=True)
class Counts:
    """What was said of texts that the classifier had not seen: how many of each class it took for the voice."""

    voice: int
    voice_taken: int
    neutral: int
    neutral_taken: int

    @property
    def accuracy(self) -> float:
        """Share of all texts that were told right."""
        return (self.voice_taken + self.neutral - self.neutral_taken) / (self.voice + self.neutral)

    @property
    def balanced_accuracy(self) -> float:
        """Mean of the two classes' shares: 0.5 is chance, however unequal the classes are."""
        return (self.voice_taken / self.voice + 1 - self.neutral_taken / self.neutral) / 2


class StyleScorer:
    """Tells a voice's texts from neutral ones; made by `fit` or `load`.

    Example:

        >>> scorer = StyleScorer.fit(voice_texts, neutral_texts())
        >>> scorer.balanced_accuracy, scorer.share(samples)
        >>> scorer.explain(samples[0])
    """

    def __init__(self, numbers: dict[str, np.ndarray], counts: Counts) -> None:
        self._numbers = numbers
        self.counts = counts

    @property
    def accuracy(self) -> float:
        """Share of unseen texts that were told right; the larger class decides it."""
        return self.counts.accuracy

    @property
    def balanced_accuracy(self) -> float:
        """Mean over the two classes of the share of unseen texts that were told right."""
        return self.counts.balanced_accuracy

    @classmethod
    def fit(cls, voice: Sequence[str], neutral: Sequence[str], seed: int = 0) -> "StyleScorer":
        """Learn to tell `voice` from `neutral`; texts that repeat count once.

        Its counts come from cross-validation in five folds: each text is judged by a classifier that has not seen it.
        To tell a voice from what a model writes without it, add some of the model's own answers to `neutral`.

        Raises:
            ValueError: fewer than ten different texts of a class, or a text in both.
        """
        voice, neutral = _different(voice), _different(neutral)
        for name, texts in (("voice", voice), ("neutral", neutral)):
            if len(texts) < MIN_TEXTS:
                raise ValueError(f"{len(texts)} different {name} texts are too few to judge style: give {MIN_TEXTS}.")
        if both := set(map(normalise, voice)) & set(map(normalise, neutral)):
            raise ValueError(f"{len(both)} texts are in the voice and in the neutral texts; take them out of one.")
        from sklearn.model_selection import StratifiedKFold

        named, ngrams = _inputs([*voice, *neutral])
        is_voice = np.arange(len(named)) < len(voice)
        taken = np.zeros(len(named), dtype=bool)
        for seen, unseen in StratifiedKFold(_FOLDS, shuffle=True, random_state=seed).split(named, is_voice):
            numbers = _learn(named[seen], ngrams[seen], is_voice[seen])
            taken[unseen] = _probabilities(numbers, named[unseen], ngrams[unseen]) >= THRESHOLD
        counts = Counts(len(voice), int(taken[is_voice].sum()), len(neutral), int(taken[~is_voice].sum()))
        return cls(_learn(named, ngrams, is_voice), counts)

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Return how surely each text is in the voice's style, float64 (len(texts),); 0 where there is no word."""
        if not texts:
            return np.zeros(0)
        spoken = np.array([bool(normalise(text)) for text in texts])
        return np.where(spoken, _probabilities(self._numbers, *_inputs(texts)), 0.0)

    def share(self, texts: Sequence[str]) -> float:
        """Return the share of texts taken for the voice, in [0, 1].

        Raises:
            ValueError: without texts.
        """
        if not texts:
            raise ValueError("There are no texts to judge; give at least one.")
        return float((self.probabilities(texts) >= THRESHOLD).mean())

    def explain(self, text: str, n: int = 5) -> list[str]:
        """Return the `n` features that speak loudest, each with its vote (in log odds; plus is for the voice).

        The character n-grams are one of them, all together.
        """
        named, ngrams = _inputs([text])
        numbers = self._numbers
        votes = _standard(numbers, named)[0] * numbers["weights"]
        spelling = float((ngrams @ numbers["ngrams"])[0])
        lines = [
            (float(vote), f"{vote:+.2f}  {name}: {value:.2f}, usually {mean:.2f}")
            for vote, name, value, mean in zip(votes, NAMES, named[0], numbers["mean"], strict=True)
        ]
        lines.append((spelling, f"{spelling:+.2f}  spelling (character n-grams)"))
        return [line for _, line in sorted(lines, key=lambda pair: -abs(pair[0]))[:n]]

    def save(self, folder: str | Path) -> None:
        """Write `style.safetensors` and `style.json` into `folder`; each appears whole or not at all."""
        content = save_tensors(self._numbers)
        card = {
            "format_version": FORMAT_VERSION,
            "counts": asdict(self.counts),
            "accuracy": self.accuracy,
            "balanced_accuracy": self.balanced_accuracy,
            "features": list(NAMES),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "style.safetensors", content)
        _write(folder / "style.json", json.dumps(card, indent=2).encode())

    @classmethod
    def load(cls, folder: str | Path) -> "StyleScorer":
        """Read what `save` has written; its probabilities are equal to the last bit.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the files are damaged, do not belong together, or come from another version of this package.
        """
        folder = Path(folder)
        for name in ("style.json", "style.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}: fit a StyleScorer and save it there.")
        content = (folder / "style.safetensors").read_bytes()
        try:
            card = json.loads((folder / "style.json").read_text(encoding="utf-8"))
            version, features, digest = card["format_version"], card["features"], card["sha256"]
            counts = Counts(**card["counts"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder / 'style.json'} is damaged ({error!r}); fit and save the scorer again."
            ) from error
        if version != FORMAT_VERSION or features != list(NAMES):
            raise ValueError(
                f"{folder / 'style.json'} has format {version!r} and {len(features)} features; this version of "
                f"duet-moe reads format {FORMAT_VERSION} with its own {len(NAMES)}: fit and save the scorer again."
            )
        if (found := hashlib.sha256(content).hexdigest()) != digest:
            raise ValueError(
                f"{folder / 'style.safetensors'} has sha256 {found}, but style.json names {digest}: "
                "fit and save the scorer again."
            )
        return cls(load_tensors(content), counts)


def neutral_texts(limit: int = 2000, seed: int = 0) -> list[str]:
    """Return `limit` texts that come with this package and are nobody's voice, drawn with `seed`.

    Plain texts of companies (`examples/*/neutral.jsonl`) come first, because they are closest to what a voice writes
    about; the rest is drawn evenly from the kinds of `written/`.
    """
    draw = random.Random(seed)
    plain = [text for file in sorted(EXAMPLES.glob("*/neutral.jsonl")) for text in _responses(file)]
    kinds = [_responses(file) for file in sorted(WRITTEN.glob("*.jsonl"))]
    for texts in (plain, *kinds):
        draw.shuffle(texts)
    even = [text for row in zip_longest(*kinds) for text in row if text is not None]
    return [*plain, *even][:limit]


def _responses(file: Path) -> list[str]:
    return [json.loads(line)["response"] for line in file.read_text(encoding="utf-8").splitlines()]


def _different(texts: Sequence[str]) -> list[str]:
    """Return the texts that have a word, the first of those that differ only in case, punctuation and space."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(normalise(text), text)
    first.pop("", None)
    return list(first.values())


def _inputs(texts: Sequence[str]) -> tuple[np.ndarray, "csr_matrix"]:
    """Return named features (texts, len(NAMES)) and n-grams, sparse (texts, buckets), both float64."""
    from sklearn.feature_extraction.text import HashingVectorizer

    hashing = HashingVectorizer(
        analyzer="char_wb", ngram_range=(2, 4), n_features=_NGRAM_BUCKETS, norm="l2", lowercase=True
    )
    return np.stack([style_features(text) for text in texts]), hashing.transform(texts) * _NGRAM_WEIGHT


def _learn(named: np.ndarray, ngrams: "csr_matrix", is_voice: np.ndarray) -> dict[str, np.ndarray]:
    from scipy.sparse import csr_matrix, hstack
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    scale = named.std(axis=0)
    numbers = {"mean": named.mean(axis=0), "scale": np.where(scale > 0, scale, 1.0)}
    model = LogisticRegression(C=_REGULARISATION, class_weight="balanced", max_iter=2000)
    with threadpool_limits(1):  # more threads only wait for each other at this size, and add in another order
        model.fit(hstack([csr_matrix(_standard(numbers, named)), ngrams], format="csr"), is_voice)
    weights = model.coef_[0]
    return numbers | {
        "weights": weights[: len(NAMES)].copy(),
        "ngrams": weights[len(NAMES) :].copy(),
        "intercept": model.intercept_.astype(np.float64),
    }


def _standard(numbers: dict[str, np.ndarray], named: np.ndarray) -> np.ndarray:
    return np.clip((named - numbers["mean"]) / numbers["scale"], -_CLIP, _CLIP)


def _probabilities(numbers: dict[str, np.ndarray], named: np.ndarray, ngrams: "csr_matrix") -> np.ndarray:
    # A sum along each row, not a matrix product: what is beside a text in a batch must not change its last bits.
    odds = (_standard(numbers, named) * numbers["weights"]).sum(axis=1) + ngrams @ numbers["ngrams"]
    return 1 / (1 + np.exp(-(odds + numbers["intercept"])))


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
