"""A mix of the heads as plain Mixtral: exact where the heads are linear, refused elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sources import edit_json, save_source, source_model
from tiny import tiny_config, tiny_tokenizer, tokens
from transformers import AutoTokenizer, GenerationConfig, MixtralForCausalLM

import duet_moe
from duet_moe import DuetMoeForCausalLM, Mode
from duet_moe.cli import main
from duet_moe.configuration.modes import BUILT_IN_MODES, modes_as_dict
from duet_moe.modeling.convert import convert
from duet_moe.modeling.export import export_mixtral

CREATIVE = BUILT_IN_MODES["creative"]

ROOT = Path(duet_moe.__file__).resolve().parent.parent
EXACT = dict(rtol=0.0, atol=1e-4)
CALM = Mode("calm", head_mix=0.25, do_sample=True, temperature=0.5, top_k=7, num_experts_per_tok=3)


def linear_model(equal_norms: bool = True, **changes: object) -> DuetMoeForCausalLM:
    """Return a model whose heads have different matrices, adapters at zero and a window that shows."""
    torch.manual_seed(0)
    model = DuetMoeForCausalLM(tiny_config(**(dict(vocab_size=320) | changes))).eval()
    for head in (model.coherence_head, model.diversity_head):
        torch.nn.init.normal_(head.norm.weight, mean=1.0, std=0.2)
    if equal_norms:
        model.diversity_head.norm.weight.data.copy_(model.coherence_head.norm.weight)
    model.generation_config.modes = modes_as_dict({"calm": CALM})
    model.generation_config.eos_token_id = 1
    return model


def save(model: DuetMoeForCausalLM, folder: Path) -> Path:
    return save_source(model, folder)


@torch.no_grad()
def assert_same_answers(folder: Path, model: DuetMoeForCausalLM, mix: float, experts: int | None = None) -> None:
    plain = MixtralForCausalLM.from_pretrained(folder)
    assert type(plain).__module__.startswith("transformers.")
    ids = tokens(2, 30)
    found, expected = plain(ids).logits, model(ids, head_mix=mix, num_experts_per_tok=experts).logits
    if mix not in (0, 1):  # equal up to a constant per token
        found, expected = found.log_softmax(-1), expected.log_softmax(-1)
    torch.testing.assert_close(found, expected, **EXACT)
    text = plain.generate(ids, do_sample=False, max_new_tokens=8)
    own = model.generate(ids, head_mix=mix, num_experts_per_tok=experts, do_sample=False, max_new_tokens=8)
    assert torch.equal(text, own)


@pytest.mark.parametrize("equal_norms", [True, False])
@pytest.mark.parametrize(
    ("mode", "mix"), [("factual", 0.0), ("creative", CREATIVE.head_mix), (0.3, 0.3), ("0.75", 0.75)]
)
def test_a_mix_of_the_heads_becomes_a_mixtral_with_the_same_answers(
    mode: str | float, mix: float, equal_norms: bool, tmp_path: Path
) -> None:
    model = linear_model(equal_norms)
    with torch.no_grad():
        heads = model(tokens(1, 30), output_head_logits=True)
        assert (heads.coherence_logits - heads.diversity_logits).abs().max() > 1.0
    report = export_mixtral(save(model, tmp_path / "model"), tmp_path / "out", mode, show=False)
    assert report["head_mix"] == mix
    assert_same_answers(tmp_path / "out", model, mix)


def test_full_attention_and_rope_scaling_are_exported(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    model = linear_model(layer_types=["full_attention"] * 2, rope_parameters=yarn)
    export_mixtral(save(model, tmp_path / "model"), tmp_path / "out", show=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["sliding_window"] is None and config["rope_parameters"] == yarn
    assert config["model_type"] == "mixtral" and "auto_map" not in config
    assert_same_answers(tmp_path / "out", model, 0.0)


def test_a_window_as_wide_as_the_context_is_full_attention(tmp_path: Path) -> None:
    model = linear_model(layer_types=["full_attention", "sliding_attention"], sliding_window=256)
    export_mixtral(save(model, tmp_path / "model"), tmp_path / "out", show=False)
    assert_same_answers(tmp_path / "out", model, 0.0)


def test_a_saved_mode_brings_its_mix_experts_and_sampling(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = linear_model()
    folder = save(model, tmp_path / "model")
    assert main(["export", str(folder), str(tmp_path / "out"), "--mode", "calm", "--to", "mixtral", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["head_mix"] == 0.25 and report["notes"] == []
    assert report["bytes"] == 4 * report["parameters"]
    assert_same_answers(tmp_path / "out", model, 0.25, experts=3)
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.eos_token_id) == (True, 0.5, 7, 1)
    assert not hasattr(settings, "modes")


def test_sampling_of_the_model_stays_for_a_number_and_goes_for_a_greedy_mode(tmp_path: Path) -> None:
    model = linear_model()
    model.generation_config.update(do_sample=True, temperature=0.4)
    folder = save(model, tmp_path / "model")
    export_mixtral(folder, tmp_path / "number", 0.5, show=False)
    assert GenerationConfig.from_pretrained(tmp_path / "number").temperature == 0.4
    export_mixtral(folder, tmp_path / "factual", "factual", show=False)
    settings = GenerationConfig.from_pretrained(tmp_path / "factual")
    assert not settings.do_sample and settings.temperature is None


def test_the_rule_of_two_heads_is_said_to_be_left_out(tmp_path: Path) -> None:
    report = export_mixtral(save(linear_model(), tmp_path / "model"), tmp_path / "out", "creative", show=False)
    assert f"plausible_min={CREATIVE.plausible_min} of mode 'creative'" in report["notes"][0]


def test_tokenizer_and_chat_template_go_along(tmp_path: Path) -> None:
    export_mixtral(save(linear_model(), tmp_path / "model"), tmp_path / "out", show=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == tiny_tokenizer().chat_template is not None
    assert tokenizer("The little fox").input_ids == tiny_tokenizer()("The little fox").input_ids


def test_names_on_disk_are_those_of_published_mixtral_checkpoints(tmp_path: Path) -> None:
    source = save_source(source_model("mixtral"), tmp_path / "source")
    convert(source, tmp_path / "duet", show=False)
    export_mixtral(tmp_path / "duet", tmp_path / "back", show=False)
    before, after = load_file(source / "model.safetensors"), {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        after |= load_file(file)
        with safe_open(file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list((tmp_path / "back").glob("*.py"))


def test_an_exported_folder_loads_where_duet_moe_is_not(tmp_path: Path) -> None:
    model = linear_model()
    export_mixtral(save(model, tmp_path / "model"), tmp_path / "out", "creative", show=False)
    ids = tokens(1, 20)
    with torch.no_grad():
        torch.save(
            {"ids": ids, "logits": model(ids, head_mix=CREATIVE.head_mix).logits.log_softmax(-1)},
            tmp_path / "expected.pt",
        )
    code = (
        "import sys\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/out')\n"
        "with torch.no_grad():\n"
        "    found = model(expected['ids']).logits.log_softmax(-1)\n"
        "torch.testing.assert_close(found, expected['logits'], rtol=0.0, atol=1e-4)\n"
        "assert type(model).__name__ == 'MixtralForCausalLM' and 'duet_moe' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def train(head: str, part: str):  # type: ignore[no-untyped-def]
    def change(model: DuetMoeForCausalLM) -> None:
        torch.nn.init.normal_(getattr(getattr(model, head), part).weight, std=0.1)

    return change


REFUSALS = {
    "coherence adapter": ("factual", {}, train("coherence_head", "down_proj"), "coherence_head.down_proj is not zero"),
    "diversity adapter": (
        "creative",
        {},
        train("diversity_head", "down_proj"),
        "diversity_head.down_proj is not zero",
    ),
    "adapter of a mix": ("0.5", {}, train("diversity_head", "down_proj"), "diversity_head.down_proj is not zero"),
    "plan": ("creative", {}, train("diversity_head", "plan_proj"), "diversity_head.plan_proj is not zero"),
    "shared experts": ("factual", {"num_shared_experts": 1}, None, "num_shared_experts=1"),
    "qk_norm": ("factual", {"qk_norm": True}, None, "qk_norm=True"),
    "norm_topk_prob": ("factual", {"norm_topk_prob": False}, None, "norm_topk_prob=False"),
    "layer types": ("factual", {"layer_types": ["sliding_attention", "full_attention"]}, None, "layer_types="),
    "unknown mode": ("poetic", {}, None, "mode='poetic' must be one of"),
}


@pytest.mark.parametrize("part", REFUSALS)
def test_what_mixtral_cannot_hold_is_refused_by_name(part: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    mode, changes, change, told = REFUSALS[part]
    model = linear_model(**changes)
    if change:
        change(model)
    folder = save(model, tmp_path / "model")
    assert main(["export", str(folder), str(tmp_path / "out"), "--mode", mode]) == 1
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_other_head_may_be_trained(tmp_path: Path) -> None:
    model = linear_model()
    train("diversity_head", "down_proj")(model)
    train("diversity_head", "plan_proj")(model)
    export_mixtral(save(model, tmp_path / "model"), tmp_path / "out", "factual", show=False)
    assert_same_answers(tmp_path / "out", model, 0.0)


def test_duet_mini_is_refused_for_its_adapters(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for mode in ("factual", "creative", "0.5"):
        assert main(["export", "duet-mini", str(tmp_path / "out"), "--mode", mode]) == 1
        assert "adapter is trained" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_bad_sources_say_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    mixtral = save_source(source_model("mixtral"), tmp_path / "mixtral")
    assert main(["export", str(mixtral), str(tmp_path / "out"), "--mode", "factual"]) == 1
    assert "model_type='mixtral'" in capsys.readouterr().err
    assert main(["export", "no-such-model", str(tmp_path / "out"), "--mode", "factual"]) == 1
    assert "no-such-model" in capsys.readouterr().err
    folder = save(linear_model(), tmp_path / "model")
    edit_json(folder / "config.json", num_local_experts=5)
    assert main(["export", str(folder), str(tmp_path / "out"), "--mode", "factual"]) == 1
    assert "do not belong together" in capsys.readouterr().err
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if "q_proj" not in name}, folder / "model.safetensors")
    edit_json(folder / "config.json", num_local_experts=4)
    assert main(["export", str(folder), str(tmp_path / "out"), "--mode", "factual"]) == 1
    assert "no tensor 'model.layers.0.self_attn.q_proj.weight'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    "wrong", [["x", "y"], ["x", "y", "--mode", "1.5"], ["x", "y", "--mode", "factual", "--to", "gpt2"]]
)
def test_wrong_use_exits_with_2(wrong: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["export", *wrong])
    assert stop.value.code == 2
    assert "usage: duet export" in capsys.readouterr().err


def test_the_dtype_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = save(linear_model(), tmp_path / "model")
    assert main(["export", str(folder), str(tmp_path / "out"), "--mode", "0.5", "--dtype", "bfloat16"]) == 0
    assert f"The model is in {tmp_path / 'out'}" in capsys.readouterr().out
    assert MixtralForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
