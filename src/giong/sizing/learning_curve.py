"""What more rows would buy: a family of curves through the pilots, each anchored at the untuned model, stacked.

One decision a reader may question: nobody chooses a form. Each is weighted by how well it forecast the largest pilot from the
smaller ones. Around their mean an interval spans what the forms disagree on and what resampling changes, and a share of the error
made at the largest pilot, growing with the distance. `benchmarks/forecast_calibration.py` finds that share and measures how often the
intervals hold (docs/decisions/0015).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from giong.errors import DataError
from giong.sizing.interval import Interval

if TYPE_CHECKING:
    from giong.sizing.transfer import Transfer

PerDocument = Mapping[str, float] | Sequence[float] | np.ndarray
"""Mean NLL (nats per token) of each held-out document: by document id, or in one fixed order."""

LEVEL = 0.8
MAX_TRUSTED_FACTOR, MIN_TRUSTED_ROWS = 4, 10
"""Beyond so many times the largest pilot, or from a largest pilot of fewer rows, a forecast is speculative. In the calibration study
every miss but a few came from pilots of 2, 4 and 8 rows: nearly all of them fell short of what was measured."""
FACTORS = (2, 4, 8)
"""Multiples of the largest pilot that are forecast."""
RESIDUAL_SHARE = 0.4
"""Share of the leave-largest-out error that widens an interval. That error is of a curve with one pilot fewer, and the forms' disagreement
is part of it already: the whole of it made 80 % intervals that hold 96 % of the time."""
NUM_GRID = 600
SMALLEST_ERROR = 1e-4
"""Nats per token. Below this a form's error is chance, and no form is preferred for it."""

