"""Voice folders: where they are, what may be in them, and how a model loads one.

A voice folder holds a PEFT adapter of the diversity head and, unless it was made elsewhere, `voice.json`, which names
the base by hash. Nothing of it is taken on trust: every key is checked and used, or the voice is refused.
"""

import hashlib
import json
import math
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.utils import logging

from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM
from duet_moe.modeling.persistence import check_safetensors
from duet_moe.modeling.voices import LowRank

logger = logging.get_logger("transformers.duet_moe")  # follows the verbosity that users set there

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
# What our commands and PEFT give a meaning of their own, and what Windows keeps for devices.
RESERVED = {"base", "none", "default", "lora", "con", "prn", "aux", "nul"} | {
    f"{device}{number}" for device in ("com", "lpt") for number in range(10)
}
KEY = re.compile(
    r"base_model\.model\.diversity_head\.(gate_proj|up_proj|down_proj|unembed)"
    r"\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)(?:\.weight)?"
)
TRUNK = re.compile(r"\.self_attn\.\w+_proj\.|\.mlp\.(shared_)?experts\.")
# Settings of PEFT's LoraConfig that change what an adapter computes; `LowRank` knows none of them.
REFUSED = (
    "modules_to_save", "lora_bias", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "layer_replication",
    "alora_invocation_tokens", "trainable_token_indices", "target_parameters", "use_qalora", "arrow_config",
)  # fmt: skip


class WrongBaseError(ValueError):
    """The voice was trained for another base model."""


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
            f"{shown!r} is no name for a voice: use 1 to 64 letters a-z, digits, - and _, a letter or digit first."
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


def base_hashes(model: nn.Module) -> dict[str, str | None]:
    """Return what identifies a base model, whatever the dtype that it was loaded in.

    Returns:
        `shared`: SHA-256 over name, shape and bfloat16 bytes of embedding, norms, routers and heads, which quantised
        forms have too. `trunk`: the same over attention and experts; `None` where they are quantised. Kept on the
        model until a weight changes. A model that carries PEFT adapters has the hashes of its base; a gate and a
        task router, of which a voice knows nothing, count for neither.

    Raises:
        ValueError: if weights are not in memory.
    """
    weights = {
        name.replace(".base_layer.", ".").removeprefix("base_model.model."): weight
        for name, weight in model.named_parameters()
        if not any(part in name for part in ("lora_", "token_gate.", "task_router."))
    }
    state = tuple((name, weight.data_ptr(), weight._version, weight.device) for name, weight in weights.items())
    kept = getattr(model, "_base_hashes", None)
    if kept is None or kept[0] != state:
        trunk = {name: weight for name, weight in weights.items() if TRUNK.search(name)}
        shared = {name: weight for name, weight in weights.items() if name not in trunk}
        quantised = hasattr(model, "hf_quantizer")
        kept = state, {"shared": _hash(shared), "trunk": None if quantised else _hash(trunk)}
        model._base_hashes = kept  # type: ignore[assignment]
    return dict(kept[1])


