"""Models of five families become Duet-MoE and answer as before; what cannot be kept is refused by name."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sources import LINEAR, LLAMA3, OWN, YARN, assert_answers_equal, edit_json, save_source, source_model
from tiny import tokens
from transformers import AutoTokenizer

import duet_moe
from duet_moe import DuetMoeForCausalLM, Writer
from duet_moe.cli import main
from duet_moe.modeling import convert as convert_module
from duet_moe.modeling.convert import convert

ROOT = Path(duet_moe.__file__).resolve().parent.parent


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    return save_source(source_model("mixtral"), tmp_path / "source")


@pytest.mark.parametrize("family", OWN)
def test_a_model_in_memory_answers_as_before(family: str) -> None:
    source = source_model(family)
    model = DuetMoeForCausalLM.from_causal_lm(source)
    assert_answers_equal(model, source)
    assert not model.training
    assert model.generation_config.temperature == 0.7
    assert {"factual", "creative", "hybrid"} <= model.generation_config.modes.keys()
    assert model.coherence_head.unembed.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("family", OWN)
def test_a_model_on_disk_answers_as_before_with_all_that_belongs_to_it(family: str, tmp_path: Path) -> None:
    source = source_model(family)
    folder = save_source(source, tmp_path / "source", max_shard_size="40KB")
    assert (folder / "model.safetensors.index.json").is_file()
    report = convert(folder, tmp_path / "out", show=False)
    model = DuetMoeForCausalLM.from_pretrained(tmp_path / "out")
    assert_answers_equal(model, source)
    in_memory = DuetMoeForCausalLM.from_causal_lm(source).state_dict()
    assert all(torch.equal(weight, in_memory[name]) for name, weight in model.state_dict().items())
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["notes"] == []

    tokenizer, before = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(folder)
    talk = [{"role": "user", "content": "The little fox"}]
    assert tokenizer.chat_template == before.chat_template is not None
    assert tokenizer.apply_chat_template(talk, tokenize=False) == before.apply_chat_template(talk, tokenize=False)
    assert (model.generation_config.temperature, model.generation_config.top_k) == (0.7, 11)
    assert model.generation_config.do_sample
    ids = tokens(1, 8)
    greedy = source.generate(ids, do_sample=False, max_new_tokens=8)
    assert torch.equal(model.generate(ids, mode="factual", max_new_tokens=8), greedy)
    assert Writer.load(tmp_path / "out").write("The fox", mode="hybrid", max_new_tokens=4, seed=1).mode == "hybrid"


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_expert_weights_are_renormalised_only_where_the_source_does(family: str, norm_topk_prob: bool) -> None:
    source = source_model(family, norm_topk_prob=norm_topk_prob)
    assert_answers_equal(DuetMoeForCausalLM.from_causal_lm(source), source)
    asked = DuetMoeForCausalLM.from_causal_lm(source, renormalize=True)
    assert_answers_equal(asked, source_model(family, norm_topk_prob=True))


@pytest.mark.parametrize("rope", [LINEAR, YARN, LLAMA3], ids=lambda rope: rope["rope_type"])
def test_rope_scaling_goes_along(rope: dict, tmp_path: Path) -> None:
    source = source_model("llama", rope_parameters=rope)
    folder = save_source(source, tmp_path / "source")
    convert(folder, tmp_path / "out", show=False)
    model = DuetMoeForCausalLM.from_pretrained(tmp_path / "out")
    assert_answers_equal(model, source, length=100)
    assert model.config.rope_parameters == source.config.rope_parameters
    plain = DuetMoeForCausalLM.from_causal_lm(source_model("llama"))
    with torch.no_grad():
        assert not torch.allclose(plain(tokens(1, 100)).logits, model(tokens(1, 100)).logits, atol=1e-2)


def test_the_settings_of_older_checkpoints_are_understood(tmp_path: Path) -> None:
    source = source_model("llama", rope_parameters=LINEAR)
    folder = save_source(source, tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"], config["dtype"]
    config |= {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 10_000.0, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors")
    assert convert(folder, tmp_path / "out", show=False)["notes"] == []
    assert_answers_equal(DuetMoeForCausalLM.from_pretrained(tmp_path / "out"), source, length=100)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "mistral"])
def test_the_window_is_the_sources_own(family: str) -> None:
    slides = {"use_sliding_window": True} if family == "qwen3_moe" else {}
    source = source_model(family, sliding_window=9, **slides)
    model = DuetMoeForCausalLM.from_causal_lm(source)
    assert set(model.config.layer_types) == {"sliding_attention"} and model.config.sliding_window == 9
    assert_answers_equal(model, source)


def test_a_window_can_be_chosen_and_no_window_is_full_attention() -> None:
    source = source_model("mixtral")
    full = DuetMoeForCausalLM.from_causal_lm(source)
    assert set(full.config.layer_types) == {"full_attention"}
    narrow = DuetMoeForCausalLM.from_causal_lm(source, window=9)
    assert_answers_equal(narrow, source, length=9)
    assert_answers_equal(narrow, source_model("mixtral", sliding_window=9))


def test_fewer_experts_share_the_weight_of_all() -> None:
    source = source_model("mixtral")
    model = DuetMoeForCausalLM.from_causal_lm(source, experts_per_tok=2)
    assert model.config.num_experts_per_tok == 2
    assert_answers_equal(model, source_model("mixtral", num_experts_per_tok=2))


@pytest.mark.parametrize("experts", [1, 5])
def test_a_dense_model_gets_any_number_of_equal_experts(experts: int, tmp_path: Path) -> None:
    source = source_model("mistral")
    convert(save_source(source, tmp_path / "source"), tmp_path / "out", experts=experts, seed=4, show=False)
    model = DuetMoeForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (experts, min(2, experts))
    assert_answers_equal(model, source)
    gates = [layer.mlp.gate.weight for layer in model.model.layers]
    assert gates[0].std() > 0.1 and not torch.equal(gates[0], gates[1])
    again = DuetMoeForCausalLM.from_causal_lm(source, experts=experts, seed=4)
    other = DuetMoeForCausalLM.from_causal_lm(source, experts=experts, seed=5)
    assert torch.equal(again.model.layers[0].mlp.gate.weight, gates[0])
    assert not torch.equal(other.model.layers[0].mlp.gate.weight, gates[0])


def test_fused_experts_on_disk_are_read_as_they_are(tmp_path: Path) -> None:
    source = source_model("qwen3_moe")
    folder = save_source(source, tmp_path / "source")
    weights = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in weights
    save_file(weights, folder / "model.safetensors")
    convert(folder, tmp_path / "out", show=False)
    assert_answers_equal(DuetMoeForCausalLM.from_pretrained(tmp_path / "out"), source)


def test_the_dtype_is_the_sources_or_the_one_asked_for(mixtral: Path, tmp_path: Path) -> None:
    half = save_source(source_model("llama").to(torch.bfloat16), tmp_path / "half")
    assert convert(half, tmp_path / "same", show=False)["dtype"] == "bfloat16"
    assert DuetMoeForCausalLM.from_pretrained(tmp_path / "same").dtype == torch.bfloat16
    assert convert(mixtral, tmp_path / "out", dtype=torch.bfloat16, show=False)["dtype"] == "bfloat16"
    assert {
        tensor.dtype for file in (tmp_path / "out").glob("*.safetensors") for tensor in load_file(file).values()
    } == {torch.bfloat16}
    model = DuetMoeForCausalLM.from_causal_lm(source_model("llama").to(torch.bfloat16).train())
    assert model.dtype == torch.bfloat16 and model.training
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


REFUSALS = {
    "hidden_act": ("mixtral", "gelu"),
    "attention_bias": ("llama", True),
    "mlp_bias": ("llama", True),
    "clip_qkv": ("olmoe", 3.0),
    "decoder_sparse_step": ("qwen3_moe", 2),
    "mlp_only_layers": ("qwen3_moe", [1]),
    "quantization_config": ("mixtral", {"quant_method": "gptq", "bits": 4}),
    "layer_types": ("qwen3_moe", ["sliding_attention", "full_attention"]),
    "rope_parameters.rope_type": ("llama", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
    "rope_parameters.partial_rotary_factor": (
        "llama",
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "model_type": ("llama", "gpt2"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_represented_is_refused_by_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    family, value = REFUSALS[name]
    folder = save_source(source_model(family), tmp_path / "source")
    edit_json(folder / "config.json", **{name.split(".")[0]: value})
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert name in told and "cannot be converted" in told
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop("lm_head.weight"), "no tensor 'lm_head.weight'"),
        (lambda w: w.pop("model.layers.1.block_sparse_moe.experts.5.w3.weight"), "experts.5"),
        (lambda w: w.update({"model.norm.weight": torch.ones(31)}), "model.norm.weight has shape (31,)"),
        (lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}), "self_attn.q_proj.bias"),
        (lambda w: w.update({"lm_head.weight": w["lm_head.weight"].to(torch.int8)}), "stored as I8"),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(change, told: str, mixtral: Path) -> None:
    weights = load_file(mixtral / "model.safetensors")
    change(weights)
    save_file(weights, mixtral / "model.safetensors")
    with pytest.raises(ValueError) as error:
        convert(mixtral, mixtral.parent / "out", show=False)
    assert told in str(error.value)
    assert [path.name for path in mixtral.parent.iterdir()] == ["source"]


def test_a_source_that_does_not_exist_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for missing in (str(tmp_path / "nowhere"), "nobody/nothing"):
        assert main(["convert", missing, str(tmp_path / "out")]) == 1
        assert f"{missing!r} is not a folder" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_name_on_the_hub_is_fetched_without_pickles(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}
    monkeypatch.setattr(
        convert_module, "snapshot_download", lambda name, **kwargs: asked.update(kwargs, name=name) or str(mixtral)
    )
    assert convert("someone/model", tmp_path / "out", show=False)["source"] == "mixtral"
    assert asked["name"] == "someone/model"
    assert {"*.safetensors", "*.json", "tokenizer*"} <= set(asked["allow_patterns"])
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["allow_patterns"])


def test_missing_tokenizer_and_unknown_settings_are_noted(
    mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for file in [*mixtral.glob("tokenizer*"), *mixtral.glob("chat_template*")]:
        file.unlink()
    edit_json(mixtral / "config.json", attention_sinks=4, transformers_version="9.0.0")
    assert main(["convert", str(mixtral), str(tmp_path / "out"), "--json"]) == 0
    tokenizer, settings = json.loads(capsys.readouterr().out)["notes"]
    assert "no tokenizer" in tokenizer and "['attention_sinks']" in settings
    assert_answers_equal(DuetMoeForCausalLM.from_pretrained(tmp_path / "out"), source_model("mixtral"))


def test_wrong_use_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for wrong in (
        [],
        ["x"],
        ["x", "y", "--window", "0"],
        ["x", "y", "--experts", "many"],
        ["x", "y", "--dtype", "int"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(["convert", *wrong])
        assert stop.value.code == 2
    capsys.readouterr()


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (["--experts", "4"], "experts=4 is for dense models"),
        (["--experts-per-tok", "7"], "num_experts_per_tok=7"),
    ],
)
def test_options_that_the_source_does_not_allow_are_refused(
    option: list[str], told: str, mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["convert", str(mixtral), str(tmp_path / "out"), *option]) == 1
    assert told in capsys.readouterr().err


def test_the_command_passes_every_option_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = save_source(source_model("llama"), tmp_path / "source")
    options = "--experts 4 --experts-per-tok 3 --window 16 --seed 5 --dtype bfloat16 --json".split()
    assert main(["convert", str(folder), str(tmp_path / "out"), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    model = DuetMoeForCausalLM.from_pretrained(tmp_path / "out")
    config = model.config
    assert (config.num_local_experts, config.num_experts_per_tok, config.sliding_window) == (4, 3, 16)
    expected = DuetMoeForCausalLM.from_causal_lm(source_model("llama"), experts=4, seed=5).model.layers[0].mlp.gate
    assert torch.equal(model.model.layers[0].mlp.gate.weight, expected.weight.to(torch.bfloat16))
    assert report["source"] == "llama" and report["dtype"] == "bfloat16"
    assert report["bytes"] == 2 * report["parameters"] and report["seconds"] >= 0
    olmoe = save_source(source_model("olmoe"), tmp_path / "olmoe")
    assert main(["convert", str(olmoe), str(tmp_path / "renormalized"), "--renormalize"]) == 0
    assert "parameters" in capsys.readouterr().out
    assert DuetMoeForCausalLM.from_pretrained(tmp_path / "renormalized").config.norm_topk_prob


def test_a_model_that_is_not_in_memory_is_refused() -> None:
    with torch.device("meta"):
        absent = source_model("mixtral")
    with pytest.raises(ValueError, match="is not in memory"):
        DuetMoeForCausalLM.from_causal_lm(absent)


def test_without_the_package_conversion_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "duet_moe.modeling.convert", None)
    with pytest.raises(ImportError, match="pip install duet-moe"):
        DuetMoeForCausalLM.from_causal_lm(source_model("mixtral"))


def test_a_converted_folder_needs_only_transformers(mixtral: Path, tmp_path: Path) -> None:
    convert(mixtral, tmp_path / "out", show=False)
    DuetMoeForCausalLM.from_causal_lm(source_model("mixtral")).save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "out").glob("*.py")}
    assert names == {path.name for path in (tmp_path / "saved").glob("*.py")}
    for name in (*names, "config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "saved" / name).read_text(), name


def test_the_python_of_the_docs_runs() -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "convert.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(snippet, names)
    assert names["model"].config.sliding_window == 64  # type: ignore[attr-defined]
