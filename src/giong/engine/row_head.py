"""What a model makes of a whole row: the output of its classification head, or its pooled hidden state where it has none.

The head is the family's own, run on packed rows: what is trained here is what transformers computes when it loads the saved folder.

One decision a reader may question: the heads are told by the names of their modules and not by their classes. transformers has a
dozen classes for what comes down to three sequences of modules, and a trial (`row_check.check_rows`) refuses a family whose own forward
pass gives other numbers.

Axis letters: R rows of a pack, D width, C classes (or D, where there is no head).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from transformers import PreTrainedModel

from giong.errors import ModelError

Pooling = Literal["cls", "mean", "last"]
"""The state of a row's first token, the mean over its tokens, or the state of its last one."""


def pooled_states(hidden_TD: torch.Tensor, lengths: tuple[int, ...], pooling: Pooling) -> torch.Tensor:
    """One hidden state per row, (R, D)."""
    if pooling == "mean":
        return torch.stack([row.mean(0) for row in hidden_TD.split(lengths)])
    counts = torch.tensor(lengths)
    places = counts.cumsum(0) - (counts if pooling == "cls" else 1)
    return hidden_TD.index_select(0, places.to(hidden_TD.device))


def row_outputs(model: PreTrainedModel, hidden_TD: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """(R, C) in fp32: what the head makes of each row; the pooled states (by `config.pooling`) of a model without a head."""
    if model.base_model is model:
        return pooled_states(hidden_TD, lengths, model.config.pooling).float()
    return _head_of(model)(hidden_TD, lengths).float()


def _head_of(model: PreTrainedModel) -> Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor]:
    base = model.base_model
    if hasattr(model, "score"):  # Llama, Qwen, Gemma, Mistral, GPT-2
        return lambda hidden_TD, lengths: model.score(pooled_states(hidden_TD, lengths, "last"))
    if getattr(base, "pooler", None) is not None and hasattr(model, "dropout"):  # BERT
        return lambda hidden_TD, lengths: model.classifier(model.dropout(base.pooler(pooled_states(hidden_TD, lengths, "cls")[:, None])))
    if hasattr(model, "head") and hasattr(model, "drop"):  # ModernBERT
        pooling = model.config.classifier_pooling
        return lambda hidden_TD, lengths: model.classifier(model.drop(model.head(pooled_states(hidden_TD, lengths, pooling))))
    raise ModelError(
        f"The classification head of the {model.config.model_type} family is not known here", place=model.config.model_type,
        remedy="Use BERT, ModernBERT, or a decoder (Llama, Qwen, Gemma, Mistral, GPT-2).",
    )  # fmt: skip
