"""The `/compare` endpoint for programs: plain texts and figures instead of HTML, streamed like the page."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import gradio as gr

from duet_moe.space.runs import compare_steps, paced, readable_errors
from duet_moe.space.settings import Settings

if TYPE_CHECKING:
    from duet_moe.modeling.evidence import Text
    from duet_moe.modeling.writer import Writer

FIGURES = ("mode", "tokens_per_second", "time_to_first_token", "finish_reason", "notes")


def add_compare_endpoint(writer: Writer) -> None:
    """Add `/compare` to the current `gr.Blocks`; only the prompt is required."""

    def compare(
        prompt: str,
        left_mode: str = "factual",
        right_mode: str = "creative",
        max_new_tokens: int = 160,
        temperature: float | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        head_mix: float | None = None,
        num_experts_per_tok: int | None = None,
        seed: int | None = None,
    ) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Write two texts for one prompt, streaming both in step.

        Args:
            prompt: a question, or what to write
            left_mode: factual, creative, hybrid, or auto where the model has a task router
            right_mode: as left_mode, but not the left mode
            max_new_tokens: length limit of each text, 1 to 512
            temperature: 0.05 to 2 for modes that sample; null keeps the mode's own
            top_p: 0.05 to 1 for modes that sample; null keeps the mode's own
            min_p: 0 to 1 for modes that sample; null keeps the mode's own
            head_mix: 0 (coherence head) to 1 (diversity head), never for factual; null keeps the mode's own
            num_experts_per_tok: 2 to 8; null keeps the model's own
            seed: same seed, same texts; null draws one and reports it

        Returns:
            The left text, the right text, and figures: seed, and per side mode, tokens, tokens per second, seconds to
            the first token, mean disagreement of the heads in bits, finish reason and notes.
        """
        with readable_errors():
            settings = Settings(
                left_mode, right_mode, max_new_tokens, temperature, top_p, min_p, head_mix, num_experts_per_tok, seed
            )
            with closing(compare_steps(writer, prompt, settings)) as steps:
                for left, right in paced(steps):
                    figures = {"seed": left.seed, "left": describe(left), "right": describe(right)}
                    yield left.text, right.text, figures

    # gr.api makes one output per member of a tuple annotation, and knows no Iterator[tuple].
    outputs = tuple[str, str, dict[str, Any]]
    signature = inspect.signature(compare, eval_str=True).replace(return_annotation=outputs)
    setattr(compare, "__signature__", signature)  # noqa: B010 (functions have no such attribute for mypy)
    gr.api(compare, api_name="compare", concurrency_limit=1, concurrency_id="model")


def describe(text: Text) -> dict[str, Any]:
    """Return the figures of a text as plain data."""
    disagreements = [evidence.disagreement for evidence in text.evidence]
    return {name: getattr(text, name) for name in FIGURES} | {
        "tokens": len(text.tokens),
        "mean_disagreement": sum(disagreements) / max(1, len(disagreements)),
    }
