"""Do raters agree? Krippendorff's alpha over all of them, Cohen's kappa for every two, both beyond what chance would bring."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True, slots=True)
class RaterPair:
    """Two raters on the pairs that both judged. `kappa` is None where both chose the same every time: there is no chance to beat."""

    raters: tuple[str, str]
    num_common: int
    agreement: float
    kappa: float | None


def krippendorff_alpha(units: Sequence[Sequence[Hashable]]) -> float | None:
    """Alpha for nominal values (Krippendorff 2011, section C): 1 is perfect, 0 what chance brings, below 0 is disagreement.

    A unit is all that was said about one thing, by whoever said it; units with one value tell nothing. None where nothing was judged
    twice, or where everything is of one value.
    """
    units = [unit for unit in units if len(unit) > 1]
    totals = Counter(value for unit in units for value in unit)
    num_values = totals.total()
    expected = num_values**2 - sum(count**2 for count in totals.values())
    if not expected:
        return None
    disagreeing = sum((len(unit) ** 2 - sum(count**2 for count in Counter(unit).values())) / (len(unit) - 1) for unit in units)
    return 1 - (num_values - 1) * disagreeing / expected


def rater_pairs(units: Sequence[Mapping[str, str]]) -> list[RaterPair]:
    """Every two raters who judged something in common; a unit maps raters to what they chose."""
    from sklearn.metrics import cohen_kappa_score

    found = []
    for raters in combinations(sorted({rater for unit in units for rater in unit}), 2):
        first, second = ([unit[rater] for unit in units if set(raters) <= set(unit)] for rater in raters)
        if first:
            with warnings.catch_warnings():
                # Of one value throughout: sklearn divides nought by nought and warns; the NaN becomes None below.
                warnings.simplefilter("ignore")
                kappa = float(cohen_kappa_score(first, second))
            agreement = sum(one == other for one, other in zip(first, second)) / len(first)
            found.append(RaterPair(raters, len(first), agreement, None if math.isnan(kappa) else kappa))
    return found
