"""Would ten outputs together pass as the author's? One decision on a pool, from gates that are set jointly.

A single short text decides little: what sets babble or half another writer apart is a shift of the mean that ten texts show. Every
feature is put on the scale of the author's own held-out texts, so that limits found on some authors hold for others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

POOL_SIZE = 10
NUM_POOLS = 200
OWN_PASS_RATE = 0.95
"""Share of the calibration authors' own pools that the limits let through."""

Features = Mapping[str, np.ndarray]
"""Feature -> one value per text, shape (N,)."""

GATES = {
    "style": ("style", "masked_style"),
    "coherence": ("bits_per_byte", "order_gain"),
    "repetition": ("rep_4",),
    "copying": ("copied_8", "copied_4"),
    "echo": ("echoed_8",),
    "meaning": ("key_recall",),
}
"""Gate -> the features that it looks at."""
SIDES = {
    "style": (True, False), "masked_style": (True, False), "bits_per_byte": (True, True), "order_gain": (True, False),
    "rep_4": (False, True), "copied_8": (False, True), "copied_4": (False, True), "echoed_8": (False, True), "key_recall": (True, False),
}  # fmt: skip
"""Feature -> whether too little and too much of it stops a pool."""
LEAST_SPREAD = {
    "style": 0.1, "masked_style": 0.1, "bits_per_byte": 0.02, "order_gain": 0.02, "rep_4": 0.01, "copied_8": 0.01, "copied_4": 0.02,
    "echoed_8": 0.01, "key_recall": 0.02,
}  # fmt: skip
"""Spread below which an author's texts count as no more alike than that: many never repeat or copy anything."""
LEAST_HIGH = 2.0
"""No upper limit is below two spreads: where hardly any text repeats or copies, quantiles of pools would forbid the first that does."""

Limits = Mapping[str, tuple[float, float]]
"""Feature -> lowest and highest mean of a pool, in spreads of one text."""


@dataclass(frozen=True)
class OwnScale:
    """Mean and spread of each feature over the author's held-out texts."""

    mean: Mapping[str, float]
    spread: Mapping[str, float]

    @classmethod
    def of(cls, features: Features) -> OwnScale:
        mean = {name: float(np.nanmean(values)) for name, values in features.items()}
        spread = {name: max(float(np.nanstd(values)), LEAST_SPREAD[name]) for name, values in features.items()}
        return cls(mean, spread)

    def standardised(self, features: Features) -> dict[str, np.ndarray]:
        return {name: (values - self.mean[name]) / self.spread[name] for name, values in features.items()}


def pool_means(
    features: Features, documents: Sequence[str], *, size: int = POOL_SIZE, num: int = NUM_POOLS, seed: int = 0
) -> dict[str, np.ndarray]:
    """Means of `num` pools: `size` documents drawn with replacement, a random text of each; shape (num,) per feature."""
    draw = np.random.default_rng(seed)
    groups = [np.flatnonzero(np.asarray(documents) == name) for name in dict.fromkeys(documents)]
    chosen = draw.integers(len(groups), size=(num, size))
    texts = np.array([[draw.choice(groups[place]) for place in row] for row in chosen])
    with np.errstate(invalid="ignore"):
        return {name: np.nanmean(values[texts], axis=1) for name, values in features.items()}


def set_limits(own: Sequence[Features], pass_rate: float = OWN_PASS_RATE) -> Limits:
    """The tightest limits, equally strict on every side of every feature, that let `pass_rate` of the authors' own pools through."""
    together = {name: np.concatenate([features[name] for features in own]) for name in own[0]}

    def limits_at(tail: float) -> dict[str, tuple[float, float]]:
        return {
            name: (
                float(np.quantile(values, tail)) if SIDES[name][0] else -np.inf,
                max(float(np.quantile(values, 1 - tail)), LEAST_HIGH) if SIDES[name][1] else np.inf,
            )
            for name, values in together.items()
        }

    loose, tight = 0.0, 0.2
    for _ in range(30):
        tail = (loose + tight) / 2
        loose, tight = (tail, tight) if np.mean(passing(together, limits_at(tail))["all"]) >= pass_rate else (loose, tail)
    return limits_at(loose)


def passing(pools: Features, limits: Limits) -> dict[str, np.ndarray]:
    """Gate -> whether each pool passes it, and "all"; a pool without a value does not pass."""
    within = {name: (values >= limits[name][0]) & (values <= limits[name][1]) for name, values in pools.items()}
    passed = {
        gate: np.logical_and.reduce([within[name] for name in names if name in within])
        for gate, names in GATES.items() if any(name in within for name in names)
    }  # fmt: skip
    return {**passed, "all": np.logical_and.reduce(list(passed.values()))}
