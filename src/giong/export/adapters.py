"""Several LoRA adapters added into one, each with a weight (PEFT's `add_weighted_adapter`)."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel

from giong.config import ModelConfig
from giong.errors import ModelError
from giong.models.load import load_model
from giong.models.saving import system_errors

SUM = "sum"


def add_adapters(
    base: ModelConfig, folders: Sequence[Path], weights: Sequence[float], target: Path, *, combination: str, rank: int | None
) -> None:
    """Write the adapter whose update is the sum of `weights` times the updates to `target` (which exists).

    In fp32: the sum is exact with `cat`. Raises ModelError for what is no sum of low-rank updates (soft prompts, DoRA, trained biases).
    """
    for folder in folders:
        _check(PeftConfig.from_pretrained(folder), folder)
    model = load_model(base, dtype=torch.float32, device="cpu").model
    names = [f"adapter{number}" for number in range(len(folders))]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.simplefilter("ignore", FutureWarning)
        tuned = PeftModel.from_pretrained(model, folders[0], adapter_name=names[0])
        for name, folder in zip(names[1:], folders[1:]):
            tuned.load_adapter(folder, adapter_name=name)
        # The scales of the parts are in their layers by now. PEFT gives the sum alpha = r, which is a scale of one without rsLoRA alone.
        tuned.peft_config[names[0]].use_rslora = False
        tuned.add_weighted_adapter(names, list(weights), SUM, combination_type=combination, svd_rank=rank)
    tuned.peft_config[SUM].inference_mode = True
    with system_errors():
        tuned.save_pretrained(target, selected_adapters=[SUM], safe_serialization=True, save_embedding_layers=False)
    for path in (target / SUM).iterdir():
        path.replace(target / path.name)
    shutil.rmtree(target / SUM)
    (target / "README.md").unlink(missing_ok=True)


def _check(config: PeftConfig, folder: Path) -> None:
    what = (
        f"a {config.peft_type.value.lower().replace('_', ' ')} adapter" if not isinstance(config, LoraConfig)
        else "a DoRA adapter" if config.use_dora
        else "an adapter with biases" if config.bias != "none"
        else ""
    )  # fmt: skip
    if what:
        raise ModelError(f"This is {what}, which is no sum of low-rank updates", place=str(folder), remedy="Add adapters of plain LoRA.")
