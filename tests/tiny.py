"""Models that run in milliseconds, with weights large enough that a wrong mask, expert or mix shows in the logits."""

from functools import lru_cache
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from duet_moe import DuetMoeConfig, DuetMoeForCausalLM, Writer
from duet_moe.finetune.tokenizer import train_tokenizer

SHAPE = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    sliding_window=8,
    max_position_embeddings=256,
    plan_size=8,
    initializer_range=0.3,
)
WINDOW = 8
CLOSE = dict(rtol=0.0, atol=5e-5)  # float32, sums in another order; the logits are of size 1 to 10
SENTENCES = (
    "The little fox ran over the hill and sang to the moon.",
    "What is the capital of Portugal? The capital of Portugal is Lisbon.",
    "Once upon a time there was a café by the sea, and a cat who kept its door.",
    "Mercury has 0 moons, Mars has 2, and 17 + 4 is 21.",
)


def tiny_config(**changes: object) -> DuetMoeConfig:
    return DuetMoeConfig(**(SHAPE | changes))


def tiny_model(seed: int = 0, **changes: object) -> DuetMoeForCausalLM:
    """Return a model whose heads differ, whose plan matters, and which no end token stops."""
    torch.manual_seed(seed)
    model = DuetMoeForCausalLM(tiny_config(**changes)).eval()
    for head in (model.coherence_head, model.diversity_head):
        nn.init.normal_(head.down_proj.weight, std=0.3)
        nn.init.normal_(head.norm.weight, mean=1.0, std=0.1)
    if model.diversity_head.plan_proj is not None:
        nn.init.normal_(model.diversity_head.plan_proj.weight, std=0.3)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """Return random ids (rows, length), none of them special."""
    return torch.randint(6, SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


@lru_cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(SENTENCES * 20, vocab_size=320, model_max_length=256)


def pad_rows(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack rows (length,) of different lengths; returns ids and mask, both (rows, longest)."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[number, span], mask[number, span] = row, 1
    return ids, mask


def save_tiny(folder: Path, **changes: object) -> Path:
    """Save the tiny model and its tokenizer, as a base that commands can be given."""
    tokenizer = tiny_tokenizer()
    tiny_model(vocab_size=len(tokenizer), **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_writer_of(tokenizer: PreTrainedTokenizerFast, **changes: object) -> Writer:
    """Return a writer of random bytes, with a context of 256 tokens and a window of 16."""
    shape = dict(vocab_size=len(tokenizer), sliding_window=16, max_position_embeddings=256) | changes
    model = tiny_model(**shape)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return Writer(model, tokenizer)
