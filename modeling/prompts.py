"""Prompts to token ids: in the chat template, within the context's room, and with no special token of their own."""

from collections.abc import Sequence

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase


def read_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint; FileNotFoundError if it has none."""
    try:
        return AutoTokenizer.from_pretrained(source)
    except ValueError as error:
        raise FileNotFoundError(
            f"{source!r} has no tokenizer: save the one it was trained with beside it, "
            f"tokenizer.save_pretrained({source!r})."
        ) from error


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], context: int, max_new_tokens: int
) -> tuple[dict[str, torch.Tensor], list[tuple[str, ...]]]:
    """Return prompts as a model reads them, and notes on each of them, such as that it was cut.

    Args:
        context: tokens of prompt and answer together that the model can hold.

    Returns:
        `input_ids` and `attention_mask`, int64 (prompts, seq), padded on the left.

    Raises:
        ValueError: on an empty prompt, or where `max_new_tokens` leave no room for one.
    """
    room = context - max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt: this model's context has {context} tokens."
        )
    ids: list[list[int]] = []
    notes: list[tuple[str, ...]] = []
    for prompt in prompts:
        said = without_special_tokens(tokenizer, prompt or "")
        if not said.strip():
            raise ValueError("The prompt is empty: say what to write or ask a question.")
        encoded = _chat_ids(tokenizer, said)
        cut = len(encoded) - room
        notes.append((f"The prompt was too long: its first {cut} tokens were left out.",) if cut > 0 else ())
        ids.append(encoded[:1] + encoded[cut + 1 :] if cut > 0 else encoded)  # the turn's own mark stays
    width = max(map(len, ids))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    batch = {
        "input_ids": torch.tensor([[pad] * (width - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
    }
    return batch, notes


def without_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Take out what would end the text's own turn, also where taking out one such token joins another."""
    while found := [special for special in tokenizer.all_special_tokens if special in text]:
        for special in found:
            text = text.replace(special, "")
    return text


def _chat_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    if not tokenizer.chat_template:
        return tokenizer(prompt)["input_ids"]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]
