"""Quantisation reaches the experts and spares the heads, comes back bit for bit, and trains a head on top."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantized import FORMS, IDS, SHAPE, experts_of, load, logits
from test_hub import BLOCK
from tiny import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, AwqConfig, BitsAndBytesConfig, GPTQConfig

from duet_moe import DuetMoeForCausalLM, DuetMoeModel
from duet_moe.modeling.footprint import bytes_by_group, group_of

bnb = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("form", FORMS)
def test_experts_and_attention_are_packed_and_all_else_keeps_its_dtype(quantisable: Path, form: str) -> None:
    model = load(quantisable, form)
    assert type(model) is DuetMoeForCausalLM
    kept = {"embedding", "router_and_norms", "coherence_head", "diversity_head"}
    for name, parameter in model.named_parameters():
        assert parameter.is_floating_point() == (group_of(name) in kept), name
        assert parameter.dtype in (torch.bfloat16, torch.uint8, torch.int8), name
    assert len(experts_of(model)) == 2


@pytest.mark.parametrize("form", FORMS)
def test_saving_after_an_evaluation_and_loading_keeps_every_bit(quantisable: Path, form: str, tmp_path: Path) -> None:
    model = load(quantisable, form)
    expected = logits(model)  # bitsandbytes' fast CPU path would repack weights here
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = again.state_dict()
    assert weights.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert weights[name].dtype == weight.dtype and torch.equal(weights[name], weight), name
    assert torch.equal(logits(again), expected)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == ("duet_moe_bnb_8bit" if form == "int8" else "duet_moe_bnb_4bit")
    assert torch.equal(DuetMoeModel.from_pretrained(tmp_path)(IDS)[0], model.model(IDS)[0])


def test_gradients_pass_attention_also_after_an_evaluation(quantisable: Path) -> None:
    for form in FORMS:
        model = load(quantisable, form)
        logits(model)
        model.train()
        for name in ("q_proj", "o_proj"):
            layer = getattr(model.model.layers[0].self_attn, name)
            states = torch.randn(1, 3, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
            layer(states).sum().backward()
            assert states.grad is not None and states.grad.any(), (form, name)


def test_layers_of_a_width_that_32_does_not_divide_work(tmp_path: Path) -> None:
    tiny_model(**SHAPE, num_key_value_heads=1).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.model.layers[0].self_attn.k_proj.out_features == 16
    assert logits(model).isfinite().all()


def test_the_fast_cpu_path_of_bitsandbytes_is_off(quantisable: Path) -> None:
    layers = [module for module in load(quantisable).modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 2 * (4 + 3)  # attention, and three of the shared experts
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_dequantizing_restores_experts_and_attention(quantisable: Path) -> None:
    for form in FORMS:
        model = load(quantisable, form, torch.float32)
        expected = logits(model)
        whole = model.dequantize()
        assert not experts_of(whole) and all(p.is_floating_point() for p in whole.parameters())
        error = (logits(whole) - expected).norm() / expected.norm()
        assert error < (0.05 if form == "int8" else 1e-4), form  # LLM.int8 rounds activations too


def test_a_skip_list_adds_to_the_heads(quantisable: Path) -> None:
    model = load(quantisable, llm_int8_skip_modules=["k_proj"])
    attention = model.model.layers[0].self_attn
    assert type(attention.k_proj) is nn.Linear and type(attention.q_proj) is bnb.nn.Linear4bit
    assert all(type(head.gate_proj) is nn.Linear for head in (model.coherence_head, model.diversity_head))
    skipped = model.config.quantization_config.llm_int8_skip_modules
    assert skipped == ["k_proj", "coherence_head", "diversity_head", "token_gate", "task_router"]


def test_lora_on_the_diversity_head_trains_and_leaves_factual_mode_alone(quantisable: Path) -> None:
    from peft import LoraConfig, get_peft_model

    for form in ("nf4", "int8"):
        model = load(quantisable, form)
        before = logits(model, head_mix=0.0)
        target = r"diversity_head\.(gate_proj|up_proj|down_proj|unembed)"
        tuned = get_peft_model(model, LoraConfig(r=4, target_modules=target, task_type="CAUSAL_LM"))
        frozen = {name: p.clone() for name, p in tuned.named_parameters() if not p.requires_grad}
        trained = {name: p.clone() for name, p in tuned.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=0.02)
        losses = []
        for _ in range(8):
            losses.append(tuned(input_ids=IDS, labels=IDS, head_mix=1.0).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < 0.8 * losses[0], losses
        after = dict(tuned.named_parameters())
        assert all(torch.equal(after[name], value) for name, value in frozen.items())
        assert all("diversity_head" in name for name in trained)
        assert not any(torch.equal(after[name], value) for name, value in trained.items() if "lora_B" in name)
        assert torch.equal(logits(model, head_mix=0.0), before)


def test_loading_says_once_what_the_groups_weigh(quantisable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("transformers.duet_moe"), "handle", told.append)
    DuetMoeForCausalLM.from_pretrained(quantisable)
    assert not told
    sizes = bytes_by_group(load(quantisable))
    assert len(told) == 1
    for size in (sizes["experts"], sizes["attention"], sizes["total"]):
        assert f" {size:,}" in told[0].getMessage()


def test_8_bit_layers_do_not_log_a_cast_for_every_token(quantisable: Path, caplog: pytest.LogCaptureFixture) -> None:
    logits(load(quantisable, "int8"))
    assert "inputs will be cast" not in caplog.text


REFUSED = {
    "experts skipped": (dict(FORMS["nf4"], llm_int8_skip_modules=["experts"]), r"layers\.0\.mlp\.experts\.gate_up"),
    "one weight skipped": (dict(FORMS["int8"], llm_int8_skip_modules=["down_proj"]), "stayed in bfloat16.*skip list"),
    "unknown type": (dict(load_in_4bit=True, bnb_4bit_quant_type="int4"), "bnb_4bit_quant_type='int4'.*'nf4' or"),
    "nothing asked": ({}, "load_in_4bit=True or load_in_8bit=True"),
    "other storage": (dict(FORMS["nf4"], bnb_4bit_quant_storage="bfloat16"), "bnb_4bit_quant_storage=torch.bfloat16"),
    "16-bit weights": (dict(FORMS["int8"], llm_int8_has_fp16_weight=True), "llm_int8_has_fp16_weight=True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_experts_cannot_follow_is_refused(quantisable: Path, case: str) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        DuetMoeForCausalLM.from_pretrained(quantisable, quantization_config=BitsAndBytesConfig(**settings))


@pytest.mark.parametrize("config", [GPTQConfig(bits=4), AwqConfig(bits=4), dict(quant_method="gptq", bits=4)])
def test_methods_for_plain_layers_are_refused_with_what_is_possible(quantisable: Path, config: object) -> None:
    with pytest.raises(ValueError, match=r"quant_method='(gptq|awq)' .*Possible are BitsAndBytesConfig"):
        DuetMoeForCausalLM.from_pretrained(quantisable, quantization_config=config)


def test_rows_that_blocks_do_not_fill_are_refused_in_4_bits_only(tmp_path: Path) -> None:
    tiny_model(hidden_size=64, intermediate_size=96).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.down_proj has rows of 96 .*load_in_8bit=True"):
        load(tmp_path)
    assert experts_of(load(tmp_path, "int8"))


def test_a_checkpoint_that_names_the_plain_method_is_refused(quantisable: Path, tmp_path: Path) -> None:
    shutil.copytree(quantisable, tmp_path / "plain")
    config = json.loads((quantisable / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj stayed in bfloat16"):
        DuetMoeForCausalLM.from_pretrained(tmp_path / "plain")


def test_a_truncated_quantised_checkpoint_is_no_model(quantisable: Path, tmp_path: Path) -> None:
    load(quantisable).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(OSError, match="model.safetensors has .* bytes and should have"):
        DuetMoeForCausalLM.from_pretrained(tmp_path)


def test_a_machine_without_bitsandbytes_is_told_what_to_install(
    quantisable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bits, form in ((4, "nf4"), (8, "int8")):
        where = f"transformers.quantizers.quantizer_bnb_{bits}bit.is_bitsandbytes_available"
        monkeypatch.setattr(where, lambda: False)
        with pytest.raises(ImportError, match="pip install -U bitsandbytes"):
            load(quantisable, form)


@pytest.mark.slow
def test_a_process_without_the_package_loads_a_quantised_checkpoint(quantisable: Path, tmp_path: Path) -> None:
    model = load(quantisable)
    model.save_pretrained(tmp_path / "model")
    torch.save(logits(model), tmp_path / "expected.pt")
    code = f"""
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
with torch.no_grad():
    found = model(torch.tensor({IDS.tolist()}), head_mix=0.5).logits
assert torch.equal(found, torch.load({str(tmp_path / "expected.pt")!r}))
print(type(model).__module__)
"""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", BLOCK + code],
        env=env | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("transformers_modules.")


def test_a_quantised_model_is_not_cast(quantisable: Path) -> None:
    with pytest.raises(ValueError, match="cannot cast"):
        load(quantisable).to(torch.float16)


def test_the_snippets_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parent.parent / "docs" / "quantisation.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.S)[:2]:  # test_torchao.py has the third
        exec(block, names)
    assert len(experts_of(DuetMoeForCausalLM.from_pretrained("duet-mini-4bit"))) == 4
    assert all("diversity_head" in name for name, p in names["tuned"].named_parameters() if p.requires_grad)
