"""Proof of parity: two models give the same log-probabilities and the same greedy answers to the same requests.

Compared are the author's own answers (likelihood) and greedy decoding. Another form of the weights rounds differently, so
small differences of log-probabilities are expected in bf16; what is allowed stands here and is printed with the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from giong.contracts import TokenScores

MAX_MEAN_DIFFERENCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Nats per token, mean over the answer tokens. bf16 keeps 8 bits: weights merged or not differ in the last of them, which comes to 0.021 on
the demo; an update scaled wrongly by 5 % comes to 0.038 (docs/decisions/0014)."""
GREEDY_TOKENS = 48
"""Length of the greedy answers that are compared."""


@dataclass(frozen=True)
class Parity:
    """`mean_difference` in nats per token (absolute); `same_answers` of `num_requests` greedy answers are identical; `same_ends` says that the
    same tokens end an answer."""

    passed: bool
    mean_difference: float
    allowed: float
    same_answers: int
    num_requests: int
    same_ends: bool = True

    @property
    def sentence(self) -> str:
        word = "parity proven" if self.passed else "NOT the evaluated model"
        word = word if self.same_ends else f"{word} (it ends answers at other tokens)"
        return (
            f"{word}: likelihoods differ by {self.mean_difference:.2g} nats per token (allowed {self.allowed:g}), "
            f"{self.same_answers} of {self.num_requests} greedy answers are identical"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Behaviour:
    """What a model does on the requests of the proof: token scores of known answers, and its own greedy answers; and the tokens that
    end an answer."""

    scores: Sequence[TokenScores]
    answers: Sequence[str]
    end_token_ids: frozenset[int] = frozenset()


def compare(evaluated: Behaviour, exported: Behaviour, dtype: str) -> Parity:
    """Compare two models' behaviour on the same requests, computed in `dtype`."""
    pairs = [zip(ours.logprobs, theirs.logprobs, strict=True) for ours, theirs in zip(evaluated.scores, exported.scores, strict=True)]
    differences = [abs(ours - theirs) for pair in pairs for ours, theirs in pair]
    mean_difference = sum(differences) / len(differences)
    same = sum(ours == theirs for ours, theirs in zip(evaluated.answers, exported.answers, strict=True))
    allowed = MAX_MEAN_DIFFERENCE[dtype]
    same_ends = evaluated.end_token_ids == exported.end_token_ids
    return Parity(mean_difference <= allowed and same_ends, mean_difference, allowed, same, len(evaluated.answers), same_ends)


MAX_OUTPUT_DIFFERENCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest difference of an output, over the largest output."""


@dataclass(frozen=True)
class OutputParity:
    """Outputs for whole texts of two models: `largest_difference` is relative to the largest output."""

    passed: bool
    largest_difference: float
    allowed: float
    num_texts: int

    @property
    def sentence(self) -> str:
        word = "parity proven" if self.passed else "NOT the evaluated model"
        return (
            f"{word}: outputs for {self.num_texts} texts differ by {self.largest_difference:.2g} of the largest (allowed {self.allowed:g})"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_outputs(evaluated: np.ndarray, exported: np.ndarray, dtype: str, *, num_texts: int) -> OutputParity:
    """Compare what two models, computed in `dtype`, come to for the same texts."""
    difference = float(np.abs(evaluated - exported).max() / max(np.abs(evaluated).max(), 1e-6))
    allowed = MAX_OUTPUT_DIFFERENCE[dtype]
    return OutputParity(difference <= allowed, difference, allowed, num_texts)
