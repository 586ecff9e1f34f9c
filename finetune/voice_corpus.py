"""Read and check the texts that a voice is trained on, before any training.

What comes out depends on the texts alone, never on the order of files or rows: documents are sorted, and a hash of the
prompt, or of the text that has none, decides what is held out. Nothing of the input is changed or copied.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePosixPath

from duet_moe.finetune.corpus import Document, is_held_out
from duet_moe.finetune.leaks import normalise
from duet_moe.finetune.voice_language import UNSURE, check_language, words_by_language
from duet_moe.finetune.voice_personal_data import mask_personal_data
from duet_moe.finetune.voice_records import CorpusError, Record, Skipped, read_records

MIN_RECORDS, MIN_WORDS = 16, 300  # refused below; the style report learns from ten of them or more
GOOD_RECORDS, GOOD_WORDS = 40, 1500  # noted below
MIN_HELDOUT = 4
PERSONAL_DATA = ("mask", "refuse", "keep")

_RUN = 8  # words
_SHOWN = 10


@dataclass(frozen=True)
class CorpusReport:
    """What was read and what became of it.

    Args:
        records, words (`int`): texts to train on, and their words, prompts not counted.
        skipped (tuple of `Skipped`): rows, paragraphs and files that could not be used.
        duplicates (`int`): texts that were there before, whatever their case and punctuation.
        masked (`dict`): kind of personal data -> how many were replaced.
        overlap_removed (`int`): training texts that repeat a held-out one.
        notes (tuple of `str`): what one should know before training.
    """

    files: int
    records: int
    words: int
    heldout_records: int
    skipped: tuple[Skipped, ...] = ()
    duplicates: int = 0
    masked: dict[str, int] = field(default_factory=dict)
    overlap_removed: int = 0
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the report for people, one statement a line."""
        lines = [
            f"files: {self.files}",
            f"training texts: {self.records:,} ({self.words:,} words)",
            f"held-out texts: {self.heldout_records:,}",
        ]
        if self.duplicates:
            lines.append(f"duplicates left out: {self.duplicates:,}")
        if self.overlap_removed:
            lines.append(f"training texts left out because they repeat held-out ones: {self.overlap_removed:,}")
        if self.masked:
            lines.append("personal data masked: " + ", ".join(f"{kind} ({n})" for kind, n in self.masked.items()))
        lines += [f"note: {note}" for note in self.notes]
        return lines + _named("skipped", [f"{item.file}:{item.line}: {item.reason}" for item in self.skipped])

    def to_dict(self) -> dict[str, object]:
        """Return plain data for a voice's card: no text of the corpus, and of paths only the file's name."""
        skipped = [asdict(item) | {"file": PurePosixPath(item.file).name} for item in self.skipped]
        return asdict(self) | {"skipped": skipped, "masked": dict(self.masked), "notes": list(self.notes)}


@dataclass(frozen=True)
class VoiceCorpus:
    """The documents of a voice, no text on both sides, and the report on how they were found."""

    train: tuple[Document, ...]
    heldout: tuple[Document, ...]
    report: CorpusReport


