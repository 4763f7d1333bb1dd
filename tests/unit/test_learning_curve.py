"""The curve through the pilots: exact data give the parameters back, noisy data an honest interval."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from giong.errors import DataError
from giong.sizing.break_even import break_even
from giong.sizing.learning_curve import CurvePoint, fit_curve, style_map

DOCUMENTS = [f"d{i}" for i in range(20)]
BASE = {name: 3.5 + 0.05 * i for i, name in enumerate(DOCUMENTS)}


def pilot(num_rows: int, gain: float, noise: float = 0.0, seed: int = 0) -> CurvePoint:
    draw = np.random.default_rng(seed + num_rows)
    return CurvePoint(num_rows, {name: value - gain - noise * draw.normal() for name, value in BASE.items()})


def log_gain(num_rows: float) -> float:
    return 0.08 * np.log(1 + num_rows / 30)


def test_exact_log_data_recover_the_parameters():
    curve = fit_curve([pilot(n, log_gain(n)) for n in (25, 50, 100, 200)], BASE)
    assert curve.form == "log"
    assert curve.parameters["a"] == pytest.approx(0.08, rel=1e-3)
    assert curve.parameters["n0"] == pytest.approx(30, rel=2e-3)
    forecast = curve.forecast(800)
    assert forecast.gain.point == pytest.approx(log_gain(800), rel=1e-3)
    assert forecast.nll.point == pytest.approx(np.mean(list(BASE.values())) - log_gain(800), rel=1e-4)
    assert curve.gain(0) == 0
    assert not forecast.speculative
    assert curve.forecast(801).speculative
    assert "speculative" in curve.forecast(801).label
    assert [item.num_rows for item in curve.forecasts()] == [200, 400, 800]


def test_a_plateau_is_left_to_the_rectified_form():
    def gain(num_rows: float) -> float:
        return 0.6 * (num_rows / 40) / (1 + num_rows / 40)

    curve = fit_curve([pilot(n, gain(n)) for n in (20, 40, 80, 320)], BASE)
    assert curve.form == "rectified"
    assert curve.leave_largest_out_error["rectified"] < curve.leave_largest_out_error["log"]
    assert curve.gain(640) == pytest.approx(gain(640), rel=0.03)


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
    assert curve.forecast(needed).style_gap_closed.point >= 0.5 > curve.forecast(needed - 2).style_gap_closed.point
    assert curve.rows_for_style(0.99) is None
    assert fit_curve(points, BASE).forecast(200).style_gap_closed is None


def test_pilots_on_other_documents_are_refused():
    with pytest.raises(DataError, match="same documents"):
        fit_curve([pilot(25, 0.1), CurvePoint(50, {"other": 3.0})], BASE)
    with pytest.raises(DataError, match="at least two sizes"):
        fit_curve([pilot(25, 0.1)], BASE)
    arrays = [CurvePoint(n, np.array([3.0, 3.2]) - log_gain(n)) for n in (25, 50, 100)]
    assert fit_curve(arrays, np.array([3.0, 3.2])).gain(100) == pytest.approx(log_gain(100), rel=1e-3)


def test_break_even_by_hand():
    # 1,000 tokens at 2 USD a million save 0.002 USD a call: 6 USD of training are 3,000 calls, three months.
    result = break_even(training_usd=5, evaluation_usd=1, requests_per_month=1000, saved_prompt_tokens=1000, input_usd_per_million_tokens=2)
    assert (result.num_calls, result.months, result.worthwhile) == (pytest.approx(3000), pytest.approx(3), True)
    # Hosting at 1 USD a month takes half of the saving.
    hosted = break_even(
        training_usd=6, hosting_usd_per_month=1, requests_per_month=1000, saved_prompt_tokens=1000, input_usd_per_million_tokens=2
    )
    assert hosted.num_calls == pytest.approx(6000)
    dearer = break_even(
        training_usd=6, requests_per_month=1000, saved_prompt_tokens=100, input_usd_per_million_tokens=1, tokens_per_call=500,
        extra_usd_per_million_tokens=1,
    )  # fmt: skip
    assert dearer.num_calls == float("inf")
    assert not dearer.worthwhile
    assert "quality only" in dearer.reason
    slow = break_even(training_usd=600, requests_per_month=1000, saved_prompt_tokens=1000, input_usd_per_million_tokens=2)
    assert not slow.worthwhile
    assert "more than a year" in slow.reason
