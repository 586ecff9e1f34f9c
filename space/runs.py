"""Runs of the writer as the tabs need them: checked input, steps at the page's pace, errors that people can read."""

from __future__ import annotations

import html
import logging
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, TypeVar, cast

import gradio as gr

from duet_moe.configuration.modes import AUTO, NotInThisVersionError
from duet_moe.space.settings import Settings

if TYPE_CHECKING:
    from duet_moe.modeling.evidence import Text
    from duet_moe.modeling.writer import Writer

MAX_PROMPT_CHARACTERS = 20_000
FRAME = 0.05  # seconds between two updates of the page; a reader gains nothing from more

Step = TypeVar("Step")
logger = logging.getLogger(__name__)


def compare_steps(writer: Writer, prompt: str, settings: Settings) -> Generator[tuple[Text, Text], None, None]:
    """Yield the left and the right text so far, until both are finished; closing it ends generation.

    Raises:
        ValueError: for a prompt that is empty or too long, for settings that do not fit, and for the mode "auto" where
            the model has no task router.
    """
    if not prompt.strip():
        raise ValueError("The prompt is empty: type a question or a task, or pick an example, then press Write.")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise ValueError(
            f"The prompt has {len(prompt):,} characters: shorten it to {MAX_PROMPT_CHARACTERS:,} or fewer."
        )
    known = dict(writer.modes)
    if AUTO in (settings.left_mode, settings.right_mode):
        known[AUTO] = known[writer.route(prompt).mode]
    left, right = settings.modes(known)
    steps = writer.stream_compare(
        prompt, modes=(left, right), max_new_tokens=settings.max_new_tokens, seed=settings.seed
    )
    with closing(cast("Generator[dict[str, Text], None, None]", steps)):  # what iterators of a Writer are
        for texts in steps:
            left_text, right_text = texts.values()
            yield left_text, right_text


def paced(steps: Iterator[Step], seconds: float = FRAME) -> Iterator[Step]:
    """Pass on at most one step per so many seconds, and always the last."""
    due, held = 0.0, []
    for step in steps:
        held = [step]
        if time.monotonic() >= due:
            due = time.monotonic() + seconds
            yield held.pop()
    yield from held


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn errors into toasts that say what to do next, without a trace."""
    try:
        yield
    except gr.Error:
        raise
    except (ValueError, NotInThisVersionError) as error:
        raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None
    except Exception as error:
        logger.exception("a run failed")
        message = "The model stopped unexpectedly. Press Write to try again; if it fails again, restart the Space."
        raise gr.Error(message, print_exception=False) from error


def show_notes(*texts: Text) -> None:
    """Show each note of the texts once, as a toast."""
    for note in dict.fromkeys(note for text in texts for note in text.notes):
        gr.Warning(html.escape(note, quote=False), title="Notice")
