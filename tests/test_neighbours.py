"""pipeline, PEFT, accelerate, torch.compile and torch.export run our model as they run any other."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import CLOSE, pad_rows, tiny_model, tokens
from torch.export import Dim, ExportedProgram, export
from transformers import AutoModelForCausalLM, pipeline
from transformers.cache_utils import StaticCache

from duet_moe import DuetMoeForCausalLM, Writer
from duet_moe.modeling.cache import DuetMoeCache

ADAPTER = r"diversity_head\.(gate_proj|up_proj|down_proj)"


def test_the_pipeline_answers_chat_messages_in_a_mode() -> None:
    writer = Writer.load("duet-mini")
    speak = pipeline("text-generation", model=writer.model, tokenizer=writer.tokenizer)
    question = "What is the capital of Portugal?"
    chat = [{"role": "user", "content": question}]
    for mode in ("factual", "creative"):
        answer = speak([chat], mode=mode, seed=3, max_new_tokens=24)[0][0]["generated_text"]
        assert answer[:-1] == chat
        assert answer[-1]["content"] == writer.write(question, mode=mode, seed=3, max_new_tokens=24).text


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A base model and, beside it, a LoRA adapter of its diversity head with weights that show."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'duet-moe[finetune]'")
    tiny_model().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=ADAPTER, task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    assert all("diversity_head" in name for name, weight in model.named_parameters() if weight.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@torch.no_grad()
def test_an_adapter_loads_by_itself_and_leaves_factual_mode_alone(adapter: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    voice, base, ids = AutoPeftModelForCausalLM.from_pretrained(adapter), tiny_model(), tokens(2, 12)
    assert torch.equal(voice(ids, head_mix=0.0).logits, base(ids, head_mix=0.0).logits)
    adapted, plain = voice(ids, head_mix=1.0).logits, base(ids, head_mix=1.0).logits
    assert (adapted - plain).abs().max() > 1e-2
    mixed = voice(ids, head_mix=1.0, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed, torch.stack([adapted[0], plain[1]]), **CLOSE)
    for mode in ("factual", "creative"):
        found = voice.generate(input_ids=ids, mode=mode, seed=1, max_new_tokens=12)
        same = torch.equal(found, base.generate(ids, mode=mode, seed=1, max_new_tokens=12))
        assert same is (mode == "factual")
    merged = voice.merge_and_unload()
    assert torch.equal(merged(ids, head_mix=0.0).logits, base(ids, head_mix=0.0).logits)
    torch.testing.assert_close(merged(ids, head_mix=1.0).logits, adapted, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("cpu", ["60KB", "90KB"])  # all lies on disk, or a part
def test_a_model_that_lies_on_disk_answers_bit_for_bit(tmp_path: Path, cpu: str) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'duet-moe[finetune]'")
    model, ids = tiny_model(num_hidden_layers=4), tokens(2, 12)
    model.save_pretrained(tmp_path / "model")
    settings = dict(device_map="auto", max_memory={"cpu": cpu}, offload_folder=tmp_path / "offload")
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **settings)
    assert "disk" in offloaded.hf_device_map.values()
    assert offloaded.diversity_head.unembed.weight.is_meta
    for mix in (0.0, 0.3, 1.0):
        found, expected = (m(ids, head_mix=mix, plan=torch.ones(2, 8)).logits for m in (offloaded, model))
        assert torch.equal(found, expected), mix
    for mode in ("factual", "creative"):
        found, expected = (m.generate(ids, mode=mode, seed=1, max_new_tokens=4) for m in (offloaded, model))
        assert torch.equal(found, expected), mode
    offloaded.config.head_mix = model.config.head_mix = 1.0
    assert torch.equal(offloaded.base_model(ids).last_hidden_state, model.base_model(ids).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("make", [DuetMoeCache, lambda config: StaticCache(config, max_cache_len=32)])
def test_decode_steps_compile_to_one_graph_without_a_break(model: DuetMoeForCausalLM, make: Callable) -> None:
    torch.compiler.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled, ids, settings = torch.compile(model, backend=count, fullgraph=True), tokens(2, 18), {"head_mix": 1.0}
    caches = [make(model.config), make(model.config)]
    for cache in caches:
        model(ids[:, :6], cache=cache)
    for step in range(6, 18):  # crosses the window
        token = ids[:, step : step + 1]
        found, expected = (
            m(token, cache=c, **settings).logits for m, c in zip((compiled, model), caches, strict=True)
        )
        torch.testing.assert_close(found, expected, **CLOSE)
    assert 1 <= len(graphs) <= 3  # the first step, then lengths as numbers that vary, then the full ring


@torch.no_grad()
def test_a_mix_given_as_a_tensor_needs_one_graph_for_all(model: DuetMoeForCausalLM) -> None:
    torch.compiler.reset()
    compiled, ids = torch.compile(model, backend="eager", fullgraph=True), tokens(2, 6)
    for values in ([0.0, 1.0], [0.4, 0.4]):
        mix = torch.tensor(values)
        with torch.compiler.set_stance("fail_on_recompile" if values[0] else "default"):
            found = compiled(ids, head_mix=mix).logits
        torch.testing.assert_close(found, model(ids, head_mix=mix).logits, **CLOSE)


@torch.no_grad()
def test_a_compiled_model_equals_eager_in_every_mix_and_generates(model: DuetMoeForCausalLM) -> None:
    torch.compiler.reset()
    compiled, ids = torch.compile(model, backend="aot_eager", fullgraph=True), tokens(2, 12)
    for settings in ({"head_mix": 0.0}, {"head_mix": 0.4, "plausible_min": 0.02}):
        torch.testing.assert_close(compiled(ids, **settings).logits, model(ids, **settings).logits, **CLOSE)
    expected = model.generate(ids, mode="creative", seed=3, max_new_tokens=8)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    assert torch.equal(model.generate(ids, mode="creative", seed=3, max_new_tokens=8), expected)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the inductor backend needs a C++ compiler: install g++")
def test_inductor_equals_eager() -> None:
    torch.compiler.reset()
    model, ids = tiny_model(num_hidden_layers=1), tokens(2, 12)
    torch.testing.assert_close(
        torch.compile(model)(ids, head_mix=0.4).logits, model(ids, head_mix=0.4).logits, **CLOSE
    )


def exported(model: DuetMoeForCausalLM, strict: bool = False, **inputs: torch.Tensor) -> ExportedProgram:
    shape = {0: Dim("batch"), 1: Dim("length")}
    shapes = {name: shape for name in inputs} | {"use_cache": None, "head_mix": None}
    return export(model, (), inputs | {"use_cache": False, "head_mix": 0.4}, dynamic_shapes=shapes, strict=strict)


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
def test_one_exported_program_serves_every_batch_and_length(tmp_path: Path, strict: bool) -> None:
    model = tiny_model(prompt_chunk_size=16)
    torch.export.save(exported(model, strict, input_ids=tokens(2, 12)), tmp_path / "duet.pt2")
    program = torch.export.load(tmp_path / "duet.pt2").module()
    for rows, length in ((2, 12), (3, 5), (1, 8), (1, 9), (1, 40), (1, 1)):  # both sides of the window and the chunk
        ids = tokens(rows, length)
        found = program(input_ids=ids, use_cache=False, head_mix=0.4).logits
        torch.testing.assert_close(found, model(ids, head_mix=0.4).logits, **CLOSE)


@torch.no_grad()
def test_an_exported_program_takes_padded_rows(model: DuetMoeForCausalLM) -> None:
    ids, mask = pad_rows([tokens(1, 12)[0], tokens(1, 9)[0]], "left")
    program = exported(model, input_ids=ids, attention_mask=mask).module()
    for rows in ([tokens(1, 4)[0], tokens(1, 15)[0]], [tokens(1, 5)[0]]):
        ids, mask = pad_rows(rows, "left")
        found = program(input_ids=ids, attention_mask=mask, use_cache=False, head_mix=0.4).logits
        real = mask.bool()
        torch.testing.assert_close(found[real], model(ids, mask, head_mix=0.4).logits[real], **CLOSE)
