"""Section `model`: the base that is tuned. A bare string (`model: PATH`) is short for `model: {name_or_path: PATH}`."""

from __future__ import annotations

from typing import Literal

from giong.config.base import Section

BUNDLED = "giong-tiny"
"""The name of the tiny base model that ships with giong."""


class ModelConfig(Section):
    name_or_path: str = BUNDLED
    """A folder with safetensors weights and a tokenizer, a model hub name, or `giong-tiny`, the bundled base."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the frozen weights and activations; `auto` measures which is faster here and freezes the choice."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model computes; `auto` takes a CUDA GPU where there is one, else the CPU."""
    max_seq_length: int | None = None
    """Longest row in tokens, request and answer together; by default what the model allows, at most 2048."""
    chat_template: str | None = None
    """Path of a Jinja chat template, for models that bring none."""
