"""Speed, counted cost and quality of duet-mini with 2, 4, 6 and 8 active experts.

    python benchmarks/experts.py --data DATA

DATA is the folder that the recipe's sources start from, as for `duet pretrain`; without it quality is left out. Speed
is that of `generate` in factual mode, which computes one head, in float32. The numbers of experts take turns: reported
are medians, and for 8 to 4 experts the saving of time within a round. A result file with hardware and versions goes to
`benchmarks/results/`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence

import torch
from result_file import write_result
from transformers import AutoTokenizer

from duet_moe import DuetMoeForCausalLM, Writer, bundled
from duet_moe.evaluation.cost import active_parameters, bytes_per_token, flops_per_token, price_per_million
from duet_moe.evaluation.measure import fact_accuracy, text_loss
from duet_moe.evaluation.shapes import shape_of
from duet_moe.finetune.corpus import Source, read_sources
from duet_moe.finetune.packing import TokenStore, encode_corpus
from duet_moe.finetune.settings import read_recipe

ACTIVE = (2, 4, 6, 8)
BATCHES = (1, 8)
IMPLEMENTATIONS = ("grouped_mm", "eager")  # transformers' default, and a loop over the chosen experts
# Different prompts, or the rows of a batch would choose the same experts.
THINGS = ("a lighthouse", "two rivers", "the last bus", "a tailor", "snow in May", "a lost key", "bees", "a choir")
PROMPTS = [[{"role": "user", "content": f"Write a short story about {thing}."}] for thing in THINGS]
Seconds = dict[int, list[float]]  # of every round, by active experts


def load(active: int) -> Writer:
    """Return duet-mini with `active` experts wherever a call names no number."""
    folder = bundled("duet-mini")
    model = DuetMoeForCausalLM.from_pretrained(folder, num_experts_per_tok=active, dtype=torch.float32)
    return Writer(model, AutoTokenizer.from_pretrained(folder))


def decode_seconds(
    writers: Mapping[int, Writer], implementation: str, batch: int, tokens: int, rounds: int
) -> Seconds:
    """Return the seconds in which `batch` rows get `tokens` tokens each, after one round to warm up."""
    prompts = writers[ACTIVE[0]].tokenizer.apply_chat_template(
        PROMPTS[:batch], add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt",
        tokenizer_kwargs={"padding_side": "left"},
    )  # fmt: skip
    seconds: Seconds = {active: [] for active in writers}
    for writer in writers.values():
        writer.model.set_experts_implementation(implementation)
    for _ in range(rounds + 1):
        for active, writer in writers.items():
            started = time.perf_counter()
            writer.model.generate(**prompts, mode="factual", max_new_tokens=tokens, min_new_tokens=tokens)
            seconds[active].append(time.perf_counter() - started)
    return {active: measured[1:] for active, measured in seconds.items()}


def saving(seconds: Seconds) -> dict[str, float]:
    """Return what 4 experts save against 8 in the same round: the median share of time, the smallest, the largest."""
    shares = [1 - four / eight for four, eight in zip(seconds[4], seconds[8], strict=True)]
    return {"median": statistics.median(shares), "smallest": min(shares), "largest": max(shares)}


def counted(writer: Writer, context: int) -> dict[str, float]:
    """Return what `duet_moe.evaluation.cost` counts for one head and 4 bytes a number."""
    shape = shape_of(writer.model.config)
    read = {
        f"read, MB a token, batch {batch}": bytes_per_token(shape, context, batch, 4, 4) / 1e6 for batch in BATCHES
    }
    active, operations = active_parameters(shape), flops_per_token(shape, context)
    return {"active parameters, M": active / 1e6, "operations, MFLOPs a token": operations / 1e6} | read


def quality(
    writer: Writer, stores: Sequence[TokenStore], facts: Source, data: str, documents: int, questions: int
) -> dict[str, float]:
    """Return held-out bits per byte of both heads over all sources, and the share of facts right in factual mode."""
    losses = text_loss(writer, stores, documents).values()
    size = sum(row["bytes"] for row in losses)
    figures = {
        f"{head} head, bits per byte": sum(row[f"{head}_bits_per_byte"] * row["bytes"] for row in losses) / size
        for head in ("coherence", "diversity")
    }
    right = fact_accuracy(writer, facts, data, limit=questions)
    return figures | {f"facts right, {name.replace('_', ' ')}": row["factual"] for name, row in right.items()}


def table(rows: Mapping[int, Mapping[str, float]]) -> str:
    """Return the figures as the table of docs/cost.md."""
    lines = [("active experts", *map(str, rows)), ("---", *["---:"] * len(rows))]
    lines += [(name, *(f"{row[name]:,.4g}" for row in rows.values())) for name in next(iter(rows.values()))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measure, print the table and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder that the recipe's paths start from; no quality without it")
    parser.add_argument("--cache", default="runs/tokens", help="folder of tokenised text")
    parser.add_argument("--recipe", default="mini", help="recipe whose held-out sides are measured")
    parser.add_argument("--documents", type=int, default=40, help="of each source (40)")
    parser.add_argument("--questions", type=int, default=400, help="of each kind of facts (400)")
    parser.add_argument("--tokens", type=int, default=64, help="decoded for the speed (64)")
    parser.add_argument("--rounds", type=int, default=7, help="of the speed (7)")
    parser.add_argument("--dollars-per-hour", type=float, default=1.0, help="of the machine, for the price (1)")
    arguments = parser.parse_args()
    writers = {active: load(active) for active in ACTIVE}
    rows = {active: counted(writer, arguments.tokens) for active, writer in writers.items()}
    savings = {}
    for implementation in IMPLEMENTATIONS:
        for batch in BATCHES:
            seconds = decode_seconds(writers, implementation, batch, arguments.tokens, arguments.rounds)
            name = f"{implementation}, batch {batch}"
            savings[name] = saving(seconds)
            for active, row in rows.items():
                rate = batch * arguments.tokens / statistics.median(seconds[active])
                row[f"tokens/s, {name}"] = rate
                row[f"dollars per million tokens, {name}"] = price_per_million(rate, arguments.dollars_per_hour)
            print(name, savings[name], file=sys.stderr, flush=True)
    if arguments.data:
        sources = read_sources(read_recipe(arguments.recipe))
        facts = next(source for source in sources if source.holdout == "wording")
        _, stores = encode_corpus(sources, arguments.data, writers[4].tokenizer, arguments.cache)
        for active, row in rows.items():
            row |= quality(writers[active], stores, facts, arguments.data, arguments.documents, arguments.questions)
            print(active, row, file=sys.stderr, flush=True)
    print(table(rows))
    for name, share in savings.items():
        print(f"8 to 4 experts, {name}: {share['median']:.1%} ({share['smallest']:.1%} to {share['largest']:.1%})")
    settings = {name: value for name, value in vars(arguments).items() if name not in ("data", "cache")}
    write_result("experts", {"settings": settings, "saved_time_8_to_4": savings, "rows": rows})


if __name__ == "__main__":
    main()
