"""A fixed handful of the author's own answers, shown as turns before every request.

All requests get the same prefix, so that a local model can compute it once. How many fit is decided from the longest
training request when the arm is built, and not from the requests of one call, so that a resumed run prompts alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from giong.baselines.prompted import Prompted
from giong.baselines.turns import CountTokens, different_answers, fits, shown, with_turns
from giong.contracts import Example, Predictor, Request, request_text


class FewShot(Prompted):
    """The model with fixed examples; a single request too long for all of them gets fewer (`shots_by_request`)."""

    def __init__(
        self, predictor: Predictor, shots: Sequence[Example], train_examples: Sequence[Example], name: str = "few_shot", *,
        count_tokens: CountTokens | None = None, max_prompt_tokens: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(predictor, name)
        self._count_tokens, self._max_prompt_tokens = count_tokens, max_prompt_tokens
        longest = max(train_examples, key=lambda example: len(request_text(example.messages)), default=None)
        probe = Request("longest", longest.messages) if longest else None
        self.shots = list(shots)
        while self.shots and probe and not self._fits(probe, self.shots):
            self.shots.pop()
        self.shots_by_request: dict[str, int] = {}

    @property
    def num_shots_used(self) -> int:
        """Examples shown: the fewest that any request got so far."""
        return min([len(self.shots), *self.shots_by_request.values()])

    def prompt(self, request: Request) -> Request:
        num = len(self.shots)
        while num and not self._fits(request, self.shots[:num]):
            num -= 1
        self.shots_by_request[request.id] = num
        return with_turns(request, shown(self.shots[:num]))

    def _fits(self, request: Request, shots: Sequence[Example]) -> bool:
        return fits(with_turns(request, shown(shots)).messages, self._count_tokens, self._max_prompt_tokens)


def choose_shots(train_examples: Sequence[Example], num_shots: int) -> list[Example]:
    """Examples of medium length, spread evenly over the documents in their order; the same for the same rows."""
    examples = different_answers(train_examples)
    if not examples:
        return []
    medium = statistics.median(len(example.answer) for example in examples)
    by_document: dict[str, list[Example]] = {}
    for example in examples:
        by_document.setdefault(example.document_id, []).append(example)
    for rows in by_document.values():
        rows.sort(key=lambda example: (abs(len(example.answer) - medium), example.id))
    chosen: list[Example] = []
    while len(chosen) < min(num_shots, len(examples)):
        documents = [rows for rows in by_document.values() if rows]
        num = min(num_shots - len(chosen), len(documents))
        chosen += [documents[(2 * place + 1) * len(documents) // (2 * num)].pop(0) for place in range(num)]
    return chosen
