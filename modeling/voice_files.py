"""Where voices are: the rule for the store's place, for names, and for what `voice=` means."""

import hashlib
import os
import re
from pathlib import Path

import torch

from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
# What our commands and PEFT give a meaning of their own, and what Windows keeps for devices.
RESERVED = {"base", "none", "default", "lora", "con", "prn", "aux", "nul"} | {
    f"{device}{number}" for device in ("com", "lpt") for number in range(10)
}


def store_root(root: str | Path | None = None) -> Path:
    """Return the folder of the voice store: `root`, else `$DUET_MOE_VOICES`, else one in the user's data folder."""
    if root is not None or (root := os.environ.get("DUET_MOE_VOICES")):
        return Path(root).expanduser()
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "duet-moe" / "voices"


def check_name(name: str) -> str:
    """Return the name of a voice if it is one.

    Raises:
        ValueError: if it could leave the store, differs between file systems, is too long, or is reserved.
    """
    if not NAME.fullmatch(name):
        shown = name if len(name) <= 80 else name[:80] + "..."
        raise ValueError(
            f"{shown!r} is no name for a voice: use 1 to 64 letters a-z, digits, - or _, a letter or digit first."
        )
    if name.casefold() in RESERVED:
        raise ValueError(f"{name!r} is reserved: choose another name for the voice, such as 'my-{name.casefold()}'.")
    return name


def voice_folder(name: str | Path, store: str | Path | None = None) -> Path:
    """Return the folder of a voice: `name` itself if it is a folder, else that of the voice in the store.

    Raises:
        FileNotFoundError: if there is no such voice.
        ValueError: if `name` is neither a folder nor possible as a name.
    """
    if Path(name).is_dir():
        return Path(name)
    root = store_root(store)
    folder = root / check_name(str(name))
    if not folder.is_dir():
        # A process that was killed while it replaced a voice has left the old one here.
        aside = sorted(root.glob(f".{name}.old-*"))
        if not aside:
            raise FileNotFoundError(
                f"There is no voice {str(name)!r} in {str(root)!r}: `duet voice list` shows those that are."
            )
        return aside[-1]
    return folder


class WrongBaseError(ValueError):
    """A voice was trained for another base; the message has both hashes."""


def base_hashes(model: DuetMoeForCausalLM) -> dict[str, str | None]:
    """Return the sha256 of what quantised forms share (`shared`) and of attention and experts (`trunk`)."""
    digests = {"shared": hashlib.sha256(), "trunk": hashlib.sha256()}
    quantised = getattr(model.config, "quantization_config", None) is not None
    for name, tensor in sorted(model.state_dict().items()):
        part = "trunk" if ".self_attn." in name or "experts." in name else "shared"
        if part == "shared" or not quantised:
            digests[part].update(f"{name} {tuple(tensor.shape)}".encode())
            digests[part].update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy())
    return {"shared": digests["shared"].hexdigest(), "trunk": None if quantised else digests["trunk"].hexdigest()}
