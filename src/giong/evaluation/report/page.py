"""From a `ReportContent` to one HTML page that needs no network, no script and no other file.

The page forbids itself to load or run anything (its content security policy), so a text that gets past the escaping is still
only a text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from giong.evaluation.report import checks, opinions, plots, sections
from giong.evaluation.report.content import ReportContent
from giong.evaluation.report.methods import header, method_rows
from giong.evaluation.report.table import arm_rows, level, pools_scope, verifier_line
from giong.workspace import atomic_write

COMPARISONS = (
    ("methods", "Methods compared", "The same rows and passes through every method, each with its own learning rate."),
    ("objectives", "Objectives compared", "The same base, and as many tokens, through every objective, each with its own learning rate."),
)
SYMBOLS = {"pass": "✓", "warn": "!", "fail": "✗", "not available": "–"}


def write_report(path: Path, content: ReportContent) -> None:
    """Render the page to `path`, atomically. Raises ResourceError where it cannot be written."""
    page = render(content)
    with atomic_write(path, "w") as stream:
        stream.write(page)


def render(content: ReportContent) -> str:
    """The page as HTML source. Every text in it is escaped; only the plots, which escape for themselves, are passed as they are."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(_view(content))


def _view(content: ReportContent) -> dict[str, Any]:
    """Everything that the template prints, by name."""
    from markupsafe import Markup

    evaluation, data = content.evaluation, content.data
    samples = sections.sample_cards(content)
    return {
        "content": content,
        "symbols": SYMBOLS,
        "model": sections.model_line(content),
        "notices": sections.all_notices(content),
        "verdict": sections.verdict_card(content),
        "summary": sections.summary(content),
        "arms": arm_rows(evaluation),
        "level": level(evaluation),
        "verifier_line": verifier_line(evaluation),
        "evaluation": evaluation,
        "tuned_arms": set(content.tuned_arms),
        "forest": Markup(plots.forest_plot(evaluation, content.tuned_arms)),
        "gate_tables": sections.gate_tables(content),
        "controls": checks.control_rows(evaluation),
        "pools_scope": pools_scope(evaluation),
        "alarms": evaluation.get("alarms") or (),
        "probes": checks.probe_rows(content),
        "tasks": checks.task_rows(content),
        "task_losses": checks.task_losses(content),
        "facts": checks.fact_rows(content),
        "probe_losses": checks.probe_losses(content),
        "details": sections.detail_table(evaluation),
        "verifier": sections.verifier_rows(evaluation),
        "caution": (evaluation.get("verifier") or {}).get("caution", ""),
        "curve": content.curve,
        "curve_plot": Markup(plots.learning_curve_plot(content.curve or {})),
        "forecasts": sections.forecast_rows(content.curve),
        "forecast_level": sections.forecast_level(content.curve),
        "has_band": bool((content.curve or {}).get("band")),
        "loss_plot": Markup(plots.loss_plot(content.losses)),
        "num_losses": len(content.losses),
        "comparisons": [
            {
                "id": name,
                "title": title,
                "text": text,
                "note": result["note"],
                "header": header(result),
                "rows": method_rows(result),
                "plot": Markup(plots.forest_plot(result["evaluation"], name=f"forest-{name}")),
            }
            for name, title, text in COMPARISONS
            if (result := getattr(content, name))
        ],
        "samples": samples[: sections.NUM_SAMPLES],
        "more_samples": samples[sections.NUM_SAMPLES :],
        "votes": opinions.vote_tables(content.votes),
        "judge": opinions.judge_tables(content.judge),
        "costs": sections.cost_rows(content),
        "backends": sections.backend_rows(content.backends),
        "usage": sections.usage_rows(content),
        "bills": sections.bill_rows(content),
        "data_rows": sections.data_rows(content),
        "split": sections.split_rows(data),
        "left_out": sections.left_out_rows(data),
        "resolved": sections.resolved_rows(content.settings),
        "config": sections.flattened(content.settings.get("config") or {}),
        "hashes": sections.flattened(content.hashes),
    }
