"""A contestant without a model, whose answers depend on prompt and seed alone; run as a program, a slow run of it.

python contestant_script.py TASK OUT SECONDS
"""

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from duet_moe.evaluation.suite import run
from duet_moe.evaluation.timing import Timing

WORDS = "the a fox moon ran sang over under hill café door and cat".split()


@dataclass
class Scripted:
    """Draws words by the seed; `seconds` are waited before each call, `asked` are the seeds that it was given."""

    name: str = "scripted"
    seconds: float = 0.0
    asked: list[int] = field(default_factory=list)
    stop_after: int | None = None

    def write(self, prompts: Sequence[str], seeds: Sequence[int], max_new_tokens: int) -> list[str]:
        time.sleep(self.seconds)
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise RuntimeError("the endpoint is gone")
        self.asked += seeds
        pairs = zip(prompts, seeds, strict=True)
        return [" ".join(random.Random(f"{p} {s}").choices(WORDS, k=max_new_tokens)) for p, s in pairs]


class Measured(Scripted):
    """Can also be timed, and likes the longest option."""

    def time(self, prompt: str, seed: int, max_new_tokens: int) -> Timing:
        return Timing(max_new_tokens, 0.25, float(100 + seed), 2**20)

    def weights(self) -> dict[str, float]:
        return {"active_parameters": 5.0, "weight_bytes": 20.0}

    def log_likelihood(self, prompt: str, answer: str) -> float:
        return -100.0 if answer != "right" else -1.0


if __name__ == "__main__":
    run([Scripted(seconds=float(sys.argv[3]))], sys.argv[1], sys.argv[2], show=False)
