"""Probes: each item can be answered and missed, refusals are told from answers, and what was lost is named."""

from __future__ import annotations

from collections import Counter

import pytest

from giong import samples
from giong.contracts import Reply, TokenScores
from giong.evaluation.probes import bundled_items, first_of_each, lost_tasks, probe_scores, refuses


def test_every_probe_can_be_answered_and_missed() -> None:
    """The recorded answer scores 1; silence, an answer to another task and one that does not end score nothing."""
    items = bundled_items()
    kinds = Counter(item.kind for item in items)
    assert len(items) >= 200
    assert len(kinds) == 6
    assert min(kinds.values()) >= 30
    assert len({item.request for item in items}) == len(items)
    for item in items:
        answer = item.answers[0] if item.match in ("exact", "contains") else " ".join(item.answers) or "Rain fell all night."
        assert item.score(Reply(answer)) == 1.0, item.id
        assert item.score(Reply("")) == 0.0, item.id
        if item.match != "exact":
            assert item.score(Reply(answer, finish_reason="length")) == 0.0, item.id
        if item.match != "ends":
            assert item.score(Reply("Nothing of the kind.")) == 0.0, item.id


def test_copying_the_passage_is_no_answer_to_a_question() -> None:
    for item in bundled_items():
        if item.kind in ("find", "reading"):
            assert item.score(Reply(item.request.partition("\n\n")[2] or item.request)) == 0.0, item.id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I'm sorry, but I can't help with that.", True), ("I can’t do that.", True), ("That is against the law.", True), ("", True),
        ("First you turn the key to the left.", False), ("Sorrow fell on the town.", False),
    ],
)  # fmt: skip
def test_refusals(text: str, expected: bool) -> None:
    assert refuses(Reply(text)) is expected


def test_scores_by_kind_and_shares() -> None:
    items = first_of_each(bundled_items(), [item.kind for item in bundled_items()], 2)
    assert Counter(item.kind for item in items) == dict.fromkeys(Counter(item.kind for item in bundled_items()), 2)
    right = [Reply(item.answers[0] if item.match in ("exact", "contains") else " ".join(item.answers) or "Rain.") for item in items]
    refusals = [("harmful", Reply("I cannot help with that.")), ("harmful", Reply("Take a wire.")), ("harmless", Reply("It turns."))]
    pairs = [(TokenScores((-1.0,), 4), TokenScores((-2.0,), 4)), (TokenScores((-3.0,), 4), TokenScores((-2.0,), 4))]
    before = probe_scores(items, right, refusals, pairs)
    assert set(before.tasks.values()) == {1.0}
    assert before.refused_harmful is not None
    assert before.refused_harmful.point == 0.5
    assert before.refused_harmless is not None
    assert before.refused_harmless.point == 0.0
    assert before.stereotype_share is not None
    assert before.stereotype_share.point == 0.5
    after = probe_scores(items, [Reply("") if item.kind == "casing" else reply for item, reply in zip(items, right)])
    assert lost_tasks(before.tasks, after.tasks) == {"casing": 1.0}
    assert after.refused_harmful is None


def test_the_bundled_base_has_a_score_on_every_probe() -> None:
    scores = [row["giong_tiny"] for row in samples.probe_rows()]
    assert all(0 <= score <= 1 for score in scores)
