"""What remote fine-tuning, remote inference and rented GPUs cost: dated rows, each with its source.

Prices age within months, so a row without a date cannot be made, every quote carries its date, and old rows are said to be old.
Vendors whose price was found only without a date (Together, Ori) or only as a formula are left out. Where sources disagree
the table keeps all of them and quotes a range; a rate of the user's own replaces it.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

from giong.errors import ConfigError

Confidence = Literal["mirror", "secondary", "example", "user"]
"""Copy of the vendor's page elsewhere; third-party page; a figure that the vendor itself calls an example; the user's own."""

MAX_PRICE_AGE_DAYS = 365
"""A price older than this is quoted with a warning, unless the user sets another limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dated:
    """What every row carries. `as_of` is the oldest day that the figure may stem from."""

    as_of: date
    source: str
    confidence: Confidence

    def age_days(self, today: date) -> int:
        return (today - self.as_of).days

    def warning(self, today: date, max_age_days: int = MAX_PRICE_AGE_DAYS) -> str:
        """A sentence if the row is older than the limit, otherwise empty."""
        age = self.age_days(today)
        return f"The price is from {self.as_of:%B %Y}, {age} days ago: check it." if age > max_age_days else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuningPrice(Dated):
    """Remote fine-tuning of one base model. Token prices are US dollars per million; None: not published or not offered.

    `training_closes` is the first day on which nobody can start a job; `shuts_down` the last day of tuned versions.
    """

    vendor: str
    model: str
    training_usd_per_million_tokens: float | None = None
    training_usd_per_hour: float | None = None
    input_usd_per_million_tokens: float | None = None
    cached_input_usd_per_million_tokens: float | None = None
    output_usd_per_million_tokens: float | None = None
    hosting_usd_per_hour: float | None = None
    training_closes: date | None = None
    shuts_down: date | None = None
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.vendor} {self.model}"

    def is_open(self, today: date) -> bool:
        """Whether a new job can be started on that day, as far as the table knows."""
        return all(closing is None or today < closing for closing in (self.training_closes, self.shuts_down))


@dataclass(frozen=True, slots=True, kw_only=True)
class InferencePrice(Dated):
    """Remote inference with an untuned model, US dollars per million tokens."""

    vendor: str
    model: str
    input_usd_per_million_tokens: float
    output_usd_per_million_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RentalPrice(Dated):
    """A rented GPU, US dollars per GPU-hour; a single figure has equal bounds. `gpu` is a name of the reference table."""

    gpu: str
    low_usd_per_hour: float
    high_usd_per_hour: float


OPENAI_TRAINING_CLOSES = date(2027, 1, 6)
_OPENAI_LAST_BASES_SHUT_DOWN = date(2027, 1, 14)
_OPENAI_FIRST_BASES_SHUT_DOWN = date(2026, 10, 23)
_OPENAI_NOTE = "Only organisations that fine-tuned there before can start jobs; the rate may no longer be published."


def _openai(
    model: str,
    training: float | None,
    inputs: float,
    cached: float | None,
    outputs: float,
    shuts_down: date | None,
    per_hour: float | None = None,
) -> FineTuningPrice:
    return FineTuningPrice(
        vendor="OpenAI",
        model=model,
        training_usd_per_million_tokens=training,
        training_usd_per_hour=per_hour,
        input_usd_per_million_tokens=inputs,
        cached_input_usd_per_million_tokens=cached,
        output_usd_per_million_tokens=outputs,
        training_closes=OPENAI_TRAINING_CLOSES,
        shuts_down=shuts_down,
        note=_OPENAI_NOTE if shuts_down else f"{_OPENAI_NOTE} Whether this base is still offered is not known.",
        as_of=date(2025, 10, 1),
        source="mirror of OpenAI's pricing page, dated by its contents to October to December 2025",
        confidence="mirror",
    )


