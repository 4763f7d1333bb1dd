"""What more rows would buy: a curve through the pilots, anchored at the untuned model.

The default is the anchored two-parameter log form, which forecast best up to eightfold in our pilot study and never needs
an asymptote that the data cannot show; nominal intervals covered too little there, so ours are widened by half.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from giong.errors import DataError
from giong.sizing.interval import Interval

PerDocument = Mapping[str, float] | Sequence[float] | np.ndarray
"""Mean NLL (nats per token) of each held-out document: by document id, or in one fixed order."""

INFLATION = 1.5
LEVEL = 0.8
MAX_TRUSTED_FACTOR = 4
NUM_GRID = 600
RECTIFIED_ADVANTAGE = 0.5
"""The rectified form is only taken where its leave-largest-out error is below this share of the log form's."""

FormName = Literal["log", "rectified"]


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One pilot: trained on `num_rows` rows, measured on the same held-out documents as every other point."""

    num_rows: int
    nll_per_document: PerDocument


@dataclass(frozen=True, slots=True)
class Forecast:
    """What `num_rows` rows would give. `gain` is NLL(untuned) - NLL, nats per token; `speculative` beyond 4x the pilots."""

    num_rows: int
    nll: Interval
    gain: Interval
    style_gap_closed: Interval | None
    speculative: bool

    @property
    def label(self) -> str:
        return f"{self.num_rows} rows" + (" (speculative)" if self.speculative else "")


@dataclass(frozen=True, slots=True)
class Form:
    """gain(n) = amplitude * basis(n; shape): the amplitude is linear, the shape parameters lie on a grid."""

    name: FormName
    shapes: Callable[[float, float], np.ndarray]
    basis: Callable[[np.ndarray, np.ndarray], np.ndarray]
    max_amplitude_share: float


def _log_shapes(smallest: float, largest: float) -> np.ndarray:
    # Above four times the largest pilot the curve is a straight line, which no forecast should follow.
    return np.geomspace(max(smallest / 50, 1e-3), 4 * largest, NUM_GRID)[:, None]


def _log_basis(num_rows: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    return np.log1p(num_rows[None, :] / shapes[:, :1])


def _rectified_shapes(smallest: float, largest: float) -> np.ndarray:
    scales = np.geomspace(smallest / 10, 40 * largest, 120)
    return np.array([(scale, beta) for beta in np.linspace(0.1, 1.0, 19) for scale in scales])


def _rectified_basis(num_rows: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    power = (num_rows[None, :] / shapes[:, :1]) ** shapes[:, 1:2]
    return power / (1 + power)


FORMS: dict[FormName, Form] = {
    # L(n) = L0 - a ln(1 + n/n0), a >= 0
    "log": Form("log", _log_shapes, _log_basis, math.inf),
    # L(n) = E + (L0 - E) / (1 + (n/n0)^beta), E >= L0 / 2 (after Lin et al. 2024, 2402.02314)
    "rectified": Form("rectified", _rectified_shapes, _rectified_basis, 0.5),
}


@dataclass
class LearningCurve:
    """A fitted curve with its bootstrap refits; `parameters` are a and n0 (log) or L0 - E, n0 and beta (rectified)."""

    form: FormName
    untuned_nll: float
    parameters: dict[str, float]
    points: list[tuple[int, float]]
    leave_largest_out_error: dict[str, float]
    _amplitudes: np.ndarray = field(repr=False)
    _shapes: np.ndarray = field(repr=False)
    _point_amplitude: float = field(repr=False)
    _point_shape: np.ndarray = field(repr=False)
    _style_map: Callable[[float], float] | None = field(default=None, repr=False)

    @property
    def largest(self) -> int:
        return self.points[-1][0]

    def gain(self, num_rows: float) -> float:
        """Expected NLL(untuned) - NLL(num_rows), nats per token."""
        basis = FORMS[self.form].basis(np.array([float(num_rows)]), self._point_shape[None, :])
        return float(self._point_amplitude * basis[0, 0])

    def forecast(self, num_rows: int, level: float = LEVEL) -> Forecast:
        """Gain and NLL at `num_rows` with an interval (document bootstrap, widened 1.5x); style gap closed where mapped."""
        point = self.gain(num_rows)
        draws = self._amplitudes * FORMS[self.form].basis(np.array([float(num_rows)]), self._shapes)[:, 0]
        low, high = (point + INFLATION * (end - point) for end in np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]))
        low, high = min(float(low), point), max(float(high), point)
        style = None
        if self._style_map:
            style = Interval(self._style_map(point), self._style_map(low), self._style_map(high), level)
        untuned = self.untuned_nll
        return Forecast(
            num_rows, Interval(untuned - point, untuned - high, untuned - low, level), Interval(point, low, high, level), style,
            num_rows > MAX_TRUSTED_FACTOR * self.largest,
        )  # fmt: skip

    def forecasts(self, factors: Sequence[float] = (1, 2, 4)) -> list[Forecast]:
        """Forecasts at multiples of the largest pilot."""
        return [self.forecast(round(factor * self.largest)) for factor in factors]

    def rows_for_style(self, target: float, max_factor: float = MAX_TRUSTED_FACTOR) -> int | None:
        """Fewest rows at which the expected style gap closed reaches `target`; None within `max_factor` x the pilots."""
        style_map = self._style_map
        if not style_map or style_map(self.gain(max_factor * self.largest)) < target:
            return None
        low, high = 0, math.ceil(max_factor * self.largest)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if style_map(self.gain(middle)) >= target else (middle + 1, high)
        return low

    def to_dict(self) -> dict[str, Any]:
        return {
            "form": self.form, "untuned_nll": self.untuned_nll, "parameters": self.parameters, "points": self.points,
            "leave_largest_out_error": self.leave_largest_out_error,
        }  # fmt: skip


def fit_curve(
    points: Sequence[CurvePoint], untuned: PerDocument, *, style_points: Sequence[tuple[float, float]] = (),
    form: FormName | Literal["auto"] = "auto", num_bootstrap: int = 500, seed: int = 0,
) -> LearningCurve:  # fmt: skip
    """Fit gain(n) = L0 - L(n) by least squares, anchored at gain(0) = 0.

    `untuned` is the NLL per document of the untuned model. `style_points` are measured (gain, style gap closed) pairs.
    Raises DataError with fewer than two slices, or where the points were measured on different documents.
    """
    ordered = sorted(points, key=lambda point: point.num_rows)
    if len({point.num_rows for point in ordered}) < 2 or ordered[0].num_rows < 1:
        raise DataError(
            f"A learning curve needs pilots on at least two sizes (given: {[point.num_rows for point in ordered]})",
            place="sizing.pilot_shares", remedy="Name at least three different shares.",
        )  # fmt: skip
    num_rows = np.array([float(point.num_rows) for point in ordered])
    gains_per_document, untuned_nll = _gains(ordered, untuned)
    num_documents = gains_per_document.shape[1]
    draws = np.random.default_rng(seed).multinomial(num_documents, np.full(num_documents, 1 / num_documents), size=num_bootstrap)
    gains = gains_per_document.mean(axis=1)
    errors = {name: _leave_largest_out(FORMS[name], num_rows, gains, untuned_nll) for name in FORMS}
    chosen: FormName = form if form != "auto" else _choose(errors)
    amplitudes, shapes = _fit(FORMS[chosen], num_rows, (draws @ gains_per_document.T) / num_documents, untuned_nll)
    (amplitude,), (shape,) = _fit(FORMS[chosen], num_rows, gains[None, :], untuned_nll)
    names = ("a", "n0") if chosen == "log" else ("L0-E", "n0", "beta")
    return LearningCurve(
        chosen, untuned_nll, dict(zip(names, map(float, (amplitude, *shape)))),
        [(point.num_rows, untuned_nll - float(gain)) for point, gain in zip(ordered, gains)], errors,
        amplitudes, shapes, float(amplitude), shape, style_map(style_points) if style_points else None,
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


def _gains(points: Sequence[CurvePoint], untuned: PerDocument) -> tuple[np.ndarray, float]:
    """Gains per point and document, shape (P, D), and the untuned mean."""
    base = _aligned(untuned, untuned)
    rows = [_aligned(point.nll_per_document, untuned) for point in points]
    return base[None, :] - np.stack(rows), float(base.mean())


def _aligned(values: PerDocument, like: PerDocument) -> np.ndarray:
    if isinstance(like, Mapping) != isinstance(values, Mapping) or len(values) != len(like):
        raise DataError("The pilots were not measured on the same documents as the untuned model", remedy="Run `giong size` again.")
    if isinstance(like, Mapping) and isinstance(values, Mapping):
        if set(values) != set(like):
            raise DataError("The pilots were not measured on the same documents as the untuned model", remedy="Run `giong size` again.")
        return np.array([float(values[document]) for document in sorted(like)])
    return np.asarray(values, dtype=float)


def _fit(form: Form, num_rows: np.ndarray, gains: np.ndarray, untuned_nll: float) -> tuple[np.ndarray, np.ndarray]:
    """Least squares for each row of `gains` (B, P): amplitudes (B,) and shapes (B, S). Exact in the amplitude."""
    shapes = form.shapes(float(num_rows[0]), float(num_rows[-1]))
    best = _best(form, num_rows, gains, untuned_nll, shapes)
    amplitude, index = best
    chosen = shapes[index]
    if form.name == "log":
        # One finer grid around the winner of each refit makes the shape exact to about 1e-5.
        step = shapes[1, 0] / shapes[0, 0]
        limit = shapes[-1, 0]
        for row in range(len(gains)):
            fine = np.minimum(chosen[row, 0] * np.geomspace(1 / step, step, 201), limit)[:, None]
            fine_amplitude, fine_index = _best(form, num_rows, gains[row : row + 1], untuned_nll, fine)
            amplitude[row], chosen[row] = fine_amplitude[0], fine[fine_index[0]]
    return amplitude, chosen


def _best(form: Form, num_rows: np.ndarray, gains: np.ndarray, untuned_nll: float, shapes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    basis = form.basis(num_rows, shapes)
    amplitudes = (gains @ basis.T) / (basis**2).sum(axis=1)
    amplitudes = np.clip(amplitudes, 0.0, form.max_amplitude_share * abs(untuned_nll))
    errors = amplitudes**2 * (basis**2).sum(axis=1) - 2 * amplitudes * (gains @ basis.T)
    index = errors.argmin(axis=1)
    return amplitudes[np.arange(len(gains)), index], index


def _leave_largest_out(form: Form, num_rows: np.ndarray, gains: np.ndarray, untuned_nll: float) -> float:
    """Absolute error (nats per token) at the largest pilot of a curve fitted to the others."""
    (amplitude,), (shape,) = _fit(form, num_rows[:-1], gains[None, :-1], untuned_nll)
    return float(abs(amplitude * form.basis(num_rows[-1:], shape[None, :])[0, 0] - gains[-1]))


def _choose(errors: Mapping[str, float]) -> FormName:
    return "rectified" if errors["rectified"] < RECTIFIED_ADVANTAGE * errors["log"] - 1e-3 else "log"
