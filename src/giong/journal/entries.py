"""Entries of the journal, and how they are read off what steps and runs leave in a project."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from giong.config import ProjectConfig
from giong.workspace import Project, content_hash, plain, read_json

KINDS = ("goal", "plan", "tried", "learnt", "next", "note")
SECTIONS = {
    "import": "data", "synth": "synthesis", "baseline": "baselines", "method": "method", "size": "sizing", "sweep": "sweep", "model": "sampling",
    "eval": "evaluation", "export": "export",
}  # fmt: skip
"""The section of giong.yaml that a step reads, beside the model."""
RUN_SECTIONS = ("method", "train", "objective")


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing to remember. `by` is "giong" or "person"; `time` is ISO 8601, UTC.

    Of kind "tried": `step` (and `run`), `status` ("finished" or "failed"; `text` is then the error's sentence), `settings` that are
    not the defaults, `figures`, `seconds`, `usd` (None where nobody counted), and in `learnt` what can be said at once.
    """

    kind: str
    text: str
    time: str
    by: str = "giong"
    id: str = ""
    step: str = ""
    run: str = ""
    status: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    usd: float | None = None
    learnt: list[str] = field(default_factory=list)


def timestamp(seconds: float | None = None) -> str:
    now = datetime.datetime.now(datetime.UTC) if seconds is None else datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return now.isoformat(timespec="seconds")


def goal_entry(config: ProjectConfig) -> Entry:
    """What the settings say that the project is for."""
    author = config.data.consent.author or "the author"
    what = f"write like {author}" if config.task == "generate" else f"do the task {config.task} on the texts of data.paths"
    return Entry("goal", f"Make {config.model.name_or_path} {what} ({config.name}).", timestamp(), settings={"task": config.task})


def found_entries(project: Project, config: ProjectConfig) -> list[Entry]:
    """An entry for every finished step and run on disk, in the order of their ends; the same record always has the same id."""
    found = [*_from_runs(project), *_from_steps(project, config)]
    return sorted(found, key=lambda entry: entry.time)


def failed_entry(project: Project, step: str, error: BaseException, config: ProjectConfig, started: float) -> Entry:
    """A step that began at `started` (seconds) and ended in an error."""
    text = " ".join(str(error).split()) or type(error).__name__
    begun = [
        path for path in project.list_runs() if not (path / "results.json").is_file() and (path / "run.json").stat().st_mtime >= started
    ]
    now = datetime.datetime.now(datetime.UTC).timestamp()
    run = max(begun, key=lambda path: (path / "run.json").stat().st_mtime, default=None)
    settings = _run_settings(read_json(run / "run.json")) if run else _settings(step, config)
    return Entry(
        "tried", text, timestamp(), step=step, run=run.name if run else "", status="failed",
        settings=settings, seconds=max(0.0, now - started),
    )  # fmt: skip


def _from_runs(project: Project) -> Iterator[Entry]:
    for folder in project.list_runs():
        if not (folder / "results.json").is_file():
            continue
        record, results = read_json(folder / "run.json"), read_json(folder / "results.json")
        figures = {
            name: results.get(name) for name in ("num_steps", "num_tokens", "final_loss", "validation_loss", "best_step", "num_trainable")
        }  # fmt: skip
        yield Entry(
            "tried", f"{record['num_rows']} rows over {record['base']}", timestamp((folder / "results.json").stat().st_mtime),
            id=content_hash("run", record["key"], results), step="train" if record.get("share", 1.0) == 1.0 else "pilot", run=folder.name,
            status="finished", settings=_run_settings(record), figures=_rounded({"num_rows": record["num_rows"], **figures}),
            seconds=results.get("seconds"), usd=results.get("usd"),
        )  # fmt: skip


def _run_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    settings = record["settings"]
    nested = {section: settings.get(section) or {} for section in RUN_SECTIONS}
    chosen = {f"{section}.{name}": value for section, values in nested.items() for name, value in values.items() if value is not None}
    return {**chosen, "dtype": settings.get("dtype")}


def _from_steps(project: Project, config: ProjectConfig) -> Iterator[Entry]:
    for path in (project.root / "steps").glob("*.json"):
        record = read_json(path)
        if path.stem.startswith("probe") or not {"step", "key", "result"} <= set(record):
            continue
        result = record["result"]
        figures, learnt = _outcome(project, path.stem, result)
        yield Entry(
            "tried", "saved as a model" if path.stem == "model" else result.get("label") or "", timestamp(path.stat().st_mtime), id=content_hash("step", record), step=path.stem, run=result.get("run", ""),
            status="finished", settings=_settings(path.stem, config), figures=_rounded(figures), seconds=result.get("seconds"),
            usd=result.get("usd", result.get("cost_usd")), learnt=learnt,
        )  # fmt: skip


