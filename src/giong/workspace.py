"""The on-disk format: a project folder, its steps, its runs and its models. Every write is atomic.

    myvoice/
      giong.yaml                 the settings
      data/                      documents.jsonl passages.jsonl split.json examples.jsonl, and the report of each step
      steps/STEP.json            what a finished step read (a hash) and made; running again compares the hash
      arms/ARM.jsonl             the replies of each arm on the test requests
      runs/RUN/                  run.json (frozen settings and measured choices) events.jsonl checkpoints/ results.json
      models/NAME/               a tuned model: adapter/ (or weights/), model.json (base, sampling, consent, run)
      exports/  report.html

A step is skipped when its record's key equals the hash of what it would read now: content decides, never file times.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import IO, Any

from giong.contracts import Event
from giong.errors import ConfigError, DataError, ResourceError

CONFIG_NAME = "giong.yaml"


class Project:
    """Paths and records of one project folder. Holds no state of its own: everything is on disk."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()

    @classmethod
    def find(cls, start: str | Path = ".") -> Project:
        """The project that `start` is, or lies in. Raises ConfigError where there is none."""
        start = Path(start).resolve()
        for folder in (start, *start.parents):
            if (folder / CONFIG_NAME).is_file():
                return cls(folder)
        raise ConfigError(
            "This is not a giong project (no giong.yaml here or above)", place=str(start),
            remedy="Make one with `giong init NAME --from DIR`, or name it with --project.",
        )  # fmt: skip

    @property
    def config_path(self) -> Path:
        return self.root / CONFIG_NAME

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def documents_path(self) -> Path:
        return self.data / "documents.jsonl"

    @property
    def passages_path(self) -> Path:
        return self.data / "passages.jsonl"

    @property
    def split_path(self) -> Path:
        return self.data / "split.json"

    @property
    def examples_path(self) -> Path:
        return self.data / "examples.jsonl"

    @property
    def report_path(self) -> Path:
        return self.root / "report.html"

    def arm_path(self, arm: str) -> Path:
        return self.root / "arms" / f"{safe_name(arm)}.jsonl"

    def run_path(self, run: str) -> Path:
        return self.root / "runs" / safe_name(run)

    def model_path(self, name: str) -> Path:
        return self.root / "models" / safe_name(name)

    def step_path(self, step: str) -> Path:
        return self.root / "steps" / f"{safe_name(step)}.json"

    def step_record(self, step: str) -> dict[str, Any] | None:
        """What a finished step left behind, or None."""
        return read_json(self.step_path(step)) if self.step_path(step).is_file() else None

    def step_is_current(self, step: str, key: str) -> bool:
        """Whether `step` finished with this key and everything that it made is still there."""
        record = self.step_record(step)
        return bool(record and record["key"] == key and all((self.root / made).exists() for made in record["made"]))

    def finish_step(self, step: str, key: str, made: Iterable[Path], result: Mapping[str, Any] | None = None) -> None:
        """Write the record of a finished step; `result` is what `step_result` gives back."""
        made = [str(path.relative_to(self.root)) for path in made]
        write_json(self.step_path(step), {"step": step, "key": key, "made": made, "result": dict(result or {})})

    def step_result(self, step: str) -> dict[str, Any] | None:
        record = self.step_record(step)
        return record["result"] if record else None

    def list_runs(self) -> list[Path]:
        return sorted(path for path in (self.root / "runs").glob("*") if (path / "run.json").is_file())

    def list_models(self) -> list[Path]:
        """Folders of finished tuned models (a model is finished when its model.json is there)."""
        return sorted(path for path in (self.root / "models").glob("*") if (path / "model.json").is_file())


def safe_name(name: str) -> str:
    """A name that is one path component. Raises ConfigError otherwise: ids are never paths."""
    if not name or name.startswith(".") or any(character in name for character in '/\\:\0*?"<>|') or len(name) > 120:
        raise ConfigError(f"{name!r} cannot be used as a name", remedy="Use letters, digits, '-', '_' and '.'.")
    return name


