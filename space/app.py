"""The Space as a program: `duet space`, `python -m duet_moe.space.app`, or `app.py` of a Hugging Face Space.

The page needs nothing from outside: system fonts, no analytics, one bounded queue, one generation at a time.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

import gradio as gr

from duet_moe.space.compare_tab import CompareTab
from duet_moe.space.theme import STYLE, duet_theme

if TYPE_CHECKING:
    from duet_moe.modeling.writer import Writer

INTRO = """<h1>Duet-MoE</h1>
<p>One small model with two voices: a factual head and a creative head answer the same prompt, side by side.</p>
<p>A small demonstration model: it is often wrong, so check every fact. Nothing that you type is stored.</p>"""


def build_app(writer: Writer) -> gr.Blocks:
    """Return the app for a writer, with its queue; pass `launch_options()` to `launch`."""
    with gr.Blocks(title="Duet-MoE", analytics_enabled=False) as app:
        gr.HTML(INTRO, elem_id="intro")
        with gr.Column(elem_id="compare"):
            CompareTab(writer)
    return app.queue(max_size=32, default_concurrency_limit=1)


def launch_options() -> dict[str, Any]:
    """Return what `launch` needs for the look and the limits of the app."""
    return {
        "theme": duet_theme(),
        "css_paths": [STYLE],
        "ssr_mode": False,
        "share": False,
        "footer_links": ["api", "settings"],
        "state_session_capacity": 256,
    }


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `duet space`."""
    parser = argparse.ArgumentParser(prog="duet space", description="Serve the Space: two voices, side by side.")
    parser.add_argument("--checkpoint", default="duet-mini", help="bundled name, folder or hub id (duet-mini)")
    parser.add_argument("--host", help="address to listen on (default: GRADIO_SERVER_NAME, else 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port (default: GRADIO_SERVER_PORT, else the first free from 7860)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Serve the Space until interrupted; return the exit status (1 if it could not start)."""
    args = make_parser().parse_args(argv)
    from duet_moe.modeling.writer import Writer

    try:
        writer = Writer.load(args.checkpoint)
    except (FileNotFoundError, ValueError) as error:
        print(f"duet space: {error}", file=sys.stderr)
        return 1
    app = build_app(writer)
    # Left to itself Gradio takes the variable as the first of a hundred ports, and the next one if it is in use.
    chosen = args.port if args.port is not None else os.environ.get("GRADIO_SERVER_PORT")
    port = None if chosen is None else int(chosen)
    try:
        _, url, _ = app.launch(
            server_name=args.host, server_port=port, prevent_thread_lock=True, quiet=True, **launch_options()
        )
    except OSError as error:
        print(f"duet space: {_why_not_started(port, args.host, error)}", file=sys.stderr)
        return 1
    print(f"Duet-MoE with {writer.name} is ready at {url} (Ctrl+C stops it)", flush=True)
    app.block_thread()
    return 0


def _why_not_started(port: int | None, host: str | None, error: OSError) -> str:
    if "empty port" not in str(error):
        return f"the server could not start: {error}"
    which = "every port from 7860 on is" if port is None else f"port {port} is"
    wrong = f", or {host} is no address of this machine" if host else ""
    advice = "choose another with --port or GRADIO_SERVER_PORT, or stop the program that holds it"
    return f"{which} in use{wrong}: {advice}."


if __name__ == "__main__":
    sys.exit(main())
