"""The arithmetic of `benchmarks/controls.py`: pools, limits that are set jointly, folds of whole documents."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import controls
import pools


def features(shift: float, num: int, seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {name: draw.normal(shift, 1, size=num) for name in pools.SIDES}


def test_pools_draw_documents_and_average_their_texts():
    values = {"style": np.array([0.0, 0.0, 0.0, 1.0])}
    means = pools.pool_means(values, ["a", "a", "a", "b"], num=2000)["style"]
    # Either document as often, however many texts it has.
    assert means.mean() == pytest.approx(0.5, abs=0.02)
    assert means.std() == pytest.approx(0.5 / np.sqrt(10), abs=0.01)


def test_limits_let_the_promised_share_of_own_pools_through_and_stop_what_is_shifted():
    documents = [str(number) for number in range(40)]
    own = [pools.pool_means(features(0, 40, seed), documents, seed=seed) for seed in range(4)]
    limits = pools.set_limits(own)
    together = {name: np.concatenate([found[name] for found in own]) for name in own[0]}
    assert np.mean(pools.passing(together, limits)["all"]) == pytest.approx(0.95, abs=0.02)
    low = pools.pool_means({**features(0, 40, 9), "order_gain": np.full(40, -2.0)}, documents)
    passed = pools.passing(low, limits)
    assert not passed["coherence"].any()
    assert passed["style"].mean() > 0.8
    assert not passed["all"].any()
    # A pool without a value has not shown that it is good.
    assert not pools.passing({**own[0], "key_recall": np.full(pools.NUM_POOLS, np.nan)}, limits)["meaning"].any()


def test_rare_copies_are_not_forbidden_by_the_quantiles_of_nothing():
    limits = pools.set_limits([{name: np.zeros(100) for name in pools.SIDES}])
    assert limits["copied_8"][1] == pools.LEAST_HIGH
    scale = pools.OwnScale.of({name: np.zeros(8) for name in pools.SIDES})
    assert scale.standardised({"copied_8": np.array([0.02])})["copied_8"] == pytest.approx([2.0])


def test_folds_keep_documents_whole_and_test_each_once():
    pieces = [controls.Piece(f"d{number // 2}", f"text {number}", "ask") for number in range(24)]
    tested = []
    for train, calibration, test in controls.folds(pieces):
        sides = [{piece.document for piece in side} for side in (train, calibration, test)]
        assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
        tested += [piece.text for piece in test]
    assert sorted(tested) == sorted(piece.text for piece in pieces)


def test_echo_and_spans_by_hand():
    request = "one two three four five six seven eight nine"
    assert controls.echoed(request, request) == 1
    assert controls.echoed("one two three four five six seven eight ten", request) == 0.5
    assert controls.echoed("short", request) == 0
    text = " ".join(str(number) for number in range(23))
    shuffled = controls.shuffled_spans(text, random.Random(1))
    assert sorted(shuffled.split()) == sorted(text.split())
    assert shuffled != text
    assert "0 1 2 3 4" in shuffled
