"""What no figure shows: a short questionnaire, and how its answers change the verdict that the figures give.

An answer may forbid, or send to retrieval, whatever was measured; it never makes a "go" of anything. Which answer drove the verdict is
part of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from giong.config.advice import AdviceConfig
from giong.sizing.questions import QUESTIONS, Language, Words
from giong.sizing.verdict import Decision, Evidence, Verdict, decide

MINUTES_PER_PASSAGE = 10
"""To find, read and clear one passage for training: an assumption, said where it decides."""
HOURS_TO_JUDGE = 1.0
"""About 30 pairs of answers in `giong compare`, two minutes each."""
LOOKED_UP = ("monthly", "daily")
FOR_FACTS = "facts"


def advise(evidence: Evidence, answers: AdviceConfig, language: Language = "en") -> Verdict:
    """The verdict of the figures as the answers leave it, with the answer that drove it and what else to mind."""
    verdict = decide(evidence)
    for rule in (_forbidden, _untunable, _looked_up, _too_few_hours):
        changed = rule(verdict, evidence, answers, language)
        if changed:
            verdict = changed
            break
    return dataclasses.replace(verdict, cautions=tuple(_cautions(verdict, answers, language)))


def _driven(verdict: Verdict, decision: Decision, key: str, language: Language, *, keep_reason: bool, **values: float) -> Verdict:
    reason = QUESTIONS[key].reason[language].format(**values)
    if keep_reason:
        reason = f"{reason} {verdict.reason}"
    return dataclasses.replace(verdict, decision=decision, reason=reason, rule=f"answer to advice.{key}", answer=key)


def _forbidden(verdict: Verdict, evidence: Evidence, answers: AdviceConfig, language: Language) -> Verdict | None:
    for key in ("may_imitate", "base_licensed"):
        if getattr(answers, key) is False:
            return _driven(verdict, "no-go", key, language, keep_reason=False)
    return None


def _looks_up(answers: AdviceConfig) -> str:
    """The answer that asks for retrieval; empty where none does."""
    if answers.must_cite:
        return "must_cite"
    if answers.knowledge_changes in LOOKED_UP:
        return "knowledge_changes"
    return "goals" if FOR_FACTS in (answers.goals or ()) else ""


def _untunable(verdict: Verdict, evidence: Evidence, answers: AdviceConfig, language: Language) -> Verdict | None:
    if answers.base_tunable is not False:
        return None
    retrieves = _looks_up(answers) or verdict.decision == "retrieve"
    return _driven(verdict, "retrieve" if retrieves else "prompt instead", "base_tunable", language, keep_reason=False)


def _looked_up(verdict: Verdict, evidence: Evidence, answers: AdviceConfig, language: Language) -> Verdict | None:
    """Retrieval for what is known, beside tuning where the voice is a goal and tuning was shown to be worth it."""
    key = _looks_up(answers)
    if not key or verdict.decision == "retrieve":
        return None
    wants_more = any(goal != FOR_FACTS for goal in answers.goals or ("voice",))
    if wants_more and verdict.decision in ("go", "combine"):
        return _driven(verdict, "combine", key, language, keep_reason=True)
    if wants_more and verdict.decision in ("collect more", "no-go"):
        return None
    return _driven(verdict, "retrieve", key, language, keep_reason=False)


def _too_few_hours(verdict: Verdict, evidence: Evidence, answers: AdviceConfig, language: Language) -> Verdict | None:
    if verdict.decision != "collect more" or answers.human_hours is None or evidence.rows_needed is None:
        return None
    needed = (evidence.rows_needed.point - evidence.num_rows) * MINUTES_PER_PASSAGE / 60 + HOURS_TO_JUDGE
    if needed <= answers.human_hours:
        return None
    values = {"needed": needed, "minutes": MINUTES_PER_PASSAGE, "given": answers.human_hours}
    return _driven(verdict, "prompt instead", "human_hours", language, keep_reason=False, **values)


CAUTIONS: tuple[tuple[Callable[[Verdict, AdviceConfig], bool], Words], ...] = (
    (
        lambda verdict, answers: answers.may_imitate is None,
        {
            "en": "Nobody has said whether this person may be imitated (advice.may_imitate).",
            "vi": "Chưa ai cho biết người này có cho phép bắt chước hay không (advice.may_imitate).",
        },
    ),
    (
        lambda verdict, answers: answers.base_licensed is None,
        {
            "en": "Nobody has said whether the base's licence allows this (advice.base_licensed).",
            "vi": "Chưa ai cho biết giấy phép của mô hình gốc có cho phép hay không (advice.base_licensed).",
        },
    ),
    (
        lambda verdict, answers: bool(answers.reused),
        {
            "en": "The base will be used for other domains: keep it as it is and tune an adapter (method lora); mind the forgetting gate.",
            "vi": "Mô hình gốc còn dùng cho lĩnh vực khác: hãy giữ nguyên và tinh chỉnh bộ thích ứng (method lora); chú ý cổng forgetting.",
        },
    ),
    (
        lambda verdict, answers: answers.human_hours is not None and answers.human_hours < HOURS_TO_JUDGE,
        {
            "en": "Less than an hour of human work leaves no time to judge answers with giong compare, which no figure replaces.",
            "vi": "Chưa đầy một giờ công thì không kịp chấm bài bằng giong compare, mà không số đo nào thay được việc đó.",
        },
    ),
    (
        lambda verdict, answers: answers.goals == ["format"],
        {
            "en": "Only the form should improve: examples in the prompt, or constrained decoding, may be all that is needed.",
            "vi": "Chỉ cần cải thiện hình thức: có thể chỉ cần ví dụ trong câu lệnh, hoặc giải mã có ràng buộc.",
        },
    ),
    (
        lambda verdict, answers: "privacy" in (answers.goals or ()),
        {
            "en": "No text should leave the house: every hosted teacher, judge, arm or pilot is sent some.",
            "vi": "Không văn bản nào được ra ngoài: mọi mô hình thuê ngoài để soạn yêu cầu, chấm điểm, so sánh hay huấn luyện thử đều nhận văn bản.",
        },
    ),
    (
        lambda verdict, answers: "cost" in (answers.goals or ()) and verdict.decision in ("go", "combine"),
        {
            "en": "Whether it also pays is in the report under Time and money: the calls to break-even against each prompt.",
            "vi": "Có lợi về chi phí hay không thì xem báo cáo, mục Time and money: số lượt gọi để hoà vốn so với từng câu lệnh.",
        },
    ),
)
"""When something is to be minded that does not change the verdict, and the sentence."""


def _cautions(verdict: Verdict, answers: AdviceConfig, language: Language) -> list[str]:
    return [sentence[language] for applies, sentence in CAUTIONS if applies(verdict, answers)]
