"""One forward and backward pass over a pack: hidden states, log-probabilities where there is loss, the objective's sum.

The decoder runs without its head; `forward_logprobs` puts the head on the positions that need it. Nothing here knows what
the objective is: it takes named tensors and returns a `LossSum`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing

import numpy as np
import torch
from torch.nn.functional import gelu
from transformers import PreTrainedConfig, PreTrainedModel

from giong.contracts import LossSum
from giong.engine.attention import check_chunks
from giong.engine.cross_entropy import Head, token_logprobs
from giong.engine.devices import on_device, packs_ahead
from giong.engine.distributed import ALONE, Processes
from giong.engine.fast_path import fast_path
from giong.engine.lanes import num_lanes, side_by_side
from giong.engine.packing import Pack, group_lengths, loss_weight, pack, plan_packs, rounded_up
from giong.engine.row_head import row_outputs
from giong.engine.shapes import writes_code
from giong.engine.virtual_tokens import behind_soft_prompt
from giong.models.parts import first_position
from giong.models.rows import Row
from giong.models.soft_prompt import soft_prompt_of

Objective = Callable[[dict[str, torch.Tensor]], LossSum]
"""From named tensors to sums: `logprobs_N`, `weights_N`, `row_of_N`, with rows in groups `group_of_R` and their extras; or `outputs_RC`,
`targets_RC`."""

Forward = Callable[[PreTrainedModel, Pack], dict[str, torch.Tensor]]
"""How a pack becomes named tensors: `forward`, or what computes more beside it."""

Passes = Iterator[tuple[Pack, float]]
"""What a step computes, one after the other: a pack on the model's device, and the factor of its loss."""

WHOLE_FORWARD = "_whole_forward"
"""What a model that is spread over processes is asked for log-probabilities through, as an attribute of that name."""


def output_head(model: PreTrainedModel) -> Head:
    """The model's output head with the logit transforms of its family (Gemma's soft cap; Granite's, HyperCLOVA X's and Cohere's scale)."""
    layer = model.get_output_embeddings()
    config = model.config
    scale = getattr(config, "logit_scale", None) or _scaling(config)
    return Head(layer.weight, getattr(layer, "bias", None), getattr(config, "final_logit_softcapping", None), scale)


def _scaling(config: PreTrainedConfig) -> float:
    scaling = getattr(config, "logits_scaling", None) or 1.0
    # One name for two things: Granite divides by it.
    return scaling if config.model_type == "hyperclovax" else 1.0 / scaling


def before_head(model: PreTrainedModel, hidden_ND: torch.Tensor) -> torch.Tensor:
    """What the head is applied to: the states themselves, or what a layer between them and the vocabulary makes of them, by the model's own
    modules (BERT, RoBERTa, ELECTRA, ModernBERT and its decoder). What is not known here is found out by `row_check`."""
    if (predictions := getattr(getattr(model, "cls", None), "predictions", None)) is not None:
        return predictions.transform(hidden_ND)
    if hasattr(model, "generator_predictions"):
        return model.generator_predictions(hidden_ND)
    head = getattr(model, "head", None) or getattr(model, "lm_head", None)
    if hasattr(model, "decoder") and model.decoder is model.get_output_embeddings():
        return hidden_ND if head is None else head(hidden_ND)
    if all(hasattr(head, name) for name in ("dense", "layer_norm", "decoder")):
        return head.layer_norm(gelu(head.dense(hidden_ND)))
    return hidden_ND


def hidden_states(model: PreTrainedModel, pack: Pack) -> torch.Tensor:
    """Last hidden states (T, D) of a pack, rows kept apart, each behind the model's soft prompt if it has one."""
    pack = on_device(pack, model.device)
    num_tokens = len(pack.input_ids_T)
    if writes_code(model.device, model.dtype):
        pack = rounded_up(pack)
    prompt = soft_prompt_of(model)
    if prompt is None:
        inputs = {"input_ids": pack.input_ids_T[None], "position_ids": pack.position_ids_T[None], "lengths": pack.lengths}
    else:
        inputs, own = behind_soft_prompt(model, prompt, pack)
    check_chunks(model, max(inputs["lengths"]))
    if first := first_position(model):
        inputs["position_ids"] = inputs["position_ids"] + first
    with fast_path(model):
        hidden_TD = model.base_model(**inputs, use_cache=False).last_hidden_state[0]
    return (hidden_TD if prompt is None else hidden_TD.index_select(0, own))[:num_tokens]


def forward(model: PreTrainedModel, pack: Pack) -> dict[str, torch.Tensor]:
    """The named tensors that objectives declare, for one pack, on the model's device: of its tokens, or of rows that have a target."""
    if pack.targets_RC is None:
        return forward_logprobs(model, pack)
    pack = on_device(pack, model.device)
    return {"outputs_RC": row_outputs(model, hidden_states(model, pack), pack.lengths), "targets_RC": pack.targets_RC, **pack.extras}


PLAIN = forward
"""The one that changes nothing in the model: passes of it can be computed side by side."""


def forward_logprobs(model: PreTrainedModel, pack: Pack) -> dict[str, torch.Tensor]:
    """Log-probabilities where there is loss, with their weights and rows, on the model's device."""
    if whole_forward := model.__dict__.get(WHOLE_FORWARD):
        return whole_forward(pack)
    pack = on_device(pack, model.device)
    hidden_TD = hidden_states(model, pack)
    head = output_head(model)
    # Positions before the last loss are all that the head may see; the rest of the pack never meets the vocabulary.
    hidden_ND = before_head(model, hidden_TD.index_select(0, pack.loss_positions_N))
    # Of rows that are compared, the weights of the log-probabilities are known behind the forward pass alone.
    logprobs_N = token_logprobs(hidden_ND, head, pack.targets_N, None if pack.extras else pack.weights_N)
    named = {"logprobs_N": logprobs_N, "weights_N": pack.weights_N, "row_of_N": pack.row_of_N, "hidden_ND": hidden_ND}
    return {**named, **pack.extras}


