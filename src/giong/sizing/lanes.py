"""How many passes of a step are computed side by side on a CPU (`engine.lanes`): the rule, without a model."""

from __future__ import annotations

from collections.abc import Sequence

MAX_LANES = 2
MIN_NUMBERS = 400_000
"""Tokens of a pass times the model's width, from which on a lane is worth it. Below that threads wait for Python's lock, which only
products and other large operations leave to each other."""
MOVING_SHARE = 0.1
"""Of a model's weights, those that move at most: each pass has their gradients for itself until its turn comes."""


def num_lanes(lengths: Sequence[int], max_tokens: int, *, width: int, moving_share: float, num_threads: int) -> int:
    """How many passes over rows (or groups) of these lengths are computed at a time, each of at most `max_tokens` over that number.

    `width` is the model's, `moving_share` the part of its weights that moves, and `num_threads` what the process computes with.
    """
    lanes = min(MAX_LANES, num_threads)
    # As much memory as passes one after the other: rows that two passes have no room for are computed so.
    if lanes < 2 or not 0 < moving_share <= MOVING_SHARE or len(lengths) < lanes or max(lengths) > max_tokens // lanes:
        return 1
    return lanes if min(max_tokens, sum(lengths)) // lanes * width >= MIN_NUMBERS else 1
