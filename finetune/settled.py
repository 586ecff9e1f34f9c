"""Which tokens are the coherence head's to choose, whatever the gate says.

Digits, because a wrong one is a wrong fact; what goes on a word that has begun, because two heads would spell two
words; and names, which are copied and not invented.
"""

import torch
from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"  # what a tokenizer shows for a part of a character


def settled_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.Tensor:
    """Return 1 for tokens that are settled and 0 for others, float32 (vocab_size,).

    Settled are tokens with a digit; letters without a space before them, parts of characters, contractions ("'s"), and
    capitalised words that the vocabulary does not also have in lower case. Other capitals begin a sentence and are not
    settled.

    Raises:
        ValueError: if the tokenizer has more tokens than `vocab_size`.
    """
    if len(tokenizer) > vocab_size:
        raise ValueError(f"The tokenizer has {len(tokenizer)} tokens and the model {vocab_size}: they do not belong.")
    texts = _texts(tokenizer)
    known = set(texts)
    found = [_is_settled(text, known) for text in texts]
    return torch.tensor(found + [False] * (vocab_size - len(found))).float()


def _texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text of every token inside a sentence, with its leading space where it has one."""
    first = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = len(tokenizer.decode(first))  # a token that begins a text would lose its space
    rows = [[*first, index] for index in range(len(tokenizer))]
    return [text[start:] for text in tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)]


def _is_settled(text: str, known: set[str]) -> bool:
    word = text.strip()
    if any(character.isnumeric() for character in word):
        return True
    first = word.lstrip("'’")[:1]
    goes_on = text == word and (BROKEN in word or (first.isalpha() and not first.isupper()))
    is_name = word[:1].isupper() and not {text.lower(), f" {word.lower()}"} & known
    return goes_on or is_name
