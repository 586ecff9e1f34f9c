"""A chat endpoint that answers as a test says: with a text, a status, a wait, or the request's own words."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeEndpoint(ThreadingHTTPServer):
    """Answers requests in the order of `script`, then echoes.

    Args:
        script: for each request a status to fail with, or seconds to wait before echoing.
        text: what to answer in the place of the prompt and the seed; `None` is a refusal's null.
    """

    daemon_threads = True

    def __init__(self, *script: int | float, text: str | None = "echo") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.text = list(script), text
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: FakeEndpoint

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(request | {"path": self.path})
        self.server.keys.append(self.headers.get("Authorization"))
        step = self.server.script.pop(0) if self.server.script else 0.0
        if isinstance(step, int):
            return self._send(step, json.dumps({"error": {"message": f"planned {step}"}}))
        time.sleep(step)
        prompt, seed = request["messages"][0]["content"], request["seed"]
        text = f"{prompt} #{seed}" if self.server.text == "echo" else self.server.text
        if request.get("stream"):
            return self._stream(text or "")
        self._send(200, json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}))

    def _stream(self, text: str) -> None:
        pieces = [{"choices": [{"index": 0, "delta": {"content": word}}]} for word in text.split()]
        usage = {"completion_tokens": 3 * len(pieces), "prompt_tokens": 1, "total_tokens": 0}
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for piece in [*pieces, {"choices": [], "usage": usage}]:
            self.wfile.write(f"data: {json.dumps(piece)}\n\n".encode())
            self.wfile.flush()
            time.sleep(0.02)
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, status: int, body: str) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())
        except BrokenPipeError:  # the client has stopped waiting, as a test wants it to
            pass

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@contextmanager
def fake_endpoint(*script: int | float, text: str | None = "echo") -> Iterator[FakeEndpoint]:
    """Serve on a free port until the block ends."""
    server = FakeEndpoint(*script, text=text)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
