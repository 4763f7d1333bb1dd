"""Single weights of the matrices move: a chosen share of each, by what the gradients of some training rows say.

Sung et al. 2021, 2111.09839, choose them by the empirical Fisher information (section 3.1); Song et al. 2023, 2312.11875, by the
gradient. The chosen weights have fp32 masters of their own, and so gradients and optimizer state for them alone; the gradient of a
matrix is whole for as long as autograd needs to hand it over.

One decision a reader may question: the same share of every matrix, and not the best weights of the whole model. So the number is
known before loading, and scores need be held for a few matrices at a time instead of for all weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from giong.config import MethodConfig
from giong.errors import ConfigError
from giong.methods.trainable import Trainable, trainable_tensors
from giong.models.parts import decoder_layers, matrices
from giong.models.trained import put_entries, save_entries
from giong.sizing.shapes import num_chosen

FORMAT = "partial"

SCORES_AT_ONCE = 2**28
"""Scores held at a time (1 GiB in fp32). Where the matrices have more, the rows are gone through again for each such part."""


def choose(
    model: PreTrainedModel, config: MethodConfig, go_through_rows: Callable[[], None] | None = None, *, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Places of the chosen weights in each matrix as it lies in memory (flat, int32, rising), by the matrix's name.

    `go_through_rows` runs forward and backward over each calibration row by itself; scores by gradient need it. Raises ConfigError for
    a family whose layers cannot be told apart.
    """
    found = _matrices(model)
    if config.sparse_score in ("fisher", "gradient"):
        if go_through_rows is None:
            raise ValueError(f"sparse_score {config.sparse_score!r} needs rows")
        scored = _scores_by_gradient(model, found, go_through_rows, squared=config.sparse_score == "fisher")
    elif config.sparse_score == "magnitude":
        scored = ((name, matrix.detach().abs()) for name, matrix in found.items())
    else:
        generator = torch.Generator().manual_seed(seed)
        scored = ((name, torch.rand(matrix.shape, generator=generator)) for name, matrix in found.items())
    return {
        name: scores.flatten().topk(num_chosen(scores.numel(), config.sparse_share), sorted=False).indices.sort().values.int().cpu()
        for name, scores in scored
    }


def apply(
    model: PreTrainedModel, config: MethodConfig, *, seed: int = 0, base_name: str = "", indices: Mapping[str, torch.Tensor] | None = None
) -> Trainable:
    """Make the weights at `indices` (what `choose` gave) trainable; by magnitude and at random they are chosen here where it is None."""
    indices = choose(model, config, seed=seed) if indices is None else indices
    found = {name: matrix for name, matrix in _matrices(model).items() if name in indices}
    places = {name: indices[name].to(matrix.device) for name, matrix in found.items()}
    before = {name: matrix.detach().view(-1)[places[name]].cpu() for name, matrix in found.items()}
    values = {name: torch.nn.Parameter(entries.to(found[name].device, torch.float32, copy=True)) for name, entries in before.items()}
    # What moves beside them: the head of a classifier.
    whole = trainable_tensors(model, (), config.name, base_name)

    def write(entries: Mapping[str, torch.Tensor]) -> None:
        for name, matrix in found.items():
            put_entries(matrix, places[name], entries[name])

    # The masters are what the optimizer sees; the matrices follow when they are next computed with.
    hooks = [model.base_model.register_forward_pre_hook(lambda module, given: write(values))]
    for name, matrix in found.items():
        matrix.requires_grad_(True)
        hooks.append(matrix.register_post_accumulate_grad_hook(partial(_take_entries, values[name], places[name])))

    def take_out() -> None:
        for hook in hooks:
            hook.remove()
        model.requires_grad_(False)

    def save(folder: Path) -> None:
        write(values)
        save_entries(folder, found, places, whole.parameters, method=config.name, base_name=base_name)

    def merge() -> PreTrainedModel:
        write(values)
        take_out()
        return model

    def detach() -> bool:
        take_out()
        write(before)
        return whole.detach()

    return Trainable(model, {**values, **whole.parameters}, FORMAT, save, merge, detach)


def _matrices(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    layers = decoder_layers(model)
    if not layers:
        raise ConfigError(
            f"The layers of the {model.config.model_type} family cannot be told apart", place="method.name", remedy="Use lora or full."
        )
    wanted = {id(matrix.weight) for layer in layers for matrix in matrices(layer).values()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in wanted}


def _take_entries(values: torch.nn.Parameter, places: torch.Tensor, matrix: torch.nn.Parameter) -> None:
    """Hook: of a gradient that has just been finished the chosen entries are added to those of `values`, and the rest is let go."""
    # First, so that a pass which runs out of memory here leaves nothing that would be added to.
    gradient, matrix.grad = matrix.grad, None
    entries = gradient.reshape(-1)[places].float()
    values.grad = entries if values.grad is None else values.grad.add_(entries)


def _scores_by_gradient(
    model: PreTrainedModel, found: Mapping[str, torch.nn.Parameter], go_through_rows: Callable[[], None], *, squared: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Over the rows, the sum of squared gradients (the diagonal of the empirical Fisher information) or the size of their sum."""
    for part in _parts(found):
        scores = {name: torch.zeros_like(matrix, dtype=torch.float32, requires_grad=False) for name, matrix in part.items()}
        model.requires_grad_(False)
        for matrix in part.values():
            matrix.requires_grad_(True)
        hooks = [matrix.register_post_accumulate_grad_hook(partial(_add_score, scores[name], squared)) for name, matrix in part.items()]
        try:
            go_through_rows()
        finally:
            for hook in hooks:
                hook.remove()
            model.requires_grad_(False)
        for name in part:
            yield name, scores.pop(name).abs()


def _add_score(scores: torch.Tensor, squared: bool, matrix: torch.nn.Parameter) -> None:
    gradient = matrix.grad.float()
    scores.add_(gradient.square() if squared else gradient)
    matrix.grad = None


def _parts(found: Mapping[str, torch.nn.Parameter]) -> Iterator[dict[str, torch.nn.Parameter]]:
    names = list(found)
    for places in parts_of([matrix.numel() for matrix in found.values()]):
        yield {names[place]: found[names[place]] for place in places}


def parts_of(sizes: Sequence[int]) -> list[list[int]]:
    """The places of matrices of these sizes whose scores are held together: for each such part `choose` goes through the rows once."""
    parts: list[list[int]] = [[]]
    for place, size in enumerate(sizes):
        if parts[-1] and sum(sizes[other] for other in parts[-1]) + size > SCORES_AT_ONCE:
            parts.append([])
        parts[-1].append(place)
    return parts
