"""Go, combine, collect more, prompt instead, retrieve, or no-go: one rule after the other, each with its reason in words and numbers.

The order is the point: what cannot be measured is said first, and prompting wins unless tuning is shown to be better.
"Go" is never given on a forecast, only on a measured tuned model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from giong.sizing.interval import Interval
from giong.sizing.learning_curve import RowsNeeded

Decision = Literal["go", "combine", "collect more", "prompt instead", "retrieve", "no-go"]

MIN_OPPORTUNITY = 0.15
MARGIN = 0.10
MIN_PROBABILITY = 0.8
MIN_WORDS = 2500
MIN_PIECES = 50
MIN_FACTS = 20
MIN_FACT_SHARE = 0.5
MAX_FACT_RECALL = 0.5
"""A task of facts: at least so many, and that share, of the numbers, dates and names in the author's answers are not in the requests, and
the tuned model surely gets fewer than half of them right."""

REMEDIES = {
    "forgetting": "lower train.learning_rate or train.num_epochs",
    "collapse": "lower train.learning_rate or train.num_epochs, or choose other sampling settings",
    "end of turn": "check that every training row ends with the end-of-turn token, uncut by model.max_seq_length, then train longer",
    "length": "train longer, or make requests that say how long the answer is",
    "overlap": "train for fewer epochs and remove near-duplicate passages",
    "longest copy": "train for fewer epochs and remove near-duplicate passages",
    "meaning": "add rows, take a larger base model, or have the requests written by a better teacher",
    "coherence": "raise train.surprise_weight where replies are blander than the author, lower train.learning_rate where they are wilder, or take a larger base model",
}

GATES_OF_THE_BASE = frozenset({"collapse", "coherence", "meaning"})
"""What a base brings along or does not. Where to stop and how long an answer is, tuning is there to teach."""


@dataclass(frozen=True, slots=True)
class Combination:
    """The tuned model asked with a prompt on top: how much of the style gap it closes, and how likely it leads by the margin."""

    label: str
    style_gap_closed: Interval
    lead_on_tuned: Interval
    probability_on_tuned: float
    probability_on_prompt: float
    failed_gates: tuple[str, ...] = ()
    keeps_meaning: bool = False


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that the verdict rests on. `gates` maps the tuned arm's gate names to their status, "meaning" among them;
    `base_failed_gates` are those that the base fails before any tuning, and `base_tells_order` says whether its likelihood can tell
    coherence in the author's language (None where it was not asked, or is undecided).

    `difference` is style gap closed of the tuned arm minus the best prompt's, `probability_of_margin` how likely it is at
    least 0.10. `num_facts_to_find` of the `num_facts` in the author's answers (numbers, dates, names) are not in the requests;
    `fact_recall` is the share of those that the tuned model gives. `rows_needed` are the training rows at which the curve is ahead of the
    best prompt by the margin; None where that is beyond four times the pilots. `combinations` are empty where none was measured. `answered` is the share of the question set that
    "base" and "fine_tuned" get right from memory, and with passages ("base+lookup", "fine_tuned+lookup"); empty without questions.
    """

    measurable: bool
    style_note: str = ""
    verifier_auc_pooled: float = math.nan
    num_words: int = 0
    num_pieces: int = 0
    num_rows: int = 0
    num_test_requests: int = 0
    best_prompt_arm: str = ""
    best_prompt: Interval | None = None
    tuned: Interval | None = None
    difference: Interval | None = None
    num_facts: int = 0
    num_facts_to_find: int = 0
    fact_recall: Interval | None = None
    probability_of_margin: float = 0.0
    gates: Mapping[str, str] = field(default_factory=dict)
    gate_explanations: Mapping[str, str] = field(default_factory=dict)
    base_failed_gates: tuple[str, ...] = ()
    base_tells_order: bool | None = None
    rows_needed: RowsNeeded | None = None
    combinations: tuple[Combination, ...] = ()
    answered: Mapping[str, Interval] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evidence:
        """What `to_dict` gave, also after JSON, where numbers that do not exist are None."""
        made = dict(values)
        for name in ("best_prompt", "tuned", "difference", "fact_recall"):
            made[name] = Interval(**made[name]) if made[name] else None
        made["rows_needed"] = RowsNeeded(**made["rows_needed"]) if made["rows_needed"] else None
        made["combinations"] = tuple(
            Combination(**{
                **row, "style_gap_closed": Interval(**row["style_gap_closed"]), "lead_on_tuned": Interval(**row["lead_on_tuned"]),
                "failed_gates": tuple(row["failed_gates"]),
            }) for row in made["combinations"]
        )  # fmt: skip
        made["base_failed_gates"] = tuple(made.get("base_failed_gates") or ())
        made["answered"] = {name: Interval(**interval) for name, interval in (made.get("answered") or {}).items()}
        if made["verifier_auc_pooled"] is None:
            made["verifier_auc_pooled"] = math.nan
        return cls(**made)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision, its reason in one or two sentences, the rule that fired, and the numbers that it rests on.

    `answer` names the answer of the questionnaire that drove it (see `sizing.advice`), empty where the figures did; `cautions` are
    sentences on what else to mind.
    """

    decision: Decision
    reason: str
    rule: str
    numbers: dict[str, Any]
    answer: str = ""
    cautions: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def decide(evidence: Evidence) -> Verdict:
    """The first rule that applies, in this order: questions, facts, measurable, opportunity, enough writing, coherence, combination, gates,
    proof, undecided, forecast, prompting."""
    rules = (
        _asked,
        _facts,
        _unmeasurable,
        _nothing_to_gain,
        _too_little_writing,
        _coherence_unknown,
        _combined,
        _gate_failed,
        _proven,
        _too_few_requests,
        _more_rows,
    )
    for rule in rules:
        verdict = rule(evidence)
        if verdict:
            return verdict
    return _prompting(evidence)


def _asked(evidence: Evidence) -> Verdict | None:
    """Where passages answer a question set surely better than the tuned model does from memory, facts are looked up; the voice, if it is
    worth it by itself, is tuned all the same."""
    tuned = evidence.answered.get("fine_tuned")
    looked_up = {name: interval for name, interval in evidence.answered.items() if name.endswith("+lookup")}
    if tuned is None or not looked_up:
        return None
    best = max(looked_up, key=lambda name: looked_up[name].point)
    if looked_up[best].low <= tuned.high:
        return None
    reason = (
        f"With passages from the documents {_share(looked_up[best])} of the questions are answered ({best.replace('_', '-')}), by the tuned "
        f"model from memory {_share(tuned)}: facts are looked up and not trained in."
    )
    voice = decide(replace(evidence, answered={}, fact_recall=None))
    if voice.decision in ("go", "combine"):
        return _verdict("combine", f"{reason} {voice.reason}", "passages answer what the tuned model does not know", evidence)
    return _verdict("retrieve", reason, "passages answer what the tuned model does not know", evidence)


def _facts(evidence: Evidence) -> Verdict | None:
    """Tuning teaches how to say things and not what is the case (Ovadia et al. 2023, 2312.05934)."""
    recall, wanted = evidence.fact_recall, evidence.num_facts_to_find
    if recall is None or wanted < max(MIN_FACTS, evidence.num_test_requests, MIN_FACT_SHARE * evidence.num_facts):
        return None
    if recall.high >= MAX_FACT_RECALL:
        return None
    reason = (
        f"{wanted} of the {evidence.num_facts} numbers, dates and names in the author's answers are not in the requests, and the tuned model "
        f"gives {_share(recall)} of them: they have to be looked up. Put what is needed into each request (retrieval); tune for the voice then."
    )
    return _verdict("retrieve", reason, "facts have to be looked up", evidence)


def _unmeasurable(evidence: Evidence) -> Verdict | None:
    if evidence.measurable:
        return None
    missing = max(0, MIN_WORDS - evidence.num_words)
    if evidence.num_words and missing and evidence.num_pieces < MIN_PIECES:
        need = f"Collect about {missing:,} more words (there are {evidence.num_words:,}; {MIN_WORDS:,} are usually enough)."
    else:
        need = "Collect more writing, or name background writers of the same genre in evaluation.background."
    cause = evidence.style_note or f"The verifier reaches AUC {evidence.verifier_auc_pooled:.2f} on pooled unseen texts, below 0.80."
    return _verdict("collect more", f"{cause.split('. ')[0].rstrip('.')}. {need}", "style not measurable", evidence)


def _nothing_to_gain(evidence: Evidence) -> Verdict | None:
    if evidence.best_prompt is None:
        reason = evidence.style_note or "There is no style gap between the base and the author: prompting already matches."
        return _verdict("prompt instead", reason, "no style gap", evidence)
    opportunity = 1 - evidence.best_prompt.point
    if opportunity >= MIN_OPPORTUNITY:
        return None
    reason = (
        f"The prompt {evidence.best_prompt_arm} already closes {_share(evidence.best_prompt)} of the style gap; "
        f"the {max(0.0, opportunity):.0%} that are left are less than the {MIN_OPPORTUNITY:.0%} worth training for."
    )
    return _verdict("prompt instead", reason, "opportunity below 0.15", evidence)


def _too_little_writing(evidence: Evidence) -> Verdict | None:
    """What fails after so few passages says nothing about the author or the base; what is proven all the same stays proven."""
    if evidence.num_words >= MIN_WORDS or evidence.num_pieces >= MIN_PIECES or not evidence.num_words:
        return None
    failed = [name for name, status in evidence.gates.items() if status == "fail"]
    if not failed and _proven(evidence):
        return None
    reason = (
        f"{_measured(evidence)} But there are only {evidence.num_pieces} passages to train on ({evidence.num_words:,} words; {MIN_PIECES} passages "
        f"or {MIN_WORDS:,} words are the least)" + (f", and the tuned model fails {', '.join(failed)}." if failed else ".")
    )
    return _verdict("collect more", reason.strip(), "too little writing", evidence)


def _coherence_unknown(evidence: Evidence) -> Verdict | None:
    """The author's spans in another order pass every other gate: there is no go without coherence."""
    if evidence.gates.get("coherence") != "not available":
        return None
    if evidence.base_tells_order is not False and "fail" in evidence.gates.values():
        return None
    cause = evidence.gate_explanations.get("coherence", "Coherence was not measured.")
    decision: Decision = "no-go" if evidence.base_tells_order is False else "collect more"
    return _verdict(decision, f"{_measured(evidence)} {cause}".strip(), "coherence not measurable", evidence)


