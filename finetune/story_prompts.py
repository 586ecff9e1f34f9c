"""Make up the prompt that a plain story could have answered.

A prompt names what the story keeps coming back to ("a clever dog named Max", "a dog and an owl"), its title where it
has one, or asks for three of its words; so the model learns to write about what it was asked for. Choices come from a
hash of the story: the same text always gets the same prompts.
"""

import random
import re
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from duet_moe.finetune.leaks import MADE_UP

if TYPE_CHECKING:
    from duet_moe.finetune.corpus import Document

MAX_CHARACTERS = 2400  # longer texts are no answer to "a short story"

_DATA = yaml.safe_load((Path(__file__).parent / "recipes" / "story_prompts.yaml").read_text(encoding="utf-8"))
_ABOUT, _TITLE, _WORDS = (tuple(_DATA[kind]) for kind in ("about", "title", "words"))
_VAGUE, _COMMON = (frozenset(_DATA[kind].split()) for kind in ("vague", "common"))
_PHRASE = re.compile(
    r"\b(an?) ((?:[a-z]+ ){0,2}?)([a-z]{3,})"
    r"(?=[.,!]| (?:named|called|who|that|and|but|in|on|with|at|under|near|lived|went|was)\b)"
)
_NAMED = re.compile(r"\b(an? (?:[a-z]+ ){0,2}[a-z]{3,}) (?:named|called) ([A-Z][a-z]+)")
_WORD = re.compile(r"[a-z]{3,}")


def story_prompts(document: "Document", count: int) -> list["Document"]:
    """Return up to `count` copies of a story, each with another made-up prompt; none when nothing fits."""
    text = document.response
    if len(text) > MAX_CHARACTERS:
        return []
    rng = random.Random(zlib.crc32(text.encode()))
    options = _about(text) + _title(document.meta.get("title"))
    rng.shuffle(options)
    # Word lists teach less about requests than subjects do: the last choice, but for one story in five.
    options = _words(text, rng) + options if rng.random() < 0.2 else options + _words(text, rng)
    meta = {**document.meta, MADE_UP: "story"}
    prompts = [_casual(rng.choice(templates).format(subject), rng) for templates, subject in options[:count]]
    return [replace(document, prompt=prompt, meta=meta) for prompt in dict.fromkeys(prompts)]


def _about(text: str) -> list[tuple[tuple[str, ...], str]]:
    opening = " ".join(re.split(r"(?<=[.!?])\s+", text)[:5])
    counts = Counter(_WORD.findall(text.lower()))
    phrases = {
        noun: f"{article} {adjectives}{noun}"
        for article, adjectives, noun in reversed(_PHRASE.findall(opening))
        if noun not in _VAGUE and counts[noun] + counts[f"{noun}s"] >= 2
    }
    subjects = [phrases[noun] for noun in sorted(phrases, key=lambda noun: -counts[noun])][:2]
    named = [f"{phrase} named {name}" for phrase, name in _NAMED.findall(opening)[:1]]
    pair = [" and ".join(subjects)] if len(subjects) == 2 else []
    return [(_ABOUT, subject) for subject in subjects + named + pair]


def _title(title: str | None) -> list[tuple[tuple[str, ...], str]]:
    return [(_TITLE, title)] if title else []


def _words(text: str, rng: random.Random) -> list[tuple[tuple[str, ...], str]]:
    # Lower-case words only: names would make the prompt a riddle.
    counts = Counter(word for word in re.findall(r"\b[a-z]{4,}\b", text) if word not in _COMMON)
    frequent = [word for word, number in counts.most_common(6) if number >= 2]
    if len(frequent) < 3:
        return []
    first, second, third = rng.sample(frequent, 3)
    return [(_WORDS, f"{first}, {second} and {third}")]


def _casual(prompt: str, rng: random.Random) -> str:
    """Write some prompts as people type them: no full stop, small first letter."""
    if rng.random() < 0.25:
        prompt = prompt.rstrip(".")
    return prompt[0].lower() + prompt[1:] if rng.random() < 0.15 else prompt
