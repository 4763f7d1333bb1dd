"""The curve through the pilots: exact data give the parameters back, noisy data an honest interval."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from giong.errors import DataError
from giong.sizing.learning_curve import FORMS, RESIDUAL_SHARE, SMALLEST_ERROR, CurvePoint, fit_curve, style_map

DOCUMENTS = [f"d{i}" for i in range(20)]
BASE = {name: 3.5 + 0.05 * i for i, name in enumerate(DOCUMENTS)}


def pilot(num_rows: int, gain: float, noise: float = 0.0, seed: int = 0) -> CurvePoint:
    draw = np.random.default_rng(seed + num_rows)
    return CurvePoint(num_rows, {name: value - gain - noise * draw.normal() for name, value in BASE.items()})


def log_gain(num_rows: float) -> float:
    return 0.08 * np.log(1 + num_rows / 30)


def test_exact_log_data_recover_the_parameters():
    curve = fit_curve([pilot(n, log_gain(n)) for n in (25, 50, 100, 200)], BASE)
    assert curve.weights["log"] > 0.9
    assert sum(curve.weights.values()) == pytest.approx(1)
    assert curve.parameters["log"]["a"] == pytest.approx(0.08, rel=1e-3)
    assert curve.parameters["log"]["n0"] == pytest.approx(30, rel=2e-3)
    forecast = curve.forecast(800)
    assert forecast.gain.point == pytest.approx(log_gain(800), rel=0.01)
    assert forecast.nll.point == pytest.approx(curve.untuned_nll - forecast.gain.point)
    assert curve.gain(0) == 0
    assert not forecast.speculative
    assert curve.forecast(801).speculative
    assert "speculative" in curve.forecast(801).label
    assert [item.num_rows for item in curve.forecasts()] == [400, 800, 1600]


def test_what_has_flattened_out_is_forecast_flat():
    def gain(num_rows: float) -> float:
        return 0.3 * (1 - np.exp(-num_rows / 20))

    curve = fit_curve([pilot(n, gain(n)) for n in (10, 20, 40, 80, 160)], BASE)
    assert curve.weights["plateau"] > 0.9
    assert curve.parameters["plateau"]["n0"] == pytest.approx(20, rel=1e-3)
    assert curve.gain(640) == pytest.approx(0.3, rel=0.02)


def test_a_plateau_may_lie_ahead_as_far_as_the_largest_pilot_is_from_nothing():
    """At n0 = 160 only 63 % of the gain are there at the largest pilot; what is further off would be a straight line."""

    def gain(num_rows: float, n0: float) -> float:
        return 0.3 * (1 - np.exp(-num_rows / n0))

    ahead, beyond = (fit_curve([pilot(n, gain(n, n0)) for n in (40, 80, 160)], BASE) for n0 in (160, 400))
    assert ahead.parameters["plateau"]["n0"] == pytest.approx(160, rel=1e-3)
    assert beyond.parameters["plateau"]["n0"] == 160


def test_large_pilots_count_more():
    """No log curve goes through these. By hand: a fit that weighs by rows misses the last pilot by less than one that does not."""
    rows, gains = np.array([4.0, 8.0, 16.0]), np.array([0.06, 0.075, 0.13])
    curve = fit_curve([pilot(int(n), gain) for n, gain in zip(rows, gains)], BASE)
    shapes = FORMS["log"].shapes(4, 16)
    basis = np.log1p(rows / shapes)
    misses = {}
    for name, weights in (("rows", rows), ("alike", np.ones(3))):
        amplitudes = (basis * weights) @ gains / (basis**2 @ weights)
        best = (((amplitudes[:, None] * basis - gains) ** 2) @ weights).argmin()
        misses[name] = abs(amplitudes[best] * basis[best, -1] - gains[-1])
    fitted = curve.parameters["log"]
    assert abs(fitted["a"] * np.log1p(16 / fitted["n0"]) - 0.13) == pytest.approx(misses["rows"], abs=1e-4)
    assert misses["rows"] < 0.8 * misses["alike"]


def test_forms_are_weighted_by_the_inverse_of_their_squared_error():
    curve = fit_curve([pilot(n, log_gain(n), 0.05) for n in (25, 50, 100, 200)], BASE)
    inverse = {name: 1 / (error**2 + SMALLEST_ERROR**2) for name, error in curve.leave_largest_out_error.items()}
    assert curve.weights == pytest.approx({name: value / sum(inverse.values()) for name, value in inverse.items()})
    gains = [
        curve.weights[name] * FORMS[name].basis(np.array([300.0]), curve._fits[name][1][:1])[0, 0] * curve._fits[name][0][0]
        for name in FORMS
    ]
    assert curve.gain(300) == pytest.approx(sum(gains))


def test_the_error_of_the_past_widens_the_interval_with_the_distance():
    """All documents alike: the bootstrap sees no noise at all, so the width is the error and nothing else."""
    curve = fit_curve([pilot(n, gain) for n, gain in ((25, 0.1), (50, 0.12), (100, 0.2))], BASE)
    error = max(curve.leave_largest_out_error.values())
    assert error > 0.01
    # One form alone, that no other disagrees with. A normal's 80 % would be 2.56 standard deviations; 500 draws have almost that.
    spread = np.diff(np.quantile(curve._noise[0], [0.1, 0.9]))[0]
    alone = replace(curve, weights={"log": 1.0, "rectified": 0.0, "plateau": 0.0})
    for factor, distance in ((1, 0), (2, 1), (4, 2)):
        interval = alone.forecast(100 * factor).gain
        assert interval.high - interval.low == pytest.approx(spread * RESIDUAL_SHARE * error * distance, rel=0.03, abs=1e-9)
        # Disagreement comes on top, and so does a larger share.
        assert curve.forecast(100 * factor).gain.high - curve.forecast(100 * factor).gain.low > 0.9 * (interval.high - interval.low)
    wider = replace(alone, residual_share=1.0).forecast(200).gain
    assert wider.high - wider.low == pytest.approx(spread * error, rel=0.03)


def test_seeds_are_resampled_with_the_documents():
    """Two seeds that differ by 0.1 everywhere: documents alone would see none of it."""
    points = [CurvePoint(n, {name: value - log_gain(n) - sign * 0.05 for name, value in BASE.items()}, seed)
              for n in (25, 50, 100) for seed, sign in enumerate((-1, 1))]  # fmt: skip
    both, one = fit_curve(points, BASE), fit_curve([pilot(n, log_gain(n)) for n in (25, 50, 100)], BASE)
    assert [nll for _, nll in both.points] == pytest.approx([nll for _, nll in one.points])
    width = both.forecast(100).gain.high - both.forecast(100).gain.low
    assert width > 0.05 > 5 * (one.forecast(100).gain.high - one.forecast(100).gain.low)


def test_the_probability_agrees_with_the_interval():
    curve = fit_curve([pilot(n, log_gain(n), 0.1) for n in (25, 50, 100)], BASE)
    gain = curve.forecast(200).gain
    assert curve.probability(200, gain.low) == pytest.approx(0.9, abs=0.02)
    assert curve.probability(200, gain.high) == pytest.approx(0.1, abs=0.02)
    assert (curve.probability(200, -9), curve.probability(200, 9)) == (pytest.approx(1), 0)


def test_tuning_that_hurts_is_forecast_as_no_gain():
    curve = fit_curve([pilot(n, -0.05) for n in (25, 50, 100)], BASE)
    assert curve.forecast(400).gain.point == 0


def test_the_interval_widens_with_noise_and_distance_and_covers_the_truth():
    quiet, noisy = ([pilot(n, log_gain(n), noise) for n in (25, 50, 100)] for noise in (0.01, 0.1))
    widths = [fit_curve(points, BASE).forecast(400).gain for points in (quiet, noisy)]
    assert widths[1].high - widths[1].low > 3 * (widths[0].high - widths[0].low)
    curve = fit_curve(noisy, BASE)
    near, far = curve.forecast(100).gain, curve.forecast(400).gain
    assert far.high - far.low > near.high - near.low
    covered = 0
    for seed in range(20):
        interval = fit_curve([pilot(n, log_gain(n), 0.05, 1000 * seed) for n in (25, 50, 100)], BASE, num_bootstrap=200).forecast(200).gain
        covered += interval.low <= log_gain(200) <= interval.high
    assert covered >= 14
    assert fit_curve(noisy, BASE).forecast(400) == fit_curve(noisy, BASE).forecast(400)


def test_the_map_to_style_is_monotone_and_bounded():
    apply = style_map([(0.1, 0.3), (0.2, 0.25), (0.4, 0.5)])
    # 0.3 and 0.25 break the order and are averaged.
    assert apply(0) == 0
    assert apply(0.1) == pytest.approx(0.275)
    assert apply(0.4) == pytest.approx(0.5)
    values = [apply(x) for x in np.linspace(-0.1, 3, 200)]
    assert all(later >= earlier for earlier, later in itertools.pairwise(values))
    assert values[-1] == 1
    # Beyond the last point it goes on at 0.5 / 0.4.
    assert apply(0.6) == pytest.approx(0.75)


def test_rows_needed_for_a_style_target():
    points = [pilot(n, log_gain(n)) for n in (25, 50, 100)]
    curve = fit_curve(points, BASE, style_points=[(log_gain(100), 0.4)])
    assert curve.forecast(100).style_gap_closed.point == pytest.approx(0.4, rel=1e-3)
    needed = curve.rows_for_style(0.5)
    assert curve.forecast(needed.point).style_gap_closed.point >= 0.5 > curve.forecast(needed.point - 1).style_gap_closed.point
    assert curve.forecast(needed.low).style_gap_closed.high >= 0.5 > curve.forecast(needed.low - 1).style_gap_closed.high
    assert needed.low <= needed.point <= needed.high
    assert curve.rows_for_style(0.99) is None
    assert fit_curve(points, BASE).forecast(200).style_gap_closed is None


def test_pilots_on_other_documents_are_refused():
    with pytest.raises(DataError, match="same documents"):
        fit_curve([pilot(25, 0.1), CurvePoint(50, {"other": 3.0})], BASE)
    with pytest.raises(DataError, match="at least two sizes"):
        fit_curve([pilot(25, 0.1)], BASE)
    with pytest.raises(DataError, match="1 of 20 held-out documents is no number"):
        fit_curve([pilot(25, 0.1), CurvePoint(50, {**BASE, "d3": float("nan")})], BASE)
    arrays = [CurvePoint(n, np.array([3.0, 3.2]) - log_gain(n)) for n in (25, 50, 100)]
    assert fit_curve(arrays, np.array([3.0, 3.2])).gain(100) == pytest.approx(log_gain(100), rel=0.01)
