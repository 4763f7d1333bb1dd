"""After how many calls a tuned model has paid for itself against a long prompt: arithmetic on prices and token counts."""

from __future__ import annotations

import math
from dataclasses import dataclass

MONTHS_AHEAD = 12


@dataclass(frozen=True, slots=True)
class BreakEven:
    """`num_calls` until fine-tuning has cost no more than prompting (infinite if never), and how many months that takes."""

    num_calls: float
    saving_usd_per_call: float
    months: float
    worthwhile: bool
    reason: str


def break_even(
    *,
    training_usd: float,
    evaluation_usd: float = 0.0,
    hosting_usd_per_month: float = 0.0,
    requests_per_month: float,
    saved_prompt_tokens: float,
    input_usd_per_million_tokens: float,
    tokens_per_call: float = 0.0,
    extra_usd_per_million_tokens: float = 0.0,
    latency_usd_per_call: float = 0.0,
) -> BreakEven:
    """Calls to break even: N = (training + evaluation + hosting * months) / saving per call.

    The saving per call is the prompt tokens no longer sent, at the input price, plus what the time saved is worth, minus
    the tuned model's surcharge on the tokens of a call. Hosting runs on by the month, so it is first taken off the month's
    saving: N = fixed cost / (saving - hosting per call). Worthwhile means: within twelve months.
    """
    saved_usd = saved_prompt_tokens * input_usd_per_million_tokens / 1e6 + latency_usd_per_call
    saving = saved_usd - tokens_per_call * extra_usd_per_million_tokens / 1e6
    fixed = training_usd + evaluation_usd
    if requests_per_month <= 0:
        net = saving if hosting_usd_per_month == 0 else -math.inf
    else:
        net = saving - hosting_usd_per_month / requests_per_month
    num_calls = 0.0 if fixed <= 0 and net >= 0 else fixed / net if net > 0 else math.inf
    months = 0.0 if num_calls == 0 else num_calls / requests_per_month if requests_per_month > 0 else math.inf
    worthwhile = months <= MONTHS_AHEAD
    if not math.isfinite(num_calls):
        reason = "A call to the tuned model costs no less than a call with the examples in the prompt: it is worth it for quality only."
    elif not math.isfinite(months):
        reason = f"It pays for itself after {math.ceil(num_calls):,} calls."
    else:
        reason = f"It pays for itself after {math.ceil(num_calls):,} calls, {months:.1f} months at {requests_per_month:,.0f} calls a month."
        reason += "" if worthwhile else " That is more than a year: tune for quality, not for cost."
    return BreakEven(num_calls, saving, months, worthwhile, reason)