def backward(
    model: PreTrainedModel, rows: Sequence[Row], objective: Objective, max_tokens: int | None, processes: Processes = ALONE,
    forward: Forward = forward, through: Callable[[Passes], Passes] = iter,
) -> dict[str, float]:  # fmt: skip
    """Accumulate the gradient of the objective over `rows`, in passes of at most `max_tokens` at a time; with None they share one pass.

    The loss is divided by the weight of all rows (`loss_weight`), known before the first pass, so neither packing nor the number of
    passes changes the gradient. Returns the objective's loss and metrics per unit of weight. Of several processes each takes
    its share of the rows: gradients, loss and metrics are then what it has to add to the others'. The passes are taken `through` what
    is given, as a clock that measures how long they take to come.
    """
    total_weight = loss_weight(rows)
    if total_weight == 0:
        raise ValueError("no token of these rows carries loss")
    rows = [row for row in rows if row.loss_weight]
    figures: list[dict[str, torch.Tensor]] = []

    def loss_of(ready: Pack, factor: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        result = objective(forward(model, ready))
        return result.loss_sum * factor / total_weight, {"loss": result.loss_sum.detach(), **result.metrics} if factor else {}

    # Around the backward passes too: a checkpointed layer is computed again there, and must compute the same.
    with fast_path(model):
        may_part = max_tokens is not None and forward is PLAIN
        budget = sum(map(len, rows)) if max_tokens is None else max_tokens
        if (lanes := num_lanes(model, group_lengths(rows), budget, processes) if may_part else 1) > 1:
            figures += _gradients_of_lanes(model, through(_passes(rows, budget // lanes, processes, model.device, lanes)), loss_of, lanes)
        else:
            for ready, factor in through(_passes(rows, budget, processes, model.device)):
                loss, found = loss_of(ready, factor)
                loss.backward()
                figures.append(found)
                # The graph of a pass holds memory until it is forgotten, and the name would keep it over the next forward pass.
                del loss
    return _mean_figures(figures, total_weight)


def _gradients_of_lanes(
    model: PreTrainedModel, passes: Passes, loss_of: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]], lanes: int
) -> list[dict[str, torch.Tensor]]:  # fmt: skip
    """As one backward pass after the other would: gradients reach the parameters in the order of the passes, by this thread alone."""
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradients(given: tuple[Pack, float]) -> tuple[Sequence[torch.Tensor | None], dict[str, torch.Tensor]]:
        loss, found = loss_of(*given)
        return torch.autograd.grad(loss, moving, allow_unused=True), found

    figures = []
    with closing(side_by_side(passes, gradients, lanes)) as made:
        for of_moving, found in made:
            reached = [(parameter, gradient) for parameter, gradient in zip(moving, of_moving) if gradient is not None]
            torch.autograd.backward([parameter for parameter, _ in reached], [gradient for _, gradient in reached])
            figures.append(found)
    return figures


def _passes(rows: Sequence[Row], max_tokens: int, processes: Processes, device: torch.device, lanes: int = 1) -> Passes:
    plan = processes.passes(rows, max_tokens, lanes)
    packs = (pack(members) for members, _ in plan)
    yield from zip(packs_ahead(packs, device), (factor for _, factor in plan))


def _mean_figures(figures: Sequence[Mapping[str, torch.Tensor]], total_weight: float) -> dict[str, float]:
    # Read at the end alone: a GPU would be waited for after every pack.
    sums: dict[str, float] = {"loss": 0.0}
    for pack_figures in figures:
        for name, value in pack_figures.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return {name: value / total_weight for name, value in sums.items()}


@torch.no_grad()
def evaluate_objective(model: PreTrainedModel, rows: Sequence[Row], objective: Objective, max_tokens: int) -> dict[str, float]:
    """The objective's loss and metrics per unit of weight, as `backward` gives them, without a gradient: of all `rows` at once, also where
    they are compared with each other, whatever the packs."""
    of_rows, whole = evaluate_rows(model, rows, max_tokens), pack(rows)
    if whole.targets_RC is None:
        made = {"logprobs_N": torch.cat(of_rows), "weights_N": whole.weights_N, "row_of_N": whole.row_of_N}
    else:
        made = {"outputs_RC": torch.stack(of_rows), "targets_RC": whole.targets_RC}
    result = objective({**made, **whole.extras})
    return _mean_figures([{"loss": result.loss_sum, **result.metrics}], loss_weight(rows))


@torch.no_grad()
def evaluate_rows(
    model: PreTrainedModel, rows: Sequence[Row], max_tokens: int, forward: Forward = forward, name: str = "logprobs_N"
) -> list[torch.Tensor]:
    """Log-probabilities of each row's loss tokens, or what else `name` says of them, or what the head makes of a row with a target (C,);
    in the order of the rows, on the CPU."""
    results: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    plan = plan_packs([len(row) for row in rows], max_tokens)
    packs = (pack([rows[index] for index in members]) for members in plan)
    for members, ready in zip(plan, packs_ahead(packs, model.device)):
        tensors = forward(model, ready)
        # A pack's loss tokens lie in the order of its rows.
        parts = (
            tensors["outputs_RC"].cpu().unbind()
            if "outputs_RC" in tensors
            else tensors[name].cpu().split([int(np.count_nonzero(rows[index].weights)) for index in members])
        )
        for index, part in zip(members, parts):
            results[index] = part
    return results
