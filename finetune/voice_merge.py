"""A voice and its base as one checkpoint, for engines that take no adapters."""

import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from duet_moe.finetune.voice_adapter import check_voice
from duet_moe.finetune.voice_card import VoiceCard
from duet_moe.modeling.checkpoints import bundled
from duet_moe.modeling.convert import copy_companions, model_folder
from duet_moe.modeling.hub import write_card
from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM
from duet_moe.modeling.voice_files import WrongBaseError, base_hashes

HISTORY = """The voice `{name}` was merged into the diversity head of `{base}` with PEFT's `merge_and_unload`; nothing
else was changed, so that factual mode answers exactly as `{base}` does.

- Voice: `{name}` by {author}, {created}, licence {licence}, adapter sha256 `{sha256}`
- Base: `{base}`, hashes `{shared}` and `{trunk}`
"""
NOTES = """## Intended use and limits

Those of the base model and of the voice. Nothing was measured on the merged model itself.
The licences of both apply: that of `{base}`, and the voice's, {licence}.

## Training data

That of `{base}`, and the voice's corpus; the voice's own card has the corpus' statistics."""


def merge_voice(folder: Path, base: str | Path, out: Path) -> Path:
    """Write a full checkpoint whose diversity head has the voice of `folder`, and return its folder.

    Factual mode is bit-identical to the base's. Weights keep the base's dtype: in bfloat16 the merged head is rounded.

    Args:
        base: bundled name, folder or Hub id.
        out: folder to make.

    Raises:
        FileExistsError: if `out` exists.
        FileNotFoundError: if there is no such voice or base.
        WrongBaseError: if the voice was trained for another base; the message has both hashes.
        OSError, ValueError: if the voice or the base is damaged or quantised, or the disk is full; then there is no
            `out`.
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise FileExistsError(f"{str(out)!r} exists: remove it or choose another name.")
    card = check_voice(folder)
    is_bundled = not Path(base).is_dir() and "/" not in str(base)
    source = model_folder(bundled(str(base)) if is_bundled else base)
    model = DuetMoeForCausalLM.from_pretrained(source, dtype="auto")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{str(base)!r} is quantised: merge into the model that it was made of, then quantise that.")
    _merge(model, folder, card)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.unfinished-"))
    try:
        (unfinished / out.name).mkdir()  # in it, because the card takes its title from the folder's name
        model.save_pretrained(unfinished / out.name)
        copy_companions(source, unfinished / out.name)
        _write_card(unfinished / out.name, card)
        os.replace(unfinished / out.name, out)
    finally:
        shutil.rmtree(unfinished)
    return out


def _merge(model: DuetMoeForCausalLM, folder: Path, card: VoiceCard) -> None:
    from peft import PeftModel

    wanted, found = card.base["hashes"], base_hashes(model)
    # A quantised trunk has no hash to compare.
    if any(wanted[part] != found[part] for part in wanted if None not in (wanted[part], found[part])):
        raise WrongBaseError(
            f"The voice {card.name!r} was trained for {card.base['name']!r} with hashes {wanted}, but this base has "
            f"{found}: merge it into the model that it was trained for, or train it anew."
        )
    PeftModel.from_pretrained(model, str(folder)).merge_and_unload(safe_merge=True)


def _write_card(folder: Path, card: VoiceCard) -> None:
    hashes = card.base["hashes"]
    shown = {
        "name": card.name,
        "author": card.author,
        "created": card.created,
        "licence": card.licence,
        "sha256": card.adapter_sha256,
        "base": card.base["name"],
        "shared": hashes["shared"],
        "trunk": hashes["trunk"],
    }
    data = ModelCardData(base_model=card.base["name"], tags=["voice"])  # two licences, not one
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{NOTES.format(**shown)}\n").save(folder / "notes.md")
    (folder / "history.md").write_text(HISTORY.format(**shown), encoding="utf-8")
    write_card(folder)
