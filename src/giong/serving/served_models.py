"""The models that this process answers for: the base, and every finished tuned model of the project, by name.

The models folder is read at every request: one small file is nothing beside one token, and so a new model is served, and a
deleted or retrained one is not served any longer, without anyone having to say so.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import torch

from giong.config import ProjectConfig
from giong.contracts import Emit, Event, Sampling
from giong.errors import DataError, GiongError, ModelError, ServingError
from giong.generation.local import LocalModel
from giong.models.folder import resolve
from giong.models.load import load_model, model_identity
from giong.models.trained import load_trained
from giong.workspace import Project, content_hash, read_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAMPLING_FIELDS = {field.name: field for field in dataclasses.fields(Sampling)}
SMALLEST_TEMPERATURE = 1e-4
SMALLEST_TOP_P = 1e-6
SMALLEST_PENALTY = 1e-2
SEEDS = (-(2**63), 2**64 - 1)


@dataclasses.dataclass(frozen=True, slots=True)
class ModelEntry:
    """One model as it stands on the disk. `folder` is None for the base; `version` changes when the weights do."""

    name: str
    base: str
    format: str
    created: int
    sampling: Sampling
    fingerprint: str
    folder: Path | None = None
    version: str = ""
    task: str = "generate"

    def to_dict(self) -> dict[str, Any]:
        """The entry as the protocol sends it."""
        return {
            "name": self.name, "base": self.base, "format": self.format, "created": self.created,
            "sampling": dataclasses.asdict(self.sampling), "fingerprint": self.fingerprint, "task": self.task,
        }  # fmt: skip


class ServedModels:
    """The base and the tuned models of one project.

    `entry` and `entries` read the disk only, so any thread may call them; `ready` loads weights and belongs to the thread
    that decodes.
    """

    def __init__(self, project: Project, config: ProjectConfig, emit: Emit) -> None:
        self._project, self._config, self._emit = project, config, emit
        self._base_path = config.model.name_or_path
        self._dtype = serving_dtype(project, config)
        self._identity = content_hash(model_identity(config.model), str(self._dtype))
        self._complained: set[tuple[str, int]] = set()
        self._loaded: dict[str, tuple[str, LocalModel, str | None]] = {}
        loaded = load_model(config.model, dtype=self._dtype)
        for notice in loaded.notices:
            emit(Event("notice", "serve", notice))
        self._base = LocalModel(loaded)
        source = Path(resolve(self._base_path))
        self._base_created = int((source / "config.json").stat().st_mtime) if (source / "config.json").is_file() else 0

    def describe_base(self) -> str:
        """The base in a few words, for the readiness message."""
        millions = self._base.loaded.shape.num_parameters / 1e6
        return f"{last_component(self._base_path)} ({millions:.1f} M parameters, {str(self._dtype).removeprefix('torch.')})"

    def entries(self) -> list[ModelEntry]:
        """The base first, then the tuned models by name. One that cannot be read is left out, with a notice."""
        tuned = []
        for folder in self._project.list_models():
            try:
                tuned.append(self._read(folder))
            except (GiongError, OSError) as error:
                self._complain(folder, error)
        return [self._base_entry(), *tuned]

    def entry(self, name: str) -> ModelEntry:
        """Raises ServingError for a name that is not served, DataError where its model.json cannot be read."""
        folders = {folder.name: folder for folder in self._project.list_models()}
        if name in folders:
            # Between the listing and the reading a model may be deleted; then it is not served, like any other.
            with contextlib.suppress(FileNotFoundError):
                return self._read(folders.pop(name))
        base = self._base_entry()
        if name in (base.name, self._base_path):
            return base
        served = ", ".join([base.name, *folders])
        raise ServingError(f"The model {name!r} is not served here", remedy=f"Served are: {served}.")

    def ready(self, entry: ModelEntry) -> tuple[LocalModel, str | None]:
        """The local model and the name of its adapter (None: none), loaded if need be. Raises ModelError where that fails."""
        if entry.folder is None:
            return self._base, None
        held = self._loaded.get(entry.name)
        if held and held[0] == entry.version:
            return held[1], held[2]
        if held:
            self._forget(entry.name)
        if entry.format == "adapter":
            local, adapter = self._base, entry.name
            local.add_adapter(adapter, entry.folder / "adapter")
        else:
            local, adapter = self._load_whole(entry.folder / entry.format), None
        self._loaded[entry.name] = (entry.version, local, adapter)
        return local, adapter

    def drop_deleted(self) -> None:
        """Free the weights of models whose folders are gone."""
        present = {folder.name for folder in self._project.list_models()}
        for name in self._loaded.keys() - present:
            self._forget(name)

    def _base_entry(self) -> ModelEntry:
        name = last_component(self._base_path)
        if (self._project.root / "models" / name / "model.json").is_file():
            # A tuned model of the same name keeps it; both must be reachable.
            name += "-base"
        return ModelEntry(name, name, "base", self._base_created, Sampling(), "giong-" + self._identity)

    def _read(self, folder: Path) -> ModelEntry:
        path = folder / "model.json"
        record = read_json(path)
        kind = record.get("format") if isinstance(record, dict) else None
        if kind not in ("adapter", "nf4_adapter", "weights", "partial"):
            raise DataError("This model.json names no known format", place=str(path), remedy="Export or train the model again.")
        base = last_component(str(record.get("base") or self._base_path))
        if kind != "weights" and base != last_component(self._base_path):
            raise ModelError(
                f"The model {folder.name!r} was tuned from {base!r}, and {last_component(self._base_path)!r} is loaded",
                place=str(path), remedy="Serve it from a project whose `model:` is that base.",
            )  # fmt: skip
        version = artifact_version(folder / kind)
        fingerprint = "giong-" + content_hash(self._identity, record, version)
        sampling = parse_sampling(record.get("sampling") or {}, Sampling(), place=str(path))
        return ModelEntry(folder.name, base, kind, int(record.get("created") or 0), sampling, fingerprint, folder, version)

    def _load_whole(self, artifact: Path) -> LocalModel:
        dtype = DTYPES.get(read_json(artifact.with_name("model.json")).get("dtype"), self._dtype)
        return LocalModel(load_trained(self._config.model, artifact, dtype=dtype))

    def _forget(self, name: str) -> None:
        _, local, adapter = self._loaded.pop(name)
        if adapter is not None:
            local.remove_adapter(adapter)

    def _complain(self, folder: Path, error: Exception) -> None:
        try:
            stamp = (folder.name, (folder / "model.json").stat().st_mtime_ns)
        except OSError:
            return
        if stamp not in self._complained:
            self._complained.add(stamp)
            self._emit(Event("notice", "serve", f"The model {folder.name!r} is not served: {error}"))


def serving_dtype(project: Project, config: ProjectConfig) -> torch.dtype:
    """The number format: as set; with `auto` what the project's probe measured, so that what is served is what was evaluated."""
    if config.model.dtype != "auto":
        return DTYPES[config.model.dtype]
    return DTYPES[(project.step_result("probe") or {}).get("dtype", "float32")]


