"""One measurement of LLaMA-Factory, in a process of its own and in its own environment: `python llamafactory_arm.py JOB RESULT`.

It is started by `run_exp`, as `llamafactory-cli train` starts it, on rows that are tokenized already (`tokenized_path`). Beyond the
arm's own settings only what makes the work equal is set: rows per step, learning rate, no schedule, AdamW's second beta, nothing logged.
"""

from __future__ import annotations

import importlib.machinery
import math
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

if not torch.version.cuda:
    # The wheels of both that pip takes beside a torch for CPUs are linked to CUDA and cannot be loaded. Text needs neither, but
    # LLaMA-Factory imports torchaudio unasked, and transformers torchvision where it is installed.
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    sys.modules["torchaudio"] = ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)

import peft
import transformers
from datasets import DatasetDict
from llamafactory.train import tuner
from llamafactory.train.sft import workflow
from recording import Job, StepRecorder, job_and_result
from shapes import LEARNING_RATE, LORA_ALPHA
from trainer_recording import CountsFirstStep, StepEnds, as_dataset, write_peer_figures


def arguments(job: Job, rows: Path, folder: Path) -> dict[str, Any]:
    """The settings file of this arm. One epoch is one optimizer step: all rows, in as many passes as the arm's batches need."""
    settings = dict(job.settings)
    per_device = settings.pop("batch_rows")
    adapter = (
        {"lora_rank": job.lora_r, "lora_alpha": int(LORA_ALPHA), "lora_dropout": 0.0, "lora_target": "all"} if job.method == "lora" else {}
    )
    return {
        "model_name_or_path": job.model, "stage": "sft", "do_train": True, "finetuning_type": job.method, **adapter,
        "dataset": "named because one must be; `tokenized_path` goes before it", "tokenized_path": str(rows), "cutoff_len": job.max_tokens_per_pack, "output_dir": str(folder),
        "per_device_train_batch_size": per_device, "gradient_accumulation_steps": math.ceil(job.mix.num_rows / per_device),
        "max_steps": job.num_warmup_steps + job.num_steps, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "adam_beta2": 0.95,
        "weight_decay": 0.0, "max_grad_norm": 1.0, "save_strategy": "no", "report_to": "none", "logging_steps": 1, "disable_tqdm": True,
        "use_cpu": job.device == "cpu", "dataloader_pin_memory": job.device != "cpu", "remove_unused_columns": False, **settings,
    }  # fmt: skip


def main() -> None:
    job, result = job_and_result()
    drawn, callback = job.mix.draw(job.vocab_size), StepEnds(StepRecorder(job))
    dataset = as_dataset(drawn)
    dataset = dataset.add_column("attention_mask", [[1] * len(ids) for ids in dataset["input_ids"]])

    class MeasuredTrainer(CountsFirstStep, workflow.CustomSeq2SeqTrainer):
        """LLaMA-Factory's trainer with the first step counted; `run_exp` makes it and hands out no reference."""

        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            callback.trainer = self

    workflow.CustomSeq2SeqTrainer = MeasuredTrainer
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        DatasetDict({"train": dataset}).save_to_disk(rows)
        tuner.run_exp(arguments(job, rows, Path(folder) / "run"), [callback])
    write_peer_figures(result, callback, drawn, {"torch": torch, "peft": peft, "transformers": transformers})


if __name__ == "__main__":
    main()
