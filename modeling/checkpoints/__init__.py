"""Where models are: checkpoints that come with the package, folders, the Hub."""

import re
from pathlib import Path

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


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


def locate(name: str | Path) -> str:
    """Return what `from_pretrained` takes for a bundled name, a folder, or a Hub id.

    Raises:
        FileNotFoundError: if there is no such folder, it holds no model, or no checkpoint of that name is bundled.
    """
    source = str(name)
    if Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            raise FileNotFoundError(f"No model in the folder {source!r}: it has no config.json.")
        return source
    if "/" not in source:
        return str(bundled(source))
    if not HUB_ID.fullmatch(source):
        raise FileNotFoundError(f"There is no folder {source!r}.")
    return source
