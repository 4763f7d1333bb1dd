"""A rule-based rewriter for trying giong out without a teacher. Everything made with it is labelled "stand-in".

It turns plain English into stiff, impersonal English by word tables and stock phrases, and breaks every run of shared words
that is too long. It understands nothing: a model tuned on its requests learns to undo *it*, so it shows the loop and
proves nothing about a real teacher. Texts in other languages become lists of key words.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

from giong.contracts import Message, Reply, Sampling
from giong.data.synthesis.kinds import read_task
from giong.data.synthesis.leak import shared_run
from giong.data.synthesis.stand_in_words import (
    BREAKERS,
    CONNECTORS,
    CONTRACTIONS,
    FILLERS,
    FUNCTION_WORDS,
    IMPERSONAL,
    OFFICIAL,
    OPENERS,
    STOP_WORDS_VI,
)  # fmt: skip
from giong.data.words import Token, is_unspaced, tokenize

MIN_FUNCTION_WORD_SHARE = 0.2
NUM_KEY_WORDS = 5
NUM_KEY_CHARACTERS = 4

_ASIDE = re.compile(r"\s*\([^()]*\)")
_SENTENCE = re.compile(r"(?:(?<=[.!?…])|(?<=[.!?…][\"'”’)]))\s+(?=[A-Z\"'“‘(\d])")
_CLAUSE_END = re.compile(r"[.!?…。！？\n，、；：,;:]+")

_QUESTIONS = (
    (re.compile("[\u4e00-\u9fff](?!.*[\u3041-\u30ff])", re.DOTALL), "关于{}，你会写些什么？", "、", "和"),
    (re.compile("[ăđơư]", re.IGNORECASE), "Bạn sẽ viết gì về {}?", ", ", " và "),
    (re.compile(""), "What would you write about {}?", ", ", " and "),
)


class StandIn:
    """A teacher without a model; deterministic, free and offline."""

    name = "stand-in"

    def __init__(self, max_shared_words: int = 8) -> None:
        self.max_shared_words = max_shared_words

    def ask(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """The request that the rules make of the passage in `messages`; `sampling` changes nothing."""
        kind, text = read_task(messages)
        if kind.name == "question":
            request = question(text)
        elif kind.name == "neutral_rewrite" and is_english(text):
            return Reply(break_runs(neutral_rewrite(text), text, self.max_shared_words, _rephrase_at))
        else:
            # It cannot translate, nor rewrite what it has no tables for.
            request = outline(text)
        return Reply(break_runs(request, text, self.max_shared_words, _leave_out_at))


def is_english(text: str) -> bool:
    """Whether enough of the words are English function words for the tables to apply."""
    words = [token.text for token in tokenize(text)]
    return bool(words) and sum(word in FUNCTION_WORDS for word in words) >= MIN_FUNCTION_WORD_SHARE * len(words)


def neutral_rewrite(text: str) -> str:
    """The text in stiff, impersonal English, paragraph by paragraph; runs of shared words may remain."""
    return "\n\n".join(_rewrite_paragraph(" ".join(paragraph.split())) for paragraph in text.split("\n\n") if paragraph.strip())


def outline(text: str) -> str:
    """A line of key words for every sentence."""
    lines = (key_words(sentence) for paragraph in text.split("\n") for sentence in _sentences(paragraph))
    return "\n".join(f"- {', '.join(words)}" for words in lines if words)


def question(text: str) -> str:
    """Asks for a text about three key words that are spread over it."""
    words = list(dict.fromkeys(word for sentence in _sentences(" ".join(text.split())) for word in key_words(sentence)))
    chosen = words if len(words) <= 3 else [words[0], words[len(words) // 2], words[-1]]
    if not chosen:
        return ""
    asked, comma, last = next(wording for pattern, *wording in _QUESTIONS if pattern.search(text))
    listed = last.join([comma.join(chosen[:-1]), chosen[-1]]) if len(chosen) > 1 else chosen[0]
    return asked.format(listed)


def key_words(sentence: str) -> list[str]:
    """Up to five content words of a sentence in order; for scripts without spaces the first characters of each clause."""
    if sum(map(is_unspaced, sentence)) > len(sentence) / 3:
        clauses = [re.sub(r"[^\w]", "", clause) for clause in _CLAUSE_END.split(sentence)]
        return [clause[:NUM_KEY_CHARACTERS] for clause in clauses if clause][:NUM_KEY_WORDS]
    words = []
    for token in tokenize(sentence):
        written = sentence[token.start : token.end]
        plain = token.text in FUNCTION_WORDS or token.text in STOP_WORDS_VI or token.text.split("'")[0] in FUNCTION_WORDS
        if not plain and (len(written) > 2 or written.isdigit()) and written not in words:
            words.append(written)
    # Spread over the sentence and not its first five: neighbours would copy a phrase.
    step = max(1, len(words) // NUM_KEY_WORDS)
    return words[::step][:NUM_KEY_WORDS]


def break_runs(request: str, answer: str, max_shared_words: int, break_at: Callable[[str, list[Token]], str]) -> str:
    """Change the request until no run of `max_shared_words` is shared, where its words allow that."""
    answer_tokens = tokenize(answer)
    for _ in range(len(answer_tokens) + 1):
        tokens = tokenize(request)
        start, end = shared_run(tokens, answer_tokens)
        if sum(token.num_words for token in tokens[start:end]) < max_shared_words:
            break
        request = break_at(request, tokens[start:end])
    return request


def _rephrase_at(text: str, run: list[Token]) -> str:
    """Put a longer phrase for a small word near the middle of the run, or a filler between two words of it."""
    middle = len(run) // 2
    # Only near the middle: at an edge the longer form might leave the run as long as it was.
    near = sorted(range(max(1, middle - 2), min(len(run) - 1, middle + 3)), key=lambda index: abs(index - middle))
    for token in (run[index] for index in near):
        hyphenated = "-" in (text[token.start - 1 : token.start], text[token.end : token.end + 1])
        if token.text in BREAKERS and not hyphenated:
            longer = BREAKERS[token.text]
            longer = longer[0].upper() + longer[1:] if text[token.start].isupper() else longer
            return text[: token.start] + longer + text[token.end :]
    gaps = [text[run[index - 1].end : run[index].start] for index in range(1, len(run))]
    spaced = [index for index, gap in enumerate(gaps, start=1) if not gap.strip(" ,")]
    at = min(spaced or range(1, len(run)), key=lambda index: abs(index - middle))
    left, right = run[at - 1], run[at]
    filler = FILLERS[_number(left.text + right.text) % len(FILLERS)]
    return f"{text[: left.end]}, {filler}, {text[right.start :]}"


def _leave_out_at(text: str, run: list[Token]) -> str:
    """Leave out the middle word of the run."""
    token = run[len(run) // 2]
    return re.sub(r"(, ){2,}", ", ", text[: token.start] + text[token.end :]).replace("- , ", "- ")


def _rewrite_paragraph(paragraph: str) -> str:
    paragraph = _ASIDE.sub("", paragraph.replace("’", "'"))
    sentences = [_rewrite_sentence(sentence) for sentence in _sentences(paragraph)]
    return " ".join(_connect(sentence, position) for position, sentence in enumerate(sentences) if sentence)


def _rewrite_sentence(sentence: str) -> str:
    for pattern, replacement in CONTRACTIONS:
        sentence = pattern.sub(replacement, sentence)
    sentence = OPENERS.sub(lambda match: match.group(1).upper(), sentence)
    for pattern, replacement in IMPERSONAL:
        # "I" is always a capital: only at the sentence's start does that say anything.
        sentence = pattern.sub(lambda match, new=replacement: new if match.start() else _with_case(match, new), sentence)
    sentence = re.sub(r"[A-Za-z]+", _official, sentence)
    return re.sub(r"!+", ".", sentence).replace("?", ".").strip()


def _official(match: re.Match[str]) -> str:
    written = match.group()
    # A capital inside a sentence is a name.
    is_name = bool(match.start()) and written[0].isupper()
    return written if is_name else _with_case(match, OFFICIAL.get(written.lower(), written))


def _connect(sentence: str, position: int) -> str:
    """Prefix a stock connector to about half of the sentences, chosen by their hash, and to none twice in a row."""
    number = _number(sentence)
    first = re.match(r"[A-Za-z']+", sentence)
    # A word that may be a name stays capital, so nothing is put before it.
    if position == 0 or number % 2 or not first or first.group().lower() not in FUNCTION_WORDS:
        return sentence
    rest = sentence if first.group() == "I" else sentence[0].lower() + sentence[1:]
    return f"{CONNECTORS[(number // 2 + position) % len(CONNECTORS)]} {rest}"


def _sentences(text: str) -> list[str]:
    if sum(map(is_unspaced, text)) > len(text) / 3:
        return [sentence for sentence in re.split(r"(?<=[。！？!?])", text) if sentence.strip()]
    return [sentence.strip() for sentence in _SENTENCE.split(text) if sentence.strip()]


def _with_case(match: re.Match[str], replacement: str) -> str:
    written = match.group()
    return replacement[0].upper() + replacement[1:] if written[0].isupper() and replacement else replacement


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
