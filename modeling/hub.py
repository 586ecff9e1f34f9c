"""Model cards.

A card is made from what the checkpoint is (shape, modes) and from what its folder tells, each of it optional:
`notes.md` (use, limits, training data with licences; its front matter goes into the metadata), `history.md` (how it
was trained) and `evaluation.json` (what `python -m duet_moe.evaluation.card` measured).
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import GenerationConfig

from duet_moe.configuration.configuration_duet_moe import DuetMoeConfig
from duet_moe.configuration.modes import Mode, read_modes
from duet_moe.modeling.checkpoints import HUB_ID
from duet_moe.modeling.info import describe
from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM

CARD = Path(__file__).parent / "card_template.md"
MEASURED = Path(__file__).parent / "card_measured.md"
EMPTY_CARD = "This model card has been automatically generated."  # in what transformers pushes where there is none
TAGS = ("duet_moe", "moe")
NO_NOTES = """## Intended use and limits

Nothing is recorded. Like every language model of this kind it makes things up, in both modes: measure it on your own
task before you rely on it.

## Training data

Not recorded: treat the origin and the licences of what it learnt from as unknown."""


def write_card(folder: str | Path, name: str | None = None) -> Path:
    """Write the card of the checkpoint in `folder` to its README.md, in place of one that is there.

    Args:
        name: the title, and where the card's example loads it from; the folder's name when not given.

    Raises:
        OSError, ValueError: if there is no checkpoint, or it is of another family or a newer version.
    """
    folder = Path(folder)
    config = DuetMoeConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = DuetMoeForCausalLM(config)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    card = model_card(model, name or folder.resolve().name, folder)
    unfinished = folder / ".README.md.unfinished"
    unfinished.write_text(str(card), encoding="utf-8")
    os.replace(unfinished, folder / "README.md")
    return folder / "README.md"


def fill_empty_card(model: DuetMoeForCausalLM, working_dir: str | Path, repo_id: str) -> None:
    """Replace the empty card that transformers is about to push by one of the model; leave any other as it is."""
    path = Path(working_dir, "README.md")
    if EMPTY_CARD not in path.read_text(encoding="utf-8"):
        return
    card = model_card(model, repo_id)
    asked_for = ModelCard.load(path).data.get("tags", [])
    card.data["tags"] = list(dict.fromkeys([*card.data["tags"], *asked_for]))
    card.save(path)


def model_card(model: DuetMoeForCausalLM, name: str, folder: Path | None = None) -> ModelCard:
    """Return the card of a model, with what `folder` tells of it.

    Args:
        name: bundled name or Hub id, from which the card's example loads it.
    """
    title = name.split("/")[-1]
    notes = ModelCard(_text(folder, "notes.md") or NO_NOTES, ignore_metadata_errors=True)
    figures = json.loads(_text(folder, "evaluation.json") or "null")
    facts = describe(model)
    modes = read_modes(getattr(model.generation_config, "modes", None))
    shown = {
        "name": title,
        "source": name,
        "parameters": f"{_millions(facts, 'total')} total, {_millions(facts, 'active')} active per token with "
        f"{facts['experts']}",
        "shape": f"{facts['layers']} layers, window {facts['sliding_window']} of a context of {facts['context']} "
        f"tokens, vocabulary {facts['vocabulary']}",
        "modes": "\n".join(_mode_row(mode, model.config.hybrid_gate) for mode in modes.values()),
        "default_mode": model.config.default_mode,
        "history": (_text(folder, "history.md") or "Not recorded.").strip(),
        "notes": notes.text.strip(),
        "measured": _measured(figures, title) if figures else "Nothing yet.",
    }
    data = _metadata(notes.data.to_dict(), model.config.name_or_path, name)
    data.model_name, data.eval_results = title, _eval_results(figures) if figures else None
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_filled(CARD, shown)}")


def _metadata(told: dict, loaded_from: str, name: str) -> ModelCardData:
    tags = list(dict.fromkeys([*TAGS, *told.pop("tags", [])]))
    if (
        "base_model" not in told
        and HUB_ID.fullmatch(loaded_from)
        and not (loaded_from == name or Path(loaded_from).exists())
    ):
        told["base_model"] = loaded_from
    return ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags, **told)


def _eval_results(figures: dict) -> list[EvalResult]:
    """Return what the Hub shows beside the card: right answers by mode and set of questions."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="duet-moe-facts",
            dataset_name=f"facts, {questions.replace('_', ' ')}",
            dataset_config=questions,
            metric_type="accuracy",
            metric_name=f"right answers, {mode} mode",
            metric_value=row[mode],
            metric_args={"seed": figures["seed"], "questions": int(row["questions"])},
        )
        for questions, row in figures["facts"].items()
        for mode in ("factual", "creative")
    ]


def _measured(figures: dict, name: str) -> str:
    loss_rows = [
        f"| {source} | {row['documents']:.0f} | {row['coherence_nats_per_token']:.3f} | "
        f"{row['diversity_nats_per_token']:.3f} | {row['coherence_bits_per_byte']:.3f} | "
        f"{row['diversity_bits_per_byte']:.3f} |"
        for source, row in figures["loss"].items()
    ]
    fact_rows = [
        f"| {questions.replace('_', ' ')} | {row['questions']:.0f} | {row['factual']:.1%} | {row['creative']:.1%} |"
        for questions, row in figures["facts"].items()
    ]
    diversity_rows = [
        f"| {mode} | {row['distinct_2']:.3f} | {row['self_bleu']:.3f} | {row['repetition']:.3f} | {row['words']:.0f} |"
        for mode, row in figures["diversity"].items()
    ]
    shown = {
        "name": name,
        "loss_table": "\n".join(loss_rows),
        "fact_table": "\n".join(fact_rows),
        "diversity_table": "\n".join(diversity_rows),
        "speed": ", ".join(f"{mode} {rate:.0f}" for mode, rate in figures["speed"].items()),
        "environment": ", ".join(f"{part} {value}" for part, value in figures["environment"].items()),
        "seed": str(figures["seed"]),
        "date": figures["date"],
        "factual_samples": _quoted(figures["samples"]["factual"]),
        "creative_samples": _quoted(figures["samples"]["creative"]),
    }
    return _filled(MEASURED, shown).strip()


def _mode_row(mode: Mode, has_gate: bool) -> str:
    names = ("temperature", "top_k", "top_p", "min_p")
    on = {name: getattr(mode, name) for name in names if getattr(mode, name) != getattr(Mode(""), name)}
    sampling = ", ".join(f"{name} {value}" for name, value in on.items()) or "temperature 1.0"
    rules = ", ".join(
        f"{name} {value}" for name in ("plausible_min", "plan_guidance") if (value := getattr(mode, name))
    )
    mix = "gate" if mode.gated and has_gate else mode.head_mix
    return f"| `{mode.name}` | {mix} | {sampling if mode.do_sample else 'greedy'} | {rules or 'none'} |"


def _quoted(answers: Sequence[dict[str, str]]) -> str:
    return "\n\n".join(
        f"**{answer['prompt']}**\n\n" + "\n".join(f"> {line}".rstrip() for line in answer["text"].splitlines() or [""])
        for answer in answers
    )


def _filled(template: Path, shown: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda gap: shown[gap[1]], template.read_text(encoding="utf-8"))


def _text(folder: Path | None, name: str) -> str | None:
    path = Path(folder, name) if folder is not None else None
    return path.read_text(encoding="utf-8") if path is not None and path.is_file() else None


def _millions(facts: dict, part: str) -> str:
    return f"{facts['parameters'][part] / 1e6:.1f}M"
