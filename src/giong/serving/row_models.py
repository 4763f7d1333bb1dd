"""Models that judge whole texts, served: the trained classifiers and encoders of a project, and the untuned base of an encoder.

A request is a list of texts; the oldest one is answered first, its texts in packs. Nothing is decoded, so requests need not share steps.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from giong.config import ProjectConfig
from giong.contracts import Emit, Event, Sampling
from giong.errors import DataError, GiongError, ResourceError, ServingError, StoryError
from giong.models.load import model_identity
from giong.models.row_model import RowModel, answers, load_row_model, load_trained_row_model, text_rows
from giong.models.rows import Row
from giong.serving.served_models import DTYPES, ModelEntry, artifact_version, last_component
from giong.workspace import Project, content_hash, read_json

Send = Callable[[dict[str, Any]], None]
JudgeRows = Callable[[PreTrainedModel, Sequence[Row], int], list[torch.Tensor]]
"""The engine's `evaluate_rows`, handed in: what the model makes of each row, in packs of at most so many tokens."""

TEXTS_PER_PART = 32
"""Texts that are computed, and sent, together."""
MAX_TOKENS = 4096


@dataclass(eq=False)
class Texts:
    """One request on its way. `cancelled` may be set by any thread."""

    id: str
    model: str
    texts: list[str]
    send: Send
    cancelled: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def parse(cls, record: dict[str, Any], send: Send) -> Texts:
        """Raises DataError where a field of the protocol is missing or of the wrong type."""
        texts = record.get("texts")
        if (
            not isinstance(record.get("model"), str)
            or not isinstance(texts, list)
            or not texts
            or not all(isinstance(t, str) for t in texts)
        ):
            raise DataError("A request needs a model and a list of texts")
        return cls(str(record.get("id")), record["model"], texts, send)

    def fail(self, error: GiongError, code: str) -> None:
        self.send({"id": self.id, "type": "error", "error": error.to_dict(), "code": code})


class RowModels:
    """The models of a project whose task is not writing, as they lie on the disk at the moment."""

    def __init__(self, project: Project, config: ProjectConfig, emit: Emit) -> None:
        self._project, self._config, self._emit = project, config, emit
        self._loaded: dict[str, tuple[str, RowModel]] = {}
        entries = self.entries()
        if not entries:
            raise StoryError("There is no tuned model to serve yet", place=str(project.root), remedy="Run `giong train` first.")
        for entry in entries:
            # Found out now, and not at the first request.
            self.ready(entry)

    def describe_base(self) -> str:
        return f"{last_component(self._config.model.name_or_path)} (task {self._config.task})"

    def entries(self) -> list[ModelEntry]:
        """The base, where it can be asked, then the tuned models. One that cannot be read is left out, with a notice."""
        found = []
        if self._config.task == "embed":
            name = last_component(self._config.model.name_or_path)
            fingerprint = "giong-" + content_hash(model_identity(self._config.model), self._config.embed.pooling)
            found.append(ModelEntry(name, name, "base", 0, Sampling(), fingerprint, None, fingerprint, self._config.task))
        for folder in self._project.list_models():
            try:
                record = read_json(folder / "model.json")
                if record.get("task") != self._config.task:
                    raise DataError(f"it was not trained for task {self._config.task}", place=str(folder))
                version = artifact_version(folder / record["format"])
                fingerprint = "giong-" + content_hash(record, version)
                base = last_component(record["base"])
                found.append(
                    ModelEntry(
                        folder.name, base, record["format"], record["created"], Sampling(), fingerprint, folder, version, record["task"]
                    )
                )
            except (GiongError, OSError, KeyError) as error:
                self._emit(Event("notice", "serve", f"The model {folder.name!r} is not served: {error}"))
        return found

    def entry(self, name: str) -> ModelEntry:
        """Raises ServingError for a name that is not served."""
        entries = {entry.name: entry for entry in self.entries()}
        if name not in entries:
            served = ", ".join(entries) or "none yet"
            raise ServingError(f"The model {name!r} is not served here", remedy=f"Served are: {served}.")
        return entries[name]

    def ready(self, entry: ModelEntry) -> RowModel:
        """The model, loaded if need be. Raises ModelError where that fails."""
        held = self._loaded.get(entry.name)
        if held and held[0] == entry.version:
            return held[1]
        if entry.folder is None:
            loaded = load_row_model(self._config.model, {"pooling": self._config.embed.pooling}, dtype=DTYPES["float32"])
        else:
            record = read_json(entry.folder / "model.json")
            kind, dtype = record["format"], DTYPES[record["dtype"]]
            loaded = load_trained_row_model(self._config.model, record["config"], entry.folder / kind, kind, dtype=dtype)
        self._loaded[entry.name] = (entry.version, loaded)
        return loaded


class RowScheduler:
    """The queue and the loop that empties it. `run` returns after `stop`; all else may be called from any thread."""

    def __init__(self, models: RowModels, judge_rows: JudgeRows, emit: Emit) -> None:
        self._models, self._judge_rows, self._emit = models, judge_rows, emit
        self._waiting: queue.SimpleQueue[Texts | None] = queue.SimpleQueue()

    def submit(self, request: Texts) -> None:
        self._waiting.put(request)

    def stop(self) -> None:
        self._waiting.put(None)

    def run(self) -> None:
        """Answer until `stop`."""
        while request := self._waiting.get():
            try:
                self._answer(request)
            except ServingError as error:
                request.fail(error, "model_not_found")
            except DataError as error:
                request.fail(error, "context_length_exceeded")
            except GiongError as error:
                request.fail(error, "model_failed")
            except (RuntimeError, MemoryError) as error:
                # What torch raises (memory, for one) ends this request and not the process.
                refused = ResourceError(
                    f"The answer could not be computed: {str(error).strip().splitlines()[0]}", remedy="Send fewer texts."
                )
                self._emit(Event("notice", "serve", str(refused)))
                request.fail(refused, "model_failed")

    def _answer(self, request: Texts) -> None:
        entry = self._models.entry(request.model)
        loaded = self._models.ready(entry)
        texts = request.texts
        rows, cut = text_rows(loaded, texts, [str(number) for number in range(len(texts))], [np.zeros(1)] * len(texts))
        if cut:
            raise DataError(
                f"Text {cut[0]} has more tokens than this model's context holds ({loaded.max_seq_length})",
                remedy="Shorten it, or cut it up.",
            )
        config = loaded.model.config
        for start in range(0, len(rows), TEXTS_PER_PART):
            if request.cancelled.is_set():
                return
            request.send(
                {"id": request.id, "type": "part", "outputs": self._outputs(loaded, rows[start : start + TEXTS_PER_PART]).tolist()}
            )
        labels = (
            [] if entry.task == "embed" or config.problem_type == "regression" else [config.id2label[i] for i in range(config.num_labels)]
        )
        request.send(
            {
                "id": request.id, "type": "done", "task": entry.task, "problem": getattr(config, "problem_type", None), "labels": labels,
                "num_prompt_tokens": sum(map(len, rows)),
            }
        )  # fmt: skip

    def _outputs(self, loaded: RowModel, rows: list[Row]) -> np.ndarray:
        return answers(loaded.model.config, np.stack([row.numpy() for row in self._judge_rows(loaded.model, rows, MAX_TOKENS)]))
