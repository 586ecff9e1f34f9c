"""Say in which language texts are written, with py3langid: a naive Bayes model of 140 languages, offline, in NumPy."""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

UNSURE = "unsure"

_SURE = 0.5  # probability; a slogan of a few words stays below it in any language
_READ = 2000  # characters of a text that are looked at


def words_by_language(texts: Sequence[str]) -> tuple[Counter[str], Counter[str]]:
    """Return two counts by ISO 639-1 code, of words and of texts; short texts are often `unsure`.

    Raises:
        ImportError: py3langid is not installed.
    """
    words: Counter[str] = Counter()
    records: Counter[str] = Counter()
    for text in texts:
        language, probability = _identifier().classify(text[:_READ])
        language = language if probability >= _SURE else UNSURE
        words[language] += len(text.split())
        records[language] += 1
    return words, records


def check_language(language: str) -> None:
    """Raise ValueError for a language that cannot be told from others, ImportError without py3langid."""
    if language not in _identifier().labels:
        known = ", ".join(sorted(_identifier().labels))
        raise ValueError(f"language is {language!r}; give None to skip the check, or one of {known}")


@cache
def _identifier() -> "LanguageIdentifier":
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        message = "the language check needs py3langid: pip install 'duet-moe[finetune]', or give language=None"
        raise ImportError(message) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
