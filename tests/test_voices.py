"""The voice store: whole voices only, whatever comes in and whenever it stops."""

import errno
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
from tiny_voice import cut, digest, hidden, make_card, make_voice

from duet_moe.finetune import voices
from duet_moe.finetune.voice_adapter import ADAPTER, CONFIG
from duet_moe.finetune.voices import VoiceStore, check_name, store_root, voice_folder

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
