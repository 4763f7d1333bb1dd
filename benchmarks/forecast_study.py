"""The arithmetic of the calibration study: forecasts beside what came, naive forecasts beside ours, and what the verdict was worth.

A cell is one forecast: three neighbouring slices of one data set (by one seed, or by all seeds together) and a larger slice that was
trained afterwards. Headline figures are over the cells within four times the largest pilot; beyond, giong itself calls a forecast
speculative, and those stand in the table by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import numpy as np
from tables import figure, table

from giong.evaluation.report import axes
from giong.evaluation.report.axes import LEFT, RIGHT, WIDTH, Scale
from giong.sizing.interval import Interval
from giong.sizing.learning_curve import MAX_TRUSTED_FACTOR, MIN_TRUSTED_ROWS, CurvePoint, LearningCurve, fit_curve, is_trusted
from giong.sizing.verdict import MARGIN, Evidence, decide

NUM_PILOTS = 3
MAX_FACTOR = 8.5
"""Halving odd numbers makes a factor of eight a little more."""
ALL_SEEDS = -1
NUM_BOOTSTRAP = 500
WHOLE_GAP = 1.0
"""Nats per token that count as the whole style gap, for the verdict's rules: its margin of 0.10 is then 0.1 nats per token."""

Documents = Mapping[str, float]


@dataclass(frozen=True)
class Measured:
    """One training: nats per token of every held-out document. 0 rows is the untuned base, with its likelihoods under a prompt."""

    data_set: str
    seed: int
    num_rows: int
    nll: Documents
    seconds: float
    prompted: Documents = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One forecast of the gain (nats per token) at `num_rows`, and what was measured there."""

    data_set: str
    seed: int
    pilots: list[int]
    num_rows: int
    actual: float
    point: float
    low: float
    high: float
    last_value: float
    power_law: float
    prompted: float
    decision: str
    probability: float
    worth_it: bool

    @property
    def factor(self) -> int:
        """Times the largest pilot, to the nearest power of two."""
        return int(2 ** round(np.log2(self.num_rows / self.pilots[-1])))

    @property
    def is_trusted(self) -> bool:
        return is_trusted(self.factor * self.pilots[-1], self.pilots[-1])

    @property
    def covered(self) -> bool:
        return self.low <= self.actual <= self.high


def study(measured: Sequence[Measured]) -> list[Cell]:
    """All cells of all data sets, each seed by itself and (with several seeds) all together."""
    cells = []
    for name in dict.fromkeys(item.data_set for item in measured):
        of_set = [item for item in measured if item.data_set == name]
        untuned = next(item for item in of_set if item.num_rows == 0)
        trained = [item for item in of_set if item.num_rows]
        seeds = sorted({item.seed for item in trained})
        for seed in [*seeds, ALL_SEEDS] if len(seeds) > 1 else seeds:
            chosen = [item for item in trained if seed in (ALL_SEEDS, item.seed)]
            cells += cells_of(untuned, chosen, seed)
    return cells


def cells_of(untuned: Measured, trained: Sequence[Measured], seed: int) -> list[Cell]:
    """Every three neighbouring sizes with every larger size within the factor."""
    sizes = sorted({item.num_rows for item in trained})
    actual = {size: fmean(gain_of(item.nll, untuned.nll) for item in trained if item.num_rows == size) for size in sizes}
    prompted = gain_of(best_prompt(untuned), untuned.nll)
    needed = prompted + MARGIN * WHOLE_GAP
    cells = []
    for start in range(len(sizes) - NUM_PILOTS):
        pilots = sizes[start : start + NUM_PILOTS]
        last = pilots[-1]
        points = [CurvePoint(item.num_rows, item.nll, item.seed) for item in trained if item.num_rows in pilots]
        curve = fit_curve(points, untuned.nll, style_points=[(WHOLE_GAP, 1.0)])
        for size in sizes[start + NUM_PILOTS :]:
            if size > MAX_FACTOR * last:
                continue
            gain = curve.forecast(size).gain
            cells.append(Cell(
                untuned.data_set, seed, pilots, size, actual[size], gain.point, gain.low, gain.high, actual[last],
                power_law_gain(pilots, [actual[pilot] for pilot in pilots], curve.untuned_nll, size), prompted,
                advice(untuned, [item for item in trained if item.num_rows == last], curve, size),
                curve.probability(size, needed), actual[size] >= needed,
            ))  # fmt: skip
    return cells


def gain_of(nll: Documents, untuned: Documents) -> float:
    """Nats per token, each document counting alike."""
    return fmean(untuned[document] - nll[document] for document in untuned)


def power_law_gain(sizes: Sequence[int], gains: Sequence[float], untuned: float, size: int) -> float:
    """The plain power law L(n) = A n^-alpha through all pilots, by least squares in logarithms."""
    slope, intercept = np.polyfit(np.log(sizes), np.log([untuned - gain for gain in gains]), 1)
    return untuned - float(np.exp(intercept + slope * np.log(size)))


def advice(untuned: Measured, pilots: Sequence[Measured], curve: LearningCurve, size: int) -> str:
    """What the verdict's rules say at the largest pilot, with the likelihood gained in the place of the style gap closed.

    Gates are passed: no answers were written, so there is nothing to fail.
    """
    documents = sorted(untuned.nll)
    base = np.array([untuned.nll[document] for document in documents])
    tuned = np.mean([[base[i] - item.nll[document] for i, document in enumerate(documents)] for item in pilots], axis=0) / WHOLE_GAP
    best = best_prompt(untuned)
    prompted = (base - np.array([best[document] for document in documents])) / WHOLE_GAP
    draws = np.random.default_rng(0).integers(len(documents), size=(NUM_BOOTSTRAP, len(documents)))
    difference = (tuned - prompted)[draws].mean(axis=1)
    return decide(Evidence(
        measurable=True, num_rows=pilots[0].num_rows, num_test_requests=len(documents), best_prompt_arm="the better prompt",
        best_prompt=_interval(prompted, draws), tuned=_interval(tuned, draws), difference=_interval(tuned - prompted, draws),
        probability_of_margin=float((difference >= MARGIN).mean()), gates={"meaning": "pass"},
        rows_needed=curve.rows_for_style(float(prompted.mean()) + MARGIN, max_factor=size / curve.largest),
    )).decision  # fmt: skip


def best_prompt(untuned: Measured) -> Documents:
    """The likelihoods under the plain request or with examples, whichever are better on the whole."""
    return min(untuned.nll, untuned.prompted, key=lambda documents: fmean(documents.values()))


def _interval(values: np.ndarray, draws: np.ndarray) -> Interval:
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def regret(cell: Cell, tunes: bool) -> float:
    """What the advised arm leaves behind the better one at the cell's size, nats per token; tuning costs the margin."""
    tuned = cell.actual - MARGIN * WHOLE_GAP
    return max(tuned, cell.prompted) - (tuned if tunes else cell.prompted)


