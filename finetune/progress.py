"""Progress with time left: a live bar on a terminal, a line every half minute elsewhere."""

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINE_EVERY = 30.0  # seconds between lines when the output is not a terminal


class Progress:
    """Follows a run of `total` steps that begins at `step`."""

    def __init__(self, total: int, step: int = 0, show: bool = True) -> None:
        self.total, self.first, self.show = total, step, show
        self.started = self.last_line = time.monotonic()
        self.bar = None
        if show and sys.stdout.isatty():
            columns = (
                BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
                TextColumn("left"), TimeRemainingColumn(),
            )  # fmt: skip
            self.bar = RichProgress(*columns)
            self.task = self.bar.add_task("", total=total, completed=step)

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, step: int, row: dict[str, float]) -> None:
        """Show where the run is; `row` has what was measured in this step."""
        if not self.show:
            return
        text = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if name.endswith("loss"))
        if self.bar:
            self.bar.update(self.task, completed=step, description=text)
        elif time.monotonic() - self.last_line > LINE_EVERY or step == self.total:
            self.last_line = time.monotonic()
            left = (self.last_line - self.started) / max(1, step - self.first) * (self.total - step)
            print(f"step {step}/{self.total}  {text}  {left / 60:.1f} min left", flush=True)

    def say(self, text: str) -> None:
        """Print a line of its own."""
        if self.show:
            (self.bar.console.print if self.bar else print)(text)
            sys.stdout.flush()
