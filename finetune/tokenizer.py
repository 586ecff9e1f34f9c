"""Train and load the byte-level BPE tokenizer.

Any text survives a round trip: bytes are the alphabet, nothing is normalised and no space is added. Digits are single
tokens, so numbers the model has never seen are still spelled. The six special tokens have fixed ids, and the chat
template marks what the assistant says with `{% generation %}`, so that trainers can mask the prompt.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from duet_moe.finetune.corpus import Document, Source

PAD, END, USER, ASSISTANT, TEXT, SYSTEM = range(6)
SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|text|>", "<|system|>")

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}<|system|>{{ message['content'] | trim }}"
    "{%- elif message['role'] == 'user' -%}<|user|>{{ message['content'] | trim }}"
    "{%- elif message['role'] == 'assistant' -%}<|assistant|>"
    "{%- generation -%}{{ message['content'] | trim }}<|end|>{%- endgeneration -%}"
    "{%- else -%}{{ raise_exception('role must be system, user or assistant, not ' ~ message['role']) }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)

# Words with their leading space, single digits, runs of punctuation, line ends, other space: nothing crosses these.
_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}[\p{L}\p{M}]*| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 8192, model_max_length: int = 2048
) -> PreTrainedTokenizerFast:
    """Train a tokenizer of exactly `vocab_size` entries on `texts`.

    Raises:
        ValueError: `vocab_size` leaves no room for bytes and special tokens, or the texts are too few to fill it.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}; give at least {smallest} (bytes and special tokens)")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=2,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() < vocab_size:
        raise ValueError(f"the texts fill only {bpe.get_vocab_size()} of {vocab_size} entries; give more text")
    return wrap_tokenizer(bpe, model_max_length)


def wrap_tokenizer(bpe: Tokenizer, model_max_length: int = 2048) -> PreTrainedTokenizerFast:
    """Wrap a trained BPE for transformers, with its special tokens and chat template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=SPECIAL_TOKENS[PAD],
        eos_token=SPECIAL_TOKENS[END],
        extra_special_tokens=list(SPECIAL_TOKENS[USER:]),
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def weighted_texts(
    sources: Sequence["Source"],
    documents: Mapping[str, Sequence["Document"]],
    characters: int = 25_000_000,
    max_repeats: int = 5,
    seed: int = 0,
) -> Iterator[str]:
    """Yield prompts and responses so that every source has about its weight's share of `characters`."""
    total = sum(source.weight for source in sources)
    for index, source in enumerate(sources):
        texts = [text for document in documents[source.name] for text in (document.prompt, document.response) if text]
        random.Random(f"{seed}-{index}").shuffle(texts)
        left = characters * source.weight / total
        for _ in range(max_repeats):
            for text in texts:
                if left <= 0:
                    break
                left -= len(text)
                yield text


def tokens_per_word(tokenizer: PreTrainedTokenizerFast, documents: Sequence["Document"]) -> float:
    """Return tokens per whitespace-separated word over prompts and responses, special tokens not counted."""
    texts = [text for document in documents for text in (document.prompt, document.response) if text]
    words = sum(len(text.split()) for text in texts)
    if not words:
        raise ValueError("no words to count; give at least one document")
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return sum(len(ids) for ids in encoded) / words


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load a saved tokenizer; ValueError when its special tokens are not ours."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path))
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    if ids != list(range(len(SPECIAL_TOKENS))):
        raise ValueError(
            f"{path}: special tokens have ids {ids}; train the tokenizer with duet_moe.finetune.tokenizer"
        )
    return tokenizer
