"""The arithmetic of the calibration study: forecasts beside what came, naive forecasts beside ours, and what the verdict was worth.

A cell is one forecast: three neighbouring slices of one data set (by one seed, or by all seeds together) and a larger slice that was
trained afterwards. Headline figures are over the cells within four times the largest pilot; beyond, giong itself calls a forecast
speculative, and those stand in the table by themselves.

One decision a reader may question: the headline's intervals are not exactly those that giong prints. What widens them is found on the
other data sets, for each set anew, so no interval is judged on what it was made from; a row beside it has giong's own constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Any

import numpy as np
from tables import figure, table

from giong.evaluation.report import axes
from giong.evaluation.report.axes import LEFT, RIGHT, WIDTH, Scale
from giong.sizing.interval import Interval
from giong.sizing.learning_curve import (
    LEVEL,
    MAX_TRUSTED_FACTOR,
    MIN_TRUSTED_ROWS,
    RESIDUAL_SHARE,
    CurvePoint,
    LearningCurve,
    fit_curve,
    is_trusted,
    style_map,
)
from giong.sizing.verdict import MARGIN, Evidence, decide

NUM_PILOTS = 3
MAX_FACTOR = 8.5
"""Halving odd numbers makes a factor of eight a little more."""
ALL_SEEDS = -1
NUM_BOOTSTRAP = 500
SHARES = tuple(number / 20 for number in range(21))
"""Shares of the leave-largest-out error that an interval may be widened by."""
MARGINS = (0.1, 0.2, 0.3)
"""Nats per token by which tuning has to be ahead of the best prompt. How many make up the whole style gap is not known of these data sets,
so the verdict's rules, whose margin is a tenth of it, are asked with three answers."""

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
class Advice:
    """What the verdict's rules said where tuning had to gain `margin` nats per token on the best prompt, and whether it came to that."""

    margin: float
    decision: str
    probability: float
    worth_it: bool

    @property
    def tunes(self) -> bool:
        return self.decision in ("go", "collect more")


@dataclass(frozen=True)
class Cell:
    """One forecast of the gain (nats per token) at `num_rows`, and what was measured there. `ends` are the interval's for each of `SHARES`."""

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
    advice: list[Advice]
    ends: list[tuple[float, float]]

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

    @property
    def interval_score(self) -> float:
        """Width, and what was missed times 2 / (1 - level): the smaller, the better (Winkler 1972)."""
        return self.high - self.low + 2 / (1 - LEVEL) * max(self.low - self.actual, self.actual - self.high, 0.0)


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
    cells = []
    for start in range(len(sizes) - NUM_PILOTS):
        pilots = sizes[start : start + NUM_PILOTS]
        last = pilots[-1]
        points = [CurvePoint(item.num_rows, item.nll, item.seed) for item in trained if item.num_rows in pilots]
        at_largest = [item for item in trained if item.num_rows == last]
        curve = fit_curve(points, untuned.nll)
        for size in sizes[start + NUM_PILOTS :]:
            if size > MAX_FACTOR * last:
                continue
            gain = curve.forecast(size).gain
            widened = [replace(curve, residual_share=share).forecast(size).gain for share in SHARES]
            cells.append(Cell(
                untuned.data_set, seed, pilots, size, actual[size], gain.point, gain.low, gain.high, actual[last],
                power_law_gain(pilots, [actual[pilot] for pilot in pilots], curve.untuned_nll, size), prompted,
                [advice(untuned, at_largest, curve, size, margin, actual[size]) for margin in MARGINS],
                [(interval.low, interval.high) for interval in widened],
            ))  # fmt: skip
    return cells


def gain_of(nll: Documents, untuned: Documents) -> float:
    """Nats per token, each document counting alike."""
    return fmean(untuned[document] - nll[document] for document in untuned)


def power_law_gain(sizes: Sequence[int], gains: Sequence[float], untuned: float, size: int) -> float:
    """The plain power law L(n) = A n^-alpha through all pilots, by least squares in logarithms."""
    slope, intercept = np.polyfit(np.log(sizes), np.log([untuned - gain for gain in gains]), 1)
    return untuned - float(np.exp(intercept + slope * np.log(size)))


