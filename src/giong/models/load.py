"""Load a causal language model and its tokenizer: safetensors and JSON only, remote code off, offline where possible.

A folder is checked by hand (`models.folder`) before transformers sees it, so that what is missing is named in one sentence
instead of in the fallbacks of a library (which would go looking for it on the network).
"""

from __future__ import annotations

import contextlib
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import logging as transformers_logging

from giong.config import ModelConfig
from giong.contracts import ModelShape
from giong.errors import ConfigError, ModelError, ResourceError
from giong.models.chat_template import ChatFormat
from giong.models.devices import device_name, free_memory_bytes, resolve_device
from giong.models.folder import check_model, resolve
from giong.models.parts import (
    biases,
    decoder_layers,
    final_norm,
    first_position,
    head_of,
    matrices,
    matrix_widths,
    norms,
    num_parameters_of,
    task_head,
)
from giong.sizing.shapes import shape_from_config
from giong.sizing.units import format_bytes
from giong.workspace import content_hash

DEFAULT_MAX_SEQ_LENGTH = 2048
HUB_TIMEOUT_SECONDS = 4.0


@dataclass
class LoadedModel:
    """A base model ready for use. `notices` are sentences that the user should see."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat
    shape: ModelShape
    name_or_path: str
    max_seq_length: int
    notices: list[str] = field(default_factory=list)


def model_identity(config: ModelConfig) -> str:
    """Hash of what the name stands for: config and weights of a folder (a few KiB of each tensor), the name itself for a hub model."""
    folder = Path(resolve(config.name_or_path)).expanduser()
    template = Path(config.chat_template).expanduser() if config.chat_template else None
    if not folder.is_dir():
        # Where it computes is no part of what it is.
        return content_hash(config.model_dump(exclude={"device"}), *([template] if template else []))
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".jinja"))
    weights = [(path.name, path.stat().st_size, _samples(path)) for path in sorted(folder.glob("*.safetensors"))]
    return content_hash(*files, weights, config.dtype, config.max_seq_length, template)


SAMPLE_BYTES = 4096
MAX_HEADER_BYTES = 10**8
"""safetensors' own limit."""


