"""Step `report`: gather what the other steps left in the project into one page."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from giong.contracts import Reply
from giong.evaluation.compare.results import vote_results
from giong.evaluation.compare.votes import votes_path
from giong.evaluation.decision import decide_again
from giong.evaluation.report.content import ReportContent, curve_content
from giong.evaluation.report.page import write_report
from giong.journal import Journal
from giong.journal.summary import ATTEMPT_HEADER, attempt_cells
from giong.sizing.break_even import Usage, local_bill, mean_usage, provider_bills
from giong.sizing.shapes import shape_from_config
from giong.workflow.judging import with_agreement
from giong.workflow.sizing import load_curve, price_table
from giong.workflow.story import Story
from giong.workspace import read_json, read_jsonl

DEMO_NAME = "giong-demo"
PACKAGES = ("giong", "torch", "transformers", "peft", "numpy", "scikit-learn")


def write_story_report(story: Story) -> None:
    """Write report.html from whatever there is: a report before training shows baselines and sizing."""
    decide_again(story.project, story.config)
    write_report(story.project.report_path, gather(story))
    story.notice("report", str(story.project.report_path))


def gather(story: Story) -> ReportContent:
    """Everything that the page shows, as plain values."""
    project, config = story.project, story.config
    stored = _read(project.root / "evaluation.json")
    model = (
        read_json(project.model_path(config.name) / "model.json") if (project.model_path(config.name) / "model.json").is_file() else None
    )
    run_folder = project.run_path(model["run"]) if model else None
    run = read_json(run_folder / "run.json") if run_folder and (run_folder / "run.json").is_file() else None
    consent = config.data.consent
    size, usage = project.step_result("size") or {}, _usage(story, stored)
    return ReportContent(
        project=config.name, date=datetime.date.today().isoformat(), is_demo=config.name == DEMO_NAME,
        author=consent.author, consent=_consent_line(story), model_name=config.model.name_or_path, num_parameters=_num_parameters(story),
        evaluation=stored.get("evaluation", {}), verdict=stored.get("verdict"), curve=_curve(story, stored),
        losses=_losses(run_folder), samples=stored.get("samples", ()), votes=_votes(story), journal=journal_content(story), judge=with_agreement(project, stored.get("judge", {})),
        probes=stored.get("probes", {}), tasks=stored.get("tasks", {}), facts=stored.get("facts", {}), costs=_costs(story), backends=size.get("backends", ()),
        usage={name: asdict(arm) for name, arm in usage.items()}, bills=_bills(story, usage, run_folder), data=_data(story), settings=_settings(story, run),
        hashes=_hashes(story, run), **{name: _read(project.root / f"{name}.json") for name in ("methods", "objectives")},
        notices=_notices(story), command=f"giong run --project {project.root.name}",
    )  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _votes(story: Story) -> dict[str, Any]:
    return vote_results(story.project).to_dict() if votes_path(story.project).is_file() else {}


def journal_content(story: Story) -> dict[str, Any]:
    """The journal's parts with its attempts as cells; empty before there is one."""
    parts = Journal(story.project).to_dict()
    attempts = [attempt_cells(row) for row in parts["tried"] if row["step"]]
    return {**parts, "header": ATTEMPT_HEADER, "attempts": attempts} if parts["goal"] or attempts else {}


def _consent_line(story: Story) -> str:
    consent = story.config.data.consent
    if not consent.granted:
        return "No consent to imitate this author is recorded (data.consent in giong.yaml)."
    return f"{consent.author or 'The author'} agreed to be imitated" + (f" until {consent.until}." if consent.until else ".")


def _num_parameters(story: Story) -> int | None:
    from giong.errors import ModelError
    from giong.models.folder import resolve

    path = Path(resolve(story.config.model.name_or_path)).expanduser() / "config.json"
    try:
        return shape_from_config(read_json(path)).num_parameters if path.is_file() else None
    except ModelError:
        return None


def _curve(story: Story, stored: dict[str, Any]) -> dict[str, Any] | None:
    tuned = next((arm for arm in stored.get("evaluation", {}).get("arms", ()) if arm["name"] == "fine_tuned"), None)
    points = []
    if tuned and tuned["style_gap_closed"] and tuned["likelihood"] and tuned["likelihood"]["gain_nats_per_token"]:
        points = [(0.0, 0.0), (tuned["likelihood"]["gain_nats_per_token"]["point"], tuned["style_gap_closed"]["point"])]
    curve = load_curve(story, points)
    return curve_content(curve) if curve else None


def _losses(run_folder: Any) -> list[dict[str, Any]]:
    """Loss by step, and the validation loss where it was measured; a step that was done again after a resume counts once."""
    if not run_folder or not (run_folder / "events.jsonl").is_file():
        return []
    rows = read_jsonl(run_folder / "events.jsonl")
    steps = {
        row["data"]["step"]: {"step": row["data"]["step"], "loss": row["data"]["loss"], "learning_rate": row["data"]["learning_rate"]}
        for row in rows
        if row["kind"] == "step"
    }
    for row in rows:
        if row["kind"] == "checkpoint" and row["data"]["step"] in steps and "validation_loss" in row["data"]:
            steps[row["data"]["step"]]["validation_loss"] = row["data"]["validation_loss"]
    return [steps[step] for step in sorted(steps)]


