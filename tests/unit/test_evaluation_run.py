"""The control table in small: whatever may not win must not win, and each is stopped by the measure that should stop it."""

from __future__ import annotations

import json
import math
import random

import pytest
from small_voices import background, examples, tell, texts

from giong.config import EvaluationConfig
from giong.contracts import Reply, TokenScores
from giong.errors import DataError
from giong.evaluation.controls import CONTROLS as COUNTERFEITS
from giong.evaluation.controls import make_controls
from giong.evaluation.results import ArmOutput
from giong.evaluation.run import evaluate

CONFIG = EvaluationConfig(num_bootstrap=300)
TRAIN = texts("author", 1000, 60)
CALIBRATION = texts("author", 2000, 24)
TEST = examples(3000, 32)


def arm(name: str, replies: list[str], **settings) -> ArmOutput:
    return ArmOutput(name, [Reply(text) for text in replies], **settings)


def shuffled(text: str) -> str:
    parts = text.split()
    random.Random(1).shuffle(parts)
    return " ".join(parts)


def scores(nll_per_token: float, num: int = 10) -> TokenScores:
    return TokenScores((-nll_per_token,) * num, 4 * num)


CONTROLS = {
    "base": [tell("plain", 3000 + i) for i in range(32)],
    "identity": [example.answer for example in TEST],
    "copy_of_input": [example.messages[0].content for example in TEST],
    "author_other_line": [tell("author", 9000 + i) for i in range(32)],
    "train_copy": TRAIN[:32],
    "looped": [" ".join([example.answer[:60]] * 7) for example in TEST],
    "shuffled": [shuffled(example.answer) for example in TEST],
    "other_voice": [tell("clerk", 3000 + i) for i in range(32)],
    "few_shot": [tell("plain" if i % 4 else "author", 3000 + i) for i in range(32)],
    "fine_tuned": [tell("author", 3000 + i) if i % 8 else tell("plain", 3000 + i) for i in range(32)],
}


@pytest.fixture(scope="module")
def evaluation():
    held_out = {"base": [scores(3.0)] * 32, "fine_tuned": [scores(2.5)] * 32}
    general = {"base": [scores(4.0)] * 5, "fine_tuned": [scores(4.1)] * 5}
    own = [scores(2 + 0.02 * i) for i in range(32)]
    coherence = {"author": own, "fine_tuned": own, "looped": [scores(0.4)] * 32}
    arms = [arm(name, replies, uses_training_text=name != "base") for name, replies in CONTROLS.items()]
    return evaluate(arms, TEST, TRAIN, CALIBRATION, background(), CONFIG, held_out, general, coherence)


def test_the_author_closes_the_whole_gap_and_repeats_himself_perfectly(evaluation):
    for row in (evaluation.author, evaluation.arm("identity")):
        gap = row.style_gap_closed
        assert (gap.point, gap.low, gap.high) == pytest.approx((1, 1, 1))
        assert row.chrf.point == pytest.approx(100)
        assert row.chrf_corpus == pytest.approx(100)
        assert row.length_ratio == 1
        assert row.failed_gates == []
        assert row.joint.point >= 0.8
    base = evaluation.arm("base").style_gap_closed
    assert (base.point, base.low, base.high) == (0, 0, 0)


def test_copying_the_input_keeps_meaning_but_no_style(evaluation):
    row = evaluation.arm("copy_of_input")
    assert abs(row.style_gap_closed.point) < 0.05
    assert row.key_recall.point == 1
    assert row.key_add == 0
    assert evaluation.num_facts_to_find <= evaluation.num_facts
    assert row.joint.point == 0


def test_another_line_by_the_author_has_style_but_no_meaning(evaluation):
    row = evaluation.arm("author_other_line")
    assert row.style_gap_closed.point == pytest.approx(1, abs=0.2)
    assert row.key_recall.point < 0.35 < evaluation.author.key_recall.point
    assert row.gate("meaning").status == "fail"


def test_each_counterfeit_is_stopped_by_its_own_gate(evaluation):
    assert evaluation.arm("looped").gate("collapse").status == "fail"
    assert evaluation.arm("looped").gate("coherence").status == "fail"
    assert evaluation.arm("fine_tuned").gate("coherence").status == "pass"
    copy = evaluation.arm("train_copy")
    assert copy.overlap == 1
    assert copy.gate("overlap").status == "fail"
    assert copy.gate("longest copy").status == "fail"
    assert copy.style_gap_closed.point > 0.9
    # Shuffled words keep every item and nearly all style, but the order that chrF++ sees is gone.
    shuffle = evaluation.arm("shuffled")
    assert shuffle.key_recall.point == pytest.approx(evaluation.author.key_recall.point, abs=0.05)
    assert shuffle.chrf.point < 60
    for name in ("looped", "train_copy"):
        assert evaluation.arm(name).joint.point == 0


