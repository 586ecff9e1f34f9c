"""The style classifier on the example brands: right on unseen texts, honest counts, safe files, readable reasons."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from duet_moe.finetune.style_score import EXAMPLES, Counts, StyleScorer, neutral_texts

BRANDS = ("halden", "northpine", "volt", "zuzu")


def responses(brand: str, part: str) -> list[str]:
    lines = (EXAMPLES / brand / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["response"] for line in lines]


@pytest.fixture(scope="module")
def scorers() -> dict[str, StyleScorer]:
    seen = [text for text in neutral_texts(400) if text not in unseen_neutral()]
    return {brand: StyleScorer.fit(responses(brand, "train"), seen) for brand in BRANDS}


def unseen_neutral() -> list[str]:
    return [text for brand in BRANDS for text in responses(brand, "neutral")[::4]]


@pytest.mark.parametrize("brand", BRANDS)
def test_unseen_texts_are_told_right_nine_times_in_ten(scorers: dict[str, StyleScorer], brand: str) -> None:
    scorer = scorers[brand]
    right = (scorer.share(responses(brand, "heldout")) + 1 - scorer.share(unseen_neutral())) / 2
    assert right >= 0.9 and scorer.balanced_accuracy >= 0.9
    assert scorer.counts.voice == 100 and scorer.counts.neutral > 300


def test_volt_and_zuzu_are_not_taken_for_each_other_nor_for_the_tailor(scorers: dict[str, StyleScorer]) -> None:
    for brand, other in (("volt", "zuzu"), ("zuzu", "volt"), ("halden", "volt"), ("halden", "zuzu")):
        assert scorers[brand].share(responses(other, "heldout")) <= 0.1


def test_classes_that_cannot_be_told_apart_score_no_better_than_chance() -> None:
    texts = neutral_texts(460)[160:]
    scorer = StyleScorer.fit(texts[:60], texts[60:])
    assert scorer.balanced_accuracy < 0.65  # judged on texts that it was fitted on, it would be near 1
    assert scorer.share(texts[:60]) > 0.9


def test_both_accuracies_come_from_the_counts() -> None:
    counts = Counts(voice=10, voice_taken=5, neutral=90, neutral_taken=9)
    assert counts.accuracy == pytest.approx(0.86) and counts.balanced_accuracy == pytest.approx(0.7)


def test_the_same_seed_fits_the_same_scorer_and_another_splits_otherwise() -> None:
    voice, neutral = responses("northpine", "train")[:40], neutral_texts(200)
    first, again, other = (StyleScorer.fit(voice, neutral, seed) for seed in (0, 0, 5))
    asked = responses("northpine", "heldout")
    assert first.counts == again.counts != other.counts
    assert np.array_equal(first.probabilities(asked), again.probabilities(asked))


def test_texts_that_repeat_count_once_and_texts_without_a_word_not_at_all() -> None:
    voice, neutral = responses("volt", "train")[:20], neutral_texts(60)
    again = [*voice, *(text.upper() + " ..." for text in voice), "", "?!"]
    assert StyleScorer.fit(again, neutral).counts == StyleScorer.fit(voice, neutral).counts


def test_too_few_texts_or_a_text_of_both_classes_are_refused() -> None:
    neutral = neutral_texts(50)
    with pytest.raises(ValueError, match="9 different voice texts are too few"):
        StyleScorer.fit(responses("volt", "train")[:9], neutral)
    with pytest.raises(ValueError, match="1 different neutral texts are too few"):
        StyleScorer.fit(responses("volt", "train"), neutral[:1] * 40)
    with pytest.raises(ValueError, match="1 texts are in the voice and in the neutral"):
        StyleScorer.fit([*responses("volt", "train"), neutral[3].upper()], neutral)


def test_a_text_is_judged_alike_alone_and_in_any_batch(scorers: dict[str, StyleScorer]) -> None:
    scorer, texts = scorers["zuzu"], responses("zuzu", "heldout") + unseen_neutral()
    together = scorer.probabilities(texts)
    assert together.shape == (len(texts),) and ((together >= 0) & (together <= 1)).all()
    assert np.array_equal(together, np.concatenate([scorer.probabilities([text]) for text in texts]))
    assert scorer.share(texts) == (together >= 0.5).mean()


def test_silence_is_in_nobodys_style(scorers: dict[str, StyleScorer]) -> None:
    assert all(scorer.probabilities(["", " ... !"]).tolist() == [0.0, 0.0] for scorer in scorers.values())
    assert scorers["volt"].probabilities([]).shape == (0,)
    with pytest.raises(ValueError, match="no texts"):
        scorers["volt"].share([])


def test_reasons_name_what_a_brand_does_loudest_first(scorers: dict[str, StyleScorer]) -> None:
    reasons = scorers["zuzu"].explain("Boing! Wobbly whales want a wash! Ready? Zoom!", n=6)
    assert any(
        line.startswith("+") and "exclamation marks in a sentence: 0.75, usually 0." in line for line in reasons
    )
    votes = [abs(float(line.split()[0])) for line in reasons]
    assert len(votes) == 6 and votes == sorted(votes, reverse=True)
    assert any(line.startswith("-") for line in scorers["halden"].explain("Let's go, guys! It's cheap!", n=3))


def test_votes_and_intercept_add_up_to_the_odds(scorers: dict[str, StyleScorer], tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    scorers["halden"].save(tmp_path)
    text = responses("halden", "heldout")[0]
    odds = sum(float(line.split()[0]) for line in scorers["halden"].explain(text, n=1000))
    odds += float(load_file(tmp_path / "style.safetensors")["intercept"][0])
    assert 1 / (1 + np.exp(-odds)) == pytest.approx(scorers["halden"].probabilities([text])[0], abs=0.02)


def test_a_loaded_scorer_is_equal_to_the_last_bit(scorers: dict[str, StyleScorer], tmp_path: Path) -> None:
    scorers["northpine"].save(tmp_path / "new" / "folder")
    loaded = StyleScorer.load(tmp_path / "new" / "folder")
    asked = responses("northpine", "heldout") + unseen_neutral()
    assert np.array_equal(loaded.probabilities(asked), scorers["northpine"].probabilities(asked))
    assert loaded.counts == scorers["northpine"].counts
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["style.json", "style.safetensors"]


def test_the_files_hold_no_piece_of_the_corpus(tmp_path: Path) -> None:
    secret = [f"Qwxzvj number {n} meets the Zzyrkon of blok {n}." for n in range(20)]
    StyleScorer.fit(secret, neutral_texts(50)).save(tmp_path)
    content = b"".join(file.read_bytes().lower() for file in tmp_path.iterdir())
    assert not [part for part in (b"qwx", b"zvj", b"zyrk", b"blok") if part in content]


def test_damaged_or_foreign_files_are_refused(scorers: dict[str, StyleScorer], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no style\.json"):
        StyleScorer.load(tmp_path)
    scorers["volt"].save(tmp_path)
    card = json.loads((tmp_path / "style.json").read_text())
    for change in ({"format_version": 2}, {"features": card["features"][:-1]}):
        (tmp_path / "style.json").write_text(json.dumps(card | change))
        with pytest.raises(ValueError, match="fit and save the scorer again"):
            StyleScorer.load(tmp_path)
    for broken in ("{", "[]", json.dumps({"format_version": 1}), json.dumps(card | {"counts": {"voice": 1}})):
        (tmp_path / "style.json").write_text(broken)
        with pytest.raises(ValueError, match="damaged"):
            StyleScorer.load(tmp_path)
    (tmp_path / "style.json").write_text(json.dumps(card))
    content = bytearray((tmp_path / "style.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "style.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"has sha256 .*style\.json names"):
        StyleScorer.load(tmp_path)


def test_a_save_that_fails_leaves_the_old_files(
    scorers: dict[str, StyleScorer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorers["volt"].save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(path: Path, content: bytes) -> None:
        path.open("wb").write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        scorers["zuzu"].save(tmp_path)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_neutral_texts_begin_with_plain_ones_and_draw_every_kind_alike() -> None:
    plain = {text for brand in BRANDS for text in responses(brand, "neutral")}
    texts = neutral_texts(400)
    assert len(texts) == 400 and set(texts[:160]) == plain
    assert texts == neutral_texts(400) != neutral_texts(400, seed=1)
    files = {path: path.read_text(encoding="utf-8") for path in (EXAMPLES.parent / "written").glob("*.jsonl")}
    for content in files.values():
        known = {json.loads(line)["response"] for line in content.splitlines()}
        assert len(known & set(texts[160:])) >= 240 // len(files)
