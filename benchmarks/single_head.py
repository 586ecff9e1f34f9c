"""Is factual mode as right as a model that has one head for everything?

    python benchmarks/single_head.py --data DATA

The control is one head on duet-mini's trunk that begins as the mean of its two heads and goes on learning from the
documents of both (those of the last training run). A model trained with one head from the start would be a better
control, and takes two and a half hours. Reported are shares of right answers on held-out wordings of facts and on
forms of question that training never has: of `factual` and `creative` mode, of the diversity head alone with the
creative mode's sampling, and of the control, greedy and sampled. A result file with hardware and versions goes to
`benchmarks/results/`.
"""

import argparse
import copy
import math
from dataclasses import replace

import numpy as np
import torch
from result_file import write_result

from duet_moe import Mode, Writer
from duet_moe.evaluation.measure import fact_accuracy
from duet_moe.finetune.corpus import Document, load_corpus, read_sources
from duet_moe.finetune.features import TrunkStates, trunk_states
from duet_moe.finetune.objective import ChunkedCrossEntropy
from duet_moe.finetune.progress import Progress
from duet_moe.finetune.settings import read_recipe
from duet_moe.modeling.heads import DuetMoeHead

RECIPE = "mini-sft"
POSITIONS = 2048  # targets of a step


def mixed_documents(data: str, count: int, seed: int) -> list[Document]:
    """Return documents of both heads' sources, as often as the recipe's weights say."""
    sources = read_sources(read_recipe(RECIPE))
    corpus = load_corpus(sources, data)
    generator = np.random.default_rng(seed)
    total = sum(source.weight for source in sources)
    picked: list[Document] = []
    for source in sources:
        train = corpus[source.name][0]
        share = min(len(train), math.ceil(count * source.weight / total))
        picked += [train[index] for index in generator.permutation(len(train))[:share]]
    return picked


def train_control(writer: Writer, states: TrunkStates, steps: int, lr: float, seed: int) -> DuetMoeHead:
    """Return one head that learnt from all of `states`."""
    head = copy.deepcopy(writer.model.coherence_head)
    with torch.no_grad():
        for name, weight in head.named_parameters():
            weight.lerp_(writer.model.diversity_head.get_parameter(name), 0.5)
    head.requires_grad_(True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.98))
    generator, order = np.random.default_rng(seed), []
    with Progress(steps) as progress:
        for step in range(steps):
            picks: list[int] = []
            while sum(len(states[index]["shift_labels"]) for index in picks) < POSITIONS:
                order = order or generator.permutation(len(states)).tolist()
                picks.append(order.pop())
            labels = torch.cat([states[index]["shift_labels"] for index in picks])
            features = head(torch.cat([states[index]["trunk_states"] for index in picks]), only_features=True)
            loss = ChunkedCrossEntropy.apply(features, head.unembed.weight, labels, False) / len(labels)
            optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 10) * (1 - step / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.update(step + 1, {"loss": loss.item()})
    return head.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="duet-mini")
    parser.add_argument("--data", required=True, help="folder that the recipe's paths start from")
    parser.add_argument("--cache", default="runs/states")
    parser.add_argument("--documents", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    writer = Writer.load(arguments.model)
    writer.model.requires_grad_(False)
    facts = next(source for source in read_sources(read_recipe("mini")) if source.holdout == "wording")
    creative = writer.modes["creative"]
    alone = replace(creative, name="alone", head_mix=1.0, plausible_min=0.0)
    modes: dict[str, Mode | str] = {
        "factual mode": "factual",
        "creative mode": "creative",
        "diversity head alone": alone,
    }
    table = fact_accuracy(writer, facts, arguments.data, arguments.questions, arguments.seed, modes)
    documents = mixed_documents(arguments.data, arguments.documents, arguments.seed)
    states = trunk_states(writer.model, documents, writer.tokenizer, arguments.cache, True)
    writer.model.coherence_head = train_control(writer, states, arguments.steps, arguments.lr, arguments.seed)
    control = {
        "one head, greedy": "factual",
        "one head, sampled": replace(alone, head_mix=0.0),
    }
    found = fact_accuracy(writer, facts, arguments.data, arguments.questions, arguments.seed, control)
    results = {name: table[name] | found[name] for name in table}
    for name, row in results.items():
        print(name, {key: round(value, 4) for key, value in row.items()})
    settings = {key: getattr(arguments, key) for key in ("documents", "steps", "lr", "questions", "seed")}
    write_result("single_head", {"settings": settings, "right": results})


if __name__ == "__main__":
    main()
