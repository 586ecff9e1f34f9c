"""One panel: title, text coloured by how far the heads disagree, status line, copy button. The Space builds it twice.

A panel knows nothing of models: it shows `Text` records. All model text is escaped here and nowhere else, and text is
never Gradio's template language either (braces and dollar signs become entities).
"""

from __future__ import annotations

import html
from dataclasses import replace
from typing import TYPE_CHECKING

import gradio as gr
from gradio.components import Component

from duet_moe.space.events import QUIET

if TYPE_CHECKING:
    from duet_moe.modeling.evidence import Text, TokenEvidence

# Jensen-Shannon divergence of the two heads in bits: lower bound and words of each level.
LEVELS: tuple[tuple[float, str], ...] = (
    (0.0, "heads agree"),
    (0.05, "differ a little"),
    (0.2, "differ"),
    (0.5, "differ strongly"),
)
DIFFER_FROM = 2  # the first level that the status line counts as a difference

ABOUT_MODE = {
    "factual": "The likeliest words, from the coherence head",
    "creative": "Bolder words, mostly from the diversity head",
    "hybrid": "Both heads, half and half",
    "auto": "The mode that the prompt asks for",
}
FINISH = {
    "running": "Writing",
    "end": "Finished",
    "length": "Reached the length limit",
    "stopped": "Stopped",
}
TEMPLATE_SIGNS = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;"})

# navigator.clipboard exists only on https and localhost; the text area covers plain http in a local network.
COPY = """async () => {
  const text = document.querySelector("#%s .text")?.textContent ?? "";
  if (!text) return "Nothing yet";
  if (navigator.clipboard && window.isSecureContext) {
    await navigator.clipboard.writeText(text);
  } else {
    const area = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  return "Copied";
}"""
COPY_LABEL_BACK = "() => new Promise((done) => setTimeout(() => done('Copy'), 1500))"


class Panel:
    """A panel inside the current `gr.Blocks`; `outputs` take what `show`, `wait` and `empty` return.

    Args:
        side (`str`): `"left"` or `"right"`; names the elements.
        mode (`str`): the mode shown until the first text arrives.
    """

    def __init__(self, side: str, mode: str):
        with gr.Column(elem_classes=["voice", side], elem_id=f"panel-{side}", min_width=320):
            with gr.Row(elem_classes="voice-head"):
                self.title = gr.HTML(elem_id=f"title-{side}")
                copy = gr.Button("Copy", size="sm", min_width=76, scale=0, elem_id=f"copy-{side}")
            self.body = gr.HTML(elem_id=f"text-{side}")
            self.status = gr.HTML(elem_id=f"status-{side}")
        self.shown = gr.State(None)
        self.title.value, self.body.value, self.status.value, _ = self.empty(mode)
        self.outputs: list[Component] = [self.title, self.body, self.status, self.shown]
        copied = copy.click(None, outputs=copy, js=COPY % f"panel-{side}", **QUIET)
        copied.then(None, outputs=copy, js=COPY_LABEL_BACK, **QUIET)

    def empty(self, mode: str) -> tuple[str, str, str, None]:
        """Return the values of a panel that has written nothing yet."""
        return render_title(mode), '<p class="hint">Nothing written yet.</p>', render_status("Ready"), None

    def wait(self, mode: str) -> tuple[str, str, str, None]:
        """Return the values between Write and the first token."""
        return render_title(mode), '<p class="text running"></p>', render_status("Reading the prompt"), None

    def show(self, text: Text) -> tuple[str, str, str, Text]:
        """Return the values that show a text, finished or still running."""
        return render_title(text.mode), render_text(text), render_text_status(text), text

    def stopped(self, text: Text | None, mode: str) -> tuple[str, str, str, Text | None]:
        """Return the values after Stop: what was written so far, marked as stopped where it was not finished."""
        if text is None:
            return self.empty(mode)
        return self.show(replace(text, finish_reason="stopped") if text.finish_reason == "running" else text)


def disagreement_level(bits: float) -> int:
    """Return the index in `LEVELS` of a divergence of 0 to 1 bits."""
    return max(level for level, (bound, _) in enumerate(LEVELS) if bits >= bound or level == 0)


def render_title(mode: str) -> str:
    """Return the panel's heading for a mode."""
    return f"<h2>{_escape(mode.capitalize())}</h2><p>{_escape(ABOUT_MODE.get(mode, 'A mode of this checkpoint'))}</p>"


def render_text(text: Text) -> str:
    """Return the text as HTML with one mark per token; what the evidence does not spell stays plain."""
    running = " running" if text.finish_reason == "running" else ""
    spelled = "".join(evidence.text for evidence in text.evidence)
    if text.text.startswith(spelled):
        words = "".join(map(_render_token, text.evidence)) + _escape(text.text.removeprefix(spelled))
    else:
        words = _escape(text.text)
    return f'<p class="text{running}">{words}</p>'


def render_text_status(text: Text) -> str:
    """Return the status line of a text, with the disagreement in words for those who see no colours."""
    differ = sum(disagreement_level(evidence.disagreement) >= DIFFER_FROM for evidence in text.evidence)
    return render_status(
        FINISH.get(text.finish_reason, text.finish_reason),
        f"{text.tokens_per_second:.0f} tokens/s",
        f"first token {text.time_to_first_token:.2f} s",
        f"seed {text.seed}",
        f"heads differ on {differ} of {len(text.evidence)} tokens",
        *text.notes,
    )


def render_status(state: str, *figures: str) -> str:
    """Return a status line: the state first, then each figure."""
    rest = "".join(f"<span>{_escape(figure)}</span>" for figure in figures)
    return f'<p class="status"><strong>{_escape(state)}</strong>{rest}</p>'


def render_legend() -> str:
    """Return the legend in words, each sample marked as in the text."""
    samples = "".join(f'<span class="w d{level}">{words}</span>' for level, (_, words) in enumerate(LEVELS))
    return f'<p class="legend"><span>How far the heads disagree on a word:</span>{samples}</p>'


def _render_token(evidence: TokenEvidence) -> str:
    word = evidence.text.lstrip()
    space = evidence.text[: len(evidence.text) - len(word)]
    if not word:
        return _escape(space)
    level = disagreement_level(evidence.disagreement)
    by = {"both": "both heads alike"}.get(evidence.decided_by, f"mostly the {evidence.decided_by} head")
    tip = f"{LEVELS[level][1]} ({evidence.disagreement:.2f} bit); chosen by {by}"
    return f'{_escape(space)}<span class="w d{level}" title="{_escape(tip)}">{_escape(word)}</span>'


def _escape(text: str) -> str:
    return html.escape(text).translate(TEMPLATE_SIGNS)
