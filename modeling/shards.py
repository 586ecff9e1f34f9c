"""Checkpoints on disk, read and written tensor by tensor, so that none has to fit into memory.

A new checkpoint grows in `OUT.partial` and takes its name when all is there: what was interrupted does not load, and
the same call goes on where it stopped.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from duet_moe.modeling.weights import Index, TensorSource, Weight

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


class ShardSource:
    """The tensors of a folder's safetensors files; every file's header is read and checked when this is made.

    Raises:
        FileNotFoundError: if there are no weights, or a shard that the index names is missing.
        ValueError: on weights in a pickle, a damaged file, a tensor that is not where the index says, or a dtype
            other than float32, bfloat16 and float16.
    """

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: set[torch.dtype] = set()
        index = self._index(folder)
        for file in self._weight_files(folder, index):
            try:
                with safe_open(file, "pt") as shard:
                    for name in shard.keys():  # noqa: SIM118 (not a dict)
                        self._add(name, file, shard.get_slice(name))
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged or cut short ({error}): fetch it again.") from error
        lost = sorted(name for name, file in index.items() if self.files.get(name) != folder / file)
        if lost:
            raise ValueError(f"{folder / INDEX} says that {index[lost[0]]} holds {lost[0]}, but it does not.")

    @staticmethod
    def _index(folder: Path) -> dict[str, str]:
        path = folder / INDEX
        return read_json(path).get("weight_map", {}) if path.is_file() else {}

    @staticmethod
    def _weight_files(folder: Path, index: dict[str, str]) -> list[Path]:
        files = [folder / name for name in sorted(set(index.values()) or {"model.safetensors"})]
        missing = [file for file in files if not file.is_file()]
        if not missing:
            return files
        if index:
            raise FileNotFoundError(f"{missing[0]} is missing, though {INDEX} names it: fetch it again.")
        if pickles := [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]:
            raise ValueError(
                f"The weights in {folder} are a pickle ({pickles[0]}), which can run code when it is opened. Take the "
                "model's safetensors files, or save it again with a `save_pretrained` that you trust."
            )
        raise FileNotFoundError(f"{folder} has no weights: neither model.safetensors nor {INDEX}.")

    def _add(self, name: str, file: Path, header) -> None:  # type: ignore[no-untyped-def]
        if (stored := header.get_dtype()) not in DTYPES:
            raise ValueError(f"{name} in {file} is stored as {stored}: only {sorted(DTYPES)} can be read.")
        self.files[name], self.shapes[name] = file, tuple(header.get_shape())
        self.dtypes.add(DTYPES[stored])

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every tensor."""
        first, *others = self.dtypes
        for other in others:
            first = torch.promote_types(first, other)
        return first

    def read(self, name: str, part: Index = ()) -> torch.Tensor:
        # opened anew for each tensor: a mapping that stays open keeps every page that was read
        with safe_open(self.files[name], "pt") as shard:
            return shard.get_slice(name)[part] if part else shard.get_tensor(name)

    def fingerprint(self) -> list[list]:
        """Return names, sizes and times of the files: another source gives another list."""
        files = sorted(set(self.files.values()))
        return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


class ShardWriter:
    """Writes a checkpoint of one shard per layer; see the module.

    Args:
        out (`Path`): folder that the checkpoint will have; must not exist or be empty.
        weights (`Sequence[Weight]`): all tensors, those of a layer beside each other.
        identity (`dict`): everything that decides the result, as plain data; a folder that an interrupted call left
            behind is used only if its identity is the same.

    Raises:
        FileExistsError: if `out` holds something.
        ValueError: if `out.partial` belongs to another conversion.
        OSError: if the disk is too small.
    """

    def __init__(self, out: Path, weights: Sequence[Weight], dtype: torch.dtype, identity: dict) -> None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(f"{out} exists already: name another folder, or remove it first.")
        self.out, self.dtype = out, dtype
        self.partial = out.with_name(out.name + ".partial")
        layers = [list(group) for _, group in groupby(weights, key=lambda weight: _layer_of(weight.name))]
        self.shards = {f"model-{i:05}-of-{len(layers):05}.safetensors": layer for i, layer in enumerate(layers, 1)}
        self.journal = self.partial / "conversion.json"
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        self.finished = self._resume()
        self._check_space()

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self._size(layer) for layer in self.shards.values())

    def write(self, source: TensorSource, seed: int, finish: Callable[[Path], None], show: bool = True) -> None:
        """Write what is not there yet; `finish` adds the other files to the folder before it takes its name."""
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._write_journal()
            with Progress(*columns, console=Console(stderr=True), disable=not show) as progress:
                task = progress.add_task(self.out.name, total=self.bytes)
                for name, layer in self.shards.items():
                    if name not in self.finished:
                        self._write_shard(name, layer, source, seed)
                    progress.advance(task, self._size(layer))
            self._write_index()
            finish(self.partial)
        except (OSError, SafetensorError) as error:
            for file in self.partial.glob("*.tmp"):
                file.unlink()
            raise OSError(
                f"{self.out} could not be written: {error}. What is finished waits in {self.partial}: mend the cause "
                "and give the same command again, or remove that folder."
            ) from error
        self.journal.unlink()
        os.replace(self.partial, self.out)

    def _write_shard(self, name: str, layer: list[Weight], source: TensorSource, seed: int) -> None:
        path, temporary = self.partial / name, self.partial / f"{name}.tmp"
        tensors = {weight.name: weight.make(source, self.dtype, seed) for weight in layer}
        save_file(tensors, temporary, metadata={"format": "pt"})
        self.finished[name] = _sha256(temporary)
        os.replace(temporary, path)
        self._write_journal()

    def _write_journal(self) -> None:
        journal = self.partial / "conversion.json.tmp"
        journal.write_text(json.dumps({"identity": self.identity, "finished": self.finished}), encoding="utf-8")
        os.replace(journal, self.journal)

    def _write_index(self) -> None:
        weight_map = {weight.name: file for file, layer in self.shards.items() for weight in layer}
        index = {"metadata": {"total_size": self.bytes}, "weight_map": weight_map}
        (self.partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _resume(self) -> dict[str, str]:
        """Return the finished shards that an earlier call left whole."""
        if not self.partial.exists():
            return {}
        left = read_json(self.journal) if self.journal.is_file() else {}
        if left.get("identity") != self.identity:
            raise ValueError(
                f"{self.partial} is left from another source, from other settings or from another program: repeat "
                "that command, remove the folder, or name another OUT."
            )
        files = {name: self.partial / name for name in left["finished"]}
        return {
            name: digest
            for name, digest in left["finished"].items()
            if files[name].is_file() and _sha256(files[name]) == digest
        }

    def _check_space(self) -> None:
        needed = sum(self._size(layer) for name, layer in self.shards.items() if name not in self.finished)
        parent = next(folder for folder in self.partial.absolute().parents if folder.is_dir())
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise OSError(f"{self.out} needs {needed:,} bytes and {parent} has {free:,} free: make room.")

    def _size(self, layer: list[Weight]) -> int:
        return sum(torch.Size(weight.shape).numel() for weight in layer) * self.dtype.itemsize


def read_json(path: Path) -> dict:
    """Return what a JSON file holds.

    Raises:
        ValueError: naming the file, if it is not JSON with an object in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where an object is needed: fetch it again.")
    return content


def _layer_of(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[1] == "layers" else parts[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
