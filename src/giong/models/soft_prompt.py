"""Virtual tokens before every row: trained embeddings (prompt tuning) or trained keys and values of every layer (prefix tuning).

They stand at positions 0 to V - 1, a row's own tokens after them. While a model has a soft prompt, it is the model's submodule
`soft_prompt`, which the engine's forward pass and the decoder look for; the model's own `forward` knows nothing of it.

One decision a reader may question: PEFT's file format, and not its module. PEFT puts the prompt before a padded batch by wrapping the
model; rows that are packed end to end need it before each of them, and it has to live beside LoRA adapters of the same base.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftConfig, PrefixTuningConfig, PromptTuningConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from giong.errors import ModelError
from giong.models.load import LoadedModel, shape_of
from giong.models.saving import system_errors

CONFIGS = {"PROMPT_TUNING": PromptTuningConfig, "PREFIX_TUNING": PrefixTuningConfig}
"""The kinds of soft prompt, by PEFT's `peft_type`."""

TENSOR = "prompt_embeddings"
"""PEFT's name of the one tensor that is saved."""


class SoftPrompt(torch.nn.Module):
    """`prompt_embeddings` is (V, D) for prompt tuning; for prefix tuning (V, 2 · layers · key-value heads · head_dim), as PEFT saves it."""

    def __init__(self, kind: str, prompt_embeddings: torch.Tensor, num_key_value_heads: int, head_dim: int) -> None:
        super().__init__()
        self.kind = kind
        self.prompt_embeddings = torch.nn.Parameter(prompt_embeddings)
        self._heads = (num_key_value_heads, head_dim)

    @property
    def num_virtual_tokens(self) -> int:
        return len(self.prompt_embeddings)

    @property
    def is_prefix(self) -> bool:
        return self.kind == "PREFIX_TUNING"

    def keys_and_values(self) -> torch.Tensor:
        """(layers, 2, key-value heads, V, head_dim) of a prefix: each layer's keys, then its values."""
        states = self.prompt_embeddings.view(self.num_virtual_tokens, -1, 2, *self._heads)
        return states.permute(1, 2, 3, 0, 4)


def make_soft_prompt(model: PreTrainedModel, kind: str, prompt_embeddings: torch.Tensor) -> SoftPrompt:
    """A soft prompt for `model`, in its dtype and on its device. Raises ModelError for a width that is not the model's."""
    shape = shape_of(model)
    states = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    width = states if kind == "PREFIX_TUNING" else model.get_input_embeddings().weight.shape[1]
    if prompt_embeddings.ndim != 2 or prompt_embeddings.shape[1] != width:
        raise ModelError(
            f"The soft prompt does not fit this base: its shape is {tuple(prompt_embeddings.shape)}, and the base takes (tokens, {width})",
            remedy="Use the base that it was trained on.",
        )  # fmt: skip
    tensor = prompt_embeddings.detach().to(model.device, model.dtype, copy=True)
    return SoftPrompt(kind, tensor, shape.num_key_value_heads, shape.head_dim)


def soft_prompt_of(model: PreTrainedModel) -> SoftPrompt | None:
    """The soft prompt that the model has at present."""
    return getattr(model, "soft_prompt", None)


def put(model: PreTrainedModel, prompt: SoftPrompt | None) -> None:
    """Give the model a soft prompt, or None, in the place of the one it has."""
    if soft_prompt_of(model) is not None:
        del model.soft_prompt
    if prompt is not None:
        model.soft_prompt = prompt


@contextlib.contextmanager
def with_soft_prompt(model: PreTrainedModel, prompt: SoftPrompt | None) -> Iterator[None]:
    """Within this block the model has that soft prompt, or none."""
    before = soft_prompt_of(model)
    put(model, prompt)
    try:
        yield
    finally:
        put(model, before)


def room_for_text(loaded: LoadedModel, prompt: SoftPrompt | None) -> int:
    """Tokens of a row's own: virtual ones take positions too."""
    if prompt is None:
        return loaded.max_seq_length
    return min(loaded.max_seq_length, loaded.shape.max_position_embeddings - prompt.num_virtual_tokens)


def save_soft_prompt(folder: Path, prompt: SoftPrompt, model: PreTrainedModel, base_name: str) -> None:
    """Write PEFT's two files to `folder`, which is made where it is missing."""
    shape = shape_of(model)
    heads = shape.num_key_value_heads if prompt.is_prefix else shape.num_attention_heads
    config = CONFIGS[prompt.kind](
        task_type="CAUSAL_LM", num_virtual_tokens=prompt.num_virtual_tokens, num_layers=shape.num_hidden_layers, num_attention_heads=heads,
        token_dim=heads * shape.head_dim if prompt.is_prefix else prompt.prompt_embeddings.shape[1], num_transformer_submodules=1,
        base_model_name_or_path=base_name, inference_mode=True,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with system_errors():
        save_file({TENSOR: prompt.prompt_embeddings.detach().cpu()}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def load_soft_prompt(model: PreTrainedModel, config: PeftConfig, folder: Path) -> SoftPrompt:
    """The soft prompt in a PEFT folder. Raises ModelError where it cannot be read or does not fit."""
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except SafetensorError as error:
        raise ModelError(f"The soft prompt cannot be read: {error}", place=str(folder), remedy="Save it again.") from error
    if TENSOR not in tensors:
        raise ModelError(f"The soft prompt has no tensor {TENSOR}", place=str(folder), remedy="Save it again with PEFT.")
    try:
        return make_soft_prompt(model, str(config.peft_type.value), tensors[TENSOR]).requires_grad_(False)
    except ModelError as error:
        raise ModelError(error.message, place=str(folder), remedy=error.remedy) from None
