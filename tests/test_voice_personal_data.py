"""What counts as personal data, what must stay, and that masking can be repeated."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duet_moe.finetune.voice_personal_data import mask_personal_data

CARD = "4111 1111 1111 1111"
IBAN = "GB82 WEST 1234 5698 7654 32"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to jo.doe+x@mail.ex-ample.co.uk.", "Write to [e-mail]."),
        ("müller@bücher.de", "[e-mail]"),
        (f"Card {CARD} 123, thanks", "Card [card] 123, thanks"),
        ("4111-1111-1111-1111", "[card]"),
        ("3782 822463 10005 or 378282246310005", "[card] or [card]"),
        (f"Pay to {IBAN} TODAY", "Pay to [IBAN] TODAY"),
        ("DE89370400440532013000.", "[IBAN]."),
        ("Call +49 (0)30 123456-78 now", "Call [phone] now"),
        ("030/1234567 or 020 7946 0958 or 01 23 45 67 89", "[phone] or [phone] or [phone]"),
        ("(555) 123-4567, 555.123.4567, 1-800-555-0199", "[phone], [phone], [phone]"),
        ("+1 650 253 0000", "[phone]"),
    ],
)
def test_personal_data_is_replaced_and_nothing_around_it(text: str, masked: str) -> None:
    found, counts = mask_personal_data(text)
    assert found == masked
    assert counts.total() == masked.count("[")


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",  # wrong check digit
        "0000000000000000",
        "GB83 WEST 1234 5698 7654 32",
        "on 01.02.2024, 01/02/24 and 2024-11-25",
        "01.02.2024 10.00",
        "1871-1914, page 100-1500, 10 000 000 people",
        "open 08.00-18.00 and 08.00 - 18.00",
        "ISBN 978-3-16-148410-0",
        "me@home, @handle, a@b",
        "3.14159265358",
        "1234567",
    ],
)
def test_other_numbers_and_signs_stay(text: str) -> None:
    assert mask_personal_data(text) == (text, {})


def test_kinds_are_counted() -> None:
    _, counts = mask_personal_data(f"a@b.org c@d.org {CARD} {IBAN} +1 650 253 0000")
    assert counts == {"e-mail": 2, "card": 1, "IBAN": 1, "phone": 1}


PIECES = st.sampled_from(
    [CARD, IBAN, "+1 650 253 0000", "030/1234567", "a@b.org", "0", "41", "-", " ", "@", "GB82", "."]
)


@given(st.lists(PIECES | st.text("0123456789 -+()./@aZ", max_size=12), max_size=8).map("".join))
@settings(deadline=None, max_examples=400)
def test_masking_a_masked_text_changes_nothing(text: str) -> None:
    masked, counts = mask_personal_data(text)
    assert mask_personal_data(masked) == (masked, {})
    assert bool(counts) == (masked != text)


def test_long_runs_cost_no_more_than_their_length() -> None:
    start = time.perf_counter()
    mask_personal_data("1" * 200_000 + "0 1" * 100_000 + "a." * 200_000 + "@" + "GB82 " * 50_000 + "(" * 100_000)
    assert time.perf_counter() - start < 10
