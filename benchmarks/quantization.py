"""Bytes, held-out loss, speed and reload difference of duet-mini in bf16, 8 and 4 bits, and of a Mixtral-shaped model.

    python benchmarks/quantization.py --data DATA

DATA is the folder that the recipe's sources start from, as for `duet pretrain`. Every form is loaded from the bundled
checkpoint, saved, and loaded again. Needs bitsandbytes and torchao. A result file with hardware and versions goes to
`benchmarks/results/`.
"""

import argparse
import statistics
import sys
import tempfile
import time

import torch
from result_file import write_result
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

from duet_moe import DuetMoeConfig, DuetMoeForCausalLM, bundled
from duet_moe.finetune.corpus import read_sources
from duet_moe.finetune.heldout import heldout_losses
from duet_moe.finetune.packing import TokenStore, encode_corpus
from duet_moe.finetune.settings import read_recipe
from duet_moe.modeling.footprint import bytes_by_group

BF16 = torch.bfloat16
FORMS = {
    "bf16": None,
    "8-bit": BitsAndBytesConfig(load_in_8bit=True),
    "4-bit, nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=BF16),
    "4-bit, nf4, double": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=BF16, bnb_4bit_use_double_quant=True
    ),
    "4-bit, defaults": BitsAndBytesConfig(load_in_4bit=True),  # fp4, computed in float32
    "torchao int8": TorchAoConfig(Int8WeightOnlyConfig()),
}
# Mixtral 8x7B with every width divided by 16, so that the groups weigh what they do there.
SHRINK = 16
MIXTRAL = dict(
    vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
)  # fmt: skip
MIXTRAL_SMALL = MIXTRAL | {
    name: MIXTRAL[name] // SHRINK for name in ("vocab_size", "hidden_size", "intermediate_size")
}
MIXTRAL_SMALL |= dict(num_attention_heads=8, num_key_value_heads=2)


def measure(model: DuetMoeForCausalLM, stores: list[TokenStore], documents: int) -> dict[str, object]:
    """Return the bytes, losses and reload difference of one model."""
    losses = heldout_losses(model, stores, documents, max_tokens=512)
    scored = sum(loss["tokens"] for loss in losses.values())
    mean = {
        head: sum(loss[head] * loss["tokens"] for loss in losses.values()) / scored
        for head in ("coherence", "diversity")
    }
    return {
        "bytes": bytes_by_group(model),
        "heldout_tokens": scored,
        "nats_per_token": mean,
        "largest_reload_difference": reload_difference(model),
        "sources": losses,
    }


def decode_rates(models: dict[str, DuetMoeForCausalLM], tokens: int, rounds: int = 7) -> dict[str, float]:
    """Return tokens per second of a single factual answer by form: the models take turns, the median counts."""
    prompt = torch.arange(6, 14)[None]
    rates: dict[str, list[float]] = {form: [] for form in models}
    for _ in range(rounds + 1):  # the first one warms up
        for form, model in models.items():
            started = time.perf_counter()
            model.generate(prompt, mode="factual", max_new_tokens=tokens, min_new_tokens=tokens)
            rates[form].append(tokens / (time.perf_counter() - started))
    return {form: round(statistics.median(measured[1:]), 1) for form, measured in rates.items()}


@torch.no_grad()
def reload_difference(model: DuetMoeForCausalLM) -> float:
    """Return the largest difference of any logit of either head after saving and loading."""
    ids = torch.arange(6, 134).view(2, 64)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = DuetMoeForCausalLM.from_pretrained(folder)
        pairs = [[m(ids, head_mix=mix).logits for m in (model, again)] for mix in (0.0, 1.0)]
    return max(float((first - second).abs().max()) for first, second in pairs)