def _combined(evidence: Evidence) -> Verdict | None:
    """A prompt on top has to earn its tokens: it leads the tuned model alone, and the best prompt, by the margin."""
    good = [
        row for row in evidence.combinations
        if not row.failed_gates and row.keeps_meaning and min(row.probability_on_tuned, row.probability_on_prompt) >= MIN_PROBABILITY
    ]  # fmt: skip
    if not good:
        return None
    best = max(good, key=lambda row: row.style_gap_closed.point)
    alone = f"alone {_share(evidence.tuned)}" if evidence.tuned else "alone less"
    reason = (
        f"The tuned model closes {_share(best.style_gap_closed)} of the style gap with a prompt on top ({best.label}) and {alone}; the chance "
        f"that the prompt adds {MARGIN:.0%} or more is {best.probability_on_tuned:.0%}. Meaning is kept and no gate fails."
    )
    return _verdict("combine", reason, "combination ahead of both by the margin", evidence, combination=asdict(best))


def _gate_failed(evidence: Evidence) -> Verdict | None:
    failed = [name for name, status in evidence.gates.items() if status == "fail"]
    if not failed:
        return None
    details = " ".join(text for name in failed[:2] if (text := evidence.gate_explanations.get(name, "")))
    remedy = REMEDIES.get(failed[0], "look at its samples")
    if set(failed) <= set(evidence.base_failed_gates) & GATES_OF_THE_BASE:
        remedy = f"take a better base model; this one fails {'it' if len(failed) == 1 else 'them'} before any tuning"
    named = " and ".join(filter(None, [", ".join(failed[:-1]), failed[-1]]))
    gates = "gate" if len(failed) == 1 else "gates"
    reason = f"The tuned model fails the {gates} {named}{': ' + details if details else '.'} Next: {remedy}."
    return _verdict("no-go", reason, f"gate failed: {named}", evidence)


