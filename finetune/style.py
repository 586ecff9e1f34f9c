"""Train a voice: LoRA on the diversity head, and on nothing else.

The trunk's states are computed once, so that an epoch costs only the head; `transformers.Trainer` does the rest. The
same call goes on after an interruption, from the last whole checkpoint, to the same adapter. What comes out is
published only after its checks: factual mode bit-identical, every key consumed on reload, a style report.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from duet_moe.finetune.features import TrunkStates, collate, trunk_states
from duet_moe.finetune.voice_corpus import read_texts, read_voice_corpus
from duet_moe.finetune.voice_job import VoiceJob, WholeEvaluation
from duet_moe.finetune.voice_recipe import VoiceRecipe, read_voice_recipe
from duet_moe.finetune.voice_report import factual_logits
from duet_moe.finetune.voices import VoiceStore
from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM

ADAPTED = re.compile(r"diversity_head\.\w+\.lora_")  # the only weights that a voice may train


def train_voice(
    corpus: object,
    name: str,
    base: str = "duet-mini",
    recipe: str | Path | VoiceRecipe = "standard",
    store: str | Path | None = None,
    *,
    heldout: object = None,
    neutral: str | Path | Sequence[str] | None = None,
    author: str = "",
    licence: str = "",
    personal_data: str = "mask",
    text_column: str | None = None,
    prompt_column: str | None = None,
    language: str = "en",
    load_in_4bit: bool = False,
    replace: bool = False,
    seed: int = 0,
    show: bool = True,
) -> Path:
    """Train a voice on `corpus` and publish it in the store.

    Under `torchrun` all processes train together (data parallel), with the loss of one process.

    Args:
        corpus: path of a file or folder, a `datasets.Dataset`, or a sequence of dicts; see `read_voice_corpus`, which
            also explains `heldout`, `personal_data`, `text_column`, `prompt_column` and `language`.
        name: of the voice.
        base: bundled name, folder or Hub id of the model that will speak with the voice.
        recipe: `quick`, `standard`, `careful`, a YAML file, or settings.
        store: folder of voices; see [`VoiceStore`].
        neutral: texts on the same matters in nobody's style, as a path or a list; they sharpen the style report.
        load_in_4bit: train on a 4-bit trunk (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).
        replace: a voice of that name may go once the new one is there.

    Returns:
        The folder of the voice.

    Raises:
        CorpusError: if the corpus cannot be used; the message says why and what is needed.
        FileExistsError: if the name is taken and `replace` is not set.
        ValueError, OSError: on a bad name, recipe, base or a full disk; nothing half-written stays.
    """
    from accelerate import PartialState

    recipe = recipe if isinstance(recipe, VoiceRecipe) else read_voice_recipe(recipe)
    process = PartialState(cpu=not torch.cuda.is_available())
    show = show and process.is_main_process
    voices = VoiceStore(store)
    job = VoiceJob(name, base, recipe, voices, author, licence, load_in_4bit, replace, seed, show)
    texts = read_voice_corpus(
        corpus, heldout, personal_data=personal_data, text_column=text_column, prompt_column=prompt_column,
        language=language,
    )  # fmt: skip
    neutral = read_texts(neutral) if isinstance(neutral, str | Path) else neutral
    if show:
        print("\n".join(texts.report.lines()), flush=True)
    model, tokenizer = job.load()
    with process.main_process_first():  # the others then find the states on disk
        states = [
            trunk_states(model, documents, tokenizer, voices.root / ".cache" / "states", show)
            for documents in (texts.train, texts.heldout)
        ]
    factual = factual_logits(model, tokenizer)
    run = job.run_folder(*(part.folder.name for part in states))
    tuned, figures = _fit(job, model, states, run)
    if process.is_main_process:
        job.publish(tuned, factual, figures, texts, neutral or (), run)
    process.wait_for_everyone()
    return voices.root / name


def adapted(model: DuetMoeForCausalLM, recipe: VoiceRecipe):  # type: ignore[no-untyped-def]
    """Return a `peft.PeftModel` of `model` in which only adapters on the diversity head can learn.

    Raises:
        RuntimeError: if anything else could.
        ValueError: if DoRA is asked for a layer of zeros, whose direction it would have to keep.
    """
    from peft import LoraConfig, get_peft_model

    for layer in recipe.layers if recipe.method == "dora" else ():
        if not getattr(model.diversity_head, layer).weight.any(dim=1).all():
            raise ValueError(
                f"method is 'dora', which keeps the direction of every row of a weight, and {layer} of this head has "
                "rows of zeros, as a head that was never trained: use lora or rslora, or leave it out of layers."
            )

    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        use_rslora=recipe.method == "rslora",
        use_dora=recipe.method == "dora",
        target_modules=recipe.target_modules,
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(model, config)
    require_only_diversity_head(tuned)
    return tuned


def require_only_diversity_head(tuned) -> None:  # type: ignore[no-untyped-def]
    """Raise RuntimeError if any other weight of a `peft.PeftModel` would be trained than adapters of that head."""
    learning = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    if foreign := [name for name in learning if not ADAPTED.search(name)]:
        raise RuntimeError(f"{foreign[0]} would be trained too: a voice may only change the diversity head.")


def _fit(job: VoiceJob, model: DuetMoeForCausalLM, states: Sequence[TrunkStates], run: Path):  # type: ignore[no-untyped-def]
    """Train and return the tuned model with its best adapter, and what was measured."""
    from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, set_seed

    class VoiceTrainer(WholeEvaluation, Trainer):
        """Computes the loss of the diversity head alone."""

        def compute_loss(self, model, inputs, *args, **kwargs):  # type: ignore[no-untyped-def]
            return super().compute_loss(model, inputs | {"head_mix": 1.0}, *args, **kwargs)

    train, heldout = states
    settings = job.trainer_settings(run, len(train))
    set_seed(job.seed)  # the adapters start from random numbers
    tuned = adapted(model, job.recipe)
    trainer = VoiceTrainer(
        model=tuned,
        args=TrainingArguments(
            **settings,
            per_device_eval_batch_size=len(heldout),
            remove_unused_columns=False,
            prediction_loss_only=True,
        ),
        data_collator=collate,
        train_dataset=train,
        eval_dataset=heldout,
        callbacks=[EarlyStoppingCallback(job.recipe.patience)],
    )
    with torch.no_grad():
        whole = collate([heldout[index] for index in range(len(heldout))])
        whole = {field: values.to(model.device) for field, values in whole.items()}
        before = tuned.eval()(**whole, head_mix=1.0).loss.item()
    learnt = job.learn(trainer, run, before)
    seconds, epochs = learnt["training_seconds"], learnt.pop("epochs_here")
    figures = {f"heldout_{name}" if name.startswith("loss") else name: value for name, value in learnt.items()}
    figures |= {
        "heldout_tokens": heldout.positions,
        "training_tokens_per_epoch": train.positions,
        "targets_per_second": train.positions * epochs / seconds,
    }
    return tuned.eval(), figures
