"""Words beyond the answer: a turn that goes on as somebody else, an answer that begins again, an assistant's phrases.

A reply may end by itself and still have said too much. The marks are those of chat formats; the phrases are English and Vietnamese,
and count only where the author does not use them too.
"""

from __future__ import annotations

import re

from giong.data.words import count_words
from giong.evaluation.metrics.text import CHARACTERS_PER_WORD, mostly_unspaced, word_spans, words

_OTHER_TURN = re.compile(
    r"<\|[\w ]{1,30}\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>"
    r"|(?m:^[ \t]*(?:#{2,}[ \t]*(?:instruction|response|input|question|answer|user|assistant|human)\b"
    r"|(?:user|assistant|human|system|người dùng|trợ lý)[ \t]*:))",
    re.IGNORECASE,
)
_PREAMBLE = re.compile(
    r"\s*(?:sure[,!.]|certainly[,!.]|absolutely[,!.]|of course[,!]|(?:sure, )?here(?:'s| is| are) (?:the|a|an|your|my)\b[^.\n]{0,60}:"
    r"|as an ai\b|chắc chắn rồi|tất nhiên rồi|dưới đây là|sau đây là|đây là bản)",
    re.IGNORECASE,
)
_POSTAMBLE = re.compile(
    r"let me know if|i hope this helps|hope that helps|feel free to|would you like me to|is there anything else"
    r"|hy vọng (?:điều này|thông tin)|hãy cho tôi biết|bạn có muốn tôi",
    re.IGNORECASE,
)
_REPEATED_START_WORDS = 6
_TAIL_CHARACTERS = 200


def words_beyond(text: str) -> int:
    """Words after the mark of another turn, or from where the reply begins again with its own first six words; 0 for most texts."""
    ends = [match.start() for match in [_OTHER_TURN.search(text)] if match]
    tokens, spans = words(text), word_spans(text)
    size = _REPEATED_START_WORDS * (CHARACTERS_PER_WORD if mostly_unspaced(text) else 1)
    again = next((start for start in range(size, len(tokens) - size + 1) if tokens[start : start + size] == tokens[:size]), None)
    ends += [spans[again][0]] if again is not None else []
    return count_words(text[min(ends) :]) if ends else 0


def assistant_talk(text: str) -> bool:
    """Whether a text opens or closes as assistants do ("Sure, here is the text:", "Let me know if ...")."""
    return bool(_PREAMBLE.match(text) or _POSTAMBLE.search(text[-_TAIL_CHARACTERS:]))
