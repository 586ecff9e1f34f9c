"""Tiny models of the families that can be converted, built with transformers' own classes, and their folders."""

import json
from pathlib import Path

import torch
from tiny import tiny_tokenizer, tokens
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from duet_moe import DuetMoeForCausalLM

EXACT = dict(rtol=0.0, atol=1e-4)
SHAPE = dict(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.3,
    eos_token_id=1,
    bos_token_id=None,
    pad_token_id=0,
)
OWN = {
    "mixtral": (MixtralConfig, dict(num_local_experts=6, num_experts_per_tok=3, rms_norm_eps=1e-3)),
    "qwen3_moe": (
        Qwen3MoeConfig,
        dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20, head_dim=12, norm_topk_prob=True),
    ),
    "olmoe": (OlmoeConfig, dict(num_experts=6, num_experts_per_tok=3)),
    "llama": (LlamaConfig, dict(head_dim=12, tie_word_embeddings=True)),
    "mistral": (MistralConfig, dict(sliding_window=None)),
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}


def source_model(family: str, **changes: object) -> PreTrainedModel:
    """Return a random float32 model, its norms no longer all ones."""
    config_class, own = OWN[family]
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config_class(**(SHAPE | own | changes)), dtype=torch.float32).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, mean=1.0, std=0.2)
    model.generation_config = GenerationConfig(
        eos_token_id=1, pad_token_id=0, do_sample=True, temperature=0.7, top_k=11
    )
    return model


def save_source(model: PreTrainedModel, folder: Path, **how: object) -> Path:
    """Save a model with a tokenizer that has a chat template; returns the folder."""
    model.save_pretrained(folder, **how)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.no_grad()
def assert_answers_equal(model: DuetMoeForCausalLM, source: PreTrainedModel, length: int = 40) -> None:
    """Compare logits of size 1 to 30 in every mix."""
    ids = tokens(2, length)
    expected = source(ids).logits
    assert expected.std() > 0.5
    for mix in (0.0, 1.0):
        torch.testing.assert_close(model(ids, head_mix=mix).logits, expected, **EXACT)
    torch.testing.assert_close(model(ids, head_mix=0.4).logits, expected.log_softmax(-1), **EXACT)
