"""Personal data that patterns can find: e-mail addresses, phone numbers, bank accounts, payment cards.

Patterns miss names and addresses, which no pattern knows: what is found is certain enough to act on, what is not found proves nothing.
"""

from __future__ import annotations

import re

_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_DIGITS = re.compile(r"(?<![\w.,])\+?\(?\d(?:[ ().\-/]?\d){7,18}(?![\w]|[.,]\d)")
_DATE_OR_RANGE = re.compile(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{4}|\d{4} ?- ?\d{4}")

PersonalItem = tuple[str, str]
"""(kind, value): kinds are email, iban, card and phone; values are without spaces and signs, so that spellings compare."""


def personal_data(text: str) -> set[PersonalItem]:
    """All that the patterns find. Accounts and cards must have the right check digits; a phone number a + or a 0 in front, or groups."""
    found: set[PersonalItem] = {("email", match.casefold()) for match in _EMAIL.findall(text)}
    for match in _IBAN.finditer(text):
        account = match.group().replace(" ", "")
        if _iban_is_valid(account):
            found.add(("iban", account))
    for match in _DIGITS.finditer(_IBAN.sub(" ", text)):
        written = match.group()
        digits = re.sub(r"\D", "", written)
        if 13 <= len(digits) <= 19 and _luhn_is_valid(digits):
            found.add(("card", digits))
        elif len(digits) <= 15 and not _DATE_OR_RANGE.fullmatch(written) and (written[0] in "+(0" or len(re.findall(r"\d+", written)) >= 3):
            found.add(("phone", digits))
    return found


def _luhn_is_valid(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B: every second digit from the right doubled, digits summed, a multiple of ten."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0 and len(set(digits)) > 1


def _iban_is_valid(account: str) -> bool:
    """ISO 13616: the first four characters moved to the end, letters as numbers, rest 1 modulo 97."""
    return 15 <= len(account) <= 34 and int("".join(str(int(character, 36)) for character in account[4:] + account[:4])) % 97 == 1
