"""The voice store: a folder of voices, each a folder under its name.

What is put there is made under a hidden name and renamed. A voice that is replaced is first moved aside, to
`.NAME.old-*`, and counts as the voice until another has its place: at any moment, also after a crash, the old or the
new one is there and whole. No locks: a rename to a name that is taken fails, and is tried again.
"""

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace as changed
from pathlib import Path

from duet_moe.finetune.voice_adapter import CONFIG, FILES, check_voice, read_config
from duet_moe.finetune.voice_archive import pack, unpack
from duet_moe.finetune.voice_card import VoiceCard
from duet_moe.finetune.voice_merge import merge_voice
from duet_moe.modeling.voice_files import check_name, store_root, voice_folder

_LEFT = re.compile(r"\..+\.(?:new|gone)-(\d{20})-[0-9a-f]{8}")
STALE = 24 * 3600  # seconds after which what an interrupted command left is removed


class VoiceStore:
    """The voices in `root`.

    Args:
        root: the store's folder; when not given `$DUET_MOE_VOICES`, else `duet-moe/voices` in the user's data folder.

    Example:

    ```python
    >>> from duet_moe.finetune.voices import VoiceStore
    >>> VoiceStore("an-empty-folder").names()
    []

    ```
    """

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = store_root(root)

    def names(self) -> list[str]:
        """Return the names of all voices, damaged ones too."""
        # a folder that is renamed while the store is listed may be seen in neither place: two looks have to agree
        seen = self._listed()
        while (again := self._listed()) != seen:
            seen = again
        return seen

    def _listed(self) -> list[str]:
        if not self.root.exists():
            return []
        entries = [path.name for path in self.root.iterdir() if path.is_dir()]
        aside = (name[1:].rpartition(".old-")[0] for name in entries if name.startswith(".") and ".old-" in name)
        return sorted(name for name in {*entries, *aside} if _is_name(name))

    def path(self, name: str) -> Path:
        """Return the folder of a voice.

        Raises:
            FileNotFoundError: if there is no such voice.
            ValueError: if `name` is not possible as a name, or the entry is a link to somewhere else.
        """
        self._own(name)
        for _ in range(2):  # another process may have finished a replacement in between
            if self._own(name).is_dir():
                return self._own(name)
            if aside := self._aside(name):
                return aside[-1]
        known = ", ".join(self.names()) or "none"
        raise FileNotFoundError(f"There is no voice {name!r} in {str(self.root)!r}; there are: {known}.")

    def card(self, name: str) -> VoiceCard:
        """Return the card of a voice; errors as `path` and `VoiceCard.load`."""
        return VoiceCard.load(self.path(name))

    def check(self, name: str) -> None:
        """See that a voice is whole and is the one that its card describes.

        Raises:
            OSError, ValueError: if it is not; the message says what is wrong.
        """
        card = check_voice(self.path(name))
        if card.name != name:
            raise ValueError(f"The folder {name!r} holds the voice {card.name!r}: rename the folder back.")

    def publish(self, name: str, built: Path, replace: bool = False) -> Path:
        """Put a copy of the voice in `built` into the store and return its folder; `built` stays as it is.

        Only the files of a voice are taken. An old voice of that name stays until the new one is complete, and is
        there and whole whenever this is interrupted.

        Raises:
            FileExistsError: if there is such a voice and `replace` is not set.
            OSError, ValueError: if the name is not possible or clashes, `built` is not a whole voice of that name, or
                it cannot be written; the store is as it was.
        """
        check_name(name)
        card = check_voice(Path(built))
        if card.name != name:
            raise ValueError(f"{str(built)!r} holds the voice {card.name!r}, not {name!r}: publish it under its name.")
        with self._staged(name, replace) as staged:
            for file in FILES:
                if Path(built, file).is_file():
                    shutil.copyfile(Path(built, file), staged / file)
        return self._own(name)

    def delete(self, name: str) -> None:
        """Remove a voice: it is gone at once, by a rename, whatever happens to the rest of the work."""
        folder = self.path(name)
        # An older one that waits aside would otherwise take its place.
        for path in [*(aside for aside in self._aside(name) if aside != folder), folder]:
            self._discard(path)

    def export(self, name: str, out: str | Path) -> Path:
        """Write a voice to the zip archive `out`, which holds no text of the corpus and no path of this machine.

        Raises:
            FileExistsError: if `out` exists.
            OSError, ValueError: if the voice is damaged or the archive cannot be written; then there is none.
        """
        self.check(name)
        folder, out = self.path(name), Path(out)
        if out.exists():
            raise FileExistsError(f"{str(out)!r} exists: remove it or choose another name.")
        settings = read_config(folder / CONFIG) | {"base_model_name_or_path": self.card(name).base["name"]}
        unfinished = out.parent / f".{out.name}.unfinished-{secrets.token_hex(4)}"
        try:
            pack(folder, unfinished, {CONFIG: json.dumps(settings, indent=2)})
            os.replace(unfinished, out)
        finally:
            unfinished.unlink(missing_ok=True)
        return out

    def import_(self, archive: str | Path, name: str | None = None, replace: bool = False) -> str:
        """Put the voice of an archive into the store, under `name` or its own name, which is returned.

        Nothing in the archive is trusted: only the files of a voice are read, with limits to their size.

        Raises:
            FileExistsError: if there is such a voice and `replace` is not set.
            OSError, ValueError: if the archive is not one voice, whole; the store is as it was.
        """
        if name is not None:
            check_name(name)
        self.root.mkdir(parents=True, exist_ok=True)
        unpacked = self._hidden("import", "new")
        unpacked.mkdir()
        try:
            unpack(Path(archive), unpacked)
            card = VoiceCard.load(unpacked)
            card = changed(card, name=name or card.name)
            card.save(unpacked)  # the page is made anew, so that it says what the card says
            self.publish(card.name, unpacked, replace)
        finally:
            shutil.rmtree(unpacked)
        return card.name

    def _own(self, name: str) -> Path:
        folder = self.root / check_name(name)
        if folder.is_symlink():
            raise ValueError(f"{str(folder)!r} is a link; a voice is a folder of its own: put the folder there.")
        return folder

    def _aside(self, name: str) -> list[Path]:
        return sorted(self.root.glob(f".{name}.old-*"))

    def _hidden(self, name: str, kind: str) -> Path:
        return self.root / f".{name}.{kind}-{time.time_ns():020d}-{secrets.token_hex(4)}"

    @contextmanager
    def _staged(self, name: str, replace: bool) -> Iterator[Path]:
        """Give a hidden folder to write a voice to; put it in its place if all went well, else remove it."""
        self._refuse_clash(name, replace)
        self.root.mkdir(parents=True, exist_ok=True)
        self._sweep()
        staged = self._hidden(name, "new")
        staged.mkdir()
        try:
            yield staged
            check_voice(staged)  # what was written, not what was meant
            _to_disk(staged)
            self._put(staged, name, replace)
        finally:
            if staged.exists():
                shutil.rmtree(staged)

    def _refuse_clash(self, name: str, replace: bool) -> None:
        for other in self.names():
            if other.casefold() == name.casefold() and other != name:
                raise ValueError(
                    f"{name!r} and {other!r}, which is there, are one name on some systems: choose another."
                )
            if other == name and not replace:
                raise FileExistsError(f"There is a voice {name!r}: replace it (--replace) or choose another name.")

    def _put(self, staged: Path, name: str, replace: bool) -> None:
        folder = self._own(name)
        while True:
            older = self._aside(name)  # not later: what another process moves aside by then may be all there is
            try:
                os.rename(staged, folder)
                break
            except OSError:
                if not folder.is_dir():
                    raise
            if not replace:
                raise FileExistsError(f"There is a voice {name!r} by now: replace it or choose another name.")
            try:
                os.rename(folder, self._hidden(name, "old"))
            except FileNotFoundError:
                continue  # another process was faster
        _sync(self.root)
        for path in older:
            self._discard(path)

    def _discard(self, folder: Path) -> None:
        """Remove a folder of the store, by a rename first, so that no half of it is ever taken for a voice."""
        gone = self._hidden("voice", "gone")
        try:
            os.rename(folder, gone)
        except FileNotFoundError:
            return  # another process did
        shutil.rmtree(gone)

    def _sweep(self) -> None:
        """Remove what interrupted commands left."""
        for path in self.root.iterdir():
            left = _LEFT.fullmatch(path.name)
            if left and time.time_ns() - int(left[1]) > STALE * 10**9:
                shutil.rmtree(path, ignore_errors=True)  # another process may do the same


def _is_name(name: str) -> bool:
    try:
        return bool(check_name(name))
    except ValueError:
        return False


def _to_disk(folder: Path) -> None:
    """Have the disk hold every file before a rename makes them count."""
    for path in [*folder.iterdir(), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["VoiceCard", "VoiceStore", "check_name", "merge_voice", "store_root", "voice_folder"]
