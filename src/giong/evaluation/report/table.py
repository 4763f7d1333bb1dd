"""Every figure of an evaluation as text, formatted once for the page and the terminal.

The strings hold ASCII only, because a terminal may not know more; a status is always a word, the page adds its symbol.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NOT_AVAILABLE = "not available"

ARM_LABELS = {
    "base": "base as it is",
    "instruction": "instruction prompt",
    "named_style": "named style",
    "few_shot": "few-shot",
    "retrieval": "retrieval few-shot",
    "fine_tuned": "fine-tuned",
    "author": "the author",
}

LEARNED = {"bertscore": "BERTScore F1", "entailment": "entailment both ways"}
"""What learned models say of a reply beside the author's answer."""


@dataclass(frozen=True, slots=True)
class ArmRow:
    """One arm's figures as text. `status` is the worst of its gates; `is_author` marks the reference row."""

    name: str
    label: str
    style: str
    meaning: str
    key_recall: str
    chrf: str
    length_ratio: str
    end_rate: str
    likelihood: str
    gates: str
    status: str
    is_author: bool


def arm_label(arm: Mapping[str, Any]) -> str:
    """The label that the arm was given, else the usual words for its name, else its name."""
    name, label = str(arm["name"]), str(arm.get("label") or "")
    return label if label and label != name else ARM_LABELS.get(name, name)


def share(value: float | None, decimals: int = 0) -> str:
    """A share (0 to 1) as a percentage that never rounds up to a clean sweep or down to none."""
    if value is None or not math.isfinite(value):
        return NOT_AVAILABLE
    while decimals < 3 and (0 < value < 1) and float(f"{100 * value:.{decimals}f}") in (0.0, 100.0):
        decimals += 1
    text = f"{value:.{decimals}%}"
    return text[1:] if text.startswith("-") and not float(text[1:-1]) else text


def share_interval(interval: Mapping[str, Any] | None) -> str:
    """ "62% [50% to 70%]"."""
    if not is_known(interval):
        return NOT_AVAILABLE
    return f"{share(interval['point'])} [{share(interval['low'])} to {share(interval['high'])}]"


def signed_share_interval(interval: Mapping[str, Any] | None) -> str:
    """ "+32% [+20% to +45%]", for differences of shares."""
    if not is_known(interval):
        return NOT_AVAILABLE
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    point, low, high = (f"{round(interval[end], 2) + 0.0:+.0%}" for end in ("point", "low", "high"))
    return f"{point} [{low} to {high}]"


def signed_interval(interval: Mapping[str, Any] | None, decimals: int = 3) -> str:
    """ "+0.213 [+0.180 to +0.247]"."""
    if not is_known(interval):
        return NOT_AVAILABLE
    point, low, high = (f"{round(interval[end], decimals) + 0.0:+.{decimals}f}" for end in ("point", "low", "high"))
    return f"{point} [{low} to {high}]"


def plain_interval(interval: Mapping[str, Any]) -> str:
    """ "0.213 [0.180 to 0.247]"."""
    return f"{interval['point']:.3f} [{interval['low']:.3f} to {interval['high']:.3f}]" if is_known(interval) else NOT_AVAILABLE


def number(value: float | None, form: str = ".2f") -> str:
    return NOT_AVAILABLE if value is None or not math.isfinite(value) else format(value, form)


def gates_cell(arm: Mapping[str, Any]) -> tuple[str, str]:
    """(words, worst status): "pass", "pass (1 not measured)", "fail: overlap, meaning; warn: length"."""
    by_status: dict[str, list[str]] = {}
    for gate in arm.get("gates") or ():
        by_status.setdefault(gate["status"], []).append(gate["name"])
    parts = [f"{status}: {', '.join(by_status[status])}" for status in ("fail", "warn") if status in by_status]
    if parts:
        return "; ".join(parts), "fail" if "fail" in by_status else "warn"
    if "pass" not in by_status:
        return NOT_AVAILABLE, NOT_AVAILABLE
    num_missing = len(by_status.get("not available", ()))
    return f"pass ({num_missing} not measured)" if num_missing else "pass", "pass"


def gate_value(gate: Mapping[str, Any]) -> str:
    """A gate's measured value with its unit; `meaning` is in key recall or chrF++, which its explanation names."""
    value = gate.get("value")
    if value is None or not math.isfinite(value):
        return NOT_AVAILABLE
    match gate["name"]:
        case "forgetting" | "overfitting":
            return f"{value:+.3f} nats/token"
        case "collapse" | "end of turn" | "surplus" | "extraction" | "personal data" | "format":
            return share(value)
        case "membership":
            return f"AUC {value:.2f}"
        case "canaries":
            return f"{value:.1f} bits"
        case "overlap":
            return share(value, 1)
        case "length":
            return f"{value:+.2f} ({math.exp(value):.2f} times)"
        case "longest copy":
            return f"{value:.0f} tokens"
        case "meaning":
            return f"{value:+.2f}"
        case "coherence":
            return f"{value:.2f} bits/byte"
        case _:
            return f"{value:.3g}"


def gate_figure(gate: Mapping[str, Any]) -> str:
    """A gate's value with its interval, if it has one: "+0.021 nats/token [+0.010 nats/token to +0.030 nats/token]"."""
    interval = gate.get("interval")
    if not is_known(interval) or gate_value(gate) == NOT_AVAILABLE:
        return gate_value(gate)
    low, high = (gate_value({**gate, "value": interval[end]}).split(" (")[0] for end in ("low", "high"))
    return f"{gate_value(gate)} [{low} to {high}]"


