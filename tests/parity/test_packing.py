"""Packed rows against one row at a time through the whole transformers model: the same log-probabilities and gradients.

The planted errors are the ways in which packing usually goes wrong; each must be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from parity.tolerances import PLANTED_FACTOR, allowed
from tiny_models import FAMILIES, VOCAB_SIZE

from giong.contracts import LossSum
from giong.engine.attention import packed_attention
from giong.engine.packing import Pack, pack, plan_packs, plan_steps, rounded_up
from giong.engine.shapes import LENGTH_MULTIPLE, rounded
from giong.engine.step import backward, evaluate_rows, forward_logprobs, hidden_states
from giong.errors import ModelError
from giong.models.rows import Row
from giong.objectives import sft

EVERY_FAMILY = (*FAMILIES, "neox")
UNEQUAL = (5, 33, 17, 2, 26)
EQUAL = (19, 19, 19)


def rows_of(lengths: tuple[int, ...], seed: int = 0) -> list[Row]:
    """Random tokens; about two thirds of the positions carry loss, with unlike weights."""
    generator = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        weights = generator.choice([0.0, 1.0, 0.5], size=length).astype(np.float32)
        weights[0], weights[-1] = 0.0, 1.0
        rows.append(Row(generator.integers(0, VOCAB_SIZE, size=length), weights))
    return rows


def logprobs_one_by_one(model: torch.nn.Module, rows: list[Row]) -> list[torch.Tensor]:
    """Every row alone: full logits, log-softmax, the targets that carry loss."""
    results = []
    for row in rows:
        ids = torch.from_numpy(row.input_ids)
        logprobs = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
        positions = torch.from_numpy(np.flatnonzero(row.weights))
        results.append(logprobs[positions - 1, ids[positions]])
    return results


def break_pack(made: Pack, planted: str | None) -> Pack:
    if planted == "rows see each other":
        return replace(made, lengths=(sum(made.lengths),))
    if planted == "positions run on":
        return replace(made, position_ids_T=torch.arange(sum(made.lengths)))
    if planted == "positions doubled":
        return replace(made, position_ids_T=2 * made.position_ids_T)
    if planted == "targets shifted":
        return replace(made, loss_positions_N=made.loss_positions_N + 1)
    assert planted is None
    return made


def largest_difference(tiny_model: Callable, family: str, lengths: tuple[int, ...], planted: str | None) -> float:
    model, rows = tiny_model(family).model, rows_of(lengths)
    with torch.no_grad():
        packed = forward_logprobs(model, break_pack(pack(rows), planted))["logprobs_N"]
        alone = torch.cat(logprobs_one_by_one(model, rows))
    return float((packed - alone).abs().max())


@pytest.mark.parametrize("lengths", [UNEQUAL, EQUAL], ids=["unequal", "equal"])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_packed_rows_give_the_log_probabilities_of_single_rows(tiny_model: Callable, family: str, lengths: tuple[int, ...]):
    assert largest_difference(tiny_model, family, lengths, None) < allowed("packed_logprobs")


# Rotary positions are relative, so a shift of a whole row changes nothing there: only GPT-2's absolute positions notice it.
@pytest.mark.parametrize(
    ("family", "planted"),
    [
        *((family, planted) for family in EVERY_FAMILY for planted in ("rows see each other", "targets shifted", "positions doubled")),
        ("gpt2", "positions run on"),
    ],
)
def test_a_planted_packing_error_is_seen(tiny_model: Callable, family: str, planted: str):
    assert largest_difference(tiny_model, family, UNEQUAL, planted) > PLANTED_FACTOR * allowed("packed_logprobs")


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_filler_behind_the_rows_changes_no_number(tiny_model: Callable, family: str):
    model, rows = tiny_model(family).model, rows_of(UNEQUAL)
    made = rounded_up(pack(rows))
    *own, filler = made.lengths
    assert (tuple(own), sum(made.lengths), len(made.input_ids_T) % LENGTH_MULTIPLE) == (UNEQUAL, len(made.input_ids_T), 0)
    assert rounded_up(made) is made
    with torch.no_grad():
        alone = torch.cat(logprobs_one_by_one(model, rows))
        found = forward_logprobs(model, made)["logprobs_N"]
        planted = forward_logprobs(model, replace(made, lengths=(filler, *own)))["logprobs_N"]
    assert float((found - alone).abs().max()) < allowed("packed_logprobs")
    assert float((planted - alone).abs().max()) > PLANTED_FACTOR * allowed("packed_logprobs")


def test_packs_in_bf16_are_rounded_up_and_their_filler_is_not_seen_outside(tiny_model: Callable):
    model, made = tiny_model("llama").model.to(torch.bfloat16), pack(rows_of(UNEQUAL))
    seen: list[int] = []
    model.base_model.register_forward_pre_hook(lambda _, given, named: seen.append(named["input_ids"].shape[1]), with_kwargs=True)
    with torch.no_grad():
        states_TD = hidden_states(model, made)
    assert seen == [rounded(sum(UNEQUAL))]
    assert len(states_TD) == sum(UNEQUAL)


def test_a_sliding_window_and_a_soft_cap_are_obeyed(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    """The window (12) is shorter than the rows: forgetting it must show, and so must forgetting the cap on scores."""
    import giong.engine.attention as attention

    true_attend, true_rows = attention._attend, attention.row_attention
    for family, forget in (("mistral", "window"), ("gemma2", "window"), ("gemma2", "softcap")):

        def attend(query, key, value, scaling, dropout, window, softcap, causal, forget=forget):  # type: ignore[no-untyped-def]
            return true_attend(
                query, key, value, scaling, dropout, None if forget == "window" else window,
                None if forget == "softcap" else softcap, causal,
            )  # fmt: skip

        def rows(*tensors, window, forget=forget, **settings):  # type: ignore[no-untyped-def]
            return true_rows(*tensors, window=None if forget == "window" else window, **settings)

        monkeypatch.setattr(attention, "_attend", attend)
        monkeypatch.setattr(attention, "row_attention", rows)
        assert largest_difference(tiny_model, family, UNEQUAL, None) > PLANTED_FACTOR * allowed("packed_logprobs"), (family, forget)


def test_the_models_own_attention_comes_back_also_after_an_error(tiny_model: Callable):
    model = tiny_model("llama").model
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="on purpose"), packed_attention(model):
        assert model.config._attn_implementation != before
        raise RuntimeError("on purpose")
    assert model.config._attn_implementation == before


def test_a_family_that_cannot_keep_rows_apart_is_refused():
    from transformers import MptConfig, MptForCausalLM

    model = MptForCausalLM(MptConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=64, max_seq_len=64))
    with pytest.raises(ModelError, match="mpt family cannot keep packed rows apart"), packed_attention(model):
        pass


# ---- gradients -------------------------------------------------------------------------------------------------------

EIGHT = (5, 33, 17, 2, 26, 9, 40, 12)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def gradients_by_hand(model: torch.nn.Module, rows: list[Row], planted: str | None = None) -> dict[str, torch.Tensor]:
    """Plain transformers: the weighted sum over all rows, divided once by the weight of all rows."""
    losses = [
        -(logprobs * torch.from_numpy(row.weights[row.weights > 0])).sum() for logprobs, row in zip(logprobs_one_by_one(model, rows), rows)
    ]
    weights = [float(row.weights.sum()) for row in rows]
    if planted == "mean of means":
        loss = sum(loss / weight for loss, weight in zip(losses, weights)) / len(rows)
    else:
        loss = sum(losses) / sum(weights)
    loss.backward()
    return gradients(model)


def relative_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return max(float((left[name] - right[name]).abs().max() / right[name].abs().max().clamp_min(1e-3)) for name in right)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_packing_order_and_accumulation_do_not_change_gradients(tiny_model: Callable, family: str):
    model = tiny_model(family).model.requires_grad_(True)
    rows = rows_of(EIGHT)
    expected = gradients_by_hand(model, rows)
    for order, max_tokens in ((rows, 10_000), (rows, 1), (rows, 45), (rows[::-1], 45)):
        backward(model, order, sft.loss, max_tokens)
        assert relative_difference(gradients(model), expected) < allowed("gradients")


def test_a_mean_of_means_is_seen(tiny_model: Callable):
    model = tiny_model("llama").model.requires_grad_(True)
    rows = rows_of(EIGHT)
    backward(model, rows, sft.loss, 1)
    right = gradients(model)
    wrong = gradients_by_hand(model, rows, planted="mean of means")
    assert relative_difference(right, wrong) > PLANTED_FACTOR * allowed("gradients")


def test_the_loss_and_metrics_are_per_unit_of_weight(tiny_model: Callable):
    model, rows = tiny_model("qwen2").model, rows_of(EIGHT)

    def objective(tensors: dict[str, torch.Tensor]) -> LossSum:
        result = sft.loss(tensors)
        return LossSum(result.loss_sum.requires_grad_(True), result.weight_sum, {"twice": 2 * result.loss_sum.detach()})

    figures = backward(model, rows, objective, 45)
    weights = sum(float(row.weights.sum()) for row in rows)
    by_hand = -sum(
        float((logprobs * torch.from_numpy(row.weights[row.weights > 0])).sum())
        for logprobs, row in zip(logprobs_one_by_one(model, rows), rows)
    )
    assert figures["loss"] == pytest.approx(by_hand / weights, abs=allowed("packed_logprobs"))
    assert figures["twice"] == pytest.approx(2 * figures["loss"], rel=1e-6)


def test_rows_without_loss_are_passed_over_and_none_with_loss_is_an_error(tiny_model: Callable):
    model = tiny_model("llama").model.requires_grad_(True)
    rows = rows_of((9, 12))
    silent = Row(np.arange(6), np.zeros(6, dtype=np.float32))
    backward(model, rows, sft.loss, 12)
    expected = gradients(model)
    backward(model, [silent, *rows], sft.loss, 12)
    assert relative_difference(gradients(model), expected) < allowed("gradients")
    with pytest.raises(ValueError, match="carries loss"):
        backward(model, [silent], sft.loss, 12)


def test_evaluated_rows_come_back_in_their_order(tiny_model: Callable):
    model, rows = tiny_model("gpt2").model, rows_of(EIGHT)
    with torch.no_grad():
        expected = logprobs_one_by_one(model, rows)
    for found, row_expected in zip(evaluate_rows(model, rows, 45), expected, strict=True):
        torch.testing.assert_close(found, row_expected, rtol=0, atol=allowed("packed_logprobs"))


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_a_pack_lays_rows_end_to_end():
    """Rows (7 8 9) with loss on 9 and (4 5) with loss on 5: the position *before* each target predicts it."""
    made = pack([Row(np.array([7, 8, 9]), np.array([0, 0, 1.0])), Row(np.array([4, 5]), np.array([0, 0.5]))])
    assert made.input_ids_T.tolist() == [7, 8, 9, 4, 5]
    assert made.position_ids_T.tolist() == [0, 1, 2, 0, 1]
    assert made.lengths == (3, 2)
    assert made.loss_positions_N.tolist() == [1, 3]
    assert made.targets_N.tolist() == [9, 5]
    assert made.weights_N.tolist() == [1.0, 0.5]
    assert made.row_of_N.tolist() == [0, 1]


def test_packs_hold_every_row_once_and_no_more_tokens_than_allowed():
    """Longest first into the first pack with room: 7 | 6 | 5 -> 3 goes to 7, 2 and 2 to 6 (6+2+2 = 10), 5 stands alone."""
    assert plan_packs([3, 7, 2, 6, 5, 2], 10) == [[0, 1], [2, 3, 5], [4]]
    assert plan_packs([50, 4], 10) == [[0], [1]]
    lengths = np.random.default_rng(0).integers(1, 40, size=100).tolist()
    packs = plan_packs(lengths, 64)
    assert sorted(index for members in packs for index in members) == list(range(100))
    assert all(sum(lengths[index] for index in members) <= 64 for members in packs)


def test_packs_are_of_nearly_equal_size():
    """16 rows of 220 tokens: first fit would fill one pack with nine of them and leave seven."""
    assert [len(members) for members in plan_packs([220] * 16, 2048)] == [8, 8]
    lengths = np.random.default_rng(1).integers(140, 300, size=24).tolist()
    sizes = [sum(lengths[index] for index in members) for members in plan_packs(lengths, 2048)]
    assert len(sizes) == -(-sum(lengths) // 2048) and max(sizes) <= 1.05 * sum(sizes) / len(sizes)
    assert plan_packs([900, 100, 100], 1000) == [[0], [1, 2]]
    assert plan_packs([3000, 900, 800, 300, 200], 2048) == [[0], [1, 4], [2, 3]], "a row above the budget says nothing of the others"


def test_packs_for_lanes_are_as_many_as_keep_them_busy():
    assert plan_packs([30, 20, 10], 100, 2) == [[0], [1, 2]]
    assert [len(plan_packs([220] * num, 1024, 2)) for num in (1, 2, 4, 5, 16)] == [1, 2, 2, 2, 4]
    assert plan_packs([1500, 200, 200], 1024, 2) == [[0], [1], [2]], "a row above the budget stands alone, and the others share lanes"
    generator = np.random.default_rng(5)
    for _ in range(50):
        lengths = generator.integers(5, 300, size=generator.integers(2, 40)).tolist()
        plain, packs = (plan_packs(lengths, 512, lanes) for lanes in (1, 2))
        largest = [max(sum(lengths[index] for index in members) for members in made) for made in (plain, packs)]
        assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
        assert largest[1] <= largest[0] and len(plain) <= len(packs) <= -(-len(plain) // 2) * 2


def test_steps_see_each_row_once_per_epoch_and_depend_on_the_seed_only():
    steps = plan_steps(10, 4, 2.5, seed=3)
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2, 4, 1]
    for epoch in (0, 1):
        assert sorted(np.concatenate(steps[3 * epoch : 3 * epoch + 3]).tolist()) == list(range(10))
    assert np.concatenate(steps[:3]).tolist() != np.concatenate(steps[3:6]).tolist()
    again, other = plan_steps(10, 4, 2.5, seed=3), plan_steps(10, 4, 2.5, seed=4)
    assert all((left == right).all() for left, right in zip(steps, again, strict=True))
    assert any((left != right).any() for left, right in zip(steps, other, strict=True))
