"""What a voice says of itself, and what becomes of it in other hands: its page, its base's checkpoint, PEFT."""

import errno
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel
from tiny import tiny_model, tokens
from tiny_voice import digest, make_card, make_voice, reconfigure

from duet_moe import DuetMoeForCausalLM
from duet_moe.finetune.voices import VoiceCard, merge_voice
from duet_moe.modeling.voice_files import WrongBaseError


@pytest.fixture(scope="session")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_voice(tmp_path_factory.mktemp("built") / "old", seed=1)


@pytest.fixture
def built(old: Path, tmp_path: Path) -> Path:
    """A voice that a test may damage."""
    return Path(shutil.copytree(old, tmp_path / "built"))


def test_the_page_of_a_voice_says_what_it_is(old: Path) -> None:
    page = (old / "README.md").read_text()
    metadata = ModelCard(page).data
    assert (metadata.base_model, metadata.library_name, metadata.license) == ("tiny", "peft", "cc0-1.0")
    assert {"duet_moe", "lora", "voice"} <= set(metadata.tags)
    for told in ("| words | 4,321 |", "| masked: email | 2 |", "| heldout loss: after | 2.25 |", digest(old),
                 "| command | duet voice train --corpus x |", "Ana Lima", 'Writer.load("tiny", voice="acme")',
                 "AutoPeftModelForCausalLM"):  # fmt: skip
        assert told in page
    assert VoiceCard.load(old).figures == {
        "heldout_loss": {"before": 3.5, "after": 2.25}, "command": "duet voice train --corpus x",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("base", "source"),
    [("duet-mini", 'duet_moe.bundled("duet-mini")'), ("ana/duet", '"ana/duet"'), ("mine", '"path/to/mine"')],
)
def test_the_page_says_where_peft_finds_the_base(built: Path, base: str, source: str) -> None:
    card = make_card(built, base={"name": base, "hashes": {"shared": "0" * 64, "trunk": None}})
    assert f"AutoModelForCausalLM.from_pretrained({source})" in card.page()


def test_a_card_cannot_break_its_page(built: Path) -> None:
    make_card(built, author="{sha256} | x", corpus={"a|b": "1\n\n# Title"}).save(built)
    page = (built / "README.md").read_text()
    assert "- Author: {sha256} | x" in page and "| a\\|b | 1  # Title |" in page


def test_a_card_that_cannot_be_written_leaves_the_old_one(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in built.iterdir()}

    def full(path: Path, *args: object, **kwargs: object) -> None:
        path.write_bytes(b"{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        VoiceCard.load(built).save(built)
    assert {path.name: path.read_bytes() for path in built.iterdir()} == before


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("settings", [{}, {"use_dora": True, "use_rslora": True}])
def test_a_merged_model_speaks_with_the_voice_and_its_facts_are_the_bases(
    base: Path, tmp_path: Path, settings: dict
) -> None:
    voice = make_voice(tmp_path / "voice", **settings)
    out = merge_voice(voice, base, tmp_path / "merged")
    plain, merged = (DuetMoeForCausalLM.from_pretrained(folder).eval() for folder in (base, out))
    ids = tokens(2, 12)
    with torch.no_grad():
        assert torch.equal(merged(ids, head_mix=0.0).logits, plain(ids, head_mix=0.0).logits)
        creative, before = merged(ids, head_mix=1.0).logits, plain(ids, head_mix=1.0).logits
        spoken = PeftModel.from_pretrained(plain, str(voice)).eval()(ids, head_mix=1.0).logits
    assert (creative - before).abs().max() > 0.1
    torch.testing.assert_close(creative, spoken, rtol=0, atol=1e-5)
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    page = (out / "README.md").read_text()
    assert page.count("# merged") == 1 and "voice `acme`" in page and digest(voice) in page
    assert (ModelCard(page).data.base_model, ModelCard(page).data.license) == ("tiny", None)
    assert "The licences of both apply" in page and "cc0-1.0" in page
    assert {path.name for path in tmp_path.iterdir()} == {"voice", "merged"}


def test_merging_refuses_another_base_with_both_hashes(old: Path, tmp_path: Path) -> None:
    tiny_model(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(WrongBaseError) as refused:
        merge_voice(old, tmp_path / "other", tmp_path / "merged")
    assert VoiceCard.load(old).base["hashes"]["shared"] in str(refused.value)
    assert str(refused.value).count("'shared': ") == 2
    assert not (tmp_path / "merged").exists()


def test_merging_never_leaves_half_a_model(
    old: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there"):
        merge_voice(old, base, tmp_path / "there")
    with pytest.raises(FileNotFoundError, match="nothing"):
        merge_voice(old, tmp_path / "nothing" / "at" / "all", tmp_path / "merged")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("duet_moe.finetune.voice_merge.copy_companions", full)
    with pytest.raises(OSError, match="No space"):
        merge_voice(old, base, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_peft_alone_loads_a_voice(base: Path, old: Path, tmp_path: Path) -> None:
    voice = Path(shutil.copytree(old, tmp_path / "voice"))
    reconfigure(voice, base_model_name_or_path=str(base))
    ids = tokens(1, 6)
    loaded = AutoPeftModelForCausalLM.from_pretrained(voice).eval()
    wanted = PeftModel.from_pretrained(tiny_model(), str(old)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids, head_mix=1.0).logits, wanted(ids, head_mix=1.0).logits)
