"""Training of models that judge whole texts, for every task but writing: the same methods, the same loop, the same folders.

One decision a reader may question: no dtype is measured here as it is for writing. These models are small, and fp32 (bf16 on a GPU that
multiplies it) is right for nearly all of them; `model.dtype` says otherwise.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from giong.config.training import IN_KEYS, OF_THE_DAY
from giong.contracts import Event, LossSum
from giong.engine.feed import Corrupt
from giong.engine.loop import train
from giong.engine.optimizer import not_for_muon
from giong.engine.row_check import check_rows, check_tokens
from giong.engine.step import evaluate_objective, evaluate_rows
from giong.errors import StoryError
from giong.methods import METHODS
from giong.models.devices import candidate_dtypes, resolve_device
from giong.models.load import shape_of
from giong.models.row_model import RowModel, load_row_model, load_trained_row_model, pad_apart, text_rows
from giong.models.rows import Row
from giong.sizing.defaults import resolve_training
from giong.workflow.choosing import given_to_method
from giong.workflow.compiling import compiling_of_run
from giong.workflow.probing import DTYPES, machine_identity
from giong.workflow.story import Stage, Story
from giong.workflow.training import computing, loop_config
from giong.workspace import atomic_folder, content_hash, event_writer, read_json, write_json

NUM_CHECKED_ROWS = 3


def dtype_name(story: Story) -> str:
    """As set; with `auto` fp32 on a CPU and the GPU's own on a GPU."""
    device = resolve_device(story.config.model.device)
    wanted = story.config.model.dtype
    return wanted if wanted != "auto" else "float32" if device.type == "cpu" else candidate_dtypes(device)[0]


def load_base(story: Story, settings: dict[str, Any]) -> RowModel:
    """The base with the head that `settings` ask for; what the loader noticed is passed on."""
    loaded = load_row_model(story.config.model, settings, dtype=DTYPES[dtype_name(story)], seed=story.config.train.seed)
    for notice in loaded.notices:
        story.notice("load", notice)
    return loaded


def default_epochs(num_rows: int) -> int:
    """To tell texts apart takes steps: 20 passes over few texts, as Mosbach et al. 2020 (2006.04884, section 6) advise, fewer over many."""
    return 20 if num_rows < 500 else 10 if num_rows < 2000 else 4


def train_rows(
    story: Story,
    make_rows: Callable[[RowModel, str], list[Row]],
    loss: Callable[[dict[str, torch.Tensor]], LossSum],
    settings: dict[str, Any],
    data_key: str,
    *,
    couples_rows: bool = False,
    step: str = "model",
    folder: Path | None = None,
    task: str | None = None,
    new_head_epochs: bool = True,
    corrupt: Callable[[RowModel], Corrupt] | None = None,
) -> None:
    """Train on the rows of side "train" and save the model; found done where nothing changed.

    `make_rows(loaded, side)` gives the rows of a side; `settings` are those of the model's config, `data_key` stands for the data and
    the task's own settings; `couples_rows` says that the loss of a row depends on the others of its step, `corrupt(loaded)`
    changes the rows of each step. `step`, `folder` and `task`
    say where the model goes and what it is called, by default the project's own; without `new_head_epochs` the number of passes is
    chosen as for any other objective.
    """
    config = story.config
    method = config.method
    key = content_hash(data_key, settings, story.model_identity, method, {**config.train.model_dump(exclude=set(OF_THE_DAY)), **IN_KEYS})
    model_folder, task = folder or story.project.model_path(config.name), task or config.task
    if story.is_current(step, content_hash(key, config.name, config.data.consent)):
        return
    loaded = load_base(story, settings)
    rows = make_rows(loaded, "train")
    if rows[0].target is not None and (pad := pad_apart(loaded, {int(row.input_ids[-1]) for row in rows})) is not None:
        settings = {**settings, "pad_token_id": pad}
    many = new_head_epochs and config.train.num_epochs is None
    epochs = default_epochs(len(rows))
    given = config.train.model_copy(update={"num_epochs": float(epochs)}) if many else config.train
    resolved = resolve_training(method, given, shape_of(loaded.model), len(rows))
    if many:
        resolved.reasons["num_epochs"] = f"num_epochs {epochs}: {len(rows)} rows; few texts take many passes to tell apart"
    for reason in resolved.reasons.values():
        story.notice("train", reason)
    if rows[0].target is not None:
        check_rows(loaded.model, rows[:NUM_CHECKED_ROWS])
    else:
        check_tokens(loaded.model, rows)
    run = story.project.run_path(f"rows-{len(rows):05d}-{key[:8]}")
    artifact = run / METHODS[method.name].FORMAT
    if not (artifact.is_dir() and (run / "results.json").is_file()):
        record = {
            "name": run.name, "key": key, "num_rows": len(rows), "reasons": resolved.reasons, "base": loaded.name_or_path, "task": task,
            "model_identity": story.model_identity, "format": artifact.name, "machine": machine_identity(loaded.model.device),
            "settings": {
                "method": resolved.method.record(),
                "train": resolved.train.model_dump(exclude=set(OF_THE_DAY)), "dtype": dtype_name(story),
                "max_seq_length": loaded.max_seq_length,
            },
        }  # fmt: skip
        run.mkdir(parents=True, exist_ok=True)
        earlier = read_json(run / "run.json") if (run / "run.json").is_file() else None
        # No probe measures such models, so there is no time to expect.
        compiled = compiling_of_run(story, "train", loaded.model, resolved.train.compile, earlier, seconds=None)
        write_json(run / "run.json", {**record, "compiled": compiled})
        _train(
            story, loaded, rows, make_rows, loss, resolved, run, artifact, compiled=compiled is True, couples_rows=couples_rows,
            corrupt=corrupt and corrupt(loaded),
        )  # fmt: skip
    with atomic_folder(model_folder) as temporary:
        shutil.copytree(artifact, temporary / artifact.name)
        write_json(
            temporary / "model.json",
            {
                "name": config.name, "task": task, "base": loaded.name_or_path, "method": method.name, "format": artifact.name, "dtype": dtype_name(story),
                "config": settings, "created": int(time.time()), "run": run.name, "consent": config.data.consent.model_dump(),
            },
        )  # fmt: skip
    story.project.finish_step(step, content_hash(key, config.name, config.data.consent), [model_folder / "model.json"], {"run": run.name})
    story.notice("train", f"saved as {step.replace('_', ' ')} {config.name!r}")


