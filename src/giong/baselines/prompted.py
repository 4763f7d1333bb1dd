"""What every arm is: a Predictor that puts a request in its own words and asks another Predictor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from giong.contracts import OnProgress, Predictor, Reply, Request


class Prompted(ABC):
    """`prompt` says what is asked; also the likelihood of the author's answer is measured under that very prompt."""

    def __init__(self, predictor: Predictor, name: str) -> None:
        self.predictor, self.name = predictor, name

    @abstractmethod
    def prompt(self, request: Request) -> Request:
        """The request as this arm puts it; id and sampling stay."""

    def predict(self, requests: Sequence[Request], on_progress: OnProgress | None = None) -> list[Reply]:
        return self.predictor.predict([self.prompt(request) for request in requests], on_progress)