def _proven(evidence: Evidence) -> Verdict | None:
    if evidence.difference is None or evidence.probability_of_margin < MIN_PROBABILITY or evidence.gates.get("meaning") != "pass":
        return None
    return _verdict("go", f"{_measured(evidence)} Meaning is kept and no gate fails.", "margin reached with probability 0.8", evidence)


def _too_few_requests(evidence: Evidence) -> Verdict | None:
    """The margin is reached, or nearly proven, but the test side is too small to say so."""
    difference = evidence.difference
    if difference is None or difference.point <= MARGIN:
        return None
    if evidence.probability_of_margin >= MIN_PROBABILITY:
        doubt = evidence.gate_explanations.get("meaning", "The test is too small to show that meaning is kept.")
        reason = f"{_measured(evidence)} But it is not shown that meaning is kept: {doubt} More test documents would settle it."
        return _verdict("collect more", reason, "meaning undecided", evidence)
    # P >= 0.8 needs a standard error of at most (point - margin) / 0.84; it shrinks with the root of the requests.
    standard_error = (difference.high - difference.low) / 3.92
    needed = math.ceil(evidence.num_test_requests * (0.84 * standard_error / (difference.point - MARGIN)) ** 2)
    if not evidence.num_test_requests or needed > 4 * evidence.num_test_requests:
        return None
    reason = f"{_measured(evidence)} About {needed} test requests (there are {evidence.num_test_requests}) would settle it."
    return _verdict("collect more", reason, "margin undecided", evidence)