def advice(untuned: Measured, pilots: Sequence[Measured], curve: LearningCurve, size: int, margin: float, actual: float) -> Advice:
    """What the verdict's rules say at the largest pilot, with the likelihood gained in the place of the style gap closed.

    Gates are passed: no answers were written, so there is nothing to fail.
    """
    whole_gap = margin / MARGIN
    curve = replace(curve, _style_map=style_map([(whole_gap, 1.0)]))
    documents = sorted(untuned.nll)
    base = np.array([untuned.nll[document] for document in documents])
    tuned = np.mean([[base[i] - item.nll[document] for i, document in enumerate(documents)] for item in pilots], axis=0) / whole_gap
    best = best_prompt(untuned)
    prompted = (base - np.array([best[document] for document in documents])) / whole_gap
    draws = np.random.default_rng(0).integers(len(documents), size=(NUM_BOOTSTRAP, len(documents)))
    difference = (tuned - prompted)[draws].mean(axis=1)
    decision = decide(Evidence(
        measurable=True, num_rows=pilots[0].num_rows, num_test_requests=len(documents), best_prompt_arm="the better prompt",
        best_prompt=_interval(prompted, draws), tuned=_interval(tuned, draws), difference=_interval(tuned - prompted, draws),
        probability_of_margin=float((difference >= MARGIN).mean()), gates={"meaning": "pass"},
        rows_needed=curve.rows_for_style(float(prompted.mean()) + MARGIN, max_factor=size / curve.largest),
    )).decision  # fmt: skip
    needed = float(prompted.mean()) * whole_gap + margin
    return Advice(margin, decision, curve.probability(size, needed), actual >= needed)


def best_prompt(untuned: Measured) -> Documents:
    """The likelihoods under the plain request or with examples, whichever are better on the whole."""
    return min(untuned.nll, untuned.prompted, key=lambda documents: fmean(documents.values()))


def _interval(values: np.ndarray, draws: np.ndarray) -> Interval:
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def regret(cell: Cell, margin: float, tunes: bool) -> float:
    """What the advised arm leaves behind the better one at the cell's size, nats per token; tuning costs the margin."""
    tuned = cell.actual - margin
    return max(tuned, cell.prompted) - (tuned if tunes else cell.prompted)


def residual_share(cells: Sequence[Cell]) -> float:
    """The smallest share with which enough of the trusted intervals hold, each data set counting alike; the largest where none is enough.

    Enough is LEVEL (K + 1) / K: what is promised is of a data set that is not among the K (conformal prediction of groups, Dunn,
    Wasserman and Ramdas 2022).
    """
    by_set: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.is_trusted and cell.seed != ALL_SEEDS:
            by_set.setdefault(cell.data_set, []).append(cell)
    for share in SHARES[:-1]:
        held = [fmean(cell.covered for cell in with_share(group, share)) for group in by_set.values()]
        if held and fmean(held) >= LEVEL * (len(held) + 1) / len(held):
            return share
    return SHARES[-1]


def with_share(cells: Sequence[Cell], share: float) -> list[Cell]:
    """The same forecasts with the intervals of that share."""
    place = SHARES.index(share)
    return [replace(cell, low=cell.ends[place][0], high=cell.ends[place][1]) for cell in cells]


def each_apart(cells: Sequence[Cell]) -> list[Cell]:
    """The intervals of each data set with the share that all others ask for."""
    return judged_apart(cells, [[name] for name in _names(cells)])


def judged_apart(cells: Sequence[Cell], groups: Sequence[Sequence[str]]) -> list[Cell]:
    """The intervals of each group of data sets with the share that the sets outside it ask for."""
    found = []
    for group in groups:
        share = residual_share([cell for cell in cells if cell.data_set not in group])
        found += with_share([cell for cell in cells if cell.data_set in group], share)
    return found


def _names(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.data_set for cell in cells))


def figures(cells: Sequence[Cell]) -> dict[str, Any]:
    """Coverage and errors of some cells; None for a figure without cells."""

    def over(value: Callable[[Cell], float], middle: Callable = median) -> float | None:
        return float(middle([value(cell) for cell in cells])) if cells else None

    return {
        "num_forecasts": len(cells), "coverage": over(lambda cell: cell.covered, fmean),
        "median_width": over(lambda cell: cell.high - cell.low), "interval_score": over(lambda cell: cell.interval_score, fmean),
        "median_error": over(lambda cell: abs(cell.point - cell.actual)), "mean_error": over(lambda cell: abs(cell.point - cell.actual), fmean),
        "last_value_median_error": over(lambda cell: abs(cell.last_value - cell.actual)),
        "last_value_mean_error": over(lambda cell: abs(cell.last_value - cell.actual), fmean),
        "power_law_median_error": over(lambda cell: abs(cell.power_law - cell.actual)),
        "power_law_mean_error": over(lambda cell: abs(cell.power_law - cell.actual), fmean),
    }  # fmt: skip


def verdict_figures(cells: Sequence[Cell], place: int) -> dict[str, Any]:
    """With the margin at `place`: regret of the advice (and of advising always the same) and Brier score of "worth it" (and of the base rate)."""
    margin, given = MARGINS[place], [cell.advice[place] for cell in cells]
    rate = fmean(advice.worth_it for advice in given)
    return {
        "margin": margin, "num_forecasts": len(cells), "worth_it": rate,
        "decisions": {name: sum(advice.decision == name for advice in given) for name in sorted({advice.decision for advice in given})},
        "regret": fmean(regret(cell, margin, advice.tunes) for cell, advice in zip(cells, given)),
        "regret_always_tune": fmean(regret(cell, margin, True) for cell in cells),
        "regret_always_prompt": fmean(regret(cell, margin, False) for cell in cells),
        "brier": fmean((advice.probability - advice.worth_it) ** 2 for advice in given), "brier_of_base_rate": rate * (1 - rate),
    }  # fmt: skip


