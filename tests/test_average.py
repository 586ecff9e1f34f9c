"""Averaging models: the mean of every weight, and a refusal where a mean has no meaning."""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from duet_moe import DuetMoeForCausalLM
from duet_moe.finetune.average import average, main


def saved(folder: Path, seed: int, **changes: object) -> Path:
    tokenizer = tiny_tokenizer()
    model = tiny_model(seed, vocab_size=len(tokenizer), **changes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return DuetMoeForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_every_weight_is_the_mean(tmp_path):
    folders = [saved(tmp_path / str(seed), seed) for seed in range(3)]
    found = weights(average(folders, tmp_path / "mean"))
    parts = [weights(folder) for folder in folders]
    assert found.keys() == parts[0].keys()
    for name, weight in found.items():
        wanted = torch.stack([part[name] for part in parts]).mean(0)
        torch.testing.assert_close(weight, wanted, rtol=2**-8, atol=1e-6)  # saved in bf16
    assert not list(tmp_path.glob("unfinished-*"))


def test_the_mean_of_a_model_with_itself_is_that_model(tmp_path):
    folder = saved(tmp_path / "one", 0)
    DuetMoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    found = weights(average([folder, folder, folder], tmp_path / "mean"))
    assert all(torch.equal(weight, found[name]) for name, weight in weights(folder).items())


def test_models_of_different_shapes_are_refused(tmp_path, capsys):
    first, other = saved(tmp_path / "a", 0), saved(tmp_path / "b", 1, num_experts_per_tok=1)
    assert main([str(first), str(other), "--out", str(tmp_path / "mean")]) == 1
    assert "num_experts_per_tok=1" in capsys.readouterr().err
    assert not (tmp_path / "mean").exists()


def test_models_of_different_tokenizers_are_refused(tmp_path):
    first, other = saved(tmp_path / "a", 0), saved(tmp_path / "b", 1)
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    tokens = vocabulary["model"]["vocab"]
    tokens["A"], tokens["B"] = tokens["B"], tokens["A"]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ValueError, match="one tokenizer"):
        average([first, other], tmp_path / "mean")


def test_a_single_model_and_an_existing_folder_are_refused(tmp_path):
    folder = saved(tmp_path / "a", 0)
    with pytest.raises(ValueError, match="two or more"):
        average([folder], tmp_path / "mean")
    with pytest.raises(FileExistsError, match="exists"):
        average([folder, folder], folder)
