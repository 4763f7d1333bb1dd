"""BitFit: only the bias terms move, those of matrices and of norms (Ben Zaken et al. 2021, 2106.10199, section 3).

Llama, Mistral and Gemma have none and are refused; Qwen 2 has them on query, key and value, GPT-2 everywhere.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from giong.config import MethodConfig
from giong.methods.trainable import Trainable, trainable_tensors
from giong.models.load import shape_of
from giong.models.parts import biases
from giong.sizing.moving import check_method

FORMAT = "partial"


def apply(model: PreTrainedModel, config: MethodConfig, *, seed: int = 0, base_name: str = "") -> Trainable:
    """Make the biases of `model` trainable. Nothing is random. Raises ConfigError for a model without any."""
    check_method(shape_of(model), config)
    return trainable_tensors(model, biases(model), config.name, base_name)
