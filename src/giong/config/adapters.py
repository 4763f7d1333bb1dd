"""Section `adapters`: several models of the project added into one."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from giong.config.base import Section


class AdaptersConfig(Section):
    merge: list[str] = []
    """Names of the models (trained with `lora`) whose updates are added."""
    weights: list[float] = []
    """What each update is multiplied by, in the same order; by default all by one over their number."""
    name: str = ""
    """Name of the model that comes of it."""
    combination: Literal["cat", "svd"] = "cat"
    """`cat` is exact, with the sum of the ranks; `svd` keeps the `rank` largest directions of the sum."""
    rank: int | None = Field(default=None, ge=1)
    """With `svd`: the rank of the result, by default the highest of the ranks that are added."""

    @model_validator(mode="after")
    def _weights_match(self) -> AdaptersConfig:
        if self.weights and len(self.weights) != len(self.merge):
            raise ValueError(f"{len(self.weights)} weights for {len(self.merge)} models: give one weight for each")
        return self
