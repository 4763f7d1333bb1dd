"""Objectives on preferences: by hand, against the published formulas written out answer by answer, and against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from parity.tolerances import PLANTED_FACTOR, allowed

from giong.config import ObjectiveConfig
from giong.contracts import LossSum
from giong.engine.packing import Pack, loss_weight, pack
from giong.engine.step import evaluate_objective, evaluate_rows
from giong.models.rows import Row
from giong.objectives import OBJECTIVES, objective_of

Answer = tuple[list[float], list[float]]
"""Log-probabilities of an answer's tokens under the model and under the reference."""
Pair = tuple[Answer, Answer]
"""The chosen answer and the rejected one."""

BY_HAND: Pair = (([-1.0, -2.0], [-1.5, -2.5]), ([-3.0], [-2.0]))
GENERATOR = np.random.default_rng(8)


def logprobs(length: int) -> Answer:
    return (-GENERATOR.gamma(2.0, size=length)).tolist(), (-GENERATOR.gamma(2.0, size=length)).tolist()


PAIRS = [(logprobs(chosen), logprobs(rejected)) for chosen, rejected in ((4, 7), (9, 2), (5, 5))]


def rows_of(pairs: list[Pair], margins: tuple[float, ...] = (0.0, 0.0, 0.0)) -> list[Row]:
    """Rows whose answers have these many tokens, behind a request of three."""
    rows = []
    for number, (pair, margin) in enumerate(zip(pairs, margins)):
        for sign, (_, reference) in zip((1.0, -1.0), pair):
            weights = np.concatenate([np.zeros(3), np.ones(len(reference))]).astype(np.float32)
            extras = {"sign_R": sign, "margin_R": margin, "reference_logprobs_N": np.array(reference)}
            rows.append(Row(np.arange(len(weights)), weights, f"{number}", group=number, extras=extras))
    return rows


def tensors_of(pairs: list[Pair], given: Pack | None = None) -> dict[str, torch.Tensor]:
    """What the engine hands over for these pairs, in fp64."""
    made = given or pack(rows_of(pairs))
    extras = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in made.extras.items()}
    values = [value for pair in pairs for policy, _ in pair for value in policy]
    extras["reference_logprobs_N"] = torch.tensor(
        [value for pair in pairs for _, reference in pair for value in reference], dtype=torch.float64
    )
    logprobs_N = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    return {"logprobs_N": logprobs_N, "weights_N": made.weights_N, "row_of_N": made.row_of_N, **extras}


def test_ratings_are_held_out_together_whatever_the_packs(tiny_model: Callable):
    """KTO's point lies where all answers put it. Planted: a point for each pack."""
    model, generator, rows = tiny_model("llama").model.eval(), np.random.default_rng(0), []
    for number in range(24):
        for sign in (1.0 if number % 2 else -1.0, 0.0):
            length = int(generator.integers(10, 25))
            weights = (np.arange(length) >= 5).astype(np.float32)
            rows.append(Row(generator.integers(5, 300, length), weights, str(number), group=number, extras={"sign_R": sign}))
    references = evaluate_rows(model, rows, 4096)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.004 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    rows = [replace(row, extras={**row.extras, "reference_logprobs_N": values.numpy()}) for row, values in zip(rows, references)]
    kto = objective_of(ObjectiveConfig(name="kto"))
    whole, parted = (evaluate_objective(model, rows, kto, budget) for budget in (10**6, 80))
    assert parted == pytest.approx(whole, abs=allowed("packed_logprobs"))
    by_pack = [evaluate_objective(model, rows[start : start + 4], kto, 10**6) for start in range(0, len(rows), 4)]
    assert abs(np.mean([figures["kl"] for figures in by_pack]) - whole["kl"]) > PLANTED_FACTOR * allowed("packed_logprobs")


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def ratio(answer: Answer, first: int | None = None) -> float:
    return sum(answer[0][:first]) - sum(answer[1][:first])


def dpo_by_formula(pair: Pair, beta: float, smoothing: float = 0.0, planted: str = "") -> float:
    """Equation 7 of 2305.18290."""
    h = ratio(pair[0]) - ratio(pair[1])
    if planted == "no reference":
        h = sum(pair[0][0]) - sum(pair[1][0])
    if planted == "wrong way round":
        h = -h
    return -(1 - smoothing) * log_sigmoid(beta * h) - smoothing * log_sigmoid(-beta * h)


def ipo_by_formula(pair: Pair, beta: float, planted: str = "") -> float:
    """Equation 17 of 2310.12036, on means."""
    divisors = (1, 1) if planted == "sums" else (len(pair[0][0]), len(pair[1][0]))
    return (ratio(pair[0]) / divisors[0] - ratio(pair[1]) / divisors[1] - 1 / (2 * beta)) ** 2


