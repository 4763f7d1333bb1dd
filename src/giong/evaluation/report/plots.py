"""The three pictures of the report as inline SVG: style per arm, learning curve, training loss.

A label stands above its interval and never beside it: beside it, a phone would have room for one of the two only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from giong.evaluation.report import axes
from giong.evaluation.report.axes import LEFT, RIGHT, WIDTH, Scale
from giong.evaluation.report.table import arm_label, is_known, level, share, share_interval

STYLE_LIMITS = (-1.0, 2.0)
"""Intervals that reach further are cut, with an arrow: one hopeless arm must not flatten all others."""
ROW_HEIGHT = 50
MAX_LABEL_CHARACTERS = 24
MAX_LOSS_POINTS = 300
MIN_POINTS_TO_SMOOTH = 40


def forest_plot(evaluation: Mapping[str, Any], tuned_arms: Sequence[str] = (), name: str = "forest") -> str:
    """Style gap closed of each arm with its interval, base = 0 and author = 1; empty where no arm has one. `name` is unique on the page."""
    arms = [(arm, interval) for arm in evaluation.get("arms") or () if is_known(interval := arm.get("style_gap_closed"))]
    if not arms:
        return ""
    lowest, highest = min(interval["low"] for _, interval in arms), max(interval["high"] for _, interval in arms)
    low, high = max(STYLE_LIMITS[0], min(-0.15, lowest - 0.05)), min(STYLE_LIMITS[1], max(1.15, highest + 0.05))
    scale = Scale(low, high, 16, WIDTH - 16)
    top, bottom = 34, 34 + ROW_HEIGHT * len(arms) + 6
    described = "; ".join(f"{arm_label(arm)} {share_interval(interval)}" for arm, interval in arms)
    svg = axes.drawing(
        name, bottom + 56, "Share of the style gap closed by each arm",
        f"0% is the base as it is, 100% the author. With {level(evaluation)} intervals: {described}.",
    )  # fmt: skip
    for value, name in ((0.0, "base"), (1.0, "author")):
        axes.line(svg, "reference", scale(value), top - 10, scale(value), bottom)
        axes.text(svg, "reference-label", scale(value), top - 16, name, "middle")
    for index, (arm, interval) in enumerate(arms):
        row = axes.group(svg, "arm tuned" if arm["name"] in tuned_arms else "arm")
        _forest_row(row, scale, top + ROW_HEIGHT * index, _shortened(arm_label(arm)), interval)
    ticks = axes.nice_ticks(low, high, 6)
    axes.horizontal_axis(svg, scale, bottom, ticks, [share(tick) for tick in ticks], "share of the style gap closed")
    return axes.markup(svg)


def _forest_row(row: axes.Element, scale: Scale, y: float, label: str, interval: Mapping[str, float]) -> None:
    middle = y + 34
    axes.text(row, "arm-label", scale.start, y + 18, label)
    axes.text(row, "arm-value", scale.end, y + 18, share_interval(interval), "end")
    low, high = (scale(min(max(interval[end], scale.low), scale.high)) for end in ("low", "high"))
    axes.line(row, "interval", low, middle, high, middle)
    for end, x, sign in (("low", low, 1), ("high", high, -1)):
        if scale.low <= interval[end] <= scale.high:
            axes.line(row, "interval", x, middle - 6, x, middle + 6)
        else:
            axes.polygon(row, "arrow", [(x, middle), (x + sign * 10, middle - 6), (x + sign * 10, middle + 6)])
    if scale.low <= interval["point"] <= scale.high:
        axes.dot(row, "point", scale(interval["point"]), middle, 6)


def forecasts_beyond(curve: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The forecasts for more rows than the largest pilot had, fewest rows first."""
    largest = max((num_rows for num_rows, _ in curve.get("points") or ()), default=0)
    return sorted((row for row in curve.get("forecasts") or () if row["num_rows"] > largest), key=lambda row: row["num_rows"])


