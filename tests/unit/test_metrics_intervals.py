"""Intervals: Wilson by hand, the bootstrap against theory, and style gap closed."""

from __future__ import annotations

import numpy as np
import pytest

from giong.evaluation.metrics.intervals import bootstrap, bootstrap_draws, style_gap_closed, wilson


def test_wilson_by_hand():
    # 8 of 10, z = 1.96: centre (0.8 + 0.19207) / 1.38415 = 0.71675, half-width 0.22660.
    interval = wilson(8, 10)
    assert (interval.point, interval.low, interval.high) == pytest.approx((0.8, 0.49016, 0.94332), abs=1e-4)
    assert wilson(0, 30).low == 0
    assert wilson(0, 30).high == pytest.approx(0.1135, abs=1e-3)
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0, 1)


def test_the_bootstrap_of_a_mean_agrees_with_theory():
    values = np.random.default_rng(1).normal(3, 2, size=200)
    interval = bootstrap(values, [str(i) for i in range(200)], num_bootstrap=4000)
    half = 1.96 * values.std() / np.sqrt(200)
    assert interval.point == pytest.approx(values.mean())
    assert (interval.low, interval.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.04)
    assert interval == bootstrap(values, [str(i) for i in range(200)], num_bootstrap=4000)


def test_clusters_widen_and_pairs_narrow():
    draw = np.random.default_rng(2)
    documents = np.repeat(np.arange(10), 10)
    values = draw.normal(size=10)[documents] + 0.1 * draw.normal(size=100)
    clustered, single = (bootstrap(values, names) for names in (documents.astype(str), np.arange(100).astype(str)))
    assert clustered.high - clustered.low > 2 * (single.high - single.low)
    better = values + 0.5
    difference = bootstrap([better, values], documents.astype(str), lambda a, b: a - b)
    assert (difference.low, difference.high) == pytest.approx((0.5, 0.5))


def test_missing_values_and_single_clusters():
    interval = bootstrap([np.array([1.0, np.nan, 3.0])], ["a", "b", "c"])
    assert interval.point == 2
    assert 1 <= interval.low <= interval.high <= 3
    one_document = bootstrap(np.array([1.0, 2.0, 3.0, 4.0]), ["same"] * 4)
    assert one_document.low < one_document.point < one_document.high


def test_style_gap_closed():
    draw = np.random.default_rng(3)
    base, author = draw.normal(0, 0.5, 60), draw.normal(2, 0.5, 60)
    names = [str(i) for i in range(60)]
    interval, reason = style_gap_closed(base + (author - base) / 2, base, author, names)
    assert reason == ""
    assert interval.point == pytest.approx(0.5)
    assert interval.low == pytest.approx(0.5)
    assert style_gap_closed(author, base, author, names)[0].low == 1
    assert style_gap_closed(base, base, author, names)[0].high == 0
    interval, reason = style_gap_closed(author, base, draw.normal(0, 0.5, 60), names)
    assert interval is None
    assert "prompting already matches" in reason


def test_draws_give_the_probability_of_a_margin():
    _, draws = bootstrap_draws(np.linspace(-1, 1, 101), [str(i) for i in range(101)], num_bootstrap=4000)
    assert np.mean(draws >= 0) == pytest.approx(0.5, abs=0.03)
