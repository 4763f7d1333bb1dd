"""LoRA: a trainable low-rank update B A beside each frozen linear layer (Hu et al. 2021, 2106.09685, equation 3).

PEFT's modules and file format: what is saved here loads in PEFT and vLLM and the other way round. The update starts as
zero (B = 0), so the tuned model starts as the base.

With `bias` the model's own biases move too, as PEFT has it: they are saved with the update. What they were is kept in the host's
memory, so that `detach` puts the base back bit by bit.

One decision a reader may question: PiSSA (Meng et al. 2024, 2404.02948, equations 2 to 4) starts at the main part of each matrix,
and PEFT takes that part out of the frozen weights. Here the weights stay, and a second, frozen update takes the part off again: the
sum is the same, nothing is rounded to bf16 on the way, the base is whole at every moment, and what is saved (both updates as one of
twice the rank) is the model that was trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear as PeftLinear
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from giong.config import MethodConfig
from giong.errors import ConfigError, ModelError
from giong.methods.trainable import Trainable
from giong.models.load import shape_of
from giong.models.parts import biases, task_head
from giong.models.saving import system_errors
from giong.sizing.moving import check_bias, check_lora
from giong.sizing.shapes import Adapted, Linear, is_target, matching

FORMAT = "adapter"

TRAINED, START = "default", "start"
"""Names of the update that moves and, with PiSSA, of the frozen one that takes off what it started as."""

SVD_ITERATIONS = 16
"""Rounds of the randomised decomposition (Halko et al. 2011, 0909.4061, algorithm 4.4): those of the PiSSA paper's section 4."""


def apply(model: PreTrainedModel, config: MethodConfig, *, seed: int = 0, base_name: str = "") -> Trainable:
    """Put LoRA layers into `model`. The config's rank, alpha and dropout must be resolved (not None).

    Raises ConfigError naming the model's linear layers when a name in `target_modules` or a pattern matches none of them, and for a
    rank above a matrix's size or biases that are not there.
    """
    assert config.lora_r is not None and config.lora_alpha is not None and config.lora_dropout is not None
    check_targets(model, config)
    check_bias(shape_of(model), config)
    start = None if config.start_from is None else Path(config.start_from)
    settings = LoraConfig.from_pretrained(start) if start else LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=config.target_modules,
        use_rslora=config.use_rslora, use_dora=config.use_dora, rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern), bias=config.bias, **_task(model),
    )  # fmt: skip
    before = {} if settings.bias == "none" else {bias: bias.detach().to("cpu", copy=True) for bias in biases(model)}
    heads = task_head(model)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # GPT-2 keeps its weights transposed; PEFT sets fan_in_fan_out itself and says so each time.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        # PEFT asks transformers in a way that transformers is about to drop; a user can do nothing about it.
        warnings.simplefilter("ignore", FutureWarning)
        tuned = (
            _go_on(model, settings, start, config.lora_dropout) if start else get_peft_model(model, settings, autocast_adapter_dtype=False)
        )
        if config.init_lora_weights == "pissa":
            _start_at_main_part(tuned, settings)
    if base_name:
        # PEFT puts the path of the loaded model here, which means nothing on another machine.
        tuned.peft_config[TRAINED].base_model_name_or_path = base_name
    for name, parameter in tuned.named_parameters():
        # PEFT trains a copy of the head of a classifier, and with all biases those of the original too.
        if ".original_module." in name:
            parameter.requires_grad_(False)
    parameters = {name: parameter for name, parameter in tuned.named_parameters() if parameter.requires_grad}

    def save(folder: Path) -> None:
        with system_errors():
            if START in tuned.peft_config:
                _save_difference(tuned, folder)
            else:
                tuned.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)

    @torch.no_grad()
    def detach() -> bool:
        tuned.unload()
        for name, head in heads.items():
            # PEFT leaves the copy that it trained.
            model.set_submodule(name, head)
        for bias, value in before.items():
            bias.copy_(value)
            bias.grad = None
        model.requires_grad_(False)
        return True

    factors = {name: ratio for name in parameters if (ratio := _learning_rate_ratio(name, config)) != 1.0}
    return Trainable(tuned.get_base_model(), parameters, FORMAT, save, lambda: merge(tuned), detach, factors)


def _learning_rate_ratio(name: str, config: MethodConfig) -> float:
    """How many times the run's learning rate a parameter of this name has."""
    if ".lora_B." in name:
        return config.loraplus_lr_ratio
    is_own_bias = name.endswith(".bias") and ".modules_to_save." not in name
    return config.bias_lr_ratio if is_own_bias else 1.0


def _go_on(model: PreTrainedModel, settings: LoraConfig, start: Path, dropout: float) -> PeftModel:
    """The model with the adapter in the folder `start`, which is trained on. Raises ModelError where it does not fit."""
    settings.lora_dropout, settings.inference_mode = dropout, False
    try:
        tuned = PeftModel.from_pretrained(model, start, config=settings, is_trainable=True, autocast_adapter_dtype=False)
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])[:300]
        raise ModelError(
            f"The adapter to start from does not fit this base: {reason}", place=str(start), remedy="Use the base that it was trained on."
        ) from error
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(model.dtype)
    return tuned


