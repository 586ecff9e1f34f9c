"""The voice store: whole voices only, whatever comes in and whenever it stops; cards and merging."""

import errno
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tokens
from tiny_voice import make_card, make_voice

from duet_moe import DuetMoeForCausalLM
from duet_moe.finetune import voices
from duet_moe.finetune.voice_adapter import ADAPTER, CONFIG, FILES
from duet_moe.finetune.voices import VoiceCard, VoiceStore, check_name, merge_voice, store_root, voice_folder
from duet_moe.modeling.voice_files import WrongBaseError

PREFIX = "base_model.model.diversity_head.unembed"


@pytest.fixture(scope="session")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_voice(tmp_path_factory.mktemp("built") / "old", seed=1)


@pytest.fixture(scope="session")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_voice(tmp_path_factory.mktemp("built") / "new", seed=2)


@pytest.fixture
def store(tmp_path: Path) -> VoiceStore:
    return VoiceStore(tmp_path / "store")


@pytest.fixture
def built(old: Path, tmp_path: Path) -> Path:
    """A voice that a test may damage."""
    return Path(shutil.copytree(old, tmp_path / "built"))


def digest(folder: Path) -> str:
    return VoiceCard.load(folder).adapter_sha256


def hidden(store: VoiceStore) -> list[str]:
    return [path.name for path in store.root.iterdir() if path.name.startswith(".")] if store.root.exists() else []


def test_a_published_voice_is_a_whole_copy_and_only_of_the_files_of_a_voice(store: VoiceStore, built: Path) -> None:
    (built / "corpus.txt").write_text("the customer's own words")
    folder = store.publish("acme", built)
    assert folder == store.root / "acme" == store.path("acme")
    assert store.names() == ["acme"] and hidden(store) == []
    assert {path.name for path in folder.iterdir()} == {ADAPTER, CONFIG, "voice.json", "README.md"}
    assert (folder / ADAPTER).read_bytes() == (built / ADAPTER).read_bytes()
    assert (built / "corpus.txt").exists()
    store.check("acme")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\\b", "/etc", "C:x", "a.b", ".x", "-x", "_x", "a b", "a\n", "a\0", "x" * 65,
     "x" * 300, "ａcme", "acmé", "а" + "cme", "ac\u200dme", "Base", "none", "lora", "NUL", "com1", "__base__", "*"],
)  # fmt: skip
def test_names_that_could_leave_the_store_or_confuse_are_refused(store: VoiceStore, old: Path, name: str) -> None:
    for act in (lambda: check_name(name), lambda: store.publish(name, old), lambda: store.path(name),
                lambda: store.delete(name), lambda: store.card(name), lambda: store.check(name),
                lambda: store.export(name, store.root / "x.zip"), lambda: make_card(old, name)):  # fmt: skip
        with pytest.raises(ValueError, match="voice|name"):
            act()
    assert not store.root.exists()


@pytest.mark.parametrize("name", ["a", "Acme-2_x", "x" * 64, "7up"])
def test_ordinary_names_are_taken(name: str) -> None:
    assert check_name(name) == name


def test_the_place_of_the_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DUET_MOE_VOICES", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert store_root() == Path("/data/duet-moe/voices")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert store_root() == Path.home() / ".local/share/duet-moe/voices"
    monkeypatch.setenv("DUET_MOE_VOICES", "~/mine")
    assert store_root() == Path.home() / "mine"
    assert store_root(tmp_path) == tmp_path


def test_a_voice_is_found_by_folder_and_by_name(store: VoiceStore, old: Path) -> None:
    store.publish("acme", old)
    assert voice_folder("acme", store.root) == store.root / "acme"
    assert voice_folder(old, store.root) == old
    with pytest.raises(FileNotFoundError, match="nobody"):
        voice_folder("nobody", store.root)
    with pytest.raises(FileNotFoundError, match="there are: acme"):
        store.path("nobody")
    with pytest.raises(FileNotFoundError):
        store.delete("nobody")


def test_a_voice_is_replaced_only_when_asked(store: VoiceStore, old: Path, new: Path) -> None:
    store.publish("acme", old)
    with pytest.raises(FileExistsError, match="--replace"):
        store.publish("acme", new)
    assert digest(store.path("acme")) == digest(old)
    store.publish("acme", new, replace=True)
    assert digest(store.path("acme")) == digest(new) != digest(old)
    assert hidden(store) == []


