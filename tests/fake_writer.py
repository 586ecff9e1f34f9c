"""A writer without a model: the interface that the Space uses, with texts, speed and faults that a test chooses."""

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

from duet_moe.configuration.modes import BUILT_IN_MODES, Mode
from duet_moe.modeling.evidence import Text, TokenEvidence
from duet_moe.modeling.task_router import Route

FACTUAL = "The capital of Portugal is Lisbon, and it lies on the Tagus."
CREATIVE = "Seven hills and a slow gold river:\nask the trams, and they will hum you Lisbon all the way down."


class FakeWriter:
    """Streams fixed texts word by word; counts the steps it took and notices when its stream is closed."""

    def __init__(self, texts: Mapping[str, str] | None = None, delay: float = 0.0, notes: tuple[str, ...] = ()):
        self.texts = {"factual": FACTUAL, "creative": CREATIVE, "hybrid": f"{FACTUAL} Perhaps."} | dict(texts or {})
        self.delay, self.notes = delay, notes
        self.modes = dict(BUILT_IN_MODES)
        self.mode_names = [*self.modes, "auto"]
        self.name = "fake"
        self.asked: list[dict] = []
        self.steps = 0
        self.closed = threading.Event()
        self.fault: Exception | None = None

    def stream_compare(
        self,
        prompt: str,
        modes: tuple[str | Mode, ...] = ("factual", "creative"),
        max_new_tokens: int = 160,
        seed: int | None = None,
    ) -> Iterator[dict[str, Text]]:
        self.asked.append({"prompt": prompt, "modes": modes, "max_new_tokens": max_new_tokens, "seed": seed})
        self.steps = 0
        self.closed.clear()
        names = [mode if isinstance(mode, str) else mode.name for mode in modes]
        keys = [name if names.index(name) == i else f"{name} (2)" for i, name in enumerate(names)]
        full = {
            key: self._text(name, prompt, seed or 7, max_new_tokens) for key, name in zip(keys, names, strict=True)
        }
        try:
            for count in range(1, max(len(text.tokens) for text in full.values()) + 1):
                time.sleep(self.delay)
                if self.fault:
                    raise self.fault
                self.steps += 1
                yield {name: _first(text, count) for name, text in full.items()}
        finally:
            self.closed.set()

    def route(self, prompt: str) -> Route:
        return Route("factual" if prompt.endswith("?") else "creative", 0.5)

    def _text(self, mode: str, prompt: str, seed: int, limit: int) -> Text:
        words = self.texts[mode].split(" ")
        pieces = [word if index == 0 else f" {word}" for index, word in enumerate(words)]
        reason = "end" if len(pieces) <= limit else "length"
        pieces = pieces[:limit]
        evidence = tuple(
            TokenEvidence(piece, -0.2, -0.9, (index * 0.13) % 1.0, ("coherence", "both", "diversity")[index % 3])
            for index, piece in enumerate(pieces)
        )
        return Text(
            text="".join(pieces),
            mode=mode,
            prompt=prompt,
            seed=seed,
            tokens=tuple(range(len(pieces))),
            evidence=evidence,
            time_to_first_token=0.12,
            tokens_per_second=38.4,
            finish_reason=reason,
            notes=self.notes,
        )


def _first(text: Text, count: int) -> Text:
    if count >= len(text.tokens):
        return text
    evidence = text.evidence[:count]
    return replace(
        text,
        text="".join(item.text for item in evidence),
        tokens=text.tokens[:count],
        evidence=evidence,
        finish_reason="running",
    )
