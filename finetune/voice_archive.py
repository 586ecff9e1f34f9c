"""Voices as zip archives: a flat list of known files, of known largest sizes, and nothing else."""

import shutil
import stat
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from duet_moe.finetune.voice_adapter import FILES

CHUNK = 1 << 20
PLAIN_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def pack(folder: Path, out: Path, instead: Mapping[str, str]) -> None:
    """Write the files of the voice in `folder` to the archive `out`.

    Args:
        instead: texts that replace files of that name.
    """
    with zipfile.ZipFile(out, "x", zipfile.ZIP_DEFLATED) as archive:
        for name in FILES:
            if name in instead:
                archive.writestr(name, instead[name])
            elif (folder / name).is_file():
                archive.write(folder / name, name)


def unpack(archive: Path, folder: Path) -> None:
    """Read the files of a voice from an archive into the empty folder `folder`.

    Raises:
        FileNotFoundError: if there is no such archive.
        ValueError: if it is no zip archive, is cut off, or holds anything but the files of one voice.
    """
    if not archive.is_file():
        raise FileNotFoundError(f"There is no archive {str(archive)!r}.")
    if archive.stat().st_size > sum(FILES.values()):
        raise ValueError(f"{str(archive)!r} has {archive.stat().st_size:,} bytes: no voice is that large.")
    try:
        with zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
            for member in members:
                _refuse(archive, member)
            if len({member.filename for member in members}) < len(members):
                raise ValueError(f"{str(archive)!r} holds a file twice: no voice does.")
            for member in members:
                with opened.open(member) as source, (folder / member.filename).open("xb") as target:
                    shutil.copyfileobj(source, target, CHUNK)  # never reads more than the size that was checked
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"{str(archive)!r} is no whole zip archive ({error}): fetch it again.") from error


def _refuse(archive: Path, member: zipfile.ZipInfo) -> None:
    # `orig_filename` is what the archive says; zipfile cuts `filename` at a zero byte and turns separators.
    if member.orig_filename not in FILES or member.filename not in FILES:
        raise ValueError(
            f"{str(archive)!r} holds {member.orig_filename!r:.120}, which is no file of a voice: refused. A voice "
            f"consists of {', '.join(FILES)}."
        )
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
        raise ValueError(f"{str(archive)!r}: {member.filename} is a link or a device: refused.")
    if member.file_size > FILES[member.filename]:
        raise ValueError(
            f"{str(archive)!r}: {member.filename} has {member.file_size:,} bytes; a voice's has at most "
            f"{FILES[member.filename]:,}."
        )
    if member.flag_bits & 0x1 or member.compress_type not in PLAIN_METHODS:
        raise ValueError(
            f"{str(archive)!r}: {member.filename} is encrypted or packed in an unusual way: zip it plainly."
        )
