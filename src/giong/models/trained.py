"""What a finished training run left on disk, loaded as a model again: a whole model, a base in 4 bits with its adapter, or a base
with some of its tensors replaced.

The last is the format "partial": a safetensors file with the tensors that moved, by their names in the plain model, and a JSON
file that says which method moved them and over which base.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from giong.config import ModelConfig
from giong.errors import ModelError
from giong.models.load import LoadedModel, load_model
from giong.models.nf4 import pack_matrices
from giong.models.saving import system_errors
from giong.workspace import write_json

PARTIAL_TENSORS, PARTIAL_CONFIG = "partial_model.safetensors", "partial_config.json"


def save_partial(folder: Path, tensors: Mapping[str, torch.Tensor], *, method: str, base_name: str) -> None:
    """Write the two files of the format "partial" to `folder`, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    with system_errors():
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, folder / PARTIAL_TENSORS)
    # The base has the key that PEFT gives it.
    write_json(folder / PARTIAL_CONFIG, {"method": method, "base_model_name_or_path": base_name})


def load_trained(
    base: ModelConfig, artifact: Path, *, dtype: torch.dtype, device: str | None = None, kind: str | None = None
) -> LoadedModel:
    """The model of an artifact of format "weights", "partial" or "nf4_adapter" (`kind`, or the folder's name, says which).

    Raises ModelError."""
    kind = kind or artifact.name
    if kind == "weights":
        return load_model(base.model_copy(update={"name_or_path": str(artifact)}), dtype=dtype, device=device)
    loaded = load_model(base, dtype=dtype, device=device)
    if kind == "nf4_adapter":
        _put_packed(loaded.model, artifact)
    else:
        put_partial(loaded.model, artifact)
    return loaded


def _put_packed(model: PreTrainedModel, artifact: Path) -> None:
    """Pack the matrices and put the adapter beside them."""
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            "This model computes in 4 bits, and bitsandbytes is not installed", place=str(artifact), remedy="pip install 'giong[qlora]'."
        )
    pack_matrices(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            tuned = PeftModel.from_pretrained(model, artifact, autocast_adapter_dtype=False)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])[:300]
            raise ModelError(
                f"The adapter does not fit this base: {reason}", place=str(artifact), remedy="Use the base that it was trained on."
            ) from error
    for name, parameter in tuned.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(model.dtype)
    tuned.requires_grad_(False).eval()


@torch.no_grad()
def put_partial(model: torch.nn.Module, artifact: Path) -> None:
    """Replace tensors of the base by those of an artifact of format "partial". Raises ModelError where they do not fit."""
    if not (artifact / PARTIAL_TENSORS).is_file():
        raise ModelError(f"This model has no {PARTIAL_TENSORS}", place=str(artifact), remedy="Train it again.")
    try:
        tensors = load_file(artifact / PARTIAL_TENSORS)
    except SafetensorError as error:
        raise ModelError(
            f"The trained tensors cannot be read: {error}", place=str(artifact / PARTIAL_TENSORS), remedy="Train the model again."
        ) from error
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            here = f"shape {tuple(parameters[name].shape)}" if name in parameters else "no such tensor"
            raise ModelError(
                f"The trained tensors do not fit this base: {name} has shape {tuple(tensor.shape)}, and the base has {here}",
                place=str(artifact), remedy="Use the base that they were trained on.",
            )  # fmt: skip
        parameters[name].copy_(tensor)
