"""Step `train`: a run on the training rows or a slice of them, and the model folder that the run on all of them becomes.

What is trained is named by its content: a pilot on all rows and the final run are the same run, so whichever step asks
first trains it and the other finds it done.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from giong.config import MethodConfig, TrainConfig
from giong.config.training import IN_KEYS, OF_THE_DAY, ONLINE
from giong.contracts import Event, Example, Preference, Sampling, ScoreRequest, TokenScores
from giong.engine.distributed import ALONE
from giong.engine.kernel_choice import elementwise_of_run
from giong.engine.loop import train
from giong.engine.loop_config import LoopConfig
from giong.engine.memory import ActivationPlan, activation_memory, plan_activations
from giong.engine.optimizer import not_for_muon
from giong.engine.row_check import check_tokens
from giong.engine.score import LocalScorer
from giong.errors import DataError, StoryError
from giong.evaluation.canaries import plant
from giong.generation.local import LocalModel
from giong.methods import METHODS, Trainable
from giong.models.devices import free_memory_bytes, peak_memory_bytes, reset_peak_memory
from giong.models.load import LoadedModel
from giong.models.nf4 import bytes_per_weight
from giong.models.preference_rows import preference_rows, rating_rows
from giong.models.row_cache import RowCache
from giong.models.rows import Row, RowReport, example_rows, raw_text_rows
from giong.models.saving import folder_bytes
from giong.models.trained import load_trained
from giong.objectives import objective_of, sft
from giong.sizing.defaults import ResolvedTraining, resolve_training
from giong.sizing.moving import SOFT_PROMPTS, check_method
from giong.sizing.units import format_bytes
from giong.workflow.beside import beside_of, other_models
from giong.workflow.choosing import given_to_method
from giong.workflow.compiling import compiling_of_run
from giong.workflow.drawing import draws_of
from giong.workflow.estimating import announce_run, num_shards, resolved_of
from giong.workflow.joining import TrainingOrder
from giong.workflow.preferring import held_out_figures, referenced
from giong.workflow.probing import DTYPES, probe
from giong.workflow.replay import replay_hash, replay_rows, say_shortfall
from giong.workflow.starting import started
from giong.workflow.story import Stage, Story, examples_hash
from giong.workflow.surprise import weighed_by_surprise
from giong.workflow.workload import lanes_of, largest_pack_of, lengths_of, num_anchors
from giong.workspace import atomic_folder, content_hash, event_writer, read_json, write_json

Item = TypeVar("Item")

PREFERENCE_ROWS = {"pairs": preference_rows, "ratings": rating_rows}

OPTIONS = (
    "replay_share", "replay_path", "kl_weight", "l2_to_base", "neftune_noise_alpha", "surprise_weight", "early_stopping_patience",
    "early_stopping_memorisation",
)  # fmt: skip
"""Settings that are in the record only where they are on: a run without them is the one that it was before there were any."""


@dataclass(frozen=True)
class Run:
    """One finished or planned training run: its folder, the examples it learns from, and its frozen record."""

    name: str
    folder: Path
    examples: Sequence[Example | Preference]
    record: dict[str, Any]

    @property
    def artifact(self) -> Path:
        return self.folder / self.record["format"]

    @property
    def results(self) -> dict[str, Any]:
        return read_json(self.folder / "results.json")

    @property
    def is_finished(self) -> bool:
        return (self.folder / "results.json").is_file() and self.artifact.is_dir()


def nested_slice(examples: Sequence[Item], share: float, seed: int) -> list[Item]:
    """A share of the examples such that every smaller slice lies within every larger one; whole passages, seeded."""
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(examples))
    chosen = sorted(order[: max(1, round(share * len(examples)))].tolist())
    return [examples[index] for index in chosen]


def plan_run(story: Story, share: float, seed: int | None = None, *, pseudo: Sequence[Example] = ()) -> Run:
    """What the run on this share of the training rows would be: settings resolved, measured choices frozen. `seed` replaces
    `train.seed`, for slices and training alike; `pseudo` are rows that a model answered, marked as such in the record."""
    examples = story.learnt_from("train")
    if not examples:
        raise StoryError(
            "There are no training requests", place=str(story.project.examples_path), remedy="Run `giong synth`, or add documents."
        )
    train_settings = story.config.train if seed is None else story.config.train.model_copy(update={"seed": seed})
    part = nested_slice(examples, share, train_settings.seed)
    if share == 1.0:
        part += plant(story.config.evaluation.num_canaries, story.config.evaluation.seed)
    part += pseudo
    shape = story.local.loaded.shape
    method = started(story.project, story.config.method)
    check_method(shape, method)
    # Pilots keep the recipe of the full run: the curve is about rows and not about settings.
    resolved = resolve_training(method, train_settings, shape, len(examples), learns_from=story.config.objective.judged)
    measured = probe(story)
    settings = {
        "method": resolved.method.record(),
        "objective": story.config.objective.record(),
        "train": resolved.train.model_dump(exclude={*OF_THE_DAY, "pseudo", *_switched_off(resolved.train)}),
        "dtype": measured["dtype"], "max_seq_length": story.local.loaded.max_seq_length,
    }  # fmt: skip
    if method.start_from:
        # As it was given: the project may be moved. What lies there is part of the key.
        settings["method"]["start_from"] = story.config.method.start_from
    keyed = {**settings, "train": {**settings["train"], **IN_KEYS}}
    key = content_hash(story.model_identity, examples_hash(part), keyed, *beside_examples(story, method))
    name = f"rows-{len(part):05d}-{key[:8]}"
    record = {
        "name": name, "key": key, "num_rows": len(part), "share": share, "settings": settings, "reasons": resolved.reasons,
        "base": story.local.loaded.name_or_path, "model_identity": story.model_identity, "examples_hash": examples_hash(part),
        "machine": measured["machine"], "format": METHODS[resolved.method.name].FORMAT,
        "consent": story.config.data.consent.model_dump(),
    }  # fmt: skip
    if pseudo:
        record["pseudo"] = {"num_rows": len(pseudo), "answered_by": pseudo[0].source}
    return Run(name, story.project.run_path(name), part, record)


def beside_examples(story: Story, method: MethodConfig) -> list[Path | str]:
    """What a run depends on beside its examples and settings, by content: replayed text, the adapter that it starts from (`method` as
    `started` gives it), other models, and what it is validated on where that decides something."""
    start = [Path(method.start_from) / "adapter_model.safetensors"] if method.start_from else []
    is_validated = story.config.train.eval_steps is not None or story.config.objective.learns_from != "examples"
    validated = [examples_hash(story.learnt_from("calibration"))] if is_validated else []
    return [*replay_hash(story), *start, *other_models(story), *validated]


def _switched_off(train: TrainConfig) -> list[str]:
    return [name for name in OPTIONS if getattr(train, name) == TrainConfig.model_fields[name].default]


def rows_of(story: Story, examples: Sequence[Any]) -> tuple[list[Row], RowReport]:
    """The rows that the objective learns from."""
    # Pilots are slices of one set, and a resumed run has the same one: each text is tokenised once per project.
    cache = RowCache(story.project.root / "cache" / "rows")
    loaded, method = story.local.loaded, story.config.method
    if method.name in SOFT_PROMPTS:
        # Virtual tokens take positions of the context too.
        own = min(loaded.max_seq_length, loaded.shape.max_position_embeddings - method.num_virtual_tokens)
        loaded = replace(loaded, max_seq_length=own)
    if make := PREFERENCE_ROWS.get(story.config.objective.learns_from):
        return make(loaded.chat, loaded.max_seq_length, examples)
    if story.config.objective.name == "pretrain":
        texts = list(dict.fromkeys(example.answer for example in examples if example.answer))
        rows, report = raw_text_rows(loaded, texts, cache)
        # Replayed text is what has no name.
        return [replace(row, name="raw text") for row in rows], report
    if story.config.objective.name in ONLINE:
        # What is drawn answers the last request, whose answer the rewards know.
        return example_rows(loaded, [example for example in examples if example.answer], cache, loss_on="last_answer")
    return example_rows(loaded, examples, cache, loss_on=story.config.objective.loss_on)


def trained_rows(story: Story, examples: Sequence[Any]) -> list[Row]:
    """All that a run on these examples is trained on, as an estimate wants to be told of it: with what is mixed in."""
    rows = rows_of(story, examples)[0]
    return [*rows, *replay_rows(story, rows)]


def _validation_rows(story: Story, resolved: ResolvedTraining) -> list[Row]:
    """The rows of the validation documents, none where nothing is measured on the way; of held-out pairs always, for the end."""
    if resolved.train.eval_steps is None and story.config.objective.learns_from == "examples":
        return []
    rows, _ = rows_of(story, story.learnt_from("calibration"))
    if not rows:
        raise DataError(
            "There are no validation documents", place="train.eval_steps", remedy="Raise data.calibration_share, or leave eval_steps out."
        )
    return rows


def perform_run(story: Story, run: Run, stage_name: str) -> None:
    """Train one run to the end (or find it finished). Checkpoints make it go on where it was killed."""
    if run.is_finished:
        story.emit(Event("stage_skipped", stage_name, "already trained", {"run": run.name}))
        return
    resolved = resolved_of(story, run)
    resolved = replace(resolved, method=started(story.project, resolved.method))
    story.local.clear_adapters()
    loaded = story.local.loaded
    rows, report = rows_of(story, run.examples)
    if report.too_long:
        story.notice(
            stage_name,
            f"{len(report.too_long)} rows are longer than {loaded.max_seq_length} tokens and are left out, first: {report.too_long[0]}",
        )
    if not rows:
        raise DataError(
            "Every training row is longer than the context", place="model.max_seq_length", remedy="Raise it, or lower data.max_words."
        )
    # Before the method changes the model: what is tried is the base, once for all runs over it.
    check_tokens(loaded.model, rows)
    if resolved.train.surprise_weight:
        rows = weighed_by_surprise(loaded, rows, resolved.train.surprise_weight, resolved.train.max_tokens_per_pack)
    replayed = replay_rows(story, rows)
    say_shortfall(story, rows, replayed)
    own, rows = rows, [*rows, *replayed]
    estimate = announce_run(story, run, resolved, rows, stage_name)
    run.folder.mkdir(parents=True, exist_ok=True)
    record = run.folder / "run.json"
    earlier = read_json(record) if record.is_file() else None
    compiled = compiling_of_run(
        story, stage_name, loaded.model, resolved.train.compile, earlier, seconds=estimate.seconds - estimate.write_seconds,
        num_lanes=lanes_of(story, rows, resolved),
    )  # fmt: skip
    write_json(record, {**(earlier or run.record), "compiled": compiled})
    keep = event_writer(run.folder / "events.jsonl")

    def emit(event: Event) -> None:
        keep(event)
        story.emit(event)

    with Stage(story, stage_name, f"{len(rows)} rows, {report.num_tokens} tokens, {report.num_loss_tokens} of them with loss") as stage:
        beside = beside_of(story, resolved.train.learning_rate, rows, stage_name)
        given = given_to_method(loaded.model, own, resolved, sft.loss, run.folder, partial(story.notice, stage_name))
        trainable = METHODS[resolved.method.name].apply(
            loaded.model, resolved.method, seed=resolved.train.seed, base_name=loaded.name_or_path, **given
        )
        if (packed := bytes_per_weight(trainable.model)) is not None:
            story.notice(stage_name, f"the frozen matrices take {packed:.4f} bytes per weight, measured")
        processes = story.processes or ALONE
        try:
            objective = story.config.objective
            with computing(
                story, trainable, rows, resolved, stage_name, compiled=compiled is True, couples_rows=objective.couples_rows
            ) as plan:
                rows, validation_rows = (
                    referenced(story, trainable, part, run.folder, resolved.train.max_tokens_per_pack, stage_name)
                    for part in (rows, _validation_rows(story, resolved))
                )
                order = TrainingOrder(
                    story.config.model, run.record["settings"]["dtype"], resolved.method, given, objective, rows,
                    validation_rows, loop_config(resolved), run.folder / "checkpoints", stage_name, plan, compiled is True,
                    muon_excluded=not_for_muon(trainable.model, trainable.parameters),
                    end_of_turn_ids=() if objective.name == "pretrain" else tuple(loaded.chat.end_token_ids),
                )  # fmt: skip
                processes.order(order)
                reset_peak_memory(trainable.model.device)
                result = train(
                    trainable.model, {**trainable.parameters, **beside.parameters}, rows, objective_of(objective), order.config,
                    checkpoints=order.checkpoints, emit=emit, stage=stage_name, should_stop=story.should_stop,
                    muon_excluded=order.muon_excluded, end_of_turn_ids=order.end_of_turn_ids, validate=order.validate(trainable.model),
                    memorisation=order.memorisation(trainable.model), draw=draws_of(story, trainable, loaded, order.config, run.folder, beside),
                    processes=processes, learning_rate_factors={**trainable.learning_rate_factors, **beside.learning_rate_factors}, couples_rows=order.objective.couples_rows,
                    forward=beside.forward,
                )  # fmt: skip
            peak_bytes = peak_memory_bytes(trainable.model.device)
            story.met_lengths = story.met_lengths.and_those_of(lengths_of(rows, resolved.train, lanes_of(story, rows, resolved)))
            held_out = held_out_figures(story, trainable, order, stage_name)
            _save(trainable, loaded, run.artifact)
        finally:
            if not trainable.detach():
                story.__dict__.pop("local", None)
    write_json(
        run.folder / "results.json",
        {
            **asdict(result),
            "seconds": stage.seconds,
            "num_processes": processes.size,
            "num_trainable": trainable.num_trainable,
            "saved_bytes": folder_bytes(run.artifact),
            "peak_memory_bytes": peak_bytes,
            "announced": {"seconds": estimate.seconds, "peak_memory_bytes": estimate.peak_memory_bytes},
            "rows": asdict(report),
            **held_out,
        },
    )


def _save(trainable: Trainable, loaded: LoadedModel, artifact: Path) -> None:
    with atomic_folder(artifact) as temporary:
        if trainable.format == "weights":
            loaded.chat.record_in(trainable.model)
            loaded.tokenizer.save_pretrained(temporary)
        trainable.save(temporary)


@contextlib.contextmanager
def computing(
    story: Story, trainable: Trainable, rows: list[Row], resolved: ResolvedTraining, stage_name: str, *, compiled: bool, couples_rows: bool
) -> Iterator[ActivationPlan]:
    """How the steps of a run compute: what is kept for the backward pass, and with which element-wise kernels.

    `couples_rows` says that the loss of a row depends on the others of its step, which then are one pack whatever its bound.
    """
    free_bytes = free_memory_bytes(trainable.model.device)
    if free_bytes is not None and trainable.model.device.type == "cpu":
        free_bytes //= (story.processes or ALONE).num_on_machine
    settings, shards = resolved.train, num_shards(story, resolved)
    copy_bytes = sum(parameter.nbytes for parameter in trainable.parameters.values())
    plan = plan_activations(
        trainable.model, largest_pack_of(story, rows, resolved, couples_rows=couples_rows),
        num_trainable=math.ceil(trainable.num_trainable / shards),
        anchor_bytes=num_anchors(story.config.objective, settings) * copy_bytes // shards, budget_bytes=free_bytes,
        checkpointing=settings.activation_checkpointing, offload=settings.activation_offload,
    )  # fmt: skip
    # Also where nothing was done: for whoever asked for it, and for whoever has to expect smaller packs.
    if plan.num_checkpointed or plan.offload or settings.activation_offload is True or not plan.fits:
        story.notice(stage_name, plan.reason)
    with elementwise_of_run(trainable.model, compiled=compiled), activation_memory(trainable.model, plan):
        yield plan


def loop_config(resolved: ResolvedTraining) -> LoopConfig:
    return LoopConfig(**{name: getattr(resolved.train, name) for name in LoopConfig.__slots__})


@contextlib.contextmanager
def tuned(story: Story, folder: Path, name: str):  # type: ignore[no-untyped-def]
    """(LocalModel, adapter name or None) of a trained artifact, loaded from what was saved: what is measured is what is served."""
    if folder.name == "adapter":
        local = story.local
        if name not in local.adapters:
            local.add_adapter(name, folder)
        yield local, name
    else:
        yield LocalModel(load_trained(story.config.model, folder, dtype=DTYPES[probe(story)["dtype"]])), None


def score_answers(local: LocalModel, adapter: str | None, examples: Sequence[Example]) -> list[TokenScores]:
    """Likelihood of the author's own answers, one per example."""
    with local.using(adapter):
        return LocalScorer(local.loaded).score([ScoreRequest(example.answer, example.messages) for example in examples])