def test_names_that_differ_in_case_alone_clash(store: VoiceStore, old: Path, tmp_path: Path) -> None:
    store.publish("acme", old)
    upper = Path(shutil.copytree(old, tmp_path / "upper"))
    make_card(upper, "ACME").save(upper)
    with pytest.raises(ValueError, match="'ACME' and 'acme'"):
        store.publish("ACME", upper, replace=True)
    assert store.names() == ["acme"]


def test_delete_removes_the_voice_and_what_an_interrupted_replacement_left(store: VoiceStore, old: Path) -> None:
    store.publish("acme", old)
    shutil.copytree(store.path("acme"), store.root / f".acme.old-{1:020d}-00000000")
    store.delete("acme")
    assert store.names() == [] and hidden(store) == []


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> list[str]:
    """Let every call that moves or removes something go through until number `step`, and then none."""
    calls: list[str] = []

    def wrapped(module: object, name: str) -> None:
        real = getattr(module, name)

        def act(*args: object, **kwargs: object) -> object:
            calls.append(name)
            if len(calls) > step:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, act)

    for name in ("rename", "replace", "mkdir", "fsync"):
        wrapped(os, name)
    for name in ("rmtree", "copyfile"):
        wrapped(shutil, name)
    return calls


def test_a_crash_at_any_step_leaves_the_old_or_the_new_voice_whole(
    store: VoiceStore, old: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish("acme", old)
    seen = []
    for step in range(100):
        shutil.rmtree(store.root)
        store.publish("acme", old)
        with monkeypatch.context() as patch:
            calls = crash_at(patch, step)
            try:
                store.publish("acme", new, replace=True)
                break
            except KeyboardInterrupt:
                assert len(calls) > step
        again = VoiceStore(store.root)
        assert again.names() == ["acme"]
        again.check("acme")
        assert voice_folder("acme", store.root) == again.path("acme")
        seen.append(digest(again.path("acme")))
        assert seen[-1] in (digest(old), digest(new))
        again.publish("acme", new, replace=True)  # and nothing that was left is in the way
        assert digest(again.path("acme")) == digest(new)
        assert not [name for name in hidden(again) if ".old-" in name]
    assert {digest(old), digest(new)} == set(seen)
    assert sorted(seen, key=digest(new).__eq__) == seen, "the old one, and from some step on the new one"


def test_a_crash_while_deleting_leaves_a_whole_voice_or_none(
    store: VoiceStore, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish("acme", old)
    for step in range(2):
        with monkeypatch.context() as patch:
            crash_at(patch, step)
            with pytest.raises(KeyboardInterrupt):
                store.delete("acme")
        assert store.names() == ["acme"][step:]
        if step == 0:
            store.check("acme")


@pytest.mark.parametrize("full_at", range(4))
@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_leaves_the_store_as_it_was(
    store: VoiceStore, old: Path, new: Path, monkeypatch: pytest.MonkeyPatch, full_at: int, there: bool
) -> None:
    if there:
        store.publish("acme", old)
    real, copied = shutil.copyfile, []

    def copy_some(source: Path, target: Path) -> None:
        copied.append(target)
        if len(copied) > full_at:
            target.write_bytes(source.read_bytes()[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(voices.shutil, "copyfile", copy_some)
    with pytest.raises(OSError, match="No space left"):
        store.publish("acme", new, replace=True)
    assert store.names() == ["acme"] * there and hidden(store) == []
    if there:
        assert digest(store.path("acme")) == digest(old)
        store.check("acme")


def test_a_copy_that_is_not_what_was_copied_is_not_published(
    store: VoiceStore, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.copyfile

    def lose_the_end(source: Path, target: Path) -> None:
        real(source, target)
        cut(target, target.stat().st_size - 1)

    monkeypatch.setattr(voices.shutil, "copyfile", lose_the_end)
    with pytest.raises((ValueError, OSError), match="damaged|should have"):
        store.publish("acme", old)
    assert store.names() == hidden(store) == []


def test_what_is_published_is_on_the_disk_before_it_counts(
    store: VoiceStore, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("fsync"), sync(file)))
    monkeypatch.setattr(os, "rename", lambda *paths: (done.append("rename"), rename(*paths)))
    store.publish("acme", old)
    assert done == ["fsync"] * 5 + ["rename", "fsync"], "four files and their folder, then the store's own"


def _publish_often(root: Path, built: Path, barrier) -> None:
    barrier.wait(60)
    for _ in range(30):
        VoiceStore(root).publish("acme", built, replace=True)


def test_two_processes_may_publish_one_name_at_once(store: VoiceStore, old: Path, new: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    workers = [context.Process(target=_publish_often, args=(store.root, built, barrier)) for built in (old, new)]
    store.publish("acme", old)
    for worker in workers:
        worker.start()
    barrier.wait(60)
    looks = 0
    while any(worker.is_alive() for worker in workers):
        assert store.names() == ["acme"]  # at every moment
        looks += 1
    assert [worker.exitcode for worker in workers] == [0, 0] and looks > 10
    store.check("acme")
    assert hidden(store) == []


def test_what_an_interrupted_command_left_is_removed_after_a_day(store: VoiceStore, old: Path, new: Path) -> None:
    store.publish("acme", old)
    stale, fresh = store.root / f".x.new-{1:020d}-00000000", store._hidden("x", "new")
    foreign = store.root / ".x.new-mine"
    for path in (stale, fresh, foreign):
        path.mkdir()
    store.publish("acme", new, replace=True)
    assert not stale.exists() and fresh.exists() and foreign.exists()


def rewrite(folder: Path, change) -> None:
    """Change the adapter's tensors and have the card agree."""
    tensors = load_file(folder / ADAPTER)
    change(tensors)
    save_file(tensors, folder / ADAPTER)
    make_card(folder).save(folder)


def reconfigure(folder: Path, **changes: object) -> None:
    settings = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(settings))


def recard(folder: Path, **changes: object) -> None:
    card = json.loads((folder / "voice.json").read_text()) | changes
    (folder / "voice.json").write_text(json.dumps({name: value for name, value in card.items() if value != "GONE"}))


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def same_size_other_bytes(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


DAMAGE = {
    "no adapter": (lambda f: (f / ADAPTER).unlink(), "missing"),
    "no settings": (lambda f: (f / CONFIG).unlink(), "missing"),
    "no card": (lambda f: (f / "voice.json").unlink(), "missing"),
    "cut adapter": (lambda f: cut(f / ADAPTER, 2000), "bytes and should have"),
    "cut header": (lambda f: cut(f / ADAPTER, 50), "cut off"),
    "empty adapter": (lambda f: cut(f / ADAPTER, 0), "not a safetensors file"),
    "pickle": (lambda f: torch.save({"a": torch.zeros(2)}, f / ADAPTER), "not a safetensors file"),
    "one bit": (lambda f: same_size_other_bytes(f / ADAPTER), "sha256"),
    "linked adapter": (lambda f: link(f / ADAPTER), "link"),
    "linked card": (lambda f: link(f / "voice.json"), "link"),
    "a folder": (lambda f: (f / "recipe.yaml").mkdir(), "no file of at most"),
    "huge card": (lambda f: (f / "voice.json").write_text(" " * (1 << 20) + "{}"), "no file of at most"),
    "trunk": (lambda f: rewrite(f, lambda t: t.update(x=torch.zeros(2))), "not LoRA on the diversity head"),
    "coherence": (lambda f: rewrite(f, lambda t: t.update({
        PREFIX.replace("diversity", "coherence") + ".lora_A.weight": torch.zeros(4, 32)})), "coherence_head"),
    "whole layer": (lambda f: rewrite(f, lambda t: t.update({PREFIX + ".weight": torch.zeros(4)})), "not LoRA"),
    "nan": (lambda f: rewrite(f, lambda t: t[PREFIX + ".lora_B.weight"][0].fill_(torch.nan)), "not finite"),
    "integers": (lambda f: rewrite(f, lambda t: t.update({
        PREFIX + ".lora_A.weight": torch.zeros(4, 32, dtype=torch.int32)})), "not finite"),
    "half a pair": (lambda f: rewrite(f, lambda t: t.pop(PREFIX + ".lora_B.weight")), r"lacks lora_B\.weight"),
    "no tensors": (lambda f: rewrite(f, lambda t: t.clear()), "holds no tensors"),
    "another rank": (lambda f: rewrite(f, lambda t: t.update({
        PREFIX + ".lora_A.weight": torch.zeros(5, 32)})), "does not fit rank 4"),
    "settings no json": (lambda f: (f / CONFIG).write_text("{"), "damaged"),
    "settings deep": (lambda f: (f / CONFIG).write_text("[" * 200_000), "damaged"),
    "settings a list": (lambda f: (f / CONFIG).write_text("[]"), "list, not settings"),
    "both heads": (lambda f: reconfigure(f, target_modules=["gate_proj"]), "target_modules"),
    "slow pattern": (lambda f: reconfigure(f, target_modules="(a*)*b"), "target_modules"),
    "no targets": (lambda f: reconfigure(f, target_modules=[]), "target_modules"),
    "code": (lambda f: reconfigure(f, auto_mapping={"parent_library": "os"}), "auto_mapping"),
    "whole modules": (lambda f: reconfigure(f, modules_to_save=["unembed"]), "modules_to_save"),
    "megatron": (lambda f: reconfigure(f, megatron_core="evil"), "megatron_core"),
    "other method": (lambda f: reconfigure(f, peft_type="IA3"), "peft_type"),
    "bias": (lambda f: reconfigure(f, bias="all"), "bias"),
    "no rank": (lambda f: reconfigure(f, r=0), "rank"),
    "card no json": (lambda f: (f / "voice.json").write_text("{"), "damaged"),
    "card deep": (lambda f: (f / "voice.json").write_text("[" * 200_000), "damaged"),
    "card a list": (lambda f: (f / "voice.json").write_text("[]"), "list, not a card"),
    "card binary": (lambda f: (f / "voice.json").write_bytes(b"\xff\xfe\x00"), "damaged"),
    "newer": (lambda f: recard(f, format_version=2, more=1), "upgrade"),
    "no version": (lambda f: recard(f, format_version="GONE"), "format_version None"),
    "lacking digest": (lambda f: recard(f, adapter_sha256="GONE"), "adapter_sha256"),
    "digest no digest": (lambda f: recard(f, adapter_sha256="x"), "64 hexadecimal"),
    "unknown field": (lambda f: recard(f, more=1), "more"),
    "name a path": (lambda f: recard(f, name="../x"), "no name for a voice"),
    "terminal codes": (lambda f: recard(f, author="\x1b[2J"), "author"),
    "author a number": (lambda f: recard(f, author=7), "author"),
    "local time": (lambda f: recard(f, created="2026-01-31T12:00:00"), "UTC"),
    "no time": (lambda f: recard(f, created="yesterday"), "UTC"),
    "base a path": (lambda f: recard(f, base={"name": "/home/me/x"}), "base name"),
    "no hashes": (lambda f: recard(f, base={"name": "x"}), "base hashes"),
    "hash no digest": (lambda f: recard(f, base={"name": "x", "hashes": {"shared": None, "trunk": None}}), "shared"),
    "corpus a text": (lambda f: recard(f, corpus="once upon a time"), "corpus"),
    "infinite figure": (lambda f: recard(f, figures={"loss": float("inf")}), "not plain data"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_voice_is_refused_with_the_reason(store: VoiceStore, built: Path, damage: str) -> None:
    act, told = DAMAGE[damage]
    store.publish("acme", built)
    for folder in (built, store.root / "acme"):
        act(folder)
    with pytest.raises((ValueError, OSError), match=told):
        store.check("acme")
    with pytest.raises((ValueError, OSError), match=told):
        store.export("acme", store.root.parent / "acme.zip")
    assert not [path for path in store.root.parent.iterdir() if "zip" in path.name]
    shutil.rmtree(store.root)
    with pytest.raises((ValueError, OSError), match=told):
        store.publish("acme", built)
    assert not store.root.exists()


def test_a_voice_under_another_name_is_refused(store: VoiceStore, old: Path) -> None:
    with pytest.raises(ValueError, match="'acme', not 'other'"):
        store.publish("other", old)
    store.publish("acme", old)
    (store.root / "acme").rename(store.root / "other")
    with pytest.raises(ValueError, match="holds the voice 'acme'"):
        store.check("other")


def test_a_link_in_the_store_leads_nowhere(store: VoiceStore, old: Path) -> None:
    store.root.mkdir()
    (store.root / "acme").symlink_to(old)
    for act in (lambda: store.path("acme"), lambda: store.delete("acme"), lambda: store.publish("acme", old, True)):
        with pytest.raises(ValueError, match="is a link"):
            act()
    assert store.names() == ["acme"] and (old / ADAPTER).is_file() and hidden(store) == []


def test_dora_and_rslora_and_single_layers_are_voices_too(store: VoiceStore, tmp_path: Path) -> None:
    for number, settings in enumerate(({"use_dora": True}, {"use_rslora": True},
                                       {"target_modules": ["diversity_head.unembed"]})):  # fmt: skip
        store.publish(f"v{number}", make_voice(tmp_path / f"v{number}", f"v{number}", **settings))
    assert store.names() == ["v0", "v1", "v2"]


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


def test_every_file_of_a_voice_has_a_limit() -> None:
    assert FILES.keys() >= {ADAPTER, CONFIG, "voice.json", "README.md", "style.safetensors", "style.json"}
    assert sum(FILES.values()) < 1 << 30
