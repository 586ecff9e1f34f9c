"""Style of a text as named numbers: rhythm, punctuation, person, mood, sound and function words.

Every number is a rate (per sentence, per word) or a mean, so that a long text and a short one can be compared. English
word lists; in another language their features are near zero and the others go on working.
"""

import re
import statistics
from collections.abc import Iterable, Sequence

import numpy as np

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_SENTENCE = re.compile(r"[^.!?\u2026\n]+[.!?\u2026]*")
_DIGIT = re.compile(r"\d")
_STRETCHED = re.compile(r"([^\W\d_])\1\1")
_LABEL = re.compile(r"^(?:\W{0,2}\d{1,2}[.)]|[-*\u2022]|[^\W\d_][\w .'-]{0,20}:)\s", re.MULTILINE)
_WINDOW = 25  # words in which repeats count; over whole texts they grow with length

_MARKS = {
    "exclamation marks": r"!",
    "question marks": r"\?",
    "commas": r",",
    "semicolons and colons": r"[;:]",
    "dashes": r"\u2013|\u2014|--| - ",
    "ellipses": r"\u2026|\.\.\.",
    "quotation marks": r"[\"\u201c\u201d]",
    "brackets": r"[()\[\]]",
}
_CONTRACTION = re.compile(r"(?:n't|'(?:re|ve|ll|d|m)|^(?:it|that|there|here|what|who|he|she|let)'s)$")
_PERSONS = {
    "first person singular": "i me my mine myself i'm i've i'll i'd",
    "first person plural": "we us our ours ourselves we're we've we'll we'd let's",
    "second person": "you your yours yourself you're you've you'll you'd",
    "third person": "he him his she her hers they them their theirs he's she's they're",
    "impersonal one": "one one's oneself",
}
_SUBJECTS_AND_AUXILIARIES = frozenset(
    "i we you he she it they there this that who am is are was were be been has have had do does did will would shall "
    "should can could may might must isn't aren't wasn't weren't don't doesn't didn't won't can't it's that's".split()
)
_COMMANDS = frozenset(
    "add ask beat bite blow bring build buy call carry catch check choose click climb close come count cut dance do "
    "don't draw drink eat feel find finish fly follow get give go grab guess hang help hit hold hop hurry join jump "
    "keep kick lace lay leave let lie lift listen load look make mix move open pack pass pay pick place play pop "
    "press pull push put race reach read remember rest ride roll run save say see send set share shake show sing "
    "sit skip sleep slide sniff spin squeeze stand start stay step stop swap take tap tell think throw tie touch "
    "train try turn use visit wait wake walk wash watch wear whisper wiggle work write".split()
)
_FUNCTION_WORDS = (
    "the a and but or nor so for of to in on at with from by as if when while because than which who not no never "
    "this that these it is are was were be been has have had do will would shall may might can could must still also "
    "now then just very all every some any"
).split()

NAMES = (
    "words in a sentence (mean)",
    "words in a sentence (spread)",
    "sentences of one to three words",
    "sentences of four to six words",
    "sentences of twenty words or more",
    *(f"{name} in a sentence" for name in _MARKS),
    "sentences that end without a mark",
    "lines in a sentence",
    "labels and list marks in a sentence",
    "letters in a word (mean)",
    "words of eight letters or more",
    "words with a digit",
    "words in capitals",
    "names (capitals inside a sentence)",
    "sentences that begin small",
    "contractions",
    "words with a stretched letter",
    "different words among 25",
    "neighbours that alliterate",
    "words in -ed",
    "words in -ing",
    "words in -ly",
    "sentences that begin with a command",
    "sentences without subject or auxiliary",
    *_PERSONS,
    *(f"the word '{word}'" for word in _FUNCTION_WORDS),
)
_PERSON_WORDS = tuple(frozenset(words.split()) for words in _PERSONS.values())


def style_features(text: str) -> np.ndarray:
    """Return the features of a text in the order of `NAMES`, float64 (len(NAMES),); zeros when it has no word."""
    text = text.replace("\u2019", "'")
    sentences = [found.strip() for found in _SENTENCE.findall(text) if _WORD.search(found)]
    split = [_WORD.findall(sentence) for sentence in sentences]
    if not split:
        return np.zeros(len(NAMES))
    return np.array([*_rhythm(split), *_marks(text, sentences), *_words(split), *_mood(split)])


def _rhythm(split: Sequence[Sequence[str]]) -> list[float]:
    lengths = [len(words) for words in split]
    shares = [_share(low <= length <= high for length in lengths) for low, high in ((1, 3), (4, 6), (20, 10**9))]
    return [statistics.fmean(lengths), statistics.pstdev(lengths), *shares]


def _marks(text: str, sentences: Sequence[str]) -> list[float]:
    count = len(sentences)
    marks = [len(re.findall(mark, text)) / count for mark in _MARKS.values()]
    open_ended = _share(sentence[-1] not in ".!?\u2026" for sentence in sentences)
    lines = sum(bool(line.strip()) for line in text.splitlines())
    return [*marks, open_ended, lines / count, len(_LABEL.findall(text)) / count]


def _words(split: Sequence[Sequence[str]]) -> list[float]:
    words = [word for sentence in split for word in sentence]
    inner = [word for sentence in split for word in sentence[1:]]
    small = [word.lower() for word in words]
    pairs = [
        (a, b) for sentence in split for a, b in _neighbours([word.lower() for word in sentence if len(word) > 2])
    ]
    return [
        statistics.fmean(map(len, words)),
        _share(len(word) >= 8 for word in words),
        _share(bool(_DIGIT.search(word)) for word in words),
        _share(word.isupper() and len(word) > 1 for word in words),
        _share(word[0].isupper() and len(word) > 1 and not word.isupper() for word in inner),
        _share(sentence[0][0].islower() for sentence in split),
        _share(bool(_CONTRACTION.search(word)) for word in small),
        _share(bool(_STRETCHED.search(word)) for word in small),
        statistics.fmean(
            len(set(window)) / len(window)
            for window in (small[i : i + _WINDOW] for i in range(max(1, len(small) - _WINDOW + 1)))
        ),
        _share(a[0] == b[0] for a, b in pairs),
        *(_share(len(word) > 4 and word.endswith(ending) for word in small) for ending in ("ed", "ing", "ly")),
    ]


def _mood(split: Sequence[Sequence[str]]) -> list[float]:
    sentences = [[word.lower() for word in words] for words in split]
    words = [word for sentence in sentences for word in sentence]
    return [
        _share(sentence[0] in _COMMANDS for sentence in sentences),
        _share(_SUBJECTS_AND_AUXILIARIES.isdisjoint(sentence) for sentence in sentences),
        *(_share(word in person for word in words) for person in _PERSON_WORDS),
        *(words.count(word) / len(words) for word in _FUNCTION_WORDS),
    ]


def _neighbours(words: Sequence[str]) -> Iterable[tuple[str, str]]:
    return zip(words, words[1:], strict=False)


def _share(statements: Iterable[bool]) -> float:
    found = [bool(statement) for statement in statements]
    return sum(found) / len(found) if found else 0.0