def mixtral_small() -> dict[str, dict[str, int]]:
    """Return the bytes by group, per form, of a model with random weights and Mixtral's proportions."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        DuetMoeForCausalLM(DuetMoeConfig(**MIXTRAL_SMALL)).to(BF16).save_pretrained(folder)
        return {
            form: bytes_by_group(DuetMoeForCausalLM.from_pretrained(folder, quantization_config=config))
            for form, config in FORMS.items()
        }


def mixtral_full() -> dict[str, int]:
    """Return the bytes by group of the full shape in 4 bits, by arithmetic: 4.5 bits a weight where it is packed."""
    with torch.device("meta"):
        model = DuetMoeForCausalLM(DuetMoeConfig(**MIXTRAL)).to(BF16)
    sizes = bytes_by_group(model)
    for group in ("attention", "experts"):
        sizes[group] = sizes[group] * 9 // 32
    return sizes | {"total": sum(size for name, size in sizes.items() if "total" not in name)}


def table(rows: list[dict], mixtral: dict[str, dict[str, int]]) -> str:
    """Return the figures as the table of docs/quantisation.md."""
    lines = [_line("", [row["form"] for row in rows]), "|---|" + "---:|" * len(rows)]
    for group in [name for name in rows[0]["bytes"] if name != "bf16_total"]:
        lines.append(_line(f"{group.replace('_', ' ')}, kB", [f"{row['bytes'][group] / 1e3:,.0f}" for row in rows]))
    shares = [[sizes["total"] / sizes["bf16_total"] for sizes in (row["bytes"], mixtral[row["form"]])] for row in rows]
    lines.append(_line("share of bf16", [f"{own:.3f}" for own, _ in shares]))
    lines.append(_line("the same, Mixtral's shape", [f"{other:.3f}" for _, other in shares]))
    for head in ("coherence", "diversity"):
        losses = [row["nats_per_token"][head] for row in rows]
        cells = [f"{loss:.4f} ({loss / losses[0] - 1:+.2%})" for loss in losses]
        lines.append(_line(f"{head} head, nats per token", cells))
    lines.append(_line("tokens/s, factual, one answer", [f"{row['tokens_per_second']:.0f}" for row in rows]))
    lines.append(_line("largest reload difference", [f"{row['largest_reload_difference']:g}" for row in rows]))
    return "\n".join(lines)


def _line(label: str, cells: list[str]) -> str:
    return f"| {label} | " + " | ".join(cells) + " |"


def main() -> None:
    """Measure all forms, print the table and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder that the recipe's paths start from")
    parser.add_argument("--cache", default="runs/tokens", help="folder of tokenised text")
    parser.add_argument("--recipe", default="mini", help="recipe whose held-out sides are measured")
    parser.add_argument("--documents", type=int, default=40, help="of each source (40)")
    parser.add_argument("--tokens", type=int, default=64, help="decoded for the speed (64)")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(bundled("duet-mini"))
    sources = read_sources(read_recipe(arguments.recipe))
    _, stores = encode_corpus(sources, arguments.data, tokenizer, arguments.cache)
    models = {
        form: DuetMoeForCausalLM.from_pretrained(bundled("duet-mini"), quantization_config=config)
        for form, config in FORMS.items()
    }
    rates = decode_rates(models, arguments.tokens)
    rows = []
    for form, model in models.items():
        figures = measure(model, stores, arguments.documents)
        rows.append({"form": form, "tokens_per_second": rates[form]} | figures)
        print(form, rates[form], figures["nats_per_token"], file=sys.stderr, flush=True)
    mixtral = mixtral_small()
    print(table(rows, mixtral))
    full = mixtral_full()
    print(f"Mixtral 8x7B's own shape in 4 bits: {full['total'] / 1e9:.1f} GB of {full['bf16_total'] / 1e9:.1f} GB")
    figures = {
        "documents_per_source": arguments.documents,
        "rows": rows,
        "mixtral_shape_divided_by_16": mixtral,
        "mixtral_shape_4_bit_by_arithmetic": full,
    }
    write_result("quantization", figures, ("bitsandbytes", "torchao"))


if __name__ == "__main__":
    main()
