"""Word runs that a text shares with a corpus, found exactly and in linear time.

The corpus becomes a suffix automaton over words (Blumer et al. 1985, doi 10.1016/0304-3975(85)90157-4): one state for
every set of runs that end at the same places, at most two states a word. Runs never cross from one text to the next.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_ROOT, _NONE = 0, -1


def words_of(text: str) -> list[str]:
    """Return the words of a text without case, punctuation and space; "don't" is one word, in either apostrophe."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).replace("\u2019", "'").casefold())


class Runs:
    """The word runs of a corpus.

    Args:
        texts (iterable of `str`): the corpus, such as the responses that a voice was trained on.

    Example:

        >>> runs = Runs(["Coffee from the north. It is warm."])
        >>> runs.longest("Our tea, from the North, it is cold.")
        (5, 'from the north it is')
    """

    def __init__(self, texts: Iterable[str]) -> None:
        # State 0 is the empty run. Each state holds its longest run's length, its transitions by word, and the state
        # of the longest suffix that ends at more places.
        self._length = [0]
        self._next: list[dict[str, int]] = [{}]
        self._link = [_NONE]
        for text in texts:
            state = _ROOT
            for word in words_of(text):
                state = self._extend(state, word)

    def longest(self, text: str) -> tuple[int, str]:
        """Return the length in words and the words of the first longest run that `text` shares; (0, "") for none."""
        words = words_of(text)
        state = run = longest = end = 0
        for position, word in enumerate(words, 1):
            while state != _ROOT and word not in self._next[state]:
                state = self._link[state]
                run = self._length[state]
            if word in self._next[state]:
                state, run = self._next[state][word], run + 1
            if run > longest:
                longest, end = run, position
        return longest, " ".join(words[end - longest : end])

    def share_at_least(self, texts: Sequence[str], words: int = 8) -> float:
        """Return the share of `texts` that have a run of `words` or more in common with the corpus, in [0, 1].

        Raises:
            ValueError: without texts, or with `words` below 1.
        """
        if words < 1:
            raise ValueError(f"words={words}: ask for runs of at least one word.")
        if not texts:
            raise ValueError("There are no texts to look for copies in; give at least one.")
        return sum(self.longest(text)[0] >= words for text in texts) / len(texts)

    def _extend(self, state: int, word: str) -> int:
        """Append `word` to the text that has led to `state`; return the state of the text with it."""
        known = self._next[state].get(word)
        if known is not None:  # an earlier text has this run
            return self._ending(state, word, known)
        new = self._add(self._length[state] + 1, {}, _ROOT)
        while state != _NONE and word not in self._next[state]:
            self._next[state][word] = new
            state = self._link[state]
        if state != _NONE:
            self._link[new] = self._ending(state, word, self._next[state][word])
        return new

    def _ending(self, state: int, word: str, target: int) -> int:
        """Return the state whose longest run is that of `state` and `word`, split off `target` where that has more."""
        length = self._length[state] + 1
        if self._length[target] == length:
            return target
        split = self._add(length, dict(self._next[target]), self._link[target])
        self._link[target] = split
        while state != _NONE and self._next[state].get(word) == target:
            self._next[state][word] = split
            state = self._link[state]
        return split

    def _add(self, length: int, following: dict[str, int], link: int) -> int:
        self._length.append(length)
        self._next.append(following)
        self._link.append(link)
        return len(self._length) - 1
