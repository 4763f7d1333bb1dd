"""What a finished training run left on disk, loaded as a model again: a whole model, a base in 4 bits with its adapter, or a base
with some of its tensors replaced.

The last is the format "partial": a safetensors file with what moved, by the names of the plain model, and a JSON file that says
which method moved it and over which base. What moved are whole tensors, single entries of them (their places and their new values,
not the differences: a sum would be rounded once more), or those of bottleneck adapters, which are put in first.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from giong.config import MethodConfig, ModelConfig
from giong.errors import ModelError
from giong.models.bottleneck import insert
from giong.models.load import LoadedModel, load_model
from giong.models.nf4 import pack_matrices
from giong.models.saving import system_errors
from giong.workspace import read_json, write_json

PARTIAL_TENSORS, PARTIAL_CONFIG = "partial_model.safetensors", "partial_config.json"
INDICES, VALUES = ".indices", ".values"


def save_partial(folder: Path, tensors: Mapping[str, torch.Tensor], *, method: str, base_name: str, **settings: Any) -> None:
    """Write the two files of the format "partial" to `folder`, which is made where it is missing; `settings` are those of the method
    that loading needs."""
    folder.mkdir(parents=True, exist_ok=True)
    with system_errors():
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, folder / PARTIAL_TENSORS)
    # The base has the key that PEFT gives it.
    write_json(folder / PARTIAL_CONFIG, {"method": method, "base_model_name_or_path": base_name, **settings})


def save_entries(
    folder: Path, tensors: Mapping[str, torch.Tensor], indices: Mapping[str, torch.Tensor], whole: Mapping[str, torch.Tensor],
    *, method: str, base_name: str,
) -> None:  # fmt: skip
    """Write what `tensors` hold at the flat `indices`, and `whole` tensors, in the format "partial", with the shapes of the first, by
    which a base is recognised."""
    entries = dict(whole)
    entries |= {f"{name}{INDICES}": indices[name] for name in tensors}
    entries |= {f"{name}{VALUES}": tensor.detach().view(-1)[indices[name]] for name, tensor in tensors.items()}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    save_partial(folder, entries, method=method, base_name=base_name, shapes=shapes)


def put_entries(tensor: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
    """Replace the entries of a contiguous tensor at flat `indices`, rounding to its dtype, unseen by autograd.

    The graph of a forward pass stays valid, because what is written between it and its backward pass is what was there.
    """
    tensor.data.view(-1)[indices] = values.detach().to(tensor)


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
    settings = read_json(artifact / PARTIAL_CONFIG)
    if settings["method"] == "bottleneck":
        insert(model, MethodConfig(name="bottleneck", **{key: settings[key] for key in ("adapter_placement", "adapter_size")}))
        model.eval().requires_grad_(False)
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.endswith((INDICES, VALUES))}
    shapes |= {name: tuple(shape) for name, shape in settings.get("shapes", {}).items()}
    for name, shape in shapes.items():
        if name not in parameters or parameters[name].shape != shape:
            here = f"shape {tuple(parameters[name].shape)}" if name in parameters else "no such tensor"
            raise ModelError(
                f"The trained tensors do not fit this base: {name} has shape {shape}, and the base has {here}",
                place=str(artifact), remedy="Use the base that they were trained on.",
            )  # fmt: skip
        if name in tensors:
            parameters[name].copy_(tensors[name])
        else:
            put_entries(parameters[name], tensors[f"{name}{INDICES}"], tensors[f"{name}{VALUES}"])
