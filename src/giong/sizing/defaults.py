"""Settings that follow from the model and the data, each with the reason that is printed beside it.

Arithmetic only; a value that the user set is never changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from giong.config import MethodConfig, TrainConfig
from giong.contracts import ModelShape
from giong.sizing.moving import SOFT_PROMPTS
from giong.sizing.shapes import DEFAULT_ADAPTER_SHARE, LOW_RANK, adapter_size_of, linear_layers


@dataclass(frozen=True, slots=True)
class ResolvedTraining:
    """Method and training settings with no default left open, and one sentence per value that was chosen."""

    method: MethodConfig
    train: TrainConfig
    reasons: dict[str, str]


def lora_learning_rate(num_parameters: int) -> float:
    """2e-4 at 1B parameters (Biderman et al. 2024, 2405.09673), falling with the cube root of size, within [1e-4, 3e-4].

    The upper end is measured: at 8e-4 the bundled 14M base closed the style gap and lost meaning and general text.
    """
    return round(min(3e-4, max(1e-4, 2e-4 * (1e9 / num_parameters) ** (1 / 3))), 6)


FEW_NUMBERS_FACTOR = 10 / 3
"""Rate of biases and gains over LoRA's: 1e-3 for small models. Not measured here; BitFit's authors train with rates far above those of
full fine-tuning too (Ben Zaken et al. 2021, 2106.10199, appendix)."""


SOFT_PROMPT_FACTOR = 100
"""Rate of virtual tokens over LoRA's: 3e-2 for small models. Measured on the bundled base (24 steps of four rows of the sample author, nats
per token on four held-out rows, 4.74 at the start): `prompt_tuning` 3.99 at 3e-3, 3.91 at 1e-2, 3.89 at 3e-2; `prefix_tuning` 4.46 at
3e-3, 3.95 at 3e-2, 3.90 at 1e-1. Papers train them with 1e-3 to 0.3 (Lester et al. 2021, 2104.08691, appendix A)."""


COMPARED_FACTOR = 0.1
"""Rate where answers are compared, over that of learning them. At a third of LoRA's rate DPO on 204 pairs (the sample author's passages
against their neutral rewrites, bundled base) had a loss of 0.17 after four steps, and then went on until the two answers of held-out pairs
lay 143 nats further apart than in the reference."""


def few_numbers_learning_rate(num_parameters: int) -> float:
    """For `bias` and `norm`: 1e-3 for small models, falling with size as LoRA's does, to a third of that."""
    return round(FEW_NUMBERS_FACTOR * lora_learning_rate(num_parameters), 6)


def _alpha(method: MethodConfig, rank: int) -> tuple[float, str]:
    """A scale of 2, of 1 with PiSSA (Meng et al. 2024, 2404.02948, section 5), with the reason."""
    scale, words = (1, "") if method.init_lora_weights == "pissa" else (2, "twice ")
    if method.use_rslora:
        return round(scale * math.sqrt(rank), 2), f"{words}the root of the rank"
    return scale * rank, f"{words}the rank"


def _dropout(method: MethodConfig, num_rows: int) -> tuple[float, str]:
    if method.init_lora_weights == "pissa":
        return 0.0, "PiSSA's update holds the main part of each matrix"
    if method.use_dora:
        return 0.0, "with dropout DoRA would drop the inputs of the frozen matrices too"
    return (0.05 if num_rows < 500 else 0.0), f"{num_rows} rows"


def resolve_training(
    method: MethodConfig, train: TrainConfig, shape: ModelShape, num_rows: int, *, learns_from: str = "examples"
) -> ResolvedTraining:
    """Fill in rank, alpha, dropout, learning rate and epochs; `learns_from` is the objective's."""
    reasons: dict[str, str] = {}
    chosen: dict[str, float] = {}

    def choose(name: str, given: float | None, value: float, reason: str) -> float:
        if given is not None:
            return given
        if name == "learning_rate" and learns_from != "examples":
            value, reason = round(COMPARED_FACTOR * value, 8), f"{reason}; {COMPARED_FACTOR:g} times that for answers that are compared"
        chosen[name] = value
        reasons[name] = f"{name} {value:g}: {reason}"
        return value

    size = f"{shape.num_parameters / 1e6:.0f}M parameters"
    if method.name in LOW_RANK:
        few, smallest = num_rows < 100, min(min(linear.in_features, linear.out_features) for linear in linear_layers(shape))
        rank = min(8 if few else 16, smallest)
        rank = int(choose("lora_r", method.lora_r, rank, f"{num_rows} rows; rank is not what limits so little text"))
        alpha = choose("lora_alpha", method.lora_alpha, *_alpha(method, rank))
        dropout = choose("lora_dropout", method.lora_dropout, *_dropout(method, num_rows))
        method = method.model_copy(update={"lora_r": rank, "lora_alpha": float(alpha), "lora_dropout": float(dropout)})
        rate = choose("learning_rate", train.learning_rate, lora_learning_rate(shape.num_parameters), f"LoRA on {size}")
    elif method.name in SOFT_PROMPTS:
        reason = f"`{method.name}` on {size}: {SOFT_PROMPT_FACTOR:g} times LoRA's, because virtual tokens have far to go"
        rate = choose("learning_rate", train.learning_rate, round(SOFT_PROMPT_FACTOR * lora_learning_rate(shape.num_parameters), 6), reason)
    elif method.name in ("bias", "norm"):
        reason = f"`{method.name}` on {size}: {FEW_NUMBERS_FACTOR:.3g} times LoRA's, because each of so few numbers has to move further"
        rate = choose("learning_rate", train.learning_rate, few_numbers_learning_rate(shape.num_parameters), reason)
    elif method.name == "bottleneck":
        share = method.adapter_share or DEFAULT_ADAPTER_SHARE
        width = choose("adapter_size", method.adapter_size, adapter_size_of(shape, method), f"all adapters within {share:.3g} of {size}")
        method = method.model_copy(update={"adapter_size": int(width), "adapter_share": None})
        rate = choose(
            "learning_rate", train.learning_rate, lora_learning_rate(shape.num_parameters), f"bottleneck adapters on {size}: as LoRA's"
        )
    elif method.name == "sparse":
        rate = choose(
            "learning_rate", train.learning_rate, lora_learning_rate(shape.num_parameters), f"single weights of {size}: as LoRA's"
        )
    else:
        what = "full training" if method.name == "full" else f"training whole layers ({method.num_layers})"
        value = round(lora_learning_rate(shape.num_parameters) / 10, 7)
        rate = choose("learning_rate", train.learning_rate, value, f"{what} of {size}: a tenth of LoRA's")
    epochs = 4 if num_rows < 100 else 3 if num_rows < 500 else 2 if num_rows < 2000 else 1
    epochs = choose("num_epochs", train.num_epochs, epochs, f"{num_rows} rows; more passes memorise before they help")
    train = train.model_copy(update={"learning_rate": float(rate), "num_epochs": float(epochs)})
    return ResolvedTraining(method, train, reasons)
