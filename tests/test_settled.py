"""Settled tokens: digits, what goes on a word, and names."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from duet_moe.finetune.settled import settled_tokens
from duet_moe.finetune.tokenizer import SPECIAL_TOKENS, wrap_tokenizer

SETTLED = ["7", "Ġ7", "ing", "'s", "ĠLisbon", "Porto", "é", "Ã", "Ġx2"]
OPEN = ["Ġthe", "ĠThe", "The", "Ġonce", "Once", "Ġ", ".", 'Ġ"', "Ċ", "'", "Ġ-", "ĠÃ©t"]


@pytest.fixture(scope="module")
def spelled() -> PreTrainedTokenizerFast:
    words = [*SPECIAL_TOKENS, "a", *SETTLED, *OPEN]
    bpe = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    return wrap_tokenizer(bpe)


def test_digits_ends_of_words_and_names_are_settled_and_nothing_else(spelled: PreTrainedTokenizerFast) -> None:
    found = settled_tokens(spelled, len(spelled) + 3)
    words = [*spelled.convert_ids_to_tokens(range(len(spelled))), *["unused"] * 3]
    assert {word for word, value in zip(words, found.tolist(), strict=True) if value == 1} == {"a", *SETTLED}
    assert sorted(set(found.tolist())) == [0.0, 1.0]


def test_a_model_with_fewer_tokens_is_refused(spelled: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=f"{len(spelled)} tokens and the model 20"):
        settled_tokens(spelled, 20)
