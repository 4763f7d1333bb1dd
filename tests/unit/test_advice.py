"""The questionnaire: which answer changes the verdict, and that a person can give them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from command_line import giong
from test_verdict import FACTS, GOOD, PASS, WEAK

from giong.config import AdviceConfig, load, parse
from giong.evaluation.decision import answers_given, decide_again
from giong.evaluation.results import finite
from giong.project import init, verdict, write_settings
from giong.sizing.advice import advise
from giong.sizing.interval import Interval
from giong.sizing.learning_curve import RowsNeeded
from giong.sizing.questions import QUESTIONS
from giong.sizing.verdict import Combination, Evidence, decide
from giong.workspace import Project, write_json

FREE = AdviceConfig(may_imitate=True, base_licensed=True)
UNPROVEN = dataclasses.replace(WEAK, rows_needed=RowsNeeded(200, 120, 300))
COMBINED = Combination("fine-tuned + few-shot", Interval(0.8, 0.7, 0.9), Interval(0.18, 0.1, 0.3), 0.93, 0.99, (), True)


@pytest.mark.parametrize(
    ("evidence", "answers", "decision", "answer"),
    [
        (GOOD, {}, "go", ""),
        (GOOD, {"may_imitate": False}, "no-go", "may_imitate"),
        (GOOD, {"base_licensed": False}, "no-go", "base_licensed"),
        # What is forbidden comes before what is impossible, and both before what is better.
        (GOOD, {"may_imitate": False, "base_tunable": False, "must_cite": True}, "no-go", "may_imitate"),
        (GOOD, {"base_tunable": False}, "prompt instead", "base_tunable"),
        (GOOD, {"base_tunable": False, "must_cite": True}, "retrieve", "base_tunable"),
        (GOOD, {"must_cite": True}, "combine", "must_cite"),
        (GOOD, {"knowledge_changes": "daily"}, "combine", "knowledge_changes"),
        (GOOD, {"knowledge_changes": "yearly"}, "go", ""),
        (GOOD, {"goals": ["voice", "facts"]}, "combine", "goals"),
        (GOOD, {"goals": ["facts"]}, "retrieve", "goals"),
        (WEAK, {"must_cite": True}, "collect more", ""),
        (dataclasses.replace(WEAK, rows_needed=None), {"must_cite": True}, "retrieve", "must_cite"),
        (dataclasses.replace(GOOD, **FACTS), {"must_cite": True}, "retrieve", ""),
        # 120 passages at ten minutes are 20 hours, and one to judge.
        (UNPROVEN, {"human_hours": 22}, "collect more", ""),
        (UNPROVEN, {"human_hours": 20}, "prompt instead", "human_hours"),
        (GOOD, {"human_hours": 0.5}, "go", ""),
    ],
)
def test_what_the_answers_make_of_the_figures(evidence: Evidence, answers: dict, decision: str, answer: str) -> None:
    found = advise(evidence, FREE.model_copy(update=answers))
    assert (found.decision, found.answer) == (decision, answer)
    assert (found.rule == f"answer to advice.{answer}") == bool(answer)
    assert found.numbers == decide(evidence).numbers
    if answer:
        vietnamese = advise(evidence, FREE.model_copy(update=answers), "vi")
        assert vietnamese.decision == decision
        assert vietnamese.reason != found.reason


def test_no_answer_makes_a_go() -> None:
    best = {
        "goals": ["voice"],
        "knowledge_changes": "never",
        "must_cite": False,
        "base_tunable": True,
        "human_hours": 1000.0,
        "reused": False,
    }
    for evidence in (WEAK, dataclasses.replace(GOOD, gates={**PASS, "overlap": "fail"}), dataclasses.replace(GOOD, measurable=False)):
        assert advise(evidence, FREE.model_copy(update=best)).decision == decide(evidence).decision != "go"


def test_what_is_to_be_minded() -> None:
    assert advise(GOOD, FREE).cautions == ()
    assert len(advise(GOOD, AdviceConfig()).cautions) == 2
    said = " ".join(advise(GOOD, FREE.model_copy(update={"reused": True, "human_hours": 0.0, "goals": ["cost", "privacy"]})).cautions)
    for word in ("adapter", "giong compare", "hosted", "break-even"):
        assert word in said


def test_a_prompt_on_top_has_to_earn_its_tokens() -> None:
    assert decide(dataclasses.replace(GOOD, combinations=(COMBINED,))).decision == "combine"
    for change in (
        {"failed_gates": ("overlap",)}, {"keeps_meaning": False}, {"probability_on_tuned": 0.7}, {"probability_on_prompt": 0.7},
    ):  # fmt: skip
        assert decide(dataclasses.replace(GOOD, combinations=(dataclasses.replace(COMBINED, **change),))).decision == "go"


def test_evidence_survives_its_file() -> None:
    for evidence in (dataclasses.replace(GOOD, combinations=(COMBINED,)), dataclasses.replace(WEAK, **FACTS, rows_needed=None)):
        assert Evidence.from_dict(json.loads(json.dumps(finite(evidence.to_dict()), allow_nan=False))) == evidence


def test_a_recorded_consent_is_an_answer() -> None:
    consent = {"data": {"consent": {"granted": True}}}
    assert answers_given(parse(consent)).may_imitate is True
    assert answers_given(parse({**consent, "advice": {"may_imitate": False}})).may_imitate is False
    assert answers_given(parse({})).may_imitate is None


def test_every_setting_is_asked_in_both_languages() -> None:
    assert list(QUESTIONS) == list(AdviceConfig.model_fields)
    assert all(set(question.text) == {"en", "vi"} and set(question.reason) in ({"en", "vi"}, set()) for question in QUESTIONS.values())


@pytest.fixture
def evaluated(tmp_path: Path) -> Project:
    """A project whose evaluation says go."""
    (tmp_path / "a.md").write_text("Some writing.")
    project = init(tmp_path / "voice", sources=[tmp_path / "a.md"])
    found = advise(GOOD, AdviceConfig())
    write_json(project.root / "evaluation.json", {"evidence": finite(GOOD.to_dict()), "verdict": finite(found.to_dict())})
    project.finish_step("eval", "key", [], {"decision": found.decision, "reason": found.reason, "seconds": 1.0})
    return project


def test_an_answer_changes_the_verdict_without_asking_the_models(evaluated: Project) -> None:
    assert verdict(evaluated).startswith("go: ")
    done = giong("advise", "--project", evaluated.root, "--set", "must_cite=yes", "--set", "human_hours=8")
    assert done.code == 0, done.told
    assert done.out.startswith("combine: Answers must cite sources")
    assert load(evaluated.config_path).advice.must_cite is True
    assert verdict(evaluated).startswith("combine: ")
    assert evaluated.step_record("eval")["key"] == "key"
    # Taken back, and worded in Vietnamese; what is written down stays English.
    write_settings(evaluated, {"advice.must_cite": False})
    assert decide_again(evaluated, load(evaluated.config_path)).decision == "go"
    done = giong("advise", "--project", evaluated.root, "--language", "vi", "--set", "base_licensed=không")
    assert done.out.startswith("no-go: Giấy phép")
    assert "Giấy phép của mô hình gốc có cho phép" in done.out
    assert verdict(evaluated).startswith("no-go: The licence")


def test_a_person_is_asked_and_may_leave_questions_open(evaluated: Project) -> None:
    answers = ["voice, facts", "sometimes", "monthly", "n", "y", "y", "", "12", ""]
    done = giong("advise", "--project", evaluated.root, "--ask", given="\n".join(answers) + "\n")
    assert done.code == 0, done.told
    advice = load(evaluated.config_path).advice
    assert advice == AdviceConfig(
        goals=["voice", "facts"], knowledge_changes="monthly", must_cite=False, may_imitate=True, base_licensed=True, human_hours=12
    )
    assert "sometimes" in done.told and "Which aspects should improve?" in done.told


@pytest.mark.parametrize(
    ("text", "words"),
    [("must_cite", "NAME=ANSWER"), ("cites=yes", "must_cite"), ("must_cite=perhaps", "perhaps"), ("human_hours=-3", "-3")],
)
def test_bad_answers_are_refused(evaluated: Project, text: str, words: str) -> None:
    before = evaluated.config_path.read_bytes()
    done = giong("advise", "--project", evaluated.root, "--set", text)
    assert (done.code, evaluated.config_path.read_bytes()) == (2, before)
    assert words in done.told
