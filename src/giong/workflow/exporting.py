"""Step `export`: the tuned model as an adapter or as a plain model, with proof that it is the one that was evaluated."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from giong.config import NOT_MERGED
from giong.contracts import Request, Sampling
from giong.errors import StoryError
from giong.evaluation.results import TUNED
from giong.export.parity import GREEDY_TOKENS, Behaviour, Parity, compare, compare_outputs
from giong.workflow.story import Stage, Story
from giong.workspace import atomic_folder, content_hash, read_json, require_room, sweep_leftovers, write_json

if TYPE_CHECKING:
    from giong.generation.local import LocalModel
    from giong.models.row_model import RowModel

NUM_REQUESTS = 5
"""Requests of the parity proof."""
NUM_ROWS = 32
"""Texts of the proof for a model that judges texts as a whole."""


def export_model(story: Story) -> None:
    """Write each configured format, by default all that this model has, below `export.output_dir`.

    Each is checked against the evaluated model and gets a model card.
    """
    model = story.project.model_path(story.config.name)
    if not (model / "model.json").is_file():
        raise StoryError("There is no tuned model to export", place=str(model), remedy="Run `giong train` first.")
    record = read_json(model / "model.json")
    _check_plain(record, model)
    check_gates(story, record["run"])
    every = ["merged"] if "adapter" not in record["format"] else ["adapter"] if _is_soft_prompt(model, record) else FORMATS
    for fmt, target, key in _stale(story, record, every if story.config.export.formats is None else story.config.export.formats):
        with Stage(story, f"export-{fmt}", f"{story.config.name} as {fmt}") as stage:
            parity = FORMATS[fmt](story, model, record, target)
        story.project.finish_step(
            f"export-{fmt}", key, [target], {"parity": parity.to_dict(), "seconds": stage.seconds, "path": str(target)}
        )
        story.notice(f"export-{fmt}", f"{target}: {parity.sentence}")


def _stale(story: Story, record: dict[str, Any], formats: Iterable[str]) -> Iterator[tuple[str, Path, str]]:
    """(format, folder, key) of each export that is not there yet, or is another model's."""
    for fmt in formats:
        target = story.project.root / story.config.export.output_dir / f"{story.config.name}-{fmt}"
        key = content_hash(record, fmt, str(target))
        if not story.is_current(f"export-{fmt}", key):
            # The output folder may lie outside the project, where nothing else sweeps; a half-written model is large.
            sweep_leftovers(target.parent, recursive=False)
            yield fmt, target, key


def _check_plain(record: dict[str, Any], model: Path) -> None:
    if record.get("method") in NOT_MERGED:
        raise StoryError(
            f"A model of method `{record['method']}` cannot be merged into a plain one, and giong alone loads it", place=str(model),
            remedy="Use it with giong; to export, set method.name to lora and train again.",
        )  # fmt: skip


def check_gates(story: Story, run: str) -> None:
    """Raise StoryError where the evaluation of this run has failed gates that `export.accept_failed_gates` does not name."""
    path = story.project.root / "evaluation.json"
    stored = read_json(path) if path.is_file() else {}
    if stored.get("run") != run:
        story.notice("export", "this model has not been evaluated: no gate stands between it and its use (giong eval)")
        return
    arm = next(arm for arm in stored["evaluation"]["arms"] if arm["name"] == TUNED)
    accepted = set(story.config.export.accept_failed_gates)
    if unknown := accepted - {gate["name"] for gate in arm["gates"]}:
        known = ", ".join(gate["name"] for gate in arm["gates"])
        raise StoryError(f"There is no gate {sorted(unknown)[0]!r}", place="export.accept_failed_gates", remedy=f"The gates are: {known}.")
    failed = [gate["name"] for gate in arm["gates"] if gate["status"] == "fail"]
    if refused := [name for name in failed if name not in accepted]:
        raise StoryError(
            f"The tuned model failed: {', '.join(refused)}", place=str(path),
            remedy=f"Mend it, or name what you accept in giong.yaml: `export: {{accept_failed_gates: [{', '.join(refused)}]}}`.",
        )  # fmt: skip
    if failed:
        story.notice("export", f"exported although it failed: {', '.join(failed)} (export.accept_failed_gates)")


def export_row_model(story: Story) -> None:
    """Write a model that reads texts as an adapter in PEFT's format (where it is one) and as a plain folder of transformers, with proof.

    What is compared are its outputs for test texts, or the log-probabilities (nats) of their hidden tokens.
    """
    from giong.export.sentence_transformers import write_pooling
    from giong.models.row_model import load_trained_row_model
    from giong.workflow.masking import hidden_logprobs
    from giong.workflow.probing import DTYPES
    from giong.workflow.row_training import row_outputs, trained_model

    loaded, record = trained_model(story)
    _check_plain(record, story.project.model_path(story.config.name))
    test = story.split.passages("test", story.passages)[:NUM_ROWS]

    def outputs(model: RowModel) -> np.ndarray:
        return hidden_logprobs(story, model, test) if story.config.task == "mlm" else row_outputs(model, [passage.text for passage in test])

    evaluated = outputs(loaded)
    every = {"adapter": "adapter", "merged": "weights"} if record["format"] == "adapter" else {"merged": "weights"}
    formats = story.config.export.formats or list(every)
    if not set(formats) <= set(every):
        raise StoryError("Only LoRA has an adapter", place="export.formats", remedy="Export it as `merged`.")
    for fmt, target, key in _stale(story, record, formats):
        with Stage(story, f"export-{fmt}", f"{story.config.name} as {fmt}") as stage:
            with atomic_folder(target) as temporary:
                if fmt == "adapter":
                    shutil.copytree(story.project.model_path(story.config.name) / "adapter", temporary, dirs_exist_ok=True)
                else:
                    loaded.model.save_pretrained(temporary, safe_serialization=True)
                    loaded.tokenizer.save_pretrained(temporary)
                    if pooling := record["config"].get("pooling"):
                        width = loaded.model.config.hidden_size
                        write_pooling(temporary, width=width, pooling=pooling, max_seq_length=loaded.max_seq_length)
                write_json(temporary / "giong.json", record)
            exported = load_trained_row_model(story.config.model, record["config"], target, every[fmt], dtype=DTYPES[record["dtype"]])
            parity = compare_outputs(evaluated, outputs(exported), record["dtype"], num_texts=len(test))
        story.project.finish_step(
            f"export-{fmt}", key, [target], {"parity": parity.to_dict(), "seconds": stage.seconds, "path": str(target)}
        )
        story.notice(f"export-{fmt}", f"{target}: {parity.sentence}")


