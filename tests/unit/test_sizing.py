"""Sizing arithmetic: counts against the real model classes, bytes against what autograd keeps, hand-worked numbers."""

from __future__ import annotations

import dataclasses
import itertools
import json
from datetime import date
from pathlib import Path
from typing import get_args

import pytest

from giong.config import MethodConfig, TrainConfig
from giong.contracts import ModelShape
from giong.errors import ConfigError, ModelError
from giong.sizing import prices
from giong.sizing.defaults import resolve_training
from giong.sizing.estimate import THIS_MACHINE, PlannedRun, estimate_backends, estimate_generation, estimate_training
from giong.sizing.flops import (
    ATTENTION_SLOWDOWN,
    LORA_SLOWDOWN,
    attention_flops_per_token,
    generation_flops_per_token,
    muon_flops,
    score_flops_per_token,
    scoring_after_probe,
    slowdown_after_probe,
    train_flops_per_token,
)
from giong.sizing.hardware import REFERENCE_DEVICES, Machine, device_of, gpu_like, parse_cpuinfo, parse_meminfo, peak_flops, this_machine
from giong.sizing.memory import (
    BLOCK_QUERIES,
    CPU_ALLOCATOR_SHARE,
    HEAD_POSITIONS,
    HEAD_SLICE_BYTES,
    KL_COPIES,
    LENGTH_MULTIPLE,
    MAX_ATTENTION_SCORES,
    MAX_HEAD_LOGITS,
    MAX_KERNEL_BYTES,
    RUNTIME_BYTES,
    fits,
    generation_memory,
    kv_cache_bytes_per_token,
    layer_activation_bytes_per_token,
    training_memory,
)
from giong.sizing.moving import check_method
from giong.sizing.shapes import (
    SUPPORTED_MODEL_TYPES,
    adapter_size_of,
    linear_layers,
    num_lora_parameters,
    num_matmul_parameters,
    num_trainable_parameters,
    shape_from_config,
)
from giong.sizing.units import format_bytes, format_range, format_seconds, format_usd

TODAY = date(2026, 11, 20)