def figures(cells: Sequence[Cell]) -> dict[str, Any]:
    """Coverage and errors of some cells; None for a figure without cells."""

    def over(value: Callable[[Cell], float], middle: Callable = median) -> float | None:
        return float(middle([value(cell) for cell in cells])) if cells else None

    return {
        "num_forecasts": len(cells), "coverage": over(lambda cell: cell.covered, fmean),
        "median_width": over(lambda cell: cell.high - cell.low),
        "median_error": over(lambda cell: abs(cell.point - cell.actual)), "mean_error": over(lambda cell: abs(cell.point - cell.actual), fmean),
        "last_value_median_error": over(lambda cell: abs(cell.last_value - cell.actual)),
        "last_value_mean_error": over(lambda cell: abs(cell.last_value - cell.actual), fmean),
        "power_law_median_error": over(lambda cell: abs(cell.power_law - cell.actual)),
        "power_law_mean_error": over(lambda cell: abs(cell.power_law - cell.actual), fmean),
    }  # fmt: skip


def verdict_figures(cells: Sequence[Cell]) -> dict[str, Any]:
    """Regret of the advice (and of advising always the same) and Brier score of "worth it" (and of saying the base rate)."""
    if not cells:
        return {}
    rate = fmean(cell.worth_it for cell in cells)
    return {
        "num_forecasts": len(cells),
        "decisions": {name: sum(cell.decision == name for cell in cells) for name in sorted({cell.decision for cell in cells})},
        "regret": fmean(regret(cell, cell.decision in ("go", "collect more")) for cell in cells),
        "regret_always_tune": fmean(regret(cell, True) for cell in cells),
        "regret_always_prompt": fmean(regret(cell, False) for cell in cells),
        "worth_it": rate, "brier": fmean((cell.probability - cell.worth_it) ** 2 for cell in cells), "brier_of_base_rate": rate * (1 - rate),
    }  # fmt: skip