FormName = Literal["log", "rectified", "plateau"]


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One pilot: trained on `num_rows` rows with `seed`, measured on the same held-out documents as every other point."""

    num_rows: int
    nll_per_document: PerDocument
    seed: int = 0


def is_trusted(num_rows: int, largest: int) -> bool:
    """Whether pilots of up to `largest` rows say enough of `num_rows` rows for a verdict to rest on it."""
    return num_rows <= MAX_TRUSTED_FACTOR * largest and largest >= MIN_TRUSTED_ROWS


@dataclass(frozen=True, slots=True)
class Forecast:
    """What `num_rows` rows would give: the curve (P50) between P10 and P90. `gain` is NLL(untuned) - NLL, nats per token;
    `speculative` where no verdict may rest on it."""

    num_rows: int
    nll: Interval
    gain: Interval
    style_gap_closed: Interval | None
    speculative: bool

    @property
    def label(self) -> str:
        return f"{self.num_rows} rows" + (" (speculative)" if self.speculative else "")


@dataclass(frozen=True, slots=True)
class RowsNeeded:
    """Rows at which the forecast reaches a target: its P50, its P90 (`low`) and its P10 (`high`, None where it never does)."""

    point: int
    low: int
    high: int | None


@dataclass(frozen=True, slots=True)
class Form:
    """gain(n) = amplitude * basis(n; shape): the amplitude is linear, the shape parameters lie on a grid."""

    parameters: tuple[str, ...]
    shapes: Callable[[float, float], np.ndarray]
    basis: Callable[[np.ndarray, np.ndarray], np.ndarray]
    max_amplitude_share: float = math.inf


def _log_shapes(smallest: float, largest: float) -> np.ndarray:
    # Far above the largest pilot the curve is a straight line, which no forecast should follow.
    return np.geomspace(max(smallest / 50, 1e-3), 2 * largest, NUM_GRID)[:, None]


def _log_basis(num_rows: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    return np.log1p(num_rows / shapes[..., :1])


def _rectified_shapes(smallest: float, largest: float) -> np.ndarray:
    scales = np.geomspace(smallest / 10, largest, 120)
    return np.array([(scale, beta) for beta in np.linspace(0.1, 1.0, 19) for scale in scales])


def _rectified_basis(num_rows: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    power = (num_rows / shapes[..., :1]) ** shapes[..., 1:2]
    return power / (1 + power)


def _plateau_shapes(smallest: float, largest: float) -> np.ndarray:
    return np.geomspace(min(smallest / 10, largest / 30), largest, NUM_GRID)[:, None]


def _plateau_basis(num_rows: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    return -np.expm1(-num_rows / shapes[..., :1])


FORMS: dict[FormName, Form] = {
    # L(n) = L0 - a ln(1 + n/n0), n0 <= 2 largest
    "log": Form(("a", "n0"), _log_shapes, _log_basis),
    # L(n) = E + (L0 - E) / (1 + (n/n0)^beta), E >= L0 / 2, n0 <= largest (after Lin et al. 2024, 2402.02314)
    "rectified": Form(("L0-E", "n0", "beta"), _rectified_shapes, _rectified_basis, 0.5),
    # L(n) = L0 - a (1 - exp(-n/n0)), n0 <= largest: at least 63 % of what there ever is to gain has been gained
    "plateau": Form(("a", "n0"), _plateau_shapes, _plateau_basis),
}


@dataclass
class LearningCurve:
    """Fitted curves with their weights and bootstrap refits. `points` are (rows, mean NLL); `leave_largest_out_error` is each form's
    root mean square error, nats per token, where the largest pilot is forecast from the others."""

    untuned_nll: float
    points: list[tuple[int, float]]
    weights: dict[FormName, float]
    parameters: dict[FormName, dict[str, float]]
    leave_largest_out_error: dict[FormName, float]
    _fits: dict[FormName, tuple[np.ndarray, np.ndarray]] = field(repr=False)
    """Per form: amplitudes (1 + B,) and shapes (1 + B, S), the fit to all data first."""
    _noise: np.ndarray = field(repr=False)
    """Standard normal, (2, B): of the curve's error, and of a sibling's."""
    _style_map: Callable[[float], float] | None = field(default=None, repr=False)
    residual_share: float = RESIDUAL_SHARE
    transfer: Transfer | None = None
    """Where the pilots are another model's."""

    @property
    def largest(self) -> int:
        return self.points[-1][0]

    def gain(self, num_rows: float) -> float:
        """Expected NLL(untuned) - NLL(num_rows), nats per token."""
        return sum(self.weights[name] * float(values[0]) for name, values in self._gains(num_rows).items())

    def forecast(self, num_rows: int, level: float = LEVEL) -> Forecast:
        """Gain and NLL at `num_rows` with an interval; style gap closed where it is mapped."""
        point = self.gain(num_rows)
        low, high = self._quantiles(num_rows, ((1 - level) / 2, (1 + level) / 2))
        low, high = min(low, point), max(high, point)
        style = None
        if self._style_map:
            style = Interval(self._style_map(point), self._style_map(low), self._style_map(high), level)
        untuned = self.untuned_nll
        return Forecast(
            num_rows, Interval(untuned - point, untuned - high, untuned - low, level), Interval(point, low, high, level), style,
            not self.is_trusted(num_rows),
        )  # fmt: skip

    def is_trusted(self, num_rows: int) -> bool:
        """Whether a verdict may rest on the forecast of `num_rows` rows."""
        return is_trusted(num_rows, self.largest) and (self.transfer is None or self.transfer.is_trusted)

    def forecasts(self, factors: Sequence[float] = FACTORS) -> list[Forecast]:
        """Forecasts at multiples of the largest pilot."""
        return [self.forecast(round(factor * self.largest)) for factor in factors]

    def probability(self, num_rows: int, gain: float) -> float:
        """How likely `num_rows` rows gain at least so many nats per token."""
        values, weights = self._draws(num_rows)
        return float(weights[values >= gain].sum())

    def rows_for_style(self, target: float, max_factor: float = MAX_TRUSTED_FACTOR) -> RowsNeeded | None:
        """Rows at which the style gap closed reaches `target`; None where the P50 does not within `max_factor` x the pilots, or where
        these pilots are not to be trusted."""
        if self._style_map is None or not self.is_trusted(self.largest):
            return None
        point, low, high = (self._first_row(end, target, max_factor) for end in ("point", "high", "low"))
        return None if point is None else RowsNeeded(point, min(low or point, point), high)

    def _first_row(self, end: str, target: float, max_factor: float) -> int | None:
        def reached(num_rows: int) -> bool:
            style = self.forecast(num_rows).style_gap_closed
            return style is not None and getattr(style, end) >= target

        low, high = 0, math.ceil(max_factor * self.largest)
        if not reached(high):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(middle) else (middle + 1, high)
        return low

    def to_dict(self) -> dict[str, Any]:
        return {
            "untuned_nll": self.untuned_nll, "points": self.points, "weights": self.weights, "parameters": self.parameters,
            "leave_largest_out_error": self.leave_largest_out_error, "note": self.transfer.note if self.transfer else "",
        }  # fmt: skip

    def _gains(self, num_rows: float) -> dict[FormName, np.ndarray]:
        """Per form: gain of the fit to all data and of each refit, (1 + B,)."""
        at = np.array([float(num_rows)])
        return {name: amplitudes * FORMS[name].basis(at, shapes)[:, 0] for name, (amplitudes, shapes) in self._fits.items()}

    def _draws(self, num_rows: float) -> tuple[np.ndarray, np.ndarray]:
        """Gains that may come, and their probabilities: the refits of all forms, each moved by an error like those of the past.

        The error is that of the form that missed most: one look at one pilot cannot tell a good form from a lucky one.
        """
        error = self.residual_share * max(self.leave_largest_out_error.values())
        (previous, _), (largest, _) = self.points[-2:]
        distance = max(0.0, math.log(max(num_rows, 1e-9) / largest) / math.log(largest / previous))
        gains = self._gains(num_rows)
        of_curve, of_transfer = self._noise
        values = np.concatenate([gains[name][1:] + error * distance * of_curve for name in gains])
        if self.transfer:
            values *= np.tile(np.exp(self.transfer.log_spread(num_rows) * of_transfer), len(gains))
        weights = np.concatenate([np.full(len(of_curve), self.weights[name] / len(of_curve)) for name in gains])
        return values, weights

    def _quantiles(self, num_rows: float, shares: Sequence[float]) -> list[float]:
        values, weights = self._draws(num_rows)
        order = np.argsort(values)
        reached = np.cumsum(weights[order]) - weights[order] / 2
        return [float(value) for value in np.interp(shares, reached, values[order])]