def content_hash(*parts: Any) -> str:
    """SHA-256 (first 16 hex digits) over JSON-able parts, pydantic sections, dataclasses, bytes and the contents of files."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(_hash_bytes(part))
        digest.update(b"\x00")
    return digest.hexdigest()[:16]


def _hash_bytes(part: Any) -> bytes:
    if isinstance(part, Path):
        return hashlib.sha256(part.read_bytes()).digest() if part.is_file() else b"(no file)"
    if isinstance(part, bytes):
        return part
    return json.dumps(part, sort_keys=True, ensure_ascii=False, default=plain).encode()


def plain(value: Any) -> Any:
    """The JSON form of what json itself does not know: for `json.dumps(default=plain)`."""
    if hasattr(value, "model_dump"):
        return value.model_dump()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, datetime.date):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no plain form")


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Write to a temporary file beside `path`, fsync, rename. Whatever happens, `path` is the old or the new content."""
    with resource_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": "\n"})) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
            _fsync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all: fill the yielded temporary folder; it replaces `path` at the end."""
    with resource_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield temporary
            os.chmod(temporary, 0o755)
            for file in temporary.rglob("*"):
                if file.is_file():
                    with file.open("rb") as stream:
                        os.fsync(stream.fileno())
            if path.exists():
                # A folder cannot be replaced in one step: the old one is moved aside first and removed last.
                aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
                os.replace(path, aside / "old")
                os.replace(temporary, path)
                shutil.rmtree(aside, ignore_errors=True)
            else:
                os.replace(temporary, path)
            _fsync_folder(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _fsync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def resource_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one sentence with the place and the remedy."""
    try:
        yield
    except ResourceError:
        raise
    except PermissionError as error:
        place = str(error.filename or path)
        raise ResourceError("No permission to write", place=place, remedy="Choose another folder or change its owner.") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError("The disk is full", place=str(path), remedy="Free some space and run the same command again.") from error
        if error.errno == errno.EROFS:
            raise ResourceError("The file system is read-only", place=str(path), remedy="Choose another folder.") from error
        raise


def write_json(path: Path, value: Any) -> None:
    with atomic_write(path, "w") as stream:
        json.dump(value, stream, ensure_ascii=False, indent=1, default=plain)
        stream.write("\n")


def read_json(path: Path) -> Any:
    """Raises DataError naming the file where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"Not valid JSON: {error}", place=str(path), remedy="Delete the file and run the step again.") from None


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """One JSON object per line; dataclasses and mappings are accepted."""
    with atomic_write(path, "w") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False, default=plain) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file. Raises DataError naming the line that is not JSON; see `mend_torn_end` for append-only files."""
    with path.open(encoding="utf-8", errors="strict") as stream:
        lines = stream.read().split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"Not valid JSON: {error.msg}", place=f"{path}:{number}", remedy="Mend or delete that line.") from None
    return rows


def append_jsonl(path: Path, row: Any) -> None:
    """Append one row and flush it to the disk; a torn end left by a kill is cut off first."""
    with resource_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        mend_torn_end(path)
        with path.open("ab") as stream:
            stream.write((json.dumps(row, ensure_ascii=False, default=plain) + "\n").encode())
            stream.flush()
            os.fsync(stream.fileno())


def mend_torn_end(path: Path) -> None:
    """Make an append-only file that a kill cut short end with a whole line; any other file is left alone.

    A whole last row that lacks only its line break is kept (it may have been paid for); anything else after the last line
    break is cut off, even in the middle of a character.
    """
    if not path.is_file() or not path.stat().st_size:
        return
    with resource_errors(path), path.open("rb+") as stream:
        stream.seek(-1, os.SEEK_END)
        if stream.read(1) == b"\n":
            return
        stream.seek(0)
        content = stream.read()
        start = content.rfind(b"\n") + 1
        try:
            json.loads(content[start:])
        except ValueError:
            stream.truncate(start)
        else:
            stream.write(b"\n")


def event_writer(path: Path) -> Any:
    """An `Emit` that appends events to a JSONL file. Progress lines are not kept: they would outgrow the rest."""

    def emit(event: Event) -> None:
        if event.kind != "progress":
            append_jsonl(path, event)

    return emit
