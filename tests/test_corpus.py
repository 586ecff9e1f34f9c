"""What is read, what is skipped, and what must never be on both sides of the hold-out line."""

import json
import logging
import lzma
from pathlib import Path

import pytest
import yaml

from duet_moe.finetune.corpus import RECIPES, Document, Source, load_corpus, load_source, read_sources
from duet_moe.finetune.fact_wordings import evaluation_questions, extra_wordings, group_facts, is_right, read_templates
from duet_moe.finetune.leaks import MADE_UP, normalise, without_leaks
from duet_moe.finetune.story_prompts import story_prompts

EVALUATION = Path(__file__).parents[1] / "evaluation" / "tasks" / "fact_wordings.yaml"


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (lzma.open if path.suffix == ".xz" else open)(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def capital_rows(countries: dict[str, str]) -> list[dict]:
    wordings = (
        ("What is the capital of {}?", "The capital of {} is {}."),
        ("What's the capital city of {}?", "{1}."),
        ("Name the capital of {}.", "The capital of {} is {}."),
    )
    return [
        {
            "prompt": prompt.format(country),
            "response": response.format(country, capital),
            "answer": capital,
            "fact": f"{country}|capital",
            "subcategory": "capital",
        }
        for country, capital in countries.items()
        for prompt, response in wordings
    ]


COUNTRIES = {"France": "Paris", "Peru": "Lima", "Kenya": "Nairobi", "Japan": "Tokyo", "the Gambia": "Banjul"}


@pytest.fixture
def facts(tmp_path: Path) -> Source:
    write_rows(tmp_path / "facts.jsonl", capital_rows(COUNTRIES))
    return Source("facts", "facts.jsonl", 1, "coherence", "chat", holdout="wording", templates="fact_templates.yaml")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.xz", "a.json"])
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    texts = ["one small text", "zweiter Text: äöü"]
    if name.endswith(".txt"):
        (tmp_path / name).write_text("<|endoftext|>".join(texts), encoding="utf-8")
    elif name.endswith(".json"):
        (tmp_path / name).write_text(json.dumps([{"text": text} for text in texts]), encoding="utf-8")
    else:
        write_rows(tmp_path / name, [{"text": text} for text in texts])
    train, heldout = load_source(Source("a", name, 1, holdout=0), tmp_path)
    assert [document.response for document in train] == texts
    assert heldout == []


def test_a_folder_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("first")
    (tmp_path / "in" / "deep" / "b.txt").write_text("second")
    (tmp_path / "in" / "notes.md").write_text("not training text")
    train, _ = load_source(Source("a", "in", 1, holdout=0), tmp_path)
    assert {document.response for document in train} == {"first", "second"}


def test_texts_of_the_package_need_no_data_folder(tmp_path: Path) -> None:
    source = Source("own", ["package:written/*.jsonl", "a.jsonl"], 1, kind="chat", holdout=0)
    write_rows(tmp_path / "a.jsonl", [{"prompt": "Who?", "response": "A fox of the data folder."}])
    train, _ = load_source(source, tmp_path)
    assert len(train) > 1000 and "A fox of the data folder." in {document.response for document in train}


def test_bad_rows_are_named_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{broken\n["list"]\n{"text": ""}\n{"text": 7}\n')
    with caplog.at_level(logging.WARNING):
        train, _ = load_source(Source("a", "a.jsonl", 1, holdout=0), tmp_path)
    assert [document.response for document in train] == ["good"]
    for line in (2, 3, 4, 5):
        assert f"a.jsonl line {line}:" in caplog.text
    assert "4 rows skipped" in caplog.text


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{broken\n")
    with pytest.raises(ValueError, match="nothing usable"):
        load_source(Source("a", "a.jsonl", 1), tmp_path)
    with pytest.raises(ValueError, match=r"no .* file matches 'b\*'"):
        load_source(Source("b", "b*", 1), tmp_path)


@pytest.mark.parametrize("wrong", [{"head": "both heads"}, {"kind": "x"}, {"weight": 0}, {"holdout": 1.0}])
def test_impossible_sources_say_what_is_allowed(wrong: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        Source(**{"name": "a", "path": "a", "weight": 1, **wrong})


def test_context_filters_and_fields(tmp_path: Path) -> None:
    rows = [
        {"q": "Who?", "response": "A fox.", "context": "A fox ran.", "topic": "a", "number": 1},
        {"q": "Where?", "response": "One two three four.", "topic": "a", "number": 2},
        {"q": "When?", "response": "Now.", "topic": "b", "number": 3},
        {"q": "Why?", "response": "So.", "topic": "a", "number": 9},
    ]
    write_rows(tmp_path / "a.jsonl", rows)
    common = {"name": "a", "path": "a.jsonl", "weight": 1, "kind": "chat", "holdout": 0, "fields": {"prompt": "q"}}
    where = {"topic": {"not": ["b"]}, "number": {"max": 3}}
    before, _ = load_source(Source(**common, where=where, max_response_words=3), tmp_path)
    assert [(document.prompt, document.response) for document in before] == [("A fox ran.\nWho?", "A fox.")]
    after, _ = load_source(Source(**common, context="after", where={"topic": ["b", "a"]}), tmp_path)
    assert after[0].prompt == "Who?\nA fox ran."
    assert len(after) == 4


def test_held_out_documents_do_not_depend_on_order(tmp_path: Path) -> None:
    rows = [{"text": f"text number {number}"} for number in range(300)]
    write_rows(tmp_path / "a.jsonl", rows)
    write_rows(tmp_path / "b.jsonl", rows[::-1])
    first = load_source(Source("a", "a.jsonl", 1, holdout=0.2), tmp_path)
    second = load_source(Source("b", "b.jsonl", 1, holdout=0.2), tmp_path)
    assert {document.response for document in first[1]} == {document.response for document in second[1]}
    assert 30 < len(first[1]) < 90
    assert len(first[0]) + len(first[1]) == 300


def test_a_group_stays_on_one_side(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{ask} {number}?", "response": f"Answer {number}."}
        for number in range(100)
        for ask in ("What is", "Tell me,", "Do you know")
    ]
    write_rows(tmp_path / "a.jsonl", rows)
    train, heldout = load_source(Source("a", "a.jsonl", 1, kind="chat", holdout=0.3, group="response"), tmp_path)
    assert heldout
    assert not {document.response for document in train} & {document.response for document in heldout}


def test_same_text_never_crosses_between_sources(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": f"A story about {number}!"} for number in range(200)])
    write_rows(tmp_path / "b.jsonl", [{"text": f"a story, about {number}"} for number in range(200)])
    sources = [Source("a", "a.jsonl", 1, holdout=0.2), Source("b", "b.jsonl", 1, holdout=0)]
    corpus = load_corpus(sources, tmp_path)
    trained = {normalise(document.response) for train, _ in corpus.values() for document in train}
    held = {normalise(document.response) for _, heldout in corpus.values() for document in heldout}
    assert held
    assert not trained & held
    assert len(corpus["b"][0]) == 200 - len(corpus["a"][1])


def test_a_retold_passage_is_a_leak() -> None:
    sentences = [
        f"The old woman number {n} walked through the dark forest to the house of her brother." for n in "123"
    ]
    story = Document(None, " ".join(sentences) + " The end.")
    passage = Document(" ".join(sentences) + "\nWho walked?", "The old woman.")
    other = Document(None, sentences[0] + " Nothing else is the same.")
    corpus = without_leaks({"stories": ([], [story]), "questions": ([passage, other], [])})
    assert corpus["questions"][0] == [other]


def test_exactly_one_wording_of_every_fact_is_held_out(tmp_path: Path, facts: Source) -> None:
    train, heldout = load_corpus([facts], tmp_path)["facts"]
    assert sorted(document.meta["fact"] for document in heldout) == sorted(f"{name}|capital" for name in COUNTRIES)
    trained = {normalise(document.prompt or "") for document in train}
    assert not trained & {normalise(document.prompt or "") for document in heldout}
    for country, capital in COUNTRIES.items():
        of_fact = [document for document in train if document.meta["fact"] == f"{country}|capital"]
        assert len(of_fact) > 6
        assert all(is_right(document.response, capital) for document in of_fact)
    assert len({document.prompt for document in heldout}) == len(heldout)


def test_a_fact_with_two_wordings_keeps_both(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", capital_rows({"France": "Paris"})[:2])
    train, heldout = load_source(Source("a", "a.jsonl", 1, kind="chat", holdout="wording"), tmp_path)
    assert len(train) == 2
    assert heldout == []


def test_extra_wordings_name_the_entity_and_keep_the_answer_form() -> None:
    documents = [
        Document(row["prompt"], row["response"], {key: row[key] for key in ("fact", "subcategory", "answer")})
        for row in capital_rows({"the Gambia": "Banjul"})
    ]
    templates = read_templates(RECIPES / "fact_templates.yaml")
    (fact,) = group_facts(documents, templates)
    assert fact.entity == "the Gambia"
    responses = {d.prompt: d.response for d in extra_wordings(fact, templates["capital"])}
    assert responses["The Gambia capital"] == "Banjul."
    assert responses["Tell me the capital of the Gambia."] == "The capital of the Gambia is Banjul."


def test_a_template_without_its_entity_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text('wordings: {capital: {sentence: ["Which city is it?"]}}')
    with pytest.raises(ValueError, match="Which city is it"):
        read_templates(tmp_path / "t.yaml")


def test_evaluation_templates_are_new() -> None:
    training = read_templates(RECIPES / "fact_templates.yaml")
    evaluation = yaml.safe_load(EVALUATION.read_text(encoding="utf-8"))["wordings"]
    assert set(training) == set(evaluation)
    for topic, wordings in evaluation.items():
        assert len(wordings) == 2
        assert all("{entity}" in wording for wording in wordings)
        known = training[topic].sentence + training[topic].short
        assert not {normalise(wording) for wording in wordings} & {normalise(wording) for wording in known}


def test_evaluation_questions_carry_their_answer(tmp_path: Path, facts: Source) -> None:
    train, heldout = load_source(facts, tmp_path)
    grouped = group_facts(train + heldout, read_templates(RECIPES / "fact_templates.yaml"))
    questions = evaluation_questions(EVALUATION, grouped)
    assert len(questions) == 2 * len(COUNTRIES)
    assert not {normalise(q.prompt or "") for q in questions} & {normalise(d.prompt or "") for d in train}
    peru = [question for question in questions if "Peru" in (question.prompt or "")]
    assert {question.meta["answer"] for question in peru} == {"Lima"}


@pytest.mark.parametrize(
    ("output", "answer", "right"),
    [("It is S.", "S", True), ("It is Sulfur.", "S", False), ("the  PACIFIC ocean", "The Pacific Ocean", True)],
)
def test_an_answer_counts_as_whole_words(output: str, answer: str, right: bool) -> None:
    assert is_right(output, answer) is right


def test_story_prompts_ask_for_what_the_story_tells() -> None:
    text = "Once there was a clever dog named Max. The dog saw an owl. The owl helped the dog. The dog was happy."
    prompts = story_prompts(Document(None, text), 3)
    assert 1 <= len(prompts) <= 3
    assert all(document.response == text and MADE_UP in document.meta for document in prompts)
    assert any("dog" in (document.prompt or "") for document in prompts)
    assert prompts == story_prompts(Document(None, text), 3)
    assert story_prompts(Document(None, "Hm. No."), 3) == []


@pytest.mark.parametrize("recipe", ["mini", "mini-sft"])
def test_bundled_recipes_are_valid_and_never_touch_evaluation_data(recipe: str) -> None:
    sources = read_sources(recipe)
    paths = [path for source in sources for path in ([source.path] if isinstance(source.path, str) else source.path)]
    forbidden = ("eval/", "guardrails/", "style/", "written/brands", "written/router")
    assert not [path for path in paths if path.startswith(forbidden) or path == "written/*.jsonl"]
    assert {source.head for source in sources} >= {"coherence", "diversity"}
    if recipe == "mini-sft":
        assert all(source.kind == "chat" or source.prompts for source in sources)


def test_a_recipe_without_sources_or_with_twins_is_refused() -> None:
    with pytest.raises(ValueError, match="no sources"):
        read_sources({"sources": []})
    twin = {"name": "a", "path": "a", "weight": 1}
    with pytest.raises(ValueError, match="names repeat"):
        read_sources({"sources": [twin, twin]})
