"""torchao's int8 reaches the experts that are named, and never the heads."""

import re
from pathlib import Path

import pytest
import torch
from quantized import SHAPE, logits
from tiny import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig

from duet_moe import DuetMoeForCausalLM
from duet_moe.modeling.footprint import bytes_by_group
from duet_moe.modeling.quantization import require_quantized_experts

pytest.importorskip("torchao", reason="torchao is not installed")


def torchao_int8() -> TorchAoConfig:
    """Return the configuration that docs/quantisation.md shows."""
    page = (Path(__file__).parent.parent / "docs" / "quantisation.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "TorchAoConfig" in block)
    names: dict = {}
    exec(code.split("model =")[0], names)
    return names["config"]


def test_torchao_reaches_experts_and_attention_and_comes_back_bit_for_bit(quantisable: Path, tmp_path: Path) -> None:
    whole = logits(DuetMoeForCausalLM.from_pretrained(quantisable))
    model = DuetMoeForCausalLM.from_pretrained(quantisable, quantization_config=torchao_int8())
    require_quantized_experts(model)
    assert type(model.model.layers[0].self_attn.q_proj.weight) is not nn.Parameter
    for head in (model.coherence_head, model.diversity_head):
        assert all(type(parameter) is nn.Parameter for parameter in head.parameters())
    expected = logits(model)
    assert 0 < (expected - whole).float().norm() / whole.float().norm() < 0.05
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), expected)
    sizes = bytes_by_group(again)
    packed = 2 * (4 + 1) * 3 * 128 * 64  # layers, experts and the shared one, projections
    assert packed < sizes["experts"] < 1.1 * packed


@pytest.mark.parametrize("kind", ["Float8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_other_kinds_of_torchao_reach_the_experts_too(kind: str, quantisable: Path) -> None:
    import torchao.quantization

    config = TorchAoConfig(getattr(torchao.quantization, kind)())
    model = DuetMoeForCausalLM.from_pretrained(quantisable, quantization_config=config)
    require_quantized_experts(model)
    whole = logits(DuetMoeForCausalLM.from_pretrained(quantisable)).float()
    assert 0 < (logits(model).float() - whole).norm() / whole.norm() < 0.1


def test_a_choice_by_name_without_experts_is_refused(quantisable: Path) -> None:
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig

    int8 = Int8WeightOnlyConfig()
    kind = FqnToConfig({r"re:.*self_attn\.\w+_proj": int8, r"re:.*experts\.down_proj": int8})
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj stayed in bfloat16.*FqnToConfig"):
        DuetMoeForCausalLM.from_pretrained(quantisable, quantization_config=TorchAoConfig(kind))


def test_torchao_never_touches_heads_gate_and_router(quantisable: Path, tmp_path: Path) -> None:
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig

    int8 = Int8WeightOnlyConfig()
    kinds = {"_default": int8, r"re:.*experts\.gate_up_proj": int8, r"re:.*experts\.down_proj": int8}
    config = TorchAoConfig(FqnToConfig(kinds))
    model = DuetMoeForCausalLM.from_pretrained(quantisable, quantization_config=config)
    assert all(type(parameter) is nn.Parameter for parameter in model.diversity_head.parameters())
    tiny_model(**SHAPE, hybrid_gate=True, task_router_size=8).to(torch.bfloat16).save_pretrained(tmp_path)
    gated = DuetMoeForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert type(gated.token_gate.linear.weight) is nn.Parameter
    assert all(type(parameter) is nn.Parameter for parameter in gated.task_router.parameters())
    assert type(model.model.layers[0].mlp.shared_experts.up_proj.weight) is not nn.Parameter
    assert config.modules_to_not_convert is None  # the user's own object stays as it was