# Odd widths, so that no two counts agree by accident; head_dim is not hidden_size / heads.
TINY = {
    "vocab_size": 210, "hidden_size": 24, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TINY_GPT2 = {"vocab_size": 210, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 40, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
VARIANTS = [
    ("llama", {}), ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("mistral", {}), ("mistral", {"num_key_value_heads": 4}),
    ("qwen2", {"head_dim": None}), ("qwen2", {"head_dim": None, "tie_word_embeddings": True}),
    ("qwen3", {}), ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ("gemma", {}), ("gemma", {"attention_bias": True}), ("gemma2", {}), ("gemma3_text", {}),
    ("gpt2", {}), ("gpt2", {"n_inner": 60, "tie_word_embeddings": False}),
]  # fmt: skip


def tiny_config(model_type: str, **changes):
    from transformers import AutoConfig

    settings = {**(TINY_GPT2 if model_type == "gpt2" else TINY), **changes}
    if settings.get("head_dim", 1) is None:
        settings.pop("head_dim")
    return AutoConfig.for_model(model_type, **settings)


def tiny_model(config, dtype="float32"):
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS, ids=[f"{name}-{'-'.join(keys) or 'plain'}" for name, keys in VARIANTS])
def test_parameter_and_lora_counts_equal_the_real_models(model_type: str, changes: dict) -> None:
    from peft import LoraConfig, get_peft_model

    config = tiny_config(model_type, **changes)
    model = tiny_model(config)
    # What a saved config.json holds is the input, not the config object's own idea of itself.
    shape = shape_from_config(json.loads(config.to_json_string(use_diff=True)))
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.tie_word_embeddings == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", fan_in_fan_out=model_type == "gpt2"))
    trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert num_lora_parameters(shape, 3) == trainable
    assert num_trainable_parameters(shape, "lora", 3) == trainable
    assert num_trainable_parameters(shape, "full") == shape.num_parameters


EXACT = [
    MethodConfig(name="prompt_tuning", num_virtual_tokens=3), MethodConfig(name="prefix_tuning", num_virtual_tokens=3),
    MethodConfig(name="lora", lora_r=1, lora_alpha=1.0, lora_dropout=0.0, use_dora=True, rank_pattern={"(o|c)_proj": 2, r"1\.mlp\..*": 3}),
    MethodConfig(
        name="lora", lora_r=1, lora_alpha=1.0, lora_dropout=0.0, target_modules="all-linear", init_lora_weights="pissa",
    ),
    MethodConfig(name="norm"), MethodConfig(name="bias"), MethodConfig(name="last_layers", num_layers=2),
    MethodConfig(name="last_layers", num_layers=1, layers_from="first", train_norms=True),
    MethodConfig(name="last_layers", num_layers=1, train_head=True), MethodConfig(name="bottleneck", adapter_size=3),
    MethodConfig(name="bottleneck", adapter_placement="pfeiffer", adapter_share=0.02),
    MethodConfig(name="sparse", sparse_share=0.0123, sparse_score="magnitude"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS, ids=[f"{name}-{'-'.join(keys) or 'plain'}" for name, keys in VARIANTS])
def test_counts_of_parts_equal_the_real_models(model_type: str, changes: dict) -> None:
    from giong.methods import METHODS

    config = tiny_config(model_type, **changes)
    shape = shape_from_config(json.loads(config.to_json_string(use_diff=True)))
    for method in EXACT:
        model = tiny_model(config)
        try:
            check_method(shape, method)
        except ConfigError:
            assert num_trainable_parameters(shape, method) == 0 or (method.train_head and shape.tie_word_embeddings)
            with pytest.raises(ConfigError):
                METHODS[method.name].apply(model, method)
        else:
            assert METHODS[method.name].apply(model, method).num_trainable == num_trainable_parameters(shape, method) > 0


def test_absent_keys_take_the_values_of_the_config_classes() -> None:
    from transformers import AutoConfig

    needed = {key: TINY[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    for model_type in SUPPORTED_MODEL_TYPES:
        given = dict(TINY_GPT2) if model_type == "gpt2" else needed
        config = AutoConfig.for_model(model_type, **given)
        assumed = shape_from_config({"model_type": model_type, **given})
        assert assumed == shape_from_config(config.to_dict()), model_type
        assert assumed.max_position_embeddings == config.max_position_embeddings, model_type


QWEN_3B = {
    "model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
    "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip


def test_counts_of_published_models() -> None:
    """The makers' own figures: Qwen2.5-3B, Llama-3.1-8B, GPT-2."""
    assert shape_from_config(QWEN_3B).num_parameters == 3_085_938_688
    assert shape_from_config(LLAMA_8B).num_parameters == 8_030_261_248
    gpt2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
    assert shape_from_config(gpt2).num_parameters == 124_439_808


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"model_type": "mamba"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"intermediate_size": True}, "intermediate_size"),
        ({"model_type": "gpt2"}, "n_embd"),
    ],
)
def test_a_config_that_says_too_little_is_refused_with_its_place(change: dict, place: str) -> None:
    with pytest.raises(ModelError) as caught:
        shape_from_config(QWEN_3B | change)
    assert caught.value.place == f"config.json: {place}"
    assert caught.value.remedy


# One layer of 2 -> (4, 2, 2, 4 -> 2), MLP 3: small enough to count by hand.
HAND = ModelShape("llama", 2, 3, 1, 2, 1, 2, 5, 16, True, num_parameters=56)


def test_hand_worked_counts_and_operations() -> None:
    assert [(linear.in_features, linear.out_features) for linear in linear_layers(HAND)] == [
        (2, 4), (2, 2), (2, 2), (4, 2), (2, 3), (2, 3), (3, 2),
    ]  # fmt: skip
    assert num_matmul_parameters(HAND) == 8 + 4 + 4 + 8 + 6 + 6 + 6 + 10
    assert num_lora_parameters(HAND, 1) == 6 + 4 + 4 + 6 + 5 + 5 + 5
    assert num_lora_parameters(HAND, 4) == 4 * 35
    # 1 layer x 2 heads x 2 wide x 2 products x 2 operations x 10 / 2 earlier tokens.
    assert attention_flops_per_token(HAND, 10) == 80
    assert train_flops_per_token(HAND, "full", 56, 10) == 6 * 52 + 240
    assert train_flops_per_token(HAND, "lora", 35, 10) == 4 * 52 + 6 * 35 + 240
    # Computed again: the layers' 42 weights and attention, not the head.
    assert train_flops_per_token(HAND, "full", 56, 10, num_checkpointed_layers=1) == 6 * 52 + 240 + 2 * 42 + 80
    # Half of the tokens meet the head's 10 weights.
    assert train_flops_per_token(HAND, "full", 56, 10, loss_share=0.5) == 6 * 47 + 240
    assert generation_flops_per_token(HAND, 10) == 2 * 52 + 80
    with pytest.raises(ValueError, match="method"):
        train_flops_per_token(HAND, "prefix", 1, 10)
    with pytest.raises(ValueError, match="lora_r"):
        num_lora_parameters(HAND, 0)
    with pytest.raises(ValueError, match="method must be one of lora, .*, not 'prefix'"):
        num_trainable_parameters(HAND, "prefix")
    with pytest.raises(ValueError, match="needs a rank"):
        num_trainable_parameters(HAND, "lora")


DEEP = dataclasses.replace(HAND, num_hidden_layers=4, tie_word_embeddings=False, num_layer_parameters=46, num_head_parameters=10)
"""HAND four layers deep and with a head of its own: 42 weights and two gains of 2 per layer."""


def test_operations_where_a_part_moves() -> None:
    """Per token at rows of 10: layers of 42 weights and 80 operations of attention each, a head of 10 weights."""
    last = MethodConfig(name="last_layers", num_layers=1)
    first = last.model_copy(update={"layers_from": "first"})
    head = last.model_copy(update={"train_head": True})
    everything = 2 * (4 * 42 + 10) + 4 * 80
    # Backward through one layer or four, and twice their attention; the gradients of what moves.
    assert train_flops_per_token(DEEP, last, 46, 10) == everything + 2 * (42 + 10) + 2 * 80 + 2 * 46
    assert train_flops_per_token(DEEP, first, 46, 10) == everything + 2 * (4 * 42 + 10) + 2 * 4 * 80 + 2 * 46
    assert train_flops_per_token(DEEP, "norm", 18, 10) == everything + 2 * (4 * 42 + 10) + 2 * 4 * 80 + 2 * 18
    # Half of the tokens meet the head: forward, its input's gradient, and its own.
    assert train_flops_per_token(DEEP, head, 56, 10, loss_share=0.5) == 2 * (4 * 42 + 5) + 4 * 80 + 2 * (42 + 5) + 2 * 80 + 2 * (46 + 5)
    # Three layers computed again have nothing to compute again; the fourth has.
    assert train_flops_per_token(DEEP, last, 46, 10, num_checkpointed_layers=3) == train_flops_per_token(DEEP, last, 46, 10)
    again = train_flops_per_token(DEEP, last, 46, 10, num_checkpointed_layers=4) - train_flops_per_token(DEEP, last, 46, 10)
    assert again == 2 * 42 + 80
    # All layers with everything in them are full training, but for gains, which multiply nothing.
    whole = MethodConfig(name="last_layers", num_layers=4, train_head=True)
    assert train_flops_per_token(DEEP, whole, 4 * 46 + 10, 10) == train_flops_per_token(DEEP, "full", 0, 10) + 2 * 4 * 4
    assert slowdown_after_probe(DEEP, last, 46) < 1 < slowdown_after_probe(DEEP, "norm", 18) < slowdown_after_probe(DEEP, whole, 194)


def test_passes_beside_the_steps_by_hand() -> None:
    """42 weights in the layers, 10 in the head; 80 operations of attention per token forwards."""
    assert score_flops_per_token(HAND, "full", 56, 10, loss_share=0.5) == 2 * (42 + 5) + 80
    assert score_flops_per_token(HAND, "lora", 35, 10) == 2 * 52 + 2 * 35 + 80
    prompt = MethodConfig(name="prompt_tuning", num_virtual_tokens=5)
    assert score_flops_per_token(HAND, prompt, 10, 10) == 2 * (42 * 1.5 + 10) + 80
    # The forward pass of the start with its head; the head of now once more, and the gradient of the states.
    lora = train_flops_per_token(HAND, "lora", 35, 10, has_kl=True) - train_flops_per_token(HAND, "lora", 35, 10)
    assert lora == (2 * 52 + 2 * 35 + 80) + 4 * 10
    # A trained head meets both distributions again in the backward pass, for a gradient of its own.
    full = train_flops_per_token(HAND, "full", 56, 10, has_kl=True) - train_flops_per_token(HAND, "full", 56, 10)
    assert full == (2 * 52 + 80) + 10 * 10
    assert (
        slowdown_after_probe(HAND, "full", 56, has_kl=True) > slowdown_after_probe(HAND, "full", 56) > scoring_after_probe(HAND, "full", 56)
    )


def test_single_weights_and_bottlenecks_by_hand() -> None:
    """The layer's matrices have 8, 4, 4, 8, 6, 6 and 6 weights, and the model is 2 wide."""
    quarter = MethodConfig(name="sparse", sparse_share=0.25)
    assert num_trainable_parameters(DEEP, quarter) == 4 * (2 + 1 + 1 + 2 + 2 + 2 + 2)
    assert num_trainable_parameters(DEEP, MethodConfig(name="sparse", sparse_share=1e-6)) == 4 * 7
    # Forward, backward and the matrices' own gradients; the head has none.
    assert train_flops_per_token(DEEP, quarter, 48, 10) == 6 * 4 * 42 + 4 * 10 + 3 * 4 * 80
    whole = MethodConfig(name="bottleneck", adapter_size=1)
    behind_mlp = whole.model_copy(update={"adapter_placement": "pfeiffer"})
    # Down 2 + 1, up 2 + 2; two of them per layer.
    assert (num_trainable_parameters(DEEP, whole), num_trainable_parameters(DEEP, behind_mlp)) == (4 * 2 * 7, 4 * 7)
    assert train_flops_per_token(DEEP, whole, 56, 10) == 4 * (4 * 42 + 10) + 6 * 56 + 3 * 4 * 80
    # The paper's share of a model of 200 numbers: 7.2 of them, of which an adapter one wide takes 7 behind the MLP of one layer.
    small = dataclasses.replace(HAND, num_parameters=200)
    assert adapter_size_of(small, MethodConfig(name="bottleneck", adapter_placement="pfeiffer")) == 1
    assert adapter_size_of(small, MethodConfig(name="bottleneck")) == 0


def test_memory_of_single_weights_and_bottlenecks() -> None:
    norm, full = training_memory(DEEP, "norm", 18, 8, "bfloat16"), training_memory(DEEP, "full", 0, 8, "bfloat16")
    chosen = training_memory(DEEP, MethodConfig(name="sparse", sparse_share=0.25), 48, 8, "bfloat16")
    # Beside the model the places of the 48 weights, 4 bytes each, and what they were.
    assert chosen.weights_bytes == 2 * 56 + 48 * (4 + 2)
    assert (chosen.masters_bytes, chosen.gradients_bytes, chosen.optimizer_bytes) == (4 * 48, 4 * 48, 8 * 48)
    assert training_memory(DEEP, MethodConfig(name="sparse"), 48, 8, "float32").masters_bytes == 4 * 48
    assert chosen.activations_bytes == full.activations_bytes
    # The largest matrix has a whole gradient for a moment.
    assert chosen.working_bytes == norm.working_bytes + 2 * 8
    adapters = training_memory(DEEP, MethodConfig(name="bottleneck", adapter_size=1), 56, 8, "bfloat16")
    assert adapters.weights_bytes == 2 * (56 + 56)
    # For each of 8 tokens and 2 adapters per layer: what it reads (2), and one number before and after GELU.
    assert adapters.activations_bytes - norm.activations_bytes == 4 * 8 * 2 * 2 * (2 + 1 + 1)


def test_memory_where_a_part_moves() -> None:
    last = MethodConfig(name="last_layers", num_layers=1)
    moved, norm = training_memory(DEEP, last, 46, 8, "bfloat16"), training_memory(DEEP, "norm", 18, 8, "bfloat16")
    # What the 46 numbers were lies beside the model; optimizer state for them alone.
    assert moved.weights_bytes == 2 * (56 + 46)
    assert (moved.masters_bytes, moved.gradients_bytes, moved.optimizer_bytes) == (4 * 46, 4 * 46, 8 * 46)
    # As in `test_training_memory_part_by_part`, for one layer; a norm alone needs no input of a matrix (2 x 2 and attention's 4).
    layer, passing = 8 * 2 * 26, 8 * 2 * (26 - 2 * 2 - 4)
    assert moved.activations_bytes == layer
    assert norm.activations_bytes == 4 * passing
    assert (
        training_memory(DEEP, last.model_copy(update={"layers_from": "first"}), 46, 8, "bfloat16").activations_bytes == layer + 3 * passing
    )
    # On a GPU the copy of what moved lies in the host's memory.
    assert training_memory(DEEP, last, 46, 8, "bfloat16", device="gpu").weights_bytes == 2 * 56
    # Layers below are computed once, whatever is asked for; the head's gradient is there where the head moves.
    assert training_memory(DEEP, last, 46, 8, "bfloat16", num_checkpointed_layers=3).activations_bytes == layer
    assert training_memory(DEEP, last, 46, 8, "bfloat16", num_checkpointed_layers=4).activations_bytes == layer + 8 * 2 * 2
    head = training_memory(DEEP, last.model_copy(update={"train_head": True}), 56, 8, "bfloat16")
    full = training_memory(DEEP, "full", 0, 8, "bfloat16")
    assert full.working_bytes == head.working_bytes > moved.working_bytes


@pytest.mark.parametrize(("name", "rate", "reason"), [
    ("lora", 3e-4, "LoRA on"), ("full", 3e-5, "full training of"), ("last_layers", 3e-5, "whole layers (2)"),
    ("bias", 1e-3, "`bias` on"), ("norm", 1e-3, "`norm` on"), ("sparse", 3e-4, "single weights of"),
    ("bottleneck", 3e-4, "bottleneck adapters on"),
])  # fmt: skip
def test_default_learning_rates_and_their_reasons(name: str, rate: float, reason: str) -> None:
    small, large = dataclasses.replace(HAND, num_parameters=14 * 10**6), dataclasses.replace(HAND, num_parameters=8 * 10**9)
    resolved = resolve_training(MethodConfig(name=name), TrainConfig(), small, 200)
    assert resolved.train.learning_rate == rate
    assert reason in resolved.reasons["learning_rate"]
    # A third of it for large models, in every method.
    assert resolve_training(MethodConfig(name=name), TrainConfig(), large, 200).train.learning_rate == pytest.approx(rate / 3, rel=1e-3)
    given = resolve_training(MethodConfig(name=name), TrainConfig(learning_rate=0.5), small, 200)
    assert given.train.learning_rate == 0.5 and "learning_rate" not in given.reasons


ADAPTER_SIZE = 7
WIDTHS = {"hidden_size": 64, "intermediate_size": 176, "head_dim": 24}
"""Four query heads of 24: the stream, queries, keys and the MLP are all of different widths."""


def kept_bytes(
    model_type: str, dtype: str, method: str, depth: int, lengths: tuple[int, ...], dropout: float = 0.0, **moving: object
) -> int:  # fmt: skip
    """Bytes of the distinct storages, parameters and buffers aside, that the engine's forward pass keeps for the backward pass."""
    import numpy as np
    import torch

    from giong.config import MethodConfig
    from giong.engine.packing import pack
    from giong.engine.step import hidden_states
    from giong.methods import METHODS
    from giong.models.rows import Row

    wide = {"n_layer": depth, "n_embd": 64, **NO_DROPOUT} if model_type == "gpt2" else WIDTHS | {"num_hidden_layers": depth}
    model = tiny_model(tiny_config(model_type, **wide), dtype).requires_grad_(False)
    lora = {"lora_r": 1, "lora_alpha": 1.0, "lora_dropout": dropout} if method == "lora" else {}
    moving |= {"sparse_score": "magnitude", "adapter_size": ADAPTER_SIZE}
    # Every layer moves, unless something else is asked for.
    config = MethodConfig(name=method, num_layers=depth, **lora).model_copy(update=moving)
    model = METHODS[method].apply(model, config).model.train()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor):
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = [Row(np.arange(length), (np.arange(length) > 0).astype(np.float32)) for length in lengths]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert hidden_states(model, pack(rows)).requires_grad
    return sum(kept.values())


