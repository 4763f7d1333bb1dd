"""What the arms of every peer share that trains with a `Trainer` of transformers: rows as a dataset, counted tokens, step ends, figures."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from datasets import Dataset
from recording import StepRecorder, write_figures
from shapes import digest
from transformers import Trainer, TrainerCallback

Rows = list[tuple[Any, Any]]


class CountsFirstStep(Trainer):
    """Counts, during the first step only, the tokens that are really there and those with loss, and keeps its loss."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.num_tokens = self.num_loss_tokens = self.num_computed_tokens = 0
        self.first_loss = 0.0

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        first = self.state.global_step == 0
        if first:
            ids, labels = inputs["input_ids"], inputs["labels"]
            self.num_computed_tokens += ids.numel()
            self.num_tokens += int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else ids.numel()
            self.num_loss_tokens += int((labels[:, 1:] != -100).sum())
        loss = super().training_step(model, inputs, num_items_in_batch)
        if first:
            # With the number of loss tokens known beforehand, the passes' losses add up to the step's mean.
            self.first_loss += float(loss)
        return loss


class StepEnds(TrainerCallback):
    """Tells the recorder of every optimizer step."""

    def __init__(self, recorder: StepRecorder) -> None:
        self.recorder = recorder
        self.trainer: CountsFirstStep | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        assert self.trainer is not None
        # Every epoch is one step over the same rows, so the count of the first holds for all.
        self.recorder.step(self.trainer.num_tokens, self.trainer.first_loss if state.global_step == 1 else None)


def as_dataset(rows: Rows) -> Dataset:
    labels = [[int(i) if weight else -100 for i, weight in zip(ids, weights)] for ids, weights in rows]
    return Dataset.from_dict({"input_ids": [ids.tolist() for ids, _ in rows], "labels": labels})


def write_peer_figures(path: Path, callback: StepEnds, rows: Rows, versions: dict[str, ModuleType]) -> None:
    """What the recorder found, and what a `Trainer` says of itself."""
    trainer, recorder = callback.trainer, callback.recorder
    assert trainer is not None
    recorder.num_loss_tokens = trainer.num_loss_tokens
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    write_figures(
        path,
        recorder.figures()
        | {
            "first_grad_norm": float(logged[0]) if logged else None, "rows_digest": digest(rows), "num_threads": torch.get_num_threads(),
            "num_computed_tokens_per_step": trainer.num_computed_tokens,
            "num_trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            "attention": trainer.model.config._attn_implementation, "optimizer": str(trainer.args.optim.value),
            "autocast_bf16": bool(trainer.args.bf16), "gradient_checkpointing": bool(trainer.args.gradient_checkpointing),
            **{name: module.__version__ for name, module in versions.items()},
        },
    )  # fmt: skip
