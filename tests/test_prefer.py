"""A voice learns from preferences, on the diversity head alone, from the base or from another voice."""

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import save_tiny, tiny_tokenizer, tokens
from tiny_voice import recorded_starts
from transformers import Trainer

from duet_moe import DuetMoeForCausalLM
from duet_moe.cli import main
from duet_moe.finetune.corpus import Document
from duet_moe.finetune.token_store import encode
from duet_moe.finetune.voice_pairs import Pair, read_voice_pairs
from duet_moe.finetune.voice_recipe import VoiceRecipe
from duet_moe.finetune.voice_records import CorpusError
from duet_moe.finetune.voices import VoiceStore
from duet_moe.modeling.voice_files import WrongBaseError

pytest.importorskip("trl", reason="TRL is not installed: pip install 'duet-moe[finetune]'")
from duet_moe.finetune import prefer as prefer_module  # noqa: E402
from duet_moe.finetune.prefer import _messages, prefer_voice, preferred_share  # noqa: E402

WORDS = "red big old new wet dry hot shy sly coy raw fat fit mad sad odd wry tan low icy".split() * 2
ROWS = [
    {"prompt": f"Say line {i}.", "chosen": f"Boing! {w} fox hops on moon {i}.", "rejected": f"{i} is a {w} number."}
    for i, w in enumerate(WORDS)
]  # fmt: skip
RECIPE = VoiceRecipe(rank=4, dropout=0.0, epochs=3, samples_per_prompt=1, lr=1e-2)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duet_moe.finetune.voice_report.ANSWER_TOKENS", 8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


def prefer(base: Path, store: Path, name: str = "taste", rows: object = ROWS, **changes: object) -> Path:
    return prefer_voice(rows, name, str(base), **({"recipe": RECIPE, "store": store, "show": False} | changes))


