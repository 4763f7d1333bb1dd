"""Whether a request gives its answer away: a long run of shared words, the answer itself, a refusal, or nothing.

A run is counted in words; a character of a script without spaces is half a word, as everywhere in giong, so that a limit
of 8 words is 16 such characters. Case and punctuation do not count: changing only those is still copying.
"""

from __future__ import annotations

from giong.data.words import Token, count_words, tokenize

MAX_REFUSAL_WORDS = 40
_REFUSALS = (
    "i can't", "i cannot", "i can not", "i won't", "i'm unable", "i am unable", "i'm not able", "i am not able", "i'm sorry", "i am sorry",
    "sorry", "i apologi", "as an ai", "i must decline", "unfortunately, i",
    "xin lỗi", "tôi xin lỗi", "tôi không thể", "rất tiếc", "抱歉", "很抱歉", "对不起", "我无法", "我不能",
)  # fmt: skip


def longest_shared_run(request: str, answer: str) -> int:
    """Length of the longest run of words (single characters in scripts without spaces) that both texts contain."""
    start, end = shared_run(tokenize(request), tokenize(answer))
    return end - start


def leaks(request: str, answer: str, max_shared_words: int) -> bool:
    """Whether the texts share a run of at least `max_shared_words` words (twice as many characters without spaces)."""
    tokens = tokenize(request)
    start, end = shared_run(tokens, tokenize(answer))
    return sum(token.num_words for token in tokens[start:end]) >= max_shared_words


def shared_run(request: list[Token], answer: list[Token]) -> tuple[int, int]:
    """Start and end (in `request`) of the run of tokens shared with `answer` that has most words; the first such."""
    places: dict[str, list[int]] = {}
    for index, token in enumerate(answer):
        places.setdefault(token.text, []).append(index)
    best_words, best = 0.0, (0, 0)
    previous: dict[int, tuple[float, int]] = {}
    for index, token in enumerate(request):
        current: dict[int, tuple[float, int]] = {}
        for place in places.get(token.text, ()):
            num_words, length = previous.get(place - 1, (0.0, 0))
            run = current[place] = (num_words + token.num_words, length + 1)
            if run[0] > best_words:
                best_words, best = run[0], (index + 1 - run[1], index + 1)
        previous = current
    return best


def is_refusal(request: str) -> bool:
    """Whether a short text begins as models begin when they decline."""
    beginning = request.lstrip().replace("’", "'").casefold()
    return beginning.startswith(_REFUSALS) and count_words(request) <= MAX_REFUSAL_WORDS


def why_rejected(request: str, answer: str, max_shared_words: int) -> str:
    """Why a request cannot stand before this answer; an empty text where it can."""
    tokens = tokenize(request)
    if not tokens:
        return "the request is empty"
    answer_tokens = tokenize(answer)
    if [token.text for token in tokens] == [token.text for token in answer_tokens]:
        return "the request is the answer itself"
    if is_refusal(request):
        return f"the teacher refused: {' '.join(request.split())[:80]!r}"
    start, end = shared_run(tokens, answer_tokens)
    num_words = sum(token.num_words for token in tokens[start:end])
    if num_words >= max_shared_words:
        shared = " ".join(request[tokens[start].start : tokens[end - 1].end].split())
        return f"the request shares {num_words:g} words in a row with the answer: {shared[:120]!r}"
    return ""
