"""Section `baselines`: the arms that fine-tuning has to beat."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from giong.config.base import Section
from giong.config.remote import RemoteModelConfig

BaselineArm = Literal["base", "instruction", "named_style", "few_shot", "retrieval"]


class ArmModelConfig(Section):
    name: str
    """Name of this model in tables."""
    name_or_path: str | None = None
    """A local base, as in `model.name_or_path`."""
    remote: RemoteModelConfig | None = None
    """A remote model; exactly one of the two."""


class BaselinesConfig(Section):
    arms: list[BaselineArm] = ["base", "instruction", "named_style", "few_shot", "retrieval"]
    """Ways of prompting to compare: as it is, with an instruction, with a named style, with fixed or with retrieved examples."""
    num_shots: int = Field(default=4, ge=1)
    """Examples shown by `few_shot` and `retrieval`; fewer where the context is too short."""
    likelihood: bool = True
    """Whether the likelihood of the author's own answers is measured under every prompt of a local model, which reads each prompt a
    second time. Under the plain request it always is: fine-tuning is compared with that."""
    models: list[ArmModelConfig] = []
    """Further models (local or remote) that are prompted in the same ways, beside the base that is tuned."""