def ld_by_formula(pair: Pair, beta: float, alpha: float, planted: str = "") -> float:
    shorter = min(len(pair[0][0]), len(pair[1][0]))
    if planted == "longer":
        shorter = max(len(pair[0][0]), len(pair[1][0]))
    chosen, rejected = (alpha * ratio(answer) + (1 - alpha) * ratio(answer, shorter) for answer in pair)
    return -log_sigmoid(beta * (chosen - rejected))


def mean(answer: Answer) -> float:
    return sum(answer[0]) / len(answer[0])


def orpo_by_formula(pair: Pair, weight: float, planted: str = "") -> float:
    """Equations 6 and 7 of 2403.07691."""
    odds = [math.exp(mean(answer)) / (1 - math.exp(mean(answer))) for answer in pair]
    if planted == "probabilities":
        odds = [math.exp(mean(answer)) for answer in pair]
    return -mean(pair[0]) - weight * log_sigmoid(math.log(odds[0] / odds[1]))


def simpo_by_formula(pair: Pair, beta: float, gamma: float, planted: str = "") -> float:
    """Equation 6 of 2405.14734."""
    return -log_sigmoid(beta * mean(pair[0]) - beta * mean(pair[1]) - (beta * gamma if planted == "scaled margin" else gamma))


CASES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "dpo": ({"name": "dpo", "beta": 0.5}, lambda pair, planted: dpo_by_formula(pair, 0.5, planted=planted), "no reference"),
    "dpo, sign": ({"name": "dpo", "beta": 0.5}, lambda pair, planted: dpo_by_formula(pair, 0.5, planted=planted), "wrong way round"),
    "conservative": (
        {"name": "dpo", "beta": 0.5, "label_smoothing": 0.1},
        lambda pair, planted: dpo_by_formula(pair, 0.5, 0.0 if planted else 0.1), "no smoothing",
    ),
    "ipo": ({"name": "dpo", "beta": 0.5, "dpo_loss": "ipo"}, lambda pair, planted: ipo_by_formula(pair, 0.5, planted), "sums"),
    "orpo": ({"name": "orpo", "beta": 0.5}, lambda pair, planted: orpo_by_formula(pair, 0.5, planted), "probabilities"),
    "simpo": (
        {"name": "simpo", "beta": 2.0, "simpo_gamma": 0.7}, lambda pair, planted: simpo_by_formula(pair, 2.0, 0.7, planted), "scaled margin",
    ),
    "ld-dpo": ({"name": "dpo", "beta": 0.5, "length_alpha": 0.4}, lambda pair, planted: ld_by_formula(pair, 0.5, 0.4, planted), "longer"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_published_formula_answer_by_answer(case: str):
    settings, formula, planted = CASES[case]
    result = objective_of(ObjectiveConfig(**settings))(tensors_of(PAIRS))
    assert result.loss_sum.item() == pytest.approx(sum(formula(pair, "") for pair in PAIRS), abs=allowed("hand_worked"))
    assert result.weight_sum.item() == len(PAIRS)
    wrong = sum(formula(pair, planted) for pair in PAIRS)
    assert abs(result.loss_sum.item() - wrong) > PLANTED_FACTOR * allowed("hand_worked")


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_against_finite_differences(case: str):
    tensors = tensors_of(PAIRS)
    objective = objective_of(ObjectiveConfig(**CASES[case][0]))

    def loss(logprobs_N: torch.Tensor) -> torch.Tensor:
        return objective({**tensors, "logprobs_N": logprobs_N}).loss_sum

    assert torch.autograd.gradcheck(loss, tensors["logprobs_N"])
    # A loss of which half has lost its graph.
    assert not torch.autograd.gradcheck(lambda given: loss(given) + loss(given.detach()), tensors["logprobs_N"], raise_exception=False)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Log-ratios 0.5 + 0.5 and -1: h = 2, b h = 1, ln(1 + 1/e) = 0.3132617.
        ({}, 0.3132617),
        # 0.9 * 0.3132617 + 0.1 * (1 + 0.3132617).
        ({"label_smoothing": 0.1}, 0.4132617),
        # Means 0.5 and -1: h = 1.5, and 1 / (2 b) = 1.
        ({"dpo_loss": "ipo"}, 0.25),
        # The shorter answer has one token: 0.5 + 0.5 * 0.5 and -1: b h = 0.875, ln(1 + exp(-0.875)).
        ({"length_alpha": 0.5}, 0.3484446),
    ],
)  # fmt: skip
def test_dpo_by_hand(settings: dict[str, Any], expected: float):
    result = objective_of(ObjectiveConfig(name="dpo", beta=0.5, **settings))(tensors_of([BY_HAND]))
    assert result.loss_sum.item() == pytest.approx(expected, abs=allowed("hand_worked"))


