"""What a tuned model costs where it can be trained and asked, and after how many calls that has paid for itself against a prompt.

Arithmetic on prices and on the tokens and seconds that the arms' own replies recorded. Each prompting arm is reckoned on the untuned
model of the same place, or at what its calls did cost where it ran elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date

from giong.contracts import Reply
from giong.sizing.estimate import THIS_MACHINE, can_quote
from giong.sizing.prices import MAX_PRICE_AGE_DAYS, PriceTable, token_cost_usd

MONTHS_AHEAD = 12
HOURS_PER_MONTH = 365 * 24 / 12


@dataclass(frozen=True, slots=True)
class BreakEven:
    """`num_calls` until fine-tuning has cost no more than prompting (infinite if never), and how many months that takes."""

    num_calls: float
    saving_usd_per_call: float
    months: float
    worthwhile: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What one call to an arm takes on average: tokens, seconds, and (of a remote arm) what it was charged."""

    prompt_tokens: float
    completion_tokens: float
    seconds: float
    usd: float = 0.0


@dataclass(frozen=True, slots=True)
class Bill:
    """A place to train and ask a tuned model. None: not offered or not published there.

    `usd_per_month` is for the calls of a month, without hosting. `break_even` has an entry per prompting arm that can be priced.
    """

    name: str
    training_usd: float | None
    evaluation_usd: float | None
    hosting_usd_per_month: float | None
    usd_per_month: float | None
    break_even: Mapping[str, BreakEven] = field(default_factory=dict)
    as_of: date | None = None
    source: str = ""
    notes: tuple[str, ...] = ()


def mean_usage(replies: Sequence[Reply]) -> Usage:
    """The means over an arm's replies."""
    num = len(replies)
    return Usage(
        sum(reply.num_prompt_tokens for reply in replies) / num, sum(reply.num_completion_tokens for reply in replies) / num,
        sum(reply.seconds for reply in replies) / num, sum(reply.cost_usd for reply in replies) / num,
    )  # fmt: skip


def break_even(*, fixed_usd: float, saving_usd_per_call: float, hosting_usd_per_month: float, requests_per_month: float) -> BreakEven:
    """Calls to break even: N = (training + evaluation + hosting * months) / saving per call.

    Hosting runs on by the month, so it is first taken off the month's saving: N = fixed cost / (saving - hosting per call).
    Worthwhile means: within twelve months.
    """
    if requests_per_month <= 0:
        net = saving_usd_per_call if hosting_usd_per_month == 0 else -math.inf
    else:
        net = saving_usd_per_call - hosting_usd_per_month / requests_per_month
    num_calls = 0.0 if fixed_usd <= 0 and net >= 0 else fixed_usd / net if net > 0 else math.inf
    months = 0.0 if num_calls == 0 else num_calls / requests_per_month if requests_per_month > 0 else math.inf
    worthwhile = months <= MONTHS_AHEAD
    if not math.isfinite(num_calls):
        reason = "A call to the tuned model costs no less than a call with the prompt: it is worth it for quality only."
    elif not math.isfinite(months):
        reason = f"It pays for itself after {math.ceil(num_calls):,} calls."
    else:
        reason = f"It pays for itself after {math.ceil(num_calls):,} calls, {months:.1f} months at {requests_per_month:,.0f} calls a month."
        reason += "" if worthwhile else " That is more than a year: tune for quality, not for cost."
    return BreakEven(num_calls, saving_usd_per_call, months, worthwhile, reason)


def local_bill(
    tuned: Usage, arms: Mapping[str, Usage], *, training_seconds: float, evaluation_seconds: float, usd_per_hour: float,
    hosting_usd_per_month: float = 0.0, requests_per_month: float = 0.0,
) -> Bill:  # fmt: skip
    """This machine at its price per hour; an arm that was charged for its calls costs that instead of time."""
    per_second = usd_per_hour / 3600
    training, evaluation, call = training_seconds * per_second, evaluation_seconds * per_second, tuned.seconds * per_second
    found = {
        name: break_even(
            fixed_usd=training + evaluation, saving_usd_per_call=(arm.usd or arm.seconds * per_second) - call,
            hosting_usd_per_month=hosting_usd_per_month, requests_per_month=requests_per_month,
        )
        for name, arm in arms.items()
        if arm.usd or usd_per_hour
    }  # fmt: skip
    notes = () if usd_per_hour else ("Neither electricity nor rent is counted: set budget.usd_per_hour.",)
    return Bill(THIS_MACHINE, training, evaluation, hosting_usd_per_month, call * requests_per_month, found, notes=notes)


def provider_bills(
    tuned: Usage, arms: Mapping[str, Usage], *, num_training_tokens: int, num_evaluated: int, prices: PriceTable, today: date,
    requests_per_month: float = 0.0, max_price_age_days: int = MAX_PRICE_AGE_DAYS,
) -> list[Bill]:  # fmt: skip
    """Every provider that still takes jobs by the token. Tokens are counted by this project's tokenizer, so that all is approximate.

    Evaluation is one answer of the tuned model to each of `num_evaluated` requests.
    """
    bills = []
    for price in prices.fine_tuning:
        if not can_quote(price, today):
            continue
        base = prices.base_of(price)
        call = token_cost_usd(price, tuned.prompt_tokens, tuned.completion_tokens)
        training = (price.training_usd_per_million_tokens or 0.0) * num_training_tokens / 1e6
        hosting = (price.hosting_usd_per_hour or 0.0) * HOURS_PER_MONTH
        found = {}
        if call is not None and base is not None:
            for name, arm in arms.items():
                prompted = token_cost_usd(base, arm.prompt_tokens, arm.completion_tokens)
                assert prompted is not None
                found[name] = break_even(
                    fixed_usd=training + call * num_evaluated, saving_usd_per_call=prompted - call, hosting_usd_per_month=hosting,
                    requests_per_month=requests_per_month,
                )  # fmt: skip
        notes = [price.note, f"Planned end of new jobs: {price.training_closes}." if price.training_closes else ""]
        notes.append(price.warning(today, max_price_age_days))
        if call is None:
            notes.append("The price of calls to a tuned model is not published.")
        bills.append(Bill(
            price.name, training, None if call is None else call * num_evaluated, hosting, None if call is None else call * requests_per_month,
            found, price.as_of, price.source, tuple(note for note in notes if note),
        ))  # fmt: skip
    return bills
