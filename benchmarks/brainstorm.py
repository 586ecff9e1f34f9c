"""Do spread-out plans move the ideas of one request apart, more than seeds alone?

    python benchmarks/brainstorm.py --evaluator runs/evaluator

Eight answers to each of the 24 prompts of the `creative` task, in three ways: the creative mode with eight seeds,
with eight plans drawn by those seeds, and with eight plans spread out, as `Writer.brainstorm` does. Reported are
Vendi score and dispersion per prompt under the encoder of `duet eval`, and bits per character under an independent
evaluator, with paired 95% intervals over prompts against seeds alone.
"""

import argparse
from dataclasses import replace

import numpy as np
from result_file import write_result

from duet_moe import Writer
from duet_moe.evaluation.bootstrap import interval, paired_interval
from duet_moe.evaluation.encoder import Encoder
from duet_moe.evaluation.evaluator import Evaluator
from duet_moe.evaluation.semantic import dispersion, vendi
from duet_moe.evaluation.task import tasks_of

IDEAS = 8
TOKENS = 80


def ideas(writer: Writer, prompt: str, way: str, guidance: float, seed: int) -> list[str]:
    """Return answers with a word in them."""
    creative = writer.modes["creative"]
    planned = replace(creative, draw_plan=True, plan_guidance=guidance)
    if way == "spread plans":
        texts = writer.brainstorm(prompt, IDEAS, planned, TOKENS, seed)
    else:
        mode = creative if way == "seeds" else planned
        texts = writer.write_batch([prompt] * IDEAS, mode, TOKENS, seed)
    return [text.text for text in texts if any(map(str.isalnum, text.text))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="duet-mini")
    parser.add_argument("--evaluator", required=True, help="folder of an independent language model")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0], help="weights of rule R2")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    writer, encoder = Writer.load(arguments.model), Encoder()
    evaluator = Evaluator.load(arguments.evaluator)
    (task,) = tasks_of("creative")
    ways = [("seeds", 0.0)] + [
        (way, weight) for weight in arguments.guidance for way in ("drawn plans", "spread plans")
    ]
    table: dict[str, dict[str, np.ndarray]] = {}
    for way, guidance in ways:
        rows = []
        for index, prompt in enumerate(task.prompts):
            texts = ideas(writer, prompt, way, guidance, arguments.seed + 1000 * index)
            embedded = encoder.embed(texts)
            bits = evaluator.bits_per_character(texts, [prompt] * len(texts)).mean()
            rows.append((vendi(embedded), dispersion(embedded), float(bits)))
        name = way if way == "seeds" else f"{way}, guidance {guidance:g}"
        table[name] = dict(zip(("vendi", "dispersion", "bits_per_character"), np.array(rows).T, strict=True))
        print(name, {metric: round(float(values.mean()), 3) for metric, values in table[name].items()}, flush=True)
    results = {
        name: {
            metric: {
                "mean": interval(values)._asdict(),
                "above_seeds": None if name == "seeds" else paired_interval(values, table["seeds"][metric])._asdict(),
            }
            for metric, values in own.items()
        }
        for name, own in table.items()
    }
    write_result("brainstorm", results)


if __name__ == "__main__":
    main()
