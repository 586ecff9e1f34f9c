"""Where a benchmark leaves its figures: `results/NAME.json`, with the hardware and the versions."""

import json
import os
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, figures: dict, libraries: tuple[str, ...] = ()) -> None:
    """Write `figures` to `results/NAME.json`, with the environment and the versions of `libraries`."""
    from duet_moe.evaluation.card import environment  # loads torch, which children of a benchmark may not want yet

    found = {library: version(library) for library in libraries}
    unfinished = RESULTS / f".{name}.unfinished"
    unfinished.write_text(json.dumps({"environment": environment() | found} | figures, indent=1) + "\n")
    os.replace(unfinished, RESULTS / f"{name}.json")
