"""Prefill and decode with very long prompts on a tiny model: time, peak memory and cache bytes per length.

    python benchmarks/long_context.py

Every measurement is a process of its own, so that peak memory is its own. The lengths take turns; reported are medians
with the smallest and the largest value. A result file with hardware and versions goes to `benchmarks/results/`.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

from result_file import write_result

LENGTHS = (16_384, 32_768, 65_536, 131_072)
WINDOW = 4096
DECODED = 64
ROUNDS = 9


def measure(length: int) -> dict[str, float]:
    """Return seconds, MiB and cache bytes of a prompt of `length` tokens and 64 decoded ones."""
    import torch

    from duet_moe import DuetMoeConfig, DuetMoeForCausalLM

    torch.manual_seed(0)
    config = DuetMoeConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW,
    )  # fmt: skip
    model = DuetMoeForCausalLM(config).eval()
    prompt = torch.randint(6, 97, (1, length))
    with torch.no_grad():
        model(prompt[:, :2048], use_cache=True, logits_to_keep=1)  # warm up
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        outputs = model(prompt, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - started
        cache = outputs.cache
        started = time.perf_counter()
        for _ in range(DECODED):
            token = outputs.logits[:, -1:].argmax(-1)
            outputs = model(token, cache=cache, use_cache=True, logits_to_keep=1)
        decode = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    storage = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
    return {
        "tokens": length,
        "prefill_seconds": round(prefill, 2),
        "decode_ms_per_token": round(1000 * decode / DECODED, 2),
        "peak_mib_above_warm_up": round((peak - before) / 1024, 1),
        "cache_bytes": storage,
    }


def summary(runs: list[dict[str, float]]) -> dict[str, float | list[float]]:
    """Return the median of every figure, and the smallest and the largest as `NAME_range`."""
    medians: dict[str, float | list[float]] = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        medians |= {name: statistics.median(values), f"{name}_range": [min(values), max(values)]}
    return {name: value for name, value in medians.items() if name not in ("tokens_range", "cache_bytes_range")}


def main() -> None:
    """Measure all lengths and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, help="measure one length in this process")
    arguments = parser.parse_args()
    if arguments.length:
        print(json.dumps(measure(arguments.length)))
        return
    runs: dict[int, list[dict[str, float]]] = {length: [] for length in LENGTHS}
    for _ in range(ROUNDS):
        for length in LENGTHS:
            command = [sys.executable, __file__, "--length", str(length)]
            run = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[length].append(json.loads(run.stdout.splitlines()[-1]))
            print(runs[length][-1], file=sys.stderr, flush=True)
    rows = [summary(runs[length]) for length in LENGTHS]
    for before, row in zip([None, *rows], rows, strict=False):
        growth = f"{row['prefill_seconds'] / before['prefill_seconds']:.2f}x" if before else "-"
        print(row | {"growth": growth})
    write_result("long_context", {"window": WINDOW, "rounds": ROUNDS, "rows": rows})


if __name__ == "__main__":
    main()
