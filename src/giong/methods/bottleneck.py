"""Bottleneck adapters: two small networks in each decoder layer, or one, and nothing else moves.

Two per layer, behind attention and behind the MLP, are Houlsby et al. 2019, 1902.00751, section 2.1; the one behind the MLP alone is
Pfeiffer et al. 2020, 2005.00247, section 3. Unlike there, the norms stay frozen. GELU stands between the two matrices of an
adapter, so it is no linear map that a weight could take up: the model cannot be merged.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import torch
from transformers import PreTrainedModel

from giong.config import MethodConfig
from giong.errors import ModelError
from giong.methods.trainable import Trainable, trainable_tensors
from giong.models.bottleneck import insert, take_out
from giong.models.load import shape_of
from giong.sizing.moving import check_method
from giong.sizing.shapes import adapter_size_of

FORMAT = "partial"


def apply(model: PreTrainedModel, config: MethodConfig, *, seed: int = 0, base_name: str = "") -> Trainable:
    """Put adapters into `model` and make them alone trainable; without `adapter_size` its share decides.

    Raises ConfigError for adapters that are no bottleneck, and for a family whose attention and MLP cannot be told apart.
    """
    shape = shape_of(model)
    check_method(shape, config)
    config = config.model_copy(update={"adapter_size": adapter_size_of(shape, config)})
    torch.manual_seed(seed)
    settings = {"adapter_placement": config.adapter_placement, "adapter_size": config.adapter_size}
    trainable = trainable_tensors(model, insert(model, config).values(), config.name, base_name, **settings)

    def merge() -> NoReturn:
        raise ModelError("Bottleneck adapters cannot be merged into the weights", remedy="Serve the model with giong, or train with lora.")

    def detach() -> bool:
        take_out(model)
        return trainable.detach()

    return replace(trainable, merge=merge, detach=detach)
