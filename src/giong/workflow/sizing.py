"""Step `size`: pilots on nested slices, the learning curve through them, and what the full run would take elsewhere.

The largest pilot and the run that becomes the model are the same where it is on all rows: what is trained is named by its content.
With `sizing.pilot_model` or `sizing.pilot_remote` the pilots are another model's, and `sizing.transfer` carries their curve over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from giong.errors import DataError
from giong.sizing.estimate import THIS_MACHINE, estimate_backends
from giong.sizing.learning_curve import CurvePoint, LearningCurve, fit_curve
from giong.sizing.prices import BUILT_IN_PRICES, PriceTable, read_prices
from giong.sizing.transfer import Transfer, carry_over
from giong.sizing.units import format_cost, format_seconds
from giong.workflow.estimating import estimate_run, machine_here, planned_run, resolved_of
from giong.workflow.remote_pilots import RemotePilots
from giong.workflow.story import Story, examples_hash
from giong.workflow.training import Run, nll_per_document, perform_run, plan_run, rows_of, score_answers, trained_rows, tuned
from giong.workspace import content_hash, read_json, write_json


def size_opportunity(story: Story) -> None:
    """Pilots on nested slices, a learning curve with its forecast, and what the full run would take elsewhere."""
    objective = story.config.objective
    if objective.other_aim:
        story.notice("size", f"no forecast: {objective.other_aim}")
        return
    sizing, first_seed = story.config.sizing, story.config.train.seed
    shares = sorted(set(sizing.pilot_shares))
    pilots = story.with_model(sizing.pilot_model) if sizing.pilot_model else story
    runs = [plan_run(pilots, share, first_seed + index) for share in shares for index in range(sizing.pilot_seeds)]
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
    remote = RemotePilots(story, runs) if sizing.pilot_remote else None
    of_another = bool(sizing.pilot_model or remote)
    own_share = {"smallest": shares[0], "largest": shares[-1]}.get(sizing.own_pilot) if of_another else None
    own_run = plan_run(story, own_share, first_seed) if own_share else None
    trained = [*(() if remote else ((pilots, run) for run in runs)), *([(story, own_run)] if own_run else [])]
    untrained = [story.model_identity, *(remote.keys if remote else ())] if of_another else []
    key = content_hash([run.record["key"] for _, run in trained], examples_hash(test), *priced, *untrained)
    if story.is_current("size", key) and all(run.is_finished for _, run in trained):
        return
    # The run that becomes the model, where it is one of these.
    final = plan_run(story, shares[-1])
    _, report = rows_of(story, final.examples)
    if remote:
        # First, because it may not be affordable; and what trains there takes no time here.
        remote.submit()
    _announce_pilots(story, trained)
    untuned = nll_per_document(test, score_answers(story.local, None, test))
    points = []
    for of, run in trained:
        perform_run(of, run, "train" if run.name == final.name and shares[-1] == 1.0 else _pilot_stage(run, runs))
        with tuned(of, run.artifact, run.name) as (local, adapter):
            likelihoods = nll_per_document(test, score_answers(local, adapter, test))
            points.append(CurvePoint(len(run.examples), likelihoods, run.record["settings"]["train"]["seed"]))
    transfer = None
    if of_another:
        own_point = points.pop() if own_run else None
        own_rows = own_point.num_rows if own_point else None
        if remote:
            points, of_sibling, partial = remote.measured()
            transfer = Transfer(remote.sibling, own_rows, partial)
        else:
            of_sibling = nll_per_document(test, score_answers(pilots.local, None, test))
            transfer = Transfer(str(sizing.pilot_model), own_rows)
        points = carry_over(points, of_sibling, untuned, own_point)
    curve = fit_curve(points, untuned, transfer=transfer)
    result = {
        "curve": curve.to_dict(), "forecasts": [asdict(forecast) for forecast in curve.forecasts()],
        "seconds": sum(run.results["seconds"] for _, run in trained), "runs": [run.name for _, run in trained],
        "num_rows": len(story.training_examples), "backends": backends(story, final),
        "num_training_tokens": round(report.num_tokens * resolved_of(story, final).train.num_epochs),
        "points": [asdict(point) for point in points], "untuned": untuned, "transfer": asdict(transfer) if transfer else None,
        "usd": remote.usd if remote else None,
    }  # fmt: skip
    write_json(story.project.root / "steps" / "sizing_detail.json", result)
    story.project.finish_step(
        "size",
        key,
        [],
        {name: result[name] for name in ("curve", "forecasts", "seconds", "runs", "num_rows", "backends", "num_training_tokens", "usd")},
    )
    _say_curve(story, curve)


def load_curve(story: Story, style_points: Sequence[tuple[float, float]] = ()) -> LearningCurve | None:
    """The curve of the last `size`, with measured style points if there are any; None before `size`."""
    path = story.project.root / "steps" / "sizing_detail.json"
    if not path.is_file():
        return None
    detail = read_json(path)
    transfer = Transfer(**detail["transfer"]) if detail.get("transfer") else None
    return fit_curve([CurvePoint(**point) for point in detail["points"]], detail["untuned"], style_points=style_points, transfer=transfer)


def _pilot_stage(run: Run, runs: Sequence[Run]) -> str:
    same_size = [other.name for other in runs if len(other.examples) == len(run.examples)]
    if run.name not in same_size:
        return f"pilot-{len(run.examples)}-own"
    return f"pilot-{len(run.examples)}" + (f"-{same_size.index(run.name) + 1}" if len(same_size) > 1 else "")


def _announce_pilots(story: Story, trained: Sequence[tuple[Story, Run]]) -> None:
    """Say before the first pilot what all that are missing will take, by model where a sibling is trained too."""
    missing = [(of, run) for of, run in trained if not run.is_finished]
    for of in dict.fromkeys(of for of, _ in missing):
        runs = [run for other, run in missing if other is of]
        estimates = [estimate_run(of, run, trained_rows(of, run.examples)) for run in runs]
        seconds, usd = sum(found.seconds for found in estimates), sum(found.usd for found in estimates)
        model = f" of {of.config.model.name_or_path}" if story.config.sizing.pilot_model else ""
        story.notice(
            "size",
            f"{len(runs)} training{'s' if len(runs) > 1 else ''}{model} on slices, about {format_seconds(seconds)} together, {format_cost(usd)}",
        )


def _say_curve(story: Story, curve: LearningCurve) -> None:
    if curve.transfer:
        story.notice("size", curve.transfer.note)
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


def backends(story: Story, run: Run) -> list[dict[str, Any]]:
    """The same run elsewhere: time, memory and cost by arithmetic, and here by measurement."""
    budget = story.config.budget
    rows = estimate_backends(
        planned_run(story, run, trained_rows(story, run.examples)), machine=machine_here(story), max_price_age_days=budget.max_price_age_days,
        own_usd_per_hour={THIS_MACHINE: budget.usd_per_hour}, prices=price_table(story),
    )  # fmt: skip
    return [asdict(row) for row in rows]