def test_orpo_and_simpo_by_hand():
    """Answers of two tokens of probability 1/2 and 1/8, and of one token of 1/4: means ln 1/4 and ln 1/4; then of probability 1/2."""
    even: Pair = (([math.log(1 / 2), math.log(1 / 8)], [0.0, 0.0]), ([math.log(1 / 4)], [0.0]))
    better: Pair = (([math.log(1 / 2)], [0.0]), ([math.log(1 / 4)], [0.0]))
    orpo, simpo = (objective_of(ObjectiveConfig(name=name, beta=1.0)) for name in ("orpo", "simpo"))
    # Odds 1/3 both: ln 4 + ln 2. Odds 1 and 1/3: ln 2 + ln(1 + 1/3).
    assert orpo(tensors_of([even])).loss_sum.item() == pytest.approx(2.0794415, abs=allowed("hand_worked"))
    assert orpo(tensors_of([better])).loss_sum.item() == pytest.approx(0.9808293, abs=allowed("hand_worked"))
    # Margin 0 - 1: ln(1 + e). Margin ln 2 - 1: ln(1 + e / 2).
    assert simpo(tensors_of([even])).loss_sum.item() == pytest.approx(1.3132617, abs=allowed("hand_worked"))
    assert simpo(tensors_of([better])).loss_sum.item() == pytest.approx(0.8582975, abs=allowed("hand_worked"))


KTO = ObjectiveConfig(name="kto", beta=0.5, desirable_weight=1.0, undesirable_weight=1.5)


def kto_tensors() -> dict[str, torch.Tensor]:
    """Two rated answers, each beside a stranger's: log-ratios 1 (wanted), 0.6 (stranger), -1 (unwanted), 0.2 (stranger)."""
    answers: list[tuple[float, Answer]] = [
        (1.0, BY_HAND[0]), (0.0, ([-1.4], [-2.0])), (-1.0, BY_HAND[1]), (0.0, ([-1.0, -1.0], [-1.1, -1.1])),
    ]  # fmt: skip
    rows = rows_of([(answers[0][1], answers[1][1]), (answers[2][1], answers[3][1])])
    rows = [replace(row, extras={**row.extras, "sign_R": sign}) for row, (sign, _) in zip(rows, answers)]
    return tensors_of([(answers[0][1], answers[1][1]), (answers[2][1], answers[3][1])], pack(rows))


def test_kto_by_hand():
    """z = 0.4: 1 - sigmoid(0.3) = 0.4255575, and 1.5 (1 - sigmoid(0.7)) = 0.4977183."""
    tensors = kto_tensors()
    result = objective_of(KTO)(tensors)
    assert result.loss_sum.item() == pytest.approx(0.4255575 + 0.4977183, abs=allowed("hand_worked"))
    assert {name: float(value) for name, value in result.metrics.items()} == pytest.approx(
        {"rewards_signed": 1.0, "accuracy": 2.0, "kl": 0.8, "length": 3.0}, abs=allowed("hand_worked")
    )
    # The reference point is detached: strangers' answers get no gradient, and where they lie below the reference it is 0.
    result.loss_sum.backward()
    assert tensors["logprobs_N"].grad[[2, 4, 5]].tolist() == [0.0, 0.0, 0.0]
    below = {**kto_tensors(), "reference_logprobs_N": torch.zeros(6, dtype=torch.float64)}
    assert float(objective_of(KTO)(below).metrics["kl"]) == 0.0
    # Planted: the labels exchanged.
    wrong = objective_of(KTO)({**tensors, "sign_R": -tensors["sign_R"]}).loss_sum.item()
    assert abs(wrong - result.loss_sum.item()) > PLANTED_FACTOR * allowed("hand_worked")


def test_the_gradient_of_kto_against_finite_differences():
    """With the point held still: that of the strangers is no part of the gradient."""
    tensors = kto_tensors()
    rated = torch.tensor([0, 1, 3])
    given = tensors["logprobs_N"].detach()[rated].requires_grad_()

    def loss(rated_N: torch.Tensor) -> torch.Tensor:
        return objective_of(KTO)({**tensors, "logprobs_N": tensors["logprobs_N"].detach().index_copy(0, rated, rated_N)}).loss_sum

    assert torch.autograd.gradcheck(loss, given)