def _task(model: PreTrainedModel) -> dict[str, Any]:
    """PEFT's name of the task; the head of a classifier is trained and saved whole."""
    if heads := [name.rpartition(".")[2] for name in task_head(model)]:
        inside = rf"(?:.*\.)?(?:{'|'.join(heads)})(?:\..*)?"
        return {"task_type": "SEQ_CLS", "modules_to_save": heads, "exclude_modules": inside}
    if model.get_output_embeddings() is None:
        return {"task_type": "FEATURE_EXTRACTION"}
    # PEFT has no name for masked language modelling.
    return {"task_type": "CAUSAL_LM" if model.can_generate() else None}


def check_targets(model: PreTrainedModel, config: MethodConfig) -> None:
    """Raise ConfigError where `target_modules`, a pattern or a rank does not fit the model's layers."""
    # PEFT takes a list as soon as one of its names matches, and would also adapt the head, which the engine runs by itself.
    head = model.get_output_embeddings()
    kinds = (torch.nn.Linear, Conv1D)
    heads = {head, *(layer for module in task_head(model).values() for layer in module.modules())}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds) and layer not in heads}
    wanted = config.target_modules
    unknown = [] if wanted == "all-linear" else [name for name in wanted if not any(f".{layer}".endswith(f".{name}") for layer in layers)]
    if unknown or not wanted:
        raise ConfigError(
            f"method.target_modules {unknown or wanted!r} matches no layer", place="method.target_modules",
            remedy=f"Layers here: {', '.join(sorted({name.rpartition('.')[2] for name in layers}))}.",
        )  # fmt: skip
    adapted = []
    for name, layer in layers.items():
        if is_target(config, name):
            sizes = layer.weight.shape if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
            rank = config.rank_pattern.get(matching(config.rank_pattern, name) or "", config.lora_r)
            adapted.append(Adapted(name, Linear(name, *sizes), rank))
    check_lora(config, adapted)


@torch.no_grad()
def _start_at_main_part(tuned: PeftModel, settings: LoraConfig) -> None:
    """Set A and B to the main part of each matrix, and add the frozen update that takes it off again."""
    # PEFT lets biases belong to one adapter alone.
    tuned.add_adapter(START, replace(settings, bias="none"), autocast_adapter_dtype=False)
    for layer in tuned.modules():
        if not isinstance(layer, PeftLinear):
            continue
        weight = layer.base_layer.weight
        lora_a, lora_b = main_part(weight.T if isinstance(layer.base_layer, Conv1D) else weight, layer.r[TRAINED], layer.scaling[TRAINED])
        for name, sign in ((TRAINED, 1), (START, -1)):
            layer.lora_A[name].weight.copy_(lora_a)
            layer.lora_B[name].weight.copy_(sign * lora_b)
    tuned.base_model.set_adapter([TRAINED, START])
    for name, parameter in tuned.named_parameters():
        if f".{START}." in name:
            parameter.requires_grad_(False)


def main_part(weight: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in) and B (out, rank) in fp32 such that scale · B A are the `rank` largest singular values of W (out, in), each side
    with the root of them (Meng et al. 2024, 2404.02948, equations 2 and 3)."""
    # Twice as many directions are followed as are kept, which costs little and makes those exact that are.
    u, s, v = torch.svd_lowrank(weight.float(), q=min(2 * rank, *weight.shape), niter=SVD_ITERATIONS)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * v[:, :rank].T, u[:, :rank] * root


def _save_difference(tuned: PeftModel, folder: Path) -> None:
    """Both updates as one of twice the rank and the same scale, in PEFT's format."""
    trained, start = (get_peft_model_state_dict(tuned, adapter_name=name, save_embedding_layers=False) for name in (TRAINED, START))
    joined = {
        name: (torch.cat([tensor, start[name]], dim=0 if "lora_A" in name else 1) if name in start else tensor).contiguous().cpu()
        for name, tensor in trained.items()
    }
    config = LoraConfig(**_doubled(tuned.peft_config[TRAINED].to_dict()))
    config.inference_mode = True
    config.save_pretrained(folder)
    save_file(joined, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _doubled(settings: Mapping) -> dict:
    """An adapter's settings at twice the rank and the same scale alpha / r (or alpha / sqrt(r))."""
    growth = 2**0.5 if settings["use_rslora"] else 2
    ranks = {key: 2 * rank for key, rank in settings["rank_pattern"].items()}
    alphas = {key: growth * alpha for key, alpha in settings["alpha_pattern"].items()}
    return {
        **settings, "r": 2 * settings["r"], "lora_alpha": growth * settings["lora_alpha"], "rank_pattern": ranks, "alpha_pattern": alphas,
    }  # fmt: skip


def merge(tuned: PeftModel) -> PreTrainedModel:
    """Fold the update into the weights, in fp32 so that the merge rounds once. The adapter layers are gone afterwards."""
    return tuned.to(torch.float32).merge_and_unload(safe_merge=True)
