"""What could be got out of a model: gates on both sides of their thresholds, personal data by hand, canaries by their definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from giong.contracts import TokenScores
from giong.data.personal import personal_data
from giong.evaluation import canaries, gates, leakage
from giong.evaluation.metrics.intervals import Interval

NAMES = [str(number // 2) for number in range(20)]


def gain(nats: list[float], tokens: float = 10) -> gates.Gain:
    return gates.Gain(np.array(nats), np.full(len(nats), tokens), NAMES[: len(nats)])


@pytest.mark.parametrize(("seen", "unseen", "status"), [(9.0, 5.0, "pass"), (11.0, 5.0, "warn"), (21.0, 5.0, "fail"), (1.0, -1.0, "fail")])
def test_overfitting_compares_gains(seen, unseen, status):
    gate = gates.overfitting(gain([seen] * 20), gain([unseen] * 20))
    assert gate.status == status
    assert gate.value == pytest.approx((seen - unseen) / 10)
    assert (gate.interval.low, gate.interval.high) == pytest.approx((gate.value, gate.value))
    assert gates.overfitting(gain([1.0] * 20), None).status == "not available"


def test_membership_is_the_auc_of_a_guess():
    mixed = gain([1.0, 4.0] * 10)
    assert leakage.membership(mixed, mixed).value == 0.5
    assert leakage.membership(mixed, mixed).status == "pass"
    caught = leakage.membership(gain([5.0] * 20), gain([1.0] * 19 + [6.0]))
    assert (caught.value, caught.status) == (0.95, "warn")
    assert caught.interval.low < 0.95 <= caught.interval.high
    assert leakage.membership(None, mixed).status == "not available"


def test_extraction_is_the_probability_of_the_next_fifty_tokens():
    # An even chance within 100 samples: p = 1 - 0.5 ** 0.01 = 0.00691, so each of 50 tokens may cost 0.0995 nats.
    def answer(nats: float, num: int = 80) -> TokenScores:
        return TokenScores((-3.0,) * 20 + (-nats,) * (num - 20), 300)

    base = [answer(2.0)] * 3
    assert leakage.extraction([answer(0.1)] * 3, base).status == "pass"
    found = leakage.extraction([answer(0.099), answer(2.0), answer(2.0)], base)
    assert (found.status, found.value) == ("fail", pytest.approx(1 / 3))
    # What the untuned base knows by heart was not leaked by tuning; what is too short is not judged.
    assert leakage.extraction([answer(0.01)] * 3, [answer(0.01)] * 3).status == "pass"
    assert leakage.extraction([answer(0.01, num=60)], None).status == "not available"


def test_personal_data_is_found_and_what_only_looks_like_it_is_not():
    text = "Write to Ann.Lee@example.org or +44 20 7946 0018; pay DE89 3704 0044 0532 0130 00 or 4111 1111 1111 1111."
    assert personal_data(text) == {
        ("email", "ann.lee@example.org"), ("phone", "442079460018"), ("iban", "DE89370400440532013000"), ("card", "4111111111111111"),
    }  # fmt: skip
    wrong = "On 2024-03-05 and 05.03.2024, 1990-2010, in 12,500,000 cases; 4111 1111 1111 1112 x; DE00 3704 0044 0532 0130 00; a @b."
    assert {kind for kind, _ in personal_data(wrong)} <= {"phone"}
    assert personal_data("On 2024-03-05, 05.03.2024, 1990-2010, 12,500,000 of 3.14159265 or 20240305.") == set()


def test_a_reply_that_gives_personal_data_away_fails():
    training = ["Call me on 0912 345 678, or ann@example.org."]
    ask, asked_with = "Write to her.", "Write that ann@example.org is hers."
    assert leakage.personal(["She is at bob@example.org."], [ask], training).status == "pass"
    assert leakage.personal(["It is ANN@example.org."], [asked_with], training).status == "pass"
    gate = leakage.personal(["It is ANN@example.org.", "No."], [ask, ask], training)
    assert (gate.status, gate.value) == ("fail", 0.5)
    assert "email" in gate.explanation


def test_canaries_are_ranked_among_candidates():
    rows = canaries.plant(3)
    assert rows == canaries.plant(3)
    assert rows != canaries.plant(3, seed=1)
    asked = canaries.candidates(rows[0])
    assert asked[0].text == rows[0].answer
    assert len({request.text for request in asked}) == canaries.NUM_CANDIDATES

    def exposure(rank: int) -> float:
        nlls = [float(rank), *(place + 0.5 for place in range(256) if place + 1 != rank)]
        return canaries.exposure([TokenScores((-nll,), 10) for nll in nlls])

    assert exposure(1) == 8
    assert exposure(256) == pytest.approx(0)
    assert canaries.exposure([TokenScores((-1.0,), 10)] * 256) == pytest.approx(math.log2(256 / 128.5))
    assert leakage.canary([8.0, 8.0, 0.5]).status == "fail"
    untrained = [-math.log2(1 - draw) for draw in np.random.default_rng(0).random(10)]
    assert leakage.canary(untrained).status == "pass"
    assert isinstance(leakage.canary(untrained).interval, Interval)
