"""What tuning costs and when it pays, on hand-worked numbers; and prices of the user's own."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from giong.contracts import Reply
from giong.errors import ConfigError
from giong.sizing.break_even import HOURS_PER_MONTH, Usage, break_even, local_bill, mean_usage, provider_bills
from giong.sizing.prices import FINE_TUNING_PRICES, INFERENCE_PRICES, FineTuningPrice, InferencePrice, PriceTable, read_prices, rental_price
from giong.sizing.units import format_cost

TODAY = date(2026, 11, 20)
TUNED = Usage(200, 100, 0.5)
ARMS = {"few_shot": Usage(1700, 100, 2.0), "instruction": Usage(260, 90, 0.6)}


def test_break_even_by_hand() -> None:
    # 0.002 USD saved a call: 6 USD are 3,000 calls, three months.
    result = break_even(fixed_usd=6, saving_usd_per_call=0.002, hosting_usd_per_month=0, requests_per_month=1000)
    assert (result.num_calls, result.months, result.worthwhile) == (pytest.approx(3000), pytest.approx(3), True)
    # Hosting at 1 USD a month takes half of the saving.
    hosted = break_even(fixed_usd=6, saving_usd_per_call=0.002, hosting_usd_per_month=1, requests_per_month=1000)
    assert hosted.num_calls == pytest.approx(6000)
    dearer = break_even(fixed_usd=6, saving_usd_per_call=-0.0001, hosting_usd_per_month=0, requests_per_month=1000)
    assert dearer.num_calls == float("inf") and not dearer.worthwhile
    assert "quality only" in dearer.reason
    slow = break_even(fixed_usd=600, saving_usd_per_call=0.002, hosting_usd_per_month=0, requests_per_month=1000)
    assert not slow.worthwhile
    assert "more than a year" in slow.reason
    assert break_even(fixed_usd=6, saving_usd_per_call=0.002, hosting_usd_per_month=0, requests_per_month=0).num_calls == pytest.approx(
        3000
    )


def test_what_is_counted_is_said() -> None:
    assert (format_cost(0.0), format_cost(4.5)) == ("no cost", "$4.50")


def test_means_over_replies() -> None:
    replies = [
        Reply("a", num_prompt_tokens=100, num_completion_tokens=20, seconds=1.0, cost_usd=0.01),
        Reply("b", "stop", 300, 40, 2.0, 0.03),
    ]
    assert mean_usage(replies) == Usage(200, 30, 1.5, 0.02)


def test_this_machine_is_paid_by_the_hour() -> None:
    hosted = {**ARMS, "few_shot@hosted": Usage(1700, 100, 3.0, usd=0.004)}
    bill = local_bill(TUNED, hosted, training_seconds=1800, evaluation_seconds=600, usd_per_hour=3.6, requests_per_month=1000)
    assert (bill.training_usd, bill.evaluation_usd, bill.usd_per_month) == pytest.approx((1.8, 0.6, 0.5))
    # 0.001 USD a second: few-shot takes 1.5 s longer; the hosted arm is what it was charged, less half a second here.
    assert bill.break_even["few_shot"].num_calls == pytest.approx(2.4 / 0.0015)
    assert bill.break_even["few_shot@hosted"].num_calls == pytest.approx(2.4 / 0.0035)
    free = local_bill(TUNED, hosted, training_seconds=1800, evaluation_seconds=600, usd_per_hour=0.0)
    assert set(free.break_even) == {"few_shot@hosted"}
    assert "budget.usd_per_hour" in free.notes[0]


def test_every_open_provider_is_reckoned() -> None:
    bills = {bill.name: bill for bill in provider_bills(
        TUNED, ARMS, num_training_tokens=1_500_000, num_evaluated=100, prices=PriceTable(), today=TODAY, requests_per_month=10_000,
    )}  # fmt: skip
    assert {"OpenAI gpt-4.1-2025-04-14", "OpenAI gpt-4o-2024-08-06", "Azure OpenAI gpt-4.1 (global)"} < set(bills)
    assert not any("nano" in name or "RFT" in name for name in bills)
    mini = bills["OpenAI gpt-4o-mini-2024-07-18"]
    # A tuned call 200 x 0.30 + 100 x 1.20 = 180 millionths; few-shot on the base 1,700 x 0.15 + 100 x 0.60 = 315.
    assert (mini.training_usd, mini.evaluation_usd, mini.usd_per_month) == pytest.approx((4.50, 0.018, 1.80))
    assert mini.break_even["few_shot"].num_calls == pytest.approx(4.518 / 135e-6)
    # The instruction is short and the tuned model's tokens cost twice as much.
    assert mini.break_even["instruction"].num_calls == float("inf")
    azure = bills["Azure OpenAI gpt-4.1 (global)"]
    assert azure.hosting_usd_per_month == pytest.approx(1.70 * HOURS_PER_MONTH)
    assert azure.evaluation_usd is None and not azure.break_even
    assert any("not published" in note for note in azure.notes)
    old = provider_bills(TUNED, ARMS, num_training_tokens=1, num_evaluated=1, prices=PriceTable(), today=TODAY, max_price_age_days=30)
    assert all(any("days ago: check it" in note for note in bill.notes) for bill in old)


def test_fifty_examples_cost_three_dollars_and_the_full_set_a_hundred() -> None:
    """800 tokens an example and three epochs on a large hosted model at $25 a million: 50 examples, and 1,667."""
    for num_examples, usd in ((50, 3.0), (1667, 100.0)):
        bills = provider_bills(TUNED, ARMS, num_training_tokens=num_examples * 800 * 3, num_evaluated=0, prices=PriceTable(), today=TODAY)
        assert next(bill for bill in bills if bill.name == "OpenAI gpt-4o-2024-08-06").training_usd == pytest.approx(usd, rel=0.001)


def test_tuned_models_find_their_base() -> None:
    table = PriceTable()
    bases = {price.model: base.model for price in FINE_TUNING_PRICES if (base := table.base_of(price))}
    assert bases == {
        "gpt-4.1-2025-04-14": "gpt-4.1", "gpt-4.1-mini": "gpt-4.1-mini", "gpt-4.1-nano": "gpt-4.1-nano", "gpt-4o-2024-08-06": "gpt-4o",
        "gpt-4o-mini-2024-07-18": "gpt-4o-mini",
    }  # fmt: skip


OWN = """
fine_tuning:
  - {vendor: OpenAI, model: gpt-4.1-mini, training_usd_per_million_tokens: 4.0, as_of: 2026-11-01}
  - {vendor: Acme, model: big, training_usd_per_million_tokens: 1.0, input_usd_per_million_tokens: 0.5, output_usd_per_million_tokens: 1, as_of: 2026-11-02}
