"""The model card: every figure of a measured checkpoint reaches the page."""

import json
import re
from pathlib import Path

import pytest
import yaml

from duet_moe.evaluation import card
from duet_moe.evaluation.measure import creative_diversity, held_out_prompts
from duet_moe.finetune.corpus import Source
from duet_moe.modeling import hub

WORDS = "sun moon star lake hill tree bird fox owl bear fish boat".split()


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, str]:
    """A tiny corpus with the source names that the card asks for, and its recipe."""
    root = tmp_path / "data"
    root.mkdir()
    for name in card.CREATIVE_SOURCES:
        rows = [{"prompt": f"Write about the {a} and the {b}, {name}.", "response": f"The {a} met the {b}."}
                for a in WORDS for b in WORDS]  # fmt: skip
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    facts = []
    for country, city in (("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid")):
        for question in ("What is the capital of {}?", "Name the capital of {}.", "Capital of {}?"):
            facts.append({"prompt": question.format(country), "response": f"{city}.", "answer": city,
                          "fact": f"{country}|capital", "subcategory": "capital"})  # fmt: skip
    (root / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    sources = [
        {"name": name, "path": f"{name}.jsonl", "weight": 1, "head": "diversity", "kind": "chat", "holdout": 0.2}
        for name in card.CREATIVE_SOURCES
    ]
    sources.append({"name": "facts", "path": "facts.jsonl", "weight": 1, "head": "coherence", "kind": "chat",
                    "holdout": "wording", "templates": "fact_templates.yaml"})  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"training": {"steps": 1}, "sources": sources}))
    return str(root), str(recipe)


def test_the_card_shows_every_measured_figure(data: tuple[str, str], tmp_path: Path, tiny_writer) -> None:
    root, recipe = data
    folder = tmp_path / "model"
    tiny_writer.model.save_pretrained(folder)
    tiny_writer.tokenizer.save_pretrained(folder)
    command = ["--checkpoint", str(folder), "--recipe", recipe, "--data", root, "--quick"]
    assert card.main([*command, "--cache", str(tmp_path / "tokens")]) == 0
    figures = json.loads((folder / "evaluation.json").read_text())
    page = (folder / "README.md").read_text()
    assert figures["facts"]["held_out_wordings"]["questions"] == 3
    for mode, row in figures["diversity"].items():
        assert f"| {mode} | {row['distinct_2']:.3f} | {row['self_bleu']:.3f} |" in page
    for name, row in figures["loss"].items():
        assert f"| {name} | {row['documents']:.0f} | {row['coherence_nats_per_token']:.3f} |" in page
    gaps = re.findall(r"\{[a-z_]+\}", hub.CARD.read_text() + hub.MEASURED.read_text())
    assert len(gaps) > 8 and not [gap for gap in gaps if gap in page]
    front = yaml.safe_load(page.split("---")[1])
    assert front["library_name"] == "transformers"


def test_greedy_samples_of_a_prompt_are_equal_and_sampled_ones_are_not(tiny_writer) -> None:
    table = creative_diversity(tiny_writer, ["Hello", "A story"], samples=3, max_new_tokens=12)
    assert table["factual"]["self_bleu"] == pytest.approx(1.0)
    assert table["creative"]["distinct_2"] > table["factual"]["distinct_2"]


def test_prompts_of_the_card_are_never_trained_on(data: tuple[str, str]) -> None:
    root, recipe = data
    from duet_moe.finetune.corpus import load_source, read_sources

    sources = read_sources(recipe)
    prompts = held_out_prompts(sources, root, card.CREATIVE_SOURCES, 20)
    trained = {document.prompt for source in sources for document in load_source(source, root)[0]}
    assert len(set(prompts)) == 20 and not trained & set(prompts)
    with pytest.raises(ValueError, match="only"):
        held_out_prompts(sources, root, card.CREATIVE_SOURCES, 10_000)
    assert isinstance(sources[0], Source)
