"""Questions answered from passages of the author's documents, shown with numbers that the answer has to name.

Not one of `BASELINES`: those are ways to a voice, and this one is a way to facts. It is measured on questions of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from giong.baselines.nearest import TextIndex
from giong.baselines.prompted import Prompted
from giong.baselines.turns import CountTokens, fits
from giong.contracts import Message, Passage, Predictor, Request, request_text


class Lookup(Prompted):
    """The model with the nearest passages, the most similar first; where they do not all fit, the least similar are left out."""

    def __init__(
        self, predictor: Predictor, passages: Sequence[Passage], num_passages: int, name: str = "lookup", *,
        count_tokens: CountTokens | None = None, max_prompt_tokens: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(predictor, name)
        self.num_passages = num_passages
        self._count_tokens, self._max_prompt_tokens = count_tokens, max_prompt_tokens
        self._passages = list(passages)
        self._index = TextIndex([passage.text for passage in self._passages])
        self.shown_by_request: dict[str, list[Passage]] = {}

    def prompt(self, request: Request) -> Request:
        question = request_text(request.messages)
        passages = [self._passages[place] for place in self._index.order(question)[: self.num_passages]]
        while passages and not fits(_asked(question, passages), self._count_tokens, self._max_prompt_tokens):
            passages.pop()
        self.shown_by_request[request.id] = passages
        return Request(request.id, _asked(question, passages), request.sampling)


def _asked(question: str, passages: Sequence[Passage]) -> tuple[Message, ...]:
    numbered = "\n\n".join(f"[{number}] {passage.text}" for number, passage in enumerate(passages, start=1))
    task = "Answer the question from the passages alone, in one sentence, and name the passage that says it, like this: [1]."
    return (Message("user", f"{numbered}\n\n{task}\n\n{question}"),)
