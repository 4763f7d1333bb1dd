"""What a report is made from: plain values, nearly all of them optional, because a report may be asked for at any step.

Everything is as `to_dict` or `dataclasses.asdict` leaves it; what is missing is printed as "not available" and never as zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from giong.sizing.learning_curve import LearningCurve

NUM_BAND_POINTS = 33
FORECAST_FACTORS = (2, 4, 8)


@dataclass(frozen=True)
class ReportContent:
    """All that the page shows. Only `project` and `date` (ISO 8601) are needed.

    - `author`, `consent`: whose writing it is, and the line about the consent to imitate it.
    - `evaluation`: `Evaluation.to_dict()`; `verdict`: `Verdict.to_dict()`; `curve`: `curve_content(LearningCurve)`, or its
      `to_dict()`, which has neither band nor forecasts.
    - `losses`: `step`, `loss` (nats per token), optionally `learning_rate` and `validation_loss`.
    - `probes`: arm name -> `ProbeScores.to_dict()`, of the base and the tuned arm.
    - `tasks`: task of lm-evaluation-harness -> `metric`, `num_documents`, and the intervals `base`, `fine_tuned` and `difference`.
    - `facts`: way of answering the question set -> `FactScores` as a dict; empty without one.
    - `samples`: `request`, `author` (the author's answer), `answers` (arm name -> text), optionally `document_id`.
    - `judge`: `Judgement.to_dict()` with the arms' `labels` and, where people have voted too, `agreement` as a `RaterPair`.
    - `votes`: `compare.Results.to_dict()`, empty where nobody has voted.
    - `journal`: `goal`, `learnt`, `next`, `notes` (`text`, `by`, `time`), `handwritten`, and `attempts`, rows of cells under `header`.
    - `costs`: `stage`, `seconds`, `usd`, `tokens`, each but the first may be None.
    - `backends`: `BackendEstimate` as dicts; `usage`: arm name -> `Usage` as a dict; `bills`: `Bill` as dicts.
    - `data`: `num_documents`, `num_passages`, `num_words`, `num_kept`, `num_dropped`, `num_skipped`, `entries` (`place`, `status`,
      `reason` as in an `ImportReport`), `left_out` (`passage_id`, `kind`, `reason`), `split` (side -> `documents`, `passages`,
      `examples`), `split_method`, and `synthesis`: `source` ("teacher", "recorded" or "stand_in"), `teacher`, `kinds`.
    - `settings`: `config` (all of giong.yaml, nested) and `resolved` (`name`, `value`, `reason`).
    - `methods`, `objectives`: the results of `compare-methods` and `compare-objectives` with their `evaluation`.
    - `hashes`: name -> hash or version, or name -> such a dict.
    - `tuned_arms`: names of the arms that were trained, as given to `evaluate`.
    """

    project: str
    date: str
    is_demo: bool = False
    author: str = ""
    consent: str = ""
    model_name: str = ""
    num_parameters: int | None = None
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    verdict: Mapping[str, Any] | None = None
    curve: Mapping[str, Any] | None = None
    losses: Sequence[Mapping[str, Any]] = ()
    probes: Mapping[str, Any] = field(default_factory=dict)
    tasks: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
    votes: Mapping[str, Any] = field(default_factory=dict)
    judge: Mapping[str, Any] = field(default_factory=dict)
    journal: Mapping[str, Any] = field(default_factory=dict)
    costs: Sequence[Mapping[str, Any]] = ()
    backends: Sequence[Mapping[str, Any]] = ()
    usage: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    bills: Sequence[Mapping[str, Any]] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    methods: Mapping[str, Any] = field(default_factory=dict)
    objectives: Mapping[str, Any] = field(default_factory=dict)
    hashes: Mapping[str, Any] = field(default_factory=dict)
    notices: Sequence[str] = ()
    command: str = ""
    tuned_arms: Sequence[str] = ("fine_tuned",)

    @property
    def synthesis_source(self) -> str:
        return str((self.data.get("synthesis") or {}).get("source") or "")

    @property
    def uses_stand_in(self) -> bool:
        """Whether the requests were written by rules and not by a teacher model."""
        return self.synthesis_source.replace("-", "_") == "stand_in"


def curve_content(curve: LearningCurve, factors: Sequence[float] = FORECAST_FACTORS) -> dict[str, Any]:
    """`curve.to_dict()` with `forecasts` at multiples of the largest pilot and a `band`, both lists of forecasts as dicts."""
    smallest, largest = curve.points[0][0], curve.largest * max(factors)
    steps = [math.exp(math.log(largest / smallest) * index / (NUM_BAND_POINTS - 1)) for index in range(NUM_BAND_POINTS)]
    rows = sorted({round(smallest * step) for step in steps})
    return {
        **curve.to_dict(),
        "forecasts": [asdict(forecast) for forecast in curve.forecasts(factors)],
        "band": [asdict(curve.forecast(num_rows)) for num_rows in rows],
    }
