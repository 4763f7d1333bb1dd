"""Every error that giong raises on purpose, in one tree.

    GiongError                      base: catch this to catch everything of ours
      ConfigError           (2)     a setting is unknown, misspelt or impossible
      DataError             (3)     the writing cannot be used: empty folder, one document, bad file
      ModelError            (4)     a model path is missing, unsafe or incomplete
      TeacherError          (5)     the teacher (or any remote model) refused, failed or answered nonsense
        SpendCapReached     (6)     the budget is used up; what was answered is kept, raise the cap to go on
      ResourceError         (7)     disk full, no permission, out of memory, port in use
      ServingError          (8)     the model process died or a served model is unknown
      StoryError            (9)     a step was asked for before the steps that it stands on
      TrainingError        (10)     a training run learns nothing or fell apart; its last good checkpoint is kept
      Interrupted         (130)     Ctrl-C or SIGTERM; everything finished so far is on disk

The number is the exit code of the command line. Policy: a message is one sentence that names the value and the place;
`remedy` is the next thing to do. Errors travel through the worker's event stream as `to_dict()` and come out as the same
class. To add one: subclass the category, say in the docstring when it is raised, add it to the drawing above.
"""

from __future__ import annotations

from typing import Any


class GiongError(Exception):
    """Base of all. `place` is a file, file:line, key or URL; `remedy` is what the user can do next."""

    exit_code = 1

    def __init__(self, message: str, *, place: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.place = place
        self.remedy = remedy

    def __str__(self) -> str:
        where = f" ({self.place})" if self.place else ""
        next_step = f" {self.remedy}" if self.remedy else ""
        end = "" if self.message.endswith(("?", "!")) and not where else "."
        return f"{self.message.rstrip('.')}{where}{end}{next_step}"

    def to_dict(self) -> dict[str, Any]:
        return {"type": type(self).__name__, "message": self.message, "place": self.place, "remedy": self.remedy}


class ConfigError(GiongError, ValueError):
    """A setting in giong.yaml, on the command line or in Python is unknown, misspelt or impossible."""

    exit_code = 2


class DataError(GiongError, ValueError):
    """The writing given cannot be used as it is."""

    exit_code = 3


class ModelError(GiongError, ValueError):
    """A model cannot be loaded, or not safely (pickle weights, remote code)."""

    exit_code = 4


class TeacherError(GiongError, RuntimeError):
    """A remote model refused, timed out or answered something unusable, after the retries."""

    exit_code = 5
    permanent = False
    """Whether every further request would fail alike (a refused key, an unknown model), so that asking on is pointless."""
    answered = False
    """Whether the model did answer (and may have charged), but with nothing usable."""


class SpendCapReached(TeacherError):
    """The next request could cost more than is left of `budget.max_usd`. Nothing answered is lost."""

    exit_code = 6


class ResourceError(GiongError, OSError):
    """The machine refused: disk, permission, memory or port."""

    exit_code = 7

    # OSError has its own __str__ and __init__ conventions; ours win.
    def __str__(self) -> str:
        return GiongError.__str__(self)


class ServingError(GiongError, RuntimeError):
    """The model process is gone, or a request named a model that is not served."""

    exit_code = 8


class StoryError(GiongError, RuntimeError):
    """A step was asked for before the step whose results it reads."""

    exit_code = 9


class TrainingError(GiongError, RuntimeError):
    """A run is worthless (nothing moves) or has left the numbers (not finite, diverged). What it had learnt before is on disk."""

    exit_code = 10


class Interrupted(GiongError):
    """Ctrl-C or SIGTERM. Raised at the next safe point; finished work is on disk."""

    exit_code = 130


ERRORS: dict[str, type[GiongError]] = {
    error.__name__: error
    for error in (
        GiongError, ConfigError, DataError, ModelError, TeacherError, SpendCapReached, ResourceError, ServingError,
        StoryError, TrainingError, Interrupted,
    )
}  # fmt: skip


def from_dict(record: dict[str, Any]) -> GiongError:
    """Rebuild an error that came through an event stream; an unknown type becomes the base class."""
    error = ERRORS.get(record.get("type", ""), GiongError)
    return error(record.get("message", ""), place=record.get("place", ""), remedy=record.get("remedy", ""))
