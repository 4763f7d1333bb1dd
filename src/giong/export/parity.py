"""Proof of parity: two models give the same log-probabilities and the same greedy answers to the same requests.

Compared are the author's own answers (likelihood) and greedy decoding. Another form of the weights rounds differently, so
small differences of log-probabilities are expected in bf16; what is allowed stands here and is printed with the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from giong.contracts import Example, Request, Sampling, ScoreRequest
from giong.engine.score import LocalScorer
from giong.generation.local import LocalModel

MAX_MEAN_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Nats per token, mean over the answer tokens. bf16 keeps 8 bits: weights merged or not differ in the last of them."""
GREEDY_TOKENS = 48


@dataclass(frozen=True)
class Parity:
    """`mean_difference` in nats per token (absolute); `same_answers` of `num_requests` greedy answers are identical."""

    passed: bool
    mean_difference: float
    allowed: float
    same_answers: int
    num_requests: int

    @property
    def sentence(self) -> str:
        word = "parity proven" if self.passed else "NOT the evaluated model"
        return (
            f"{word}: likelihoods differ by {self.mean_difference:.2g} nats per token (allowed {self.allowed:g}), "
            f"{self.same_answers} of {self.num_requests} greedy answers are identical"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_models(ours: LocalModel, adapter: str | None, theirs: LocalModel, their_adapter: str | None, examples: Sequence[Example]) -> Parity:
    """Compare two models on requests with known answers."""
    scores, answers = [], []
    for local, name in ((ours, adapter), (theirs, their_adapter)):
        with local.using(name):
            scored = LocalScorer(local.loaded).score([ScoreRequest(example.answer, example.messages) for example in examples])
        scores.append([value for score in scored for value in score.logprobs])
        requests = [Request(example.id, example.messages) for example in examples]
        answers.append([reply.text for reply in local.predictor("parity", name, Sampling(max_new_tokens=GREEDY_TOKENS)).predict(requests)])
    difference = sum(abs(a - b) for a, b in zip(*scores)) / len(scores[0]) if len(scores[0]) == len(scores[1]) else float("inf")
    same = sum(a == b for a, b in zip(*answers))
    allowed = MAX_MEAN_DIFFERENCE.get(ours.loaded.model.dtype, 2e-2)
    return Parity(difference <= allowed, difference, allowed, same, len(examples))
