"""QLoRA: LoRA over matrices that are frozen in 4 bits (Dettmers et al. 2023, 2305.14314, equation 5).

The base is another one from then on, by what 4 bits lose: the tuned model starts as the packed base and not as the one on the disk.
So what is saved is PEFT's adapter in a folder of its own format, which is only ever loaded over the packed base.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from giong.config import MethodConfig
from giong.errors import ConfigError
from giong.methods import lora
from giong.methods.trainable import Trainable
from giong.models.load import shape_of
from giong.models.nf4 import pack_matrices, unpack_matrices
from giong.sizing.moving import check_method

FORMAT = "nf4_adapter"


def apply(model: PreTrainedModel, config: MethodConfig, *, seed: int = 0, base_name: str = "") -> Trainable:
    """Pack `model`'s matrices in place and put LoRA layers beside them; settings and errors are those of `lora`.

    Raises ConfigError where bitsandbytes is not installed, and for a model that does not write.
    """
    check_method(shape_of(model), config)
    if model.get_output_embeddings() is None:
        raise ConfigError(
            f"`qlora` is for models that write, and this one ({model.config.model_type}) has no output head for words",
            place="method.name", remedy="Set method.name to lora.",
        )  # fmt: skip
    lora.check_targets(model, config)
    pack_matrices(model)
    tuned = lora.apply(model, config, seed=seed, base_name=base_name)

    def save(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tuned.save(folder)

    def merge() -> PreTrainedModel:
        unpack_matrices(model)
        return tuned.merge()

    def detach() -> bool:
        tuned.detach()
        return False

    return replace(tuned, format=FORMAT, save=save, merge=merge, detach=detach)