def parse_sampling(fields: Any, default: Sampling, *, place: str = "") -> Sampling:
    """`default` with the given fields replaced; settings that would break the arithmetic are moved to their limit.

    Raises DataError for unknown fields and for values of the wrong type.
    """
    if not isinstance(fields, dict):
        raise DataError("The sampling is not a mapping", place=place)
    for name, value in fields.items():
        if name not in SAMPLING_FIELDS:
            raise DataError(f"Unknown sampling field {name!r}", place=place, remedy=f"Known: {', '.join(SAMPLING_FIELDS)}.")
        whole = isinstance(SAMPLING_FIELDS[name].default, int)
        smallest, largest = SEEDS if name == "seed" else (0, 2**31)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not smallest <= value <= largest:
            raise DataError(f"Sampling field {name!r} cannot be {value!r}", place=place)
    sampling = dataclasses.replace(default, **fields)
    # Logits divided by nearly 0 overflow, and an empty nucleus has nothing to draw from.
    temperature = sampling.temperature if sampling.temperature >= SMALLEST_TEMPERATURE else 0.0
    penalty = max(sampling.repetition_penalty, SMALLEST_PENALTY)
    return dataclasses.replace(sampling, temperature=temperature, top_p=max(sampling.top_p, SMALLEST_TOP_P), repetition_penalty=penalty)


def last_component(name_or_path: str) -> str:
    """The last part of a path or hub name: what a model is called where it is served."""
    return Path(name_or_path).expanduser().name or Path(name_or_path).resolve().name


def artifact_version(folder: Path) -> str:
    """Hash of name, size and time of the files of a model; raises ModelError where the folder is missing."""
    if not folder.is_dir():
        raise ModelError(f"This model has no folder {folder.name!r}", place=str(folder.parent), remedy="Train or export it again.")
    return content_hash([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir()) if path.is_file()])
