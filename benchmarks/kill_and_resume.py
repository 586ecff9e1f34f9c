"""Kill a training of a voice at random moments, run the same command again, and compare the adapters bit for bit.

    python benchmarks/kill_and_resume.py

A small base of random weights learns the texts of an example brand for many epochs, so that most moments fall into the
training; the others fall into what comes before and after. Prints a line for each kill and writes a result file.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from result_file import write_result

CORPUS = Path(__file__).resolve().parent.parent / "finetune" / "examples" / "volt" / "train.jsonl"
RECIPE = "rank: 4\nepochs: 120\npatience: 120\nsamples_per_prompt: 1\nlr: 1.0e-3\n"


def make_base(folder: Path) -> None:
    """Write a base of random weights with duet-mini's tokenizer."""
    import torch
    from transformers import AutoTokenizer

    from duet_moe import DuetMoeConfig, DuetMoeForCausalLM, bundled

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(bundled("duet-mini"))
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_local_experts=4, sliding_window=64)
    DuetMoeForCausalLM(DuetMoeConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def start(work: Path, store: Path) -> subprocess.Popen:
    """Start the training into `store`."""
    command = [sys.executable, "-m", "duet_moe.cli", "voice", "train", "--corpus", str(CORPUS), "--name", "killed"]
    options = ["--base", str(work / "base"), "--recipe", str(work / "recipe.yaml"), "--store", str(store)]
    return subprocess.Popen(command + options, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def adapter(store: Path) -> str:
    """Return the digest of the published adapter, or nothing where there is none."""
    card = store / "killed" / "voice.json"
    return json.loads(card.read_text(encoding="utf-8"))["adapter_sha256"] if card.is_file() else ""


def main() -> None:
    """Train once without interruption, then with a kill each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    random.seed(asked.seed)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make_base(work / "base")
        (work / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        begun = time.monotonic()
        start(work, work / "whole").wait()
        whole, wanted = time.monotonic() - begun, adapter(work / "whole")
        print(f"uninterrupted: {whole:.1f} s, adapter {wanted[:16]}", flush=True)
        for number in range(asked.kills):
            store, moment = work / str(number), random.uniform(0.3, 1.0) * whole
            process = start(work, store)
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
            process.wait()
            steps = [int(path.name.split("-")[1]) for path in store.glob(".training/killed-*/checkpoint-*")]
            published = bool(adapter(store))
            if not published:
                start(work, store).wait()
            row = {"second": round(moment, 1), "last_checkpoint": max(steps, default=0), "published": published}
            rows.append(row | {"same_adapter": adapter(store) == wanted})
            print(rows[-1], flush=True)
    same = sum(row["same_adapter"] for row in rows)
    print(f"{same} of {len(rows)} ended with the same adapter")
    write_result("kill_and_resume", {"uninterrupted_seconds": whole, "kills": rows, "same": same}, ("peft",))
    sys.exit(same != len(rows))


if __name__ == "__main__":
    main()