def summarise(cells: Sequence[Cell], measured: Sequence[Measured]) -> dict[str, Any]:
    """The headline over single seeds within four times the pilots, then by factor, by data set and with all seeds together."""
    single = [cell for cell in cells if cell.seed != ALL_SEEDS]
    trusted = [cell for cell in single if cell.is_trusted]
    headline = figures(trusted)
    naive = [headline[f"{name}_median_error"] for name in ("last_value", "power_law") if headline[f"{name}_median_error"] is not None]
    return {
        "coverage_80": headline["coverage"], "median_error": headline["median_error"], "naive_median_error": min(naive, default=None),
        "headline": headline,
        "by_factor": {
            str(factor): figures([cell for cell in single if cell.factor == factor and cell.pilots[-1] >= MIN_TRUSTED_ROWS])
            for factor in (2, 4, 8)
        },
        "few_rows": figures([cell for cell in single if cell.factor <= MAX_TRUSTED_FACTOR and cell.pilots[-1] < MIN_TRUSTED_ROWS]),
        "by_data_set": {name: figures([cell for cell in trusted if cell.data_set == name]) for name in dict.fromkeys(cell.data_set for cell in trusted)},
        "all_seeds_together": figures([cell for cell in cells if cell.seed == ALL_SEEDS and cell.is_trusted]),
        "verdict": verdict_figures(trusted),
        "num_trainings": sum(item.num_rows > 0 for item in measured), "training_seconds": sum(item.seconds for item in measured),
    }  # fmt: skip


COLUMNS = (
    "", "forecasts", "coverage of the 80 % interval", "median width", "median error", "last value", "power law",
)  # fmt: skip


def tables(summary: Mapping[str, Any]) -> str:
    """The study's tables as Markdown."""
    rows = [("within four times", summary["headline"])]
    rows += [
        (f"{factor} times" + (" (speculative)" if int(factor) > MAX_TRUSTED_FACTOR else ""), row)
        for factor, row in summary["by_factor"].items()
    ]
    rows += [("within four times, all seeds in one forecast", summary["all_seeds_together"])]
    rows += [(f"within four times, largest pilot below {MIN_TRUSTED_ROWS} rows (speculative)", summary["few_rows"])]
    verdict = summary["verdict"]
    parts = [table(COLUMNS, [_row(*row) for row in rows]), table(COLUMNS, [_row(*row) for row in summary["by_data_set"].items()])]
    if verdict:
        parts.append(table(("", "regret, nats per token", "Brier score of \"worth it\""), [
            ["the verdict's rules", figure(verdict["regret"], ".4f"), figure(verdict["brier"])],
            ["always tune", figure(verdict["regret_always_tune"], ".4f"), ""],
            ["always prompt", figure(verdict["regret_always_prompt"], ".4f"), ""],
            ["the base rate", "", figure(verdict["brier_of_base_rate"])],
        ]))  # fmt: skip
        parts.append("Decisions: " + ", ".join(f"{name} {count}" for name, count in verdict["decisions"].items()) + ".")
    return "\n\n".join(parts)


def _row(name: str, row: Mapping[str, Any]) -> list[str]:
    names = ("median_width", "median_error", "last_value_median_error", "power_law_median_error")
    return [name, str(row["num_forecasts"]), figure(row["coverage"], ".0%"), *(figure(row[column], ".4f") for column in names)]


STYLE = ".covered{fill:#1f6f8b}.missed{fill:#b3261e}.interval{stroke:#999}.diagonal,.axis,.grid{stroke:#ccc}text{font:12px sans-serif;fill:#444}"


def plot(cells: Sequence[Cell]) -> str:
    """Forecast over measured gain, each with its interval; on the diagonal a forecast is exact."""
    shown = [cell for cell in cells if cell.is_trusted and cell.seed != ALL_SEEDS]
    limits = axes.padded([value for cell in shown for value in (cell.actual, cell.low, cell.high)])
    x, y = Scale(*limits, LEFT, WIDTH - RIGHT), Scale(*limits, 420, 40)
    held = sum(cell.covered for cell in shown)
    svg = axes.drawing(
        "calibration", 476, "Forecast and measured gain", f"{held} of {len(shown)} measured gains lie within their 80 % interval (blue)."
    )
    svg.set("xmlns", "http://www.w3.org/2000/svg")
    axes.style(svg, STYLE)
    axes.vertical_axis(svg, y, "forecast, nats per token")
    ticks = axes.nice_ticks(*limits)
    axes.horizontal_axis(svg, x, y.start, ticks, axes.tick_labels(ticks), "measured, nats per token")
    axes.line(svg, "diagonal", x(limits[0]), y(limits[0]), x(limits[1]), y(limits[1]))
    for cell in shown:
        axes.line(svg, "interval", x(cell.actual), y(cell.low), x(cell.actual), y(cell.high))
        axes.dot(svg, "covered" if cell.covered else "missed", x(cell.actual), y(cell.point), 3)
    return axes.markup(svg)
