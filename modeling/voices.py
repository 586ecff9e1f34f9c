"""Voices: low-rank adapters of the diversity head, many at a time, a voice per row of a batch.

The matrices of all loaded voices are stacked layer by layer, with a voice of zeros at the end; a batch picks one entry
per row and applies them in two batched products, so the number of voices costs neither loops nor launches. Index -1 is
that last entry: the base model, to whose output exactly 0 is added. LoRA (Hu et al. 2021, arXiv 2106.09685, section
4.1), rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) and DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5) all become
`scale * Wx + up(down(x))`.
"""

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

VOICE_FILES = "duet_moe.modeling.voice_files"  # in the package only: a saved checkpoint loads without it


@dataclass(frozen=True)
class LowRank:
    """What a voice makes of a linear layer W: `scale * Wx + up(down(x))`.

    Args:
        down (`torch.Tensor` of shape (rank, in)).
        up (`torch.Tensor` of shape (out, rank)): with the adapter's scaling in it.
        scale (`torch.Tensor` of shape (out,), *optional*): DoRA's; 1 when not given.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: torch.Tensor | None = None

    @classmethod
    def from_lora(
        cls,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scaling: float,
        magnitude: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
    ) -> "LowRank":
        """Fold an adapter's scaling, and with `magnitude` (out,) DoRA's norm of `weight` (out, in), into float32."""
        down, up = lora_a.detach().float(), scaling * lora_b.detach().float()
        if magnitude is None or weight is None:
            return cls(down, up)
        tuned = weight.detach().to(down.device, torch.float32) + up @ down
        scale = magnitude.detach().float() / tuned.norm(dim=1)
        return cls(down, scale[:, None] * up, scale)


@dataclass(frozen=True)
class VoiceRows:
    """The voices of one batch, by layer: `down`, `up` and `scale` of one voice for all rows, or stacked row by row."""

    layers: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]

    def adapt(self, layer: str, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """Return what the voices make of a layer's `outputs` (batch, seq, out) for its `inputs` (batch, seq, in)."""
        if layer not in self.layers:
            return outputs
        down, up, scale = self.layers[layer]
        if scale is not None:
            outputs = outputs * scale
        return outputs + torch.matmul(torch.matmul(inputs, down), up)


class Voices:
    """The voices that a model has loaded: no part of its weights, and not saved with it.

    Args:
        names (`tuple[str, ...]`): their order; `pick` takes indices into it.
    """

    def __init__(self) -> None:
        self._voices: dict[str, Mapping[str, LowRank]] = {}
        self._stacked: tuple[tuple, dict] | None = None
        self._picked: tuple[tuple, VoiceRows | None] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._voices)

    def add(self, name: str, layers: Mapping[str, LowRank]) -> None:
        """Add a voice, or put it in the place of the one of that name."""
        self._voices = self._voices | {name: dict(layers)}  # new, so that a batch that is being written keeps its own

    def remove(self, name: str) -> None:
        """Remove a voice; those after it move up by one index.

        Raises:
            ValueError: if no such voice is loaded.
        """
        self.index(name)
        self._voices = {other: layers for other, layers in self._voices.items() if other != name}

    def index(self, name: str | None) -> int:
        """Return a name's index, -1 for `None`.

        Raises:
            ValueError: if no such voice is loaded, naming those that are.
        """
        if name is None:
            return -1
        if name not in self._voices:
            raise ValueError(f"No voice {name!r} is loaded: {self._known()}")
        return self.names.index(name)

    def pick(self, voice: torch.Tensor, hidden_states: torch.Tensor) -> VoiceRows | None:
        """Return the voices of a batch, on the device and in the dtype of `hidden_states` (batch, seq, hidden).

        Args:
            voice (`torch.LongTensor` of shape (batch,)): an index for each row, -1 for the base.

        Returns:
            `None` where every row is the base. The last answer is kept: decoding asks for the same at every step.

        Raises:
            ValueError: on another shape or dtype, or an index that no voice has.
        """
        if voice.shape != hidden_states.shape[:1] or voice.is_floating_point() or voice.dtype == torch.bool:
            raise ValueError(
                f"voice has shape {tuple(voice.shape)} and dtype {voice.dtype}: give whole numbers of shape "
                f"({len(hidden_states)},), one index into voice_names for each row, -1 for the base."
            )
        voices, place = self._voices, (hidden_states.device, hidden_states.dtype)
        if torch.compiler.is_compiling():  # the values of `voice` are not known: one graph for all
            stacked = self._stack(voices, *place)
            return VoiceRows({layer: _entries(parts, voice) for layer, parts in stacked.items()})
        rows = voice.tolist()
        for row in rows:
            if not -1 <= row < len(voices):
                raise ValueError(f"voice={row} is no index of a voice: {self._known()} -1 is the base.")
        picked = self._picked
        if picked is None or picked[0][0] is not voices or picked[0][1:] != (rows, place):
            picked = (voices, rows, place), self._rows(voices, rows, place)
            self._picked = picked
        return picked[1]

    def _rows(
        self, voices: dict[str, Mapping[str, LowRank]], rows: list[int], place: tuple[torch.device, torch.dtype]
    ) -> VoiceRows | None:
        if all(row == -1 for row in rows):
            return None
        # one voice for all rows needs no copies of it, and its products are plain ones
        entry = rows[0] if len(set(rows)) == 1 else torch.tensor(rows, device=place[0])
        stacked = self._stack(voices, *place)
        return VoiceRows({layer: _entries(parts, entry) for layer, parts in stacked.items()})

    def _stack(self, voices: dict[str, Mapping[str, LowRank]], device: torch.device, dtype: torch.dtype) -> dict:
        stacked = self._stacked
        if stacked is None or stacked[0][0] is not voices or stacked[0][1:] != (device, dtype):
            found = {
                layer: _stack_layer(layer, voices) for layer in dict.fromkeys(n for v in voices.values() for n in v)
            }
            ready = {
                layer: tuple(None if part is None else part.to(device, dtype) for part in parts)
                for layer, parts in found.items()
            }
            stacked = (voices, device, dtype), ready
            self._stacked = stacked
        return stacked[1]

    def _known(self) -> str:
        names = ", ".join(map(repr, self.names))
        return f"loaded are {names}." if names else "none is loaded, load one with model.load_voice(folder)."