def kept_bytes_per_token(model_type: str, dtype: str, method: str, lengths: tuple[int, ...], dropout: float = 0.0) -> float:
    # The difference of two depths leaves out what is kept once: embedding, last norm, rotary tables.
    # Behind bottleneck adapters alone a gradient goes: below the first one nothing is kept, rotary tables neither.
    depths = (4, 2) if method == "bottleneck" else (3, 1)
    deep, shallow = (kept_bytes(model_type, dtype, method, num_layers, lengths, dropout) for num_layers in depths)
    return (deep - shallow) / 2 / sum(lengths)


def wide_shape(model_type: str) -> ModelShape:
    return shape_from_config({"model_type": model_type, **TINY, **WIDTHS, **TINY_GPT2, "n_embd": 64})


@pytest.mark.parametrize(("model_type", "method"), [
    *((name, method) for name in SUPPORTED_MODEL_TYPES for method in ("full", "lora", "last_layers", "norm")),
    ("qwen2", "bias"), ("gpt2", "bias"), ("llama", "sparse"), ("gpt2", "sparse"),
    ("llama", "bottleneck"), ("gemma2", "bottleneck"), ("gpt2", "bottleneck"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activation_bytes_are_what_autograd_keeps(model_type: str, dtype: str, method: str) -> None:
    # What Gemma 2 keeps per token grows with its row's length: the longest row is meant.
    lengths = (32,) if model_type == "gemma2" else (16, 32, 16)
    kept = kept_bytes_per_token(model_type, dtype, method, lengths)
    shape = wide_shape(model_type)
    assert layer_activation_bytes_per_token(shape, dtype, MethodConfig(name=method, adapter_size=ADAPTER_SIZE), 32) == pytest.approx(
        kept, rel=0.002
    )


@pytest.mark.parametrize("model_type", [name for name in SUPPORTED_MODEL_TYPES if name != "gemma2"])
def test_a_layer_that_passes_the_gradient_on_keeps_less_than_one_that_moves(model_type: str) -> None:
    lengths = (16, 32, 16)

    def kept(depth: int, num_moving: int, end: str) -> float:
        return kept_bytes(model_type, "bfloat16", "last_layers", depth, lengths, num_layers=num_moving, layers_from=end) / sum(lengths)

    shape = wide_shape(model_type)
    moves, passes = (layer_activation_bytes_per_token(shape, "bfloat16", method, 32) for method in ("last_layers", "bias"))
    assert kept(3, 1, "first") - kept(2, 1, "first") == pytest.approx(passes, rel=0.002)
    assert kept(3, 2, "first") - kept(3, 1, "first") == pytest.approx(moves - passes, rel=0.002)
    # Below the last layers nothing is kept.
    assert kept(3, 1, "last") == kept(2, 1, "last")
    assert kept(3, 2, "last") - kept(3, 1, "last") == pytest.approx(moves, rel=0.01)


@pytest.mark.parametrize(("model_type", "method"), [("llama", "prompt_tuning"), ("llama", "prefix_tuning"), ("gpt2", "prefix_tuning")])
def test_virtual_tokens_keep_as_much_as_others(model_type: str, method: str) -> None:
    """Three rows of 64 tokens and four virtual tokens before each of them."""
    deep, shallow = (kept_bytes(model_type, "bfloat16", method, depth, (16, 32, 16), num_virtual_tokens=4) for depth in (3, 1))
    estimated = layer_activation_bytes_per_token(wide_shape(model_type), "bfloat16", method, 32)
    kept = (deep - shallow) / 2
    # Beside it a prefix before each row; GPT-2 holds its keys and values twice, because the queries share a tensor with them.
    assert estimated * (64 + 3 * 4) * 0.999 <= kept <= (1.12 if method == "prefix_tuning" else 1.001) * estimated * (64 + 3 * 4)
    settings = MethodConfig(name=method, num_virtual_tokens=4)
    memory = training_memory(wide_shape(model_type), settings, 1, 64, "bfloat16", max_row_tokens=32)
    assert memory.activations_bytes == estimated * 3 * (64 + 2 * 4)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_dora_keeps_what_its_lengths_multiply(model_type: str) -> None:
    settings = MethodConfig(name="lora", lora_r=1, lora_alpha=1.0, lora_dropout=0.0, use_dora=True)
    deep, shallow = (kept_bytes(model_type, "bfloat16", "lora", depth, (16, 32, 16), use_dora=True) for depth in (3, 1))
    estimated = layer_activation_bytes_per_token(wide_shape(model_type), "bfloat16", settings, 32)
    # Beside it one length per row of each matrix, and its quotient by the norm.
    assert estimated <= (deep - shallow) / 2 / 64 <= 1.06 * estimated
    assert estimated > 1.2 * layer_activation_bytes_per_token(wide_shape(model_type), "bfloat16", "lora", 32)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_dropout_keeps_nothing(model_type: str) -> None:
    """Its masks are drawn again from their seeds."""
    kept = kept_bytes_per_token(model_type, "bfloat16", "lora", (16, 32, 16), dropout=0.1)
    estimated = layer_activation_bytes_per_token(wide_shape(model_type), "bfloat16", MethodConfig(name="lora", lora_dropout=0.1), 32)
    assert estimated == pytest.approx(kept, rel=0.002)
    assert layer_activation_bytes_per_token(wide_shape(model_type), "bfloat16", "lora", 32) == estimated


@pytest.mark.parametrize("method", ["full", "lora", "last_layers", "norm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_unknown_family_counts_as_if_the_engine_left_its_layers_alone(dtype: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from giong.engine import fast_path

    monkeypatch.setattr(fast_path, "_NORMS", ())
    monkeypatch.setattr(fast_path, "_MLPS", ())
    kept = kept_bytes_per_token("llama", dtype, method, (16, 32, 16))
    unknown = dataclasses.replace(wide_shape("llama"), model_type="new")
    estimated = layer_activation_bytes_per_token(unknown, dtype, method, 32)
    # The formula leaves out a norm's scale, one number per token.
    assert estimated <= kept <= 1.01 * estimated
    assert estimated > 1.2 * layer_activation_bytes_per_token(wide_shape("llama"), dtype, method, 32)


def test_capped_attention_scores_cost_memory_per_row_length() -> None:
    shape = shape_from_config({"model_type": "gemma2", **TINY})
    for dtype, per_score in (("bfloat16", 4 + 4 + 2), ("float32", 4 + 4)):
        short, long = (layer_activation_bytes_per_token(shape, dtype, "full", length) for length in (100, 200))
        # 4 heads x 100 more positions, and one byte of mask for all heads.
        assert long - short == 100 * (4 * per_score + 1)


def test_training_memory_part_by_part() -> None:
    full = training_memory(HAND, "full", 56, 8, "bfloat16")
    assert (full.weights_bytes, full.masters_bytes, full.gradients_bytes, full.optimizer_bytes) == (112, 224, 224, 448)
    assert full.checkpoint_bytes == 224 + 448
    # size 2 x (two norms' inputs and outputs 4 x 2, query 4, key 2, value 2, attention 4, gate and up 2 x 3).
    assert full.activations_bytes == 8 * 2 * (8 + 4 + 2 + 2 + 4 + 6)
    # The head: 8 x 5 logits, three fp32 slices of them, 4 hidden states of 8 x 2, and its gradient in fp32 and bf16. A layer: query,
    # output and gradients 4 x 8 x 4, five times 2 heads x 8 x 8 scores, and the head's gradient in bf16.
    head, layer = 8 * 5 * 2 + 3 * 8 * 5 * 4 + 4 * 8 * 2 * 2 + 5 * 2 * 6, 4 * 8 * 4 * 2 + 5 * 2 * 64 * 2 + 5 * 2 * 2
    assert full.working_bytes == max(head, layer) == 1556
    assert full.allocator_bytes == round(CPU_ALLOCATOR_SHARE * (full.activations_bytes + 1556))
    assert full.total_bytes == RUNTIME_BYTES + sum(value for name, value in full.parts().items() if name != "runtime_bytes")
    assert full.needed_bytes == full.total_bytes - full.checkpoint_bytes
    lora = training_memory(HAND, "lora", 35, 8, "bfloat16", device="gpu")
    assert (lora.weights_bytes, lora.masters_bytes, lora.optimizer_bytes) == (112 + 70, 140, 280)
    # On a GPU the copy for a checkpoint lies in the host's memory, and a layer's 8 x (3 x 3 + 4 x 2) numbers are less than the head's.
    assert (lora.checkpoint_bytes, lora.working_bytes) == (0, 8 * 5 * 2 + 3 * 8 * 5 * 4 + 4 * 8 * 2 * 2)
    assert lora.allocator_bytes == round(0.1 * (lora.activations_bytes + lora.working_bytes))
    dora, dropped = (training_memory(HAND, MethodConfig(name="lora", lora_dropout=p, use_dora=True), 35, 8, "bfloat16") for p in (0.0, 0.1))
    # PEFT's masks for query, key, value, gate and up (2 wide each), output (4) and down (3).
    assert dropped.activations_bytes - dora.activations_bytes == 8 * 2 * (5 * 2 + 4 + 3)
    with pytest.raises(ValueError, match="method"):
        training_memory(HAND, "prefix", 1, 8, "bfloat16")


def test_muon_keeps_one_number_for_each_weight_of_the_layers_matrices() -> None:
    adamw, muon = (training_memory(DEEP, "full", 56, 8, "bfloat16", optimizer=name) for name in ("adamw", "muon"))
    shape = shape_from_config(LLAMA_8B)
    whole, spread = (
        training_memory(shape, "full", shape.num_parameters, 8, "bfloat16", optimizer="muon", num_shards=shards) for shards in (1, 4)
    )
    matrices = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    assert whole.optimizer_bytes == 4 * matrices + 8 * (shape.num_parameters - matrices)
    assert spread.optimizer_bytes == whole.optimizer_bytes / 4
    assert adamw.optimizer_bytes == 8 * 56
    assert dataclasses.replace(adamw, optimizer_bytes=0, checkpoint_bytes=0) == dataclasses.replace(
        muon, optimizer_bytes=0, checkpoint_bytes=0
    )
    with pytest.raises(ValueError, match="only full training goes with muon, not 'lora'"):
        training_memory(DEEP, "lora", 35, 8, "bfloat16", optimizer="muon")
    # Five times three products for a matrix of 2 by 4: 2 x 2 x 4, 2 x 2 x 2 and 2 x 2 x 4, two operations each.
    shape = dataclasses.replace(DEEP, num_hidden_layers=1, linears=(("only", 4, 2),))
    assert muon_flops(shape) == 5 * 2 * (16 + 8 + 16)
    # As long as the probe takes for as many operations.
    run = PlannedRun(SPREAD, "full", 10**6, 36_000, 2048, "bfloat16", 10.0, num_steps=400)
    longer = (
        estimate_training(dataclasses.replace(run, optimizer="muon"), machine=MACHINE).seconds
        - estimate_training(run, machine=MACHINE).seconds
    )
    probed = train_flops_per_token(SPREAD, "lora", 0, 512, loss_share=0.5)
    assert longer == pytest.approx(400 * muon_flops(SPREAD) / probed / 10, rel=1e-6)


def test_a_row_longer_than_a_pack_is_a_pack_of_its_own() -> None:
    in_packs, beyond = (training_memory(DEEP, "lora", 35, 8, "bfloat16", max_row_tokens=longest) for longest in (8, 24))
    assert beyond.activations_bytes == 3 * in_packs.activations_bytes
    assert training_memory(DEEP, "lora", 35, 8, "bfloat16", max_row_tokens=2).activations_bytes == in_packs.activations_bytes


def test_what_moves_is_kept_as_it_was() -> None:
    plain, twice = (training_memory(DEEP, "lora", 35, 8, "bfloat16", num_anchors=number) for number in (0, 2))
    assert (plain.anchors_bytes, twice.anchors_bytes) == (0, 2 * 35 * 2)
    assert twice.needed_bytes - plain.needed_bytes == 2 * 35 * 2
    assert training_memory(DEEP, "full", 56, 8, "float32", num_anchors=1).anchors_bytes == 56 * 4
    # Single weights move in fp32, and so do shards.
    assert training_memory(DEEP, MethodConfig(name="sparse"), 48, 8, "bfloat16", num_anchors=1).anchors_bytes == 48 * 4
    assert training_memory(SPREAD, "full", 10**6, 8, "bfloat16", num_anchors=1, num_shards=4).anchors_bytes == 10**6


def test_the_divergence_works_in_fp32_chunks() -> None:
    shape = shape_from_config(QWEN_3B)
    plain, held = (training_memory(shape, "lora", 10, 300, "bfloat16", has_kl=has_kl) for has_kl in (False, True))
    # 32 positions of 151,936 logits (55 would do, in a multiple of 32), eight times; six hidden states of 2,048 x 2 bytes per token.
    assert held.working_bytes == 8 * 32 * 151_936 * 4 + 300 * 6 * 2048 * 2 > plain.working_bytes
    full = training_memory(shape, "full", 10, 300, "bfloat16", has_kl=True)
    assert full.working_bytes == 8 * 32 * 151_936 * 4 + 300 * 6 * 2048 * 2 + 3 * 151_936 * 2048 * 4


def test_virtual_tokens_stand_before_every_row_of_a_pack() -> None:
    """Eight tokens in rows of at most four: two of the longest, or as many as are said to be there."""
    prompt = MethodConfig(name="prompt_tuning", num_virtual_tokens=3)
    two, five = (training_memory(HAND, prompt, 6, 8, "bfloat16", max_row_tokens=4, num_pack_rows=number) for number in (None, 5))
    assert two.activations_bytes / (8 + 2 * 3) == five.activations_bytes / (8 + 5 * 3)


def test_activations_wait_in_the_hosts_memory_where_they_are_sent_there() -> None:
    """Llama-3.1-8B in packs of 16,384 tokens needs 26 GB of a GPU with all layers computed again."""
    shape = shape_from_config(LLAMA_8B)
    run = PlannedRun(
        shape, "lora", num_lora_parameters(shape, 16), 10**6, 16_384, "bfloat16", 12_000.0, max_row_tokens=2048,
        activation_checkpointing="auto", activation_offload="auto",
    )  # fmt: skip

    def found(gigabytes: int, **changes: object):
        machine = dataclasses.replace(MACHINE, gpu=gpu_like("NVIDIA H200", gigabytes * 10**9))
        changed = dataclasses.replace(run, **changes)
        return estimate_training(changed, machine=machine), estimate_backends(changed, machine=machine, today=TODAY)[0]

    (roomy, _), (tight, here) = found(140), found(25)
    assert (roomy.is_offloaded, tight.is_offloaded, tight.num_checkpointed_layers) == (False, True, 32)
    stays, refused = found(25, activation_offload=False)
    assert not stays.is_offloaded and (here.fits, refused.fits) == (True, False)
    # The inputs of 32 layers, 4,096 x 2 bytes per token, and what the allocator holds beside them.
    assert stays.needed_memory_bytes - tight.needed_memory_bytes == pytest.approx(1.1 * 32 * 16_384 * 4096 * 2, rel=1e-6)
    assert any("wait in the host's memory; the time for that is not counted" in note for note in here.notes)
    # What is asked for is done where there is room too, and never on a CPU.
    assert found(140, activation_offload=True)[0].is_offloaded
    assert found(140, activation_offload=True)[0].needed_memory_bytes < roomy.needed_memory_bytes
    on_cpu = estimate_training(dataclasses.replace(run, activation_offload=True), machine=MACHINE)
    assert on_cpu == estimate_training(dataclasses.replace(run, activation_offload=False), machine=MACHINE)


def test_layers_are_computed_again_where_all_activations_do_not_fit() -> None:
    """LoRA on Llama-3.1-8B in packs of 16,384 tokens needs 74 GB, or 26 GB with all layers computed again."""
    shape = shape_from_config(LLAMA_8B)
    num_lora = num_lora_parameters(shape, 16)

    def estimate(gigabytes: int, setting: str | int):
        run = PlannedRun(
            shape, "lora", num_lora, 10**6, 16_384, "bfloat16", 12_000.0, max_row_tokens=2048, activation_checkpointing=setting
        )
        machine = dataclasses.replace(MACHINE, gpu=gpu_like("NVIDIA H200", gigabytes * 10**9))
        return estimate_training(run, machine=machine), estimate_backends(run, machine=machine, today=TODAY)

    kept, rows_kept = estimate(140, "auto")
    assert (kept, rows_kept[0].notes) == (estimate(140, "none")[0], ("Electricity is not counted.",))
    short, rows = estimate(60, "auto")
    assert (kept.num_checkpointed_layers, rows[0].fits) == (0, True)
    number = short.num_checkpointed_layers
    assert 0 < number < 32
    # As few as fit, and no free lunch.
    assert fits(short.needed_memory_bytes, 60e9)
    fewer = estimate(60, number - 1)
    assert (fewer[0].num_checkpointed_layers, fewer[1][0].fits) == (number - 1, False)
    assert fewer[0].seconds < short.seconds
    everything = estimate(60, "all")[0]
    assert short.seconds < everything.seconds < 1.5 * kept.seconds
    assert rows[0].notes[0] == f"{number} of 32 layers are computed again to fit into memory."
    # What does not fit even so says what it would take.
    none, rows = estimate(20, "auto")
    assert (none.num_checkpointed_layers, none.needed_memory_bytes, rows[0].fits) == (32, everything.needed_memory_bytes, False)
    table, table_kept = ({row.name: row for row in found} for found in (rows, estimate(20, "none")[1]))
    assert (table["L40S"].fits, table_kept["L40S"].fits) == (True, False)
    assert any("computed again to fit" in note for note in table["L40S"].notes)
    assert table["L40S"].high_seconds > table_kept["L40S"].high_seconds
    assert table["H200"] == table_kept["H200"]


SPREAD = dataclasses.replace(DEEP, num_hidden_layers=20, num_parameters=10**6, num_layer_parameters=48_000)
"""A million parameters: 20 layers of 48,000, and 40,000 beside them."""


def test_full_training_over_many_processes_takes_a_share_of_the_state_in_each() -> None:
    alone, two, eight = (training_memory(SPREAD, "full", 10**6, 8, "bfloat16", num_shards=num) for num in (1, 2, 8))
    assert (alone.masters_bytes, alone.gradients_bytes, alone.optimizer_bytes) == (4_000_000, 4_000_000, 8_000_000)
    # 16 / N bytes per parameter.
    assert (two.masters_bytes, two.gradients_bytes, two.optimizer_bytes) == (2_000_000, 2_000_000, 4_000_000)
    assert (eight.masters_bytes, eight.gradients_bytes, eight.optimizer_bytes) == (500_000, 500_000, 1_000_000)
    assert (alone.checkpoint_bytes, two.checkpoint_bytes) == (12_000_000, 6_000_000)
    # Beside the layers 40,000 weights in bf16; two layers, and the gradients of one, in bf16 and as fp32.
    assert (alone.weights_bytes, two.weights_bytes) == (2 * 10**6, 2 * 40_000 + (3 * 2 + 4) * 48_000)
    # Packs stay as large as they are.
    assert alone.activations_bytes == two.activations_bytes

    # The peak is behind the last step, where the first process holds the whole weights in bf16 to save them.
    on_gpu = [training_memory(SPREAD, "full", 10**6, 8, "bfloat16", num_shards=num, device="gpu") for num in (1, 2, 8)]
    peaks = [memory.total_bytes - memory.runtime_bytes for memory in on_gpu]
    assert peaks[1:] == [8_000_000 + 2_000_000, 2_000_000 + 2_000_000]
    assert [memory.whole_weights_bytes > 0 for memory in on_gpu] == [False, True, True]
    with pytest.raises(ValueError, match="only full training spreads its weights over processes, not 'lora'"):
        training_memory(SPREAD, "lora", 35, 8, "bfloat16", num_shards=2)


def test_a_checkpoint_that_is_on_the_disk_in_time_costs_nothing() -> None:
    shape = shape_from_config(QWEN_3B)
    num_trainable, tokens = 10**8, 2000
    memories = [training_memory(shape, "full", num_trainable, tokens, "bfloat16", tokens_per_second=speed) for speed in (None, 1e6, 400, 1)]
    unknown, fast, between, slow = (memory.checkpoint_bytes for memory in memories)
    # 12 bytes each; at a million tokens a second the forward pass is over long before them, at one it takes minutes.
    assert (unknown, fast, slow) == (12 * num_trainable, 12 * num_trainable, 0)
    # 1.2 GB take 1.5 s, the forward pass of 2,000 tokens 1.667 s: in its last tenth a tenth of what it keeps has yet to come.
    used = memories[2].activations_bytes + memories[2].working_bytes
    assert between == pytest.approx(12 * num_trainable - 0.1 * (1 + CPU_ALLOCATOR_SHARE) * used, rel=1e-6)
    assert len({memory.needed_bytes for memory in memories}) == 1


def test_layers_computed_again_keep_their_inputs() -> None:
    shape = dataclasses.replace(HAND, num_hidden_layers=3)
    kept = [training_memory(shape, "lora", 35, 8, "bfloat16", num_checkpointed_layers=num).activations_bytes for num in range(4)]
    layer, entry = 8 * 2 * (26 - 2 * 2), 8 * 2 * 2
    # With all three, one layer at a time is there in full.
    assert kept == [3 * layer, 2 * layer + entry, layer + 2 * entry, layer + 3 * entry]


def test_what_oneDNN_keeps_grows_with_the_lengths_it_has_met() -> None:
    lengths = {"num_pack_lengths": 5, "num_row_lengths": 4}
    lora, full = (training_memory(HAND, method, 35, 8, "bfloat16", **lengths) for method in ("lora", "full"))
    assert (lora.kernels_bytes, full.kernels_bytes) == (5 * 17 * 10**6 + 4 * 3 * 10**6, 5 * 11 * 10**6 + 4 * 3 * 10**6)
    assert training_memory(HAND, "lora", 35, 8, "bfloat16").kernels_bytes == 20 * 10**6
    # It keeps so many products and no more; other libraries, and GPUs, write no code for a length.
    assert training_memory(HAND, "lora", 35, 8, "bfloat16", num_pack_lengths=1000).kernels_bytes == MAX_KERNEL_BYTES
    assert training_memory(HAND, "lora", 35, 8, "float32", **lengths).kernels_bytes == 0
    assert training_memory(HAND, "lora", 35, 8, "bfloat16", device="gpu", **lengths).kernels_bytes == 0


def test_what_a_process_has_already_counts_on_a_cpu_alone() -> None:
    run = PlannedRun(SPREAD, "lora", 10**6, 36_000, 2048, "bfloat16", 10.0, num_pack_lengths=3, runtime_bytes=2 * 10**9)
    plain = dataclasses.replace(run, num_pack_lengths=1, runtime_bytes=RUNTIME_BYTES)
    on_cpu, on_gpu = (
        run.memory("bfloat16", device=kind).total_bytes - plain.memory("bfloat16", device=kind).total_bytes for kind in ("cpu", "gpu")
    )
    assert (on_cpu, on_gpu) == (2 * 10**9 - RUNTIME_BYTES + 2 * 17 * 10**6, 0)


def test_each_lane_unpacks_a_matrix_of_its_own() -> None:
    shape = shape_from_config(QWEN_3B)
    one, two = (training_memory(shape, "qlora", 10, 2048, "bfloat16", num_lanes=number).weights_bytes for number in (1, 2))
    assert two - one == 2 * 2048 * 11_008
    assert training_memory(shape, "lora", 10, 2048, "bfloat16", num_lanes=2).weights_bytes == shape.num_parameters * 2 + 10 * 2


def test_the_head_works_in_chunks() -> None:
    shape = shape_from_config(QWEN_3B)
    few, many = (training_memory(shape, "lora", 10, tokens, "bfloat16") for tokens in (300, 400))
    # 256 positions of 151,936 logits in bf16, slices in fp32, and four hidden states of 2,048 x 2 bytes per token.
    assert few.working_bytes == 256 * 151_936 * 2 + HEAD_SLICE_BYTES["cpu"] + 300 * 4 * 2048 * 2
    assert many.working_bytes - few.working_bytes == 100 * 4 * 2048 * 2
    huge = dataclasses.replace(shape, vocab_size=2**19)
    assert (
        training_memory(huge, "lora", 10, 300, "bfloat16").working_bytes
        == MAX_HEAD_LOGITS * 2 + HEAD_SLICE_BYTES["cpu"] + 300 * 4 * 2048 * 2
    )


def test_the_engines_own_bounds_are_meant() -> None:
    import torch

    from giong.engine import cross_entropy, divergence, elementwise, row_attention, shapes
    from giong.sizing import memory

    for device, kind in (("cpu", "cpu"), ("cuda", "gpu")):
        for vocab_size, copies in itertools.product((1000, 49_152, 151_936, 300_000, 2**27), (1, KL_COPIES)):
            engine = cross_entropy.chunk_positions(torch.device(device), vocab_size, copies)
            assert engine == memory.chunk_positions(vocab_size, kind, copies)
        assert (cross_entropy.chunk_positions(torch.device(device), 1000), shapes.LENGTH_MULTIPLE) == (
            HEAD_POSITIONS[kind],
            LENGTH_MULTIPLE,
        )
        assert 3 * 4 * elementwise.slice_positions(torch.device(device), 2**10) * 2**10 == HEAD_SLICE_BYTES[kind]
    assert divergence.FP32_COPIES == KL_COPIES
    assert (row_attention.MAX_SCORES, row_attention.BLOCK_QUERIES) == (MAX_ATTENTION_SCORES, BLOCK_QUERIES)


def test_generation_memory_and_cache() -> None:
    shape = shape_from_config(QWEN_3B)
    # 36 layers x 2 (key, value) x 2 heads x 128 wide x 2 bytes.
    assert kv_cache_bytes_per_token(shape, "bfloat16") == 36_864
    memory = generation_memory(shape, "bfloat16", num_sequences=4, tokens_per_sequence=500)
    assert memory.kv_cache_bytes == 2000 * 36_864
    assert memory.weights_bytes == 2 * shape.num_parameters
    assert memory.logits_bytes == 2 * 4 * 151_936 * 4
    with pytest.raises(ValueError, match="dtype"):
        generation_memory(shape, "int3", num_sequences=1, tokens_per_sequence=1)
    assert fits(90, 100)
    assert not fits(91, 100)


MACHINE = Machine(4, "a CPU", frozenset({"avx2"}), 2.5e9, 8 * 2**30, 6 * 2**30, None, 10**11)


def test_peak_operations_follow_the_features() -> None:
    assert peak_flops(MACHINE, "float32") == 4 * 2.5e9 * 32
    assert peak_flops(MACHINE, "bfloat16") == peak_flops(MACHINE, "float32")
    amx = Machine(1, "", frozenset({"avx512f", "avx512_bf16", "amx_bf16"}), 2e9, None, None, None, 0)
    assert (peak_flops(amx, "float32"), peak_flops(amx, "bfloat16")) == (64e9, 2048e9)


GPU_MACHINE = dataclasses.replace(MACHINE, gpu=gpu_like("NVIDIA H200", 140 * 10**9))


@pytest.mark.parametrize(
    ("driver_says", "row"),
    [
        ("NVIDIA GeForce RTX 3090", "RTX 3090"), ("NVIDIA L4", "L4"), ("NVIDIA L40S", "L40S"), ("NVIDIA A100-SXM4-80GB", "A100 SXM"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe"), ("NVIDIA H100 80GB HBM3", "H100 PCIe"), ("NVIDIA H200", "H200"),
    ],
)  # fmt: skip
def test_a_gpu_is_found_in_the_table_by_what_its_driver_calls_it(driver_says: str, row: str) -> None:
    table = {device.name: device for device in REFERENCE_DEVICES}
    assert gpu_like(driver_says, 7) == dataclasses.replace(table[row], name=driver_says, memory_bytes=7)


def test_a_gpu_that_is_in_no_row_has_the_lowest_figures() -> None:
    unknown = gpu_like("NVIDIA GH200 480GB", 7)
    assert (unknown.peak_flops, unknown.bandwidth_bytes_per_second, unknown.memory_bytes) == (71e12, 300e9, 7)
    assert device_of(dataclasses.replace(MACHINE, gpu=unknown), "bfloat16") is unknown
    here = device_of(MACHINE, "float32")
    assert (here.kind, here.memory_bytes, here.peak_flops) == ("cpu", 6 * 2**30, peak_flops(MACHINE, "float32"))


def test_on_a_gpu_here_its_formulas_and_its_memory_count() -> None:
    """LoRA of rank 16 on Llama-3.1-8B in packs of 16,384 tokens, on a machine with 6 GiB of free memory beside its H200."""
    shape = shape_from_config(LLAMA_8B)
    num_lora, tokens = num_lora_parameters(shape, 16), 16_384
    run = PlannedRun(
        shape, "lora", num_lora, 10**6, tokens, "bfloat16", 12_000.0, row_tokens=1900, max_row_tokens=2048, loss_share=1.0, num_steps=100
    )
    estimate = estimate_training(run, machine=GPU_MACHINE)
    memory = training_memory(shape, "lora", num_lora, tokens, "bfloat16", max_row_tokens=2048, device="gpu")
    assert (estimate.peak_memory_bytes, estimate.needed_memory_bytes) == (memory.total_bytes, memory.total_bytes)
    assert estimate.peak_memory_bytes == pytest.approx(73.78e9, rel=1e-4)
    # The probe is converted as on a GPU; 100 updates of 42 million numbers, 50 bytes each at half of 4.8 TB/s.
    slowdown = slowdown_after_probe(shape, "lora", num_lora, 1900, 1.0, device="gpu")
    assert slowdown > slowdown_after_probe(shape, "lora", num_lora, 1900, 1.0)
    assert estimate.seconds == pytest.approx(10**6 * slowdown / 12_000 + 100 * num_lora * 50 / 2.4e12, rel=1e-9)
    here = estimate_backends(run, machine=GPU_MACHINE, today=TODAY)[0]
    assert (here.fits, here.peak_memory_bytes) == (True, memory.total_bytes)
    small = dataclasses.replace(MACHINE, total_memory_bytes=10**12, available_memory_bytes=10**12, gpu=gpu_like("NVIDIA H200", 80 * 10**9))
    # A tenth of 80 GB stays free, however much memory the host has.
    assert estimate_backends(run, machine=small, today=TODAY)[0].fits is False
    unmeasured = dataclasses.replace(run, probe_tokens_per_second=None)
    guess, rows = estimate_training(unmeasured, machine=GPU_MACHINE), estimate_backends(unmeasured, machine=GPU_MACHINE, today=TODAY)
    h200 = next(row for row in rows if row.name == "H200")
    assert (guess.basis, guess.seconds) == ("arithmetic", pytest.approx(h200.high_seconds, rel=1e-12))


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_what_the_probe_does_not_do_is_added(device: str) -> None:
    # Rows of 512 tokens, half with loss: 42 weights of layers and half of 10, attention of 2 heads x 2 wide x 2 x 512.
    probe = 4 * 47 + ATTENTION_SLOWDOWN[device] * 3 * 4096
    lora = slowdown_after_probe(HAND, "lora", 35, device=device)
    assert lora == pytest.approx((probe + LORA_SLOWDOWN[device] * 6 * 35) / probe, rel=1e-12)
    full = slowdown_after_probe(HAND, "full", 56, row_tokens=10, loss_share=1.0, device=device)
    assert full == pytest.approx((6 * 52 + ATTENTION_SLOWDOWN[device] * 240) / probe, rel=1e-12)


def test_a_probe_decides_the_time_here() -> None:
    shape = shape_from_config(QWEN_3B)
    slowdown = slowdown_after_probe(shape, "lora", 10**6, 200, 0.6)
    run = PlannedRun(shape, "lora", 10**6, 36_000, 2048, "bfloat16")
    probed = dataclasses.replace(run, probe_tokens_per_second=10.0)
    estimate = estimate_training(dataclasses.replace(probed, row_tokens=200, loss_share=0.6, num_steps=400), usd_per_hour=0.5)
    # 400 updates of a million numbers, 50 bytes each at 20 GB/s.
    assert estimate.seconds == pytest.approx(3600 * slowdown + 1.0, rel=1e-12)
    assert (estimate.usd, estimate.basis) == (pytest.approx(0.5 * estimate.seconds / 3600, rel=1e-12), "measured")
    unsaid = estimate_training(probed)
    assert unsaid.seconds == pytest.approx(3600 * slowdown_after_probe(shape, "lora", 10**6), rel=1e-12)
    # A finished run of the same kind knows better than a probe, its updates among it.
    known = estimate_training(dataclasses.replace(probed, run_tokens_per_second=12.0, num_steps=400))
    assert (known.seconds, known.basis) == (3000.0, "measured")
    guess = estimate_training(run, machine=MACHINE)
    assert guess.basis == "arithmetic"
    flops = train_flops_per_token(shape, "lora", 10**6, 2048)
    assert guess.seconds == pytest.approx(36_000 * flops / (4 * 2.5e9 * 32 * 0.05), rel=1e-12)
    with pytest.raises(ValueError, match="positive"):
        dataclasses.replace(run, probe_tokens_per_second=0.0)


def test_what_is_scored_and_drawn_takes_its_time() -> None:
    shape = shape_from_config(QWEN_3B)
    run = PlannedRun(shape, "lora", 10**6, 36_000, 2048, "bfloat16", 10.0, row_tokens=200, loss_share=0.6)
    plain = estimate_training(run, machine=MACHINE).seconds
    scoring = 5000 * scoring_after_probe(shape, "lora", 10**6, 200, 0.6) / 10
    scored = dataclasses.replace(run, num_scored_tokens=5000)
    assert estimate_training(scored, machine=MACHINE).seconds == pytest.approx(plain + scoring, rel=1e-12)
    drawn = estimate_training(dataclasses.replace(scored, num_written_tokens=800, write_tokens_per_second=4.0), machine=MACHINE)
    assert (drawn.seconds, drawn.write_seconds) == (pytest.approx(plain + scoring + 200, rel=1e-12), 200.0)
    # Four processes train, and one of them scores and draws.
    four = dataclasses.replace(scored, num_written_tokens=800, write_tokens_per_second=4.0, num_processes=4)
    assert estimate_training(four, machine=MACHINE).seconds == pytest.approx(plain / 4 + scoring + 200, rel=1e-12)
    with pytest.raises(ValueError, match="write_tokens_per_second must be positive"):
        dataclasses.replace(run, write_tokens_per_second=0.0)
    # Elsewhere nothing was measured that could tell how long drawing takes.
    rows = {row.name: row for row in estimate_backends(four, machine=MACHINE, today=TODAY)}
    assert "The drawing of answers is not counted." in rows["H200"].notes
    assert "The drawing of answers is not counted." not in rows[THIS_MACHINE].notes


def test_processes_share_the_tokens_that_a_probe_measured_in_one_of_them() -> None:
    """Four processes at 10 tokens a second each, or a finished run of which all four together made 30."""
    run = PlannedRun(SPREAD, "full", 10**6, 36_000, 2048, "bfloat16", 10.0, num_steps=400)
    alone, four, spread = (
        estimate_training(dataclasses.replace(run, num_processes=processes, num_shards=shards), machine=MACHINE, usd_per_hour=0.5)
        for processes, shards in ((1, 1), (4, 1), (4, 4))
    )
    updates = 400 * 10**6 * 50 / 20e9
    # An update is of all weights in each process, or of a quarter of them.
    assert four.seconds == pytest.approx((alone.seconds - updates) / 4 + updates, rel=1e-9)
    assert spread.seconds == pytest.approx(alone.seconds / 4, rel=1e-9)
    assert (four.usd, four.peak_memory_bytes) == (pytest.approx(0.5 * four.seconds / 3600), alone.peak_memory_bytes)
    # Of 14 bytes per parameter (16 with the model's own 2), three quarters are elsewhere.
    assert alone.peak_memory_bytes - spread.peak_memory_bytes > 10 * 10**6
    finished = estimate_training(dataclasses.replace(run, num_processes=4, num_shards=4, run_tokens_per_second=30.0), machine=MACHINE)
    assert finished.seconds == pytest.approx(36_000 / 30, rel=1e-9)
    rows = estimate_backends(dataclasses.replace(run, num_processes=4, num_shards=4), machine=MACHINE, today=TODAY)
    assert rows[0].notes[0] == "In 4 processes; memory is that of each."
    # One of each is meant elsewhere.
    assert rows[1:] == estimate_backends(run, machine=MACHINE, today=TODAY)[1:]


def test_generation_time_from_a_probe_and_from_arithmetic() -> None:
    shape = shape_from_config(QWEN_3B)
    measured = estimate_generation(shape, 40, 300, 100, "bfloat16", 8, 20.0)
    assert (measured.seconds, measured.basis) == (200.0, "measured")
    strong = Machine(32, "", frozenset({"amx_bf16"}), 2e9, None, None, None, 0)
    alone, together = (estimate_generation(shape, 40, 300, 100, "bfloat16", num, machine=strong) for num in (1, 8))
    # Decoding one by one reads 6.2 GB of weights per token at 20 GB/s; together each reading serves eight.
    assert alone.seconds > 40 * 100 * 2 * shape.num_parameters / 20e9
    assert alone.seconds / 8 < together.seconds < alone.seconds / 2
    assert together.peak_memory_bytes - alone.peak_memory_bytes > 7 * 400 * 36_864


def test_backends_are_marked_dated_and_replaced_by_own_rates() -> None:
    shape = shape_from_config(LLAMA_8B)
    num_lora = num_lora_parameters(shape, 16)
    run = PlannedRun(shape, "lora", num_lora, 300_000, 2048, "bfloat16", 50.0, row_tokens=500)
    backends = estimate_backends(run, machine=MACHINE, today=TODAY, own_usd_per_hour={"L4": 1.0, THIS_MACHINE: 2.0})
    rows = {row.name: row for row in backends}
    here = rows[THIS_MACHINE]
    seconds = 300_000 * slowdown_after_probe(shape, "lora", num_lora, 500) / 50.0
    assert (backends[0], here.basis, here.low_seconds) == (here, "measured", here.high_seconds)
    assert here.high_seconds == pytest.approx(seconds, rel=1e-12)
    assert here.high_usd == pytest.approx(2.0 * seconds / 3600, rel=1e-12)
    assert here.fits is False  # 16 GB of weights in 6 GiB
    assert all(row.basis == "arithmetic" for row in backends[1:])
    a100 = rows["A100 SXM"]
    # 4 x 8e9 x 3e5 = 9.6e15 operations at 0.55 and 0.2 of 312e12, less the looked-up embedding, plus updates and attention.
    assert a100.low_seconds == pytest.approx(9.6e15 / (0.55 * 312e12), rel=0.06)
    assert a100.high_seconds == pytest.approx(9.6e15 / (0.20 * 312e12), rel=0.06)
    assert a100.low_usd == pytest.approx(0.80 * a100.low_seconds / 3600, rel=1e-12)
    assert a100.high_usd == pytest.approx(3.00 * a100.high_seconds / 3600, rel=1e-12)
    assert (a100.fits, rows["RTX 4090"].fits) == (True, False)
    assert (rows["L4"].source, rows["L4"].as_of) == ("your own rate", None)
    assert rows["L4"].high_usd == pytest.approx(rows["L4"].high_seconds / 3600, rel=1e-12)
    assert rows["CPU, 8 cores, AVX2"].high_usd is None
    mini = rows["OpenAI gpt-4o-mini-2024-07-18"]
    assert (mini.low_usd, mini.high_seconds, mini.fits) == (pytest.approx(0.90, rel=1e-12), None, None)
    assert any("October 2025" in note for note in mini.notes)
    for row in backends:
        assert row.low_usd is None or row.name in ("L4", THIS_MACHINE) or (row.as_of is not None and row.source), row.name


METHODS_PAGE = Path(__file__).parents[2] / "docs" / "methods" / "index.md"
LIKE_LORA = {"lora_r": 16, "lora_alpha": 32.0}


def test_the_table_of_the_methods_page_is_what_the_formulas_give() -> None:
    shape, found = shape_from_config(QWEN_3B), {}
    for line in METHODS_PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[0].startswith("`") and cells[1][0].isdigit():
            found[cells[0].split("`")[1]] = cells[1:]
    assert set(found) == set(get_args(MethodConfig.model_fields["name"].annotation))

    def operations(method: MethodConfig) -> float:
        return train_flops_per_token(shape, method, num_trainable_parameters(shape, method), 512)

    for name, cells in found.items():
        method = MethodConfig(name=name, **(LIKE_LORA if name in ("lora", "qlora") else {}))
        num_trainable = num_trainable_parameters(shape, method)
        # With the places of single weights.
        file_bytes = num_trainable * (6 if name == "sparse" else 2)
        size = f"{file_bytes / 1e9:.1f} GB" if file_bytes >= 1e9 else f"{file_bytes / 1e6:.{0 if file_bytes >= 1e7 else 1}f} MB"
        relative = round(operations(method) / operations(MethodConfig(name="lora", **LIKE_LORA)), 1)
        memory = training_memory(shape, method, num_trainable, 2048, "bfloat16", max_row_tokens=512)
        assert cells == [f"{num_trainable:,}", size, f"{relative:g}", f"{memory.needed_bytes / 1e9:.0f} GB"], name


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
QWEN_1_5B = {
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize(("case", "config", "share"), [("lora-1.5b", QWEN_1_5B, 0.366), ("lora-8b", LLAMA_8B, 0.497)])
def test_estimates_of_the_runs_that_were_measured_on_a_gpu(case: str, config: dict, share: float) -> None:
    """Against `train_speed` on an H200, which trained eight rows of nearly 2,048 tokens in one pass, with loss everywhere."""
    stored = json.loads((RESULTS / f"train_speed-{case}.json").read_text())
    assert (stored["machine"]["gpu"], stored["work"]["rows"]["num_rows"]) == ("NVIDIA H200", 8)
    measured, arm = stored["medians"]["giong"], stored["measurements"]["giong"][0]
    shape, tokens = shape_from_config(config), arm["num_tokens_per_step"]
    num_lora = num_lora_parameters(shape, 16)
    assert num_lora == arm["num_trainable"]
    run = PlannedRun(shape, "lora", num_lora, tokens, tokens, "bfloat16", row_tokens=tokens // 8, max_row_tokens=2048, num_steps=1)
    rows = {row.name: row for row in estimate_backends(run, machine=MACHINE, today=TODAY)}
    # The speed lies in the range, whose top is near the better of the two.
    assert rows["H200"].low_seconds < tokens / measured["tokens_per_second"] < rows["H200"].high_seconds
    assert run.flops() / tokens * measured["tokens_per_second"] / 989e12 == pytest.approx(share, abs=0.001)
    # Both runs kept the output of each layer's two norms, which layers with LoRA have formed again since (8.0 GB at 8B). Torch's peak
    # counts tensors: neither what its allocator holds beside them nor what a process has before any weight.
    memory = run.memory("bfloat16", device="gpu")
    norms_then = 2 * shape.num_hidden_layers * shape.hidden_size * tokens * 2
    tensors_then = memory.total_bytes - memory.runtime_bytes - memory.allocator_bytes + norms_then
    assert tensors_then == pytest.approx(measured["peak_memory_bytes"], rel=0.01)
    # With both, which is what is said beforehand, the estimate of that day was a tenth above.
    assert 1.05 < (memory.total_bytes + 1.1 * norms_then) / measured["peak_memory_bytes"] < 1.12


def test_closed_and_hourly_remote_models_are_not_quoted() -> None:
    shape = shape_from_config(LLAMA_8B)

    def remote(day: date) -> set[str]:
        run = PlannedRun(shape, "lora", 10, 1000, 512, "bfloat16", 1.0)
        rows = estimate_backends(run, machine=MACHINE, today=day)
        return {row.name for row in rows if row.kind == "remote"}

    assert "OpenAI gpt-4.1-mini" in remote(TODAY)
    assert not any("nano" in name or "RFT" in name or "gpt-3.5" in name for name in remote(TODAY))
    assert "OpenAI gpt-4.1-mini" in remote(date(2027, 1, 5))
    assert remote(date(2027, 1, 6)) == {"Azure OpenAI gpt-4.1 (global)"}
    assert remote(date(2027, 4, 14)) == set()


def test_prices_are_dated_and_warn_when_old() -> None:
    rows = [*prices.FINE_TUNING_PRICES, *prices.INFERENCE_PRICES, *prices.RENTAL_PRICES]
    assert all(row.as_of <= TODAY and row.source for row in rows)
    assert len({row.name for row in prices.FINE_TUNING_PRICES}) == len(prices.FINE_TUNING_PRICES)
    assert {row.gpu for row in prices.RENTAL_PRICES} == {device.name for device in REFERENCE_DEVICES if device.kind == "gpu"}
    h200 = prices.rental_price("H200", TODAY)
    assert (h200.low_usd_per_hour, h200.high_usd_per_hour, h200.as_of) == (2.50, 7.00, date(2026, 3, 1))
    assert h200.warning(TODAY) == ""
    assert h200.source.count(";") == 2
    assert "March 2026, 264 days ago" in h200.warning(TODAY, max_age_days=100)
    # The row of 2024 counts only where nothing younger is known.
    assert prices.rental_price("L4", TODAY).high_usd_per_hour == 0.78
    assert prices.rental_price("L4", date(2030, 1, 1)).high_usd_per_hour == 1.212
    assert prices.rental_price("no such GPU", TODAY) is None
    with pytest.raises(TypeError, match="as_of"):
        prices.RentalPrice(gpu="L4", low_usd_per_hour=1, high_usd_per_hour=1, source="hearsay", confidence="secondary")


def test_token_costs() -> None:
    by_name = {row.name: row for row in prices.FINE_TUNING_PRICES}
    # 1 000 examples x 500 tokens x 3 epochs cost $4.50 to train on; reading 1M and writing 2M tokens 0.30 + 2.40.
    mini = by_name["OpenAI gpt-4o-mini-2024-07-18"]
    assert mini.training_usd_per_million_tokens * 1.5 == pytest.approx(4.50, rel=1e-12)
    assert prices.token_cost_usd(mini, 1e6, 2e6) == pytest.approx(2.70, rel=1e-12)
    assert prices.token_cost_usd(by_name["Azure OpenAI gpt-4.1 (global)"], 1e6, 1e6) is None


CPUINFO = (
    "processor\t: 0\nmodel name\t: Some CPU @ 2.00GHz\ncpu MHz\t\t: 2000.5\nflags\t\t: fpu avx2 avx512_bf16 sse\n\n"
    "processor\t: 1\nmodel name\t: Other\n"
)
MEMINFO = "MemTotal:       8000 kB\nMemFree:  1000 kB\nMemAvailable:   6000 kB\nHugePages_Total:       0\n"


def fake_system(root: Path, cgroup_line: str, files: dict[str, str]) -> dict[str, Path]:
    for name, text in {"proc/cpuinfo": CPUINFO, "proc/meminfo": MEMINFO, "proc/self/cgroup": cgroup_line, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return {"proc": root / "proc", "cgroup": root / "cgroup"}


def test_system_files_are_read() -> None:
    assert parse_cpuinfo(CPUINFO) == ("Some CPU @ 2.00GHz", frozenset({"avx2", "avx512_bf16"}), 2000.5e6)
    arm = parse_cpuinfo("processor : 0\nFeatures : fp asimd bf16\n")
    assert arm == ("", frozenset({"asimd", "bf16"}), None)
    assert parse_meminfo(MEMINFO)["MemAvailable"] == 6000 * 1024


def test_the_control_group_limit_is_the_memory_version_2(tmp_path: Path) -> None:
    files = {
        "cgroup/a/memory.max": "4096000\n", "cgroup/a/memory.current": "2048000\n", "cgroup/a/memory.stat": "anon 5\ninactive_file 48000\n",
        "cgroup/a/b/memory.max": "max\n", "cgroup/a/b/cpu.max": "100000 100000\n",
    }  # fmt: skip
    machine = this_machine(tmp_path, **fake_system(tmp_path, "0::/a/b\n", files))
    assert (machine.total_memory_bytes, machine.memory_limit_bytes, machine.num_cores) == (4096000, 4096000, 1)
    assert machine.available_memory_bytes == 4096000 - (2048000 - 48000)
    assert machine.free_disk_bytes > 0


def test_the_control_group_limit_is_the_memory_version_1(tmp_path: Path) -> None:
    # The path is the host's and does not exist inside the container; its root is the container's own group.
    files = {
        "cgroup/memory/memory.limit_in_bytes": "2000000\n", "cgroup/memory/memory.usage_in_bytes": "500000\n",
        "cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 100000\n",
        "cgroup/cpu/cpu.cfs_quota_us": "-1\n", "cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }  # fmt: skip
    machine = this_machine(tmp_path, **fake_system(tmp_path, "4:memory:/docker/0123\n3:cpu:/docker/0123\n", files))
    assert (machine.memory_limit_bytes, machine.available_memory_bytes) == (2000000, 1600000)
    unlimited = {"cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
    machine = this_machine(tmp_path, **fake_system(tmp_path, "4:memory:/\n", unlimited))
    assert (machine.memory_limit_bytes, machine.total_memory_bytes, machine.available_memory_bytes) == (None, 8192000, 6144000)


def test_this_machine_without_system_files_and_as_it_is(tmp_path: Path) -> None:
    bare = this_machine(tmp_path, proc=tmp_path / "none", cgroup=tmp_path / "none")
    assert (bare.cpu_flags, bare.clock_hz, bare.memory_limit_bytes) == (frozenset(), None, None)
    assert bare.num_cores >= 1
    real = this_machine(tmp_path)
    if real.total_memory_bytes is not None and real.available_memory_bytes is not None:
        assert 0 < real.available_memory_bytes <= real.total_memory_bytes


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"), (0.44, "0.4 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"), (7620, "2 h 07 min"), (86_390, "1 d 0 h"), (273_600, "3 d 4 h"), (-185, "-3 min 05 s"), (None, "unknown"),
        (float("inf"), "unknown"), (float("nan"), "unknown"),
    ],
)  # fmt: skip
def test_seconds_as_people_read_them(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"), (512, "512 B"), (1023.6, "1.00 KiB"), (1536, "1.50 KiB"), (41 * 10**6, "39.1 MiB"), (2**30 - 1, "1.00 GiB"),
        (140 * 2**30, "140 GiB"), (5 * 2**50, "5120 TiB"), (-1536, "-1.50 KiB"), (None, "unknown"),
    ],
)  # fmt: skip
def test_bytes_as_people_read_them(num_bytes: float | None, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("usd", "text"),
    [
        (0, "$0"), (0.001, "less than $0.01"), (0.005, "$0.01"), (4.5, "$4.50"), (999.99, "$999.99"), (999.996, "$1,000"),
        (1240.4, "$1,240"), (-4.5, "-$4.50"), (-0.001, "$0"), (None, "unknown"),
    ],
)  # fmt: skip
def test_dollars_as_people_read_them(usd: float | None, text: str) -> None:
    assert format_usd(usd) == text


def test_ranges_collapse_when_both_ends_read_the_same() -> None:
    assert format_range("42 s", "42 s") == "42 s"
    assert format_range("$1.00", "$2.00") == "$1.00 to $2.00"
