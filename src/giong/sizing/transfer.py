"""A cheaper sibling's learning curve in the place of the model's own: how it is carried over, and how much wider that makes a forecast.

One decision a reader may question: the sibling gives the shape and nothing else. The height comes from the model's own untuned
likelihood and from one training of the model itself, because a larger base gains more or less than a smaller one by a factor that
nobody knows beforehand, while two curves on the same rows seldom drift apart fast (docs/concepts/forecasting.md has the figures).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean

from giong.errors import DataError
from giong.sizing.learning_curve import CurvePoint

Documents = Mapping[str, float]

FACTOR = 2.0
"""Without a training of its own, the model's gain lies within this factor of the sibling's, above or below, with 80 % probability: a judgement."""
FACTOR_PER_DOUBLING = 1.25
"""The same for each doubling of the rows away from the model's own training, up to `FACTOR`. In the calibration study the curves of two
authors, on one model, drift apart by less than 1.19 in 80 % of all pairs when the rows double, and by less than 1.5 when they do so twice."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """The sibling whose curve it is, and the rows of the model's own training; None where there was none. `partial` where the sibling's
    losses are of some of the held-out text only."""

    sibling: str
    own_rows: int | None
    partial: bool = False

    @property
    def is_trusted(self) -> bool:
        """Whether a verdict may rest on what is carried over."""
        return self.own_rows is not None and not self.partial

    def log_spread(self, num_rows: float) -> float:
        """Standard deviation of the logarithm of what the model gains over what the carried curve says."""
        factor = FACTOR
        if self.own_rows is not None:
            factor = min(FACTOR, FACTOR_PER_DOUBLING ** abs(math.log2(max(num_rows, 1e-9) / self.own_rows)))
        return math.log(factor) / NormalDist().inv_cdf(0.9)

    @property
    def note(self) -> str:
        shape = f"The pilots were trained on {self.sibling}: the shape of the curve is that model's."
        if self.partial:
            shape += " Its losses are of a part of the held-out text, which is all that was reported: every forecast is speculative."
        if self.own_rows is None:
            return (
                f"{shape} Its height assumes that this model loses the same share of its untuned loss, and the interval is wider by a factor of "
                f"{FACTOR:g} either way: every forecast is speculative."
            )
        return (
            f"{shape} Its height is that of one training of this model on {self.own_rows} rows, and the interval is wider by a factor of "
            f"{FACTOR_PER_DOUBLING:g} for each doubling away from it, at most {FACTOR:g}."
        )


def carry_over(points: Sequence[CurvePoint], sibling: Documents, untuned: Documents, own: CurvePoint | None) -> list[CurvePoint]:
    """The sibling's pilots as the model's: rows and seeds stay, NLLs per document (nats per token) become what the model's would be.

    `sibling` and `untuned` are the NLLs of both before tuning; the sibling's, and those of its pilots, may be one figure for all documents.
    With `own`, a training of the model, its gain on each document is multiplied by the sibling's mean gain over that at the same rows;
    without, the sibling's gains are multiplied by the ratio of the untuned NLLs (of one figure, each document loses the same share).
    Raises DataError where one of both gained nothing at those rows: then the one curve says nothing about the other.
    """
    gains = [_gains(point, sibling) for point in points]
    if own is None and set(sibling) != set(untuned):
        carried = [{name: nll * fmean(row.values()) / fmean(sibling.values()) for name, nll in untuned.items()} for row in gains]
    elif own is None:
        ratio = fmean(untuned.values()) / fmean(sibling.values())
        carried = [{name: ratio * gain for name, gain in row.items()} for row in gains]
    else:
        at_own = fmean(fmean(row.values()) for point, row in zip(points, gains) if point.num_rows == own.num_rows)
        own_gains = _gains(own, untuned)
        if min(at_own, fmean(own_gains.values())) <= 0:
            raise DataError(
                f"On {own.num_rows} rows the sibling gained {at_own:.3f} nats per token and the model {fmean(own_gains.values()):.3f}: the one "
                "curve says nothing about the other", place="sizing",
                remedy="Train the pilots on the model itself (leave pilot_model and pilot_remote out), or set own_pilot to largest.",
            )  # fmt: skip
        carried = [{name: gain * fmean(row.values()) / at_own for name, gain in own_gains.items()} for row in gains]
    return [
        replace(point, nll_per_document={name: untuned[name] - gain for name, gain in row.items()}) for point, row in zip(points, carried)
    ]


def _gains(point: CurvePoint, untuned: Documents) -> dict[str, float]:
    assert isinstance(point.nll_per_document, Mapping)
    return {name: nll - point.nll_per_document[name] for name, nll in untuned.items()}
