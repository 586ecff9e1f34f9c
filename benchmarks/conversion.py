"""Convert random models of every family, and export one: largest difference of logits, time and peak memory.

    python benchmarks/conversion.py

Each measurement is a process of its own: peak memory is what the process holds above what it held before. The
models are float32, of about 100 MB, so that memory can be set against the checkpoint and its largest layer. Tables
go to standard output, and with hardware and versions to `benchmarks/results/`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from result_file import write_result

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "llama", "mistral")
MODES = ("factual", "creative", "0.5")
SHAPE = dict(
    vocab_size=2048, hidden_size=256, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
    max_position_embeddings=512, initializer_range=0.06, pad_token_id=0, bos_token_id=None, eos_token_id=1,
)  # fmt: skip
EXPERTS = dict(num_experts_per_tok=2)
OWN = {
    "mixtral": dict(num_local_experts=8, intermediate_size=448, **EXPERTS),
    "qwen3_moe": dict(num_experts=16, moe_intermediate_size=224, head_dim=32, norm_topk_prob=True, **EXPERTS),
    "olmoe": dict(num_experts=16, intermediate_size=224, **EXPERTS),
    "llama": dict(intermediate_size=448),
    "mistral": dict(intermediate_size=448, sliding_window=None),
}


def build(family: str, folder: str) -> None:
    """Save a random model of `family`; `duet` is a converted Mixtral whose heads differ."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from duet_moe import DuetMoeForCausalLM

    torch.manual_seed(0)
    kind = "mixtral" if family == "duet" else family
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SHAPE, **OWN[kind]), dtype=torch.float32)
    if family == "duet":
        model = DuetMoeForCausalLM.from_causal_lm(model)
        torch.nn.init.normal_(model.diversity_head.unembed.weight, std=0.06)
    model.save_pretrained(folder, max_shard_size="50MB")


def measure(source: str, out: str, mode: str | None) -> dict[str, float]:
    """Convert or export on disk; returns seconds, bytes and MB of memory at the peak."""
    from duet_moe.modeling.convert import convert
    from duet_moe.modeling.export import export_mixtral

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = peak_mb()
    report = export_mixtral(source, out, mode, show=False) if mode else convert(source, out, show=False)
    shards = [file.stat().st_size / 1e6 for file in Path(out).glob("*.safetensors")]
    return {
        "checkpoint_mb": round(sum(shards)),
        "largest_shard_mb": round(max(shards)),
        "peak_mb": round(peak_mb() - before),
        "seconds": report["seconds"],
    }


def peak_mb() -> float:
    """Return the largest resident memory of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def compare(source: str, out: str, mode: str | None) -> dict[str, float]:
    """Return the largest difference of two models' logits, or of log-probabilities where heads are mixed."""
    import torch
    from transformers import AutoModelForCausalLM

    import duet_moe  # noqa: F401

    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (source, out)]
    mix = {"factual": 0.0, "creative": 1.0, None: 0.0}.get(mode, 0.5)
    ids = torch.randint(6, SHAPE["vocab_size"], (4, 128), generator=torch.Generator().manual_seed(1))
    logits = []
    with torch.no_grad():
        for model in models:
            found = model(ids, **({"head_mix": mix} if model.config.model_type == "duet_moe" else {})).logits
            logits.append(found.log_softmax(-1) if mix == 0.5 else found)
    return {"error": float((logits[0] - logits[1]).abs().max()), "largest_logit": float(logits[0].abs().max())}


def row(name: str, source: Path, out: Path, mode: str | None = None) -> dict[str, object]:
    """Measure and compare, each in a process of its own."""
    own = {"step": "", "source": str(source), "out": str(out), "mode": mode}
    found = {"name": name}
    for step in ("measure", "compare"):
        done = subprocess.run(
            [sys.executable, __file__, "--task", json.dumps(own | {"step": step})],
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


def table(title: str, rows: list[dict[str, object]]) -> str:
    """Return rows as Markdown."""
    lines = [f"| {title} | largest error | largest logit | seconds | peak MB | largest layer MB | checkpoint MB |"]
    lines.append("|---|---|---|---|---|---|---|")
    for found in rows:
        lines.append(
            f"| {found['name']} | {found['error']:.1e} | {found['largest_logit']:.1f} | {found['seconds']:.2f} | "
            f"{found['peak_mb']} | {found['largest_shard_mb']} | {found['checkpoint_mb']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure everything and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", type=json.loads, help="one step in this process")
    task = parser.parse_args().task
    if task and task["step"] == "build":
        build(task["source"], task["out"])
        return
    if task:
        step = measure if task["step"] == "measure" else compare
        print(json.dumps(step(task["source"], task["out"], task["mode"])))
        return
    with tempfile.TemporaryDirectory() as work:
        folders = {name: Path(work) / name for name in (*FAMILIES, "duet")}
        for name, folder in folders.items():
            own = {"step": "build", "source": name, "out": str(folder)}
            subprocess.run([sys.executable, __file__, "--task", json.dumps(own)], check=True)
        converted = [row(name, folders[name], Path(work) / f"{name}-duet") for name in FAMILIES]
        exported = [row(mode, folders["duet"], Path(work) / f"mixtral-{mode}", mode) for mode in MODES]
    print(table("converted from", converted), table("exported", exported), sep="\n\n")
    write_result("conversion", {"converted": converted, "exported": exported}, ("safetensors",))


if __name__ == "__main__":
    main()