def _samples(path: Path) -> str:
    """Gigabytes need not be read to notice other weights: of each tensor both ends and the middle differ."""
    with path.open("rb") as stream:
        length = stream.read(8)
        header = stream.read(min(int.from_bytes(length, "little"), MAX_HEADER_BYTES))
        parts = [length, header]
        # What is no such file is refused when it is read.
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            for start, end in sorted(tensor["data_offsets"] for name, tensor in json.loads(header).items() if name != "__metadata__"):
                for place in (start, (start + end - SAMPLE_BYTES) // 2, end - SAMPLE_BYTES):
                    stream.seek(8 + len(header) + max(start, place, 0))
                    parts.append(stream.read(max(0, min(SAMPLE_BYTES, end - start))))
        return content_hash(*parts)


def read_model(
    config: ModelConfig, dtype: torch.dtype, kind: Any = AutoModelForCausalLM, **settings: Any
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and model of one of transformers' auto classes, as they lie on the disk. `settings` go into the model's config.

    Raises ModelError for what cannot be loaded. Tensors may be missing in the head of a task alone: it is drawn anew.
    """
    folder = check_model(config)
    read = partial(_from_files, kind=kind, settings=settings, dtype=dtype)
    try:
        tokenizer, model, info = read(str(folder), only_local=True) if folder else _from_hub(config.name_or_path, read)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"The model could not be loaded: {first_line}", place=config.name_or_path,
            remedy="Check the name, the network and that the model needs no remote code; a local folder always works.",
        ) from error  # fmt: skip
    drawn = tuple(f"{name}." for name in task_head(model))
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith(drawn or "\0")):
        raise ModelError(
            f"The weights are incomplete: {len(missing)} tensors are missing, the first is {missing[0]}",
            place=config.name_or_path, remedy="Fetch the model again.",
        )  # fmt: skip
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > num_embeddings:
        raise ModelError(
            f"The tokenizer has {len(tokenizer)} tokens and the model {num_embeddings}", place=config.name_or_path,
            remedy="Use the tokenizer that belongs to the model.",
        )  # fmt: skip
    if not tokenizer.is_fast:
        raise ModelError("This model has only a slow tokenizer", place=config.name_or_path, remedy="Use a version with tokenizer.json.")
    if getattr(model.config, "attn_logit_softcapping", None):
        # Torch's own attention has no soft cap and would leave it out.
        model.set_attn_implementation("eager")
    return tokenizer, model


def _from_files(
    source: str, *, kind: Any, settings: dict[str, Any], dtype: torch.dtype, only_local: bool
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, dict]:
    local = {"local_files_only": only_local}
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **local)
    model, info = kind.from_pretrained(
        source, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **local,
        # The search for an adapter beside the weights takes no notice of the setting above.
        adapter_kwargs=local, **settings,
    )  # fmt: skip
    return tokenizer, model, info


def _from_hub(name: str, read: Callable) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, dict]:
    # What was fetched before is used as it is, without the network: a run must not change because the hub did.
    try:
        return read(name, only_local=True)
    except OSError:
        if constants.HF_HUB_OFFLINE:
            raise
    # The hub's own client tries for most of a minute before it says that there is no network.
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass
    except OSError as error:
        if not isinstance(getattr(error, "reason", None), ssl.SSLError):
            raise OSError(f"{constants.ENDPOINT} does not answer ({getattr(error, 'reason', error)})") from error
    return read(name, only_local=False)


def chat_format(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> ChatFormat:
    """The chat template of the settings, else the tokenizer's, else a plain one. Raises ConfigError for a path that is not there."""
    if not config.chat_template:
        return ChatFormat(tokenizer, model)
    path = Path(config.chat_template).expanduser()
    if not path.is_file():
        raise ConfigError("There is no chat template at this path", place=str(path), remedy="Correct `model.chat_template`.")
    return ChatFormat(tokenizer, model, path.read_text(encoding="utf-8"))


def load_model(config: ModelConfig, *, dtype: torch.dtype = torch.float32, device: str | torch.device | None = None) -> LoadedModel:
    """Load model and tokenizer in `dtype`, for evaluation (no dropout), on `device` (by default what `model.device` says).

    Raises ModelError for a path that does not exist, lacks a tokenizer or has only pickle weights, for weights that are
    incomplete and for models that need remote code; ConfigError for a device that is not there; ResourceError where the
    device has no room. A missing chat template is replaced by a plain one, and a notice says so.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # Before the weights are read: a wrong setting is found at once.
    target = resolve_device(config.device) if device is None else torch.device(device)
    tokenizer, model = read_model(config, dtype)
    place(model, target, config.name_or_path)
    chat = chat_format(config, tokenizer, model)
    max_seq_length, notices = longest_row(config, model)
    if chat.is_default:
        notices.append(f"{config.name_or_path} brings no chat template; giong's plain one is used (set model.chat_template to change it).")
    try:
        shape = shape_from_config(model.config.to_dict())
    except ModelError:
        shape = _counted_shape(model)
        notices.append(f"The {model.config.model_type} family has no exact size formula here; its parameters were counted instead.")
    return LoadedModel(model, tokenizer, chat, shape, config.name_or_path, max_seq_length, notices)


def longest_row(config: ModelConfig, model: PreTrainedModel) -> tuple[int, list[str]]:
    """The longest row in tokens, and a notice where the model holds less than was asked for."""
    allowed = int(getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", DEFAULT_MAX_SEQ_LENGTH))
    allowed -= first_position(model)
    wanted = config.max_seq_length
    notice = f"{config.name_or_path} holds {allowed} tokens at most, so max_seq_length is {allowed} and not {wanted}."
    return min(wanted or DEFAULT_MAX_SEQ_LENGTH, allowed), [notice] if wanted and wanted > allowed else []


def place(model: PreTrainedModel, device: torch.device, name: str) -> None:
    """Put the model on the device, frozen and without dropout. Raises ResourceError where it does not fit."""
    try:
        model.to(device)
    except torch.OutOfMemoryError as error:
        needed_bytes, free_bytes = model.get_memory_footprint(), free_memory_bytes(device)
        free = "" if free_bytes is None else f", {format_bytes(free_bytes)} are free"
        raise ResourceError(
            f"The weights ({format_bytes(needed_bytes)}) do not fit on {device_name(device)}{free}", place=name,
            remedy="Set model.dtype to bfloat16, take a smaller model, free the GPU, or set model.device to cpu.",
        ) from error  # fmt: skip
    model.eval()
    model.requires_grad_(False)


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The shape by the formulas of its family, which are exact; counted on the model where there are none."""
    try:
        return shape_from_config(model.config.to_dict())
    except ModelError:
        return _counted_shape(model)


def _counted_shape(model: PreTrainedModel) -> ModelShape:
    config, layers = model.config, decoder_layers(model)
    heads = int(getattr(config, "num_attention_heads", 1))
    width = int(config.hidden_size)
    return ModelShape(
        model_type=config.model_type, hidden_size=width, intermediate_size=int(getattr(config, "intermediate_size", 4 * width)),
        num_hidden_layers=int(config.num_hidden_layers), num_attention_heads=heads,
        num_key_value_heads=int(getattr(config, "num_key_value_heads", None) or heads), head_dim=int(getattr(config, "head_dim", None) or width // heads),
        vocab_size=int(config.vocab_size), max_position_embeddings=int(getattr(config, "max_position_embeddings", DEFAULT_MAX_SEQ_LENGTH)),
        tie_word_embeddings=bool(config.tie_word_embeddings), num_parameters=num_parameters_of([model]),
        num_layer_parameters=num_parameters_of(layers[-1:]), num_head_parameters=num_parameters_of(head_of(model)),
        num_final_norm_parameters=num_parameters_of(final_norm(model)), num_norm_parameters=num_parameters_of(norms(model)),
        num_bias_parameters=sum(bias.numel() for bias in biases(model)),
        linears=tuple((name, *matrix_widths(layer)) for name, layer in matrices(layers[-1]).items()) if layers else (),
        biased_linears=tuple(name for name, layer in matrices(layers[-1]).items() if layer.bias is not None) if layers else (),
    )  # fmt: skip
