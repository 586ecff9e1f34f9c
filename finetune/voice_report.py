"""What is proved and measured of every voice once it is trained.

Proved: factual mode is bit-identical to the base. Measured, on prompts of the held-out texts: whether a classifier
takes the answers for the corpus' style, before and after; how varied they are; how much they copy.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from duet_moe.finetune.copying import Runs
from duet_moe.finetune.corpus import Document
from duet_moe.finetune.leaks import normalise
from duet_moe.finetune.lexical import distinct_n
from duet_moe.finetune.style_score import StyleScorer, neutral_texts
from duet_moe.finetune.voice_corpus import VoiceCorpus
from duet_moe.finetune.voice_recipe import VoiceRecipe
from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM
from duet_moe.modeling.writer import BASE, Writer

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
)  # for the samples of the card, and for a corpus that has no prompts of its own
COPIED_WORDS = 8  # a run of as many words that is also in the corpus counts as copied
ANSWER_TOKENS = 80
BASE_SEED = 500_000  # of the base's answers that the classifier learns from; the measured ones have others


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
    earlier: str | None = None,
) -> dict[str, object]:
    """Write with and without the voice and compare; the classifier goes into `folder`.

    Args:
        model: has the voice loaded.
        neutral: texts in nobody's style on the corpus' matters. The package's own texts are added to them, and answers
            of the base to the training prompts, so that a small model's English is not taken for style.
        earlier: name of the voice to compare with, instead of the base.

    Returns:
        `style_accuracy` and `style_balanced_accuracy` of the classifier on texts that it has not seen;
        `style_share_*`, the share of answers taken for the voice; `distinct_2_*`; `copied_share_*` (of answers, and of
        the corpus' own held-out texts), with a run of eight words from the training texts; `longest_copy`; `answers`;
        `samples`.
    """
    writer = Writer(model, tokenizer)
    own = [document.response for document in texts.train]
    asked = _prompts(texts.train, len(own))
    if show:
        print("Learning what the style is", flush=True)
    plain = [*neutral, *neutral_texts(), *_answers(writer, asked, None, seed + BASE_SEED)]
    known = {normalise(text) for text in own}
    scorer = StyleScorer.fit(own, [text for text in plain if normalise(text) and normalise(text) not in known], seed)
    scorer.save(folder)
    prompts = _prompts(texts.heldout, 24)
    answers: dict[str, list[str]] = {"before": [], "after": []}
    for side, speaks in (("before", earlier), ("after", voice)):
        for repeat in range(recipe.samples_per_prompt):
            if show:
                print(f"Answers {side}: {repeat + 1} of {recipe.samples_per_prompt} rounds", flush=True)
            answers[side] += _answers(writer, prompts, speaks, seed + 1000 * repeat)
    runs = Runs(own)
    figures: dict[str, object] = {
        "style_accuracy": scorer.accuracy,
        "style_balanced_accuracy": scorer.balanced_accuracy,
        "answers": len(answers["after"]),
    }
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
    # to prompts of our own, since those of the corpus are the customer's and the card is passed on
    shown = [_answers(writer, PROMPTS, speaks, seed) for speaks in (earlier, voice)]
    figures["samples"] = [
        {"prompt": prompt, "before": before, "after": after}
        for prompt, before, after in zip(PROMPTS, *shown, strict=True)
    ]
    return figures


def _prompts(documents: Sequence[Document], most: int) -> list[str]:
    """Return the different prompts of a corpus, or such as any corpus could answer where it has none."""
    own = dict.fromkeys(document.prompt for document in documents if document.prompt)
    return list(own or PROMPTS)[:most]


def _answers(writer: Writer, prompts: Sequence[str], voice: str | None, seed: int) -> list[str]:
    written = writer.write_batch(prompts, "creative", ANSWER_TOKENS, seed, voice=voice or BASE)
    return [text.text for text in written]
