"""The model card: every figure of a measured checkpoint reaches the page."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from duet_moe import bundled
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


@pytest.fixture
def folder(tmp_path: Path, tiny_writer) -> Path:
    tiny_writer.model.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_a_checkpoint_that_tells_nothing_gets_a_card_that_says_so(folder: Path, tiny_writer) -> None:
    page = hub.write_card(folder).read_text()
    total = sum(p.numel() for p in tiny_writer.model.parameters())
    assert "# small" in page and f"{total / 1e6:.1f}M total" in page
    assert "| `factual` | 0.0 | greedy | none |" in page
    assert "treat the origin and the licences of what it learnt from as unknown" in page and "Nothing yet." in page
    assert "model-index" not in page and "license:" not in page
    assert not re.search(r"\{[a-z_]+\}", page)


def test_a_card_shows_the_modes_of_the_checkpoint(folder: Path) -> None:
    settings = json.loads((folder / "generation_config.json").read_text())
    mine = {"name": "mine", "head_mix": 0.25, "do_sample": True, "top_k": 9, "plausible_min": 0.1}
    (folder / "generation_config.json").write_text(json.dumps(settings | {"modes": {"mine": mine}}))
    assert "| `mine` | 0.25 | top_k 9 | plausible_min 0.1 |" in hub.write_card(folder).read_text()


def test_notes_and_history_of_the_folder_reach_the_card_and_its_metadata(folder: Path) -> None:
    (folder / "notes.md").write_text(
        "---\nlicense: cc-by-4.0\nlanguage: [en, pt]\ndatasets: [me/tales]\nbase_model: me/big\ntags: [tales]\n---\n\n"
        "## Training data\n\nTales {with braces}, CC BY.\n"
    )
    (folder / "history.md").write_text("One long night.")
    page = hub.write_card(folder, "me/tales-model").read_text()
    assert (
        "Tales {with braces}, CC BY." in page and "One long night." in page and 'Writer.load("me/tales-model")' in page
    )
    front = ModelCard(page).data
    assert (front.license, front.language, front.datasets, front.base_model) == (
        "cc-by-4.0", ["en", "pt"], ["me/tales"], "me/big",
    )  # fmt: skip
    assert front.tags == ["duet_moe", "moe", "tales"]


def test_what_was_measured_is_what_the_hub_shows(tmp_path: Path) -> None:
    folder = tmp_path / "duet-mini"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "evaluation.json", "history.md"):
        shutil.copy(bundled("duet-mini") / name, folder)
    notes = bundled("duet-mini") / "notes.md"
    assert card.main(["--checkpoint", str(folder), "--notes", str(notes)]) == 0
    page = (folder / "README.md").read_text()
    figures = json.loads((folder / "evaluation.json").read_text())
    shown = {(result.dataset_config, result.metric_name): result.metric_value
             for result in ModelCard(page).data.eval_results}  # fmt: skip
    for questions, row in figures["facts"].items():
        for mode in ("factual", "creative"):
            assert shown[(questions, f"right answers, {mode} mode")] == row[mode]
    assert len(shown) == 4
    assert "CIA World Factbook (public domain)" in page and "license: apache-2.0" in page
    assert f"--checkpoint\nduet-mini --data DATA --seed {figures['seed']}`" in page
    assert (folder / "notes.md").read_text() == notes.read_text()


def test_a_local_folder_is_no_base_model(tmp_path: Path, tiny_writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_writer.model.save_pretrained("runs/mine")
    model = type(tiny_writer.model).from_pretrained("runs/mine")
    assert hub.model_card(model, "me/mine").data.get("base_model") is None
    model.config.name_or_path = "someone/theirs"
    assert hub.model_card(model, "me/mine").data.get("base_model") == "someone/theirs"


def test_no_card_is_made_for_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="not a Duet-MoE checkpoint"):
        hub.write_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
