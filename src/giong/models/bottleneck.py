"""Bottleneck adapters in a decoder: small networks behind attention and MLP, x + W_up GELU(W_down x + b_down) + b_up.

They stand here and not with the method, because a saved model is loaded with them. One decision a reader may question: they hang on
the sublayers' own modules by a forward hook, so that the model's layers, names and fast paths stay what they are, and taking them
out leaves nothing behind.
"""

from __future__ import annotations

import torch
from torch.nn.functional import gelu
from transformers import PreTrainedModel

from giong.config import MethodConfig
from giong.errors import ConfigError
from giong.models.parts import decoder_layers, sublayers

NAME = "bottleneck_adapter"


class Bottleneck(torch.nn.Module):
    """x (..., D) -> (..., D) through `size` numbers; the identity until W_up moves (Houlsby et al. 2019, 1902.00751, section 2.1)."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.down, self.up = torch.nn.Linear(width, size), torch.nn.Linear(size, width)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            torch.nn.init.zeros_(zero)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(gelu(self.down(x)))


def insert(model: PreTrainedModel, config: MethodConfig) -> dict[str, torch.nn.Parameter]:
    """Put adapters of `adapter_size` into every decoder layer, drawn from torch's generator; their parameters by name.

    Raises ConfigError, before anything is put in, for a family whose attention and MLP cannot be told apart.
    """
    assert config.adapter_size is not None
    found = [sublayers(layer) for layer in decoder_layers(model)]
    if not found or None in found:
        raise ConfigError(
            f"Attention and MLP of the {model.config.model_type} family cannot be told apart", place="method.name",
            remedy="Use lora or full.",
        )  # fmt: skip
    for attention, mlp in filter(None, found):
        for sublayer in (attention, mlp) if config.adapter_placement == "houlsby" else (mlp,):
            adapter = Bottleneck(model.config.hidden_size, config.adapter_size).to(model.device, model.dtype)
            sublayer.add_module(NAME, adapter)
            adapter.hook = sublayer.register_forward_hook(_adapted)  # type: ignore[assignment]
    return {name: parameter for name, parameter in model.named_parameters() if f".{NAME}." in name}


def take_out(model: PreTrainedModel) -> None:
    """Undo `insert`."""
    for module in list(model.modules()):
        adapter = module._modules.pop(NAME, None)
        if adapter is not None:
            adapter.hook.remove()  # type: ignore[operator]


def _adapted(sublayer: torch.nn.Module, given: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
    adapter = sublayer._modules[NAME]
    # Attention also gives its weights.
    return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)
