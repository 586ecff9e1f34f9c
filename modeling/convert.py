"""Models of other families become Duet-MoE: in memory, or on disk without ever being in memory as a whole.

Both heads start as the source's output layer, so that the new model answers exactly as the source does, in every mode
mix, until its diversity head is trained.
"""

import copy
import logging
import shutil
import time
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.initialization import no_init_weights

from duet_moe.configuration.modes import BUILT_IN_MODES, modes_as_dict
from duet_moe.modeling.convert_families import duet_config, family_of, recipes
from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM
from duet_moe.modeling.persistence import TRUNK_CLASS
from duet_moe.modeling.shards import ShardSource, ShardWriter, read_json
from duet_moe.modeling.weights import ModelSource

logger = logging.getLogger(__name__)

COMPANIONS = (  # files that go along as they are
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "LICENSE*", "NOTICE*",
)  # fmt: skip
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def convert(
    source: str | Path,
    out: str | Path,
    experts_per_tok: int | None = None,
    window: int | None = None,
    experts: int | None = None,
    renormalize: bool = False,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    show: bool = True,
) -> dict[str, object]:
    """Write the Duet-MoE form of a Mixtral, Qwen3-MoE, OLMoE, Llama or Mistral checkpoint.

    Memory is that of the largest layer. All sizes are checked before anything is written; an interrupted call leaves
    `out.partial`, which does not load, and the same call goes on from there.

    Args:
        source: folder with config.json and safetensors, or a name on the Hub.
        out: folder to make.
        experts_per_tok: active experts per token, instead of the source's number (2 for a dense source).
        window: tokens that a layer sees; the source's own window, or its full attention, when not given.
        experts: number of experts per layer that a dense model's MLP is copied into (8).
        renormalize: scale the chosen experts' weights to a sum of 1 also where the source does not (OLMoE).
        dtype: of the new weights; that of the source's when not given.
        seed: for what is new and drawn: a dense model's router, and the heads' adapters, whose output is zero.
        show: show progress on standard error.

    Returns:
        What `duet convert --json` prints: folder, source family, sizes, seconds and notes to the user.

    Raises:
        FileNotFoundError: if the source or a part of it does not exist.
        ValueError: on a source that Duet-MoE cannot represent, naming the setting or tensor.
        OSError: if `out` exists, or the disk is too small.
    """
    started = time.monotonic()
    folder = model_folder(source)
    raw = read_json(folder / "config.json")
    family_of(raw.get("model_type", "none"))
    source_config = saved_config(folder)
    config = duet_config(source_config, experts_per_tok, window, experts, renormalize)
    shards = ShardSource(folder)
    config.dtype = dtype or shards.dtype
    with torch.device("meta"):
        model = DuetMoeForCausalLM(config)
    targets = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = recipes(targets, config, source_config, shards.shapes)
    model.generation_config = _with_modes(saved_generation_config(folder, source_config))
    notes = _notes(folder, raw, source_config)

    def finish(partial: Path) -> None:
        copy_companions(folder, partial)
        _save_settings(model, partial)

    identity = {"source": shards.fingerprint(), "config": config.to_dict(), "seed": seed}
    writer = ShardWriter(Path(out), weights, config.dtype, identity)
    writer.write(shards, seed, finish, show)
    return {
        "folder": str(out),
        "source": source_config.model_type,
        "parameters": writer.bytes // config.dtype.itemsize,
        "bytes": writer.bytes,
        "dtype": str(config.dtype).removeprefix("torch."),
        "seconds": round(time.monotonic() - started, 2),
        "notes": notes,
    }