def test_other_voices_are_rejected(evaluation):
    assert evaluation.arm("other_voice").style_gap_closed.high < 0.5
    assert evaluation.arm("other_voice").joint.point <= 0.25
    quality = evaluation.verifier
    assert quality.measurable
    assert quality.auc_pooled >= quality.auc - 0.02
    assert quality.auc > 0.9
    assert quality.brier < 0.15


def test_likelihood_and_forgetting_are_paired_with_the_base(evaluation):
    likelihood = evaluation.arm("fine_tuned").likelihood
    assert likelihood.gain_nats_per_token.point == pytest.approx(0.5)
    # 10 tokens of 0.5 nats each over 40 bytes.
    assert likelihood.gain_bits_per_byte.point == pytest.approx(5 / 40 / math.log(2))
    assert evaluation.arm("few_shot").likelihood is None
    assert evaluation.arm("few_shot").gate("forgetting").status == "not available"
    forgetting = evaluation.arm("fine_tuned").gate("forgetting")
    assert (forgetting.status, forgetting.value) == ("warn", pytest.approx(0.1))


def test_the_tuned_arm_is_compared_with_the_best_sound_prompt():
    names = ("base", "few_shot", "train_copy", "fine_tuned")
    result = evaluate([arm(name, CONTROLS[name]) for name in names], TEST, TRAIN, CALIBRATION, background(), CONFIG)
    # The training copy closes more of the gap, but a gate fails: it is no alternative.
    assert result.best_prompt_arm == "few_shot"
    comparison = result.comparison
    assert (comparison.arm, comparison.against) == ("fine_tuned", "few_shot")
    tuned, best = result.arm("fine_tuned").style_gap_closed.point, result.arm("few_shot").style_gap_closed.point
    assert comparison.difference.point == pytest.approx(tuned - best)
    assert comparison.difference.low > 0.1
    assert comparison.probability_of_margin > 0.95
    assert any("Coherence not checked" in note for note in result.notes)


def test_a_prompt_on_top_is_compared_with_the_tuned_arm_and_the_best_prompt():
    """It is no prompt itself, however good; and where there is no gap there is nothing to compare."""
    replies = {name: CONTROLS[name] for name in ("base", "few_shot", "fine_tuned")} | {"fine_tuned+few_shot": CONTROLS["identity"]}
    arms = [arm(name, texts, uses_training_text=name != "base") for name, texts in replies.items()]
    found = evaluate(arms, TEST, TRAIN, CALIBRATION, background(), CONFIG, combined_arms=["fine_tuned+few_shot"])
    assert found.best_prompt_arm == "few_shot"
    assert found.comparison.arm == "fine_tuned"
    assert [(row.arm, row.against) for row in found.combinations] == [
        ("fine_tuned+few_shot", "fine_tuned"),
        ("fine_tuned+few_shot", "few_shot"),
    ]
    for row in found.combinations:
        other = found.arm(row.against).style_gap_closed.point
        assert row.difference.point == pytest.approx(1 - other)


def test_the_result_is_plain_json_and_the_same_again(evaluation):
    values = evaluation.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    row = next(row for row in values["arms"] if row["name"] == "few_shot")
    assert row["likelihood"] is None
    assert {gate["name"] for gate in row["gates"]} >= {"collapse", "overlap", "meaning"}


def test_an_author_like_his_background_is_not_given_a_score():
    same = {voice: texts("author", 20000 + 1000 * place, 40) for place, voice in enumerate(("one", "two"))}
    arms = [arm(name, CONTROLS[name]) for name in ("base", "fine_tuned")]
    result = evaluate(arms, TEST, TRAIN, CALIBRATION, same, CONFIG)
    assert not result.measurable
    assert result.comparison is None
    assert result.best_prompt_arm is None
    assert result.arm("fine_tuned").style_gap_closed is None
    assert result.arm("fine_tuned").joint is None
    assert "not measurable" in result.style_note
    assert "would help" in result.style_note
    assert result.arm("fine_tuned").chrf.point > 0


def test_without_background_style_is_refused_and_the_rest_measured():
    result = evaluate([arm("base", CONTROLS["base"])], TEST, TRAIN, CALIBRATION, {}, CONFIG)
    assert result.verifier is None
    assert "evaluation.background" in result.style_note
    assert result.arm("base").key_recall.point == 1


