"""What is proved and measured of every voice once it is trained.

Proved: factual mode is bit-identical to the base. Measured, on prompts of the held-out texts: whether a classifier
takes the answers for the corpus' style, before and after; how varied they are; how much they copy.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from duet_moe.finetune.copying import Runs
from duet_moe.finetune.corpus import PACKAGE, Document, Source, load_source
from duet_moe.finetune.lexical import distinct_n
from duet_moe.finetune.style_score import StyleScorer
from duet_moe.finetune.voice_corpus import VoiceCorpus
from duet_moe.finetune.voice_recipe import VoiceRecipe
from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM
from duet_moe.modeling.writer import Writer

PROBES = (
    "What is the capital of Portugal?",
    "What is the chemical symbol for gold?",
    "Explain why the sky is blue.",
    "Write a tagline for a small bakery.",
)  # factual mode is compared on these, on every position
PROMPTS = (
    "Write a tagline for a small bakery.",
    "Describe a winter morning.",
    "Write a short story about a cat.",
    "Invite people to an open day.",
    "Thank a friend for a gift.",
    "Say sorry for a late parcel.",
    "Write a post about the first day of spring.",
    "Describe your favourite tool.",
    "Tell me about the sea.",
    "Write an opening line.",
)  # for a corpus that has no prompts of its own
COPIED_WORDS = 8  # a run of as many words that is also in the corpus counts as copied
ANSWER_TOKENS = 80
SHOWN = 10  # answers in the report


def factual_logits(model: DuetMoeForCausalLM, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """Return the logits (1, tokens, vocab) of factual mode on each of `PROBES`."""
    with torch.no_grad():
        return [
            model(torch.tensor([tokenizer(probe)["input_ids"]], device=model.device), head_mix=0.0).logits.clone()
            for probe in PROBES
        ]


def require_same_factual_logits(
    model: DuetMoeForCausalLM, tokenizer: PreTrainedTokenizerBase, before: Sequence[torch.Tensor]
) -> None:
    """Prove that factual mode is as it was, bit for bit.

    Raises:
        RuntimeError: naming the first probe whose logits differ.
    """
    for probe, old, new in zip(PROBES, before, factual_logits(model, tokenizer), strict=True):
        if not torch.equal(old, new):
            raise RuntimeError(f"Factual mode has changed on {probe!r}: the voice is not published.")


def style_report(
    model: DuetMoeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    voice: str,
    texts: VoiceCorpus,
    neutral: Sequence[str],
    recipe: VoiceRecipe,
    folder: Path,
    seed: int = 0,
    show: bool = True,
) -> dict[str, object]:
    """Write with and without the voice and compare; the classifier goes into `folder`.

    Args:
        model: has the voice loaded.
        neutral: texts in nobody's style on the corpus' matters; the package's own texts are added to them.

    Returns:
        `style_accuracy` of the classifier on texts that it has not seen; `style_share_*`, the share of answers taken
        for the voice; `distinct_2_*`; `copied_share_*` (of answers, and of the corpus' own held-out texts), with a run
        of eight words from the training texts; `longest_copy`; `answers`; `samples`.
    """
    own = [document.response for document in texts.train]
    scorer = StyleScorer.fit(own, [*neutral, *written_texts()], seed)
    scorer.save(folder)
    prompts = [document.prompt for document in texts.heldout if document.prompt] or list(PROMPTS)
    prompts = list(dict.fromkeys(prompts))[:24]
    writer = Writer(model, tokenizer)
    answers: dict[str, list[str]] = {}
    for side, speaks in (("before", None), ("after", voice)):
        answers[side] = []
        for repeat in range(recipe.samples_per_prompt):
            if show:
                print(f"Answers {side}: {repeat + 1} of {recipe.samples_per_prompt} rounds", flush=True)
            written = writer.write_batch(
                prompts, "creative", ANSWER_TOKENS, seed + 1000 * repeat, voice=speaks
            )  # fmt: skip
            answers[side] += [text.text for text in written]
    runs = Runs(own)
    figures: dict[str, object] = {"style_accuracy": scorer.accuracy, "answers": len(answers["after"])}
    for side, said in answers.items():
        figures |= {
            f"style_share_{side}": scorer.share(said),
            f"distinct_2_{side}": distinct_n(said),
            f"copied_share_{side}": runs.share_at_least(said, COPIED_WORDS),
        }
    heldout = [document.response for document in texts.heldout]
    figures["style_share_heldout"] = scorer.share(heldout)
    figures["copied_share_heldout"] = runs.share_at_least(heldout, COPIED_WORDS)
    figures["longest_copy"] = max(runs.longest(text)[0] for text in answers["after"])
    figures["samples"] = [
        {"prompt": prompt, "before": before, "after": after}
        for prompt, before, after in zip(prompts, answers["before"], answers["after"], strict=False)
    ][:SHOWN]
    return figures


def written_texts() -> list[str]:
    """Return the package's own answers in many manners, which are nobody's voice."""
    source = Source("written", f"{PACKAGE}written/*.jsonl", 1.0, kind="chat", holdout=0.0)
    documents: list[Document] = load_source(source, ".")[0]
    return [document.response for document in documents]
