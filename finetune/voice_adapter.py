"""Is the adapter of a voice whole, and does it touch the diversity head alone?

Everything is read without PEFT and without trust: the files may come from anywhere.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from duet_moe.finetune.voice_card import VoiceCard
from duet_moe.modeling.persistence import check_safetensors
from duet_moe.modeling.voice_files import KEY

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# All that a voice may consist of, with the most bytes of each; an adapter of rank 64 for a 128k vocabulary has 34 MB.
FILES = {
    ADAPTER: 512 << 20,
    CONFIG: 1 << 20,
    "voice.json": 1 << 20,
    "README.md": 1 << 20,
    "style.safetensors": 64 << 20,
    "style.json": 1 << 20,
    "recipe.yaml": 1 << 20,
}
_LINEAR = "gate_proj|up_proj|down_proj|unembed"
_TARGET_PATTERN = re.compile(rf"diversity_head\\\.\((?:{_LINEAR})(?:\|(?:{_LINEAR}))*\)")
_TARGET = re.compile(rf"diversity_head\.(?:{_LINEAR})")
# Settings of PEFT that a voice may set; any other may only have a value that does nothing.
_SETTINGS = {
    "base_model_name_or_path", "bias", "inference_mode", "init_lora_weights", "lora_alpha", "lora_dropout",
    "peft_type", "peft_version", "r", "revision", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
_IDLE = {"megatron_core": "megatron.core", "qalora_group_size": 16}


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_voice(folder: Path) -> VoiceCard:
    """See that the voice in `folder` is whole, and return its card.

    Raises:
        FileNotFoundError: if a file is missing.
        OSError, ValueError: if one is a link, too large, cut off, not what the card says, or reaches beyond the
            diversity head; the message says which and why.
    """
    for name, largest in FILES.items():
        path = folder / name
        if path.is_symlink():
            raise ValueError(f"{path} is a link: a voice has its files in its own folder.")
        if path.exists() and (not path.is_file() or path.stat().st_size > largest):
            raise ValueError(f"{path} is no file of at most {largest:,} bytes.")
    card = VoiceCard.load(folder)
    for name in (ADAPTER, CONFIG):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: train or import the voice again.")
    check_safetensors(folder / ADAPTER)
    if (folder / "style.safetensors").exists():
        check_safetensors(folder / "style.safetensors")
    if (digest := sha256_of(folder / ADAPTER)) != card.adapter_sha256:
        raise ValueError(
            f"{folder / ADAPTER} has sha256 {digest}, but its card says {card.adapter_sha256}: it was changed or "
            "damaged. Train or import the voice again."
        )
    _check_tensors(folder / ADAPTER, _rank(folder / CONFIG))
    return card


def read_config(path: Path) -> dict:
    """Return the settings in `adapter_config.json`; ValueError if it is damaged."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): train or import the voice again.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged: it holds {type(settings).__name__}, not settings.")
    return settings


def _rank(path: Path) -> int:
    settings = read_config(path)
    for name, value in settings.items():
        if value and name not in _SETTINGS and value != _IDLE.get(name):
            raise ValueError(f"{path} sets {name}={value!r:.80}, which a voice cannot have: train it without.")
    for name, only in (("peft_type", "LORA"), ("task_type", "CAUSAL_LM"), ("bias", "none")):
        if settings.get(name) != only:
            raise ValueError(f"{path} has {name}={settings.get(name)!r:.80}; a voice has {only!r}.")
    targets, rank = settings.get("target_modules"), settings.get("r")
    if isinstance(targets, list):
        ours = bool(targets) and all(isinstance(name, str) and _TARGET.fullmatch(name) for name in targets)
    else:
        ours = isinstance(targets, str) and _TARGET_PATTERN.fullmatch(targets) is not None
    if not ours:
        raise ValueError(
            f"{path} has target_modules={targets!r:.120}; a voice adapts linear layers of the diversity head only, "
            rf"as 'diversity_head\.({_LINEAR})'."
        )
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{path} has r={rank!r:.80}; a rank is a whole number from 1 on.")
    return rank


def _check_tensors(path: Path, rank: int) -> None:
    parts: dict[str, set[str]] = {}
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                match = KEY.fullmatch(key)
                if match is None:
                    raise ValueError(f"{path} holds {key!r:.120}, which is not LoRA on the diversity head: refused.")
                _check_tensor(path, key, file.get_tensor(key), rank)
                parts.setdefault(match[1], set()).add(match[2])
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): train or import the voice again.") from error
    _check_pairs(path, parts)


def _check_tensor(path: Path, key: str, tensor: torch.Tensor, rank: int) -> None:
    if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
        raise ValueError(f"{path}: {key} holds values that are not finite numbers: train the voice again.")
    if "lora_magnitude_vector" in key:
        fits = tensor.ndim == 1
    else:
        fits = tensor.ndim == 2 and tensor.shape[0 if "lora_A" in key else 1] == rank
    if not fits:
        raise ValueError(f"{path}: {key} has shape {tuple(tensor.shape)}, which does not fit rank {rank}.")


def _check_pairs(path: Path, parts: Mapping[str, set[str]]) -> None:
    if not parts:
        raise ValueError(f"{path} holds no tensors: train or import the voice again.")
    for linear, found in parts.items():
        if lost := {"lora_A.weight", "lora_B.weight"} - found:
            raise ValueError(f"{path} lacks {min(lost)} of diversity_head.{linear}: train or import the voice again.")
