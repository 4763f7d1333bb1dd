"""The arithmetic of `benchmarks/controls.py`: pools, limits that are set jointly, folds of whole documents."""

from __future__ import annotations

import json
import random
from pathlib import Path

import controls
import numpy as np
import pytest

from giong.data.synthesis.leak import longest_shared_run
from giong.evaluation import pools
from giong.evaluation.controls import shuffled_spans
from giong.evaluation.order import NUM_ORDERS, disordered


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
    assert np.mean(pools.passing(together, limits)["all"]) == pytest.approx(pools.OWN_PASS_RATE, abs=0.01)
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


def test_order_is_measured_in_what_it_gains_the_author():
    """By hand: of a mean gain of 0.2, half is -0.5 and none is -1, however far the author's texts differ."""
    gains = {"order_gain": np.array([0.1, 0.3])}
    assert pools.OwnScale.of(gains).standardised({"order_gain": np.array([0.2, 0.1, 0.0])})["order_gain"] == pytest.approx([0, -0.5, -1])


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
    assert pools.echoed(request, request) == 1
    assert pools.echoed("one two three four five six seven eight ten", request) == 0.5
    assert pools.echoed("short", request) == 0
    text = " ".join(str(number) for number in range(23))
    shuffled = shuffled_spans(text, random.Random(1))
    assert sorted(shuffled.split()) == sorted(text.split())
    assert shuffled != text
    assert "0 1 2 3 4" in shuffled
    assert disordered(text) == disordered(text)
    assert len({text, *disordered(text)}) == NUM_ORDERS + 1
    # Without spaces a span is ten characters, and nothing is put between them.
    chinese = "我们走了一整天的路直到太阳落到山的后面才在河边停下来休息"
    assert sorted(shuffled_spans(chinese, random.Random(2))) == sorted(chinese)
    assert chinese[:10] in shuffled_spans(chinese, random.Random(2)) != chinese


def test_requests_are_made_as_in_a_project():
    """The plainest voice: before its runs are broken up, its rewrites share whole sentences with its texts."""
    voices = controls.bundled()
    assert len(voices) == 9 and all(len(pieces) >= 12 for pieces in voices.values())
    assert max(longest_shared_run(piece.request, piece.text) for pieces in voices.values() for piece in pieces) < 8
    assert controls.piece("d", "text", recorded="text") is None


def test_vietnamese_voices_are_whole_documents_cut_into_passages(tmp_path: Path):
    rows = [
        {"title": f"Bài {n}", "text": "\n\n".join(" ".join(f"từ{n}x{p}x{i}" for i in range(50)) + "." for p in range(3))} for n in range(20)
    ]
    (tmp_path / "wiki.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    voices = controls.vietnamese_voices(tmp_path / "wiki.jsonl")
    own, others = voices.pop(controls.VIETNAMESE), [piece for pieces in voices.values() for piece in pieces]
    assert len(voices) == controls.NUM_VIETNAMESE_VOICES and len(own) > 40
    by_document = {piece.document: {voice for voice, pieces in voices.items() if piece in pieces} for piece in others}
    assert len(by_document) == 20 and all(len(found) == 1 for found in by_document.values())
    # The author is asked in English, the others by key words.
    assert "the" in own[0].request.split() and others[0].request.startswith("- ")


def test_the_loosest_limits_ship():
    made = pools.loosest([{"style": (-1.0, np.inf), "rep_4": (-np.inf, 2.0)}, {"style": (-2.0, np.inf), "rep_4": (-np.inf, 2.5)}])
    assert made == {"style": (-2.0, np.inf), "rep_4": (-np.inf, 2.5)}
    assert set(pools.known_limits()) == set(pools.SIDES)
    for name, (low, high) in pools.known_limits().items():
        assert (np.isfinite(low), np.isfinite(high)) == pools.SIDES[name]
