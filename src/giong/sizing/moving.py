"""Where in a model a method moves something, as far as time and memory depend on it, and what a model cannot do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from giong.config import MethodConfig, TrainConfig
from giong.contracts import ModelShape
from giong.errors import ConfigError
from giong.sizing.shapes import (
    DEFAULT_ADAPTER_SHARE,
    LOW_RANK,
    SUPPORTED_MODEL_TYPES,
    Adapted,
    adapted_layers,
    adapter_size_of,
    matching,
    num_moving_biases,
    settings_of,
)

DIFFERENCES = ("last_layers", "bias", "norm")
"""Methods that move some of the model's own tensors and keep what these were, so that the base can be put back."""


SOFT_PROMPTS = ("prompt_tuning", "prefix_tuning")
"""Methods that put virtual tokens before every row and leave the model as it is: nothing of them can be merged."""


@dataclass(frozen=True, slots=True)
class Moving:
    """`num_trained_layers` decoder layers hold something that moves; the backward pass goes through the last `num_backward_layers`.

    Where the two differ, the layers that only pass the gradient on are the last ones.
    """

    num_trained_layers: int
    num_backward_layers: int
    trains_head: bool


def moving(shape: ModelShape, method: str | MethodConfig) -> Moving:
    """Raises ValueError for an unknown method."""
    settings, num_layers = settings_of(method), shape.num_hidden_layers
    if settings.name in SOFT_PROMPTS:
        return Moving(0, num_layers, False)
    if settings.name != "last_layers":
        return Moving(num_layers, num_layers, settings.name == "full")
    trained = min(settings.num_layers, num_layers)
    return Moving(trained, trained if settings.layers_from == "last" else num_layers, settings.train_head)


def check_anchor(method: MethodConfig, train: TrainConfig) -> None:
    """Raise ConfigError for a pull to the start where only an adapter moves (its own start is random), and for noise on embeddings
    that a soft prompt stands among."""
    if train.neftune_noise_alpha and method.name in SOFT_PROMPTS:
        raise ConfigError(
            f"Noise on the embeddings does not go with `{method.name}`, which puts virtual tokens among them",
            place="train.neftune_noise_alpha", remedy="Leave it out, or train with lora.",
        )  # fmt: skip
    if train.kl_weight and method.name in SOFT_PROMPTS:
        raise ConfigError(
            f"`{method.name}` starts as the base behind its virtual tokens, and not as the base that a divergence is measured from",
            place="train.kl_weight", remedy="Leave it out, or train with lora.",
        )  # fmt: skip
    is_zero_the_base = method.name not in SOFT_PROMPTS and method.init_lora_weights != "pissa"
    if train.l2_to_base and method.name not in ("full", "sparse", *DIFFERENCES):
        raise ConfigError(
            f"`{method.name}` moves an adapter and none of the model's own weights", place="train.l2_to_base",
            remedy="Set train.weight_decay instead: it pulls the adapter's update to zero, which is the base."
            if is_zero_the_base else "Leave it out, or train with lora and train.weight_decay.",
        )  # fmt: skip
    if train.weight_decay and method.init_lora_weights == "pissa":
        raise ConfigError(
            "PiSSA starts from the main part of each matrix, which weight decay would take out of the model", place="train.weight_decay",
            remedy="Leave it out, or leave method.init_lora_weights out: then the update decays to zero, which is the base.",
        )  # fmt: skip


