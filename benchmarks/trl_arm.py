"""One measurement of TRL's SFTTrainer with PEFT, in a process of its own and in the peers' environment: `python trl_arm.py JOB RESULT`.

The trainer is used as its documentation shows, on rows that are tokenized already. Beyond the arm's own settings only what
makes the work equal is set: rows per step, learning rate, no schedule, AdamW's second beta, nothing saved.
"""

from __future__ import annotations

import math
import tempfile

import peft
import torch
import transformers
import trl
from datasets import Dataset
from recording import Job, StepRecorder, job_and_result
from shapes import LEARNING_RATE, LORA_ALPHA
from trainer_recording import CountsFirstStep, StepEnds, as_dataset, write_peer_figures
from transformers import AutoTokenizer


class MeasuredTrainer(CountsFirstStep, trl.SFTTrainer):
    """TRL's trainer with the first step counted."""


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
    dataset, callback = as_dataset(drawn), StepEnds(StepRecorder(job))
    lora = peft.LoraConfig(r=job.lora_r, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        trainer = MeasuredTrainer(
            model=job.model, args=arguments(job, dataset, folder), train_dataset=dataset, processing_class=AutoTokenizer.from_pretrained(job.model),
            peft_config=lora if job.method == "lora" else None, callbacks=[callback],
        )  # fmt: skip
        callback.trainer = trainer
        trainer.train()
    write_peer_figures(result, callback, drawn, {"torch": torch, "trl": trl, "peft": peft, "transformers": transformers})


if __name__ == "__main__":
    main()
