"""Section `evaluation.judge`: a language model that compares answers in pairs."""

from __future__ import annotations

from pydantic import Field

from giong.config.base import Section
from giong.config.remote import RemoteModelConfig


class JudgeConfig(Section):
    model: RemoteModelConfig
    """The judge's endpoint; better of another family than the models that it judges, because models like their own kind."""
    arms: list[str] | None = None
    """Arms that are compared, each with each; by default the base, the best prompt, the tuned model and the author's own text."""
    max_requests: int = Field(default=20, ge=2)
    """Test requests whose answers are compared: with four arms each costs twelve questions, both orders of six pairs."""
    num_samples: int = Field(default=3, ge=1)
    """Passages of the author's training text that the judge is shown."""
