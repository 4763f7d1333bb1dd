"""Intervals: Wilson by hand, the bootstrap against theory, and style gap closed."""

from __future__ import annotations

import numpy as np
import pytest

from giong.evaluation.metrics.intervals import bootstrap, bootstrap_draws, median_interval, style_gap_closed, wilson


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


def covered(interval, truth):
    return interval.low <= truth <= interval.high


def test_intervals_cover_what_they_promise():
    """95 % intervals hold the truth in 93 to 97 % of simulated studies: means over clustered documents, paired gaps, medians, shares."""
    draw = np.random.default_rng(7)
    num_studies, num_documents, per_document = 1000, 60, 3
    names = np.repeat(np.arange(num_documents), per_document).astype(str)
    found = {"mean": 0, "gap closed": 0, "median": 0, "share": 0}
    for study in range(num_studies):
        documents = np.repeat(draw.normal(size=(3, num_documents)), per_document, axis=1)
        arm, base, author = documents + draw.normal(size=documents.shape) + np.array([[1.2], [0.0], [2.0]])
        settings = {"num_bootstrap": 200, "seed": study}
        found["mean"] += covered(bootstrap(arm, names, **settings), 1.2)
        found["gap closed"] += covered(style_gap_closed(arm, base, author, names, **settings)[0], 0.6)
        found["median"] += covered(median_interval(draw.lognormal(size=61)), 1.0)
        found["share"] += covered(wilson(int(draw.binomial(80, 0.3)), 80), 0.3)
    assert {name: round(count / num_studies, 3) for name, count in found.items() if not 0.93 <= count / num_studies <= 0.97} == {}


def test_a_median_lies_between_order_statistics():
    # Of 10 values the 2nd and the 9th: P(at most one below the median) = 11/1024 on each side.
    interval = median_interval(range(1, 11))
    assert (interval.point, interval.low, interval.high) == (5.5, 2, 9)
    assert median_interval([3.0]).low == 3
    assert np.isnan(median_interval([]).point)
