"""How long one answer takes and how much memory the process holds meanwhile."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux


@dataclass(frozen=True)
class Timing:
    """What one answer took.

    Args:
        tokens (`int`): that were written, the end token included.
        seconds_to_first_token (`float`): from the request on.
        tokens_per_second (`float`): of the decoding after the first token; 0 for a single token.
        peak_memory_bytes (`int`, *optional*): most memory held meanwhile; None where it is another machine's.
    """

    tokens: int
    seconds_to_first_token: float
    tokens_per_second: float
    peak_memory_bytes: int | None = None

    @classmethod
    def from_stamps(cls, started: float, stamps: list[float], tokens: int, peak_bytes: int | None = None) -> "Timing":
        """Return the timing of `tokens` that came at the times `stamps`, in seconds of the clock that gave `started`.

        Raises:
            ValueError: if nothing came.
        """
        if not stamps:
            raise ValueError("The answer is empty, so there is nothing to time: ask for another prompt.")
        seconds = stamps[-1] - stamps[0]
        return cls(tokens, stamps[0] - started, (tokens - 1) / seconds if seconds > 0 else 0.0, peak_bytes)


def reset_peak_memory() -> None:
    """Start a new peak, where the system can: on a GPU and on Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        CLEAR.write_text("5")


def peak_memory_bytes() -> int:
    """Return the peak since `reset_peak_memory`: of torch on a GPU, of the whole process elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if CLEAR.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # since the process began
    return peak if sys.platform == "darwin" else peak * 1024