def _more_rows(evidence: Evidence) -> Verdict | None:
    """Rows that the curve asks for, with their interval. A curve that is there already has been measured, and was not enough."""
    needed, present = evidence.rows_needed, evidence.num_rows
    if evidence.best_prompt is None or needed is None or needed.point <= present:
        return None
    worst = f"{needed.high - present}" if needed.high else "many times as many"
    reason = (
        f"{_measured(evidence)} With {needed.point - present} more rows (80 % interval: {max(0, needed.low - present)} to {worst}; there are "
        f"{present}) the forecast is ahead of the best prompt ({_share(evidence.best_prompt)}) by {MARGIN:.0%}."
    )
    return _verdict("collect more", reason.strip(), "forecast reaches the margin", evidence, rows_needed=asdict(needed))


def _prompting(evidence: Evidence) -> Verdict:
    best = f"use {evidence.best_prompt_arm}" if evidence.best_prompt_arm else "use the best prompt"
    tail = f"Neither a measured run nor a forecast within four times the rows is ahead of prompting by {MARGIN:.0%}, so {best}."
    return _verdict("prompt instead", f"{_measured(evidence)} {tail}".strip(), "margin out of reach", evidence)


def _measured(evidence: Evidence) -> str:
    if evidence.tuned is None or evidence.best_prompt is None:
        return ""
    return (
        f"The tuned model closes {_share(evidence.tuned)} of the style gap, the best prompt ({evidence.best_prompt_arm}) "
        f"{_share(evidence.best_prompt)}; the chance that it is ahead by {MARGIN:.0%} or more is {evidence.probability_of_margin:.0%}."
    )


def _share(interval: Interval) -> str:
    return f"{interval.point:.0%} [{interval.low:.0%} to {interval.high:.0%}]"


def _verdict(decision: Decision, reason: str, rule: str, evidence: Evidence, **numbers: Any) -> Verdict:
    intervals = {"best_prompt": evidence.best_prompt, "tuned": evidence.tuned, "difference": evidence.difference}
    return Verdict(decision, reason, rule, {
        **{name: interval.to_dict() if interval else None for name, interval in intervals.items()},
        "best_prompt_arm": evidence.best_prompt_arm,
        "opportunity": 1 - evidence.best_prompt.point if evidence.best_prompt else None,
        "probability_of_margin": evidence.probability_of_margin,
        "answered": {name: interval.to_dict() for name, interval in evidence.answered.items()},
        "num_facts": evidence.num_facts,
        "num_facts_to_find": evidence.num_facts_to_find,
        "fact_recall": evidence.fact_recall.to_dict() if evidence.fact_recall else None,
        "num_rows": evidence.num_rows,
        "num_words": evidence.num_words,
        "verifier_auc_pooled": evidence.verifier_auc_pooled if math.isfinite(evidence.verifier_auc_pooled) else None,
        "failed_gates": [name for name, status in evidence.gates.items() if status == "fail"],
        **numbers,
    })  # fmt: skip
