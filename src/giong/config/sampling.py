"""Section `sampling`: how the tuned model draws its tokens. Left out, it is chosen among a few settings after the training."""

from __future__ import annotations

from pydantic import Field

from giong.config.base import Section


class SamplingConfig(Section):
    temperature: float | None = Field(default=None, ge=0)
    """0 takes the likeliest token every time; larger values spread the draw."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Draw from the likeliest tokens that hold this share of the probability together; 1 draws from all."""
    top_k: int | None = Field(default=None, ge=0)
    """Draw from this many likeliest tokens; 0 draws from all."""
    repetition_penalty: float | None = Field(default=None, gt=0)
    """Makes tokens that were already written less likely; 1 leaves them alone."""
    no_repeat_ngram_size: int | None = Field(default=None, ge=0)
    """No run of so many tokens comes twice in an answer; those of the request may be repeated. 0 allows all."""

    def chosen(self) -> dict[str, float]:
        """The settings that are given, by name."""
        return self.model_dump(exclude_none=True)
