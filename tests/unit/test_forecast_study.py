"""The arithmetic of the calibration study on invented trainings whose truth is known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from forecast_data import bundled, from_files
from forecast_study import (
    ALL_SEEDS,
    MARGINS,
    SHARES,
    Measured,
    each_apart,
    plot,
    power_law_gain,
    regret,
    residual_share,
    study,
    summarise,
    tables,
    with_share,
)

DOCUMENTS = {f"d{index}": 3.0 + 0.1 * index for index in range(6)}
SIZES = (4, 8, 16, 32, 64)


def log_gain(num_rows: int) -> float:
    return 0.08 * math.log1p(num_rows / 6)


def trainings(name: str = "a", scale: float = 1.0, turn_at: int | None = None) -> list[Measured]:
    """Two seeds of exact log curves; from `turn_at` rows on, nothing is gained any more."""
    untuned = Measured(name, 0, 0, DOCUMENTS, 1.0, {document: nll + 0.05 for document, nll in DOCUMENTS.items()})
    found = [untuned]
    for seed in (0, 1):
        for size in SIZES:
            gain = scale * (log_gain(size) if turn_at is None or size < turn_at else 0.0)
            found.append(Measured(name, seed, size, {document: nll - gain for document, nll in DOCUMENTS.items()}, 2.0))
    return found


def test_an_exact_curve_is_forecast_and_what_turns_is_missed():
    cells = study(trainings())
    # (4, 8, 16) -> 32, 64 and (8, 16, 32) -> 64, for each seed and for both together.
    assert [(cell.pilots[-1], cell.num_rows, cell.factor) for cell in cells if cell.seed == 0] == [(16, 32, 2), (16, 64, 4), (32, 64, 2)]
    assert [cell.seed for cell in cells].count(ALL_SEEDS) == 3
    assert all(cell.point == pytest.approx(cell.actual, rel=0.03) for cell in cells)
    assert cells[0].last_value == pytest.approx(log_gain(16))
    assert cells[0].actual == pytest.approx(log_gain(32))
    missed = [cell for cell in study(trainings(turn_at=32)) if cell.pilots[-1] == 16]
    assert not any(cell.covered for cell in missed)
    # By hand: a miss of 80 % intervals costs ten times what it lacks.
    assert missed[0].interval_score == pytest.approx(missed[0].high - missed[0].low + 10 * (missed[0].low - missed[0].actual))


def test_the_share_that_widens_an_interval_is_found_on_other_data_sets():
    cells = study(trainings())
    (cell, *_) = cells
    widths = [high - low for low, high in cell.ends]
    assert widths == sorted(widths) and widths[-1] > widths[0]

    def moved(name: str, place: int) -> list:
        """Six forecasts whose measured gain lies at the end of the interval that the share at `place` makes."""
        return [replace(cell, data_set=name, actual=cell.ends[place][1]) for cell in cells if cell.seed != ALL_SEEDS]

    # Four sets need nothing and one needs half. Of K = 5 sets 0.96 have to hold, so all; of 11 0.873, so one may fail.
    easy, hard = [cell for name in "abcd" for cell in moved(name, 0)], moved("e", SHARES.index(0.5))
    assert residual_share(easy) == 0
    assert residual_share([*easy, *hard]) == 0.5
    assert residual_share([*easy, *hard, *(cell for name in "fghijk" for cell in moved(name, 0))]) == 0
    assert residual_share([replace(cell, actual=9.0) for cell in cells]) == 1
    # "e" is judged by sets that ask for nothing, and "a" by others that ask for half.
    apart = each_apart([*easy, *hard])
    assert [cell.high for cell in apart if cell.data_set == "e"] == [cell.high for cell in with_share(hard, 0)]
    assert [cell.high for cell in apart if cell.data_set == "a"] == [cell.high for cell in with_share(easy[:6], 0.5)]


def test_the_summary_counts_what_is_trusted():
    summary = summarise(study(trainings() + trainings("b", turn_at=32)), trainings())
    # Of a, all six hold; of b, none of the four from 16 rows.
    assert summary["by_data_set"]["a"]["num_forecasts"] == 6
    assert summary["by_data_set"]["b"]["coverage"] < 0.5
    assert summary["naive_median_error"] == min(
        summary["headline"]["last_value_median_error"], summary["headline"]["power_law_median_error"]
    )
    assert summary["by_factor"]["8"]["num_forecasts"] == 0
    assert summary["num_trainings"] == 10
    text = tables(summary)
    assert "| 8 times (speculative) | 0 | – |" in text
    assert text.count("\n| 0.2 |") == 1


def test_a_plain_power_law_gives_itself_back():
    gains = [3.0 - 2.9 * size**-0.05 for size in (4, 8, 16)]
    assert power_law_gain((4, 8, 16), gains, 3.0, 64) == pytest.approx(3.0 - 2.9 * 64**-0.05)


def test_the_verdict_is_not_constant_and_regret_is_what_was_missed():
    strong, weak = study(trainings(scale=3.0)), study(trainings(scale=0.1))
    assert [advice.margin for advice in strong[0].advice] == list(MARGINS)
    assert {cell.advice[0].decision for cell in strong} <= {"go", "collect more"}
    assert {cell.advice[0].decision for cell in weak} == {"prompt instead"}
    assert all(cell.advice[0].worth_it and cell.advice[0].probability > 0.9 for cell in strong)
    assert not any(cell.advice[0].worth_it or cell.advice[0].probability > 0.1 for cell in weak)
    # What gains 0.24 nats is worth margins of 0.1 and 0.2.
    small = study(trainings(scale=1.6))[0]
    assert [advice.worth_it for advice in small.advice] == [small.actual >= margin for margin in MARGINS] == [True, True, False]
    cell = strong[0]
    # The plain request is the better prompt: tuning is worth its gain less the margin.
    assert cell.prompted == 0
    assert (regret(cell, 0.1, True), regret(cell, 0.1, False)) == (0, pytest.approx(cell.actual - 0.1))
    assert regret(weak[0], 0.1, True) == pytest.approx(0.1 - weak[0].actual)


def test_the_picture_has_a_dot_per_forecast():
    cells = study(trainings() + trainings("b", turn_at=32))
    picture = plot(cells)
    assert picture.count("<circle") == 12
    assert picture.count('class="missed"') == sum(not cell.covered for cell in cells if cell.seed != ALL_SEEDS)


def test_the_data_sets_share_no_document_and_are_the_same_every_time(tmp_path: Path):
    sets = bundled()
    assert len(sets) == 12
    for data in sets:
        assert not {example.document_id for example in data.train} & {example.document_id for example in data.held_out}
        assert len(data.sizes) >= 4 and data.sizes[-1] == len(data.train)
    assert sets == bundled()
    rows = "\n".join(f'{{"id": "{n}", "text": "{" ".join(f"word{n}x{i}" for i in range(60))}."}}' for n in range(12))
    (tmp_path / "someone.jsonl").write_text(rows + "\n")
    (data,) = from_files(tmp_path)
    assert (data.name, len(data.train), len(data.held_out)) == ("someone, question", 9, 3)
