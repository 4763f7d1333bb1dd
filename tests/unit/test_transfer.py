"""A sibling's curve carried over to the model: hand-worked gains, and intervals wider by exactly what the rule says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from giong.config import parse
from giong.errors import ConfigError, DataError
from giong.sizing.learning_curve import CurvePoint, fit_curve
from giong.sizing.transfer import Transfer, carry_over

SIBLING, MODEL = {"a": 4.0, "b": 6.0}, {"a": 3.0, "b": 2.0}
POINTS = [CurvePoint(20, {"a": 3.8, "b": 5.8}, 1), CurvePoint(40, {"a": 3.6, "b": 5.6}), CurvePoint(80, {"a": 3.3, "b": 5.3})]


def test_gains_are_carried_over_by_the_untuned_losses_or_by_one_training_of_the_model():
    """The sibling gains 0.2, 0.4 and 0.7."""
    alone = carry_over(POINTS, SIBLING, MODEL, None)
    # Mean untuned losses 5.0 and 2.5: half the gain.
    assert alone[1].nll_per_document == pytest.approx({"a": 2.8, "b": 1.8})
    own = CurvePoint(20, {"a": 2.7, "b": 1.9})
    carried = carry_over(POINTS, SIBLING, MODEL, own)
    assert carried[0].nll_per_document == pytest.approx(own.nll_per_document)
    # 0.7 / 0.2 times the model's own gains of 0.3 and 0.1.
    assert carried[2].nll_per_document == pytest.approx({"a": 3.0 - 1.05, "b": 2.0 - 0.35})
    assert [(point.num_rows, point.seed) for point in carried] == [(20, 1), (40, 0), (80, 0)]


def test_a_sibling_known_by_one_figure_gives_as_much_as_its_means():
    """The sibling's mean losses are 4.8, 4.6 and 4.3, from 5.0."""
    sibling = {"validation": 5.0}
    points = [replace(point, nll_per_document={"validation": sum(point.nll_per_document.values()) / 2}) for point in POINTS]
    own = CurvePoint(20, {"a": 2.7, "b": 1.9})
    for carried, expected in zip(carry_over(points, sibling, MODEL, own), carry_over(POINTS, SIBLING, MODEL, own)):
        assert carried.nll_per_document == pytest.approx(expected.nll_per_document)
    # 8 % of its loss at 40 rows: every document of the model loses 8 % of its own.
    assert carry_over(points, sibling, MODEL, None)[1].nll_per_document == pytest.approx({"a": 2.76, "b": 1.84})


def test_several_seeds_keep_their_differences():
    points = [*POINTS, replace(POINTS[0], nll_per_document={"a": 3.6, "b": 5.6}, seed=2)]
    # At 20 rows the sibling gains 0.2 and 0.4: two thirds and four thirds of the mean.
    carried = carry_over(points, SIBLING, MODEL, CurvePoint(20, {"a": 2.7, "b": 1.7}))
    assert [3.0 - point.nll_per_document["a"] for point in (carried[0], carried[3])] == pytest.approx([0.2, 0.4])


@pytest.mark.parametrize("own", [{"a": 3.0, "b": 2.1}, {"a": 3.1, "b": 2.0}])
def test_a_model_that_gained_nothing_has_no_curve_to_scale(own: dict[str, float]):
    with pytest.raises(DataError, match=r"the sibling gained 0\.200 nats per token and the model -0\.050"):
        carry_over(POINTS, SIBLING, MODEL, CurvePoint(20, own))


def test_the_interval_is_wider_by_the_stated_factor():
    """All documents gain alike and exactly on a log curve, so next to nothing but the transfer makes an interval."""
    points = [CurvePoint(n, {name: nll - 0.1 * math.log1p(n / 30) for name, nll in MODEL.items()}) for n in (20, 40, 80)]
    anchored, alone = (fit_curve(points, MODEL, transfer=Transfer("small", rows), num_bootstrap=4000) for rows in (80, None))
    for curve, num_rows, factor in ((anchored, 80, 1.0), (anchored, 160, 1.25), (anchored, 320, 1.25**2), (alone, 80, 2.0)):
        gain = curve.forecast(num_rows).gain
        assert gain.point == pytest.approx(0.1 * math.log1p(num_rows / 30), rel=0.02)
        assert gain.high / gain.point == pytest.approx(factor, rel=0.04)
        assert gain.point / gain.low == pytest.approx(factor, rel=0.04)
    assert Transfer("small", 10).log_spread(10_000) == Transfer("small", None).log_spread(10)
    # Nothing of the model's own tuning was seen: no verdict rests on it.
    assert not anchored.forecast(160).speculative and alone.forecast(160).speculative
    assert replace(alone, _style_map=lambda gain: gain).rows_for_style(0.2) is None
    partial = fit_curve(points, MODEL, transfer=Transfer("small", 80, partial=True), num_bootstrap=10)
    assert partial.forecast(160).speculative and "a part of the held-out text" in partial.to_dict()["note"]
    assert "small: the shape of the curve is that model's" in anchored.to_dict()["note"]
    assert "80 rows" in anchored.to_dict()["note"] and "speculative" in alone.to_dict()["note"]
    assert fit_curve(points, MODEL).to_dict()["note"] == ""


def test_a_sibling_that_cannot_be_one_is_refused():
    with pytest.raises(ConfigError, match="cannot be the model itself"):
        parse({"sizing": {"pilot_model": "giong-tiny"}})
    with pytest.raises(ConfigError, match="an adapter of another model"):
        parse({"sizing": {"pilot_model": "small"}, "method": {"start_from": "models/x"}})
