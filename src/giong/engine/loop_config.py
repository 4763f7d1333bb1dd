"""What a run of the loop is given and what it returns, as plain numbers: they are written to disk and sent to other processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """The settings of one run with every default resolved. Names and meanings are those of the config section `train`."""

    learning_rate: float
    num_epochs: float
    batch_rows: int
    max_tokens_per_pack: int
    warmup_share: float
    schedule: str
    optimizer: str
    weight_decay: float
    max_grad_norm: float
    seed: int
    save_seconds: float
    save_steps: int | None
    keep_checkpoints: int
    eval_steps: int | None = None
    load_best_model_at_end: bool = False
    fsdp: bool = True
    kl_weight: float = 0.0
    l2_to_base: float = 0.0
    neftune_noise_alpha: float | None = None
    early_stopping_patience: int | None = None
    early_stopping_memorisation: float | None = None


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a finished run measured. `seconds`, `tokens_per_second` and `wait_share` count this process's steps only.

    `wait_share` is the share of the steps' time that passed before they could compute: waiting for their rows, laying these out as packs
    and copying them to the device (of a GPU an upper bound: it computes what is queued meanwhile); `max_tokens_per_pack` is smaller than the setting
    where memory ran out; `validation_loss` is the lowest one and `best_step` its step, None where none was measured. `stopped_early`
    says why a run ended before its last step; `generate_share` is the share of the time that went into drawing answers.
    """

    num_steps: int
    num_tokens: int
    final_loss: float
    seconds: float
    tokens_per_second: float
    wait_share: float = 0.0
    max_tokens_per_pack: int = 0
    validation_loss: float | None = None
    best_step: int | None = None
    stopped_early: str = ""
    generate_share: float = 0.0
