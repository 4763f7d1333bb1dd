"""Whole decoder layers: the last (or first) few move, everything else is frozen.

Fine-tuning from the top: frozen lower layers keep general features (Howard and Ruder 2018, 1801.06146, section 3.3, unfreezes from
the last layer down), and a quarter of the layers of BERT and RoBERTa reach nine tenths of full fine-tuning's quality (Lee et al.
2019, 1911.03090).

With `layers_from: last` nothing below the first layer that moves requires a gradient, not even the embeddings' output, so torch
records no graph there: these layers keep no activation and have no backward pass (`tests/unit/test_methods.py` counts).
"""

from __future__ import annotations

from transformers import PreTrainedModel

from giong.config import MethodConfig
from giong.errors import ConfigError
from giong.methods.trainable import Trainable, trainable_tensors
from giong.models.load import shape_of
from giong.models.parts import decoder_layers, final_norm, head_of, parameters_of
from giong.sizing.moving import check_method

FORMAT = "partial"


def apply(model: PreTrainedModel, config: MethodConfig, *, seed: int = 0, base_name: str = "") -> Trainable:
    """Make `num_layers` decoder layers of `model` trainable, with head and last norm where the config says so. Nothing is random.

    Raises ConfigError for more layers than there are, for a head that is the embedding matrix, and for a family whose layers
    cannot be told apart.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ConfigError(
            f"The layers of the {model.config.model_type} family cannot be told apart", place="method.name", remedy="Use lora or full."
        )
    check_method(shape_of(model), config)
    chosen = layers[-config.num_layers :] if config.layers_from == "last" else layers[: config.num_layers]
    modules = [*chosen, *(head_of(model) if config.train_head else ()), *(final_norm(model) if config.train_norms else ())]
    return trainable_tensors(model, parameters_of(modules), config.name, base_name)
