"""What a voice is trained on: enough text, in its language, nothing on both sides, no personal data unasked."""

import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duet_moe.finetune.corpus import Document, is_held_out
from duet_moe.finetune.leaks import normalise
from duet_moe.finetune.voice_corpus import CorpusError, Skipped, VoiceCorpus, read_texts, read_voice_corpus

ENGLISH = (
    "the old boat was lying by a river and nobody from town had carried its lamp into my garden again because every "
    "winter letters were lost under bread or stone while their children watched one candle through that window"
).split()
GERMAN = (
    "der kleine Hund lief heute durch den Garten und bellte laut bis die Nachbarin mit einem Korb voller Brot kam "
    "weil niemand mehr wusste ob das Fenster noch offen war oder schon wieder geschlossen wurde"
).split()


def sentence(number: int, words: Sequence[str] = ENGLISH) -> str:
    """Return 24 words, `number` among them, in an order of its own."""
    return " ".join([*random.Random(number).choices(words, k=23), f"{number}."])


def rows(count: int, start: int = 0) -> list[dict]:
    return [{"prompt": f"Tell me about day {n}.", "response": sentence(n)} for n in range(start, start + count)]


def put(path: Path, content: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def responses(documents: Sequence[Document]) -> list[str]:
    return [document.response for document in documents]


def test_a_share_is_held_out_and_counted() -> None:
    corpus = read_voice_corpus(rows(100))
    assert 5 <= len(corpus.heldout) <= 30
    assert sorted(responses(corpus.train + corpus.heldout)) == sorted(map(sentence, range(100)))
    assert all(is_held_out(document.prompt or "", 0.15) for document in corpus.heldout)
    assert corpus.report.records == len(corpus.train) and corpus.report.heldout_records == len(corpus.heldout)
    assert corpus.report.words == sum(len(text.split()) for text in responses(corpus.train))
    assert corpus.report.notes == () and corpus.report.skipped == ()


@given(st.permutations(range(60)), st.integers(1, 59))
@settings(deadline=None, max_examples=15)
def test_neither_order_nor_division_into_files_matters(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], cut: int
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    content = rows(60) + [{"response": sentence(n).upper()} for n in range(5)] + [{"response": sentence(7)}]
    content += [{"response": sentence(100)}, {"response": sentence(100).upper() + "!"}]
    expected = read_voice_corpus(content, heldout_share=0.3)
    shuffled = [content[index] for index in order] + content[60:][::-1]
    put(folder / "a.jsonl", shuffled[:cut])
    put(folder / "b.jsonl", shuffled[cut:])
    found = read_voice_corpus(folder, heldout_share=0.3)
    assert (found.train, found.heldout) == (expected.train, expected.heldout)
    assert found.report.duplicates == expected.report.duplicates == 1


def assert_disjoint(corpus: VoiceCorpus) -> None:
    held = {normalise(text) for text in responses(corpus.heldout)}
    assert not held & {normalise(text) for text in responses(corpus.train)}


@given(st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70), st.booleans()), max_size=40))
@settings(deadline=None, max_examples=25)
def test_train_and_held_out_share_no_text(pairs: list[tuple[int, int, bool]]) -> None:
    extra = [{"prompt": f"Again {p}?", "response": sentence(n).upper() if up else sentence(n)} for p, n, up in pairs]
    assert_disjoint(read_voice_corpus(rows(60) + extra, heldout_share=0.3))
    assert_disjoint(read_voice_corpus(rows(60), rows(10, 200) + extra[:20]))


def test_texts_that_repeat_half_of_a_held_out_one_are_removed() -> None:
    words = sentence(500).split()
    most, less = " ".join(words[:14]), " ".join(words[:9])
    own = " Nobody ever said why it came about in that way, at least not to me."
    train = rows(40) + [{"text": most + " and so on."}, {"text": less + own}, {"text": sentence(501).upper()}]
    corpus = read_voice_corpus(train, rows(6, 500))
    assert corpus.report.overlap_removed == 2
    assert less + own in responses(corpus.train) and most + " and so on." not in responses(corpus.train)