FINE_TUNING_PRICES: tuple[FineTuningPrice, ...] = (
    _openai("gpt-4.1-2025-04-14", 25.00, 3.00, 0.75, 12.00, _OPENAI_LAST_BASES_SHUT_DOWN),
    _openai("gpt-4.1-mini", 5.00, 0.80, 0.20, 3.20, _OPENAI_LAST_BASES_SHUT_DOWN),
    _openai("gpt-4.1-nano", 1.50, 0.20, 0.05, 0.80, _OPENAI_FIRST_BASES_SHUT_DOWN),
    _openai("gpt-4o-2024-08-06", 25.00, 3.75, 1.875, 15.00, _OPENAI_LAST_BASES_SHUT_DOWN),
    _openai("gpt-4o-mini-2024-07-18", 3.00, 0.30, 0.15, 1.20, _OPENAI_LAST_BASES_SHUT_DOWN),
    _openai("o4-mini-2025-04-16 (RFT)", None, 4.00, 1.00, 16.00, _OPENAI_FIRST_BASES_SHUT_DOWN, per_hour=100.0),
    _openai("gpt-3.5-turbo", 8.00, 3.00, None, 6.00, _OPENAI_FIRST_BASES_SHUT_DOWN),
    _openai("davinci-002", 6.00, 12.00, None, 12.00, None),
    _openai("babbage-002", 0.40, 1.60, None, 1.60, None),
    FineTuningPrice(
        vendor="Azure OpenAI",
        model="gpt-4.1 (global)",
        training_usd_per_million_tokens=2.00,
        hosting_usd_per_hour=1.70,
        training_closes=date(2027, 4, 14),
        shuts_down=date(2027, 10, 14),
        note="Existing customers only. The end is the earliest planned. A deployment costs $1.70 per hour, used or not.",
        as_of=date(2026, 2, 11),
        source="Microsoft Learn, cost page of 2026-02-11",
        confidence="example",
    ),
    FineTuningPrice(
        vendor="Azure OpenAI",
        model="o4-mini (RFT)",
        training_usd_per_hour=100.0,
        hosting_usd_per_hour=1.70,
        training_closes=date(2027, 4, 16),
        shuts_down=date(2027, 10, 16),
        note="Existing customers only. The end is the earliest planned. Grader tokens come on top; the job pauses at $5,000.",
        as_of=date(2026, 2, 11),
        source="Microsoft Learn, cost page of 2026-02-11",
        confidence="example",
    ),
)


def _base(model: str, inputs: float, outputs: float) -> InferencePrice:
    return InferencePrice(
        vendor="OpenAI",
        model=model,
        input_usd_per_million_tokens=inputs,
        output_usd_per_million_tokens=outputs,
        as_of=date(2026, 3, 1),
        source="deploybase, March 2026",
        confidence="secondary",
    )


INFERENCE_PRICES: tuple[InferencePrice, ...] = (
    _base("gpt-4.1", 2.00, 8.00),
    _base("gpt-4.1-mini", 0.40, 1.60),
    _base("gpt-4.1-nano", 0.10, 0.40),
    _base("gpt-4o", 2.50, 10.00),
    _base("gpt-4o-mini", 0.15, 0.60),
    _base("gpt-5.4", 2.50, 15.00),
    _base("gpt-5-mini", 0.25, 2.00),
)


def _rental(gpu: str, low: float, high: float, as_of: date, source: str) -> RentalPrice:
    return RentalPrice(gpu=gpu, low_usd_per_hour=low, high_usd_per_hour=high, as_of=as_of, source=source, confidence="secondary")


def _runpod(gpu: str, spot: float, on_demand: float) -> RentalPrice:
    return _rental(gpu, spot, on_demand, date(2026, 3, 1), "RunPod, spot to on demand (deploybase, March 2026)")


RENTAL_PRICES: tuple[RentalPrice, ...] = (
    _runpod("RTX 3090", 0.22, 0.39),
    _runpod("RTX 4090", 0.34, 0.60),
    _runpod("L4", 0.44, 0.78),
    _rental("L4", 1.212, 1.212, date(2024, 1, 1), "AWS g6.2xlarge (philschmid, 2024)"),
    _runpod("L40S", 0.79, 1.40),
    _runpod("A100 PCIe", 1.19, 2.10),
    _runpod("A100 SXM", 1.39, 2.45),
    _rental("A100 PCIe", 0.80, 3.00, date(2026, 5, 1), "Mercatus, May 2026"),
    _rental("A100 SXM", 0.80, 3.00, date(2026, 5, 1), "Mercatus, May 2026"),
    _runpod("H100 PCIe", 1.99, 3.51),
    _runpod("H100 SXM", 2.69, 4.76),
    _rental("H100 PCIe", 1.99, 5.00, date(2026, 5, 1), "Mercatus, May 2026"),
    _rental("H100 SXM", 1.99, 5.00, date(2026, 5, 1), "Mercatus, May 2026"),
    _runpod("H200", 3.59, 6.35),
    _rental("H200", 2.50, 7.00, date(2026, 5, 1), "Mercatus, May 2026"),
    _rental("H200", 3.41, 3.41, date(2026, 4, 18), "spot (gpumarkets, 2026-04-18)"),
    _runpod("B200", 5.98, 10.57),
)
"""Sources that say A100 or H100 without the version stand under both versions."""


