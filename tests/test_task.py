"""Tasks: those that come with the package ask nothing that training has, and a bad file says what is wrong with it."""

import json
import re
from pathlib import Path

import pytest
import yaml

from duet_moe.cli import make_parser
from duet_moe.evaluation.scores import METRICS, TAKEN_FOR
from duet_moe.evaluation.task import SUITES, TASKS, Task, read_task, tasks_of
from duet_moe.finetune.leaks import normalise
from duet_moe.finetune.style_score import EXAMPLES, WRITTEN

BUNDLED = {task.name: task for suite in ("all", "confirmatory") for task in tasks_of(suite)}
FIELDS = {
    "name": "mine", "version": 1, "suite": "own", "samples": 2, "max_new_tokens": 5,
    "metrics": {"distinct_2": "higher"}, "prompts": ["Hello there"],
}  # fmt: skip

ONE_OF_TWO = {"question": "q", "answer": "a", "options": ["a", "b"]}


def written(tmp_path: Path, **changes: object) -> Path:
    entry = {name: value for name, value in (FIELDS | changes).items() if value is not None}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(entry))
    return tmp_path / "task.yaml"


def test_no_prompt_of_a_task_is_one_of_training() -> None:
    files = [*WRITTEN.glob("*.jsonl"), *EXAMPLES.glob("*/*.jsonl")]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    trained = {normalise(row["prompt"]) for row in rows if row.get("prompt")}
    assert len(trained) > 5000
    for task in BUNDLED.values():
        assert not {normalise(prompt) for prompt in task.prompts} & trained, task.name


def test_exploratory_and_confirmatory_prompts_are_apart_and_alike() -> None:
    creative, confirmatory = BUNDLED["creative"], BUNDLED["creative_confirmatory"]
    assert len(creative.prompts) == len(confirmatory.prompts) == 24
    assert not {normalise(p) for p in creative.prompts} & {normalise(p) for p in confirmatory.prompts}
    assert (creative.metrics, creative.samples) == (confirmatory.metrics, confirmatory.samples)
    for task in (creative, confirmatory):
        for kind in ("story", "tagline", "dialogue|say to each other", "poem|verse", "five", "e-mail"):
            assert sum(any(word in p for word in kind.split("|")) for p in task.prompts) >= 4, (task.name, kind)


def test_all_is_every_suite_but_the_confirmatory_one() -> None:
    assert {task.suite for task in tasks_of("all")} == {"creative", "factual", "style", "cost"}
    assert [task.name for task in tasks_of("confirmatory")] == ["creative_confirmatory"]
    assert {task.suite for task in BUNDLED.values()} | {"all"} == set(SUITES)


def test_facts_are_asked_in_every_wording_of_their_topic() -> None:
    task = BUNDLED["factual_wordings"]
    asked = dict(zip(task.prompts, task.answers, strict=True))
    assert asked["Which place serves as the seat of government of Norway?"] == "Oslo"
    assert asked["If I wanted to visit the capital of Norway, which city would I go to?"] == "Oslo"
    assert asked["How many protons are in one atom of iron?"] == "26"
    entry = yaml.safe_load((TASKS / "factual_wordings.yaml").read_text())
    assert len(task.prompts) == 2 * sum(map(len, entry["facts"].values()))


def test_choices_do_not_favour_a_place() -> None:
    task = BUNDLED["factual_choices"]
    places = [options.index(answer) for options, answer in zip(task.options, task.answers, strict=True)]
    assert task.kind == "choose" and {len(options) for options in task.options} == {4}
    assert max(places.count(place) for place in range(4)) <= len(places) / 3


def test_every_sample_has_a_seed_of_its_own_in_every_run() -> None:
    task = BUNDLED["creative"]
    seeds = [row["seed"] for seed in range(3) for row in task.rows(seed)]
    assert len(set(seeds)) == len(seeds) == 3 * 24 * 8
    rows = task.rows(1)
    assert rows[9]["prompt"] == task.prompts[1] and (rows[9]["index"], rows[9]["sample"]) == (1, 1)


def test_samples_change_where_there_are_several() -> None:
    changed = {task.name: task.samples for task in tasks_of("all", samples=2)}
    assert changed["creative"] == changed["style"] == changed["cost"] == 2
    assert changed["factual_wordings"] == changed["factual_choices"] == 1


def test_a_task_of_ones_own_is_read(tmp_path: Path) -> None:
    (task,) = tasks_of(str(written(tmp_path)))
    assert task == Task("mine", 1, "own", ("Hello there",), 2, 5, {"distinct_2": "higher"})
    assert task.kind == "write"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"metrics": {"charm": "higher"}}, "charm"),
        ({"metrics": {"distinct_2": "up"}}, "'up'"),
        ({"prompts": []}, "needs prompts"),
        ({"prompts": ["a", " "]}, "needs prompts"),
        ({"prompts": [17]}, "put numbers in quotes"),
        ({"prompts": ["Same", "Same"]}, "'Same' twice"),
        ({"samples": 0}, "samples=0"),
        ({"max_new_tokens": "many"}, "max_new_tokens='many'"),
        ({"name": "../mine"}, "'../mine'"),
        ({"version": None}, "version"),
        ({"temperature": 1}, "temperature"),
        ({"prompts": None, "questions": [{"question": "q", "answer": "c", "options": ["a", "b"]}]}, "'c'"),
        ({"prompts": None, "questions": [{"question": "q", "answer": 8}]}, "quotes"),
        ({"prompts": None, "questions": [{"question": "q"}]}, "answer"),
        ({"prompts": None, "questions": [ONE_OF_TWO, {"question": "r", "answer": "a"}]}, "options for all 2"),
    ],
)
def test_a_bad_task_names_the_file_and_the_fault(changes: dict, told: str, tmp_path: Path) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(ValueError) as caught:
        read_task(path)
    assert told in str(caught.value) and str(path) in str(caught.value)


def test_the_page_shows_a_task_that_works_and_every_metric(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "evaluate.md").read_text(encoding="utf-8")
    (tmp_path / "task.yaml").write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    assert len(read_task(tmp_path / "task.yaml").prompts) == 2
    assert {name for name in (*METRICS, TAKEN_FOR) if f"`{name}`" not in page} == set()
    for command in re.findall(r"^duet (.*)$", page, re.MULTILINE):
        asked = make_parser().parse_args(command.split())
        assert asked.suite in SUITES if command.startswith("eval ") else asked.model == "duet-mini"


def test_a_suite_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="'poetry'.*creative"):
        tasks_of("poetry")
    with pytest.raises(ValueError, match="samples=0"):
        tasks_of("creative", samples=0)
    with pytest.raises(FileNotFoundError):
        tasks_of("nowhere.yaml")
