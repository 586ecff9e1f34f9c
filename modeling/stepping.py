"""Run `generate()` in a thread and hand out its tokens as they come; leaving the loop ends the generation."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM


@dataclass(frozen=True)
class Step:
    """One decoding step of a batch: chosen tokens (batch,) and, if asked for, what evidence needs.

    That is both heads' logits (batch, vocab) and the diversity head's share (batch,).
    """

    tokens: torch.Tensor
    coherence_logits: torch.Tensor | None
    diversity_logits: torch.Tensor | None
    diversity_share: torch.Tensor | None = None


class _Recorder(BaseStreamer):
    """Pairs the logits that `on_step` sees with the tokens that are chosen from them."""

    def __init__(self) -> None:
        self.steps: queue.SimpleQueue[Step | BaseException | None] = queue.SimpleQueue()
        self.seen: tuple[torch.Tensor | None, ...] = ()
        self.prompt_is_next = True

    def on_step(self, outputs: object) -> None:
        names = ("coherence_logits", "diversity_logits", "diversity_share")
        self.seen = tuple(None if (part := getattr(outputs, name)) is None else part[:, -1] for name in names)

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_is_next:
            self.prompt_is_next = False
        else:
            self.steps.put(Step(value.reshape(-1), *self.seen))

    def end(self) -> None:
        pass  # the thread reports the end, so that an error is reported too


class _StopWhenSet(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def decoding_steps(model: DuetMoeForCausalLM, **generate_kwargs: Any) -> Iterator[Step]:
    """Yield the steps of `model.generate(**generate_kwargs)`.

    Closing the iterator (leaving a `for` loop does it) ends the generation at its next token and waits for it. Errors
    inside `generate` are raised here.
    """
    recorder, stopped = _Recorder(), threading.Event()
    criteria = StoppingCriteriaList([_StopWhenSet(stopped)])

    def run() -> None:
        try:
            model.generate(streamer=recorder, on_step=recorder.on_step, stopping_criteria=criteria, **generate_kwargs)
            recorder.steps.put(None)
        except BaseException as error:
            recorder.steps.put(error)

    thread = threading.Thread(target=run, name="duet-generate", daemon=True)
    thread.start()
    try:
        while (step := recorder.steps.get()) is not None:
            if isinstance(step, BaseException):
                raise step
            yield step
    finally:
        stopped.set()
        thread.join()