def read_voice_corpus(
    corpus: object,
    heldout: object = None,
    *,
    heldout_share: float = 0.15,
    personal_data: str = "mask",
    text_column: str | None = None,
    prompt_column: str | None = None,
    language: str | None = "en",
) -> VoiceCorpus:
    """Read a voice's texts, check them and set some apart to judge the training by.

    Args:
        corpus: path of a file (.txt, .md, .docx, .csv, .jsonl, .json) or of a folder of them, a `datasets.Dataset`, or
            an iterable of dicts. Rows have `text`, `prompt` and `response`, or `messages`.
        heldout (*optional*): the same, for texts that are not trained on; by default a share of `corpus`.
        heldout_share (`float`): that share.
        personal_data (`str`): `mask` e-mail addresses, telephone, card and account numbers, `refuse` a corpus that has
            any, or `keep` them.
        text_column, prompt_column (`str`, *optional*): fields of the rows.
        language (`str`, *optional*): ISO 639-1 code of what most of the text must be written in; None: any. Languages
            that put no spaces between words have too few words for the limits here.

    Raises:
        CorpusError: nothing to read, too little text, mostly another language, personal data under `refuse`.
        ValueError: an option is none of the allowed ones.
        ImportError: python-docx (for .docx) or py3langid (for `language`) is not installed.
    """
    check_options(heldout_share, personal_data)
    if language:
        check_language(language)
    reading = read_records(corpus, text_column=text_column, prompt_column=prompt_column)
    readings = [reading]
    if heldout is not None:
        readings.append(read_records(heldout, text_column=text_column, prompt_column=prompt_column, name="heldout"))
    skipped = tuple(item for each in readings for item in each.skipped)
    masked: Counter[str] = Counter()
    sides = [_unique(without_personal_data(each.records, personal_data, masked)) for each in readings]
    if not sides[0]:
        raise CorpusError("\n".join(["the corpus has no text that can be used", *_skips(skipped)]))
    notes = [note for each in readings for note in each.notes]
    notes += _language_notes([document.response for document in sides[0]], language) if language else []

    if heldout is None:
        held = [document for document in sides[0] if is_held_out(_key(document), heldout_share)]
        train = [document for document in sides[0] if not is_held_out(_key(document), heldout_share)]
    else:
        train, held = sides
    clean = _without_overlap(train, held)
    usable = clean + held if heldout is None else clean
    removed = len(train) - len(clean)
    notes += _size_notes(usable, removed, skipped)
    _check_heldout(held, usable, heldout_share, given=heldout is not None)
    report = CorpusReport(
        files=sum(each.files for each in readings),
        records=len(clean),
        words=_words(clean),
        heldout_records=len(held),
        skipped=skipped,
        duplicates=sum(len(each.records) for each in readings) - sum(map(len, sides)),
        masked=dict(sorted(masked.items())),
        overlap_removed=removed,
        notes=tuple(notes),
    )
    return VoiceCorpus(tuple(clean), tuple(held), report)


def read_texts(
    path: object, *, text_column: str | None = None, prompt_column: str | None = None, personal_data: str = "mask"
) -> list[str]:
    """Return the texts without their prompts, in the order of reading, repeated ones too: to compare a voice with.

    Args: as those of `read_voice_corpus`.

    Raises:
        CorpusError: a row cannot be used, there is no text, or personal data under `refuse`.
    """
    check_options(0.5, personal_data)
    reading = read_records(path, text_column=text_column, prompt_column=prompt_column, name="texts")
    # Figures that leave out a part in silence would mislead.
    if reading.skipped or not reading.records:
        raise CorpusError("\n".join(["the texts cannot be used as they are", *_skips(reading.skipped)]))
    return [record.text for record in without_personal_data(reading.records, personal_data, Counter())]


def check_options(heldout_share: float, personal_data: str) -> None:
    """Raise ValueError on a share or a rule for personal data that is none."""
    if not 0 < heldout_share < 1:
        raise ValueError(f"heldout_share is {heldout_share!r}; give a number between 0 and 1, such as 0.15")
    if personal_data not in PERSONAL_DATA:
        raise ValueError(f"personal_data is {personal_data!r}; choose one of {PERSONAL_DATA}")


def without_personal_data(records: Sequence[Record], rule: str, masked: Counter[str]) -> list[Record]:
    """Return the records with personal data masked, counted by kind in `masked`; CorpusError under `refuse`."""
    if rule == "keep":
        return list(records)
    found = []
    clean = []
    for record in records:
        text, counts = mask_personal_data(record.text)
        prompt, more = mask_personal_data(record.prompt or "")
        if kinds := sorted(counts + more):
            found.append(f"{record.file}:{record.line}: {', '.join(kinds)}")
        masked.update(counts + more)
        clean.append(replace(record, text=text, prompt=prompt or None))
    if found and rule == "refuse":
        advice = f"{len(found)} texts have personal data; take it out, or give personal_data='mask' (or 'keep')"
        raise CorpusError("\n".join([advice, *_named("found in", found)]))
    return clean


