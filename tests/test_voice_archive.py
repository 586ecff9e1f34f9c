"""Voices as archives: what is exported comes back, and nothing else comes in."""

import errno
import io
import json
import shutil
import stat
import struct
import zipfile
from pathlib import Path

import pytest
from tiny_voice import make_card, make_voice

from duet_moe.finetune import voice_archive
from duet_moe.finetune.voice_adapter import ADAPTER, CONFIG, FILES
from duet_moe.finetune.voices import VoiceCard, VoiceStore

SECRET = "the customer's own words"


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_voice(tmp_path_factory.mktemp("built") / "acme")
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": "/home/ana/models/tiny"}))
    (folder / "corpus.jsonl").write_text(SECRET)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> VoiceStore:
    return VoiceStore(tmp_path / "store")


def pack(path: Path, built: Path, **instead: object) -> Path:
    """Zip the files of a voice; `instead` are bytes in place of a file, or None to leave it out."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in (ADAPTER, CONFIG, "voice.json", "README.md"):
            data = instead.get(name.split(".")[0], (built / name).read_bytes())
            if data is not None:
                archive.writestr(name, data)
    return path


def nothing_there(store: VoiceStore) -> bool:
    return not store.root.exists() or not list(store.root.iterdir())


def test_a_voice_travels_as_an_archive(store: VoiceStore, built: Path, tmp_path: Path) -> None:
    store.publish("acme", built)
    archive = store.export("acme", tmp_path / "acme.zip")
    with zipfile.ZipFile(archive) as opened:
        assert set(opened.namelist()) == {ADAPTER, CONFIG, "voice.json", "README.md"}
        everything = b"".join(opened.read(name) for name in opened.namelist())
    assert SECRET.encode() not in everything and b"/home" not in everything and b"/tmp" not in everything
    other = VoiceStore(tmp_path / "other")
    assert other.import_(archive) == "acme"
    assert (other.path("acme") / ADAPTER).read_bytes() == (built / ADAPTER).read_bytes()
    assert other.card("acme") == store.card("acme")
    assert json.loads((other.path("acme") / CONFIG).read_text())["base_model_name_or_path"] == "tiny"


def test_an_imported_voice_may_take_another_name(store: VoiceStore, built: Path, tmp_path: Path) -> None:
    archive = pack(tmp_path / "x.zip", built, README=b"I am the official voice of somebody else.")
    assert store.import_(archive, "mine") == "mine"
    store.check("mine")
    page = (store.path("mine") / "README.md").read_text()
    assert "# mine" in page and "somebody else" not in page
    with pytest.raises(FileExistsError):
        store.import_(archive, "mine")
    assert store.import_(archive, "mine", replace=True) == "mine"
    with pytest.raises(ValueError, match="no name for a voice"):
        store.import_(archive, "../mine")
    assert [path.name for path in store.root.iterdir()] == ["mine"]


def with_member(built: Path, path: Path, info: zipfile.ZipInfo | str, data: bytes = b"x") -> Path:
    pack(path, built)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, data)
    return path


def typed(name: str, kind: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (kind | 0o777) << 16
    return info


def packed(name: str, method: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.compress_type = method
    return info


@pytest.mark.parametrize(
    ("member", "told"),
    [
        ("../evil.json", "no file of a voice"),
        ("/etc/passwd", "no file of a voice"),
        ("sub/voice.json", "no file of a voice"),
        ("style.json/", "no file of a voice"),
        ("adapter_model.bin", "no file of a voice"),
        ("corpus.txt", "no file of a voice"),
        ("C:\\style.json", "no file of a voice"),
        ("style.json\0.exe", "no file of a voice"),
        ("VOICE.JSON", "no file of a voice"),
        (typed("style.json", stat.S_IFLNK), "link or a device"),
        (typed("style.json", stat.S_IFIFO), "link or a device"),
        (packed("style.json", zipfile.ZIP_LZMA), "unusual way"),
        ("voice.json", "twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_foreign_members_are_refused(
    store: VoiceStore, built: Path, tmp_path: Path, member: zipfile.ZipInfo | str, told: str
) -> None:
    if isinstance(member, str) and "\0" in member:  # zipfile would cut it when writing
        archive = with_member(built, tmp_path / "x.zip", member.replace("\0", "?"))
        archive.write_bytes(archive.read_bytes().replace(b"style.json?", b"style.json\0"))
    else:
        archive = with_member(built, tmp_path / "x.zip", member, b"../../secret")
    with pytest.raises(ValueError, match=told):
        store.import_(archive)
    assert nothing_there(store)
    assert {path.name for path in tmp_path.iterdir()} <= {"store", "x.zip"}


def test_an_encrypted_member_is_refused(store: VoiceStore, built: Path, tmp_path: Path) -> None:
    archive = pack(tmp_path / "x.zip", built)
    data = bytearray(archive.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(data)
    with pytest.raises(ValueError, match="encrypted"):
        store.import_(archive)
    assert nothing_there(store)


def test_a_bomb_is_refused_before_it_is_unpacked(store: VoiceStore, built: Path, tmp_path: Path) -> None:
    archive = pack(tmp_path / "x.zip", built)
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("style.json", b"0" * (FILES["style.json"] + 1))
    assert archive.stat().st_size < 50_000 + sum((built / name).stat().st_size for name in (ADAPTER, CONFIG))
    with pytest.raises(ValueError, match="style.json has 1,048,577 bytes"):
        store.import_(archive)
    assert nothing_there(store)


def test_a_bomb_that_lies_about_its_size_writes_no_more_than_it_says(
    store: VoiceStore, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = pack(tmp_path / "x.zip", built)
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("style.json", b"0" * (8 << 20))
    data = archive.read_bytes()
    archive.write_bytes(data.replace(struct.pack("<I", 8 << 20), struct.pack("<I", 1000)))
    written = io.BytesIO()
    real = shutil.copyfileobj

    def copy(source: io.RawIOBase, target: io.RawIOBase, size: int) -> None:
        try:
            real(source, target, size)
        finally:
            written.write(b"0" * target.tell())

    monkeypatch.setattr(voice_archive.shutil, "copyfileobj", copy)
    with pytest.raises(ValueError, match="no whole zip archive"):
        store.import_(archive)
    whole = sum((built / name).stat().st_size for name in (ADAPTER, CONFIG, "voice.json", "README.md"))
    assert written.tell() <= whole + 1000
    assert nothing_there(store)


def test_an_archive_larger_than_any_voice_is_not_opened(
    store: VoiceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "x.zip").open("wb") as stream:
        stream.truncate(sum(FILES.values()) + 1)  # sparse: takes no room
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(ValueError, match="no voice is that large"):
        store.import_(tmp_path / "x.zip")
    assert nothing_there(store)


@pytest.mark.parametrize("kept", [0, 1, 30, 0.5, 0.99])
def test_an_archive_that_is_cut_off_is_refused(store: VoiceStore, built: Path, tmp_path: Path, kept: float) -> None:
    archive = pack(tmp_path / "x.zip", built)
    data = archive.read_bytes()
    archive.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match="no whole zip archive"):
        store.import_(archive)
    assert nothing_there(store)


def test_an_archive_with_a_flipped_bit_is_refused(store: VoiceStore, built: Path, tmp_path: Path) -> None:
    archive = pack(tmp_path / "x.zip", built)
    data = bytearray(archive.read_bytes())
    data[data.index(ADAPTER.encode()) + 3000] ^= 1
    archive.write_bytes(data)
    with pytest.raises(ValueError, match="CRC"):
        store.import_(archive)
    assert nothing_there(store)


@pytest.mark.parametrize(
    ("instead", "told"),
    [
        ({"adapter_model": None}, "adapter_model.safetensors is missing"),
        ({"adapter_model": b"\x80\x04pickle"}, "not a safetensors file"),
        ({"voice": None}, "voice.json is missing"),
        ({"voice": b"{}"}, "format_version None"),
        ({"adapter_config": b"{}"}, "peft_type"),
    ],
)
def test_an_archive_without_a_whole_voice_is_refused(
    store: VoiceStore, built: Path, tmp_path: Path, instead: dict, told: str
) -> None:
    with pytest.raises((ValueError, OSError), match=told):
        store.import_(pack(tmp_path / "x.zip", built, **instead))
    assert nothing_there(store)


def test_an_archive_with_a_wrong_digest_is_refused(store: VoiceStore, built: Path, tmp_path: Path) -> None:
    card = json.loads((built / "voice.json").read_text()) | {"adapter_sha256": "0" * 64}
    with pytest.raises(ValueError, match="sha256 .* but its card says 0{64}"):
        store.import_(pack(tmp_path / "x.zip", built, voice=json.dumps(card).encode()))
    assert nothing_there(store)


def test_what_is_no_archive_is_refused(store: VoiceStore, built: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "none.zip", tmp_path):
        with pytest.raises(FileNotFoundError, match="no archive"):
            store.import_(path)
    assert nothing_there(store)


def test_a_failed_import_leaves_the_old_voice(
    store: VoiceStore, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish("acme", built)
    archive = store.export("acme", tmp_path / "acme.zip")

    def full(source: io.RawIOBase, target: io.RawIOBase, size: int) -> None:
        target.write(source.read(10))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(voice_archive.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space"):
        store.import_(archive, replace=True)
    store.check("acme")
    assert [path.name for path in store.root.iterdir()] == ["acme"]


def test_an_export_is_whole_or_not_there(
    store: VoiceStore, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish("acme", built)
    (tmp_path / "mine.zip").write_text("mine")
    with pytest.raises(FileExistsError, match="mine.zip"):
        store.export("acme", tmp_path / "mine.zip")
    with pytest.raises(FileNotFoundError):
        store.export("acme", tmp_path / "no" / "such" / "acme.zip")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "write", full)
    with pytest.raises(OSError, match="No space"):
        store.export("acme", tmp_path / "acme.zip")
    assert {path.name for path in tmp_path.iterdir()} == {"store", "mine.zip"}
    assert (tmp_path / "mine.zip").read_text() == "mine"


def test_style_and_recipe_travel_too(store: VoiceStore, built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "with"))
    (folder / "style.json").write_text("{}")
    (folder / "recipe.yaml").write_text("r: 4\n")
    make_card(folder, recipe={"r": 4}).save(folder)
    store.publish("acme", folder)
    other = VoiceStore(tmp_path / "other")
    other.import_(store.export("acme", tmp_path / "acme.zip"))
    assert {path.name for path in other.path("acme").iterdir()} == {
        ADAPTER, CONFIG, "voice.json", "README.md", "style.json", "recipe.yaml",
    }  # fmt: skip
    assert VoiceCard.load(other.path("acme")).recipe == {"r": 4}