rental:
  - {gpu: L4, low_usd_per_hour: 0.3, high_usd_per_hour: 0.4, as_of: 2026-11-03}
"""


def test_own_prices_replace_rows_and_add_some(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(OWN)
    table = read_prices(path)
    assert len(table.fine_tuning) == len(FINE_TUNING_PRICES) + 1
    assert table.inference == INFERENCE_PRICES
    mini = next(row for row in table.fine_tuning if row.model == "gpt-4.1-mini")
    assert (mini.training_usd_per_million_tokens, mini.input_usd_per_million_tokens, mini.source) == (4.0, None, "your own price")
    assert rental_price("L4", TODAY, rows=table.rental).high_usd_per_hour == 0.4
    assert isinstance(table.fine_tuning[1], FineTuningPrice) and isinstance(table.inference[0], InferencePrice)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fine_tuning: [{vendor: A, model: b}]", r"no date \(as_of: None\)"),
        ("fine_tuning: [{vendor: A, model: b, as_of: soon}]", "as_of: 'soon'"),
        ("fine_tuning: [{vendor: A, as_of: 2026-11-01}]", "lacks .*model"),
        ("fine_tuning: [{vendor: A, model: b, as_of: 2026-11-01, price: 3}]", "Unknown field 'price'"),
        (
            "inference: [{vendor: A, model: b, input_usd_per_million_tokens: -1, output_usd_per_million_tokens: 1, as_of: 2026-11-01}]",
            "-1, not an amount",
        ),
        ("prices: []", "'prices' is no list of prices"),
        ("- 3", "no mapping"),
        ("{", "cannot be read"),
    ],
)
def test_bad_prices_are_refused_with_their_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_prices(path)
    assert str(path) in str(caught.value)