def nll_per_document(examples: Sequence[Example], scores: Sequence[TokenScores]) -> dict[str, float]:
    """Nats per token by source document."""
    sums: dict[str, list[float]] = {}
    for example, score in zip(examples, scores):
        entry = sums.setdefault(example.document_id, [0.0, 0.0])
        entry[0] += score.nll
        entry[1] += len(score.logprobs)
    return {document: nll / tokens for document, (nll, tokens) in sums.items() if tokens}


def train_model(story: Story) -> None:
    """The final run on all rows (and its rounds of pseudo-answers), and the model folder that is served: adapter, sampling, consent."""
    from giong.workflow.pseudo import read_requests, train_rounds

    pseudo = story.config.train.pseudo
    # Before the training: a line that cannot be asked costs no run.
    requests = read_requests(story, pseudo) if pseudo else []
    run = plan_run(story, 1.0)
    perform_run(story, run, "train")
    if pseudo:
        run = train_rounds(story, pseudo, requests, run)
    model = story.project.model_path(story.config.name)
    given = [story.config.sampling] if story.config.sampling.chosen() else []
    key = content_hash(run.record["key"], story.config.name, story.config.data.consent, *given)
    if story.is_current("model", key):
        return
    if not story.project.examples_path.is_file() or not story.examples_of("calibration"):
        # Pairs alone bring no requests to try settings on, nor do validation documents whose passages were all left out.
        story.notice(
            "sampling", "there is no calibration request to try sampling settings on: those of giong.yaml, or the defaults, are kept"
        )
        sampling = Sampling(**story.config.sampling.chosen())
        save_model(story, run, model, asdict(sampling), [])
        story.project.finish_step("model", key, [model / "model.json"], {"run": run.name, "sampling": asdict(sampling), "figures": []})
        return
    from giong.workflow.sampling import choose_sampling

    with tuned(story, run.artifact, run.name) as (local, adapter):
        sampling, figures = choose_sampling(story, local, adapter)
    save_model(story, run, model, asdict(sampling), figures)
    story.project.finish_step("model", key, [model / "model.json"], {"run": run.name, "sampling": asdict(sampling), "figures": figures})


def save_model(story: Story, run: Run, folder: Path, sampling: dict[str, Any], figures: list[dict[str, Any]]) -> None:
    """Copy the artifact and write model.json beside it, as one atomic folder."""
    import shutil
    import time

    with atomic_folder(folder) as temporary:
        shutil.copytree(run.artifact, temporary / run.artifact.name)
        write_json(
            temporary / "model.json",
            {
                "name": folder.name, "base": run.record["base"], "method": run.record["settings"]["method"]["name"],
                "format": run.record["format"], "saved_bytes": folder_bytes(run.artifact), "dtype": run.record["settings"]["dtype"], "sampling": sampling, "sampling_trials": figures,
                "created": int(time.time()), "run": run.name, "consent": run.record["consent"],
                **({"pseudo": run.record["pseudo"]} if "pseudo" in run.record else {}),
            },
        )  # fmt: skip
    story.notice("train", f"saved as model {folder.name!r} ({format_bytes(folder_bytes(folder / run.artifact.name))})")
