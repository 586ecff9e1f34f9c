"""What many voices in one batch cost: 64 rows on duet-mini with 1, 8 and 64 different voices, against one and none.

    python benchmarks/voices.py

The peer is PEFT's own mixed batch (`adapter_names=`) on the same adapters. All cases take turns in one process;
reported are medians of prefill and of a decoding step, with the smallest and the largest value, and their ratios to
one voice. A result file with hardware and versions goes to `benchmarks/results/`.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from result_file import write_result
from transformers.utils import logging

from duet_moe import DuetMoeForCausalLM, bundled

ROWS = 64
COUNTS = (1, 8, 64)
LINEARS = r"diversity_head\.(gate_proj|up_proj|down_proj|unembed)"


def make_adapters(folder: Path, rank: int) -> list[Path]:
    """Write 64 random adapters of the diversity head."""
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=LINEARS, task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = get_peft_model(load(), config)
    for number in range(ROWS):
        torch.manual_seed(number)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.02)
        model.save_pretrained(folder / f"voice{number}")
    return [folder / f"voice{number}" for number in range(ROWS)]


def load() -> DuetMoeForCausalLM:
    return DuetMoeForCausalLM.from_pretrained(bundled("duet-mini"), dtype=torch.float32).eval()


def timed(forward: Callable, prompt: torch.Tensor, steps: int) -> tuple[float, float]:
    """Return the milliseconds of a prefill and of a decoding step."""
    started = time.perf_counter()
    outputs = forward(prompt, use_cache=True, logits_to_keep=1, head_mix=1.0)
    prefill = time.perf_counter() - started
    cache = outputs.cache
    started = time.perf_counter()
    for _ in range(steps):
        outputs = forward(outputs.logits.argmax(-1), cache=cache, use_cache=True, logits_to_keep=1, head_mix=1.0)
    return 1000 * prefill, 1000 * (time.perf_counter() - started) / steps


def cases(adapters: list[Path], peer: bool) -> dict[str, Callable]:
    """Return a forward function for every case."""
    ours = load()
    for folder in adapters:
        ours.load_voice(folder)
    found: dict[str, Callable] = {"none": ours}
    for count in COUNTS:
        voice = torch.arange(ROWS) % count
        found[f"{count} voices"] = lambda *args, v=voice, **kwargs: ours(*args, voice=v, **kwargs)
    if peer:
        theirs = PeftModel.from_pretrained(load(), adapters[0], adapter_name="voice0").eval()
        for folder in adapters[1:]:
            theirs.load_adapter(folder, adapter_name=folder.name)
        for count in COUNTS:
            names = [f"voice{row % count}" for row in range(ROWS)]
            found[f"PEFT, {count} voices"] = lambda *args, n=names, **kwargs: theirs(*args, adapter_names=n, **kwargs)
    return found


def summary(times: list[tuple[float, float]], one: list[tuple[float, float]]) -> dict[str, object]:
    """Return medians, ranges and ratios to the times with one voice."""
    row: dict[str, object] = {}
    for part, values, base in zip(
        ("prefill", "decode"), zip(*times, strict=True), zip(*one, strict=True), strict=True
    ):
        median = statistics.median(values)
        row[f"{part}_ms"] = round(median, 2)
        row[f"{part}_ms_range"] = [round(min(values), 2), round(max(values), 2)]
        row[f"{part}_to_one_voice"] = round(median / statistics.median(base), 3)
    return row


def main() -> None:
    """Measure all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=64, metavar="N", help="tokens of every row's prompt (64)")
    parser.add_argument("--steps", type=int, default=16, metavar="N", help="decoding steps (16)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="turns of every case (9)")
    parser.add_argument("--rank", type=int, default=16, help="of every voice (16)")
    parser.add_argument("--without-peer", action="store_true", help="leave out PEFT")
    arguments = parser.parse_args()
    logging.set_verbosity_error()  # 64 adapters without a card
    prompt = torch.randint(6, 8192, (ROWS, arguments.prompt), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        forwards = cases(make_adapters(Path(folder), arguments.rank), not arguments.without_peer)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in forwards}
        for turn in range(arguments.rounds + 1):
            for name, forward in forwards.items():
                measured = timed(forward, prompt, arguments.steps)
                if turn:  # the first one warms up
                    times[name].append(measured)
    rows = {name: summary(values, times["1 voices"]) for name, values in times.items()}
    for name, row in rows.items():
        print(f"{name:16}", row)
    write_result("voices", {"rows_of_the_batch": ROWS, **vars(arguments), "cases": rows}, ("peft",))


if __name__ == "__main__":
    main()
