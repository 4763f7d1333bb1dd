"""The parts of a decoder that can be named in every family: its layers, norms and biases."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D


def decoder_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The decoder's layers, first to last, each of which can be computed again by itself; none in a family that has no such layers."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def matrices(layer: torch.nn.Module) -> dict[str, torch.nn.Linear | Conv1D]:
    """The linear layers of a decoder layer by their names in it; GPT-2's Conv1D is one, with its weight transposed."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}


def matrix_widths(matrix: torch.nn.Linear | Conv1D) -> tuple[int, int]:
    """Width of what a linear layer reads and of what it gives."""
    rows, columns = matrix.weight.shape
    return (rows, columns) if isinstance(matrix, Conv1D) else (columns, rows)


def sublayers(layer: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module] | None:
    """The modules out of which a layer's attention and its MLP come, before anything is added; None where they have other names."""
    children = dict(layer.named_children())
    attention = next((children[name] for name in ("self_attn", "attn", "attention", "self_attention") if name in children), None)
    if attention is not None and "mlp" in children:
        return attention, children["mlp"]
    # BERT adds and normalises inside both.
    ends = [getattr(getattr(module, "output", None), "dense", None) for module in (attention, layer)]
    return None if None in ends else (ends[0], ends[1])


def norms(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that normalise, in the order of the model, those on single heads among them."""
    return [module for module in model.modules() if "Norm" in type(module).__name__ and module._parameters]


def final_norm(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The norm behind the last layer; none in a family without one."""
    outside = [module for module in model.base_model.children() if module in set(norms(model))]
    return outside[-1:]


def first_position(model: PreTrainedModel) -> int:
    """The number of a row's first position: 0, but in RoBERTa and its kin the one behind the padding's."""
    embeddings = getattr(model.base_model, "embeddings", None)
    return embeddings.padding_idx + 1 if hasattr(embeddings, "create_position_ids_from_input_ids") else 0


def biases(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The bias terms of all matrices and norms."""
    return [parameter for name, parameter in model.named_parameters() if name.rpartition(".")[2] == "bias"]


def task_head(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """What a classification model has behind its base, by name: its head, and the pooler that feeds it (BERT). None in a language model."""
    if model.get_output_embeddings() is not None:
        return {}
    base = model.base_model
    found = {} if base is model else {name: module for name, module in model.named_children() if module is not base}
    if (pooler := getattr(base, "pooler", None)) is not None:
        found["pooler" if base is model else f"{model.base_model_prefix}.pooler"] = pooler
    return {name: module for name, module in found.items() if next(module.parameters(), None) is not None}


def embeddings_and_heads(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Weights that look a vector up by its number (tokens, positions, kinds of tokens), and those that outputs come out of, biases too."""
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    head = model.get_output_embeddings()
    return parameters_of([*tables, *([] if head is None else [head]), *task_head(model).values()])


def parameters_of(modules: list[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """Every parameter of these modules, once."""
    return list({id(parameter): parameter for module in modules for parameter in module.parameters()}.values())


def num_parameters_of(modules: list[torch.nn.Module]) -> int:
    return sum(parameter.numel() for parameter in parameters_of(modules))


def head_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The output head; none where it is the embedding matrix, which does not move without the embeddings."""
    head = model.get_output_embeddings()
    return [] if head is None or head.weight is model.get_input_embeddings().weight else [head]
