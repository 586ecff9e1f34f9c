"""What is saved loads again with the same logits: here, in a clean process, and where only transformers is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from online import BLOCK
from tiny import tiny_model, tokens
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

import duet_moe
from duet_moe import DuetMoeForCausalLM, DuetMoeModel, Mode
from duet_moe.configuration.modes import modes_as_dict

ROOT = Path(duet_moe.__file__).resolve().parent.parent
MINE = Mode("mine", head_mix=0.5, num_experts_per_tok=3)
SETTINGS = {"head_mix": 0.5, "num_experts_per_tok": 3, "plausible_min": 0.01}

# The part of both clean processes that does the work: load, compare logits and a mode's text, print what was found.
LOAD = """
import json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
folder, remote = sys.argv[1], sys.argv[4] == "remote"
expected, settings = torch.load(sys.argv[2]), json.loads(sys.argv[3])
config = AutoConfig.from_pretrained(folder, trust_remote_code=remote)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote)
with torch.no_grad():
    same = {name: torch.equal(model(expected["ids"], **{**settings, "head_mix": float(name)}).logits, expected[name])
            for name in ("0.0", "0.5", "1.0")}
text = model.generate(expected["ids"], mode="mine", max_new_tokens=12)
routes = [[route.mode, route.probability] for route in model.route(expected["ids"])]
auto = model.generate(expected["ids"], mode="auto", seed=1, max_new_tokens=12)
print(json.dumps({"same": same, "text": torch.equal(text, expected["text"]), "module": type(model).__module__,
                  "config": type(config).__module__, "auto": torch.equal(auto, expected["auto"]),
                  "routes": all(mode == wanted[0] and abs(probability - wanted[1]) < 1e-5
                                for (mode, probability), wanted in zip(routes, expected["routes"], strict=True))}))
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved model with a mode of its own, and beside it what it answers."""
    layers = ["sliding_attention", "full_attention"]
    model, ids = tiny_model(num_shared_experts=1, layer_types=layers, task_router_size=8), tokens(2, 12)
    model.generation_config.modes = modes_as_dict({"mine": MINE})
    model.task_router.thresholds.fill_(-9.0)  # all is creative
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        logits = {str(mix): model(ids, **(SETTINGS | {"head_mix": mix})).logits for mix in (0.0, 0.5, 1.0)}
    text = model.generate(ids, mode="mine", max_new_tokens=12)
    chosen = {
        "routes": [[route.mode, route.probability] for route in model.route(ids)],
        "auto": model.generate(ids, mode="creative", seed=1, max_new_tokens=12),
    }
    torch.save(logits | chosen | {"ids": ids, "text": text}, tmp_path / "expected.pt")
    return tmp_path / "model"


def run_clean(script: str, saved: Path, how: str, isolated: bool) -> dict:
    """Run `script` in a new process outside the repository, with its own Hugging Face home and no network."""
    home = saved.parent / "home"
    home.mkdir()
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    env |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"} | ({} if isolated else {"PYTHONPATH": str(ROOT)})
    command = [sys.executable, *(["-I"] if isolated else []), "-c", script]
    arguments = [str(saved), str(saved.parent / "expected.pt"), json.dumps(SETTINGS), how]
    done = subprocess.run([*command, *arguments], cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict, module: str) -> None:
    assert found["same"] == {"0.0": True, "0.5": True, "1.0": True}
    assert found["text"] and found["auto"] and found["routes"]
    assert found["module"].startswith(module)
    assert found["config"].startswith(module)


def test_saving_and_loading_keeps_every_bit(saved: Path) -> None:
    model, again = DuetMoeForCausalLM.from_pretrained(saved), AutoModelForCausalLM.from_pretrained(saved)
    expected = torch.load(saved.parent / "expected.pt")
    with torch.no_grad():
        assert torch.equal(again(expected["ids"], **SETTINGS).logits, expected["0.5"])
    assert type(again) is DuetMoeForCausalLM
    assert not again.training
    weights = again.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert again.config.to_dict() == model.config.to_dict()


def test_the_trunk_alone_loads_from_the_whole_model(saved: Path) -> None:
    trunk, model = AutoModel.from_pretrained(saved), DuetMoeForCausalLM.from_pretrained(saved)
    assert type(trunk) is DuetMoeModel
    with torch.no_grad():
        assert torch.equal(trunk(tokens(1, 9)).last_hidden_state, model.model(tokens(1, 9)).last_hidden_state)


def test_a_saved_folder_is_self_contained(saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "modeling_duet_moe.py", "modes.py"} <= names
    assert "task_router.py" in names
    for path in saved.glob("*.py"):
        lines = [line.strip() for line in path.read_text().splitlines()]
        assert not [line for line in lines if line.startswith(("from duet_moe", "import duet_moe"))], path.name
    auto_map = json.loads((saved / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "trunk.DuetMoeModel"
    assert {"AutoConfig", "AutoModelForCausalLM"} <= auto_map.keys()


def test_modes_are_saved_with_the_model(saved: Path) -> None:
    kept = json.loads((saved / "generation_config.json").read_text())["modes"]
    assert Mode(**kept["mine"]) == MINE
    assert AutoModelForCausalLM.from_pretrained(saved).generation_config.modes == kept


@pytest.mark.slow
def test_a_clean_process_with_the_package_gives_equal_logits(saved: Path) -> None:
    check(run_clean("import duet_moe" + LOAD, saved, "local", isolated=False), "duet_moe.")


@pytest.mark.slow
def test_a_clean_process_without_the_package_gives_equal_logits(saved: Path) -> None:
    check(run_clean(BLOCK + LOAD, saved, "remote", isolated=True), "transformers_modules.")


def test_the_text_generation_pipeline_takes_a_mode(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny_model(vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    speak = pipeline("text-generation", model=str(tmp_path))
    ids = tokenizer("The little fox", return_tensors="pt").input_ids
    for mix, mode in ((0.0, "factual"), (1.0, Mode("greedy diversity", head_mix=1.0))):
        found = speak("The little fox", mode=mode, max_new_tokens=8, return_full_text=False)[0]["generated_text"]
        expected = model.generate(ids, head_mix=mix, max_new_tokens=8)[0, ids.shape[1] :]
        assert found == tokenizer.decode(expected, skip_special_tokens=True)
