"""Teach a voice by preferences: direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) by TRL.

A new voice starts at its base, one that goes on from another starts there and keeps near it. Only the diversity head
learns, as in `train_voice`, and the same is proved and measured before the voice is published.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from duet_moe.finetune.corpus import Document
from duet_moe.finetune.style import adapted, require_only_diversity_head
from duet_moe.finetune.token_store import encode
from duet_moe.finetune.voice_job import VoiceJob, WholeEvaluation
from duet_moe.finetune.voice_pairs import Pair, VoicePairs, read_voice_pairs
from duet_moe.finetune.voice_recipe import VoiceRecipe, read_voice_recipe
from duet_moe.finetune.voice_report import factual_logits
from duet_moe.finetune.voices import VoiceStore
from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM
from duet_moe.modeling.voice_files import base_hashes, load_voice


def prefer_voice(
    pairs: object,
    name: str,
    base: str | None = None,
    recipe: str | Path | VoiceRecipe = "prefer",
    store: str | Path | None = None,
    *,
    voice: str | None = None,
    heldout: object = None,
    author: str = "",
    licence: str = "",
    personal_data: str = "mask",
    load_in_4bit: bool = False,
    replace: bool = False,
    seed: int = 0,
    show: bool = True,
) -> Path:
    """Train a voice to prefer chosen answers to rejected ones, and publish it in the store.

    The same call goes on after an interruption. Under `torchrun` all processes train together.

    Args:
        pairs: path of a file or folder, a `datasets.Dataset`, or a sequence of dicts with `prompt`, `chosen` and
            `rejected`; see `read_voice_pairs`, which also explains `heldout` and `personal_data`.
        name: of the voice that is made.
        base: bundled name, folder or Hub id; by default the base of `voice`, else `duet-mini`.
        recipe: `prefer`, another name, a YAML file, or settings. A voice that goes on keeps its adapter's own.
        voice: name of a voice of the store to go on from; it stays as it is unless it is replaced.

    Returns:
        The folder of the voice.

    Raises:
        CorpusError: if the pairs cannot be used; the message says why and what is needed.
        FileExistsError, FileNotFoundError: if `name` is taken and `replace` is not set; if there is no `voice`.
        ValueError, OSError: on a bad name, recipe or base, on a voice of another base, on a full disk; nothing
            half-written stays.
    """
    from accelerate import PartialState

    recipe = recipe if isinstance(recipe, VoiceRecipe) else read_voice_recipe(recipe)
    voices = VoiceStore(store)
    process = PartialState(cpu=not torch.cuda.is_available())
    show = show and process.is_main_process
    parent = None if voice is None else voices.path(voice)
    if voice is not None:
        voices.check(voice)
    base = base or (voices.card(voice).base["name"] if voice is not None else "duet-mini")
    job = VoiceJob(name, base, recipe, voices, author, licence, load_in_4bit, replace, seed, show)
    read = read_voice_pairs(pairs, heldout, personal_data=personal_data)
    if show:
        print("\n".join(read.report.lines()), flush=True)
    model, tokenizer = job.load()
    factual = factual_logits(model, tokenizer)
    tuned = _policy(model, job, parent)
    run = job.run_folder(
        base_hashes(model), *map(_texts, (read.train, read.heldout)), voice and voices.card(voice).adapter_sha256
    )
    figures = _fit(job, tuned, tokenizer, read, run)
    if process.is_main_process:
        job.publish(tuned, factual, figures, read.chosen(), read.rejected(), run, parent)
    process.wait_for_everyone()
    return voices.root / name


def _texts(pairs: Sequence[Pair]) -> list[list[str]]:
    return [[pair.prompt, pair.chosen, pair.rejected] for pair in pairs]


def _policy(model: DuetMoeForCausalLM, job: VoiceJob, parent: Path | None):  # type: ignore[no-untyped-def]
    """Return the `peft.PeftModel` that learns: with new adapters, or with those of the voice in `parent`."""
    from peft import PeftModel
    from transformers import set_seed

    if parent is None:
        set_seed(job.seed)
        tuned = adapted(model, job.recipe)
    else:
        model.unload_voice(load_voice(model, parent))  # refuses a voice of another base
        tuned = PeftModel.from_pretrained(model, str(parent), is_trainable=True)
        require_only_diversity_head(tuned)
    if any("unembed" in name for name, weight in tuned.named_parameters() if weight.requires_grad):
        raise ValueError(
            "TRL takes the loss from the head's own output matrix and would leave an adapter on it untrained: use a "
            "recipe, or a voice, without `unembed` among its layers."
        )
    model.config.head_mix = 1.0  # the head from which TRL takes its loss
    return tuned


def _fit(  # type: ignore[no-untyped-def]
    job: VoiceJob, tuned, tokenizer: PreTrainedTokenizerBase, pairs: VoicePairs, run: Path
) -> dict[str, float]:
    """Train `tuned` to its best epoch and return what was measured."""
    from datasets import Dataset
    from transformers import EarlyStoppingCallback
    from trl import DPOConfig, DPOTrainer

    class PairTrainer(WholeEvaluation, DPOTrainer):
        """Measures whole."""

    train, heldout = ([_messages(pair) for pair in side] for side in (pairs.train, pairs.heldout))
    before = preferred_share(tuned, tokenizer, pairs.heldout)
    trainer = PairTrainer(
        model=tuned,
        args=DPOConfig(
            **job.trainer_settings(run, len(train)),
            per_device_eval_batch_size=job.recipe.batch_size,
            beta=job.recipe.beta,
            max_length=tuned.config.max_position_embeddings,
            disable_dropout=job.recipe.dropout == 0,
            router_aux_loss_coef=0.0,
            gradient_checkpointing=False,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(heldout),
        processing_class=tokenizer,
        callbacks=[EarlyStoppingCallback(job.recipe.patience)],
    )
    learnt = job.learn(trainer, run, math.log(2))  # the loss of a policy that is its reference
    learnt.pop("epochs_here")
    best = min((row for row in trainer.state.log_history if "eval_loss" in row), key=lambda row: row["eval_loss"])
    figures = {f"preference_{name}" if name.startswith("loss") else name: value for name, value in learnt.items()}
    return figures | {
        "preferred_before": before,
        "preferred_after": preferred_share(tuned.eval(), tokenizer, pairs.heldout),
        "reward_accuracy": best["eval_rewards/accuracies"],  # share of pairs whose chosen answer has gained
        "heldout_pairs": len(pairs.heldout),
    }


@torch.no_grad()
def preferred_share(model, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> float:  # type: ignore[no-untyped-def]
    """Return the share of pairs whose chosen answer is likelier to the diversity head, per token."""

    def likelihood(prompt: str, answer: str) -> float:
        encoded, start = encode([Document(prompt, answer)], tokenizer)[0]
        ids = torch.from_numpy(encoded[: model.config.max_position_embeddings]).long()[None].to(model.device)
        labels = ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) < start, -100)
        return -model(input_ids=ids, labels=labels, head_mix=1.0).loss.item()

    wins = [likelihood(pair.prompt, pair.chosen) > likelihood(pair.prompt, pair.rejected) for pair in pairs]
    return sum(wins) / len(wins)


def _messages(pair: Pair) -> dict[str, list[dict[str, str]]]:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {field: [{"role": role, "content": getattr(pair, field)}] for field, role in roles.items()}