def learning_curve_plot(curve: Mapping[str, Any]) -> str:
    """Held-out loss over the number of rows: pilots, the curve with its band, and forecasts; empty without pilots.

    The axis of rows is logarithmic, where the log form is a straight line at last and pilots that double are equally spaced.
    """
    points = [(num_rows, nll) for num_rows, nll in curve.get("points") or () if num_rows >= 1 and math.isfinite(nll)]
    if not points:
        return ""
    forecasts, band = forecasts_beyond(curve), [row for row in curve.get("band") or () if row["num_rows"] >= 1]
    untuned = curve["untuned_nll"]
    values = [untuned, *(nll for _, nll in points), *(row["nll"][end] for row in [*forecasts, *band] for end in ("low", "high"))]
    num_rows = sorted({count for count, _ in points} | {row["num_rows"] for row in forecasts})
    x = Scale(num_rows[0] / 1.2, num_rows[-1] * 1.2, LEFT, WIDTH - RIGHT, log=True)
    y = Scale(*axes.padded(values, 0.1), 276, 40)
    svg = axes.drawing("curve", 330, "Held-out loss over the number of training rows", _described(curve, points, forecasts))
    axes.vertical_axis(svg, y, "held-out loss, nats per token")
    axes.horizontal_axis(svg, x, y.start, num_rows, [f"{count:,}" for count in num_rows], "training rows (logarithmic axis)")
    if band:
        upper, lower = ([(x(row["num_rows"]), y(row["nll"][end])) for row in band] for end in ("high", "low"))
        axes.polygon(svg, "band", [*upper, *reversed(lower)])
        axes.polyline(svg, "fitted", [(x(row["num_rows"]), y(row["nll"]["point"])) for row in band])
    axes.line(svg, "untuned", LEFT, y(untuned), WIDTH - RIGHT, y(untuned))
    axes.text(svg, "untuned-label", WIDTH - RIGHT - 4, y(untuned) - 6, "untuned base", "end")
    for row in forecasts:
        at = axes.group(svg, "forecast speculative" if row.get("speculative") else "forecast")
        axes.line(at, "interval", x(row["num_rows"]), y(row["nll"]["low"]), x(row["num_rows"]), y(row["nll"]["high"]))
        axes.dot(at, "open", x(row["num_rows"]), y(row["nll"]["point"]))
    for count, nll in points:
        axes.dot(svg, "pilot", x(count), y(nll))
    return axes.markup(svg)


def _described(curve: Mapping[str, Any], points: Sequence[tuple[int, float]], forecasts: Sequence[Mapping[str, Any]]) -> str:
    pilots = ", ".join(f"{nll:.3f} with {count} rows" for count, nll in points)
    beyond = ", ".join(f"{row['nll']['point']:.3f} with {row['num_rows']} rows" for row in forecasts) or "none"
    origin = "Carried over from a sibling" if curve.get("note") else "Measured"
    return f"Nats per token on held-out documents. Untuned: {curve['untuned_nll']:.3f}. {origin}: {pilots}. Forecast: {beyond}."


def loss_plot(losses: Sequence[Mapping[str, Any]]) -> str:
    """Training loss over steps with its running mean, dots of the validation loss and the learning rate below, where recorded; empty
    without losses."""
    rows = [row for row in losses if row.get("loss") is not None and math.isfinite(row["loss"])]
    if not rows:
        return ""
    shown = _thinned([(float(row["step"]), float(row["loss"])) for row in rows])
    rates = _thinned([(float(row["step"]), float(row["learning_rate"])) for row in rows if row.get("learning_rate") is not None])
    validation = [(float(row["step"]), row["validation_loss"]) for row in rows if row.get("validation_loss") is not None]
    first, last = shown[0], (float(rows[-1]["step"]), shown[-1][1])
    x = Scale(first[0], last[0], LEFT, WIDTH - RIGHT)
    y = Scale(*axes.padded([loss for _, loss in [*shown, *validation]]), 256, 40)
    bottom = 346 if rates else y.start
    svg = axes.drawing(
        "loss", bottom + 56, "Training loss over optimizer steps",
        f"From {rows[0]['loss']:.3f} nats per token at step {rows[0]['step']:,} to {rows[-1]['loss']:.3f} at step {rows[-1]['step']:,}."
        + "".join(f" Validation loss at step {step:,.0f}: {loss:.3f}." for step, loss in validation),
    )  # fmt: skip
    axes.vertical_axis(svg, y, f"{'loss (dots: validation)' if validation else 'training loss'}, nats per token")
    smooth = len(shown) >= MIN_POINTS_TO_SMOOTH
    axes.polyline(svg, "raw" if smooth else "smoothed", [(x(step), y(loss)) for step, loss in shown])
    if smooth:
        axes.polyline(svg, "smoothed", [(x(step), y(loss)) for step, loss in _running_mean(shown)])
    for step, loss in validation:
        axes.dot(svg, "point", x(step), y(loss), 6)
    if rates:
        peak = max(rate for _, rate in rates)
        strip = Scale(0.0, peak or 1.0, bottom, bottom - 50)
        axes.text(svg, "axis-title", 2, bottom - 62, f"learning rate (peak {peak:.2g})")
        axes.polyline(svg, "rate", [(x(step), strip(rate)) for step, rate in rates])
    ticks = [tick for tick in axes.nice_ticks(first[0], last[0], 5) if tick == int(tick)]
    axes.horizontal_axis(svg, x, bottom, ticks, [f"{tick:,.0f}" for tick in ticks], "optimizer step")
    return axes.markup(svg)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MAX_LOSS_POINTS` points, each the mean of equally many neighbours."""
    size = math.ceil(len(points) / MAX_LOSS_POINTS) or 1
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in bins]


def _running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean of each point and its neighbours within a fortieth of the run on both sides."""
    reach = max(2, len(points) // 40)
    parts = [points[max(0, index - reach) : index + reach + 1] for index in range(len(points))]
    return [(point[0], sum(loss for _, loss in part) / len(part)) for point, part in zip(points, parts)]


def _shortened(label: str) -> str:
    return label if len(label) <= MAX_LABEL_CHARACTERS else label[: MAX_LABEL_CHARACTERS - 1].rstrip() + "…"
