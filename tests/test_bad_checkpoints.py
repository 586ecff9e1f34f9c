"""Damaged, foreign and missing checkpoints are refused with a message that helps; a failed save changes nothing."""

import json
import os
import pickle
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from full_disk import files_no_larger_than
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_model, tokens
from transformers import AutoModel, AutoModelForCausalLM, MixtralConfig, PreTrainedTokenizerFast

from duet_moe import DuetMoeConfig, DuetMoeForCausalLM, DuetMoeModel, Writer
from duet_moe.cli import main
from duet_moe.configuration.configuration_duet_moe import FORMAT_VERSION


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A good checkpoint in one weight file."""
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model", max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class CreatesAFile:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without(file: Path, *names: str) -> None:
    save_file({name: tensor for name, tensor in load_file(file).items() if name not in names}, file, {"format": "pt"})


def check_refusal(folder: Path, message: str, capsys: pytest.CaptureFixture) -> None:
    """The model, the Auto class, the writer and the program say the same; the program in one line, with status 1."""
    for load in (DuetMoeForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained, Writer.load):
        with pytest.raises((ValueError, OSError), match=message):
            load(folder)
    capsys.readouterr()
    for command in (["info", str(folder)], ["write", "Hello", "--model", str(folder)]):
        assert main(command) == 1
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("duet ")]
        assert len(said) == 1 and re.search(message, said[0])


def test_a_weight_file_that_is_cut_off(folder: Path, capsys: pytest.CaptureFixture) -> None:
    size = (folder / "model.safetensors").stat().st_size
    cut(folder / "model.safetensors")
    check_refusal(folder, rf"model\.safetensors has {size // 2:,} bytes and should have {size:,}", capsys)


@pytest.mark.parametrize("kept", [0, 5, 100])
def test_a_weight_file_that_is_cut_off_inside_its_header(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(OSError, match="cut off inside its header" if kept == 100 else "not a safetensors file"):
        DuetMoeForCausalLM.from_pretrained(folder)


def test_a_weight_file_with_bytes_too_many(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(OSError, match="bytes and should have"):
        DuetMoeForCausalLM.from_pretrained(folder)


def test_a_shard_that_is_cut_off(sharded: Path, capsys: pytest.CaptureFixture) -> None:
    cut(sorted(sharded.glob("model-*"))[1])
    check_refusal(sharded, r"model-00002-of-\d+\.safetensors has [\d,]+ bytes and should have", capsys)


def test_a_shard_that_is_missing(sharded: Path, capsys: pytest.CaptureFixture) -> None:
    sorted(sharded.glob("model-*"))[1].unlink()
    check_refusal(sharded, r"model-00002-of-\d+\.safetensors is missing", capsys)


def test_weights_that_are_missing_are_named_and_not_made_up(folder: Path, capsys: pytest.CaptureFixture) -> None:
    without(folder / "model.safetensors", "diversity_head.unembed.weight")
    check_refusal(folder, r"lacks weights that DuetMoeForCausalLM needs: diversity_head\.unembed\.weight", capsys)


def test_a_trunk_alone_does_not_become_a_model_with_random_heads(tmp_path: Path) -> None:
    tiny_model().model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"coherence_head\.down_proj\.weight, .* and \d+ more"):
        DuetMoeForCausalLM.from_pretrained(tmp_path)


def test_a_voice_over_a_base_that_lacks_weights(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=r"diversity_head\.up_proj", task_type="CAUSAL_LM")
    get_peft_model(DuetMoeForCausalLM.from_pretrained(folder), config).save_pretrained(tmp_path / "voice")
    voice = AutoModelForCausalLM.from_pretrained(tmp_path / "voice")
    assert any("lora_A" in name for name, _ in voice.named_parameters())
    without(folder / "model.safetensors", "diversity_head.unembed.weight")
    with pytest.raises(ValueError, match=r"lacks weights .* diversity_head\.unembed\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "voice")


def test_gaps_are_filled_for_those_who_ask(folder: Path) -> None:
    without(folder / "model.safetensors", "diversity_head.unembed.weight")
    model, info = DuetMoeForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == {"diversity_head.unembed.weight"}
    assert isinstance(DuetMoeForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True), DuetMoeForCausalLM)


def test_a_config_of_another_size_needs_the_same_word_as_in_transformers(folder: Path, model) -> None:
    config = tiny_config(vocab_size=model.config.vocab_size, hidden_size=48)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        DuetMoeForCausalLM.from_pretrained(folder, config=config)
    again = DuetMoeForCausalLM.from_pretrained(folder, config=config, ignore_mismatched_sizes=True)
    assert again.config.hidden_size == 48


def test_the_trunk_still_loads_from_a_whole_model_and_weights_from_memory(folder: Path) -> None:
    model = DuetMoeForCausalLM.from_pretrained(folder)
    trunk = AutoModel.from_pretrained(folder)
    assert type(trunk) is DuetMoeModel
    assert torch.equal(trunk.embed_tokens.weight, model.model.embed_tokens.weight)
    given = DuetMoeForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(given(tokens(1, 5)).logits, model(tokens(1, 5)).logits)


def test_another_family(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    change(folder / "config.json", model_type="mixtral")
    with pytest.raises(ValueError, match="model_type='mixtral', not 'duet_moe'"):
        DuetMoeForCausalLM.from_pretrained(folder)
    assert main(["info", str(folder)]) == 1
    assert "model_type='mixtral', not 'duet_moe'" in capsys.readouterr().err
    MixtralConfig().save_pretrained(tmp_path / "mixtral")
    with pytest.raises(ValueError, match="This is not a Duet-MoE checkpoint"):
        DuetMoeConfig.from_pretrained(tmp_path / "mixtral")


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="not a Duet-MoE checkpoint"):
        DuetMoeForCausalLM.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        Writer.load(folder)


def test_a_config_that_is_no_json(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "config.json").write_text('{"model_type": ')
    check_refusal(folder, r"config\.json' is not a valid JSON file", capsys)


def test_a_config_of_a_newer_version_is_refused_before_its_fields_are_read(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    change(folder / "config.json", format_version=FORMAT_VERSION + 1, default_mode="poetic", third_head=True)
    check_refusal(folder, "saved by a newer version of duet-moe.*Upgrade it", capsys)


def test_every_checkpoint_says_its_format(folder: Path) -> None:
    assert json.loads((folder / "config.json").read_text())["format_version"] == FORMAT_VERSION
    change(folder / "config.json", format_version=FORMAT_VERSION)
    assert DuetMoeConfig.from_pretrained(folder).format_version == FORMAT_VERSION


def test_a_mode_with_a_rule_of_a_newer_version(folder: Path, capsys: pytest.CaptureFixture) -> None:
    change(folder / "generation_config.json", modes={"mine": {"name": "mine", "head_mix": 0.5, "rule_r4": 1.0}})
    with pytest.raises(ValueError, match=r"does not know: \['rule_r4'\]. A newer version saved it"):
        Writer.load(folder)
    with pytest.raises(ValueError, match="rule_r4"):
        DuetMoeForCausalLM.from_pretrained(folder).generate(tokens(1, 4), mode="mine")
    assert main(["write", "Hello", "--model", str(folder)]) == 1
    assert "Upgrade" in capsys.readouterr().err


def test_a_folder_without_tokenizer(folder: Path, capsys: pytest.CaptureFixture) -> None:
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer: save the one it was trained with"):
        Writer.load(folder)
    assert main(["write", "Hello", "--model", str(folder)]) == 1
    assert "has no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_is_never_read(folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    trace = tmp_path / "trace"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(CreatesAFile(trace)))
    check_refusal(folder, "no weights in safetensors" if name.endswith("bin") else "not a safetensors file", capsys)
    assert not trace.exists()
    pickle.loads((folder / name).read_bytes())
    assert trace.exists(), "the pickle of this test does nothing, so it proves nothing"


def test_a_harmless_pickle_is_refused_too(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="never read"):
        DuetMoeForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="use_safetensors=False is not possible"):
        DuetMoeForCausalLM.from_pretrained(folder, use_safetensors=False)


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "some/where/else", "no-such-name"])
def test_a_path_that_does_not_exist(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(FileNotFoundError, match="There is no folder" if "/" in name else "bundled are: .*duet-mini"):
        Writer.load(name)
    for command in (["info", name], ["write", "Hello", "--model", name]):
        assert main(command) == 1
        assert name in capsys.readouterr().err
    with pytest.raises(OSError, match="couldn't connect" if "/" not in name else re.escape(name)):
        DuetMoeForCausalLM.from_pretrained(name)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("limit", "shards"), [(5_000, "50GB"), (45_000, "50GB"), (45_000, "50KB")])
def test_a_save_that_fails_leaves_the_old_checkpoint(folder: Path, limit: int, shards: str) -> None:
    before, other = contents(folder), tiny_model(seed=1, hidden_size=64)
    with files_no_larger_than(limit), pytest.raises(OSError, match="which is as it was: .*too large"):
        other.save_pretrained(folder, max_shard_size=shards)
    assert contents(folder) == before
    assert not [path for path in folder.iterdir() if path.is_dir()]


def test_a_first_save_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    model = tiny_model()
    with files_no_larger_than(45_000), pytest.raises(OSError, match="Nothing was saved to"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        tiny_model().save_pretrained(tmp_path)
        before = contents(tmp_path)
        with pytest.raises(OSError, match="which is as it was: .*No space left"):
            tiny_model(seed=1, hidden_size=64).save_pretrained(tmp_path)
        assert contents(tmp_path) == before
        DuetMoeForCausalLM.from_pretrained(tmp_path)
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_saving_in_shards_over_one_file_and_back_leaves_only_the_new_weights(tmp_path: Path) -> None:
    one, other = tiny_model(), tiny_model(seed=1)
    one.save_pretrained(tmp_path)
    whole = names(tmp_path)
    (tmp_path / "notes.md").write_text("mine")
    for model, size in ((other, "20KB"), (one, "40KB"), (other, "50GB")):
        model.save_pretrained(tmp_path, max_shard_size=size)
        again = DuetMoeForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(tokens(1, 5)).logits, model(tokens(1, 5)).logits)
    assert names(tmp_path) == whole | {"notes.md"}


def test_a_save_that_stops_between_two_moves_leaves_nothing_that_loads_by_mistake(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    replace: Callable = os.replace

    def stops(source: Path, target: Path) -> None:
        if sum(name.startswith("model-") for name in moved) == 2:
            raise SystemExit
        moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", stops)
    with pytest.raises(SystemExit):
        tiny_model(seed=1, vocab_size=320).save_pretrained(sharded, max_shard_size="40KB")
    with pytest.raises(OSError, match="no weights in safetensors"):
        DuetMoeForCausalLM.from_pretrained(sharded)


def test_saving_to_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"):
        tiny_model().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
