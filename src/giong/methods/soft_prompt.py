"""What prompt tuning and prefix tuning share: where the virtual tokens start, how they are put in and taken out, that they never merge."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import torch
from transformers import AutoTokenizer, PreTrainedModel

from giong.config import MethodConfig
from giong.errors import ConfigError, StoryError
from giong.methods.trainable import Trainable
from giong.models.load import shape_of
from giong.models.soft_prompt import make_soft_prompt, put, save_soft_prompt
from giong.sizing.moving import check_method


def initial_tokens(model: PreTrainedModel, config: MethodConfig, seed: int) -> torch.Tensor:
    """Ids (V) of the tokens that the virtual ones start as: those of the text, again and again, or some of the vocabulary.

    Raises ConfigError for a text of more tokens: what is cut off would be lost silently.
    """
    count, text = config.num_virtual_tokens, config.prompt_tuning_init_text
    if text is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, model.get_input_embeddings().weight.shape[0], (count,), generator=generator)
    ids = AutoTokenizer.from_pretrained(model.name_or_path)(text, add_special_tokens=False)["input_ids"]
    if not ids or len(ids) > count:
        raise ConfigError(
            f"The text has {len(ids)} tokens, and there are {count} virtual ones", place="method.prompt_tuning_init_text",
            remedy=f"Set method.num_virtual_tokens to {len(ids)}, or shorten the text." if ids else "Leave it out, or write a text.",
        )  # fmt: skip
    return torch.tensor(ids * -(-count // len(ids)))[:count]


def apply_soft_prompt(model: PreTrainedModel, config: MethodConfig, kind: str, start: torch.Tensor, base_name: str) -> Trainable:
    """Freeze `model` and give it a soft prompt of that kind, which starts at the tensor `start`."""
    model.requires_grad_(False)
    prompt = make_soft_prompt(model, kind, start)
    put(model, prompt)

    def detach() -> bool:
        put(model, None)
        return True

    def merge() -> NoReturn:
        raise StoryError(f"A soft prompt ({config.name}) is no part of any weight and cannot be merged", remedy="Export it as `adapter`.")

    def save(folder: Path) -> None:
        save_soft_prompt(folder, prompt, model, base_name)

    return Trainable(model, {"soft_prompt.prompt_embeddings": prompt.prompt_embeddings}, "adapter", save, merge, detach)


def checked_tokens(model: PreTrainedModel, config: MethodConfig, seed: int) -> torch.Tensor:
    """`initial_tokens` on the model's device. Raises ConfigError where the model has no room for so many, and for one that does not write."""
    if model.get_output_embeddings() is None:
        raise ConfigError(
            f"`{config.name}` is for models that write, and this one ({model.config.model_type}) has no output head for words",
            place="method.name", remedy="Set method.name to lora.",
        )  # fmt: skip
    check_method(shape_of(model), config)
    return initial_tokens(model, config, seed).to(model.device)
