"""From a model's config.json to the numbers that memory, time and cost follow from, without loading a weight.

The counts are exact and not "about 12 L D^2": a wrong bias or a tied head counted twice shows up in the tests against the
real model classes. A family that is not in the table is refused, because a guessed count would look as sure as a true one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from giong.config import MethodConfig
from giong.contracts import ModelShape
from giong.errors import ModelError

Flag = bool | str
"""A fixed property of a family, or the config key that decides it (absent means False)."""


@dataclass(frozen=True, slots=True)
class _Family:
    """What a family's layers hold besides their matrices, and the values its config class assumes for absent keys."""

    norms_per_layer: int = 2
    head_norms: bool = False
    qkv_bias: Flag = False
    output_bias: Flag = False
    mlp_bias: Flag = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    defaults: Mapping[str, int] = field(default_factory=dict)


_GEMMA = {"qkv_bias": "attention_bias", "output_bias": "attention_bias", "tie_word_embeddings": True, "max_position_embeddings": 8192}

FAMILIES: dict[str, _Family] = {
    "llama": _Family(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": _Family(max_position_embeddings=131072, defaults={"num_key_value_heads": 8}),
    "qwen2": _Family(qkv_bias=True, max_position_embeddings=32768, defaults={"num_key_value_heads": 32}),
    "qwen3": _Family(
        head_norms=True, qkv_bias="attention_bias", output_bias="attention_bias", max_position_embeddings=32768,
        defaults={"num_key_value_heads": 32, "head_dim": 128},
    ),
    "gemma": _Family(**_GEMMA, defaults={"num_key_value_heads": 16, "head_dim": 256}),
    "gemma2": _Family(**_GEMMA, norms_per_layer=4, defaults={"num_key_value_heads": 4, "head_dim": 256}),
    "gemma3_text": _Family(
        **(_GEMMA | {"max_position_embeddings": 131072}), norms_per_layer=4, head_norms=True,
        defaults={"num_key_value_heads": 4, "head_dim": 256},
    ),
}  # fmt: skip
"""Families with RMS norms (a gain, no bias), rotary positions and a gated MLP. GPT-2 is counted on its own."""

SUPPORTED_MODEL_TYPES = (*FAMILIES, "gpt2")


@dataclass(frozen=True, slots=True)
class Linear:
    """One matrix of a decoder layer, by the name of its module."""

    name: str
    in_features: int
    out_features: int

    @property
    def num_weights(self) -> int:
        return self.in_features * self.out_features


def linear_layers(shape: ModelShape) -> tuple[Linear, ...]:
    """The matrices of one decoder layer. GPT-2 keeps query, key and value in one (a Conv1D, counted alike)."""
    if shape.linears:
        return tuple(Linear(*linear) for linear in shape.linears)
    width, hidden = shape.intermediate_size, shape.hidden_size
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    if shape.model_type == "gpt2":
        return (
            Linear("attn.c_attn", hidden, 3 * hidden),
            Linear("attn.c_proj", hidden, hidden),
            Linear("mlp.c_fc", hidden, width),
            Linear("mlp.c_proj", width, hidden),
        )
    attention = (
        Linear("self_attn.q_proj", hidden, queries),
        Linear("self_attn.k_proj", hidden, keys),
        Linear("self_attn.v_proj", hidden, keys),
        Linear("self_attn.o_proj", queries, hidden),
    )
    gate = (Linear("mlp.gate_proj", hidden, width),) if shape.gated_mlp else ()
    return (*attention, *gate, Linear("mlp.up_proj", hidden, width), Linear("mlp.down_proj", width, hidden))


def num_matmul_parameters(shape: ModelShape) -> int:
    """Weights that a token is multiplied with: all layers and the head. Looking up an embedding multiplies nothing."""
    per_layer = sum(linear.num_weights for linear in linear_layers(shape))
    return shape.num_hidden_layers * per_layer + shape.hidden_size * shape.vocab_size


LOW_RANK = ("lora", "qlora")
"""Methods that put a low-rank update beside frozen matrices."""


@dataclass(frozen=True, slots=True)
class Adapted:
    """A matrix by the whole name of its module, with the rank of its update."""

    name: str
    linear: Linear
    rank: int

    @property
    def num_parameters(self) -> int:
        """B (out x r) and A (r x in): Hu et al. 2021, 2106.09685, equation 3."""
        return self.rank * (self.linear.in_features + self.linear.out_features)


def matching(patterns: Iterable[str], name: str) -> str | None:
    """The first pattern that is the end of a module's name, as PEFT reads `rank_pattern`."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", name)), None)


def is_target(method: MethodConfig, name: str) -> bool:
    """Whether `target_modules` means the module of that name."""
    return method.target_modules == "all-linear" or any(f".{name}".endswith(f".{target}") for target in method.target_modules)


def adapted_layers(shape: ModelShape, method: MethodConfig, lora_r: int) -> Iterator[Adapted]:
    """Every matrix that gets an update; `lora_r` where `rank_pattern` gives no other rank."""
    above = "transformer.h" if shape.model_type == "gpt2" else "model.layers"
    for layer in range(shape.num_hidden_layers):
        for linear in linear_layers(shape):
            name = f"{above}.{layer}.{linear.name}"
            if is_target(method, name):
                yield Adapted(name, linear, method.rank_pattern.get(matching(method.rank_pattern, name) or "", lora_r))


def num_lora_parameters(shape: ModelShape, lora_r: int, method: MethodConfig | None = None) -> int:
    """Trainable numbers of LoRA at rank `lora_r`, by default on every linear layer except the head. Raises ValueError for a rank below 1.

    DoRA trains the length of each row of a matrix too, and `bias` the biases.
    """
    if lora_r < 1:
        raise ValueError(f"lora_r must be at least 1, not {lora_r}")
    method = method or MethodConfig()
    layers = list(adapted_layers(shape, method, lora_r))
    lengths = sum(layer.linear.out_features for layer in layers) if method.use_dora else 0
    return sum(layer.num_parameters for layer in layers) + lengths + num_moving_biases(shape, method)


def num_moving_biases(shape: ModelShape, method: MethodConfig) -> int:
    """Biases that move beside LoRA's updates: as PEFT reads `bias`."""
    if method.bias != "lora_only":
        return shape.num_bias_parameters if method.bias == "all" else 0
    return sum(layer.linear.out_features for layer in adapted_layers(shape, method, 1) if layer.linear.name in shape.biased_linears)


def num_chosen(num_weights: int, share: float) -> int:
    """How many of a matrix's weights `sparse` moves, at least one."""
    return max(1, round(share * num_weights))


DEFAULT_ADAPTER_SHARE = 0.036
"""What full fine-tuning is nearly reached with, as a share of the model's parameters (Houlsby et al. 2019, 1902.00751, abstract)."""


def adapter_size_of(shape: ModelShape, method: MethodConfig) -> int:
    """Width of a bottleneck adapter: as set, or the largest with which all of them stay within the share; below 1 where none does."""
    if method.adapter_size is not None:
        return method.adapter_size
    share, hidden = method.adapter_share or DEFAULT_ADAPTER_SHARE, shape.hidden_size
    room = share * shape.num_parameters / num_bottlenecks(shape, method)
    return int((room - hidden) // (2 * hidden + 1))


def num_bottlenecks(shape: ModelShape, method: MethodConfig) -> int:
    return shape.num_hidden_layers * (2 if method.adapter_placement == "houlsby" else 1)


def num_bottleneck_parameters(shape: ModelShape, method: MethodConfig) -> int:
    """2md + d + m for each adapter of width m in a model of width d (Houlsby et al. 2019, 1902.00751, section 2.1)."""
    size, hidden = adapter_size_of(shape, method), shape.hidden_size
    return num_bottlenecks(shape, method) * (2 * size * hidden + hidden + size)


def settings_of(method: str | MethodConfig) -> MethodConfig:
    """A method's settings; its name alone stands for its defaults. Raises ValueError for an unknown one."""
    if isinstance(method, MethodConfig):
        return method
    known = get_args(MethodConfig.model_fields["name"].annotation)
    if method not in known:
        raise ValueError(f"method must be one of {', '.join(known)}, not {method!r}")
    return MethodConfig(name=method)


def num_trainable_parameters(shape: ModelShape, method: str | MethodConfig, lora_r: int | None = None) -> int:
    """How many numbers move, exactly; `lora_r` is needed where `lora` is given by its name alone.

    Raises ValueError for an unknown method and for `lora` without a rank.
    """
    settings = settings_of(method)
    if settings.name in LOW_RANK:
        rank = settings.lora_r if lora_r is None else lora_r
        if rank is None:
            raise ValueError(f"method `{settings.name}` needs a rank: give lora_r")
        return num_lora_parameters(shape, rank, settings)
    if settings.name == "last_layers":
        head = shape.num_head_parameters if settings.train_head else 0
        norm = shape.num_final_norm_parameters if settings.train_norms else 0
        return settings.num_layers * shape.num_layer_parameters + head + norm
    if settings.name == "prompt_tuning":
        return settings.num_virtual_tokens * shape.hidden_size
    if settings.name == "prefix_tuning":
        # A key and a value per layer and key-value head.
        return settings.num_virtual_tokens * 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    if settings.name == "sparse":
        per_layer = sum(num_chosen(linear.num_weights, settings.sparse_share) for linear in linear_layers(shape))
        return shape.num_hidden_layers * per_layer
    if settings.name == "bottleneck":
        return num_bottleneck_parameters(shape, settings)
    return {"full": shape.num_parameters, "bias": shape.num_bias_parameters, "norm": shape.num_norm_parameters}[settings.name]


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape of the model that a config.json (as a mapping) describes.

    Keys that the file leaves out take the value that the family's config class in transformers assumes. Raises ModelError
    for an unknown `model_type`, and for a needed key that is missing or not a positive whole number.
    """
    model_type = config.get("model_type")
    if model_type == "gpt2":
        return _gpt2_shape(config)
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise ModelError(
            f"The size of model type {model_type!r} cannot be worked out from its config.json", place="config.json: model_type",
            remedy=f"Known families: {', '.join(SUPPORTED_MODEL_TYPES)}.",
        )  # fmt: skip
    hidden, heads = _whole(config, "hidden_size"), _whole(config, "num_attention_heads")
    head_dim = _whole(config, "head_dim", family.defaults.get("head_dim", hidden // heads), null=hidden // heads)
    key_value_heads = _whole(config, "num_key_value_heads", family.defaults.get("num_key_value_heads", heads), null=heads)
    bare = ModelShape(
        model_type=str(model_type),
        hidden_size=hidden,
        intermediate_size=_whole(config, "intermediate_size"),
        num_hidden_layers=_whole(config, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        vocab_size=_whole(config, "vocab_size"),
        max_position_embeddings=_whole(config, "max_position_embeddings", family.max_position_embeddings),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", family.tie_word_embeddings)),
        num_parameters=0,
    )
    return _with_counts(bare, _layer_extras(bare, family, config), positions=0)


def _gpt2_shape(config: Mapping[str, Any]) -> ModelShape:
    if config.get("add_cross_attention"):
        raise ModelError("GPT-2 with cross-attention is not a decoder by itself", place="config.json: add_cross_attention")
    hidden, heads = _whole(config, "n_embd"), _whole(config, "n_head")
    positions = _whole(config, "n_positions", 1024)
    bare = ModelShape(
        model_type="gpt2",
        hidden_size=hidden,
        intermediate_size=_whole(config, "n_inner", 4 * hidden, null=4 * hidden),
        num_hidden_layers=_whole(config, "n_layer"),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        vocab_size=_whole(config, "vocab_size"),
        max_position_embeddings=positions,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", True)),
        num_parameters=0,
        gated_mlp=False,
    )
    # Every matrix has a bias, and the norms (two per layer and the last) have a gain and a bias each.
    extras = _Extras(linear_layers(bare), 2 * hidden, norm_bias=True)
    return _with_counts(bare, extras, positions=positions * hidden)


@dataclass(frozen=True, slots=True)
class _Extras:
    """What a layer holds besides its matrices: the biases of some of them and the gains of its norms, each with a bias where `norm_bias`."""

    biased: tuple[Linear, ...]
    gains: int
    norm_bias: bool = False

    @property
    def linear_biases(self) -> int:
        return sum(linear.out_features for linear in self.biased)


def _layer_extras(shape: ModelShape, family: _Family, config: Mapping[str, Any]) -> _Extras:

    def on(flag: Flag) -> bool:
        return bool(config.get(flag)) if isinstance(flag, str) else flag

    biased = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), on(family.qkv_bias)),
        "o_proj": on(family.output_bias),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), on(family.mlp_bias)),
    }
    with_bias = tuple(linear for linear in linear_layers(shape) if biased[linear.name.rpartition(".")[2]])
    head_gains = 2 * shape.head_dim if family.head_norms else 0
    return _Extras(with_bias, family.norms_per_layer * shape.hidden_size + head_gains)


def _with_counts(shape: ModelShape, extras: _Extras, positions: int) -> ModelShape:
    embedding, num_layers = shape.vocab_size * shape.hidden_size, shape.num_hidden_layers
    per_gain = 2 if extras.norm_bias else 1
    layer = sum(linear.num_weights for linear in linear_layers(shape)) + extras.linear_biases + per_gain * extras.gains
    head, final_norm = 0 if shape.tie_word_embeddings else embedding, per_gain * shape.hidden_size
    num_gains = num_layers * extras.gains + shape.hidden_size
    return replace(
        shape, num_parameters=embedding + positions + num_layers * layer + final_norm + head, num_layer_parameters=layer,
        num_head_parameters=head, num_final_norm_parameters=final_norm, num_norm_parameters=per_gain * num_gains,
        num_bias_parameters=num_layers * extras.linear_biases + (per_gain - 1) * num_gains,
        biased_linears=tuple(linear.name for linear in extras.biased),
    )  # fmt: skip


def _whole(config: Mapping[str, Any], key: str, default: int | None = None, null: int | None = None) -> int:
    """A positive whole number; `default` where the key is absent, `null` where it is there and null."""
    value = config.get(key, default)
    if value is None and key in config:
        value = null
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        given = f"is {value!r}, not a positive whole number" if key in config else "is missing"
        raise ModelError(
            f"`{key}` of the model {given}", place=f"config.json: {key}", remedy="Check that the model folder is complete.",
        )  # fmt: skip
    return value
