"""The training examples whose requests are most like the new one, shown before it, the most similar last."""

from __future__ import annotations

from collections.abc import Sequence

from giong.baselines.nearest import TextIndex
from giong.baselines.prompted import Prompted
from giong.baselines.turns import CountTokens, different_answers, fits, shown, with_turns
from giong.contracts import Example, Predictor, Request, request_text


class Retrieval(Prompted):
    """The model with the nearest examples; where they do not all fit, the least similar are left out."""

    def __init__(
        self, predictor: Predictor, train_examples: Sequence[Example], num_shots: int, name: str = "retrieval", *,
        count_tokens: CountTokens | None = None, max_prompt_tokens: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(predictor, name)
        self.num_shots = num_shots
        self._count_tokens, self._max_prompt_tokens = count_tokens, max_prompt_tokens
        self._examples = list(train_examples)
        self._index = TextIndex([request_text(example.messages) for example in self._examples])
        self.shots_by_request: dict[str, int] = {}

    @property
    def num_shots_used(self) -> int:
        """Examples shown: the fewest that any request got so far."""
        return min([self.num_shots, len(different_answers(self._examples)), *self.shots_by_request.values()])

    def nearest(self, request: Request) -> list[Example]:
        """The nearest examples with different answers, most similar last."""
        order = self._index.order(request_text(request.messages))
        return different_answers([self._examples[index] for index in order])[: self.num_shots][::-1]

    def prompt(self, request: Request) -> Request:
        shots = self.nearest(request)
        while shots and not fits(with_turns(request, shown(shots)).messages, self._count_tokens, self._max_prompt_tokens):
            shots.pop(0)
        self.shots_by_request[request.id] = len(shots)
        return with_turns(request, shown(shots))
