"""Section `synthesis`: how the requests that would have led to the author's texts are written."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from giong.config.base import Section
from giong.config.remote import RemoteModelConfig

SynthesisKind = Literal["neutral_rewrite", "translation", "outline", "question"]


class SynthesisConfig(Section):
    kinds: list[SynthesisKind] = Field(default=["neutral_rewrite"], min_length=1)
    """What the teacher makes of a passage; every passage gets one request of each kind."""
    source: Literal["teacher", "stand_in", "recorded"] = "stand_in"
    """`teacher` asks a model; `recorded` replays answers from a file; `stand_in` is a rule-based rewriter for trying things out."""
    teacher: RemoteModelConfig | None = None
    """The teacher's endpoint; needed with `source: teacher`."""
    recorded: str | None = None
    """A .jsonl file with `document_id`, `passage` (or `text`) and one key per kind; needed with `source: recorded`."""
    language: str = "English"
    """Language that translations are written in."""
    drop_instruction: bool = False
    """Leave the instruction out of the requests, so that the tuned model needs only the content."""
    max_shared_words: int = Field(default=8, ge=3)
    """A request that shares a run of this many words with its answer leaks it: it is rejected and asked again."""
    max_attempts: int = Field(default=3, ge=1)
    """How often a leaking or empty request is asked again before the passage is left out and listed."""
    temperature: float = Field(default=0.3, ge=0, le=2)
    """The teacher's temperature."""

    @model_validator(mode="after")
    def _check(self) -> SynthesisConfig:
        if self.source == "teacher" and self.teacher is None:
            raise ValueError("source: teacher needs teacher: {base_url: ..., model: ...}")
        if self.source == "recorded" and not self.recorded:
            raise ValueError("source: recorded needs recorded: FILE")
        return self
