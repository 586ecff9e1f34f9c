"""A process that talks to the stand-in Hub: `HF_HUB_OFFLINE` is read at import, so this one's own can't go online."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Runs one piece of code a line; retries that huggingface_hub waits seconds for come at once.
WORKER = """
import json, sys, time
answers, sys.stdout = sys.stdout, sys.stderr
time.sleep = lambda seconds: None
for line in sys.stdin:
    names = {}
    try:
        exec(json.loads(line), names)
        answer = {"value": names.get("value")}
    except Exception as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), file=answers, flush=True)
"""
BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "duet_moe" or name.startswith("duet_moe."):
            raise ImportError("duet_moe is not installed here")
sys.meta_path.insert(0, Blocked())
"""


class RemoteError(Exception):
    """What went wrong in the other process: `kind` is the name of the exception's class."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Online:
    """A Python process that has `url` for its Hub and `home` for its caches."""

    def __init__(self, url: str, home: Path, with_package: bool = True) -> None:
        home.mkdir(parents=True, exist_ok=True)
        env = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name}
        env |= {
            "HF_ENDPOINT": url, "HF_TOKEN": "any", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "no_proxy": "*",
            "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        }  # fmt: skip
        isolated = [] if with_package else ["-I"]
        code = WORKER if with_package else WORKER.replace("\nanswers", BLOCK + "answers", 1)
        self.log = (home / "stderr.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, *isolated, "-c", code], cwd=home, env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip

    def run(self, code: str) -> object:
        """Run `code` in the process and return what it leaves in `value`, plain data.

        Raises:
            RemoteError: what the code raised.
        """
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"the process ended: {self.log.read()[-2000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise RemoteError(answer["error"], answer["message"])
        return answer["value"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()
        self.log.close()