def fit_curve(
    points: Sequence[CurvePoint], untuned: PerDocument, *, style_points: Sequence[tuple[float, float]] = (), num_bootstrap: int = 500,
    seed: int = 0, transfer: Transfer | None = None,
) -> LearningCurve:  # fmt: skip
    """Fit gain(n) = L0 - L(n) by least squares in every form, anchored at gain(0) = 0, and weight the forms.

    A pilot's square counts as often as it has rows: a curve has to be right where it is continued from.
    `untuned` is the NLL per document of the untuned model. Several points of one size are its seeds; documents, and the seeds of
    each size, are resampled together. `style_points` are measured (gain, style gap closed) pairs; `transfer` says that the points were
    carried over from another model.
    Raises DataError with fewer than two sizes, for NLLs that are no numbers, or where the points were measured on different documents.
    """
    by_size: dict[int, list[np.ndarray]] = {}
    base = _aligned(untuned, untuned)
    for point in sorted(points, key=lambda point: (point.num_rows, point.seed)):
        by_size.setdefault(point.num_rows, []).append(base - _aligned(point.nll_per_document, untuned))
    if len(by_size) < 2 or min(by_size) < 1:
        raise DataError(
            f"A learning curve needs pilots on at least two sizes (given: {sorted(by_size)})",
            place="sizing.pilot_shares", remedy="Name at least three different shares.",
        )  # fmt: skip
    num_rows = np.array([float(size) for size in by_size])
    gains = _resampled([np.stack(rows) for rows in by_size.values()], num_bootstrap, np.random.default_rng(seed))
    untuned_nll = float(base.mean())
    fits = {name: _fit(form, num_rows, gains, untuned_nll) for name, form in FORMS.items()}
    squares = {name: _squared_error(form, num_rows, gains, untuned_nll) for name, form in FORMS.items()}
    inverse = {name: 1 / (square + SMALLEST_ERROR**2) for name, square in squares.items()}
    return LearningCurve(
        untuned_nll, [(size, untuned_nll - float(gain)) for size, gain in zip(by_size, gains[0])],
        {name: value / sum(inverse.values()) for name, value in inverse.items()},
        {name: dict(zip(FORMS[name].parameters, map(float, (amplitudes[0], *shapes[0])))) for name, (amplitudes, shapes) in fits.items()},
        {name: math.sqrt(square) for name, square in squares.items()},
        fits, np.random.default_rng(seed + 1).standard_normal((2, num_bootstrap)), style_map(style_points) if style_points else None,
        transfer=transfer,
    )  # fmt: skip