def arm_row(arm: Mapping[str, Any], *, is_author: bool = False) -> ArmRow:
    """All of one arm's cells, from its dict in `Evaluation.to_dict()`."""
    chrf, recall = _point(arm.get("chrf")), _point(arm.get("key_recall"))
    words, status = gates_cell(arm)
    learned = arm.get("learned") or {}
    chrf_text, recall_text = number(chrf, ".1f"), share(recall)
    known = [f"key recall {recall_text}"] if recall is not None else []
    # Against itself the author's text has chrF++ 100, which says nothing.
    known += [f"chrF++ {chrf_text}"] if chrf is not None and not is_author else []
    if not is_author:
        known += [f"{title} {number(found['point'])}" for name, title in LEARNED.items() if is_known(found := learned.get(name))]
    return ArmRow(
        name=str(arm["name"]),
        label=ARM_LABELS["author"] if is_author else arm_label(arm),
        style=share_interval(arm.get("style_gap_closed")),
        meaning=", ".join(known) or NOT_AVAILABLE,
        key_recall=recall_text,
        chrf="(the same text)" if is_author else chrf_text,
        length_ratio=number(arm.get("length_ratio")),
        end_rate=share(arm.get("end_rate")),
        likelihood=_likelihood(arm.get("likelihood"), is_author),
        gates="(reference)" if is_author else words,
        status="" if is_author else status,
        is_author=is_author,
    )


def arm_rows(evaluation: Mapping[str, Any]) -> list[ArmRow]:
    """One row per arm in the evaluation's order, the author's own answers last."""
    rows = [arm_row(arm) for arm in evaluation.get("arms") or ()]
    author = evaluation.get("author")
    return [*rows, arm_row(author, is_author=True)] if author else rows


def arms_table(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """The table for the terminal: a header row, one row per arm, and the author's own answers as the reference."""
    header = ["arm", f"style gap closed [{level(evaluation)} interval]", "meaning kept", "length ratio", "gates"]
    return [header, *([row.label, row.style, row.meaning, row.length_ratio, row.gates] for row in arm_rows(evaluation))]


def verifier_line(evaluation: Mapping[str, Any]) -> str:
    """How far the style figures can be trusted, in one line; empty where no verifier was fitted."""
    quality = evaluation.get("verifier")
    if not quality:
        return ""
    figures = f"AUC {number(quality['auc'])} (pools of {quality['pool_size']}: {number(quality['auc_pooled'])})"
    figures += f", c@1 {number(quality['c_at_1'])}, Brier score {number(quality['brier'])}"
    return f"The style verifier on unseen texts: {figures}."


def pools_scope(evaluation: Mapping[str, Any]) -> str:
    """What has to be said with every share of pools where the base cannot judge coherence; empty where it does."""
    if not evaluation.get("coherence_note"):
        return ""
    judged = any("coherence" in (arm.get("pools") or {}) for arm in evaluation.get("arms") or ())
    return ", coherence by characters alone" if judged else ", coherence not checked"


def pools_line(evaluation: Mapping[str, Any]) -> str:
    """Whose replies pass as the author's ten at a time, in one line; empty where no pools were judged."""
    judged = [arm for arm in (*(evaluation.get("arms") or ()), evaluation.get("author")) if arm and arm.get("pools")]
    if not judged:
        return ""
    labels = [ARM_LABELS["author"] if arm is evaluation.get("author") else arm_label(arm) for arm in judged]
    passing = ", ".join(f"{label} {share(arm['pools']['all'])}" for label, arm in zip(labels, judged))
    counterfeits = [arm for arm in evaluation.get("controls") or () if arm.get("pools")]
    worst = max(counterfeits, key=lambda arm: arm["pools"]["all"], default=None)
    beside = f"; of counterfeits at most {share(worst['pools']['all'])} ({worst['name'].replace('_', ' ')})" if worst else ""
    return f"Pools of ten replies that pass as the author's{pools_scope(evaluation)}: {passing}{beside}."


def level(evaluation: Mapping[str, Any]) -> str:
    """The confidence level of the style intervals, "95%"."""
    levels = {interval["level"] for arm in evaluation.get("arms") or () if (interval := arm.get("style_gap_closed"))}
    return f"{100 * (levels.pop() if len(levels) == 1 else 0.95):g}%"


def _likelihood(likelihood: Mapping[str, Any] | None, is_author: bool) -> str:
    if is_author:
        return "(does not apply)"
    if not likelihood:
        return NOT_AVAILABLE
    nats, bits = likelihood.get("gain_nats_per_token"), likelihood.get("gain_bits_per_byte")
    if is_known(nats):
        return signed_interval(nats)
    return f"{signed_interval(bits)} bits/byte" if is_known(bits) else NOT_AVAILABLE


def _point(interval: Mapping[str, Any] | None) -> float | None:
    return interval["point"] if is_known(interval) else None


def is_known(interval: Mapping[str, Any] | None) -> bool:
    """Whether an interval was measured, ends included."""
    return interval is not None and all(interval[end] is not None and math.isfinite(interval[end]) for end in ("point", "low", "high"))