def _is_soft_prompt(model: Path, record: dict[str, Any]) -> bool:
    return "TUNING" in read_json(model / record["format"] / "adapter_config.json")["peft_type"]


def _export_adapter(story: Story, model: Path, record: dict[str, Any], target: Path) -> Parity:
    if "adapter" not in record["format"]:
        what = "A fully trained model has" if record["format"] == "weights" else "Methods that train a model's own tensors have"
        raise StoryError(f"{what} no adapter", place="export.formats", remedy="Export it as `merged`.")
    with atomic_folder(target) as temporary:
        shutil.copytree(model / record["format"], temporary, dirs_exist_ok=True)
        _write_card(story, record, temporary)
    return _prove(story, model, record, target)


def _export_merged(story: Story, model: Path, record: dict[str, Any], target: Path) -> Parity:
    from giong.export.merge import merge_adapter, merge_packed, merge_partial
    from giong.models.folder import check_model
    from giong.models.saving import folder_bytes
    from giong.workflow.probing import DTYPES

    if record["format"] == "adapter" and _is_soft_prompt(model, record):
        raise StoryError("A soft prompt cannot be merged into the weights", place="export.formats", remedy="Export it as `adapter`.")
    source = model / "weights" if record["format"] == "weights" else check_model(story.config.model)
    if source:
        require_room(target, folder_bytes(source), "the export takes")
    with atomic_folder(target) as temporary:
        if record["format"] == "adapter":
            merge_adapter(story.config.model, model / "adapter", temporary)
        elif record["format"] == "nf4_adapter":
            merge_packed(story.config.model, model / "nf4_adapter", temporary, DTYPES[record["dtype"]])
        elif record["format"] == "partial":
            merge_partial(story.config.model, model / "partial", temporary, DTYPES[record["dtype"]])
        else:
            shutil.copytree(model / "weights", temporary, dirs_exist_ok=True)
        _write_card(story, record, temporary)
    return _prove(story, model, record, target)


FORMATS = {"adapter": _export_adapter, "merged": _export_merged}


def _prove(story: Story, model: Path, record: dict[str, Any], target: Path) -> Parity:
    """Load the export as a stranger would, and compare what it does with what the evaluated model does."""
    from giong.generation.local import LocalModel
    from giong.models.load import load_model
    from giong.models.trained import load_trained
    from giong.workflow.probing import DTYPES
    from giong.workflow.training import tuned

    with tuned(story, model / record["format"], record["name"]) as (local, adapter):
        evaluated = _behaviour(story, local, adapter)
    config, dtype = story.config.model, DTYPES[record["dtype"]]
    if record["format"] == "nf4_adapter" and (target / "adapter_config.json").is_file():
        exported = LocalModel(load_trained(config, target, dtype=dtype, kind="nf4_adapter"))
        return compare(evaluated, _behaviour(story, exported, None), record["dtype"])
    if (target / "adapter_config.json").is_file():
        exported = LocalModel(load_model(config, dtype=dtype))
        exported.add_adapter("exported", target)
        return compare(evaluated, _behaviour(story, exported, "exported"), record["dtype"])
    # Its own template and its own ends of an answer: who loads the folder knows no settings of giong's.
    exported = LocalModel(load_model(config.model_copy(update={"name_or_path": str(target), "chat_template": None}), dtype=dtype))
    told = exported.loaded.model.generation_config.eos_token_id
    ends = told if isinstance(told, list) else [told]
    return compare(evaluated, replace(_behaviour(story, exported, None), end_token_ids=frozenset(ends)), record["dtype"])


def _behaviour(story: Story, local: LocalModel, adapter: str | None) -> Behaviour:
    from giong.workflow.training import score_answers

    examples = story.test_examples[:NUM_REQUESTS]
    requests = [Request(example.id, example.messages) for example in examples]
    replies = local.predictor("parity", adapter, Sampling(max_new_tokens=GREEDY_TOKENS)).predict(requests)
    return Behaviour(score_answers(local, adapter, examples), [reply.text for reply in replies], frozenset(local.loaded.chat.end_token_ids))


def _write_card(story: Story, record: dict[str, Any], folder: Path) -> None:
    from giong.export.model_card import model_card

    evaluation = story.project.root / "evaluation.json"
    (folder / "README.md").write_text(model_card(record, read_json(evaluation) if evaluation.is_file() else None), encoding="utf-8")
    write_json(folder / "giong.json", record)
