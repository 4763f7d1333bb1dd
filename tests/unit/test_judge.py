"""The judge before a scripted server: what it is asked, what its answers come to, and what of a bad judge is shown."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from fake_teacher import Call, Failure, FakeTeacher
from report_content import content

from giong.clients.openai_compatible import RemoteModel
from giong.clients.spend import SpendLedger
from giong.config import RemoteModelConfig
from giong.contracts import Example, Message
from giong.evaluation.compare.votes import Vote
from giong.evaluation.judge import Judgement, agreement_with_people, judge_arms, rate_at_equal_length, read_verdict
from giong.evaluation.report import render
from giong.evaluation.results import finite

EXAMPLES = [
    Example(f"e{n}", f"d{n // 2}", "neutral_rewrite", (Message("user", f"Say that it rained {n} times."),), f"Well now, it rained {n} times - so there!")
    for n in range(12)
]  # fmt: skip
ANSWERS = {
    "base": [f"It is noted that it rained {n} times." for n in range(12)],
    "fine_tuned": [f"Well now, {n} times it rained." for n in range(12)],
    "author": [example.answer for example in EXAMPLES],
}


def shown(call: Call) -> tuple[str, str]:
    user = call.body["messages"][-1]["content"]
    return tuple(re.search(rf"<{place}>\n(.*?)\n</{place}>", user, re.DOTALL).group(1) for place in ("first", "second"))  # type: ignore[union-attr,return-value]


def likeness(text: str) -> int:
    """The real thing, then what begins like it, then the rest."""
    return 2 if text.startswith("Well now") and text.endswith("so there!") else int(text.startswith("Well now"))


def fair(call: Call) -> str:
    first, second = map(likeness, shown(call))
    return f"Text 1 is brisk. Text 2 is not.\nVERDICT: {'TIE' if first == second else 1 if first > second else 2}"


def judged(script, tmp_path: Path, answers=ANSWERS, **settings) -> tuple[Judgement, FakeTeacher]:
    with FakeTeacher(script) as teacher:
        config = RemoteModelConfig(base_url=teacher.base_url, model="scripted", max_retries=0, **settings)
        judge = RemoteModel(config, SpendLedger(tmp_path / "spend.jsonl", 1.0))
        return judge_arms(judge, ["A sample of mine."], EXAMPLES, answers, num_bootstrap=200), teacher


def test_a_fair_judge_ranks_the_arms(tmp_path):
    found, teacher = judged(fair, tmp_path)
    assert found.passed
    assert found.self_test.point == 1
    # Ten pairs of the self-test and three pairs of arms on twelve requests, in both orders.
    assert found.num_asked == teacher.num_calls == 2 * (10 + 3 * 12)
    assert (found.num_unreadable, found.num_contradictions, found.first_rate) == (0, 0, 0.5)
    rates = {pair.arms: pair.win_rate.point for pair in found.pairs}
    assert rates == {("base", "fine_tuned"): 0, ("base", "author"): 0, ("fine_tuned", "author"): 0}
    assert [strength.arm for strength in found.strengths] == ["author", "fine_tuned", "base"]
    assert found.pairs[0].win_rate.high > 0, "where all verdicts agree the interval is still not a point"
    asked = teacher.calls[0].body["messages"]
    assert "A sample of mine." in asked[1]["content"]
    assert "it rained 0 times" in asked[1]["content"]
    page = render(content(judge=finite({**found.to_dict(), "labels": {}})))
    assert "Strength before the judge" in page
    assert "was asked 92 times" in page


def test_a_judge_that_prefers_whatever_comes_first_only_calls_ties(tmp_path):
    real = {"author": [example.answer for example in EXAMPLES]}

    def first(call: Call) -> str:
        one, other = shown(call)
        return fair(call) if sorted(one.split()) == sorted(other.split()) else "VERDICT: 1"

    found, _ = judged(first, tmp_path, {**real, "base": ANSWERS["base"]})
    assert found.passed
    assert found.num_contradictions == 12
    assert found.pairs[0].win_rate.point == 0.5
    assert found.first_rate > 0.7
    assert "contradicted itself in most pairs" in found.sentences[0]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (lambda call: "VERDICT: 1", "preferred the author in 50% of the pairs"),
        (lambda call: "Both are lovely texts, and I could not choose.", "could not be read"),
        (lambda call: fair(call).translate(str.maketrans("12", "21")), "preferred the author in 0% of the pairs"),
    ],
    ids=["always first", "prose", "wrong way round"],
)
def test_nothing_is_shown_of_a_judge_that_fails_its_self_test(script, said, tmp_path):
    found, teacher = judged(script, tmp_path)
    assert not found.passed
    assert (found.pairs, found.strengths, found.votes) == ([], [], [])
    assert said in found.sentences[0]
    assert teacher.num_calls == 20, "no pair of arms is paid for"
    page = render(content(judge=finite({**found.to_dict(), "labels": {}})))
    assert "did not pass its self-test" in page
    assert "Which answer is more like the author" not in page


def test_prose_now_and_then_is_counted_and_left_out(tmp_path):
    found, _ = judged(lambda call: "I would rather not say." if call.number % 4 == 0 else fair(call), tmp_path, concurrency=1)
    assert found.num_unreadable == found.num_asked // 4
    assert 0 < found.pairs[0].num_judged < 12
    assert any("hold no line `VERDICT" in sentence for sentence in found.sentences)


def test_what_was_said_before_the_endpoint_failed_is_kept(tmp_path):
    found, _ = judged(lambda call: fair(call) if call.number <= 20 + 6 * 5 else Failure(401, "no credit"), tmp_path)
    assert found.passed
    assert found.pairs[0].num_judged == 5
    assert "stopped after 5 of 12 requests" in found.sentences[0]


def test_verdicts_are_read_from_the_line_that_gives_one():
    assert read_verdict("Text 1 is 2 lines long.\n**VERDICT: 2**") == "2"
    assert read_verdict("VERDICT: 1\nno, wait\nverdict: tie") == "tie"
    assert read_verdict("The verdict: 1 is my choice? I cannot say VERDICT") is None
    assert read_verdict("") is None


def test_a_preference_for_length_is_taken_out():
    draw = np.random.default_rng(0)
    log_ratios = draw.normal(0.5, 0.6, size=400)
    # A judge who sees length alone: P(win) = sigmoid(3 x).
    values = (draw.random(400) < 1 / (1 + np.exp(-3 * log_ratios))).astype(float)
    names = [str(number) for number in range(400)]
    adjusted = rate_at_equal_length(values, log_ratios, names)
    assert values.mean() > 0.68
    assert adjusted.low < 0.5 < adjusted.high
    assert adjusted.point == pytest.approx(0.5, abs=0.07)
    # Without a difference in length it is the win rate, pulled in by the ridge.
    plain = rate_at_equal_length(values, np.zeros(400), names)
    assert plain.point == pytest.approx(values.mean(), abs=0.002)
    assert 0.5 < rate_at_equal_length(np.ones(10), np.zeros(10), names[:10]).point < 1


def test_agreement_with_people_counts_the_same_texts_alone():
    def vote(request: str, choice: str, rater: str = "judge", text: str = "left text") -> Vote:
        return Vote(f"{request}:a:b", "preference", rater, "", choice, "a", "b", request, "d", (), text, "right text", 0, "")  # type: ignore[arg-type]

    judge = [vote(f"e{n}", "left") for n in range(3)] + [vote("e3", "right"), vote("e4", "tie")]
    people = [
        vote("e0", "left", "ann"), vote("e0", "left", "bob"), vote("e0", "right", "cy"), vote("e1", "right", "ann"),
        vote("e2", "left", "ann", text="an older text"), vote("e3", "right", "ann"), vote("e4", "left", "ann"), vote("e4", "right", "bob"),
    ]  # fmt: skip
    pair = agreement_with_people(judge, people)
    assert (pair.num_common, pair.agreement) == (4, 0.75)
    assert agreement_with_people(judge, []) is None
