"""What moves: one file per method, one explicit table. `METHODS[name].apply(model, config)` returns a `Trainable`, and
`METHODS[name].FORMAT` says how it is saved: "adapter" (PEFT's), "nf4_adapter" (PEFT's, over a base in 4 bits), "weights" (a whole
model) or "partial" (what moved)."""

from giong.methods import bias, bottleneck, full, last_layers, lora, norm, prefix_tuning, prompt_tuning, qlora, sparse
from giong.methods.trainable import Trainable

__all__ = ["METHODS", "Trainable"]

METHODS = {
    "lora": lora,
    "qlora": qlora,
    "full": full,
    "last_layers": last_layers,
    "bias": bias,
    "norm": norm,
    "sparse": sparse,
    "bottleneck": bottleneck,
    "prompt_tuning": prompt_tuning,
    "prefix_tuning": prefix_tuning,
}
