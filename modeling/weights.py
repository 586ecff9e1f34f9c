"""Recipes of tensors: how one tensor of a new checkpoint is put together from tensors of another.

A recipe can be checked against the source's sizes before anything is read, and is made one at a time, so that neither
the source nor the result has to fit into memory.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

Index = tuple[int | slice, ...]


class TensorSource(Protocol):
    """Tensors by name, read one at a time: a folder of safetensors, or a model in memory."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, part: Index = ()) -> torch.Tensor: ...


@dataclass(frozen=True)
class Piece:
    """One source tensor's place in a new tensor.

    Args:
        source (`str`): name in the source.
        into (`tuple`): where in the new tensor it goes; all of it when empty.
        part (`tuple`): which part of the source tensor is taken; all of it when empty.
        share (`float`, *optional*): pieces with a share are added up, each times its own; others are copied.
        scale (`str`, *optional*): a source vector that multiplies the columns.
    """

    source: str
    into: Index = ()
    part: Index = ()
    share: float | None = None
    scale: str | None = None


@dataclass(frozen=True)
class Weight:
    """A tensor of the new checkpoint: put together from `pieces`; without any, drawn (`std`) or constant (`fill`)."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()
    fill: float = 0.0
    std: float = 0.0

    def sources(self) -> set[str]:
        """Return the names of all source tensors that it needs."""
        return {name for piece in self.pieces for name in (piece.source, piece.scale) if name}

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """See that the source has every piece in the right size.

        Raises:
            ValueError: naming the tensor, its shape and the one that is needed.
        """
        target = torch.empty(self.shape, device="meta")
        for piece in self.pieces:
            if missing := {name for name in (piece.source, piece.scale) if name} - shapes.keys():
                raise ValueError(f"The source has no tensor {sorted(missing)[0]!r}, which {self.name} is made from.")
            found = tuple(torch.empty(shapes[piece.source], device="meta")[piece.part].shape)
            needed = tuple(target[piece.into].shape)
            if found != needed:
                raise ValueError(
                    f"{piece.source} has shape {shapes[piece.source]}, but the configuration asks for {needed}: "
                    "config.json and the weights do not belong together."
                )

    def make(self, source: TensorSource, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
        """Return the tensor, on the CPU; a drawn one depends on `seed` and its name alone."""
        if not self.pieces:
            if not self.std:
                return torch.full(self.shape, self.fill, dtype=dtype)
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {self.name}".encode()))
            return torch.empty(self.shape).normal_(0.0, self.std, generator=generator).to(dtype)
        adds_up = any(piece.share is not None for piece in self.pieces)
        made = torch.zeros(self.shape, dtype=torch.float32) if adds_up else torch.empty(self.shape, dtype=dtype)
        for piece in self.pieces:
            value = source.read(piece.source, piece.part)
            if piece.scale:
                value = value.float() * source.read(piece.scale).float()
            if piece.share is None:
                made[piece.into].copy_(value)
            else:
                made[piece.into] += piece.share * value.float()
        return made.to(dtype)


class ModelSource:
    """The tensors of a model in memory.

    Raises:
        ValueError: if some of them are not there (offloaded, or on the meta device).
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.tensors = model.state_dict()
        absent = sorted(name for name, tensor in self.tensors.items() if tensor.is_meta)
        if absent:
            raise ValueError(f"{absent[0]} is not in memory (offloaded?): load the model without a device map.")
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str, part: Index = ()) -> torch.Tensor:
        return self.tensors[name][part]