def style_map(points: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """A monotone map from gain (nats per token) to style gap closed, through (0, 0) and the measured points.

    Isotonic between the points; beyond the last it goes on at the mean slope from the origin, never above 1 (or above
    the largest value measured).
    """
    from sklearn.isotonic import IsotonicRegression

    measured = np.array([(0.0, 0.0), *((float(gain), float(style)) for gain, style in points if gain > 0)])
    x = np.unique(measured[:, 0])
    # The origin is exact by definition, hence its weight.
    isotonic = IsotonicRegression().fit(measured[:, 0], measured[:, 1], sample_weight=[1e6] + [1.0] * (len(measured) - 1))
    y = np.asarray(isotonic.predict(x), dtype=float)
    ceiling = max(1.0, float(y[-1]))
    slope = max(0.0, float(y[-1] / x[-1])) if x[-1] > 0 else 0.0

    def apply(gain: float) -> float:
        if gain <= x[-1]:
            return float(np.interp(gain, x, y)) if gain >= 0 else slope * gain
        return min(ceiling, float(y[-1]) + slope * (gain - float(x[-1])))

    return apply


def _aligned(values: PerDocument, like: PerDocument) -> np.ndarray:
    if isinstance(like, Mapping) != isinstance(values, Mapping) or len(values) != len(like):
        raise DataError("The pilots were not measured on the same documents as the untuned model", remedy="Run `giong size` again.")
    if isinstance(like, Mapping) and isinstance(values, Mapping):
        if set(values) != set(like):
            raise DataError("The pilots were not measured on the same documents as the untuned model", remedy="Run `giong size` again.")
        found = np.array([float(values[document]) for document in sorted(like)])
    else:
        found = np.asarray(values, dtype=float)
    if not np.isfinite(found).all():
        raise DataError(
            f"The likelihood of {int((~np.isfinite(found)).sum())} of {len(found)} held-out documents is no number",
            remedy="A training that diverged does this: lower train.learning_rate and run `giong size` again.",
        )
    return found


def _resampled(gains_of: Sequence[np.ndarray], num_bootstrap: int, generator: np.random.Generator) -> np.ndarray:
    """Mean gain per size, (1 + B, P): of all data, then of each draw of documents and of each size's seeds. `gains_of`: (S, D) each."""
    num_documents = gains_of[0].shape[1]
    documents = generator.multinomial(num_documents, np.full(num_documents, 1 / num_documents), size=num_bootstrap) / num_documents
    columns = []
    for gains in gains_of:
        num_seeds = len(gains)
        seeds = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=num_bootstrap) / num_seeds
        columns.append(np.concatenate([[gains.mean()], np.einsum("bs,sd,bd->b", seeds, gains, documents)]))
    return np.stack(columns, axis=1)


def _fit(form: Form, num_rows: np.ndarray, gains: np.ndarray, untuned_nll: float) -> tuple[np.ndarray, np.ndarray]:
    """Least squares, weighted by rows, for each row of `gains` (B, P): amplitudes (B,) and shapes (B, S). Exact in the amplitude."""
    shapes = form.shapes(float(num_rows[0]), float(num_rows[-1]))
    limit = form.max_amplitude_share * abs(untuned_nll)
    root = np.sqrt(num_rows / num_rows[-1])
    amplitudes, index = _best(form.basis(num_rows, shapes)[None] * root, gains * root, limit)
    chosen = shapes[index]
    if shapes.shape[1] == 1:
        # One finer grid around the winner of each refit makes the shape exact to about 1e-5.
        step = shapes[1, 0] / shapes[0, 0]
        fine = np.minimum(chosen * np.geomspace(1 / step, step, 201), shapes[-1, 0])[:, :, None]
        amplitudes, index = _best(form.basis(num_rows, fine) * root, gains * root, limit)
        chosen = fine[np.arange(len(gains)), index]
    return amplitudes, chosen


def _best(basis: np.ndarray, gains: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """The best amplitude and shape for each row of `gains` (B, P); `basis` is (B or 1, G, P)."""
    products, squares = (basis @ gains[:, :, None])[..., 0], (basis**2).sum(axis=-1)
    amplitudes = np.clip(products / squares, 0.0, limit)
    index = (amplitudes**2 * squares - 2 * amplitudes * products).argmin(axis=1)
    return amplitudes[np.arange(len(gains)), index], index


def _squared_error(form: Form, num_rows: np.ndarray, gains: np.ndarray, untuned_nll: float) -> float:
    """Mean square error (nats per token squared) at the largest pilot of a curve fitted to the others, over all refits.

    Over the refits, because on the data themselves a form may hit by luck.
    """
    amplitudes, shapes = _fit(form, num_rows[:-1], gains[:, :-1], untuned_nll)
    return float(np.mean(np.square(amplitudes * form.basis(num_rows[-1:], shapes)[:, 0] - gains[:, -1])))