def check_method(shape: ModelShape, method: MethodConfig) -> None:
    """Raise ConfigError where a model of this shape has not what the method moves."""
    if method.name == "qlora" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            "qlora needs bitsandbytes, which is not installed", place="method.name",
            remedy="Install it: pip install 'giong[qlora]', or set method.name to lora.",
        )  # fmt: skip
    if method.name in LOW_RANK and shape.model_type in SUPPORTED_MODEL_TYPES:
        check_lora(method, adapted_layers(shape, method, method.lora_r or 1))
        check_bias(shape, method)
    if method.name in SOFT_PROMPTS and method.num_virtual_tokens >= shape.max_position_embeddings:
        raise ConfigError(
            f"{method.num_virtual_tokens} virtual tokens fill the model's context of {shape.max_position_embeddings}",
            place="method.num_virtual_tokens", remedy="Give a smaller number; 20 to 100 are usual.",
        )  # fmt: skip
    if method.name == "bias" and not shape.num_bias_parameters:
        raise ConfigError(
            f"This model ({shape.model_type}) has no biases, and `bias` trains nothing else", place="method.name",
            remedy="Set method.name to norm, which is as small, or to lora.",
        )  # fmt: skip
    if method.name == "norm" and not shape.num_norm_parameters:
        raise ConfigError(
            f"The norms of this model ({shape.model_type}) have no gains, and `norm` trains nothing else", place="method.name",
            remedy="Set method.name to lora.",
        )  # fmt: skip
    if method.name == "bottleneck":
        _check_bottleneck(shape, method)
    if method.name != "last_layers":
        return
    if method.num_layers > shape.num_hidden_layers:
        raise ConfigError(
            f"{method.num_layers} layers cannot be trained: the model has {shape.num_hidden_layers}", place="method.num_layers",
            remedy="Give a smaller number, or set method.name to full.",
        )  # fmt: skip
    if method.train_head and not shape.num_head_parameters:
        raise ConfigError(
            "The output head of this model is its embedding matrix, and would move that too", place="method.train_head",
            remedy="Leave it out, or set method.name to full.",
        )  # fmt: skip


def check_lora(method: MethodConfig, layers: Iterable[Adapted]) -> None:
    """Raise ConfigError for a rank above a matrix's size, where a whole matrix would be smaller, and for a pattern without a layer."""
    layers = list(layers)
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(method, setting):
            try:
                is_used = any(matching([pattern], layer.name) for layer in layers)
            except re.error as error:
                raise ConfigError(
                    f"{pattern!r} is no regular expression ({error})", place=f"method.{setting}", remedy="Give the end of a layer's name."
                ) from None
            if not is_used:
                names = sorted({layer.name.rpartition(".")[2] for layer in layers})
                raise ConfigError(
                    f"{pattern!r} matches no layer with an update", place=f"method.{setting}", remedy=f"Layers here: {', '.join(names)}."
                )
    for layer in layers:
        size = min(layer.linear.in_features, layer.linear.out_features)
        if layer.rank > size:
            raise ConfigError(
                f"Rank {layer.rank} is above the size of {layer.name} ({layer.linear.out_features} x {layer.linear.in_features})",
                place="method.rank_pattern" if matching(method.rank_pattern, layer.name) else "method.lora_r",
                remedy=f"Give at most {size}, or set method.name to full.",
            )  # fmt: skip


def check_bias(shape: ModelShape, method: MethodConfig) -> None:
    """Raise ConfigError where `bias` asks for biases that are not there."""
    if method.bias != "none" and not num_moving_biases(shape, method):
        has_some = shape.num_bias_parameters > 0
        what = (
            f"No layer with an update has a bias in this model ({shape.model_type})"
            if has_some
            else f"This model ({shape.model_type}) has no biases"
        )
        raise ConfigError(
            f"{what}, and method.bias is {method.bias}", place="method.bias",
            remedy="Set it to all, or leave it out." if has_some else "Leave it out.",
        )  # fmt: skip


def _check_bottleneck(shape: ModelShape, method: MethodConfig) -> None:
    size = adapter_size_of(shape, method)
    place = "method.adapter_size" if method.adapter_size is not None else "method.adapter_share"
    if size < 1:
        raise ConfigError(
            f"Even adapters one number wide take more than {method.adapter_share or DEFAULT_ADAPTER_SHARE:g} of this model's parameters", place=place,
            remedy="Raise it, or set method.adapter_placement to pfeiffer.",
        )  # fmt: skip
    if size >= shape.hidden_size:
        raise ConfigError(
            f"Adapters {size} wide are no bottleneck in a model {shape.hidden_size} wide", place=place,
            remedy="Lower it, or set method.name to full.",
        )  # fmt: skip
