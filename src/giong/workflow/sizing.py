"""Step `size`: pilots on nested slices, the learning curve through them, and what the full run would take elsewhere.

The largest pilot and the run that becomes the model are the same where it is on all rows: what is trained is named by its content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from giong.errors import DataError
from giong.models.rows import RowReport
from giong.sizing.estimate import THIS_MACHINE, estimate_backends
from giong.sizing.learning_curve import CurvePoint, LearningCurve, fit_curve
from giong.sizing.prices import BUILT_IN_PRICES, PriceTable, read_prices
from giong.sizing.units import format_cost, format_seconds
from giong.workflow.estimating import described_run, estimate_run, resolved_of
from giong.workflow.story import Story, examples_hash
from giong.workflow.training import Run, nll_per_document, perform_run, plan_run, rows_of, score_answers, tuned
from giong.workspace import content_hash, read_json, write_json


def size_opportunity(story: Story) -> None:
    """Pilots on nested slices, a learning curve with its forecast, and what the full run would take elsewhere."""
    objective = story.config.objective
    if objective.learns_from != "examples":
        story.notice("size", f"no forecast: the curve is of the author's answers, and {objective.name} learns from {objective.learns_from}")
        return
    shares = sorted(set(story.config.sizing.pilot_shares))
    first_seed = story.config.train.seed
    runs = [plan_run(story, share, first_seed + index) for share in shares for index in range(story.config.sizing.pilot_seeds)]
    if len({len(run.examples) for run in runs}) < 2:
        raise DataError(
            f"{len(runs[-1].examples)} training rows are too few for pilots of different sizes",
            place="sizing.pilot_shares",
            remedy="Add more writing.",
        )
    test = story.test_examples
    budget = story.config.budget
    # Prices are part of what is shown, and a file that is wrong is found before anything is trained.
    price_table(story)
    priced = [budget.usd_per_hour, budget.max_price_age_days, story.project.root / budget.prices if budget.prices else None]
    key = content_hash([run.record["key"] for run in runs], examples_hash(test), *priced)
    if story.is_current("size", key) and all(run.is_finished for run in runs):
        return
    points, seconds = [], 0.0
    # The run that becomes the model, where it is one of these.
    final = plan_run(story, shares[-1])
    _, report = rows_of(story, final.examples)
    _announce_pilots(story, runs)
    untuned = nll_per_document(test, score_answers(story.local, None, test))
    for run in runs:
        perform_run(story, run, "train" if run.name == final.name and shares[-1] == 1.0 else _pilot_stage(run, runs))
        with tuned(story, run.artifact, run.name) as (local, adapter):
            likelihoods = nll_per_document(test, score_answers(local, adapter, test))
            points.append(CurvePoint(len(run.examples), likelihoods, run.record["settings"]["train"]["seed"]))
        seconds += run.results["seconds"]
    curve = fit_curve(points, untuned)
    result = {
        "curve": curve.to_dict(), "forecasts": [asdict(forecast) for forecast in curve.forecasts()], "seconds": seconds,
        "runs": [run.name for run in runs], "num_rows": len(story.training_examples), "backends": backends(story, final, report),
        "num_training_tokens": round(report.num_tokens * resolved_of(final).train.num_epochs),
        "points": [asdict(point) for point in points], "untuned": untuned,
    }  # fmt: skip
    write_json(story.project.root / "steps" / "sizing_detail.json", result)
    story.project.finish_step(
        "size",
        key,
        [],
        {name: result[name] for name in ("curve", "forecasts", "seconds", "runs", "num_rows", "backends", "num_training_tokens")},
    )
    _say_curve(story, curve)


def load_curve(story: Story, style_points: Sequence[tuple[float, float]] = ()) -> LearningCurve | None:
    """The curve of the last `size`, with measured style points if there are any; None before `size`."""
    path = story.project.root / "steps" / "sizing_detail.json"
    if not path.is_file():
        return None
    detail = read_json(path)
    return fit_curve([CurvePoint(**point) for point in detail["points"]], detail["untuned"], style_points=style_points)


def _pilot_stage(run: Run, runs: Sequence[Run]) -> str:
    same_size = [other.name for other in runs if len(other.examples) == len(run.examples)]
    return f"pilot-{len(run.examples)}" + (f"-{same_size.index(run.name) + 1}" if len(same_size) > 1 else "")


def _announce_pilots(story: Story, runs: Sequence[Run]) -> None:
    """Say before the first pilot what all that are missing will take."""
    missing = [run for run in runs if not run.is_finished]
    if missing:
        estimates = [estimate_run(story, run, rows_of(story, run.examples)[1]) for run in missing]
        seconds, usd = sum(found.seconds for found in estimates), sum(found.usd for found in estimates)
        story.notice("size", f"{len(missing)} trainings on slices, about {format_seconds(seconds)} together, {format_cost(usd)}")


def _say_curve(story: Story, curve: LearningCurve) -> None:
    for forecast in curve.forecasts():
        gain = forecast.gain
        story.notice(
            "size",
            f"{forecast.label}: {gain.point:.3f} nats per token better than untuned (80 % interval {gain.low:.3f} to {gain.high:.3f})",
        )


def price_table(story: Story) -> PriceTable:
    """The built-in prices, with the user's own in their place."""
    path = story.config.budget.prices
    return read_prices(story.project.root / path) if path else BUILT_IN_PRICES


def backends(story: Story, run: Run, report: RowReport) -> list[dict[str, Any]]:
    """The same run elsewhere: time, memory and cost by arithmetic, and here by measurement."""
    budget = story.config.budget
    rows = estimate_backends(
        **described_run(story, run, report), max_price_age_days=budget.max_price_age_days,
        own_usd_per_hour={THIS_MACHINE: budget.usd_per_hour}, prices=price_table(story),
    )  # fmt: skip
    return [asdict(row) for row in rows]