def _costs(story: Story) -> list[dict[str, Any]]:
    costs = []
    for path in sorted((story.project.root / "steps").glob("*.json"), key=lambda path: path.stat().st_mtime):
        result = read_json(path).get("result", {})
        if "seconds" in result:
            costs.append(
                {
                    "stage": path.stem,
                    "seconds": result["seconds"],
                    "usd": result.get("usd", result.get("cost_usd")),
                    "tokens": result.get("tokens"),
                }
            )
    return costs


def _usage(story: Story, stored: dict[str, Any]) -> dict[str, Usage]:
    """What a call took, by arm; none before every arm has been measured."""
    names = [arm["name"] for arm in stored.get("evaluation", {}).get("arms", ())]
    found = {
        name: [Reply(**row) for row in read_jsonl(story.project.arm_path(name))] for name in names if story.project.arm_path(name).is_file()
    }
    return {name: mean_usage(replies) for name, replies in found.items() if replies}


def _bills(story: Story, usage: Mapping[str, Usage], run_folder: Path | None) -> list[dict[str, Any]]:
    """Training, evaluation and a month of calls here and at every provider, with the break-even against each prompt."""
    size, budget = story.project.step_result("size"), story.config.budget
    if run_folder is None or "fine_tuned" not in usage or not size or "num_training_tokens" not in size:
        return []
    tuned, arms = usage["fine_tuned"], {name: arm for name, arm in usage.items() if name != "base" and not name.startswith("fine_tuned")}
    calls = story.config.sizing.requests_per_month
    here = local_bill(
        tuned, arms, training_seconds=read_json(run_folder / "results.json")["seconds"], usd_per_hour=budget.usd_per_hour,
        evaluation_seconds=sum(row["seconds"] for row in _costs(story) if row["stage"] == "eval" or row["stage"].startswith("baseline")),
        hosting_usd_per_month=budget.hosting_usd_per_month, requests_per_month=calls,
    )  # fmt: skip
    local_arms = {name: arm for name, arm in arms.items() if "@" not in name}
    elsewhere = provider_bills(
        tuned, local_arms, num_training_tokens=size["num_training_tokens"], num_evaluated=len(story.test_examples), prices=price_table(story),
        today=datetime.date.today(), requests_per_month=calls, max_price_age_days=budget.max_price_age_days,
    )  # fmt: skip
    return [asdict(bill) for bill in (here, *elsewhere)]


def _data(story: Story) -> dict[str, Any]:
    project = story.project
    imported = project.step_result("import") or {}
    synthesis = project.step_result("synth") or {}
    report = read_json(project.data / "import_report.json") if (project.data / "import_report.json").is_file() else {}
    entries = report.get("files", {}).get("entries", [])
    statuses = [entry["status"] for entry in entries]
    split: dict[str, Any] = {}
    if project.split_path.is_file():
        frozen = story.split
        examples = story.examples if project.examples_path.is_file() else []
        for side in ("train", "calibration", "test"):
            split[side] = {
                "documents": len(frozen.documents(side)), "passages": len(frozen.passage_hashes[side]),
                "examples": sum(example.side == side for example in examples),
            }  # fmt: skip
    return {
        "num_documents": imported.get("num_documents"), "num_passages": imported.get("num_passages"), "num_words": imported.get("num_words"),
        "num_kept": statuses.count("kept"), "num_dropped": statuses.count("dropped"), "num_skipped": statuses.count("skipped"),
        "entries": entries, "left_out": synthesis.get("left_out", []), "split": split, "split_method": story.config.data.split,
        "synthesis": {"source": story.config.synthesis.source, "teacher": synthesis.get("teacher", ""), "kinds": story.config.synthesis.kinds},
    }  # fmt: skip


def _settings(story: Story, run: dict[str, Any] | None) -> dict[str, Any]:
    resolved = []
    if run:
        values = {**run["settings"]["method"], **run["settings"]["train"]}
        resolved = [{"name": name, "value": value, "reason": run["reasons"].get(name, "")} for name, value in values.items()]
        resolved.append({"name": "dtype", "value": run["settings"]["dtype"], "reason": "measured on this machine"})
    return {"config": story.config.model_dump(), "resolved": resolved}


def _hashes(story: Story, run: dict[str, Any] | None) -> dict[str, Any]:
    steps = {path.stem: read_json(path).get("key", "") for path in sorted((story.project.root / "steps").glob("*.json"))}
    hashes: dict[str, Any] = {
        "versions": {name: version(name) for name in PACKAGES},
        "steps": {name: key for name, key in steps.items() if key},
    }
    if run:
        hashes.update(model=run["model_identity"], training_rows=run["examples_hash"], run=run["key"], machine=run["machine"])
    return hashes


def _notices(story: Story) -> list[str]:
    notices = []
    if story.config.train.seed is not None:
        notices.append(f"One seed ({story.config.train.seed}): the interval covers the choice of test documents, not the luck of a run.")
    if story.config.model.name_or_path == "giong-tiny":
        notices.append("The base is the bundled tiny model: what it shows about prompting proves nothing about large models.")
    return notices
