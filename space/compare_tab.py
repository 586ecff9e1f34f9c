"""The Compare tab: one prompt, two panels that stream in step, Stop, examples and settings.

The tab asks a `Writer` for texts and shows them; it holds no model code. One run at a time uses the model
(concurrency id `model`). Gradio closes the stream on Stop and when a visitor leaves, which ends generation at the next
token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components import Component

from duet_moe.space.compare_api import add_compare_endpoint
from duet_moe.space.events import QUIET
from duet_moe.space.examples import EXAMPLES
from duet_moe.space.panel import Panel, render_legend, render_status
from duet_moe.space.runs import compare_steps, paced, readable_errors, show_notes
from duet_moe.space.settings import Settings, SettingsForm

if TYPE_CHECKING:
    from duet_moe.modeling.evidence import Text
    from duet_moe.modeling.writer import Writer

# Runs in the page at once, before the queue; brings the panels into view where a small screen hides them.
BUSY = """() => {
  const panels = document.querySelector("#panels");
  if (panels.getBoundingClientRect().top > window.innerHeight * 0.7) {
    panels.scrollIntoView({ behavior: "smooth" });
  }
  const usable = (interactive) => ({ __type__: "update", interactive });
  return [usable(false), usable(true), %s, %s];
}""" % ((json.dumps(render_status("Waiting for the model")),) * 2)


class CompareTab:
    """The tab inside the current `gr.Blocks`, wired to a writer."""

    def __init__(self, writer: Writer):
        self.writer = writer
        add_compare_endpoint(writer)
        self._ask_row()
        examples = [[example.prompt] for example in EXAMPLES]
        gr.Examples(examples, self.prompt, label="Try one of these", elem_id="examples", api_visibility="private")
        self.form = SettingsForm(writer.mode_names)
        with gr.Row(elem_id="key"):
            gr.HTML(render_legend())
            gr.Checkbox(
                True,
                label="Colour words by disagreement",
                interactive=True,
                container=False,
                scale=0,
                elem_id="colour-words",
            )
        with gr.Row(elem_id="panels", equal_height=True):
            self.left = Panel("left", Settings().left_mode)
            self.right = Panel("right", Settings().right_mode)
        self._connect()

    def _ask_row(self) -> None:
        with gr.Row(elem_id="ask"):
            self.prompt = gr.Textbox(
                label="Prompt",
                placeholder="Ask a question, or ask for a tagline, a story, a dialogue",
                lines=1,  # with one line Enter submits and Shift+Enter starts a new line
                max_lines=8,
                autofocus=True,
                elem_id="prompt",
            )
            with gr.Row(elem_id="actions"):
                self.write = gr.Button("Write", variant="primary", elem_id="write", min_width=90)
                self.stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=90, interactive=False)

    def _connect(self) -> None:
        buttons: list[Component] = [self.write, self.stop]
        panels = self.left.outputs + self.right.outputs
        triggers = [self.write.click, self.prompt.submit]
        gr.on(triggers, None, outputs=[*buttons, self.left.status, self.right.status], js=BUSY, **QUIET)
        writing = gr.on(
            triggers,
            self.run,
            [self.prompt, *self.form.inputs],
            panels,
            concurrency_limit=1,
            concurrency_id="model",
            show_progress="minimal",
            show_progress_on=[self.left.body, self.right.body],
            trigger_mode="once",
            api_visibility="private",
        )
        shown = [self.left.shown, self.right.shown, self.form.left_mode, self.form.right_mode]
        self.stop.click(self.end, shown, buttons + panels, cancels=[writing], **QUIET)
        # Two listeners, for `then` of Gradio 6.31 does not run after a failure.
        writing.success(idle, outputs=buttons, **QUIET)
        writing.failure(self.end, shown, buttons + panels, **QUIET)
        for panel, mode in ((self.left, self.form.left_mode), (self.right, self.form.right_mode)):
            mode.change(panel.empty, mode, panel.outputs, **QUIET)

    def run(self, prompt: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Yield what both panels show, from the first token to the last."""
        with readable_errors():
            settings = self.form.read(*values)
            yield (*self.left.wait(settings.left_mode), *self.right.wait(settings.right_mode))
            noted = False
            with closing(compare_steps(self.writer, prompt, settings)) as steps:
                for left, right in paced(steps):
                    if not noted:
                        show_notes(left, right)
                        noted = True
                    yield (*self.left.show(left), *self.right.show(right))

    def end(self, left: Text | None, right: Text | None, left_mode: str, right_mode: str) -> tuple[Any, ...]:
        """Return the state after Stop or a failure: what was written stays, and Write is ready again."""
        return (*idle(), *self.left.stopped(left, left_mode), *self.right.stopped(right, right_mode))


def idle() -> tuple[Any, Any]:
    """Return the buttons' state when nothing runs: Write is usable, Stop is not."""
    return gr.update(interactive=True), gr.update(interactive=False)