def _hash(weights: dict[str, nn.Parameter]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].detach()
        if weight.is_meta:
            raise ValueError(
                f"{name} is not in memory, so the base cannot be checked: load the model without offloading."
            )
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        digest.update(weight.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_voice(model: DuetMoeForCausalLM, folder: str | Path, name: str | None = None) -> str:
    """Load the voice in `folder`, in the place of one of the same name; the model is as it was if that fails.

    Args:
        name: what to call it; the name in voice.json, else the folder's, when not given.

    Returns:
        The name that `generate(voice=...)` takes.

    Raises:
        FileNotFoundError, OSError: if a file is missing or damaged.
        ValueError: if the adapter changes more than the diversity head's linear layers, has another shape, numbers
            that are not finite, or a setting that is not known here; the message names the key.
        WrongBaseError: if it was trained for another base.
    """
    folder = Path(folder)
    card = _read_json(folder / "voice.json") if (folder / "voice.json").is_file() else None
    name = check_name(name or str((card or {}).get("name") or folder.resolve().name))
    if card is not None:
        _check_base(model, name, card, folder)
        _check_digest(folder / "adapter_model.safetensors", card.get("adapter_sha256"))
    else:
        logger.warning_once(
            f"{str(folder)!r} has no voice.json, so of its base only the shapes can be checked: "
            f"{_read_json(folder / 'adapter_config.json').get('base_model_name_or_path')!r} is what it names."
        )
    model.voices.add(name, _read_layers(folder, model.diversity_head))
    return name


def _check_base(model: nn.Module, name: str, card: dict, folder: Path) -> None:
    base = card.get("base")
    wanted = base.get("hashes") if isinstance(base, dict) else None
    if not isinstance(wanted, dict) or not wanted.get("shared"):
        raise ValueError(f"{folder / 'voice.json'} does not say which base the voice is for: fetch or train it again.")
    found = base_hashes(model)
    for part in ("shared", "trunk"):
        if wanted.get(part) and found[part] and wanted[part] != found[part]:
            raise WrongBaseError(
                f"Voice {name!r} was trained for {base.get('name')!r}, whose {part} weights have the hash "
                f"{wanted[part]}; those of this model have {found[part]}. Load that model, or train the voice for "
                "this one: duet voice train --base."
            )


def _check_digest(file: Path, told: str | None) -> None:
    check_safetensors(file)
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if told is not None and told != found:
        raise OSError(
            f"{file} is damaged: its SHA-256 is {found}, and voice.json says {told}. Fetch or train it again."
        )


def _read_layers(folder: Path, head: nn.Module) -> dict[str, LowRank]:
    config = _read_json(folder / "adapter_config.json")
    where = str(folder)
    _check_config(config, where)
    tensors = _read_tensors(folder / "adapter_model.safetensors")
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{where}: {key!r} is no LoRA weight of the diversity head's linear layers, {KEY.pattern}."
            )
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(
                f"{where}: {key!r} has values that are no finite numbers: fetch or train the voice again."
            )
        found.setdefault(match[1], {})[match[2]] = tensor
    if not found:
        raise ValueError(f"{where}: adapter_model.safetensors has no weights: fetch or train the voice again.")
    return {layer: _layer(layer, parts, config, getattr(head, layer).weight, where) for layer, parts in found.items()}


def _layer(layer: str, parts: dict[str, torch.Tensor], config: dict, weight: torch.Tensor, where: str) -> LowRank:
    rank, (outputs, inputs) = config["r"], weight.shape
    shapes: dict[str, tuple[int, ...]] = {"lora_A.weight": (rank, inputs), "lora_B.weight": (outputs, rank)}
    if config.get("use_dora"):
        shapes["lora_magnitude_vector"] = (outputs,)
    for part in shapes | parts:
        shape, wanted = tuple(parts[part].shape) if part in parts else None, shapes.get(part)
        if shape != wanted:
            raise ValueError(
                f"{where}: diversity_head.{layer}.{part} has shape {shape}; with r={rank} and "
                f"use_dora={bool(config.get('use_dora'))} it is {wanted} in this model: load the base it was made for."
            )
    if config.get("use_dora") and weight.is_meta:
        raise ValueError(
            f"diversity_head.{layer} is not in memory, and DoRA needs it: load the model without offloading."
        )
    scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRank.from_lora(
        parts["lora_A.weight"], parts["lora_B.weight"], scaling, parts.get("lora_magnitude_vector"), weight
    )


def _check_config(config: dict, where: str) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"{where}: peft_type={kind!r} is not possible: a voice is a LORA adapter.")
    for setting in REFUSED:
        if config.get(setting):
            raise ValueError(f"{where}: {setting}={config[setting]!r} is not possible in a voice: train it without.")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{where}: bias={config['bias']!r} is not possible in a voice: train it with bias='none'.")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise ValueError(f"{where}: r={rank!r}, lora_alpha={alpha!r}: a voice has a whole r >= 1 and a finite alpha.")


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    check_safetensors(file)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise OSError(f"{file} is damaged: {error}. Fetch or train the voice again.") from error


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing: a voice folder has it. Fetch or train the voice again.") from None
    except ValueError as error:
        raise ValueError(f"{file} is damaged, it is no JSON: {error}. Fetch or train the voice again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged, it holds no settings. Fetch or train the voice again.")
    return content
