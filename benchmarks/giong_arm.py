"""One measurement of giong, in a process of its own: `python giong_arm.py JOB RESULT`.

It uses what giong's own workflow uses and nothing below: a method's `apply`, an objective's `loss`, `engine.loop.train` and
its step events. Whatever the engine does inside is what is measured.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from matrix_products import attention_flops, flops_per_token, mean_pass, measure, step_products
from recording import Job, StepRecorder, job_and_result, write_figures
from shapes import LEARNING_RATE, LORA_ALPHA, digest
from step_profile import StepProfile
from transformers import AutoModelForCausalLM

from giong.config import MethodConfig, TrainConfig
from giong.contracts import Event
from giong.engine.kernel_choice import compiled_that_serve, elementwise_of_run
from giong.engine.loop import train
from giong.engine.loop_config import LoopConfig
from giong.methods import METHODS
from giong.models.rows import Row
from giong.objectives import OBJECTIVES
from giong.sizing.shapes import shape_from_config


def loop_config(job: Job) -> LoopConfig:
    """The section `train` as a project would have it, with one step per epoch and no checkpoint in between."""
    extra_steps = 1 if job.profile else 0
    values: dict[str, Any] = {
        "learning_rate": LEARNING_RATE, "num_epochs": float(job.num_warmup_steps + job.num_steps + extra_steps), "batch_rows": job.mix.num_rows,
        "max_tokens_per_pack": job.max_tokens_per_pack, "warmup_share": 0.0, "schedule": "constant", "optimizer": "adamw",
        "save_seconds": 1e9, **job.settings,
    }  # fmt: skip
    section = TrainConfig(**values)
    names = [field.name for field in dataclasses.fields(LoopConfig)]
    return LoopConfig(**{name: getattr(section, name) for name in names if hasattr(section, name)})


def main() -> None:
    job, result = job_and_result()
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype))
    model.requires_grad_(False).to(job.device)
    method = MethodConfig(
        name=job.method, **({"lora_r": job.lora_r, "lora_alpha": LORA_ALPHA, "lora_dropout": 0.0} if job.method == "lora" else {})
    )
    trainable = METHODS[job.method].apply(model, method, seed=0)
    drawn = job.mix.draw(job.vocab_size)
    rows = [Row(ids, weights) for ids, weights in drawn]
    recorder, profile = StepRecorder(job), StepProfile(job.device)
    recorder.num_loss_tokens = int(sum(row.weights.sum() for row in rows))

    def emit(event: Event) -> None:
        if event.kind != "step":
            return
        profile.stop()
        recorder.step(event.data["num_tokens"], event.data["loss"], event.data["grad_norm"])
        if job.profile and recorder.is_finished and not profile.groups:
            profile.start()

    objective = OBJECTIVES[job.mix.objective].loss
    # `auto` depends on how long a run is expected to take; what is measured here stands for a short one.
    compiled = job.settings.get("compile") is True
    if compiled and compiled_that_serve(trainable.model) is None:
        # The run would go on with other kernels, and its figures would bear the wrong name.
        raise RuntimeError("compiling was asked for and fails here, or gives other numbers")
    with tempfile.TemporaryDirectory() as folder, elementwise_of_run(trainable.model, compiled=compiled):
        train(trainable.model, trainable.parameters, rows, objective, loop_config(job), checkpoints=Path(folder), emit=emit)
    figures = recorder.figures() | {
        "rows_digest": digest(drawn), "num_trainable": trainable.num_trainable, "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }  # fmt: skip
    if job.profile:
        figures["profile"] = profile.result()
    if job.matrix_rate:
        figures["roofline"] = roofline(job, model.config.to_dict(), [len(row) for row in rows], recorder.num_loss_tokens, figures)
    write_figures(result, figures)


def roofline(job: Job, config: dict[str, Any], lengths: list[int], num_loss_tokens: int, figures: dict[str, Any]) -> dict[str, Any]:
    """The share of this machine's matrix rate that the steps reached, the rate being measured here and now."""
    shape = shape_from_config(config)
    one = mean_pass(sum(lengths), num_loss_tokens, job.settings.get("max_tokens_per_pack", job.max_tokens_per_pack))
    products = step_products(shape, job.method, job.lora_r, one.num_tokens, one.num_loss_tokens)
    needed = flops_per_token(products, one.num_tokens)
    rate = measure(products, job.device, job.dtype)
    return {
        "flops_per_token": needed, "attention_flops_per_token": attention_flops(shape, lengths), "num_tokens_per_pass": one.num_tokens,
        "matrix_rate": rate, "roof_tokens_per_second": rate["flops_per_second"] / needed["total"],
        "share": needed["total"] * figures["tokens_per_second"] / rate["flops_per_second"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