def test_a_base_that_already_writes_like_the_author_leaves_no_gap():
    result = evaluate([arm("base", CONTROLS["author_other_line"])], TEST, TRAIN, CALIBRATION, background(), CONFIG)
    assert result.measurable
    assert "prompting already matches" in result.style_note
    assert result.arm("base").style_gap_closed is None
    assert result.arm("base").style is not None


def test_bad_calls_are_named():
    with pytest.raises(DataError, match="3 replies to 32"):
        evaluate([arm("base", ["a", "b", "c"])], TEST, TRAIN, CALIBRATION, background(), CONFIG)
    with pytest.raises(DataError, match="'base'"):
        evaluate([arm("few_shot", CONTROLS["base"])], TEST, TRAIN, CALIBRATION, background(), CONFIG)


def test_no_counterfeit_gets_through():
    requests = [example.messages[0].content for example in TEST]
    own = [example.answer for example in TEST]
    others = [text for texts_of in background().values() for text in texts_of]
    made = make_controls(own, requests, TRAIN, others)
    assert list(made) == list(COUNTERFEITS)
    assert made == make_controls(own, requests, TRAIN, others)
    assert all(len(texts_of) == len(TEST) for texts_of in made.values())
    assert all(len(text.split()) == len(answer.split()) for text, answer in zip(made["bigram_babble"], own))
    assert sorted(made["shuffled_words"][0].split()) == sorted(own[0].split())
    arms = [arm("base", CONTROLS["base"]), arm("few_shot", CONTROLS["few_shot"])]
    found = evaluate(arms, TEST, TRAIN, CALIBRATION, background(), CONFIG, controls=made)
    rows = {row.name: row for row in found.controls}
    assert list(rows) == list(made)
    assert "overlap" in rows["training_copy"].failed_gates
    assert "collapse" in rows["looped_sentence"].failed_gates
    assert rows["request"].joint.point == 0
    # The best prompt and the verdict see the arms only.
    assert {row.name for row in found.arms} == {"base", "few_shot"}
    assert found.best_prompt_arm in ("base", "few_shot")


def test_a_counterfeit_that_nothing_stops_raises_the_alarm():
    """The author's own answers, planted under a counterfeit's name."""
    own = [example.answer for example in TEST]
    arms = [arm("base", CONTROLS["base"])]
    found = evaluate(arms, TEST, TRAIN, CALIBRATION, background(), CONFIG, controls={"shuffled_words": own, "request": CONTROLS["looped"]})
    assert len(found.alarms) == 1
    assert "shuffled words" in found.alarms[0]


def test_pools_of_ten_tell_the_author_from_his_own_shuffled_spans():
    """Spans in another order keep style and meaning; the base likes them less than their own shuffle no more than the author's text."""
    own = [example.answer for example in TEST]
    calibration = examples(2000, 24)
    made = {"shuffled_spans": make_controls(own, [""] * len(own), [], [])["shuffled_spans"], "request": own}
    names = ("author", "calibration", "base", *made)
    coherence = {name: [scores(2 + 0.02 * i) for i in range(24 if name == "calibration" else 32)] for name in names}
    disordered = {name: [scores(row_nll / 10 + (0.01 if name == "shuffled_spans" else 0.3)) for row_nll in (row.nll for row in rows)]
                  for name, rows in coherence.items()}  # fmt: skip
    known = {"coherence": coherence, "controls": made, "calibration": calibration}
    found = evaluate([arm("base", CONTROLS["base"])], TEST, TRAIN, CALIBRATION, background(), CONFIG, **known, disordered=disordered)
    rows = {row.name: row.pools for row in (found.author, *found.arms, *found.controls)}
    assert rows["author"]["all"] > 0.8 and rows["request"] == rows["author"]
    assert rows["shuffled_spans"]["coherence"] == 0 and rows["shuffled_spans"]["repetition"] == rows["author"]["repetition"]
    assert rows["base"]["style"] == 0
    # The author's own answers under a counterfeit's name pass; what is stopped in pools raises no alarm.
    assert [alarm.split("'")[1] for alarm in found.alarms] == ["request"]
    few = evaluate(
        [arm("base", CONTROLS["base"])], TEST, TRAIN, CALIBRATION, background(), CONFIG, **{**known, "calibration": calibration[:5]}
    )
    assert few.author.pools == {}


def test_controls_without_other_writers_or_training_text():
    made = make_controls(["One. Two three."], ["Say it."], [], [])
    assert set(made) == {"shuffled_words", "shuffled_spans", "looped_sentence", "request"}
    assert made["looped_sentence"] == ["One. One. One. One."]


