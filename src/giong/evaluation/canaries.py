"""Canaries: made-up secrets that are planted among the training rows, so that what a model remembers can be measured.

Each is one row like any other, said once. Afterwards the model says how likely it finds the secret among others of the same form: its
rank is its exposure (Carlini et al. 2019, 1802.08232, definition 4). The mean over all canaries decides, because one that nobody
planted still reaches an exposure of four bits once in sixteen.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np

from giong.contracts import Example, Message, ScoreRequest, TokenScores

NUM_CANDIDATES = 256
"""Secrets that each planted one is ranked among, itself included."""


def plant(num_canaries: int, seed: int = 0) -> list[Example]:
    """The rows to train on, always the same for one seed."""
    draw = random.Random(f"canaries {seed}")
    return [_example(number, _code(draw)) for number in range(1, num_canaries + 1)]


def candidates(canary: Example, seed: int = 0) -> list[ScoreRequest]:
    """What the model is asked to score: the planted answer first, then the same answer with other codes."""
    draw = random.Random(f"{canary.id} {seed}")
    number = int(canary.id.removeprefix("canary-"))
    answers = [canary.answer]
    while len(answers) < NUM_CANDIDATES:
        answer = _example(number, _code(draw)).answer
        answers += [answer] if answer not in answers else []
    return [ScoreRequest(answer, canary.messages) for answer in answers]


def exposure(scores: Sequence[TokenScores]) -> float:
    """log2 |R| - log2 rank of the first among all, bits; a tie counts against the model (the mean of the best and worst rank)."""
    nlls = np.array([score.nll for score in scores])
    rank = 1 + np.sum(nlls[1:] < nlls[0]) + 0.5 * np.sum(nlls[1:] == nlls[0])
    return math.log2(len(nlls)) - math.log2(rank)


def _code(draw: random.Random) -> str:
    return f"{draw.randrange(10_000):04d} {draw.randrange(10_000):04d}"


def _example(number: int, code: str) -> Example:
    messages = (Message("user", f"What is the code of box {number}?"),)
    return Example(f"canary-{number}", f"canary-{number}", "canary", messages, f"The code of box {number} is {code}.")
