"""The rules of the verdict, one by one."""

from __future__ import annotations

import dataclasses
import json

import pytest

from giong.sizing.interval import Interval
from giong.sizing.learning_curve import RowsNeeded
from giong.sizing.verdict import REMEDIES, Evidence, decide

PASS = {"forgetting": "pass", "collapse": "pass", "end of turn": "pass", "length": "warn", "overlap": "pass", "meaning": "pass"}


GOOD = Evidence(
    measurable=True, verifier_auc_pooled=0.97, num_words=9000, num_pieces=120, num_rows=80, num_test_requests=40,
    best_prompt_arm="few_shot", best_prompt=Interval(0.3, 0.2, 0.4), tuned=Interval(0.62, 0.5, 0.7), difference=Interval(0.32, 0.2, 0.45),
    probability_of_margin=0.99, gates=PASS, rows_needed=RowsNeeded(160, 110, 250),
)  # fmt: skip
NO_COHERENCE = {"coherence": "not available"}
UNCHECKED = {"gates": {**PASS, **NO_COHERENCE}, "gate_explanations": {"coherence": "It hardly tells order in this language."}}
WEAK = dataclasses.replace(GOOD, tuned=Interval(0.33, 0.2, 0.4), difference=Interval(0.03, -0.05, 0.1), probability_of_margin=0.05)


@pytest.mark.parametrize(
    ("change", "decision", "words"),
    [
        ({}, "go", ("62%", "30%", "few_shot", "99%")),
        ({"measurable": False, "num_words": 900, "num_pieces": 12}, "collect more", ("0.97", "1,600 more words")),
        ({"best_prompt": None, "style_note": "The base and the author cannot be told apart."}, "prompt instead", ("cannot be told apart",)),
        ({"best_prompt": Interval(0.9, 0.8, 1.0)}, "prompt instead", ("90%", "few_shot", "10%")),
        ({"gates": {**PASS, "overlap": "fail"}}, "no-go", ("overlap", "fewer epochs")),
        (
            {"gates": {**PASS, "meaning": "fail"}, "gate_explanations": {"meaning": "Worse by 9."}},
            "no-go",
            ("meaning", "Worse by 9.", "base"),
        ),
        ({"gates": {**PASS, "meaning": "warn"}}, "collect more", ("meaning", "documents")),
        # Few passages: a failed gate says nothing yet, and a proof stays one.
        (
            {"num_words": 1200, "num_pieces": 12, "gates": {**PASS, "collapse": "fail"}},
            "collect more",
            ("12 passages", "1,200 words", "collapse"),
        ),
        ({"num_words": 1200, "num_pieces": 60, "gates": {**PASS, "collapse": "fail"}}, "no-go", ("collapse",)),
        (
            {"gates": {**PASS, "collapse": "fail"}, "base_failed_gates": ("collapse", "coherence")},
            "no-go",
            ("better base", "fails it before"),
        ),
        ({"gates": {**PASS, "collapse": "fail"}, "base_failed_gates": ("coherence",)}, "no-go", ("lower train.learning_rate",)),
        # Where to stop and how much to say is what tuning teaches: that the untuned base does not know it says nothing against the base.
        ({"gates": {**PASS, "end of turn": "fail"}, "base_failed_gates": ("end of turn",)}, "no-go", (REMEDIES["end of turn"],)),
        (
            {"gates": {**PASS, "collapse": "fail", "length": "fail"}, "base_failed_gates": ("collapse", "length")},
            "no-go",
            (REMEDIES["collapse"],),
        ),
        ({"num_words": 1200, "num_pieces": 12}, "go", ("62%",)),
        # Nothing is a go whose coherence nobody could check.
        ({**UNCHECKED, "base_tells_order": False}, "no-go", ("62%", "hardly tells order")),
        ({**UNCHECKED, "base_tells_order": False, "gates": {**PASS, **NO_COHERENCE, "length": "fail"}}, "no-go", ("hardly tells order",)),
        (UNCHECKED, "collect more", ("62%", "hardly tells order")),
        ({**UNCHECKED, "gates": {**PASS, **NO_COHERENCE, "length": "fail"}}, "no-go", ("the gate length",)),
        ({"base_tells_order": True, "gates": {**PASS, "coherence": "pass"}}, "go", ("62%",)),
    ],
)
def test_rules_on_strong_evidence(change, decision, words):
    verdict = decide(dataclasses.replace(GOOD, **change))
    assert verdict.decision == decision
    for word in words:
        assert word in verdict.reason
    json.dumps(verdict.to_dict(), allow_nan=False)


FACTS = {"num_facts": 100, "num_facts_to_find": 80, "fact_recall": Interval(0.1, 0.05, 0.2)}


@pytest.mark.parametrize(
    ("change", "decision"),
    [
        ({}, "retrieve"),
        # Whatever the style: facts come first.
        ({"measurable": False}, "retrieve"),
        ({"gates": {**PASS, "meaning": "fail"}}, "retrieve"),
        # The requests hold most of them, there are too few, or the model knows them.
        ({"num_facts": 200}, "go"),
        ({"num_facts": 20, "num_facts_to_find": 19}, "go"),
        ({"num_facts_to_find": 39, "num_facts": 40}, "go"),
        ({"fact_recall": Interval(0.45, 0.3, 0.6)}, "go"),
        ({"fact_recall": None}, "go"),
    ],
)
def test_facts_have_to_be_looked_up(change, decision):
    verdict = decide(dataclasses.replace(GOOD, **{**FACTS, **change}))
    assert verdict.decision == decision
    if decision == "retrieve":
        assert "80 of the 100" in verdict.reason
        assert verdict.numbers["fact_recall"]["point"] == 0.1


def test_more_rows_where_the_forecast_reaches_the_margin():
    verdict = decide(dataclasses.replace(WEAK, rows_needed=RowsNeeded(320, 200, 700)))
    assert verdict.decision == "collect more"
    assert verdict.numbers["rows_needed"] == {"point": 320, "low": 200, "high": 700}
    assert "240 more rows (80 % interval: 120 to 620; there are 80)" in verdict.reason
    assert "interval: 0 to many times as many" in decide(dataclasses.replace(WEAK, rows_needed=RowsNeeded(320, 60, None))).reason


def test_prompting_where_nothing_reaches_it():
    # A curve that is there already with the rows that were measured promises nothing.
    for needed in (None, RowsNeeded(80, 60, 110)):
        verdict = decide(dataclasses.replace(WEAK, rows_needed=needed))
        assert verdict.decision == "prompt instead"
        assert "use few_shot" in verdict.reason


def test_a_difference_that_more_requests_would_prove():
    undecided = dataclasses.replace(WEAK, difference=Interval(0.2, 0.0, 0.4), probability_of_margin=0.7, rows_needed=None)
    verdict = decide(undecided)
    # Standard error 0.4 / 3.92 = 0.102; 40 * (0.84 * 0.102 / 0.1)^2 = 29.4 and already there: 30.
    assert verdict.rule == "margin undecided"
    assert "About 30" in verdict.reason
    hopeless = dataclasses.replace(undecided, difference=Interval(0.11, -0.4, 0.6))
    assert decide(hopeless).decision == "prompt instead"


def test_go_needs_a_measured_model():
    evidence = dataclasses.replace(GOOD, tuned=None, difference=None, probability_of_margin=0.0, gates={})
    assert decide(evidence).decision == "collect more"
    assert decide(dataclasses.replace(evidence, rows_needed=None)).decision == "prompt instead"
