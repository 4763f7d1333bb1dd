"""Words of any script: counted for lengths, compared for leaks.

Scripts written without spaces (Han, Kana, Thai, Lao, Khmer, Myanmar) are not segmented: two of their characters count as
one word. A dictionary segmenter would be exacter for one language and wrong or missing for the next.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

UNSPACED_CLASS = (
    "\u0e00-\u0e7f\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u309f\u30a0-\u30ff\u3100-\u312f\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"
)
"""Code points of the scripts without spaces, as the inside of a regular expression's character class."""

_UNSPACED = re.compile(f"[{UNSPACED_CLASS}]")
_ASCII_WORD = re.compile(r"[A-Za-z0-9]+(?:'[A-Za-z0-9]+)*")
_APOSTROPHES = str.maketrans({"\u2019": "'", "\u02bc": "'", "\uff07": "'"})


@dataclass(frozen=True, slots=True)
class Token:
    """A case-folded word, or one character of a script without spaces; `start` and `end` index the original text."""

    text: str
    start: int
    end: int

    @property
    def num_words(self) -> float:
        return 0.5 if _UNSPACED.match(self.text) else 1.0


def is_unspaced(character: str) -> bool:
    """Whether a character belongs to a script that is written without spaces between words."""
    return bool(_UNSPACED.match(character))


def count_words(text: str) -> int:
    """Number of words; two characters (with their combining marks) of a script without spaces count as one, rounded up."""
    if text.isascii():
        return sum(1 for chunk in text.split() if any(map(str.isalnum, chunk)))
    num_spaced, num_characters = 0, 0
    for chunk in text.split():
        characters = [c for c in chunk if _UNSPACED.match(c)]
        num_characters += sum(1 for c in characters if unicodedata.category(c)[0] in "LN")
        if any(c.isalnum() and not _UNSPACED.match(c) for c in chunk):
            num_spaced += 1
    return num_spaced + (num_characters + 1) // 2


def tokenize(text: str) -> list[Token]:
    """Words without case and punctuation, in order; straight and curly apostrophes inside a word are the same."""
    if text.isascii():
        return [Token(match.group().lower(), match.start(), match.end()) for match in _ASCII_WORD.finditer(text)]
    tokens: list[Token] = []
    start = None
    plain = text.translate(_APOSTROPHES)
    for index, character in enumerate(plain):
        kind = unicodedata.category(character)[0]
        if _UNSPACED.match(character) and kind in "LN":
            if start is not None:
                tokens.append(_token(plain, start, index))
            tokens.append(Token(character, index, index + 1))
            start = None
        elif kind == "M" and start is None and tokens and tokens[-1].end == index:
            tokens[-1] = _token(plain, tokens[-1].start, index + 1)
        elif kind in "LNM":
            start = index if start is None else start
        elif start is not None and not (character == "'" and plain[index + 1 : index + 2].isalnum()):
            tokens.append(_token(plain, start, index))
            start = None
    if start is not None:
        tokens.append(_token(plain, start, len(plain)))
    return tokens


def _token(text: str, start: int, end: int) -> Token:
    # NFC after folding, so that one spelling of an accented letter is the other.
    return Token(unicodedata.normalize("NFC", text[start:end].casefold()), start, end)
