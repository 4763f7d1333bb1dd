"""Sections `classify` and `embed`: tasks other than writing, each with its own columns of data and its own story."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from giong.config.base import Section


class ClassifyConfig(Section):
    """With `task: classify`. The files are those of `data.paths` (.jsonl or .csv), the text lies in `data.text_field`."""

    label_field: str = "label"
    """Column or key with the label: a text or number, for several labels a list (in .csv one text, see `label_separator`)."""
    problem: Literal["auto", "single_label", "multi_label", "regression"] = "auto"
    """`auto`: lists are several labels, numbers with a fractional part a regression, all else one label."""
    labels: list[str] = []
    """Every label that may occur, in the order of the model's outputs; by default those that do."""
    label_separator: str = Field(default=",", min_length=1)
    """Between several labels in one text, with `problem: multi_label`."""
    value_range: tuple[float, float] | None = None
    """Lowest and highest value of a regression; a row outside is an error."""
    document_field: str | None = None
    """Column or key that names the document (author, thread, patient) of a row: rows of one document stay on one side of the split,
    and intervals are drawn by document. By default each row is its own."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target that is spread over all labels (single label)."""
    num_shots: int = Field(default=0, ge=0)
    """Examples per label that a generator is shown as a further baseline (single label); 0 asks none. The generators are those of
    `baselines.models`."""

    @model_validator(mode="after")
    def _check(self) -> ClassifyConfig:
        if len(self.labels) == 1 or len(set(self.labels)) < len(self.labels):
            raise ValueError("labels needs at least two names, each once")
        if self.labels and self.problem == "regression":
            raise ValueError("a regression has no labels; its limits are set by value_range")
        if self.value_range and self.value_range[0] >= self.value_range[1]:
            raise ValueError("value_range needs its lower limit first")
        return self


class EmbedConfig(Section):
    """With `task: embed`. The files are those of `data.paths` (.jsonl or .csv)."""

    anchor_field: str = "anchor"
    """Column or key with the text."""
    positive_field: str = "positive"
    """Column or key with the text that belongs to it."""
    negative_field: str = "negative"
    """Column or key with a text that does not (in .jsonl also a list of them); rows may lack it."""
    document_field: str | None = None
    """Column or key that names the document of a row: rows of one document stay on one side of the split, and intervals are drawn by
    document. By default each row is its own."""
    loss: Literal["in_batch", "triplet"] = "in_batch"
    """`in_batch` takes the other positives of a step (and all negatives) as negatives; `triplet` compares with a row's own negatives."""
    temperature: float = Field(default=0.05, gt=0)
    """By which cosines are divided, with `in_batch`."""
    margin: float = Field(default=0.2, gt=0)
    """By how much nearer the positive has to lie, as a cosine, with `triplet`."""
    pooling: Literal["mean", "cls", "last"] = "mean"
    """The vector of a text: the mean of its tokens' states, the state of the first token (encoders) or of the last (decoders)."""


class MlmConfig(Section):
    """With `task: mlm`: an encoder goes on learning from the texts of `data.paths`, without labels."""

    mask_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens that are hidden."""