def _stack_layer(
    layer: str, voices: Mapping[str, Mapping[str, LowRank]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Stack a layer of all voices, and zeros for the base: (voices + 1, in, rank), (voices + 1, rank, out), scale."""
    found = [voice.get(layer) for voice in voices.values()]
    example = next(part for part in found if part is not None)
    rank = max(len(part.down) for part in found if part is not None)
    nothing = LowRank(torch.zeros_like(example.down), torch.zeros_like(example.up))
    parts = [part or nothing for part in (*found, None)]
    down = torch.stack([F.pad(part.down.T, (0, rank - len(part.down))) for part in parts])
    up = torch.stack([F.pad(part.up.T, (0, 0, 0, rank - len(part.down))) for part in parts])
    if all(part.scale is None for part in parts):
        return down, up, None
    one = torch.ones_like(example.up[:, 0])
    scale = torch.stack([one if part.scale is None else part.scale for part in parts])  # (voices + 1, out)
    return down, up, scale[:, None]


def _entries(
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], entry: int | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    down, up, scale = parts
    return down[entry], up[entry], None if scale is None else scale[entry]


class DuetMoeVoicesMixin:
    """What a model with `voices` adds for its users."""

    voices: Voices

    @property
    def voice_names(self) -> tuple[str, ...]:
        """The loaded voices; `forward` takes indices into them."""
        return self.voices.names

    def load_voice(self, folder: str | os.PathLike, name: str | None = None) -> str:
        """Load a voice for the diversity head, in the place of one of the same name, and return its name.

        Voices are no weights of the model: they are not saved with it, and factual mode never uses them. DoRA's norms
        are those of the head as it is now: load such a voice again after training the head.

        Args:
            folder: a PEFT adapter of the diversity head, with `voice.json` where it comes from a voice store.
            name: what to call it; the name in voice.json, else the folder's, when not given.

        Raises:
            OSError, ValueError: if it is damaged, or not a voice for this base, as in
                `duet_moe.modeling.voice_files.load_voice`.
            ImportError: where only a saved checkpoint's own code is at hand, without the package duet-moe.
        """
        try:
            voice_files = importlib.import_module(VOICE_FILES)
        except ModuleNotFoundError as error:
            raise ImportError("load_voice needs the whole package: pip install duet-moe") from error
        return voice_files.load_voice(self, folder, name)

    def unload_voice(self, name: str) -> None:
        """Forget a voice; those after it move up in `voice_names`, so do it between calls of `generate`.

        Raises:
            ValueError: if no such voice is loaded, naming those that are.
        """
        self.voices.remove(name)