def rental_price(
    gpu: str, today: date, max_age_days: int = MAX_PRICE_AGE_DAYS, rows: Sequence[RentalPrice] = RENTAL_PRICES
) -> RentalPrice | None:
    """The range over all rows of a GPU; rows older than the limit only count when there is no younger one. None: no row.

    The answer carries the date of its oldest part.
    """
    known = [row for row in rows if row.gpu == gpu]
    young = [row for row in known if row.age_days(today) <= max_age_days] or known
    if not young:
        return None
    return _rental(
        gpu,
        min(row.low_usd_per_hour for row in young),
        max(row.high_usd_per_hour for row in young),
        min(row.as_of for row in young),
        "; ".join(dict.fromkeys(row.source for row in young)),
    )


def token_cost_usd(price: FineTuningPrice | InferencePrice, num_prompt_tokens: float, num_completion_tokens: float) -> float | None:
    """What reading and writing so many tokens costs; None where the row has no such price."""
    inputs, outputs = price.input_usd_per_million_tokens, price.output_usd_per_million_tokens
    if inputs is None or outputs is None:
        return None
    return (inputs * num_prompt_tokens + outputs * num_completion_tokens) / 1e6


@dataclass(frozen=True, slots=True)
class PriceTable:
    """All prices that a project reckons with."""

    fine_tuning: tuple[FineTuningPrice, ...] = FINE_TUNING_PRICES
    inference: tuple[InferencePrice, ...] = INFERENCE_PRICES
    rental: tuple[RentalPrice, ...] = RENTAL_PRICES

    def base_of(self, tuned: FineTuningPrice) -> InferencePrice | None:
        """What the same vendor charges for the untuned model: the longest name that the tuned one's begins with."""
        rows = [row for row in self.inference if row.vendor == tuned.vendor and f"{tuned.model}-".startswith(f"{row.model}-")]
        return max(rows, key=lambda row: len(row.model), default=None)


BUILT_IN_PRICES = PriceTable()

ROWS = {"fine_tuning": FineTuningPrice, "inference": InferencePrice, "rental": RentalPrice}


def read_prices(path: Path) -> PriceTable:
    """The table with the user's own rows: YAML lists `fine_tuning`, `inference` and `rental` with the fields of those classes.

    A row replaces all rows of the same vendor and model, or GPU. Only `as_of` has to be given beside the prices. Raises ConfigError for
    what cannot be read, an unknown field, a price below 0, and a row without a date.
    """
    import yaml

    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"The prices cannot be read: {reason}", place=str(path), remedy="Correct budget.prices.") from None
    if not isinstance(given, dict) or (unknown := set(given) - set(ROWS)):
        what = f"{sorted(unknown)[0]!r} is no list of prices" if isinstance(given, dict) else "This is no mapping"
        raise ConfigError(what, place=str(path), remedy=f"Known here: {', '.join(ROWS)}.")
    changed: dict[str, Any] = {}
    for section, rows in given.items():
        own = [_own_row(ROWS[section], row, f"{path}: {section}[{number}]") for number, row in enumerate(rows or (), start=1)]
        replaced = {_priced(row) for row in own}
        changed[section] = (*own, *(row for row in getattr(BUILT_IN_PRICES, section) if _priced(row) not in replaced))
    return dataclasses.replace(BUILT_IN_PRICES, **changed)


def _priced(row: Any) -> tuple[str, ...]:
    return (row.gpu,) if isinstance(row, RentalPrice) else (row.vendor, row.model)


def _own_row(kind: type, row: Any, place: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(row, dict) or (unknown := set(row) - set(fields)):
        what = f"Unknown field {sorted(unknown)[0]!r}" if isinstance(row, dict) else "This is no row of prices"
        raise ConfigError(what, place=place, remedy=f"Known here: {', '.join(fields)}.")
    if not isinstance(row.get("as_of"), datetime.date):
        raise ConfigError(
            f"This price has no date (as_of: {row.get('as_of')!r})", place=place, remedy="Add the day it was looked up: as_of: 2026-11-01."
        )
    for name, value in row.items():
        if "_usd_" in f"_{name}" and not (isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0):
            raise ConfigError(f"{name} is {value!r}, not an amount of dollars", place=place, remedy="Write a number from 0 on.")
    try:
        return kind(**{"source": "your own price", "confidence": "user", **row})
    except TypeError as error:
        missing = str(error).partition("argument")[2].strip("s: ") or str(error)
        raise ConfigError(f"This price lacks {missing}", place=place, remedy="Add it.") from None
