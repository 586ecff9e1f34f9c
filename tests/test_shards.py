"""Checkpoints on disk: damaged ones are refused, interrupted ones go on, full disks leave nothing that loads."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from full_disk import files_no_larger_than
from sources import assert_answers_equal, edit_json, save_source, source_model

import duet_moe
from duet_moe import DuetMoeForCausalLM
from duet_moe.cli import main
from duet_moe.modeling import shards as shards_module
from duet_moe.modeling.convert import convert
from duet_moe.modeling.shards import ShardWriter
from duet_moe.modeling.weights import Weight

ROOT = Path(duet_moe.__file__).resolve().parent.parent


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    return save_source(source_model("mixtral"), tmp_path / "source")


def cut_short(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-100])


def become_pickle(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def name_another_shard(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    edit_json(path, weight_map=weight_map | {"lm_head.weight": weight_map["model.norm.weight"]})


DAMAGE = {
    "holds lm_head.weight, but it does not": name_another_shard,
    "damaged or cut short": cut_short,
    "is missing, though": lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(),
    "pickle": become_pickle,
    "has no config.json": lambda folder: (folder / "config.json").unlink(),
    "config.json is not JSON": lambda folder: (folder / "config.json").write_text("{"),
    "not a possible configuration": lambda folder: edit_json(folder / "config.json", hidden_size="wide"),
    "contradict each other": lambda folder: edit_json(folder / "generation_config.json", do_sample=False),
}


@pytest.mark.parametrize("told", DAMAGE)
def test_a_damaged_source_is_refused_before_anything_is_written(
    told: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = save_source(source_model("mixtral"), tmp_path / "source", max_shard_size="60KB")
    DAMAGE[told](folder)
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 1
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_folder_that_holds_something_is_left_alone(mixtral: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert(mixtral, tmp_path / "out", show=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(FileExistsError, match="exists already"):
        convert(mixtral, tmp_path / "out", show=False)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"other\.partial is left from another"):
        convert(mixtral, tmp_path / "other", show=False)


def test_an_interrupted_conversion_does_not_load_and_goes_on(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    write_shard = ShardWriter._write_shard

    def stop_at_the_third(self: ShardWriter, name: str, *rest: object) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(name)
        write_shard(self, name, *rest)

    monkeypatch.setattr(ShardWriter, "_write_shard", stop_at_the_third)
    assert main(["convert", str(mixtral), str(tmp_path / "out")]) == 130
    monkeypatch.setattr(ShardWriter, "_write_shard", lambda *args: written.append(args[1]) or write_shard(*args))
    partial = tmp_path / "out.partial"
    assert not (tmp_path / "out").exists()
    with pytest.raises((OSError, ValueError)):
        DuetMoeForCausalLM.from_pretrained(partial)
    with pytest.raises(ValueError, match="other settings"):
        convert(mixtral, tmp_path / "out", window=9, show=False)

    with (partial / written[1]).open("r+b") as file:  # a finished shard that was damaged since is made again
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert main(["convert", str(mixtral), str(tmp_path / "out")]) == 0
    first, second, *rest = written
    assert rest[0] == second and first not in rest and len(rest) == 4
    assert_answers_equal(DuetMoeForCausalLM.from_pretrained(tmp_path / "out"), source_model("mixtral"))
    assert not partial.exists() and not (tmp_path / "out" / "conversion.json").exists()


def test_a_killed_conversion_leaves_nothing_that_loads(mixtral: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from duet_moe.modeling.convert import convert\n"
        "from duet_moe.modeling.weights import Weight\n"
        "make = Weight.make\n"
        "Weight.make = lambda *a: (time.sleep(0.2), make(*a))[1]\n"
        "convert(sys.argv[1], sys.argv[2], show=False)\n"
    )
    command = [sys.executable, "-c", code, str(mixtral), str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path).glob("out.partial/*00002-of*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial" / "config.json").exists()
    convert(mixtral, tmp_path / "out", show=False)
    assert_answers_equal(DuetMoeForCausalLM.from_pretrained(tmp_path / "out"), source_model("mixtral"))
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_disk_known_to_be_too_small_is_refused_at_once(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    usage = shards_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shards_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert main(["convert", str(mixtral), str(tmp_path / "out")]) == 1
    assert "1,000 free" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.fixture(params=["file limit", "tmpfs"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, AbstractContextManager]]:
    """A folder in which a second shard no longer fits, inside the context."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if request.param == "file limit":
        yield disk, files_no_larger_than(60_000)
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield disk, nullcontext()
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_gives_one_error_and_no_model(
    mixtral: Path,
    small_disk: tuple[Path, AbstractContextManager],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    disk, limited = small_disk
    usage = shards_module.shutil.disk_usage(disk)  # free when the conversion starts, taken by others meanwhile
    monkeypatch.setattr(shards_module.shutil, "disk_usage", lambda path: usage._replace(free=2**40))
    with limited:
        status = main(["convert", str(mixtral), str(disk / "out")])
    assert status == 1
    assert "could not be written" in capsys.readouterr().err
    assert not (disk / "out").exists()
    left = {path.name for path in (disk / "out.partial").iterdir()}
    assert left == {"conversion.json", "model-00001-of-00005.safetensors"}


def test_half_a_shard_is_removed(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def write_half(tensors: dict, path: Path, **kwargs: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards_module, "save_file", write_half)
    assert main(["convert", str(mixtral), str(tmp_path / "out")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == ["conversion.json"]


def test_memory_is_bounded_by_the_largest_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_model("mixtral", num_hidden_layers=6)
    folder = save_source(source, tmp_path / "source")
    layer = sum(p.numel() for p in source.model.layers[0].parameters()) * 4
    made, most = [], []
    make = Weight.make

    def watched(self: Weight, *rest: object) -> torch.Tensor:
        tensor = make(self, *rest)
        made.append(weakref.ref(tensor))
        alive = (ref() for ref in made)
        most.append(sum(tensor.nbytes for tensor in alive if tensor is not None))
        return tensor

    monkeypatch.setattr(Weight, "make", watched)
    report = convert(folder, tmp_path / "out", show=False)
    assert max(most) <= layer < report["bytes"] / 3
