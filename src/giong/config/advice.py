"""Section `advice`: what no measurement shows. `giong advise` asks it in the terminal; null is a question not answered yet."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from giong.config.base import Section

Goal = Literal["voice", "format", "facts", "skill", "cost", "privacy"]
Pace = Literal["never", "yearly", "monthly", "daily"]


class AdviceConfig(Section):
    goals: list[Goal] | None = None
    """Which aspects should improve: how it is said (`voice`), its form (`format`), what it knows (`facts`), what it can do (`skill`), what
    a call costs (`cost`), or that no text leaves the house (`privacy`)."""
    knowledge_changes: Pace | None = None
    """How often the knowledge that answers need changes. What changes monthly or daily has to be looked up."""
    must_cite: bool | None = None
    """Whether answers must name their sources. A tuned model cannot: it does not know where it has something from."""
    may_imitate: bool | None = None
    """Whether this person may be imitated; a consent recorded in `data.consent` is an answer too. False ends in *no-go*."""
    base_licensed: bool | None = None
    """Whether the licence of the base model allows this use. False ends in *no-go*."""
    base_tunable: bool | None = None
    """Whether the base can be tuned at all, here or at a provider that still takes jobs. False leaves prompting and retrieval."""
    human_hours: float | None = Field(default=None, ge=0)
    """Hours of human work that there are for data and evaluation."""
    reused: bool | None = None
    """Whether the same base will be used for other domains too. Then it must stay as it is: tune an adapter."""