def _unique(records: Iterable[Record]) -> list[Document]:
    """Return sorted documents, of those that differ in case and punctuation only the first."""
    unique: dict[tuple[str, str], Document] = {}
    for prompt, text in sorted((record.prompt or "", record.text) for record in records):
        unique.setdefault((normalise(prompt), normalise(text)), Document(prompt or None, text))
    return list(unique.values())


def _key(document: Document) -> str:
    return document.prompt or document.response


def _language_notes(texts: Sequence[str], language: str) -> list[str]:
    words, records = words_by_language(texts)
    del words[UNSURE], records[UNSURE]
    total = words.total()
    if total and words[language] < total / 2:
        shares = ", ".join(f"{code} {count / total:.0%}" for code, count in words.most_common(5))
        advice = "give the language of the corpus, or None to skip this check"
        raise CorpusError(f"the corpus is mostly not in the language {language!r}, by words: {shares}; {advice}")
    del records[language]
    others = ", ".join(f"{code} ({count})" for code, count in sorted(records.items()))
    return [f"texts that look like another language than {language!r}: {others}"] if others else []


def _without_overlap(train: Sequence[Document], heldout: Sequence[Document]) -> list[Document]:
    texts = {normalise(document.response) for document in heldout}
    runs = {run for text in texts for run in _runs(text)}
    return [document for document in train if not _repeats(normalise(document.response), texts, runs)]


def _repeats(text: str, texts: set[str], runs: set[str]) -> bool:
    """True for a text among `texts`, or with more than half of its words within `runs`."""
    shared = {start + offset for start, run in enumerate(_runs(text)) if run in runs for offset in range(_RUN)}
    return text in texts or len(shared) > len(text.split()) / 2


def _runs(text: str) -> list[str]:
    words = text.split()
    return [" ".join(words[start : start + _RUN]) for start in range(len(words) - _RUN + 1)]


def _size_notes(documents: Sequence[Document], removed: int, skipped: Sequence[Skipped]) -> list[str]:
    records, words = len(documents), _words(documents)
    there = f"{records:,} texts and {words:,} words"
    if records < MIN_RECORDS or words < MIN_WORDS:
        because = [f"{removed} more repeat held-out texts"] if removed else []
        needed = f"a voice needs {MIN_RECORDS} texts and {MIN_WORDS} words, better {GOOD_RECORDS} and {GOOD_WORDS:,}"
        raise CorpusError("\n".join([f"too little text: {there}; {needed}", *because, *_skips(skipped)]))
    if records < GOOD_RECORDS or words < GOOD_WORDS:
        return [f"little text: {there}; {GOOD_RECORDS} texts and {GOOD_WORDS:,} words make a steadier voice"]
    return []


def _check_heldout(held: Sequence[Document], usable: Sequence[Document], share: float, *, given: bool) -> None:
    if len(held) >= MIN_HELDOUT:
        return
    there = f"{len(held)} held-out texts; {MIN_HELDOUT} are needed to judge a training by"
    if given:
        raise CorpusError(f"{there}: add texts to heldout, or leave it out to set a share of the corpus apart")
    larger = (step / 20 for step in range(1, 20) if step / 20 > share)
    enough = [size for size in larger if sum(is_held_out(_key(each), size) for each in usable) >= MIN_HELDOUT]
    advice = f"give heldout_share={enough[0]}, or " if enough else ""
    raise CorpusError(f"{there}: {advice}add texts with other prompts, or give heldout texts of their own")


def _words(documents: Iterable[Document]) -> int:
    return sum(len(document.response.split()) for document in documents)


def _skips(skipped: Sequence[Skipped]) -> list[str]:
    return _named("skipped", [f"{item.file}:{item.line}: {item.reason}" for item in skipped])


def _named(word: str, items: Sequence[str]) -> list[str]:
    more = [f"... and {len(items) - _SHOWN:,} more"] if len(items) > _SHOWN else []
    return [f"{word} {item}" for item in items[:_SHOWN]] + more
