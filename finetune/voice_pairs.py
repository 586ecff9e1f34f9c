"""Read preferences: rows of a prompt, the answer that was chosen and the one that was rejected."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from duet_moe.finetune.corpus import Document, is_held_out
from duet_moe.finetune.leaks import normalise
from duet_moe.finetune.tokenizer import SPECIAL_TOKENS
from duet_moe.finetune.voice_corpus import CorpusReport, VoiceCorpus, check_options, without_personal_data
from duet_moe.finetune.voice_records import CorpusError, Reading, Record, Skipped, read_records

MIN_PAIRS, MIN_HELDOUT = 16, 4
HELDOUT_SHARE = 0.15


@dataclass(frozen=True)
class Pair:
    """A preference."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class VoicePairs:
    """Pairs to learn from and pairs to measure on, no prompt on both sides, and the report on how they were found."""

    train: tuple[Pair, ...]
    heldout: tuple[Pair, ...]
    report: CorpusReport

    def chosen(self) -> VoiceCorpus:
        """Return the chosen answers as a corpus."""
        train, heldout = (
            tuple(Document(pair.prompt, pair.chosen) for pair in side) for side in (self.train, self.heldout)
        )
        return VoiceCorpus(train, heldout, self.report)

    def rejected(self) -> list[str]:
        """Return the rejected answers of the training pairs."""
        return [pair.rejected for pair in self.train]


def read_voice_pairs(pairs: object, heldout: object = None, *, personal_data: str = "mask") -> VoicePairs:
    """Read preferences, check them and set some apart to judge the training by.

    Args:
        pairs: path of a file (.csv, .jsonl, .json) or of a folder of them, a `datasets.Dataset`, or a sequence of
            dicts, with the strings `prompt`, `chosen` and `rejected`.
        heldout (*optional*): the same, for pairs that are not trained on; by default those of some of the prompts.
        personal_data: `mask`, `refuse` or `keep`, as in `read_voice_corpus`.

    Raises:
        CorpusError: nothing to read, a field that no row has, fewer than 16 pairs to learn from or 4 to measure on, or
            personal data under `refuse`.
        ValueError: another `personal_data`.
    """
    check_options(HELDOUT_SHARE, personal_data)
    masked: Counter[str] = Counter()
    sides = [(pairs, "pairs")] + ([] if heldout is None else [(heldout, "heldout")])
    readings = [_read(given, name, personal_data, masked) for given, name in sides]
    found = readings[0][0]
    if heldout is None:
        held = [pair for pair in found if is_held_out(pair.prompt, HELDOUT_SHARE)]
        usable = [pair for pair in found if not is_held_out(pair.prompt, HELDOUT_SHARE)]
        removed = 0
    else:
        held = readings[1][0]
        asked = {normalise(pair.prompt) for pair in held}
        usable = [pair for pair in found if normalise(pair.prompt) not in asked]
        removed = len(found) - len(usable)
    report = CorpusReport(
        files=sum(reading.files for _, reading in readings),
        records=len(usable),
        words=sum(len(pair.chosen.split()) for pair in usable),
        heldout_records=len(held),
        skipped=tuple(item for _, reading in readings for item in reading.skipped),
        masked=dict(sorted(masked.items())),
        overlap_removed=removed,
    )
    if len(usable) < MIN_PAIRS or len(held) < MIN_HELDOUT:
        there = f"{len(usable)} pairs to learn from and {len(held)} to measure on"
        needed = f"{MIN_PAIRS} and {MIN_HELDOUT} are needed, with different prompts"
        raise CorpusError("\n".join([f"too few pairs: {there}; {needed}", *report.lines()[3:]]))
    return VoicePairs(tuple(usable), tuple(held), report)


def _read(given: object, name: str, personal_data: str, masked: Counter[str]) -> tuple[list[Pair], Reading]:
    """Read each answer's column and join the rows that have both."""
    if isinstance(given, Iterable) and not isinstance(given, str | os.PathLike | Mapping):
        given = list(given)  # it is read twice
    chosen, rejected = (
        read_records(given, text_column=column, prompt_column="prompt", name=name) for column in ("chosen", "rejected")
    )
    others = {(record.file, record.line): record for record in _clean(rejected, personal_data, masked)}
    reasons = {(item.file, item.line): item.reason for item in (*rejected.skipped, *chosen.skipped)}
    pairs: dict[Pair, None] = {}
    for record in _clean(chosen, personal_data, masked):
        place = record.file, record.line
        other = others.get(place)
        if other is None:
            continue  # its reason is among those of the rejected answers
        if record.prompt is None:
            reasons[place] = "no prompt"
        elif normalise(record.text) == normalise(other.text):
            reasons[place] = "the chosen and the rejected answer are the same"
        elif special := [token for token in SPECIAL_TOKENS if token in record.prompt + record.text + other.text]:
            reasons[place] = f"the special token {special[0]} in a text"
        else:
            pairs[Pair(record.prompt, record.text, other.text)] = None
    chosen.skipped = [Skipped(*place, reason) for place, reason in sorted(reasons.items())]
    return list(pairs), chosen


def _clean(reading: Reading, personal_data: str, masked: Counter[str]) -> list[Record]:
    return without_personal_data(reading.records, personal_data, masked)
