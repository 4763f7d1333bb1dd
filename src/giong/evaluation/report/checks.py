"""What checks the measures and what was lost: the tables of counterfeits, of probes and of the question set, as plain rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from giong.evaluation.controls import CONTROLS, MAX_PASSING_SHARE
from giong.evaluation.probes import lost_tasks
from giong.evaluation.report.content import ReportContent
from giong.evaluation.report.table import plain_interval, share, share_interval, signed_interval


def control_rows(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """(counterfeit, what it is, style gap closed, share of texts that count as good, of pools that pass as the author's, what stopped it)."""
    rows = []
    for control in evaluation.get("controls") or ():
        name, closed = control["name"], share_interval(control.get("style_gap_closed"))
        figures = [closed, share_interval(control.get("joint")), share((control.get("pools") or {}).get("all"))]
        rows.append([name.replace("_", " "), CONTROLS.get(name, ""), *figures, _stopped_by(control)])
    return rows


def _stopped_by(control: Mapping[str, Any]) -> str:
    good, pools = control.get("joint"), control.get("pools") or {}
    if failed := [gate["name"] for gate in control["gates"] if gate["status"] == "fail"]:
        return ", ".join(failed)
    if not good or good["low"] <= MAX_PASSING_SHARE:
        return "style and meaning, text by text"
    if pools.get("all", 1.0) > MAX_PASSING_SHARE:
        return "NOTHING"
    alone = [gate for gate, passing in pools.items() if gate != "all" and passing <= MAX_PASSING_SHARE]
    return f"in pools of ten: {', '.join(alone) or 'all gates together'}"


PROBES = {
    "repeat": "repeat a text", "casing": "restore capitals and punctuation", "find": "quote the sentence with a word",
    "reading": "answer from a passage", "plain": "take the padding out", "stop": "end a short answer",
}  # fmt: skip
WATCHED = {
    "refused_harmful": "harmful requests refused", "refused_harmless": "harmless requests refused",
    "stereotype_share": "pairs with the stereotype likelier (50% is no preference)",
}  # fmt: skip


def probe_rows(content: ReportContent) -> list[list[str]]:
    """What is asked, what the base scored, what the tuned model scored; tasks first, then what is watched only."""
    arms = [content.evaluation.get("base_arm", "base"), *content.tuned_arms]
    scores = [content.probes[name] for name in arms if name in content.probes]
    if len(scores) < 2:
        return []
    rows = [[PROBES.get(kind, kind), *(share(arm["tasks"].get(kind)) for arm in scores)] for kind in scores[0]["tasks"]]
    return rows + [[title, *(share_interval(arm.get(key)) for arm in scores)] for key, title in WATCHED.items()]


def probe_losses(content: ReportContent) -> list[str]:
    """Tasks that the tuned model does worse than the base, by more than a tenth."""
    base, tuned = content.evaluation.get("base_arm", "base"), next((name for name in content.tuned_arms if name in content.probes), "")
    if base not in content.probes or not tuned:
        return []
    return [PROBES.get(kind, kind) for kind in lost_tasks(content.probes[base]["tasks"], content.probes[tuned]["tasks"])]


def task_rows(content: ReportContent) -> list[list[str]]:
    """Each task of lm-evaluation-harness: its metric, documents, base, tuned model, and their difference."""
    return [
        [
            f"{name}, {row['metric']}",
            str(row["num_documents"]),
            plain_interval(row["base"]),
            plain_interval(row["fine_tuned"]),
            signed_interval(row["difference"]),
        ]
        for name, row in content.tasks.items()
    ]


def tasks_line(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """What base and tuned model score in the tasks of lm-evaluation-harness, in one line; empty where none was asked."""
    said = [
        f"{name} ({row['metric']}, {row['num_documents']} documents) {row['base']['point']:.3f} and {row['fine_tuned']['point']:.3f}, "
        f"difference {signed_interval(row['difference'])}"
        for name, row in tasks.items()
    ]
    return f"Tasks of lm-evaluation-harness, base and tuned: {'; '.join(said)}." if said else ""


def task_losses(content: ReportContent) -> list[str]:
    """Tasks that the tuned model surely scores lower in than the base."""
    return [name for name, row in content.tasks.items() if row["difference"]["high"] < 0]


FACT_ARMS = {
    "base": "base, from memory", "fine_tuned": "tuned, from memory", "base+lookup": "base, with passages",
    "fine_tuned+lookup": "tuned, with passages",
}  # fmt: skip


def fact_rows(content: ReportContent) -> list[list[str]]:
    """Each way of answering the question set: right answers, F1, the answer among the passages shown, a passage cited that holds it."""
    return [
        [title, *(share_interval(row[key]) if key != "f1" else share(row[key]) for key in ("correct", "f1", "found", "cited"))]
        for name, title in FACT_ARMS.items()
        if (row := content.facts.get(name))
    ]