def convert_model(
    hf_model: PreTrainedModel,
    model_class: type[DuetMoeForCausalLM] = DuetMoeForCausalLM,
    experts_per_tok: int | None = None,
    window: int | None = None,
    experts: int | None = None,
    renormalize: bool = False,
    seed: int = 0,
) -> DuetMoeForCausalLM:
    """Return the Duet-MoE form of a model in memory, in its dtype and on its device; arguments as in `convert`.

    Raises:
        ValueError: on a model that Duet-MoE cannot represent, naming the setting or tensor.
    """
    config = duet_config(hf_model.config, experts_per_tok, window, experts, renormalize)
    source = ModelSource(hf_model)
    with no_init_weights(), torch.device(hf_model.device):
        model = model_class._from_config(config, dtype=hf_model.dtype)
    tensors = model.state_dict()
    targets = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    with torch.no_grad():
        for weight in recipes(targets, config, hf_model.config, source.shapes):
            tensors[weight.name].copy_(weight.make(source, hf_model.dtype, seed))
    model.generation_config = _with_modes(hf_model.generation_config)
    return model.train(hf_model.training)


def model_folder(source: str | Path) -> Path:
    """Return the folder of a local model, or fetch its safetensors, settings and tokenizer from the Hub.

    Raises:
        FileNotFoundError: if it is neither.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            patterns = ["*.safetensors", "*.json", *COMPANIONS]
            folder = Path(snapshot_download(str(source), allow_patterns=patterns))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{str(source)!r} is not a folder, nor could it be fetched from the Hub ({str(error).splitlines()[0]})"
            ) from error
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: name the folder that `save_pretrained` wrote.")
    return folder


def saved_config(folder: Path) -> PreTrainedConfig:
    """Return the checkpoint's configuration.

    Raises:
        ValueError: if it holds a value that its model type does not allow.
    """
    try:
        return AutoConfig.from_pretrained(folder)
    except StrictDataclassError as error:
        raise ValueError(f"{folder / 'config.json'} is not a possible configuration: {error}") from error


def saved_generation_config(folder: Path, config: PreTrainedConfig) -> GenerationConfig:
    """Return the checkpoint's generation settings, or those that its configuration implies.

    Raises:
        ValueError: on settings that could not be saved again.
    """
    path = folder / "generation_config.json"
    found = GenerationConfig.from_pretrained(folder) if path.is_file() else GenerationConfig.from_model_config(config)
    try:
        found.validate(strict=True)
    except ValueError as error:
        raise ValueError(f"{path} has settings that contradict each other, mend it first: {error}") from error
    return found


def copy_companions(folder: Path, out: Path) -> None:
    """Copy tokenizer, chat template and licence to `out`, as they are."""
    for pattern in COMPANIONS:
        for file in folder.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, out / file.name)


def tokenizer_notes(folder: Path) -> list[str]:
    """Return a note if the folder has no tokenizer, which is allowed: weights alone can be converted."""
    if any((folder / name).is_file() for name in TOKENIZERS):
        return []
    note = f"{folder} has no tokenizer: put one beside the new weights before you write text with them."
    logger.warning(note)
    return [note]


def _with_modes(generation_config: GenerationConfig) -> GenerationConfig:
    own = copy.deepcopy(generation_config)
    own.modes = modes_as_dict(BUILT_IN_MODES)
    own._from_model_config = False  # or it is loaded again without its modes
    return own


def _notes(folder: Path, raw: dict, config: PreTrainedConfig) -> list[str]:
    notes = tokenizer_notes(folder)
    # names of older transformers, which the library translates
    known = {*type(config)().to_dict(), "torch_dtype", "rope_scaling", "rope_theta", "max_window_layers", "head_dim"}
    known |= {"_name_or_path", "transformers_version", "architectures", "auto_map", "dtype"}
    if strange := sorted(name for name in raw.keys() - known if raw[name]):
        notes.append(f"config.json has settings that {config.model_type} does not: {strange} were left out.")
        logger.warning(notes[-1])
    return notes


def _save_settings(model: DuetMoeForCausalLM, folder: Path) -> None:
    """Save what `save_pretrained` saves beside the weights: code, generation settings and, last, the configuration."""
    model.config.architectures = [type(model).__name__]
    model.config.auto_map = {"AutoModel": TRUNK_CLASS}
    custom_object_save(model, folder, config=model.config)
    model.generation_config.save_pretrained(folder)
    model.config.save_pretrained(folder)
