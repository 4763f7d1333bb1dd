"""One measurement of TRL's SFTTrainer with PEFT, in a process of its own and in the peers' environment: `python trl_arm.py JOB RESULT`.

The trainer is used as its documentation shows, on rows that are tokenized already. Beyond the arm's own settings only what
makes the work equal is set: rows per step, learning rate, no schedule, AdamW's second beta, nothing saved.
"""

from __future__ import annotations

import math
import tempfile
from typing import Any

import peft
import torch
import transformers
import trl
from datasets import Dataset
from recording import Job, StepRecorder, job_and_result, write_figures
from shapes import LEARNING_RATE, LORA_ALPHA, digest
from transformers import AutoTokenizer, TrainerCallback


class MeasuredTrainer(trl.SFTTrainer):
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
        self.trainer: MeasuredTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        assert self.trainer is not None
        # Every epoch is one step over the same rows, so the count of the first holds for all.
        self.recorder.step(self.trainer.num_tokens, self.trainer.first_loss if state.global_step == 1 else None)


def as_dataset(rows: list[tuple[Any, Any]]) -> Dataset:
    labels = [[int(i) if weight else -100 for i, weight in zip(ids, weights)] for ids, weights in rows]
    return Dataset.from_dict({"input_ids": [ids.tolist() for ids, _ in rows], "labels": labels})


def arguments(job: Job, dataset: Dataset, folder: str) -> trl.SFTConfig:
    """SFTConfig of this arm. One epoch is one optimizer step: all rows, in as many passes as the arm's batches need."""
    settings = dict(job.settings)
    packing = settings.pop("packing", False)
    per_device = settings.pop("batch_rows", 1)
    batches = len(trl.pack_dataset(dataset, job.max_tokens_per_pack)) if packing else math.ceil(len(dataset) / per_device)
    return trl.SFTConfig(
        output_dir=folder, per_device_train_batch_size=per_device, gradient_accumulation_steps=batches, max_steps=job.num_warmup_steps + job.num_steps,
        max_length=job.max_tokens_per_pack, packing=packing, learning_rate=LEARNING_RATE, lr_scheduler_type="constant", adam_beta2=0.95,
        weight_decay=0.0, max_grad_norm=1.0, save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True,
        use_cpu=job.device == "cpu", dataloader_pin_memory=job.device != "cpu", **settings,
    )  # fmt: skip


def main() -> None:
    job, result = job_and_result()
    drawn = job.mix.draw(job.vocab_size)
    dataset, recorder = as_dataset(drawn), StepRecorder(job)
    callback = StepEnds(recorder)
    lora = peft.LoraConfig(r=job.lora_r, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        trainer = MeasuredTrainer(
            model=job.model, args=arguments(job, dataset, folder), train_dataset=dataset, processing_class=AutoTokenizer.from_pretrained(job.model),
            peft_config=lora if job.method == "lora" else None, callbacks=[callback],
        )  # fmt: skip
        callback.trainer = trainer
        trainer.train()
    recorder.num_loss_tokens = trainer.num_loss_tokens
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    versions = {"torch": torch, "trl": trl, "peft": peft, "transformers": transformers}
    write_figures(
        result,
        recorder.figures()
        | {
            "first_grad_norm": float(logged[0]) if logged else None, "rows_digest": digest(drawn), "num_threads": torch.get_num_threads(),
            "num_computed_tokens_per_step": trainer.num_computed_tokens,
            "num_trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            "attention": trainer.model.config._attn_implementation, "optimizer": str(trainer.args.optim.value),
            "autocast_bf16": bool(trainer.args.bf16), "gradient_checkpointing": bool(trainer.args.gradient_checkpointing),
            **{name: module.__version__ for name, module in versions.items()},
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
