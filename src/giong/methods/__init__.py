"""What moves: one file per method, one explicit table. `METHODS[name].apply(model, config)` returns a `Trainable`."""

from giong.methods import full, lora
from giong.methods.trainable import Trainable

__all__ = ["METHODS", "Trainable"]

METHODS = {"lora": lora, "full": full}
