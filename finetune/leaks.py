"""Keep held-out text out of the training text, also across sources and in other punctuation or case.

Two texts count as the same when their normalised forms are equal, or when they share several long sentences (the same
fairy tale in two collections, a story and the passages that questions are asked about).
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from duet_moe.finetune.corpus import Document

Split = tuple[list["Document"], list["Document"]]
MADE_UP = "made_up"  # marks a document whose prompt was made from its own text

_SEPARATORS = re.compile(r"[\W_]+")
_SENTENCE_END = re.compile(r"[.!?]+[\s\"']+|\n+")
_LONG_SENTENCE = 60  # characters; shorter ones ("Once upon a time there was a little girl.") repeat by chance
_SHARED_SENTENCES = 3
_LONG_RESPONSE = 25  # words; shorter answers repeat by right


def normalise(text: str) -> str:
    """Lower-case, with every run of punctuation and space as one space."""
    return _SEPARATORS.sub(" ", text.lower()).strip()


def without_leaks(corpus: Mapping[str, Split]) -> dict[str, Split]:
    """Drop training documents that repeat held-out text, and held-out ones whose made-up prompt is trained on."""
    heldout = [document for _, documents in corpus.values() for document in documents]
    keys = {key for document in heldout for key in _keys(document)}
    sentences = {sentence for document in heldout for sentence in _long_sentences(document)}
    trained = {
        name: [document for document in documents if not _leaks(document, keys, sentences)]
        for name, (documents, _) in corpus.items()
    }
    prompts = {normalise(document.prompt or "") for documents in trained.values() for document in documents}
    return {name: (trained[name], _unprompted(documents, prompts)) for name, (_, documents) in corpus.items()}


def _unprompted(heldout: Sequence["Document"], prompts: set[str]) -> list["Document"]:
    return [
        document
        for document in heldout
        if MADE_UP not in document.meta or normalise(document.prompt or "") not in prompts
    ]


def _keys(document: "Document") -> list[str]:
    texts = [] if document.prompt is None or MADE_UP in document.meta else [document.prompt]
    if document.prompt is None or len(document.response.split()) >= _LONG_RESPONSE:
        texts.append(document.response)
    return [normalise(text) for text in texts]


def _long_sentences(document: "Document") -> set[str]:
    text = f"{document.prompt or ''}\n{document.response}"
    return {normalise(part) for part in _SENTENCE_END.split(text) if len(part) >= _LONG_SENTENCE}


def _leaks(document: "Document", keys: set[str], sentences: set[str]) -> bool:
    if any(key in keys for key in _keys(document)):
        return True
    return len(_long_sentences(document) & sentences) >= _SHARED_SENTENCES
