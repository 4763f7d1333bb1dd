"""What all sections share: unknown keys are errors, and a setting is documented once, in the string under its field."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of giong.yaml. Frozen: a run's settings never change under it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
