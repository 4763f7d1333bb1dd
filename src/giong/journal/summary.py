"""The parts of the journal, put together from its entries: as plain values for programs, as Markdown for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from giong.contracts import TASK_STEPS
from giong.journal.entries import Entry
from giong.sizing.units import UNKNOWN, format_seconds, format_usd

AFTER_VERDICT = {
    "go": "`giong export`, then `giong serve`; `giong compare` lets people judge, blindly.",
    "combine": "`giong serve` the tuned model together with the prompt or the passages that the verdict names.",
    "collect more": "Add writing to data.paths, then `giong run`: the test side stays as it is.",
    "prompt instead": "Use the best prompt; training is not worth it with what there is now.",
    "retrieve": "Give the model the documents to look facts up in, instead of training them.",
    "no-go": "Mend what the failed gates name (see the verdict's reason), then `giong run`; do not use this model.",
}
SHOWN_SETTINGS = (
    "method.name", "method.lora_r", "method.lora_alpha", "train.learning_rate", "train.num_epochs", "train.batch_rows", "train.seed",
)  # fmt: skip
"""Of a run's settings, those that the table has room for; all of them, and the model, are in journal.jsonl."""


def summary(entries: Sequence[Entry]) -> dict[str, Any]:
    """`goal`, `plan`, `tried`, `learnt`, `next` and `notes`, each a list of plain values in the order of time."""
    tried = [entry for entry in entries if entry.kind == "tried"]
    plan = _plan(entries)
    stated = [entry for entry in entries if (entry.kind, entry.by) == ("goal", "giong")][-1:]
    return {
        "goal": [_said(entry) for entry in stated] + _of_people(entries, "goal"),
        "plan": [{"text": step, "by": "giong", "time": time, "done": bool(time)} for step, time in plan] + _of_people(entries, "plan"),
        "tried": [asdict(entry) for entry in tried],
        "learnt": _learnt(entries),
        "next": [{"text": text, "by": "giong", "time": entries[-1].time if entries else ""} for text in _next(tried, plan)]
        + _of_people(entries, "next"),
        "notes": _of_people(entries, "note"),
    }


def _said(entry: Entry) -> dict[str, Any]:
    return {"text": entry.text, "by": entry.by, "time": entry.time}


def _of_people(entries: Sequence[Entry], kind: str) -> list[dict[str, Any]]:
    return [_said(entry) for entry in entries if (entry.kind, entry.by) == (kind, "person")]


def _plan(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """When each step of the task's story was last finished; empty for one that was not.

    A report is made again at any time and leaves nothing to go on from.
    """
    task = next((entry.settings["task"] for entry in reversed(entries) if entry.kind == "goal" and entry.settings), "generate")
    finished = {plan_step(entry): entry.time for entry in entries if entry.status == "finished"}
    return [(step, finished.get(step, "")) for step in TASK_STEPS[task] if step != "report"]


def plan_step(entry: Entry) -> str:
    """The step of the story that an attempt belongs to: a trained run is a model only when it is saved as one."""
    return {"model": "train", "train": "run"}.get(entry.step, entry.step.partition("-")[0])


def _learnt(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for entry in entries:
        if entry.kind == "learnt":
            found.append(_said(entry))
        elif entry.status == "failed":
            found.append({"text": f"{entry.step} failed: {entry.text}", "by": "giong", "time": entry.time})
        found += [{"text": text, "by": "giong", "time": entry.time} for text in entry.learnt]
    return found


def _next(tried: Sequence[Entry], plan: Sequence[tuple[str, str]]) -> list[str]:
    """What giong would do now: mend what failed last, else the next step of the story, else what the verdict says."""
    attempts = [entry for entry in tried if entry.by == "giong"]
    if not attempts:
        return ["`giong run`"]
    if attempts[-1].status == "failed":
        return [f"Mend what stopped {attempts[-1].step}, then `giong run`: {attempts[-1].text}"]
    missing = [step for step, time in plan if not time]
    if missing:
        return [f"`giong {missing[0]}`"]
    verdict = next((entry.learnt[0] for entry in reversed(attempts) if entry.step == "eval"), "")
    known = [text for decision, text in AFTER_VERDICT.items() if verdict.startswith(f"Verdict: {decision}.")]
    return known or ["Decide by the last verdict; `giong report` shows the figures."]


def as_blocks(parts: Mapping[str, Any]) -> dict[str, str]:
    """The Markdown of each part."""
    return {
        "goal": _bullets(parts["goal"]),
        "plan": "".join(f"- [{'x' if row['done'] else ' '}] {row['text']}\n" for row in parts["plan"] if "done" in row)
        + _bullets([row for row in parts["plan"] if "done" not in row]),
        "tried": _table([row for row in parts["tried"] if row["step"]]) + _bullets([row for row in parts["tried"] if not row["step"]]),
        "learnt": _bullets(parts["learnt"], dated=True),
        "next": _bullets(parts["next"]),
        "notes": _bullets(parts["notes"], dated=True),
    }


def _bullets(rows: Sequence[Mapping[str, Any]], *, dated: bool = False) -> str:
    lines = (f"{row['time'][:10]}: {row['text']}" if dated else row["text"] for row in rows)
    return "".join(f"- {_harmless(line).replace(chr(10), chr(10) + '  ')}\n" for line in lines)


def attempt_cells(row: Mapping[str, Any]) -> list[str]:
    """When, what, settings, outcome, time and money of an attempt."""
    settings = row["settings"]
    names = SHOWN_SETTINGS if row["run"] else [name for name in settings if name != "model"]
    shown = {name: settings[name] for name in names if name in settings}
    outcome = f"failed: {row['text']}" if row["status"] == "failed" else "; ".join(filter(None, (row["text"], _pairs(row["figures"]))))
    what = f"{row['step']} {row['run']}".rstrip()
    seconds, usd = format_seconds(row["seconds"]), format_usd(row["usd"])
    return [row["time"][:16].replace("T", " "), what, _pairs(shown), outcome, *("" if text == UNKNOWN else text for text in (seconds, usd))]


ATTEMPT_HEADER = ["when (UTC)", "what", "settings", "outcome", "time", "money"]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    lines = [ATTEMPT_HEADER, ["---"] * len(ATTEMPT_HEADER), *(map(_cell, attempt_cells(row)) for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cell(text: str) -> str:
    return _harmless(" ".join(text.split())).replace("|", "\\|")


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_value(value)}" for key, value in values.items() if value not in (None, [], {}))


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({_pairs(value)})"
    if isinstance(value, (list, tuple)):
        return " + ".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _harmless(text: str) -> str:
    """A text that cannot open or close a block."""
    return text.replace("<!--", "&lt;!--")
