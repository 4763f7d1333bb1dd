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

from giong.config import MethodConfig
from giong.errors import ConfigError
from giong.methods.trainable import Trainable


def apply(model: PreTrainedModel, config: MethodConfig, *, seed: int = 0, base_name: str = "") -> Trainable:
    """Put LoRA layers into `model`. The config's rank, alpha and dropout must be resolved (not None).

    Raises ConfigError naming the model's linear layers when `target_modules` matches none.
    """
    assert config.lora_r is not None and config.lora_alpha is not None and config.lora_dropout is not None
    settings = LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=config.target_modules,
        bias="none", task_type="CAUSAL_LM", base_model_name_or_path=base_name or None,
    )  # fmt: skip
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            # GPT-2 keeps its weights transposed; PEFT sets fan_in_fan_out itself and says so each time.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            tuned = get_peft_model(model, settings, autocast_adapter_dtype=False)
    except ValueError as error:
        linear = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)})
        raise ConfigError(
            f"method.target_modules {config.target_modules!r} matches no layer", place="method.target_modules", remedy=f"Layers here: {', '.join(linear)}."
        ) from error
    parameters = {name: parameter for name, parameter in tuned.named_parameters() if parameter.requires_grad}

    def save(folder: Path) -> None:
        tuned.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)

    def detach() -> bool:
        tuned.unload()
        model.requires_grad_(False)
        return True

    return Trainable(tuned.get_base_model(), parameters, "adapter", save, lambda: merge(tuned), detach)


def merge(tuned: PeftModel) -> PreTrainedModel:
    """Fold the update into the weights, in fp32 so that the merge rounds once. The adapter layers are gone afterwards."""
    return tuned.to(torch.float32).merge_and_unload(safe_merge=True)
