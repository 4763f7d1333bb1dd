"""Would ten outputs together pass as the author's? One decision on a pool, from gates that are set jointly.

A single short text decides little: what sets babble or half another writer apart is a shift of the mean that ten texts show. Every
feature is put on the scale of the author's own held-out texts, so that limits found on some authors hold for others: those that ship
are of the bundled voices, set and tested by `benchmarks/controls.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from giong.evaluation.metrics import meaning
from giong.evaluation.metrics.text import CorpusIndex, ngrams, rep_n, words
from giong.workspace import read_json

LIMITS_PATH = Path(__file__).with_name("pool_limits.json")
"""Feature -> lowest and highest mean of a pool (null: no limit), written by `benchmarks/controls.py`."""
MIN_OWN = 6
"""Held-out texts of the author that the scale needs."""
POOL_SIZE = 10
NUM_POOLS = 200
OWN_PASS_RATE = 0.98
"""Share of the calibration authors' own pools that the limits let through. Of authors who had no say 94 % pass then, and the worst counterfeit's
pools in 0.7 %; with 0.95 it was 89 % of the former."""

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
"""Feature -> lowest and highest mean of a pool, in spreads of one text (`order_gain`: in the author's mean)."""


def features(
    texts: Sequence[str], requests: Sequence[str], style: Mapping[str, np.ndarray], bits: tuple[np.ndarray, np.ndarray] | None,
    corpus: CorpusIndex, closed: frozenset[str],
) -> dict[str, np.ndarray]:  # fmt: skip
    """What a pool is judged by, of each text, shape (N,).

    `style` are the verifier's witnesses, `bits` bits per byte of the texts and (mean) of their `disordered` twins under who tells their order (None
    where nobody does, and coherence is not judged); `corpus` is the training text, `closed` the words that say nothing in a request.
    """
    return {
        "style": style["combined"],
        "masked_style": style["mask"],
        **({"bits_per_byte": bits[0], "order_gain": bits[1] - bits[0]} if bits else {}),
        "rep_4": np.array([rep_n(words(text), 4) for text in texts]),
        "copied_8": np.array([corpus.share_copied(text, request) for text, request in zip(texts, requests)]),
        "copied_4": np.array([corpus.share_copied(text, request, n=corpus.overlap_tokens // 2) for text, request in zip(texts, requests)]),
        "echoed_8": np.array([echoed(text, request) for text, request in zip(texts, requests)]),
        "key_recall": np.array([meaning.key_recall(request, text, closed) for text, request in zip(texts, requests)]),
    }


def echoed(text: str, request: str, num_words: int = 8) -> float:
    """Share of the text's 8-word runs that stand in its request."""
    runs, asked = ngrams(words(text), num_words), set(ngrams(words(request), num_words))
    return sum(run in asked for run in runs) / len(runs) if runs else 0.0


@dataclass(frozen=True)
class OwnScale:
    """Mean and spread of each feature over the author's held-out texts; what order gains is measured in the author's own mean gain, because
    a shuffle has none whatever the spread."""

    mean: Mapping[str, float]
    spread: Mapping[str, float]

    @classmethod
    def of(cls, features: Features) -> OwnScale:
        mean = {name: float(np.nanmean(values)) for name, values in features.items()}
        spread = {name: mean[name] if name == "order_gain" else float(np.nanstd(values)) for name, values in features.items()}
        return cls(mean, {name: max(found, LEAST_SPREAD[name]) for name, found in spread.items()})

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


def passing_shares(own: OwnScale, found: Features, documents: Sequence[str], seed: int = 0) -> dict[str, float]:
    """Gate -> share of the pools of these texts that pass it by the limits that ship, and "all"."""
    means = pool_means(own.standardised(found), documents, seed=seed)
    return {gate: float(np.mean(passed)) for gate, passed in passing(means, known_limits()).items()}


def known_limits() -> Limits:
    """The limits of the bundled voices."""
    return {
        name: (-np.inf if low is None else low, np.inf if high is None else high) for name, (low, high) in read_json(LIMITS_PATH).items()
    }


def loosest(limits: Sequence[Limits]) -> Limits:
    """The looser of several limits on either side of every feature."""
    return {name: (min(each[name][0] for each in limits), max(each[name][1] for each in limits)) for name in limits[0]}
