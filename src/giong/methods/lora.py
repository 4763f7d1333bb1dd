"""LoRA: a trainable low-rank update B A beside each frozen linear layer (Hu et al. 2021, 2106.09685, equation 3).

PEFT's modules and file format: what is saved here loads in PEFT and vLLM and the other way round. The update starts as
zero (B = 0), so the tuned model starts as the base.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from giong.config import MethodConfig
from giong.errors import ConfigError
from giong.methods.trainable import Trainable
from giong.models.saving import system_errors

FORMAT = "adapter"


def apply(model: PreTrainedModel, config: MethodConfig, *, seed: int = 0, base_name: str = "") -> Trainable:
    """Put LoRA layers into `model`. The config's rank, alpha and dropout must be resolved (not None).

    Raises ConfigError naming the model's linear layers when a name in `target_modules` matches none of them.
    """
    assert config.lora_r is not None and config.lora_alpha is not None and config.lora_dropout is not None
    _check_targets(model, config)
    settings = LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=config.target_modules,
        bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # GPT-2 keeps its weights transposed; PEFT sets fan_in_fan_out itself and says so each time.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        # PEFT asks transformers in a way that transformers is about to drop; a user can do nothing about it.
        warnings.simplefilter("ignore", FutureWarning)
        tuned = get_peft_model(model, settings, autocast_adapter_dtype=False)
    if base_name:
        # PEFT puts the path of the loaded model here, which means nothing on another machine.
        tuned.peft_config["default"].base_model_name_or_path = base_name
    parameters = {name: parameter for name, parameter in tuned.named_parameters() if parameter.requires_grad}

    def save(folder: Path) -> None:
        with system_errors():
            tuned.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)

    def detach() -> bool:
        tuned.unload()
        model.requires_grad_(False)
        return True

    return Trainable(tuned.get_base_model(), parameters, FORMAT, save, lambda: merge(tuned), detach)


def _check_targets(model: PreTrainedModel, config: MethodConfig) -> None:
    # PEFT takes a list as soon as one of its names matches, and would also adapt the head, which the engine runs by itself.
    head = model.get_output_embeddings()
    kinds = (torch.nn.Linear, Conv1D)
    layers = [name for name, layer in model.named_modules() if isinstance(layer, kinds) and layer is not head]
    wanted = config.target_modules
    unknown = [] if wanted == "all-linear" else [name for name in wanted if not any(f".{layer}".endswith(f".{name}") for layer in layers)]
    if unknown or not wanted:
        raise ConfigError(
            f"method.target_modules {unknown or wanted!r} matches no layer", place="method.target_modules",
            remedy=f"Layers here: {', '.join(sorted({name.rpartition('.')[2] for name in layers}))}.",
        )  # fmt: skip


def merge(tuned: PeftModel) -> PreTrainedModel:
    """Fold the update into the weights, in fp32 so that the merge rounds once. The adapter layers are gone afterwards."""
    return tuned.to(torch.float32).merge_and_unload(safe_merge=True)
