"""Models that judge a text as a whole: a classifier, or an encoder of texts into vectors; on encoders and decoders alike.

One decision a reader may question: a classifier is the family's own class of transformers (`AutoModelForSequenceClassification`),
with the names of the labels in its config, and not a head of giong's: the saved folder loads anywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from scipy.special import expit, softmax
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers import logging as transformers_logging

from giong.config import ModelConfig
from giong.errors import ModelError
from giong.models.devices import resolve_device
from giong.models.load import longest_row, place, read_model
from giong.models.rows import Row
from giong.models.trained import put_partial

PROBLEM_TYPES = {"single_label": "single_label_classification", "multi_label": "multi_label_classification", "regression": "regression"}
"""transformers' names."""


OWN_SETTINGS = {"pooling", "value_mean", "value_spread", "mask_share"}
"""What giong writes into a model's config beside transformers' own: how texts become vectors, the scale of a regression's output, and the
share of tokens that were hidden."""


@dataclass
class RowModel:
    """A model ready for rows of text. `notices` are sentences that the user should see."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name_or_path: str
    max_seq_length: int
    notices: list[str] = field(default_factory=list)


def load_row_model(config: ModelConfig, settings: dict[str, Any], *, dtype: torch.dtype, seed: int = 0) -> RowModel:
    """The base with a head for `settings` (see `label_settings`), with its own for hidden tokens (`mask_share`), or without one (`pooling`).

    A head that the folder does not hold is drawn from `seed`. Raises ModelError, ConfigError and ResourceError as `load_model` does.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = resolve_device(config.device)
    torch.manual_seed(seed)
    if "id2label" in settings:
        # JSON has no keys but texts.
        settings = {**settings, "id2label": {int(index): name for index, name in settings["id2label"].items()}}
    kind = AutoModel if "pooling" in settings else AutoModelForMaskedLM if "mask_share" in settings else AutoModelForSequenceClassification
    tokenizer, model = read_model(config, dtype, kind, **{name: value for name, value in settings.items() if name not in OWN_SETTINGS})
    for name in OWN_SETTINGS & settings.keys():
        setattr(model.config, name, settings[name])
    if "pad_token_id" in settings:
        _fill_with(settings["pad_token_id"], model, tokenizer)
    if model.config.pad_token_id is None:
        # transformers' own head of a decoder looks for the last token that is none.
        model.config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if "pooling" in settings and hasattr(model, "pooler"):
        # BERT's second way of pooling, which nothing would train.
        model.pooler = None
    place(model, device, config.name_or_path)
    max_seq_length, notices = longest_row(config, model)
    return RowModel(model, tokenizer, config.name_or_path, max_seq_length, notices)


def pad_apart(loaded: RowModel, last_ids: Collection[int]) -> int | None:
    """Another filler for `loaded` where rows end with its own: transformers' head of a decoder would read the token before it. Returns its
    id, to be set again with the model's settings (`pad_token_id`); None where the model's own serves.

    Raises ModelError where the tokenizer has no other special token.
    """
    tokenizer = loaded.tokenizer
    if loaded.model.config.pad_token_id not in last_ids or not hasattr(loaded.model, "score"):
        return None
    added = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
    found = next((index for index in (tokenizer.unk_token_id, *added) if index is not None and index not in last_ids), None)
    if found is None:
        raise ModelError(
            "The token that ends a turn is the only one that could fill rows, and a model that judges whole rows would skip it",
            place=loaded.name_or_path, remedy="Add a pad token to its tokenizer, or take another base.",
        )  # fmt: skip
    _fill_with(found, loaded.model, tokenizer)
    return found


def _fill_with(token_id: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model.config.pad_token_id = token_id
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(token_id)


def answers(config: Any, outputs_NC: np.ndarray) -> np.ndarray:
    """What the outputs of a model with this config say: shares over the labels, one share per label, values, or vectors of length 1."""
    if hasattr(config, "pooling"):
        return outputs_NC / np.linalg.norm(outputs_NC, axis=1, keepdims=True).clip(1e-12)
    if config.problem_type == "regression":
        return outputs_NC * getattr(config, "value_spread", 1.0) + getattr(config, "value_mean", 0.0)
    return expit(outputs_NC) if config.problem_type == "multi_label_classification" else softmax(outputs_NC, axis=1)


def label_settings(labels: Sequence[str], problem: str) -> dict[str, Any]:
    """What a classifier's config says about its labels. A regression has one output and no names."""
    names = list(labels) or ["value"]
    return {
        "num_labels": len(names), "problem_type": PROBLEM_TYPES[problem],
        "id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)},
    }  # fmt: skip


def load_trained_row_model(config: ModelConfig, settings: dict[str, Any], artifact: Path, kind: str, *, dtype: torch.dtype) -> RowModel:
    """What training saved in the format `kind` ("adapter", "weights" or "partial"), as a plain model: an adapter is folded in."""
    if kind == "weights":
        return load_row_model(config.model_copy(update={"name_or_path": str(artifact)}), settings, dtype=dtype)
    loaded = load_row_model(config, settings, dtype=dtype)
    if kind == "adapter":
        with warnings.catch_warnings():
            # PEFT asks transformers in a way that transformers is about to drop; a user can do nothing about it.
            warnings.simplefilter("ignore", FutureWarning)
            tuned = PeftModel.from_pretrained(loaded.model, str(artifact))
        loaded.model = tuned.merge_and_unload(safe_merge=True).eval()
    else:
        put_partial(loaded.model, artifact)
    loaded.model.requires_grad_(False)
    return loaded


def text_rows(loaded: RowModel, texts: Sequence[str], names: Sequence[str], targets: Sequence[np.ndarray]) -> tuple[list[Row], list[str]]:
    """One row per text, with the tokenizer's own special tokens; and the names of those that were cut to `max_seq_length`."""
    encoded = loaded.tokenizer(list(texts), truncation=True, max_length=loaded.max_seq_length, verbose=False)["input_ids"]
    whole = loaded.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
    rows = [
        Row(np.asarray(ids, dtype=np.int64), np.zeros(len(ids), dtype=np.float32), name, np.asarray(target, dtype=np.float32))
        for ids, name, target in zip(encoded, names, targets, strict=True)
    ]
    return rows, [name for name, ids, full in zip(names, encoded, whole) if len(full) > len(ids)]
