"""Objectives against TRL's own losses on the same numbers: value and gradient. What TRL said is recorded (`trl_oracle.py`), so that this
needs no TRL; where it is installed, it is asked again, and takes a step on the same tiny model and rows as the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import trl_oracle as oracle
from parity.tolerances import PLANTED_FACTOR, allowed, relative_error
from trl_oracle import LENGTHS, given

from giong.config import ObjectiveConfig
from giong.engine.cross_entropy import Head
from giong.engine.divergence import token_kl
from giong.engine.step import backward, evaluate_rows
from giong.models.rows import Row
from giong.objectives import objective_of

GOLDEN = json.loads(oracle.GOLDEN.read_text(encoding="utf-8"))["cases"]
ROW_OF_N = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
PAIRED = np.array([1.0, -1.0] * 3)
"""What the answers of the pairs are: chosen and rejected by turns."""
RATED = np.array([1.0, 0.0, -1.0, 0.0, 1.0, 0.0])
"""The oracle's `WANTED`, and a stranger's answer behind each."""
NOTHING = np.zeros(sum(LENGTHS))

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sft": ({"name": "sft", "weights_N": np.ones(sum(LENGTHS))}, {"weights_N": 1 / np.array(LENGTHS)[ROW_OF_N]}),
    "dpo": ({"name": "dpo", "beta": 0.3}, {"reference_logprobs_N": NOTHING}),
    "dpo, ipo": ({"name": "dpo", "beta": 0.3, "dpo_loss": "ipo"}, {"dpo_loss": "sigmoid"}),
    "dpo, conservative": ({"name": "dpo", "beta": 0.3, "label_smoothing": 0.1}, {"label_smoothing": 0.0}),
    "dpo, length-desensitised": ({"name": "dpo", "beta": 0.3, "length_alpha": 0.4}, {"length_alpha": 1.0}),
    "kto": (
        {"name": "kto", "beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7, "sign_R": RATED}, {"sign_R": -RATED},
    ),
    "orpo": ({"name": "orpo", "beta": 0.3}, {"beta": 0.6}),
    "simpo": ({"name": "simpo", "beta": 2.0, "simpo_gamma": 0.7}, {"simpo_gamma": 1.4}),
    "reward": ({"name": "reward"}, {"sign_R": -PAIRED}),
    "reward, margin": ({"name": "reward", "margin_R": np.repeat(oracle.MARGINS, 2)}, {"margin_R": np.zeros(len(LENGTHS))}),
    "reward, centred": ({"name": "reward", "center_rewards": 0.1}, {"center_rewards": 0.0}),
    "grpo": ({"name": "grpo", "beta": 0.3, "num_updates": 2, "clip_epsilon": 0.2}, {"old_logprobs_N": oracle.LOGPROBS}),
    "rloo": ({"name": "rloo"}, {"advantages_R": oracle.ADVANTAGES[::-1].copy()}),
    "distill": ({"name": "distill", "teacher": "large", "teacher_share": 1.0}, {"teacher_share": 0.5}),
}  # fmt: skip
"""Settings and tensors of each of the oracle's cases, and an error planted into them."""


def ours(case: str, **planted: Any) -> tuple[float, np.ndarray]:
    """giong's loss and gradient, per unit of weight as the engine divides it."""
    changes = {**CASES[case][0], **planted}
    settings = {name: value for name, value in changes.items() if name[-1].islower()}
    tensors = {
        "row_of_N": torch.tensor(ROW_OF_N), "weights_N": given(1 / np.array(LENGTHS)[ROW_OF_N]), "sign_R": given(PAIRED),
        "group_of_R": torch.arange(len(LENGTHS)) // 2, "reference_logprobs_N": given(oracle.REFERENCE), "old_logprobs_N": given(oracle.OLD),
        "advantages_R": given(oracle.ADVANTAGES), "margin_R": torch.zeros(len(LENGTHS)),
        **{name: given(value) for name, value in changes.items() if name not in settings},
    }  # fmt: skip
    objective = objective_of(ObjectiveConfig(**settings))

    def loss(at: torch.Tensor) -> torch.Tensor:
        if settings["name"] == "reward":
            named = {**tensors, "outputs_RC": at[:, None]}
        elif settings["name"] == "distill":
            head = Head(torch.eye(oracle.VOCABULARY))
            kl_N = token_kl(at.float(), head, given(oracle.TEACHER_LOGITS).float(), head)
            named = {"teacher_kl_N": kl_N, "logprobs_N": torch.zeros(len(at)), "weights_N": torch.ones(len(at))}
        else:
            named = {**tensors, "logprobs_N": at}
        result = objective(named)
        return result.loss_sum / result.weight_sum

    return oracle.valued(oracle.ORACLES[case][0], loss)