def _train(story, loaded, rows, make_rows, loss, resolved, run: Path, artifact: Path, *, compiled: bool, **how) -> None:  # type: ignore[no-untyped-def]
    keep = event_writer(run / "events.jsonl")

    def emit(event: Event) -> None:
        keep(event)
        story.emit(event)

    num_tokens = sum(map(len, rows))
    with Stage(story, "train", f"{len(rows)} rows, {num_tokens} tokens") as stage:
        given = given_to_method(loaded.model, rows, resolved, loss, run, partial(story.notice, "train"))
        trainable = METHODS[resolved.method.name].apply(
            loaded.model, resolved.method, seed=resolved.train.seed, base_name=loaded.name_or_path, **given
        )
        story.notice("train", f"{trainable.num_trainable:,} trainable parameters")
        held_out = make_rows(loaded, "calibration") if resolved.train.eval_steps else []
        max_tokens = resolved.train.max_tokens_per_pack
        with computing(story, trainable, rows, resolved, "train", compiled=compiled, couples_rows=how["couples_rows"]):
            result = train(
                trainable.model, trainable.parameters, rows, loss, loop_config(resolved), checkpoints=run / "checkpoints", emit=emit,
                stage="train", should_stop=story.should_stop, learning_rate_factors=trainable.learning_rate_factors, **how,
                muon_excluded=not_for_muon(trainable.model, trainable.parameters),
                validate=(lambda: evaluate_objective(trainable.model, held_out, loss, max_tokens)["loss"]) if held_out else None,
            )  # fmt: skip
        with atomic_folder(artifact) as temporary:
            trainable.save(temporary)
            if trainable.format == "weights":
                loaded.tokenizer.save_pretrained(temporary)
    write_json(run / "results.json", {**asdict(result), "seconds": stage.seconds, "num_trainable": trainable.num_trainable})


def trained_model(story: Story, folder: Path | None = None) -> tuple[RowModel, dict[str, Any]]:
    """The tuned model (or that of `folder`), loaded from what was saved, and its record. Raises StoryError before there is one."""
    folder = folder or story.project.model_path(story.config.name)
    if not (folder / "model.json").is_file():
        raise StoryError("There is no tuned model yet", place=str(folder), remedy="Run `giong train` first.")
    record = read_json(folder / "model.json")
    kind, dtype = record["format"], DTYPES[record["dtype"]]
    config = story.config.model.model_copy(update={"name_or_path": record["base"]})
    return load_trained_row_model(config, record["config"], folder / kind, kind, dtype=dtype), record


def row_outputs(loaded: RowModel, texts: Sequence[str]) -> np.ndarray:
    """(N, C): what the model makes of each of N texts, in packs."""
    rows, _ = text_rows(loaded, texts, [""] * len(texts), [np.zeros(1)] * len(texts))
    return np.stack([row.numpy() for row in evaluate_rows(loaded.model, rows, 2048)])


def report_task(story: Story) -> None:
    """One page with the verdict, every arm with its intervals, the data and the settings."""
    from giong.evaluation.report.task_page import write_task_report

    evaluation = story.project.root / "evaluation.json"
    if not evaluation.is_file():
        raise StoryError("Nothing has been evaluated yet", place=str(story.project.root), remedy="Run `giong eval` first.")
    stored = read_json(evaluation)
    run = story.project.run_path((story.project.step_result("model") or {})["run"])
    write_task_report(
        story.project.report_path, story.config.name, stored, story.project.step_result("import") or {}, read_json(run / "run.json"),
        read_json(run / "results.json"),
    )  # fmt: skip
    story.notice("report", str(story.project.report_path))