def test_the_gates_of_training_belong_to_the_tuned_arm_alone(evaluation):
    training = {"base": [scores(3.0)] * 8, "fine_tuned": [scores(1.0)] * 8}
    held_out = {"base": [scores(3.0)] * 32, "fine_tuned": [scores(2.5)] * 32}
    arms = [arm(name, CONTROLS[name]) for name in ("base", "fine_tuned")]
    found = evaluate(
        arms,
        TEST,
        TRAIN,
        CALIBRATION,
        background(),
        CONFIG,
        held_out,
        training=training,
        training_documents=["a", "b"] * 4,
        exposures=[8.0, 7.0],
    )
    tuned = found.arm("fine_tuned")
    assert tuned.gate("overfitting").value == pytest.approx(1.5)
    assert {"membership", "canaries"} <= {gate.name for gate in tuned.gates if gate.status != "pass"}
    assert tuned.gate("extraction").status == "not available"
    assert not {"overfitting", "extraction", "membership", "canaries", "format"} & {gate.name for gate in found.arm("base").gates}
    assert evaluation.arm("fine_tuned").gate("overfitting").status == "not available"


def test_bad_input_is_said_and_the_rest_is_measured():
    broken = [scores(3.0)] * 31 + [scores(math.nan)]
    own = [example.answer for example in TEST]
    arms = [arm("base", CONTROLS["base"]), arm("silent", [""] * 32), arm("terse", ["Yes"] * 32), arm("twin", CONTROLS["base"])]
    voices = {**background(), "himself": [*own, *TRAIN[:8], *texts("clerk", 5000, 6)]}
    held_out = {"base": [scores(3.0)] * 32, "twin": broken, "silent": broken}
    found = evaluate(arms, TEST, TRAIN, CALIBRATION, voices, CONFIG, held_out, coherence={"author": broken, "base": broken})
    notes = " ".join(found.notes)
    assert "1 of 32 likelihoods of the author's answers under 'twin' are no numbers" in notes
    assert "40 of 46 texts of the background voice 'himself' are the author's own and were left out" in notes
    assert "Every reply of silent is empty" in notes
    assert "base and twin gave the very same replies" in notes
    assert found.arm("twin").likelihood is None
    assert found.arm("base").likelihood.nats_per_token == pytest.approx(3)
    assert found.arm("base").gate("coherence").status == "not available"
    for name in ("silent", "terse"):
        assert found.arm(name).joint.point == 0
        assert "length" in found.arm(name).failed_gates
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_arms_are_told_from_the_author_and_placed_on_the_register_axis():
    pairs = [(tell("clerk", n), tell("author", n)) for n in range(4000, 4040)]
    neutral = [tell("clerk", 3000 + n) for n in range(32)]
    arms = [arm("base", CONTROLS["base"]), arm("neutral", neutral), arm("fine_tuned", CONTROLS["fine_tuned"])]
    found = evaluate(arms, TEST, TRAIN, CALIBRATION, background(), CONFIG, register_pairs=pairs, neutral_requests=neutral)
    assert found.author.register_shift.point == 0
    assert found.author.two_sample.auc == 0.5
    assert found.arm("neutral").register_shift.point == pytest.approx(-1)
    assert -0.5 < found.arm("fine_tuned").register_shift.point < 0
    assert found.arm("neutral").two_sample.auc > 0.9 > found.arm("fine_tuned").two_sample.auc
    assert evaluate(arms, TEST, TRAIN, CALIBRATION, {}, CONFIG).arm("base").register_shift is None


def test_few_requests_are_said_to_be_few():
    found = evaluate([arm("base", CONTROLS["base"][:4])], TEST[:4], TRAIN, CALIBRATION, background(), CONFIG)
    assert any("Only 4 test requests" in note for note in found.notes)


def test_every_arm_is_held_to_the_schema():
    arms = [arm("base", ['{"price": 1}'] * 12), arm("fine_tuned", ['{"price": 1}'] * 11 + ["{}"])]
    settings = {"json_schema": {"required": ["price"]}, "tuned_arms": ()}
    rows = evaluate(arms, TEST[:12], TRAIN, CALIBRATION, {}, EvaluationConfig(num_bootstrap=100), **settings)
    assert {row.name: row.gate("format").value for row in (*rows.arms, rows.author)} == {"base": 1, "fine_tuned": 11 / 12, "author": 0}
    assert f"Not valid: {TEST[11].id}: 'price' is a required property (at $)." in rows.arm("fine_tuned").gate("format").explanation
