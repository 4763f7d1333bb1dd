"""The short probe: which dtype is faster here, how many tokens a second this machine trains and writes.

The device is read off (`model.device`) and not measured: where there is a GPU nobody asks whether the CPU is faster. Its number
format is bf16 where it multiplies that. What the probe finds is frozen in steps/probe.json and in every run's record, so that a resumed run computes as it began, and a
later estimate rests on a measurement.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from giong.contracts import Sampling
from giong.engine.fast_path import fast_path
from giong.engine.kernel_choice import elementwise_of_run
from giong.engine.lanes import may_share, side_by_side
from giong.engine.packing import Pack, pack
from giong.engine.row_check import check_tokens
from giong.engine.step import backward, forward
from giong.generation.decoder import decode
from giong.generation.local import LocalModel
from giong.models.devices import candidate_dtypes, device_name, machine_of, resolve_device, synchronize
from giong.models.load import LoadedModel, load_model
from giong.models.rows import Row
from giong.objectives import sft
from giong.sizing.hardware import this_machine
from giong.sizing.lanes import MAX_LANES
from giong.sizing.memory import dtype_bytes, fits
from giong.sizing.units import format_bytes
from giong.workflow.story import Stage, Story
from giong.workspace import content_hash

PROBE_VERSION = 2
"""Part of the key: counts up when more is measured."""
PROBE_TOKENS = 512
PROBE_ROWS = {"cpu": 1, "cuda": 16}
"""Rows of that length in the one pack that is timed: a GPU waits for its next kernel where a CPU is long busy."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def machine_identity(device: torch.device) -> dict[str, Any]:
    """What the same bytes depend on: processor, threads, device and library versions."""
    machine = this_machine()
    return {
        "cpu": machine.cpu_model, "threads": torch.get_num_threads(), "device": device_name(device),
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip


def probe(story: Story) -> dict[str, Any]:
    """Measure once per model and machine; `device`, `dtype`, `train_tokens_per_second`, `lane_speedup`, `write_tokens_per_second`.

    Raises ConfigError where `model.device` is not there.
    """
    device = resolve_device(story.config.model.device)
    key = content_hash(PROBE_VERSION, story.model_identity, machine_identity(device), story.config.model)
    record = story.project.step_record(story.probe_step)
    again, story.is_probed = story.force and not story.is_probed, True
    if record and record["key"] == key and not again:
        return record["result"]
    model_key = content_hash(story.model_identity, story.config.model)
    known = record["result"] if record and not again else {}
    # Another number of threads is no reason to train in another dtype: what had begun would not be found.
    alike = known.get("model_key") == model_key and {**known["machine"], "threads": 0} == {**machine_identity(device), "threads": 0}
    with Stage(story, "probe", "which dtype is faster here, and how fast"):
        result = {**_measure(story, device, known["dtype"] if alike else None), "model_key": model_key}
    story.project.finish_step(story.probe_step, key, [], result)
    speeds = ", ".join(f"{name} {speed:.0f}" for name, speed in result["tokens_per_second"].items())
    story.notice(
        "probe",
        f"{result['dtype']} on {result['machine']['device']} (training tokens a second: {speeds}; writing: {result['write_tokens_per_second']:.0f})",
    )
    return result


def load_base(story: Story) -> LocalModel:
    """The base in the probe's dtype; what the loader noticed is passed on."""
    dtype = probe(story)["dtype"]
    loaded = load_model(story.config.model, dtype=DTYPES[dtype])
    for notice in loaded.notices:
        story.notice("load", notice)
    return LocalModel(loaded)


def _measure(story: Story, device: torch.device, dtype: str | None = None) -> dict[str, Any]:
    """With `dtype`, how fast that is; else which is the fastest."""
    wanted = dtype or story.config.model.dtype
    names = candidate_dtypes(device) if wanted == "auto" else [wanted]
    speeds: dict[str, float] = {}
    writing: dict[str, float] = {}
    lane_speedup = 1.0
    num_parameters = 0
    for name in names:
        needed_bytes, available_bytes = num_parameters * dtype_bytes(name), machine_of(device).available_memory_bytes
        if fits(needed_bytes, available_bytes) is False:
            # The system would kill the process, and the format that was measured already is the one that can be used.
            story.notice(
                "probe", f"{name} is not tried: the weights take {format_bytes(needed_bytes)}, and {format_bytes(available_bytes)} are free"
            )
            continue
        loaded = load_model(story.config.model, dtype=DTYPES[name], device=device)
        num_parameters = loaded.model.num_parameters()
        speeds[name] = training_speed(loaded)
        if speeds[name] == max(speeds.values()):
            lane_speedup = speedup_of_lanes(loaded, speeds[name])
        writing[name] = writing_speed(loaded)
        del loaded
        story.check_stop()
    dtype = max(speeds, key=lambda name: speeds[name])
    return {
        "device": device.type, "dtype": dtype, "tokens_per_second": speeds, "train_tokens_per_second": speeds[dtype], "lane_speedup": lane_speedup,
        "write_tokens_per_second": writing[dtype], "machine": machine_identity(device),
    }  # fmt: skip


def training_speed(loaded: LoadedModel, repeats: int = 3) -> float:
    """Tokens per second of forward and backward with the input of every linear layer in the graph, as LoRA needs it, by a run's kernels.

    Raises ModelError for a model whose packed rows come to other numbers than its own forward pass: its speed is of no use.
    """
    model = loaded.model
    rows = _rows(loaded, PROBE_ROWS.get(model.device.type, 1))
    check_tokens(model, rows)
    num_tokens = sum(map(len, rows))
    return num_tokens / _seconds(model, lambda: backward(model, rows, sft.loss, None), repeats)


def speedup_of_lanes(loaded: LoadedModel, tokens_per_second: float, repeats: int = 2) -> float:
    """How many times as fast as one after the other such passes are side by side (`engine.lanes`); 1 where they are not computed so."""
    model, lanes = loaded.model, min(MAX_LANES, torch.get_num_threads())
    if lanes < 2 or not may_share(model, training=True):
        return 1.0
    rows = _rows(loaded, lanes)
    packs = [pack([row]) for row in rows]

    def compute(ready: Pack) -> None:
        sft.loss(forward(model, ready)).loss_sum.backward()

    def step() -> None:
        with fast_path(model):
            list(side_by_side(packs, compute, lanes))

    return sum(map(len, rows)) / _seconds(model, step, repeats) / tokens_per_second


def _rows(loaded: LoadedModel, num_rows: int) -> list[Row]:
    generator = np.random.default_rng(0)
    vocab_size, length = loaded.model.get_input_embeddings().weight.shape[0], min(PROBE_TOKENS, loaded.max_seq_length)
    weights = np.zeros(length, dtype=np.float32)
    weights[length // 2 :] = 1.0
    return [Row(generator.integers(0, vocab_size, length), weights) for _ in range(num_rows)]


def _seconds(model: PreTrainedModel, step: Callable[[], object], repeats: int) -> float:
    """Of a step, after one to warm up."""
    # The gradient flows from an input that needs it, so the frozen weights cost what they cost under LoRA.
    hook = model.get_input_embeddings().register_forward_hook(lambda module, given, output: output.requires_grad_(True))
    try:
        seconds = []
        # Not the compiled ones: whether these pay is decided from what is measured here.
        with elementwise_of_run(model, compiled=False):
            for _ in range(repeats + 1):
                started = time.perf_counter()
                step()
                synchronize(model.device)
                seconds.append(time.perf_counter() - started)
    finally:
        hook.remove()
    return median(seconds[1:])


def writing_speed(loaded: LoadedModel, num_sequences: int = 8, num_tokens: int = 12) -> float:
    """Tokens per second written by a small batch."""
    prompt = [int(loaded.tokenizer.eos_token_id)] * 64
    sampling = Sampling(max_new_tokens=num_tokens)
    started = time.perf_counter()
    # No end token: all sequences write to the end.
    decode(loaded.model, [prompt] * num_sequences, [sampling] * num_sequences, ())
    return num_sequences * num_tokens / (time.perf_counter() - started)
