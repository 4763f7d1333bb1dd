"""Put what was trained into its base and save a plain model: an adapter is folded in in fp32, tensors of the model are replaced."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as PeftLinear
from transformers import PreTrainedModel

from giong.config import ModelConfig
from giong.methods.lora import merge
from giong.models.load import LoadedModel, load_model
from giong.models.nf4 import unpack_matrices
from giong.models.saving import system_errors
from giong.models.trained import load_trained


def merge_adapter(base: ModelConfig, adapter: Path, folder: Path) -> None:
    """Write the merged model and its tokenizer to `folder` (which exists)."""
    loaded = load_model(base, dtype=torch.float32, device="cpu")
    stored_dtype = getattr(loaded.model.config, "dtype", None) or torch.float32
    tuned = PeftModel.from_pretrained(loaded.model, adapter)
    merged = merge(tuned)
    merged.to(torch.float32)
    # fp32 on disk: rounding the sum to bf16 would be a second rounding that the evaluated model did not have.
    merged.config.dtype = stored_dtype if stored_dtype == torch.float32 else torch.float32
    _save(loaded, merged, folder)


def merge_partial(base: ModelConfig, artifact: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the base with the trained tensors in their places, in the dtype that was trained and evaluated: nothing is rounded."""
    loaded = load_trained(base, artifact, dtype=dtype, device="cpu")
    _save(loaded, loaded.model, folder)


def merge_packed(base: ModelConfig, artifact: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the base as 4 bits left it, unpacked, with the update folded in, in fp32: the model that was trained and evaluated."""
    loaded = load_trained(base, artifact, dtype=dtype, device="cpu", kind="nf4_adapter")
    unpack_matrices(loaded.model)
    model = loaded.model.to(torch.float32)
    for layer in [module for module in model.modules() if isinstance(module, PeftLinear)]:
        layer.merge(safe_merge=True)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, PeftLinear):
            model.set_submodule(name, layer.base_layer)
    model.config.dtype = torch.float32
    _save(loaded, model, folder)


def _save(loaded: LoadedModel, model: PreTrainedModel, folder: Path) -> None:
    loaded.chat.record_in(model)
    with system_errors():
        model.save_pretrained(folder, safe_serialization=True)
    loaded.tokenizer.save_pretrained(folder)
