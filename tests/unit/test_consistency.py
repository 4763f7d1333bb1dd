"""Five wordings of one request, and what their replies come to."""

from __future__ import annotations

import numpy as np
import pytest

from giong.evaluation.consistency import consistency, reworded


def test_the_content_is_in_every_wording_and_the_language_is_its_own():
    asked = reworded("It is {hereby} announced that the office will be closed on the day of the storm.")
    assert len(set(asked)) == 5
    assert all("It is {hereby} announced" in text for text in asked)
    assert "Hãy viết lại" in reworded("Văn phòng được thông báo đóng cửa vào thứ sáu.")[1]


def test_the_same_replies_agree_and_others_do_not():
    same = [["a b c d e f", "g h i j k l"]] * 3
    found = consistency(same, np.ones((3, 2)))
    assert (found.style_spread, found.num_requests, found.num_wordings) == (0, 2, 3)
    assert found.agreement == pytest.approx(100)
    # Spread over the wordings of each request: 1 and 0.
    mixed = consistency([["a b c d", "x"], ["q r s t", "x"]], np.array([[1.0, 5.0], [3.0, 5.0]]))
    assert mixed.style_spread == 0.5
    assert 50 <= mixed.agreement < 60
    assert consistency(same, None).style_spread is None
