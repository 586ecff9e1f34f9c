"""Novelty of a text against a training corpus: word n-grams that are not in it, and the longest run that is.

`duet_moe.finetune.copying.Runs` finds the same runs in a small corpus and keeps a dictionary for each word of it. The
corpora that models are trained on have millions of words, so here they are a suffix array:
12 bytes a word.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterable

import numpy as np

from duet_moe.finetune.copying import words_of

_END = -1  # after each text, so that no run crosses from one to the next


class TrainingNgrams:
    """The word runs of a corpus, without case and punctuation; made by `from_texts`.

    Example:

        >>> ngrams = TrainingNgrams.from_texts(["The fox ran over the hill.", "It was late."], n=3)
        >>> ngrams.unseen_share("The fox ran over the road.")
        0.25
        >>> ngrams.longest_run("The fox ran over the road.")
        5
    """

    def __init__(self, words: np.ndarray, vocabulary: dict[str, int], n: int) -> None:
        self._words = words
        self._vocabulary = vocabulary
        self._suffixes = _sorted_suffixes(words)
        self.n = n

    @classmethod
    def from_texts(cls, texts: Iterable[str], n: int = 5) -> "TrainingNgrams":
        """Read a corpus, one text at a time; runs do not cross from one text to the next.

        Args:
            n: words in the n-grams of `unseen_share`.

        Raises:
            ValueError: `n` is below 1, or there is no word in the texts.
        """
        if n < 1:
            raise ValueError(f"n={n}: n-grams have at least one word.")
        vocabulary: dict[str, int] = {}
        words = array("i")
        for text in texts:
            words.extend(vocabulary.setdefault(word, len(vocabulary)) for word in words_of(text))
            words.append(_END)
        if not vocabulary:
            raise ValueError("The training texts have no word; give the corpus that the model was trained on.")
        return cls(np.frombuffer(words, dtype=np.int32), vocabulary, n)

    def unseen_share(self, text: str) -> float:
        """Return the share of the text's n-grams that are not in the corpus, in [0, 1]; 0 for fewer than n words."""
        words = self._read(text)
        ngrams = [words[i : i + self.n] for i in range(len(words) - self.n + 1)]
        return sum(not self._has(ngram) for ngram in ngrams) / len(ngrams) if ngrams else 0.0

    def longest_run(self, text: str) -> int:
        """Return the number of words in the longest run that the text shares with the corpus; 0 for none."""
        words = self._read(text)
        longest = 0
        for start in range(len(words)):
            while start + longest < len(words) and self._has(words[start : start + longest + 1]):
                longest += 1
        return longest

    def _read(self, text: str) -> list[int]:
        unknown = len(self._vocabulary)
        return [self._vocabulary.get(word, unknown) for word in words_of(text)]

    def _has(self, run: list[int]) -> bool:
        def beginning(start: int) -> list[int]:
            return self._words[start : start + len(run)].tolist()

        place = bisect_left(self._suffixes, run, key=beginning)
        return place < len(self._suffixes) and beginning(self._suffixes[place]) == run


def _sorted_suffixes(words: np.ndarray) -> np.ndarray:
    """Return the starts of all suffixes in the order of the suffixes, int64 (words,).

    Prefix doubling (Manber and Myers 1993, doi 10.1137/0222058): the rank by 2m words is that by m words here and by m
    words m places on.
    """
    rank = np.unique(words, return_inverse=True)[1]
    reach = 1
    while True:
        following = np.zeros_like(rank)  # 0: the corpus is over
        following[:-reach] = rank[reach:] + 1
        keys = rank * (len(rank) + 1) + following
        order = np.argsort(keys)
        keys = keys[order]
        rank[order] = np.concatenate([[0], np.cumsum(keys[1:] != keys[:-1])])
        if rank[order[-1]] == len(rank) - 1:  # no two are equal
            return order
        reach *= 2
