"""The on-disk format: a project folder, its steps, its runs and its models. Every write is atomic.

    myvoice/
      giong.yaml                 the settings
      data/                      documents.jsonl passages.jsonl split.json examples.jsonl (conversations.jsonl), and the report of each step
      steps/STEP.json            what a finished step read (a hash) and made; running again compares the hash
      arms/ARM.jsonl             the replies of each arm on the test requests
      cache/rows/                tokenised texts; may be deleted at any time
      runs/RUN/                  run.json (frozen settings and measured choices) events.jsonl checkpoints/ results.json
      sweeps/SEARCH/             search.json (what is searched over) trials.jsonl (a journal of its trials)
      models/NAME/               a tuned model: adapter/ (or weights/), model.json (base, sampling, consent, run)
      exports/  report.html  votes.jsonl  JOURNAL.md  journal.jsonl

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
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import IO, Any

from giong.contracts import Event
from giong.errors import ConfigError, DataError, ResourceError

CONFIG_NAME = "giong.yaml"
PARTIAL, ASIDE = ".giong-partial", ".giong-aside"
"""Endings of what a write under way is called (with a dot in front): what a kill leaves is known by them and swept away."""
CLAIM_WAIT_SECONDS = 10.0
ROOM_BYTES = 16 * 1024**2
"""Left free beside what is to be written, for events and results."""
"""A worker whose command line was killed needs a moment to write its checkpoint."""


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

    def edit_config(self, change: Callable[[str], str]) -> None:
        """Replace the text of giong.yaml, atomically, by what `change` makes of it."""
        with resource_errors(self.config_path):
            text = self.config_path.read_bytes().decode("utf-8")
        changed = change(text)
        if changed != text:
            with atomic_write(self.config_path) as stream:
                stream.write(changed.encode("utf-8"))

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
    def conversations_path(self) -> Path:
        return self.data / "conversations.jsonl"

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

    @contextlib.contextmanager
    def claimed(self, wait_seconds: float = CLAIM_WAIT_SECONDS) -> Iterator[None]:
        """Work on the project alone, with what a kill left half-written swept away first.

        Raises ResourceError when another process still works on it after `wait_seconds`. The claim is a lock on the folder
        itself, which ends with its process however that ends.
        """
        descriptor = os.open(self.root, os.O_RDONLY) if os.name == "posix" else None
        try:
            if descriptor is not None:
                _lock(descriptor, self.root, time.monotonic() + wait_seconds)
            sweep_leftovers(self.root)
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def list_runs(self) -> list[Path]:
        return sorted(path for path in (self.root / "runs").glob("*") if (path / "run.json").is_file())

    def list_models(self) -> list[Path]:
        """Folders of finished tuned models (a model is finished when its model.json is there)."""
        return sorted(path for path in (self.root / "models").glob("*") if (path / "model.json").is_file())


def safe_name(name: str, place: str = "") -> str:
    """A name that is one path component. Raises ConfigError otherwise: ids are never paths."""
    if not name or name.startswith(".") or any(character in name for character in '/\\:\0*?"<>|') or len(name) > 120:
        raise ConfigError(f"{name!r} cannot be used as a name", place=place, remedy="Use letters, digits, '-', '_' and '.'.")
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
        named = ((item, getattr(value, item.name)) for item in fields(value))
        return {item.name: given for item, given in named if not (item.metadata.get("sparse") and given == item.default)}
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
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
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
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL))
        try:
            yield temporary
            os.chmod(temporary, 0o755)
            for file in temporary.rglob("*"):
                if file.is_file():
                    with file.open("rb") as stream:
                        os.fsync(stream.fileno())
            if path.exists():
                # A folder cannot be replaced in one step: the old one is moved aside first and removed last. After a kill
                # in between, `sweep_leftovers` puts it back.
                aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=ASIDE))
                os.replace(path, aside / path.name)
                try:
                    os.replace(temporary, path)
                except BaseException:
                    os.replace(aside / path.name, path)
                    raise
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
            else:
                os.replace(temporary, path)
            _fsync_folder(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def remove_folder(path: Path) -> None:
    """Delete a folder, moved aside first: what a kill leaves half-deleted must not look like a model or a checkpoint."""
    with resource_errors(path):
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL))
        os.replace(path, aside / path.name)
        shutil.rmtree(aside)


def sweep_leftovers(folder: Path, *, recursive: bool = True) -> None:
    """Remove what killed writes left in `folder`, and put back a folder that was moved aside and not yet replaced.

    Only for the one process that works there: it would take the ground from under another one's write.
    """
    with resource_errors(folder):
        prefix = "**/" if recursive else ""
        for aside in list(folder.glob(f"{prefix}.*{ASIDE}")):
            for old in aside.iterdir():
                if not (aside.parent / old.name).exists():
                    os.replace(old, aside.parent / old.name)
            shutil.rmtree(aside)
        for partial in list(folder.glob(f"{prefix}.*{PARTIAL}")):
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                # It may lie in a folder that has just been removed.
                partial.unlink(missing_ok=True)


def _lock(descriptor: int, folder: Path, deadline: float) -> None:
    import fcntl

    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ResourceError(
                    "Another process is working on this project", place=str(folder),
                    remedy="Wait until it ends, or stop it, and run the same command again.",
                ) from None  # fmt: skip
            time.sleep(0.1)
        except OSError:
            # Some network file systems know no locks; there, nobody is kept out.
            return


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
    except OSError as error:
        # The name of a temporary file says nothing to the user; what it was to become does.
        named = str(error.filename or PARTIAL)
        raise refusal(error, str(path) if PARTIAL in named else named) from error


def require_room(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise ResourceError where the disk of `folder` (which need not exist yet) has no room for so many bytes: said before the work is
    done that would be lost."""
    with resource_errors(folder):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes + ROOM_BYTES:
        raise ResourceError(
            f"The disk is nearly full: {what} {needed_bytes / 1e6:.3g} MB and some room, {free_bytes / 1e6:.3g} MB are free",
            place=str(folder),
            remedy="Free some space and run the same command again: it goes on from what is finished.",
        )  # fmt: skip


def refusal(error: OSError, place: str) -> ResourceError:
    """What the operating system refused, as one sentence with the place and the remedy."""
    match error.errno:
        case errno.EACCES | errno.EPERM:
            return ResourceError("No permission", place=place, remedy="Choose another folder, or change its owner or its permissions.")
        case errno.ENOSPC | errno.EDQUOT:
            return ResourceError("The disk is full", place=place, remedy="Free some space and run the same command again.")
        case errno.EFBIG:
            return ResourceError(
                "A file would be larger than the system allows", place=place,
                remedy="Raise the limit (`ulimit -f`, or another file system) and run the same command again.",
            )  # fmt: skip
        case errno.EROFS:
            return ResourceError("The file system is read-only", place=place, remedy="Choose another folder.")
        case _:
            reason = error.strerror or str(error) or type(error).__name__
            return ResourceError(f"The system refused: {reason}", place=place, remedy="See to that and run the same command again.")


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