def summarise(cells: Sequence[Cell], measured: Sequence[Measured]) -> dict[str, Any]:
    """The headline over single seeds within four times the pilots, then by factor, by data set and with all seeds together."""
    names, apart = _names(cells), each_apart(cells)
    single = [cell for cell in apart if cell.seed != ALL_SEEDS]
    trusted = [cell for cell in single if cell.is_trusted]
    shipped = [cell for cell in cells if cell.is_trusted and cell.seed != ALL_SEEDS]
    headline = figures(trusted)
    naive = [headline[f"{name}_median_error"] for name in ("last_value", "power_law") if headline[f"{name}_median_error"] is not None]
    return {
        "coverage_80": headline["coverage"], "median_error": headline["median_error"], "naive_median_error": min(naive, default=None),
        "headline": headline, "residual_share": residual_share(cells),
        "halves": figures(judged_apart(shipped, [names[::2], names[1::2]])), "shipped": figures(shipped),
        "by_factor": {
            str(factor): figures([cell for cell in single if cell.factor == factor and cell.pilots[-1] >= MIN_TRUSTED_ROWS])
            for factor in (2, 4, 8)
        },
        "few_rows": figures([cell for cell in single if cell.factor <= MAX_TRUSTED_FACTOR and cell.pilots[-1] < MIN_TRUSTED_ROWS]),
        "by_data_set": {name: figures(found) for name in names if (found := [cell for cell in trusted if cell.data_set == name])},
        "all_seeds_together": figures([cell for cell in apart if cell.seed == ALL_SEEDS and cell.is_trusted]),
        "verdict": [verdict_figures(trusted, place) for place in range(len(MARGINS))] if trusted else [],
        "num_trainings": sum(item.num_rows > 0 for item in measured), "training_seconds": sum(item.seconds for item in measured),
    }  # fmt: skip


COLUMNS = (
    "", "forecasts", "coverage of the 80 % interval", "median width", "interval score", "median error", "last value", "power law",
)  # fmt: skip
VERDICT_COLUMNS = (
    "margin, nats per token", "worth it", "regret of the verdict", "always tune", "always prompt", "Brier score", "of the base rate", "decisions",
)  # fmt: skip


def tables(summary: Mapping[str, Any]) -> str:
    """The study's tables as Markdown."""
    rows = [
        ("within four times, widened as the other sets ask for", summary["headline"]),
        ("widened as the other half of the sets asks for", summary["halves"]),
        (f"widened as giong does ({RESIDUAL_SHARE:g}; all sets ask for {summary['residual_share']:g})", summary["shipped"]),
    ]
    rows += [
        (f"{factor} times" + (" (speculative)" if int(factor) > MAX_TRUSTED_FACTOR else ""), row)
        for factor, row in summary["by_factor"].items()
    ]
    rows += [("within four times, all seeds in one forecast", summary["all_seeds_together"])]
    rows += [(f"within four times, largest pilot below {MIN_TRUSTED_ROWS} rows (speculative)", summary["few_rows"])]
    parts = [table(COLUMNS, [_row(*row) for row in rows]), table(COLUMNS, [_row(*row) for row in summary["by_data_set"].items()])]
    if summary["verdict"]:
        parts.append(table(VERDICT_COLUMNS, [_verdict_row(row) for row in summary["verdict"]]))
    return "\n\n".join(parts)


def _row(name: str, row: Mapping[str, Any]) -> list[str]:
    names = ("median_width", "interval_score", "median_error", "last_value_median_error", "power_law_median_error")
    return [name, str(row["num_forecasts"]), figure(row["coverage"], ".0%"), *(figure(row[column], ".4f") for column in names)]


def _verdict_row(row: Mapping[str, Any]) -> list[str]:
    regrets = (f"{row[name]:.4f}" for name in ("regret", "regret_always_tune", "regret_always_prompt"))
    decisions = ", ".join(f"{name} {count}" for name, count in row["decisions"].items())
    return [f"{row['margin']:g}", f"{row['worth_it']:.0%}", *regrets, figure(row["brier"]), figure(row["brier_of_base_rate"]), decisions]


STYLE = ".covered{fill:#1f6f8b}.missed{fill:#b3261e}.interval{stroke:#999}.diagonal,.axis,.grid{stroke:#ccc}text{font:12px sans-serif;fill:#444}"


def plot(cells: Sequence[Cell]) -> str:
    """Forecast over measured gain, each with the headline's interval; on the diagonal a forecast is exact."""
    shown = [cell for cell in each_apart(cells) if cell.is_trusted and cell.seed != ALL_SEEDS]
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
