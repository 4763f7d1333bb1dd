"""Who may speak of coherence: a base that orders the author's texts as before, one that does not at all, and characters in its place."""

from __future__ import annotations

import random

import numpy as np
import pytest
from small_voices import background, examples, tell, texts

from giong.config import EvaluationConfig
from giong.contracts import Example, Reply, TokenScores
from giong.evaluation import gates
from giong.evaluation.controls import make_controls
from giong.evaluation.order import BASE, CHARACTERS, both_orders, character_bits, disordered, order_test
from giong.evaluation.report.table import pools_line
from giong.evaluation.results import ArmOutput, Evaluation
from giong.evaluation.run import evaluate

LONG = [" ".join(f"w{number}x{place}" for place in range(40)) for number in range(48)]


@pytest.mark.parametrize(
    ("num_likelier", "num_texts", "passed", "undecided", "said"),
    [
        (16, 16, True, False, ""),
        (15, 15, False, True, "15 of 15 held-out texts of the author likelier than their own spans in another order (100% [80% to 100%]), too few"),
        (46, 48, True, False, ""),
        (32, 48, False, False, "the base tiny finds 32 of 48 held-out texts of the author likelier than their own spans in another order (67%"),
        (0, 0, False, True, "0 of 0 held-out texts of the author likelier than their own spans in another order, too few"),
    ],
)  # fmt: skip
def test_sixteen_texts_show_it_and_two_thirds_do_not(num_likelier, num_texts, passed, undecided, said):
    gains = np.array([0.1] * num_likelier + [-0.1] * (num_texts - num_likelier))
    # A text that is there twice counts once, and one that has no other order says nothing.
    found = order_test([*LONG[:num_texts], *LONG[:num_texts], "One span."], np.zeros(2 * num_texts + 1), np.array([*gains, *gains, 9.0]))
    assert (found.num_likelier, found.num_texts, found.passed, found.undecided) == (num_likelier, num_texts, passed, undecided)
    assert said in found.why_not_measured("tiny")
    assert ("Take a base that has read it" in found.why_not_measured("tiny")) == (not passed and not undecided)


def test_characters_see_where_spans_were_joined():
    """By a model that read other texts of the voice: known runs cost less than torn ones."""
    bits = character_bits(texts("author", 1000, 60))
    held_out = texts("author", 2000, 24)
    assert order_test(held_out, *both_orders(held_out, bits)).passed
    assert not order_test(held_out, *both_orders([disordered(text)[0] for text in held_out], bits)).passed
    assert np.isnan(bits([""])).all()


def scores(nll: float) -> TokenScores:
    return TokenScores((-nll,) * 10, 40)


def judged(gains: list[float], words_at_random: bool = False) -> Evaluation:
    """An evaluation under a base to which order is worth `gains` nats per token, on even and on odd texts; the counterfeit has none."""

    def written(text: str) -> str:
        parts = text.split()
        random.Random(text).shuffle(parts)
        return " ".join(parts) if words_at_random else text

    train = [written(text) for text in texts("author", 1000, 60)]
    test, calibration = (
        [Example(row.id, row.document_id, row.kind, row.messages, written(row.answer), row.side) for row in rows]
        for rows in (examples(3000, 32), examples(2000, 24))
    )
    own = [row.answer for row in test]
    made = {"shuffled_spans": make_controls(own, [""] * len(own), [], [])["shuffled_spans"]}
    replies = {"base": [tell("plain", 3000 + number) for number in range(32)], "fine_tuned": own}
    coherence = {
        name: [scores(2 + 0.02 * number) for number in range(24 if name == "calibration" else 32)]
        for name in ("author", "calibration", *replies, *made)
    }
    shuffled = {
        name: [scores(row.nll / 10 + (0.01 if name in made else gains[number % 2])) for number, row in enumerate(rows)]
        for name, rows in coherence.items()
    }
    arms = [ArmOutput(name, [Reply(text) for text in of_arm]) for name, of_arm in replies.items()]
    return evaluate(
        arms, test, train, [row.answer for row in calibration], background(), EvaluationConfig(num_bootstrap=200), coherence=coherence,
        controls=made, calibration=calibration, disordered=shuffled, base_model="tiny",
    )  # fmt: skip


def test_a_base_that_tells_order_is_listened_to_as_before():
    found = judged([0.3, 0.3])
    rows = [scores(2 + 0.02 * number) for number in range(32)]
    assert (found.base_tells_order, found.coherence_note, [*found.order]) == (True, "", [BASE])
    assert found.arm("fine_tuned").gate("coherence") == gates.coherence(rows, rows)
    assert found.arm("fine_tuned").gate("coherence").status == "pass"
    assert found.author.pools["coherence"] == 1 and found.controls[0].pools["coherence"] == 0
    assert "not checked" not in pools_line(found.to_dict()) and "characters" not in pools_line(found.to_dict())


def test_a_base_that_is_blind_to_order_is_not():
    found = judged([0.3, -0.3])
    gate = found.arm("fine_tuned").gate("coherence")
    assert found.base_tells_order is False and gate.status == "not available"
    assert "the base tiny finds 28 of 56 held-out texts" in gate.explanation and gate.explanation == found.coherence_note
    assert "Take a base that has read it (model.name_or_path)" in gate.explanation
    # Pools are judged by the characters of the training text and the background, which tell the order of this author.
    assert found.order[CHARACTERS].passed
    assert found.author.pools["coherence"] > 0.8 and found.controls[0].pools["coherence"] == 0
    assert "as the author's, coherence by characters alone: " in pools_line(found.to_dict())
    assert found.alarms == []


def test_where_nobody_tells_order_pools_say_so_and_the_alarm_is_raised():
    found = judged([0.3, -0.3], words_at_random=True)
    assert not found.order[CHARACTERS].passed
    assert "coherence" not in found.author.pools and found.author.pools["all"] > 0.8
    assert "as the author's, coherence not checked: " in pools_line(found.to_dict())
    assert found.controls[0].pools["all"] > 0.05
    assert "'shuffled spans'" in found.alarms[0]