def difference(case: str, found: tuple[float, np.ndarray], said: dict[str, Any]) -> float:
    """Largest of those of the losses and of the gradients. RLOO's losses differ by design: TRL's is of ratios, whose gradient is that of giong's
    log-probabilities as long as they are 1."""
    of_loss = 0.0 if case == "rloo" else abs(found[0] - said["loss"])
    return max(of_loss, float(np.abs(found[1] - np.array(said["gradient"])).max()))


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_that_trl_gave(case: str):
    assert difference(case, ours(case), GOLDEN[case]) < allowed("trl")
    assert difference(case, ours(case, **CASES[case][1]), GOLDEN[case]) > PLANTED_FACTOR * allowed("trl")


def test_every_recorded_case_is_compared():
    assert CASES.keys() == GOLDEN.keys() == oracle.ORACLES.keys()


def test_trl_still_says_so():
    pytest.importorskip("trl", reason="benchmarks/peers.py says how TRL is installed")
    for case, said in oracle.said().items():
        assert difference(case, (said["loss"], np.array(said["gradient"])), GOLDEN[case]) < allowed("trl"), case


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_step_on_the_same_model_and_rows(tiny_model: Callable, name: str):
    """From token ids to the gradient of every parameter: shifts, masks, padding against packs, and what the loss is divided by."""
    pytest.importorskip("trl", reason="benchmarks/peers.py says how TRL is installed")
    generator = np.random.default_rng(3)
    shapes = ((3, 5), (6, 2), (2, 9), (4, 4))
    weights = [np.repeat([0, 1], shape).astype(np.float32) for shape in shapes]
    rows = [Row(generator.integers(3, 200, len(each)), each, f"{number}") for number, each in enumerate(weights)]
    model, reference = (tiny_model("llama", seed=seed).model.requires_grad_(True) for seed in (0, 1))
    if name == "dpo":
        known = evaluate_rows(reference, rows, 256)
        rows = [
            Row(row.input_ids, row.weights, row.name, None, number // 2, {"sign_R": sign, "reference_logprobs_N": known[number].numpy()})
            for number, (row, sign) in enumerate(zip(rows, PAIRED))
        ]
    loss = backward(model, rows, objective_of(ObjectiveConfig(name=name)), 256)["loss"]
    found = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad()
    theirs = trls_loss(name, model, reference, rows)
    theirs.backward()
    assert abs(loss - float(theirs.detach())) < allowed("packed_logprobs")
    assert all(relative_error(found[key], parameter.grad) < allowed("gradients") for key, parameter in model.named_parameters())
    # Planted: one answer's last token is left out.
    shorter = [*rows[:-1], Row(rows[-1].input_ids[:-1], rows[-1].weights[:-1], "3", None, rows[-1].group, rows[-1].extras)]
    with torch.no_grad():
        assert abs(loss - float(trls_loss(name, model, reference, shorter))) > PLANTED_FACTOR * allowed("packed_logprobs")


def trls_loss(name: str, model: Any, reference: Any, rows: list[Row]) -> torch.Tensor:
    from trl.trainer.utils import add_fused_lm_head

    for each in (model, reference):
        add_fused_lm_head(each, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    rows = rows if name == "sft" else rows[::2] + rows[1::2]
    width = max(map(len, rows))
    input_ids, attention_mask, completion_mask = (
        torch.tensor(np.stack([np.pad(values, (0, width - len(values))) for values in parts])).long()
        for parts in ([row.input_ids for row in rows], [np.ones(len(row)) for row in rows], [row.weights for row in rows])
    )
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if name == "sft":
        return oracle.sft_trainer().compute_loss(model, {**batch, "labels": input_ids.masked_fill(completion_mask == 0, -100)})
    return oracle.dpo_trainer(reference, beta=0.1)._compute_loss(model, {**batch, "completion_mask": completion_mask}, False)
