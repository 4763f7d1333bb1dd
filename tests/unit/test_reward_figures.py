"""What a reward model is worth on held-out pairs, by hand."""

from __future__ import annotations

import math

import pytest

from giong.evaluation.preferences import reward_figures


def test_by_hand():
    """Differences ln 3, -ln 3, 0 and ln 3: right, wrong, a tie and right, with the confidences 3/4, 3/4, 1/2 and 3/4."""
    third = math.log(3)
    figures = reward_figures([third, 0.0, 1.0, third], [0.0, third, 1.0, 0.0], ["a", "b", "c", "d"], num_bootstrap=200, seed=0)
    assert figures["accuracy"] == pytest.approx(2.5 / 4)
    assert figures["accuracy_low"] < 0.625 < figures["accuracy_high"]
    # In the bin of 3/4 two of three are right, and half of the tie is: |2 - 9/4| / 4 + 0.
    assert figures["calibration_error"] == pytest.approx(0.0625)
    # Two at ln(4/3), one at ln 4, one at ln 2.
    assert figures["log_loss"] == pytest.approx((2 * math.log(4 / 3) + math.log(4) + math.log(2)) / 4)
    assert (figures["reward_chosen"], figures["num_pairs"]) == (pytest.approx((2 * third + 1) / 4), 4)
