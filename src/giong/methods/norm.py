"""Only the normalisation gains move, and the norms' biases where they have some.

That alone, on a frozen transformer, already adapts it to new tasks (Zhao et al. 2023, 2312.11420, for language models that learn
to see; Frankle et al. 2020, 2003.00152, for networks whose other weights are random). Every family has norms, so this is the
method of its size where there are no biases to train.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from giong.config import MethodConfig
from giong.methods.trainable import Trainable, trainable_tensors
from giong.models.load import shape_of
from giong.models.parts import norms, parameters_of
from giong.sizing.moving import check_method

FORMAT = "partial"


def apply(model: PreTrainedModel, config: MethodConfig, *, seed: int = 0, base_name: str = "") -> Trainable:
    """Make all norms of `model` trainable, those on single heads (Qwen 3) among them. Nothing is random.

    Raises ConfigError for a model whose norms have no gains.
    """
    check_method(shape_of(model), config)
    return trainable_tensors(model, parameters_of(norms(model)), config.name, base_name)
