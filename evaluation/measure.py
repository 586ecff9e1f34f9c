"""What a model card reports, measured on text that was never trained on."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from duet_moe.configuration.modes import BUILT_IN_MODES, Mode
from duet_moe.finetune.corpus import RECIPES, Document, Source, load_source
from duet_moe.finetune.fact_wordings import evaluation_questions, group_facts, is_right, read_templates
from duet_moe.finetune.heldout import heldout_losses, spread
from duet_moe.finetune.lexical import distinct_n, repetition, self_bleu
from duet_moe.finetune.packing import TokenStore
from duet_moe.modeling.evidence import Text
from duet_moe.modeling.writer import Writer

BATCH = 32  # prompts answered at a time
FACT_TASK = Path(__file__).parent / "tasks" / "fact_wordings.yaml"


def text_loss(
    writer: Writer, stores: Sequence[TokenStore], documents: int = 200, max_tokens: int = 512
) -> dict[str, dict[str, float]]:
    """Return, per source and head, nats per token and bits per byte of held-out responses or texts."""
    losses = heldout_losses(writer.model, stores, documents, max_tokens)
    table = {}
    for store in stores:
        if store.source.name not in losses:
            continue
        loss = losses[store.source.name]
        size = _scored_bytes(store, writer, documents, max_tokens)
        row = {"documents": float(len(spread(store, documents))), "bytes": float(size)}
        for head in ("coherence", "diversity"):
            row[f"{head}_nats_per_token"] = loss[head]
            row[f"{head}_bits_per_byte"] = loss[head] * loss["tokens"] / math.log(2) / max(1, size)
        table[store.source.name] = row
    return table


def _scored_bytes(store: TokenStore, writer: Writer, documents: int, max_tokens: int) -> int:
    total = 0
    for index in spread(store, documents):
        ids, start = store.document(int(index))
        kept = ids[max(1, start) : max_tokens].tolist()
        total += len(writer.tokenizer.decode(kept, skip_special_tokens=True).encode())
    return total


def fact_accuracy(
    writer: Writer,
    facts: Source,
    root: str | Path,
    limit: int = 1000,
    seed: int = 0,
    modes: Mapping[str, str | Mode] | None = None,
) -> dict[str, dict[str, float]]:
    """Return the share of right answers by mode, on held-out wordings and on templates that training never has.

    `modes` are factual and creative where none are given; the table has the names that they have there.

    An answer is right when the normalised gold answer stands in it as whole words. `limit` questions are asked of each
    kind, spread evenly.
    """
    train, heldout = load_source(facts, root)
    templates = read_templates(RECIPES / str(facts.templates))
    known = group_facts([d for d in [*train, *heldout] if d.meta.get("fact")], templates)
    sets = {"held_out_wordings": heldout, "new_templates": evaluation_questions(FACT_TASK, known)}
    scores: dict[str, dict[str, float]] = {}
    for name, questions in sets.items():
        if not questions:
            continue
        step = max(1, len(questions) // limit)
        asked = questions[::step][:limit]
        scores[name] = {"questions": float(len(asked))}
        for key, mode in (modes or {"factual": "factual", "creative": "creative"}).items():
            answers = _answer([q.prompt or "" for q in asked], writer, mode, 32, seed)
            right = [is_right(a.text, q.meta["answer"]) for a, q in zip(answers, asked, strict=True)]
            scores[name][key] = sum(right) / len(right)
    return scores


def _answer(prompts: Sequence[str], writer: Writer, mode: str | Mode, max_new_tokens: int, seed: int) -> list[Text]:
    answers: list[Text] = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        answers += writer.write_batch(part, mode=mode, max_new_tokens=max_new_tokens, seed=seed + start)
    return answers


def creative_diversity(
    writer: Writer, prompts: Sequence[str], samples: int = 8, max_new_tokens: int = 100, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Return distinct-2, self-BLEU and repetition by mode: per prompt over its samples, then the mean over prompts.

    Beside the two modes stands the coherence head with the creative mode's sampling, so that the part of the
    difference that sampling alone makes can be seen.
    """
    creative = writer.modes["creative"]
    sampled = Mode(
        "coherence head, sampled", head_mix=0.0, do_sample=True, temperature=creative.temperature,
        top_p=creative.top_p, top_k=creative.top_k, min_p=creative.min_p,
    )  # fmt: skip
    table = {}
    for mode in (writer.modes["factual"], creative, sampled):
        flat = [prompt for prompt in prompts for _ in range(samples)]
        texts = [answer.text for answer in _answer(flat, writer, mode, max_new_tokens, seed)]
        groups = [texts[i : i + samples] for i in range(0, len(texts), samples)]
        table[mode.name] = {
            "distinct_2": _mean(groups, distinct_n),
            "self_bleu": _mean(groups, self_bleu),
            "repetition": _mean(texts, repetition),
            "words": _mean(texts, lambda text: float(len(text.split()))),
        }
    return table


def _mean(items: Sequence, score: Callable[..., float]) -> float:
    return sum(map(score, items)) / len(items)


def speed(
    writer: Writer, prompt: str = "Write a short story about a lighthouse.", tokens: int = 128
) -> dict[str, float]:
    """Return tokens per second of single answers by mode, the median of three; heads only where a mode needs them."""
    table = {}
    for mode in BUILT_IN_MODES:
        rates = []
        for run in range(3):
            started = time.perf_counter()
            answer = writer.write(
                prompt, mode=mode, max_new_tokens=tokens, min_new_tokens=tokens, seed=run, evidence=False
            )
            rates.append(len(answer.tokens) / (time.perf_counter() - started))
        table[mode] = sorted(rates)[1]
    return table


def held_out_prompts(sources: Sequence[Source], root: str | Path, names: Sequence[str], count: int) -> list[str]:
    """Return `count` prompts that were never trained on, from the held-out sides of the sources `names`, in turn."""
    sides: list[list[Document]] = [load_source(s, root)[1] for s in sources if s.name in names]
    mixed = [side[i] for i in range(max(map(len, sides))) for side in sides if i < len(side)]
    prompts = list(dict.fromkeys(document.prompt for document in mixed if document.prompt))
    if len(prompts) < count:
        raise ValueError(f"{names} hold out only {len(prompts)} prompts, {count} are wanted.")
    return prompts[:count]