def reward_tensors(rewards: list[float], margins: tuple[float, ...] = (0.0, 0.0)) -> dict[str, torch.Tensor]:
    """Two pairs with these scores, chosen and rejected by turns."""
    return tensors_of([BY_HAND, BY_HAND], pack(rows_of([BY_HAND, BY_HAND], margins))) | {
        "outputs_RC": torch.tensor(rewards, dtype=torch.float64, requires_grad=True)[:, None]
    }


def test_reward_by_hand():
    """Differences 1 and -2: ln(1 + 1/e) + ln(1 + e^2) = 0.3132617 + 2.1269280. Sums 3 and 0: 0.1 * 9. A margin of 1: ln 2 for the first."""
    scores = [2.0, 1.0, -1.0, 1.0]
    plain, centred = (objective_of(ObjectiveConfig(name="reward", center_rewards=weight)) for weight in (0.0, 0.1))
    result = plain(reward_tensors(scores))
    assert result.loss_sum.item() == pytest.approx(2.4401897, abs=allowed("hand_worked"))
    assert {name: float(value) for name, value in result.metrics.items()} == {
        "rewards_chosen": 1.0, "rewards_rejected": 2.0, "rewards_margin": -1.0, "rewards_accuracy": 1.0,
    }  # fmt: skip
    assert centred(reward_tensors(scores)).loss_sum.item() == pytest.approx(2.4401897 + 0.9, abs=allowed("hand_worked"))
    with_margin = plain(reward_tensors(scores, (1.0, 0.0))).loss_sum.item()
    assert with_margin == pytest.approx(0.6931472 + 2.1269280, abs=allowed("hand_worked"))
    # Planted: the two answers of each pair exchanged.
    assert abs(plain(reward_tensors([1.0, 2.0, 1.0, -1.0])).loss_sum.item() - 2.4401897) > PLANTED_FACTOR * allowed("hand_worked")


def test_the_gradient_of_reward_against_finite_differences():
    tensors = reward_tensors([2.0, 1.0, -1.0, 0.5], (0.3, 0.0))
    objective = objective_of(ObjectiveConfig(name="reward", center_rewards=0.1))
    scores_RC = tensors["outputs_RC"].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda given: objective({**tensors, "outputs_RC": given}).loss_sum, scores_RC)


def test_dpos_figures_by_hand():
    metrics = objective_of(ObjectiveConfig(name="dpo", beta=0.5))(tensors_of([BY_HAND])).metrics
    assert {name: float(value) for name, value in metrics.items()} == {
        "rewards_chosen": 0.5, "rewards_rejected": -0.5, "rewards_margin": 1.0, "rewards_accuracy": 1.0,
        "length_chosen": 2.0, "length_rejected": 1.0,
    }  # fmt: skip
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("case", CASES)
def test_where_the_rows_lie_in_a_pack_is_all_the_same(case: str):
    """Pairs in one pack or in three, in either order: the same sum. A pair that is read across its border would be seen."""
    objective = objective_of(ObjectiveConfig(**CASES[case][0]))

    def total(*parts: list[Pair]) -> float:
        results: list[LossSum] = [objective(tensors_of(part)) for part in parts]
        return sum(result.loss_sum.item() for result in results)

    together = total(PAIRS)
    assert total(PAIRS[::-1]) == pytest.approx(together, abs=allowed("hand_worked"))
    assert total(*([pair] for pair in PAIRS)) == pytest.approx(together, abs=allowed("hand_worked"))
    mixed = [(PAIRS[0][0], PAIRS[1][1]), (PAIRS[1][0], PAIRS[0][1]), PAIRS[2]]
    assert abs(total(mixed) - together) > PLANTED_FACTOR * allowed("hand_worked")


def test_the_reference_is_detached_and_every_objective_says_what_it_needs():
    for name, module in OBJECTIVES.items():
        if "reference_logprobs_N" not in module.NEEDS:
            continue
        tensors = tensors_of(PAIRS)
        assert set(module.NEEDS) <= set(tensors)
        tensors["reference_logprobs_N"].requires_grad_()
        objective_of(ObjectiveConfig(name=name))({key: tensors[key] for key in module.NEEDS}).loss_sum.backward()
        assert tensors["reference_logprobs_N"].grad is None


def test_a_pack_of_pairs_by_hand():
    rows = rows_of([BY_HAND, BY_HAND])
    made = pack(rows)
    assert made.extras["group_of_R"].tolist() == [0, 0, 1, 1]
    assert made.extras["sign_R"].tolist() == [1, -1, 1, -1]
    assert made.extras["reference_logprobs_N"].tolist() == [-1.5, -2.5, -2.0] * 2
    assert loss_weight(rows) == 2.0
    assert loss_weight([replace(row, group=None) for row in rows]) == 6.0
