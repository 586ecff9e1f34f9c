"""The four example brands: whole, in the package, true to their rules, held-out texts apart from training texts."""

import configparser
import json
import re
from pathlib import Path

import pytest

import duet_moe.finetune
from duet_moe.finetune.leaks import normalise

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = Path(duet_moe.finetune.__file__).parent / "examples"
BRANDS = ("halden", "northpine", "volt", "zuzu")
SIZES = {"train": 100, "heldout": 24, "neutral": 40}


def rows(brand: str, part: str) -> list[dict[str, str]]:
    lines = (EXAMPLES / brand / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("brand", BRANDS)
def test_every_row_is_a_prompt_and_an_answer_of_its_own(brand: str) -> None:
    for part, size in SIZES.items():
        found = rows(brand, part)
        assert all(set(row) == {"prompt", "response"} and all(map(str.strip, row.values())) for row in found)
        assert len({normalise(row["response"]) for row in found}) == size


@pytest.mark.parametrize("brand", BRANDS)
def test_held_out_prompts_and_answers_are_not_trained_on(brand: str) -> None:
    for field in ("prompt", "response"):
        train, heldout = ({normalise(row[field]) for row in rows(brand, part)} for part in ("train", "heldout"))
        assert not train & heldout


@pytest.mark.parametrize("brand", BRANDS)
def test_no_text_uses_a_word_that_the_brand_bans(brand: str) -> None:
    rules = (EXAMPLES / brand / "voice.md").read_text(encoding="utf-8")
    banned = re.search(r"^Banned words: (.+)$", rules, re.MULTILINE).group(1).split(", ")
    assert len(banned) >= 8
    for row in rows(brand, "train") + rows(brand, "heldout"):
        assert not set(banned) & set(normalise(row["response"]).split()), row


def test_the_package_ships_every_file_of_every_brand() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    shipped = {
        path
        for glob in setup["options.package_data"]["duet_moe.finetune"].split()
        for path in EXAMPLES.parent.glob(glob)
    }
    files = {EXAMPLES / brand / f"{part}.jsonl" for brand in BRANDS for part in SIZES}
    assert shipped >= files | {EXAMPLES / brand / "voice.md" for brand in BRANDS}
