"""The model is asked once which writer or school comes nearest, and is then prompted with that name.

A name is the strongest short prompt there is for a large model, so leaving it out would flatter fine-tuning. A model
that gives no usable name gets a stated plain one, and the arm says so (`style_name_is_fallback`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from giong.baselines.few_shot import choose_shots
from giong.baselines.prompted import Prompted
from giong.baselines.turns import CountTokens, fits, with_turns
from giong.contracts import Example, Message, Predictor, Request, Sampling

FALLBACK_STYLE_NAME = "a plain-spoken personal essayist"
NUM_PASSAGES = 3
MAX_NAME_WORDS = 8
QUESTION = "Which well-known writer or school of writing comes nearest to these passages? Answer with the name only."


class NamedStyle(Prompted):
    """Asks for the name at the first use (one request), then adds it to every request's system message."""

    def __init__(
        self, predictor: Predictor, passages: Sequence[str], name: str = "named_style", *,
        count_tokens: CountTokens | None = None, max_prompt_tokens: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(predictor, name)
        self.passages = list(passages)
        self._count_tokens, self._max_prompt_tokens = count_tokens, max_prompt_tokens
        self.style_name_is_fallback = False
        self._style_name = ""

    @property
    def style_name(self) -> str:
        """The name in use; asks the model for it where that has not been done."""
        if not self._style_name:
            asked = Request("style-name", (self._question(),), Sampling(max_new_tokens=24))
            answer = clean_name(self.predictor.predict([asked])[0].text)
            self.style_name_is_fallback = not answer
            self._style_name = answer or FALLBACK_STYLE_NAME
        return self._style_name

    def prompt(self, request: Request) -> Request:
        instruction = (
            f"Write in the style of {self.style_name}. Keep every fact of the request and add none. "
            "Answer with the text alone, without a preface."
        )
        return with_turns(request, instruction=instruction)

    def _question(self) -> Message:
        for num in range(len(self.passages), 0, -1):
            question = Message("user", "\n\n---\n\n".join([*self.passages[:num], QUESTION]))
            if num == 1 or fits([question], self._count_tokens, self._max_prompt_tokens):
                return question
        return Message("user", QUESTION)


def clean_name(answer: str) -> str:
    """The first line without marks around it; empty where it is no name (nothing, or more than eight words)."""
    line = next((line for line in answer.splitlines() if line.strip()), "")
    line = re.sub(r"^\W*(?:answer|name)\s*:\s*", "", line, flags=re.IGNORECASE)
    line = line.strip().strip("\"'“”‘’*_#`-–—.,:;!?()[] ")
    return line if line and len(line.split()) <= MAX_NAME_WORDS and len(line) <= 80 and any(map(str.isalpha, line)) else ""


def style_passages(train_examples: Sequence[Example]) -> list[str]:
    """The passages that the question shows: of medium length, from different documents."""
    return [example.answer for example in choose_shots(train_examples, NUM_PASSAGES)]
