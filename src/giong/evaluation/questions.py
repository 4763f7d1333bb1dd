"""A question set: whether a model knows, and whether it finds and cites what the documents say.

An answer counts where its words stand in the reply in a row, as in SQuAD's normalised match but for the words around it: models answer in
sentences. That forgives a reply that names several candidates, which is why F1 stands beside it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from giong.contracts import Passage, Reply
from giong.errors import DataError
from giong.evaluation.metrics.intervals import wilson
from giong.evaluation.metrics.text import words
from giong.sizing.interval import Interval

CITATION = re.compile(r"\[(\d{1,3})\]")


@dataclass(frozen=True, slots=True)
class Question:
    """A question and the answers that count."""

    id: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FactScores:
    """Shares of the questions: answered `correct`, `cited` a shown passage that holds the answer, and `found` in the passages shown.

    The last two are None for a model without passages. `f1` is the mean overlap of words with the nearest answer.
    """

    correct: Interval
    f1: float
    found: Interval | None = None
    cited: Interval | None = None


def read_questions(path: Path) -> list[Question]:
    """JSON lines of `question` and `answer` (a text, or a list of texts that all count). Raises DataError with file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The questions cannot be read: {error}", place=str(path), remedy="Correct data.questions.") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
            answers = [row["answer"]] if isinstance(row["answer"], str) else list(row["answer"])
            question = Question(f"q{number}", row["question"].strip(), tuple(answers))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(
                "This is no question with its answer", place=place, remedy='Write {"question": "...", "answer": "..."}.'
            ) from None
        if not question.question or not answers or not all(isinstance(answer, str) and words(answer) for answer in answers):
            raise DataError("A question or an answer is empty", place=place, remedy="Fill it in, or remove the line.")
        found.append(question)
    if not found:
        raise DataError("There are no questions in this file", place=str(path), remedy="Add some, or leave data.questions out.")
    return found


def holds(text: str, answer: str) -> bool:
    """Whether the words of the answer stand in the text, in a row."""
    return f" {' '.join(words(answer))} " in f" {' '.join(words(text))} "


def score_answers(questions: Sequence[Question], replies: Sequence[Reply], shown: Sequence[Sequence[Passage]] | None = None) -> FactScores:
    """What an arm makes of the questions; `shown` are the passages of each, numbered from 1 in the reply's citations."""
    texts = [reply.text for reply in replies]
    # A citation is no part of the answer.
    plain = [CITATION.sub(" ", text) for text in texts]
    num = len(questions)
    correct = [any(holds(text, answer) for answer in question.answers) for question, text in zip(questions, plain)]
    f1 = fmean(max(_f1(text, answer) for answer in question.answers) for question, text in zip(questions, plain))
    if shown is None:
        return FactScores(wilson(sum(correct), num), f1)
    holding = [
        {number for number, passage in enumerate(passages, start=1) if any(holds(passage.text, answer) for answer in question.answers)}
        for question, passages in zip(questions, shown)
    ]  # fmt: skip
    cited = sum(bool(numbers & {int(number) for number in CITATION.findall(text)}) for numbers, text in zip(holding, texts))
    return FactScores(wilson(sum(correct), num), f1, wilson(sum(map(bool, holding)), num), wilson(cited, num))


def _f1(text: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words (Rajpurkar et al. 2016, 1606.05250, section 6.1)."""
    given, wanted = Counter(words(text)), Counter(words(answer))
    shared = (given & wanted).total()
    return 2 * shared / (given.total() + wanted.total()) if shared else 0.0
