"""Compression ratio: what gzip makes of the joined texts, and its order by repetition."""

import random
import string
import zlib

import pytest

from duet_moe.evaluation.compression import compression_ratio


def test_it_is_the_bytes_before_over_the_bytes_after() -> None:
    draw = random.Random(0)
    texts = [f"The fox r\u00e4n {draw.randrange(99)} times over the hill {draw.randrange(99)}." for _ in range(200)]
    content = " ".join(texts).encode()
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    compressed = len(deflate.compress(content) + deflate.flush()) + 18  # gzip's header of 10 bytes, and 8 at the end
    assert compression_ratio(texts) == len(content) / compressed


def test_one_byte_grows_to_twentyone() -> None:
    assert compression_ratio(["a"]) == pytest.approx(1 / 21)  # 3 bytes of deflate and gzip's 18


def test_repeated_texts_compress_better_than_different_ones() -> None:
    draw = random.Random(0)
    different = ["".join(draw.choices(string.ascii_lowercase + " ", k=200)) for _ in range(20)]
    same = different[:1] * 20
    assert compression_ratio(different) < 2 < 10 < compression_ratio(same)
    assert compression_ratio(different[:10] * 2) < compression_ratio(same)


def test_the_same_texts_give_the_same_number() -> None:
    texts = ["One text.", "And one more."]
    assert compression_ratio(texts) == compression_ratio(tuple(texts))


def test_an_empty_text_among_others_adds_its_space_alone() -> None:
    assert compression_ratio(["the fox", "", "the hen"]) == compression_ratio(["the fox  the hen"])


@pytest.mark.parametrize("texts", [[], [""], ["", "", ""]])
def test_texts_without_a_character_are_refused(texts: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{len(texts)} texts without a character"):
        compression_ratio(texts)
