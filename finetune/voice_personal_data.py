"""Find personal data in a text: e-mail addresses, IBANs, payment cards and telephone numbers.

Cards and IBANs count only with a right check digit. Telephone numbers count with a leading + or 0 or in North American
groups; local numbers of a few digits cannot be told from other numbers and stay.
"""

import re
from collections import Counter
from collections.abc import Callable
from functools import partial

_GROUP_END = re.compile(r"[ -]?[^ -]*$")


def mask_personal_data(text: str) -> tuple[str, Counter[str]]:
    """Replace personal data by `[e-mail]`, `[IBAN]`, `[card]` and `[phone]`; return the text and counts by kind.

    Masking a masked text changes nothing.
    """
    counts: Counter[str] = Counter()
    while True:
        masked = text
        for kind, (pattern, is_valid) in _KINDS.items():
            masked = pattern.sub(partial(_replace, kind=kind, is_valid=is_valid, counts=counts), masked)
        # What is left of a run of digits may, with its neighbours, be the next number.
        if masked == text:
            return text, counts
        text = masked


def _replace(match: re.Match[str], kind: str, is_valid: Callable[[str], bool], counts: Counter[str]) -> str:
    """Mask a match without the last groups that do not belong to it ("4111 1111 1111 1111 123")."""
    number = found = match[0]
    while number and not is_valid(number):
        number = _GROUP_END.sub("", number)
    if not number:
        return found
    counts[kind] += 1
    return f"[{kind}]{found[len(number) :]}"


def _is_card(number: str) -> bool:
    """Check length and the Luhn digit (ISO/IEC 7812-1)."""
    digits = [int(character) for character in reversed(number) if character.isdigit()]
    total = sum(digits[::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2])
    return 13 <= len(digits) <= 19 and total % 10 == 0 and any(digits)


def _is_iban(number: str) -> bool:
    """Check length and the two check digits (ISO 13616, modulo 97)."""
    packed = number.replace(" ", "")
    return 15 <= len(packed) <= 34 and int("".join(str(int(c, 36)) for c in packed[4:] + packed[:4])) % 97 == 1


def _is_phone(number: str) -> bool:
    digits = sum(character.isdigit() for character in number)
    return (7 if number.startswith("+") else 9) <= digits <= 15


# A date such as 01.02.2024 begins like a number with a national prefix.
_DATE = r"(?!\d{1,2}([./-])\d{1,2}\1(?:\d\d){1,2}(?!\d))"
_KINDS: dict[str, tuple[re.Pattern[str], Callable[[str], bool]]] = {
    "e-mail": (
        re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?!\w)"),
        lambda found: True,
    ),
    "IBAN": (
        re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?(?![A-Za-z0-9])"),
        _is_iban,
    ),
    "card": (
        re.compile(
            r"(?<!\d)(?:[2-6]\d{3}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|3\d{3}([ -])\d{6}\2\d{4,5}|\d{13,19})(?!\d)"
        ),
        _is_card,
    ),
    "phone": (
        re.compile(
            rf"(?<![\w+])(?<!\d[./-])(?:\+\d(?:[ ./-]?\(?\d\)?){{6,14}}|{_DATE}\(?0\d(?:[ ./-]?\(?\d\)?){{7,13}}"
            r"|(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4})(?!\d)"
        ),
        _is_phone,
    ),
}
