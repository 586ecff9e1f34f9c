"""Checkpoints that come with the package."""

from pathlib import Path


def bundled(name: str = "duet-mini") -> Path:
    """Return the folder of a bundled checkpoint.

    Raises:
        FileNotFoundError: if no checkpoint of that name is bundled; the message lists those that are.
    """
    root = Path(__file__).resolve().parent
    folder = root / name
    if not (folder / "config.json").is_file():
        names = sorted(path.parent.name for path in root.glob("*/config.json"))
        raise FileNotFoundError(f"No bundled checkpoint is called {name!r}; bundled are: {names or 'none'}.")
    return folder