@pytest.fixture(scope="module")
def taught(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("duet_moe.finetune.voice_report.ANSWER_TOKENS", 8)
        return prefer(base, tmp_path_factory.mktemp("store"))


def test_chosen_answers_become_likelier_and_factual_mode_stays_bit_identical(taught: Path, base: Path) -> None:
    model, ids = DuetMoeForCausalLM.from_pretrained(base), tokens(2, 12)
    factual = model(ids, head_mix=0.0).logits
    tokenizer, (train, heldout) = tiny_tokenizer(), (lambda read: (read.train, read.heldout))(read_voice_pairs(ROWS))
    before = preferred_share(model, tokenizer, heldout)
    model.load_voice(taught)
    assert torch.equal(model(ids, head_mix=0.0, voice=torch.tensor([0, 0])).logits, factual)
    figures = VoiceStore(taught.parent).card("taste").figures
    assert figures["preferred_before"] == before
    assert figures["preference_loss_before"] == pytest.approx(0.6931, abs=1e-3)  # ln 2: it starts at its reference
    assert figures["preference_loss_after"] < 0.5
    assert figures["reward_accuracy"] == 1.0
    assert figures["heldout_pairs"] == len(heldout) and len(train) + len(heldout) == len(ROWS)
    assert 0 <= figures["style_share_after"] <= 1
    assert not list((taught.parent / ".training").iterdir())
    assert {file.name for file in taught.iterdir()} >= {"adapter_model.safetensors", "recipe.yaml", "voice.json"}


def test_a_voice_goes_on_from_itself_and_stays_as_it_was(
    taught: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: dict[str, torch.Tensor] = {}
    fit = prefer_module._fit

    def seen(job, tuned, *arguments):  # type: ignore[no-untyped-def]
        begun.update({name: weight.clone() for name, weight in get_peft_model_state_dict(tuned).items()})
        return fit(job, tuned, *arguments)

    monkeypatch.setattr(prefer_module, "_fit", seen)
    store = VoiceStore(tmp_path)
    store.publish("taste", taught)
    old = (tmp_path / "taste" / "adapter_model.safetensors").read_bytes()
    other = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]
    further = prefer(base, tmp_path, "further", other, voice="taste", recipe=RECIPE)
    assert (tmp_path / "taste" / "adapter_model.safetensors").read_bytes() == old
    figures = store.card("further").figures
    assert figures["preference_loss_before"] == pytest.approx(0.6931, abs=1e-3)  # its reference is the voice
    taste, after = (load_file(folder / "adapter_model.safetensors") for folder in (taught, further))
    assert taste.keys() == after.keys() and all("ref" not in key for key in after)
    assert all(torch.equal(taste[key], begun[key]) for key in taste)
    assert any(not torch.equal(taste[key], after[key]) for key in taste)
    # without --base the card's own name is taken, which a folder's is not enough to find
    with pytest.raises(FileNotFoundError, match="tiny"):
        prefer_voice(ROWS, "third", store=tmp_path, voice="taste", recipe=RECIPE, show=False)


def test_a_killed_training_goes_on_to_the_same_voice(
    taught: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Trainer._save_checkpoint

    def killed(self, *arguments, **options):  # type: ignore[no-untyped-def]
        plain(self, *arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            prefer(base, tmp_path)
    assert VoiceStore(tmp_path).names() == []
    started = recorded_starts(monkeypatch)
    again = prefer(base, tmp_path)
    assert "checkpoint-" in str(started[0])
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (taught, again))
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_voice_of_another_base_and_an_adapter_on_the_output_matrix_are_refused(
    taught: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    with monkeypatch.context() as patch, pytest.raises(WrongBaseError, match="was trained for 'tiny'"):
        patch.setattr(prefer_module, "_fit", lambda *_: pytest.fail("it was trained"))
        prefer(other, taught.parent, "new", voice="taste")
    with pytest.raises(ValueError, match="without `unembed` among its layers"):
        prefer(base, tmp_path, recipe=VoiceRecipe(rank=4, layers=("down_proj", "unembed")))
    with pytest.raises(FileNotFoundError, match="There is no voice 'nobody'"):
        prefer(base, tmp_path, voice="nobody")


def test_the_command_line_teaches_a_voice(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pairs, recipe = tmp_path / "pairs.jsonl", tmp_path / "recipe.yaml"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    RECIPE.save(recipe)
    options = {"pairs": pairs, "name": "taste", "base": base, "recipe": recipe, "store": tmp_path / "store"}
    assert (
        main(["voice", "prefer", *(part for key, value in options.items() for part in (f"--{key}", str(value)))]) == 0
    )
    shown = capsys.readouterr().out
    assert "Epoch 1 of at most 3: held-out loss" in shown and "chosen answer is likelier" in shown
    assert VoiceStore(tmp_path / "store").names() == ["taste"]


def test_what_trl_reads_is_what_our_own_encoding_gives() -> None:
    tokenizer, pair = tiny_tokenizer(), Pair("Say  it\ntwice. ", " Boing! é", "No.")
    said = _messages(pair)
    for field in ("chosen", "rejected"):
        ids, start = encode([Document(pair.prompt, getattr(pair, field))], tokenizer)[0]
        whole = tokenizer.apply_chat_template(said["prompt"] + said[field], return_dict=True)["input_ids"]
        asked = tokenizer.apply_chat_template(said["prompt"], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        assert whole == ids.tolist() and asked == ids[:start].tolist()


def test_rows_that_are_no_pairs_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    bad = [
        {"prompt": "A?", "chosen": "yes"},
        {"prompt": "B?", "chosen": "Same.", "rejected": "same"},
        {"prompt": None, "chosen": "x y", "rejected": "z"},
        {"prompt": "C?", "chosen": "<|user|> hi", "rejected": "z"},
        {"prompt": "D?", "chosen": ["yes"], "rejected": "z"},
        ROWS[0],
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, *bad]), encoding="utf-8")
    read = read_voice_pairs(file)
    assert len(read.train) + len(read.heldout) == len(ROWS)
    assert not {pair.prompt for pair in read.train} & {pair.prompt for pair in read.heldout}
    assert [(item.line - len(ROWS), item.reason) for item in read.report.skipped] == [
        (1, "no column 'rejected' and 'prompt'"),
        (2, "the chosen and the rejected answer are the same"),
        (3, "no prompt"),
        (4, "the special token <|user|> in a text"),
        (5, "the text is a list, not a string"),
    ]
    assert read_voice_pairs(iter(ROWS)).train == read.train


def test_held_out_pairs_of_ones_own_and_personal_data(tmp_path: Path) -> None:
    held = [row | {"chosen": row["chosen"] + " Write to fox@example.org."} for row in ROWS[:5]]
    read = read_voice_pairs(ROWS, held)
    assert len(read.train) == len(ROWS) - 5 and read.report.overlap_removed == 5
    assert all("[e-mail]" in pair.chosen for pair in read.heldout) and read.report.masked == {"e-mail": 5}
    with pytest.raises(CorpusError, match="personal data"):
        read_voice_pairs(ROWS, held, personal_data="refuse")
    with pytest.raises(ValueError, match="choose one of"):
        read_voice_pairs(ROWS, personal_data="hide")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "too few pairs: 0 pairs to learn from"),
        (ROWS[:8], "too few pairs"),
        ([row | {"prompt": "Say it."} for row in ROWS], "16 and 4 are needed, with different prompts"),
        ([{"text": "no pair"}], "has no column 'chosen' and 'prompt'"),
        ("nowhere.jsonl", "there is no file or folder"),
        (7, "the corpus is a int"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(rows: object, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        read_voice_pairs(rows)