def _settings(step: str, config: ProjectConfig) -> dict[str, Any]:
    """The settings of a step's section that giong.yaml names, by dotted name, and the model."""
    section = SECTIONS.get(step.partition("-")[0], step)
    sections = RUN_SECTIONS if section in ("train", "pilot") else (section,)
    flat: dict[str, Any] = {}
    for name in sections:
        values = getattr(config, name, None)
        if values is not None:
            flat |= _flat(
                json.loads(json.dumps(values.model_dump(exclude_defaults=True, exclude={"consent", "paths"}), default=plain)), name
            )
    return {"model": config.model.name_or_path, **flat}


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}.{key}") if isinstance(value, Mapping) else {f"{prefix}.{key}": value}
    return flat


def _outcome(project: Project, step: str, result: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(figures, sentences of what was learnt) of a finished step."""
    match step.partition("-")[0]:
        case "import":
            dropped = [f"Pieces of writing left out: {result['dropped']} (data/import_report.json)."] if result.get("dropped") else []
            return {name: result.get(name) for name in ("num_documents", "num_passages", "num_words", "sides")}, dropped
        case "synth":
            failed = sum(bool(row.get("failed")) for row in result.get("left_out", ()))
            missing = [f"{failed} requests got no answer from the teacher; `giong synth` asks for them again."] if failed else []
            return {name: result.get(name) for name in ("teacher", "num_examples", "num_rejected")}, missing
        case "baseline":
            style = (
                [f"{result.get('label', step)}: the model names this style {result['style_name']!r}."] if result.get("style_name") else []
            )
            return {name: result[name] for name in ("num_shots_used",) if name in result}, style
        case "size":
            note = (result.get("curve") or {}).get("note")
            return {"num_rows": result.get("num_rows")}, [*([note] if note else []), *map(_forecast, result.get("forecasts", ()))]
        case "sweep":
            parts = [part for part in (result.get("training"), result.get("sampling")) if part]
            return {"settings": result.get("settings"), "num_trials": sum(part["num_trials"] for part in parts)}, [
                part["note"] for part in parts
            ]
        case "model":
            return {"sampling": result.get("sampling")}, []
        case "eval":
            return _arms(project), [f"Verdict: {result['decision']}. {result['reason']}"] if result.get("decision") else []
        case "compare":
            kind = result["compared"]
            figures = {row[kind]: {key: _point(value) for key, value in row.items() if key != kind} for row in result["rows"]}
            return figures, [result["note"]]
        case "export":
            parity = result.get("parity") or {}
            return {
                "path": result.get("path"),
                **{key: value for key, value in parity.items() if isinstance(value, (int, float, bool, str))},
            }, []
        case _:
            return {}, []


def _forecast(row: Mapping[str, Any]) -> str:
    gain, speculative = row["gain"], " (speculative)" if row.get("speculative") else ""
    return (
        f"With {row['num_rows']} rows{speculative}, held-out text should be {gain['point']:.3f} nats per token likelier than untuned "
        f"({100 * gain['level']:.0f} % interval {gain['low']:.3f} to {gain['high']:.3f})."
    )


def _arms(project: Project) -> dict[str, Any]:
    """Style gap closed, key recall and failed gates of every arm, from evaluation.json; of another task, its table."""
    path = project.root / "evaluation.json"
    stored = read_json(path) if path.is_file() else {}
    if "evaluation" not in stored:
        header, *rows = stored.get("table") or [[]]
        return {row[0]: dict(zip(header[1:], row[1:])) for row in rows}
    return {
        arm["name"]: {
            "style_gap_closed": _point(arm.get("style_gap_closed")), "key_recall": _point(arm.get("key_recall")),
            "failed_gates": [gate["name"] for gate in arm.get("gates") or () if gate["status"] == "fail"],
        }
        for arm in stored["evaluation"]["arms"]
    }  # fmt: skip


def _point(value: Any) -> Any:
    """The estimate of an interval; anything else as it is."""
    return value["point"] if isinstance(value, Mapping) and "point" in value else value


def _rounded(value: Any) -> Any:
    """Floats with four digits after the point, for reading; missing values left out."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
