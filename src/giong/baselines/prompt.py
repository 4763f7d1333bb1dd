"""The two plainest arms: the model as it is, and the model with an instruction that describes the author.

The description is counted from the training texts (length of sentences and answers, punctuation), so that the prompt is
what a careful person would write, and is the same on every run. It quotes nothing of the author's.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

from giong.baselines.prompted import Prompted
from giong.baselines.turns import with_turns
from giong.contracts import Example, Predictor, Request
from giong.data.words import count_words

SENTENCE_END = re.compile(r"[.!?…。！？]+(?=\s|$|[\"”’」])|[。！？]|\n{2,}")
MARKS = {
    "questions": "?？", "exclamation marks": "!！", "semicolons": ";；", "dashes": "—–", "brackets": "(（", "colons": ":：",
    "ellipses": "…",
}  # fmt: skip
OFTEN_PER_SENTENCE = 0.12


class Base(Prompted):
    """The model as it is."""

    def __init__(self, predictor: Predictor, name: str = "base") -> None:
        super().__init__(predictor, name)

    def prompt(self, request: Request) -> Request:
        return request


class Instruction(Prompted):
    """The model with an instruction as its system message."""

    def __init__(self, predictor: Predictor, instruction: str, name: str = "instruction") -> None:
        super().__init__(predictor, name)
        self.instruction = instruction

    def prompt(self, request: Request) -> Request:
        return with_turns(request, instruction=self.instruction)


def describe(texts: Sequence[str]) -> str:
    """A plain description of how the author writes, counted from the texts: lengths of sentences and answers, punctuation."""
    sentences = [part for text in texts for part in SENTENCE_END.split(text) if part and part.strip()]
    if not sentences:
        return "plain sentences"
    joined = "".join(texts)
    rates = {name: sum(joined.count(mark) for mark in marks) / len(sentences) for name, marks in MARKS.items()}
    often = [name for name, rate in rates.items() if rate >= OFTEN_PER_SENTENCE]
    never = [name for name, rate in rates.items() if rate == 0]
    parts = [f"sentences of about {round(statistics.median(map(count_words, sentences)))} words"]
    parts += [f"frequent {_listed(often)}"] if often else []
    parts += [f"no {_listed(never)}"] if never else []
    parts.append(f"answers of about {round(statistics.median(map(count_words, texts)))} words")
    return "; ".join(parts)


def instruction_text(train_examples: Sequence[Example]) -> str:
    """The instruction of the arm `instruction`."""
    return (
        "You write in the voice of one particular author, never in a neutral or assistant-like voice. "
        f"The author writes {describe([example.answer for example in train_examples])}. "
        "Keep every fact of the request and add none. Answer with the text alone, without a preface."
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