def test_a_text_too_short_for_runs_is_removed_when_it_repeats() -> None:
    corpus = read_voice_corpus(rows(40) + [{"text": "Coffee: warm!"}], rows(5, 100) + [{"text": "coffee, warm"}])
    assert corpus.report.overlap_removed == 1


def test_the_same_prompt_with_another_answer_is_no_repetition() -> None:
    heldout = [{**row, "response": sentence(n)} for n, row in enumerate(rows(5), 900)]
    assert read_voice_corpus(rows(40), heldout).report.overlap_removed == 0


def test_duplicates_are_those_that_differ_in_case_and_punctuation() -> None:
    twice = [{"prompt": "tell me about day 3", "response": sentence(3).upper() + "!!"}]
    other = [{"prompt": "And day 4?", "response": sentence(4)}]
    corpus = read_voice_corpus(rows(50) + twice + other, rows(5, 100))
    assert corpus.report.duplicates == 1 and corpus.report.records == 51
    assert "duplicates left out: 1" in corpus.report.lines()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "no text that can be used"),
        (rows(1), "1 texts and 24 words; a voice needs 16 texts and 300 words"),
        (rows(7), "too little text: 7 texts"),
        ([{"text": f"Only {n} words here."} for n in range(70)], "70 texts and 280 words"),
    ],
)
def test_too_little_text_says_what_there_is_and_what_is_needed(content: list[dict], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        read_voice_corpus(content, rows(5, 100))


def test_little_text_is_noted() -> None:
    assert "little text: 39 texts" in read_voice_corpus(rows(39), rows(5, 100)).report.notes[0]
    assert "1,500 words" in read_voice_corpus(rows(45), rows(5, 100)).report.notes[0]
    assert read_voice_corpus(rows(80), rows(5, 100)).report.notes == ()


def test_too_few_held_out_texts_say_which_share_would_do() -> None:
    with pytest.raises(CorpusError, match="held-out texts; 4 are needed .* give heldout_share=0") as caught:
        read_voice_corpus(rows(20), heldout_share=0.01)
    share = float(str(caught.value).split("heldout_share=")[1].split(",")[0])
    assert len(read_voice_corpus(rows(20), heldout_share=share).heldout) >= 4
    with pytest.raises(CorpusError, match="3 held-out texts; 4 are needed.*add texts to heldout"):
        read_voice_corpus(rows(40), rows(3, 100))
    same_prompt = [{**row, "prompt": "Write."} for row in rows(40)]
    with pytest.raises(CorpusError, match="needed to judge a training by: .*add texts with other prompts"):
        read_voice_corpus(same_prompt, heldout_share=0.01)


def test_a_corpus_in_another_language_is_refused_with_shares() -> None:
    german = [{"text": sentence(n, GERMAN)} for n in range(40)]
    with pytest.raises(CorpusError, match=r"not in the language 'en', by words: de 80%, en 20%"):
        read_voice_corpus(german + rows(10), rows(5, 100))
    assert read_voice_corpus(german, german[:4] + rows(4), language="de").report.records == 36
    assert read_voice_corpus(german + rows(10), rows(5, 100), language=None).report.records == 50
    with pytest.raises(ValueError, match="language is 'english'; give None .* en, "):
        read_voice_corpus(rows(40), language="english")


def test_single_texts_in_another_language_are_noted() -> None:
    corpus = read_voice_corpus(rows(90) + [{"text": sentence(0, GERMAN)}, {"text": "Merci!"}], rows(5, 100))
    assert corpus.report.notes == ("texts that look like another language than 'en': de (1)",)
    assert corpus.report.records == 92


def test_the_language_check_needs_py3langid(monkeypatch: pytest.MonkeyPatch) -> None:
    from duet_moe.finetune import voice_language

    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    voice_language._identifier.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'duet-moe\[finetune\]', or give language=None"):
        read_voice_corpus(rows(40), rows(5, 100))
    assert read_voice_corpus(rows(40), rows(5, 100), language=None).report.records == 40


def personal(tmp_path: Path) -> Path:
    secret = [
        {"prompt": "Where is jo@mail.org?", "response": sentence(90) + " Call +49 30 1234567."},
        {"prompt": "And now?", "response": sentence(91) + " Or ann@mail.org and bob@mail.org."},
    ]
    return put(tmp_path / "a.jsonl", rows(40) + secret)


def test_personal_data_is_masked_in_prompts_and_texts(tmp_path: Path) -> None:
    corpus = read_voice_corpus(personal(tmp_path), rows(5, 100))
    assert corpus.report.masked == {"e-mail": 3, "phone": 1}
    assert "personal data masked: e-mail (3), phone (1)" in corpus.report.lines()
    asked = {document.prompt: document.response for document in corpus.train}
    assert asked["Where is [e-mail]?"].endswith("Call [phone].")
    assert "mail.org" not in str(corpus)


def test_personal_data_can_be_refused_or_kept(tmp_path: Path) -> None:
    with pytest.raises(CorpusError) as caught:
        read_voice_corpus(personal(tmp_path), rows(5, 100), personal_data="refuse")
    assert "2 texts have personal data" in str(caught.value)
    assert "a.jsonl:41: e-mail, phone" in str(caught.value) and "a.jsonl:42: e-mail" in str(caught.value)
    assert "mail.org" not in str(caught.value) and "1234567" not in str(caught.value)
    kept = read_voice_corpus(personal(tmp_path), rows(5, 100), personal_data="keep")
    assert "jo@mail.org" in str(kept.train) and kept.report.masked == {}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"personal_data": "hide"}, "personal_data is 'hide'; choose one of"),
        ({"heldout_share": 0}, "heldout_share is 0; give a number between 0 and 1"),
        ({"heldout_share": 1.0}, "heldout_share is 1.0"),
    ],
)
def test_wrong_options_say_what_is_allowed(option: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_voice_corpus(rows(40), **option)


def test_bad_rows_are_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "secret place"
    (folder / "deep").mkdir(parents=True)
    put(folder / "good.jsonl", rows(60))
    (folder / "deep" / "bad.jsonl").write_text("{broken\n" * 12)
    put(tmp_path / "held.jsonl", rows(5, 100) + [{"text": 5}])
    report = read_voice_corpus(folder, tmp_path / "held.jsonl").report
    assert report.files == 3 and report.records == 60 and len(report.skipped) == 13
    assert report.skipped[-1] == Skipped("held.jsonl", 6, "the text is a int, not a string")
    assert any(line.startswith("skipped deep/bad.jsonl:1: not JSON") for line in report.lines())
    assert report.lines()[-1] == "... and 3 more"
    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["skipped"][0]["file"] == "bad.jsonl"
    assert "secret place" not in str(plain) and "garden" not in str(plain)


def test_an_unusable_corpus_names_what_was_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\x00\x01" * 50)
    with pytest.raises(CorpusError, match=r"(?s)no text that can be used.*skipped a.txt:1: a binary file"):
        read_voice_corpus(tmp_path)


def test_nothing_of_the_input_is_changed_or_left_beside_it(tmp_path: Path) -> None:
    path = personal(tmp_path)
    before = (path.read_bytes(), os.stat(path).st_mtime_ns)
    content = rows(40)
    read_voice_corpus(path, content[:5] + rows(5, 100))
    assert (path.read_bytes(), os.stat(path).st_mtime_ns) == before
    assert list(tmp_path.iterdir()) == [path] and content == rows(40)


def test_texts_come_whole_in_order_or_not_at_all(tmp_path: Path) -> None:
    content = [{"prompt": "b?", "response": "Second a@b.org"}, {"text": "first"}, {"text": "first"}]
    assert read_texts(put(tmp_path / "a.jsonl", content)) == ["Second [e-mail]", "first", "first"]
    assert read_texts(content, personal_data="keep")[0] == "Second a@b.org"
    with pytest.raises(CorpusError, match="(?s)cannot be used as they are.*skipped texts:2: the text is empty"):
        read_texts([*content[:1], {"text": ""}])
    with pytest.raises(CorpusError):
        read_texts([])
