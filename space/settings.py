"""What a visitor may set, and how it becomes two modes for the writer.

Fields left empty keep the mode's own value. Sampling fields touch only modes that sample, and the head mix only modes
that listen to the diversity head, so the factual panel stays factual whatever is set.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from duet_moe.configuration.modes import Mode
from duet_moe.space.events import QUIET

RANGES: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, 512),
    "temperature": (0.05, 2),
    "top_p": (0.05, 1),
    "min_p": (0, 1),
    "head_mix": (0, 1),
    "num_experts_per_tok": (2, 8),
    "seed": (0, 2**32 - 1),
}
# Field -> (label, what an empty field means, what a value does).
OPTIONAL: dict[str, tuple[str, str, str]] = {
    "temperature": ("Temperature", "mode default", "0.05 to 2, up is bolder"),
    "top_p": ("Top-p", "mode default", "0.05 to 1, down is safer"),
    "min_p": ("Min-p", "mode default", "0 to 1, up is safer"),
    "head_mix": ("Head mix", "mode default", "0 coherence, 1 diversity"),
    "num_experts_per_tok": ("Experts per token", "model default", "2 to 8, more is slower"),
    "seed": ("Seed", "random", "same seed, same texts"),
}
HINT = (
    "Empty fields keep each mode's own value. Factual always takes the likeliest word, so temperature, top-p, min-p "
    "and head mix change only the other modes."
)
WHOLE_NUMBERS = ("max_new_tokens", "num_experts_per_tok", "seed")


@dataclass(frozen=True)
class Settings:
    """Everything but the prompt; `None` means the mode's own value, or a random seed.

    Raises:
        ValueError: on a value out of range, naming it and what is allowed.

    Example:
        >>> from duet_moe.configuration.modes import BUILT_IN_MODES
        >>> factual, creative = Settings(temperature=0.5).modes(BUILT_IN_MODES)
        >>> factual.temperature, creative.temperature
        (1.0, 0.5)
    """

    left_mode: str = "factual"
    right_mode: str = "creative"
    max_new_tokens: int = 160
    temperature: float | None = None
    top_p: float | None = None
    min_p: float | None = None
    head_mix: float | None = None
    num_experts_per_tok: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is None and name != "max_new_tokens":
                continue
            kind, words = (int, "a whole number") if name in WHOLE_NUMBERS else (int | float, "a number")
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
                label = OPTIONAL[name][0] if name in OPTIONAL else "Max new tokens"
                raise ValueError(f"{label} {value!r} cannot be used: give {words} from {low} to {high}.")

    def modes(self, known: Mapping[str, Mode]) -> tuple[Mode, Mode]:
        """Return the left and the right mode with these settings applied.

        Raises:
            ValueError: for an unknown mode, or the same mode twice.
        """
        for name in (self.left_mode, self.right_mode):
            if name not in known:
                raise ValueError(f"Mode {name!r} is not known: choose one of {', '.join(known)}.")
        if self.left_mode == self.right_mode:
            raise ValueError(f"Both panels are set to {self.left_mode}: choose two different modes in Settings.")
        return self._apply(known[self.left_mode]), self._apply(known[self.right_mode])

    def _apply(self, mode: Mode) -> Mode:
        names = ["num_experts_per_tok"]
        names += ["temperature", "top_p", "min_p"] if mode.do_sample else []
        names += ["head_mix"] if mode.head_mix > 0 else []
        return mode.changed(**{name: value for name in names if (value := getattr(self, name)) is not None})


class SettingsForm:
    """The folded form; `read` turns the values of `inputs` into `Settings`."""

    def __init__(self, modes: Iterable[str]):
        default, names = Settings(), [(name.capitalize(), name) for name in modes]
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            with gr.Row():
                self.left_mode = gr.Dropdown(names, value=default.left_mode, label="Left panel", elem_id="left-mode")
                self.right_mode = gr.Dropdown(
                    names, value=default.right_mode, label="Right panel", elem_id="right-mode"
                )
                longest = RANGES["max_new_tokens"][1]
                length = gr.Slider(16, longest, default.max_new_tokens, step=1, label="Max new tokens")
            with gr.Row():
                # gr.Number cannot be empty (its page code turns None into 0), so numbers are typed as text.
                optional = [
                    gr.Textbox(label=label, placeholder=empty, info=info, max_lines=1, min_width=150, elem_id=field)
                    for field, (label, empty, info) in OPTIONAL.items()
                ]
            with gr.Row(elem_id="settings-end"):
                gr.HTML(f"<p class='hint'>{HINT}</p>")
                reset = gr.Button("Reset settings", size="sm", min_width=150, scale=0, elem_id="reset")
        self.inputs = [self.left_mode, self.right_mode, length, *optional]
        reset.click(
            lambda: [default.left_mode, default.right_mode, default.max_new_tokens, *[""] * len(optional)],
            outputs=self.inputs,
            **QUIET,
        )

    @staticmethod
    def read(left_mode: str, right_mode: str, max_new_tokens: float, *optional: str) -> Settings:
        """Return the settings of the form's values.

        Raises:
            ValueError: for a field that is not a number or out of range.
        """
        typed: dict[str, Any] = {
            field: parse_number(field, text) for field, text in zip(OPTIONAL, optional, strict=True)
        }
        return Settings(left_mode, right_mode, int(max_new_tokens), **typed)


def parse_number(field: str, text: str | None) -> float | int | None:
    """Return the number typed into a field, whole where the field is, or `None` where it is empty.

    Raises:
        ValueError: if it is no number.
    """
    typed = (text or "").strip().replace(",", ".")
    if not typed:
        return None
    kind, words = (int, "a whole number") if field in WHOLE_NUMBERS else (float, "a number")
    try:
        return kind(typed)
    except ValueError:
        raise ValueError(
            f"{OPTIONAL[field][0]} {text!r} is not {words}: change it in Settings or leave it empty."
        ) from None
