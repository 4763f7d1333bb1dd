"""Fold an adapter into its base and save a plain model, in fp32 arithmetic and the base's own dtype on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel

from giong.config import ModelConfig
from giong.methods.lora import merge
from giong.models.load import load_model
from giong.models.saving import system_errors


def merge_adapter(base: ModelConfig, adapter: Path, folder: Path) -> None:
    """Write the merged model and its tokenizer to `folder` (which exists)."""
    loaded = load_model(base, dtype=torch.float32, device="cpu")
    stored_dtype = getattr(loaded.model.config, "dtype", None) or torch.float32
    tuned = PeftModel.from_pretrained(loaded.model, adapter)
    merged = merge(tuned)
    merged.to(torch.float32)
    # fp32 on disk: rounding the sum to bf16 would be a second rounding that the evaluated model did not have.
    merged.config.dtype = stored_dtype if stored_dtype == torch.float32 else torch.float32
    with system_errors():
        merged.save_pretrained(folder, safe_serialization=True)
    loaded.tokenizer.chat_template = loaded.chat.template
    loaded.tokenizer.save_pretrained(folder)
