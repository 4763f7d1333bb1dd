"""The state of one walk through a project: its settings, its event stream, and the base model, loaded once.

Everything that outlives the walk is on disk; what is here can be thrown away at any moment and is made again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from giong.clients.spend import SpendLedger
from giong.config import ProjectConfig, load
from giong.contracts import Emit, Event, Example, OnProgress, Passage, Preference, Side
from giong.data.conversations import Conversation, conversations_from
from giong.data.examples import frozen_test, read_examples
from giong.data.preferences import has_pairs, hold_out, read_preferences, read_ratings
from giong.data.split import Split, load_split
from giong.errors import Interrupted, StoryError
from giong.workspace import Project, content_hash, read_jsonl, safe_name

if TYPE_CHECKING:
    from giong.engine.distributed import Processes
    from giong.generation.local import LocalModel


class Lengths(NamedTuple):
    """Lengths to which packs and rows are rounded in products (`engine.shapes`)."""

    packs: frozenset[int] = frozenset()
    rows: frozenset[int] = frozenset()

    def and_those_of(self, other: Lengths) -> Lengths:
        return Lengths(self.packs | other.packs, self.rows | other.rows)


def ignore(event: Event) -> None:
    """An `Emit` that drops everything."""


class Story:
    """One project being worked on. `emit` gets every event; `should_stop` is asked at safe points.

    `processes` are those that wait to join training runs; None where this process works alone. `met_lengths` are those of the runs that
    this process has made over the base; `is_probed` says that the probe has been asked once, which is as often as `force` repeats it.
    """

    def __init__(
        self,
        project: Project,
        config: ProjectConfig | None = None,
        *,
        emit: Emit = ignore,
        should_stop: Callable[[], bool] = lambda: False,
        force: bool = False,
        processes: Processes | None = None,
    ) -> None:
        self.project = project
        self.config = config or load(project.config_path)
        # It becomes a folder's name: found out now, and not after the training.
        safe_name(self.config.name, f"{project.config_path}: name")
        self.emit = emit
        self.should_stop = should_stop
        self.force = force
        self.processes = processes
        self.probe_step = "probe"
        self.is_probed = False
        self.met_lengths = Lengths()

    def with_model(self, name_or_path: str) -> Story:
        """The same project with another model in the place of its own, probed in a step of its own."""
        model = self.config.model.model_copy(update={"name_or_path": name_or_path})
        found = Story(
            self.project, self.config.model_copy(update={"model": model}), emit=self.emit, should_stop=self.should_stop, force=self.force,
            processes=self.processes,
        )  # fmt: skip
        found.probe_step = "probe-pilots"
        return found

    def notice(self, stage: str, message: str, **data: Any) -> None:
        self.emit(Event("notice", stage, message, data))

    def progress(self, stage: str, unit: str) -> OnProgress:
        """A callback for long calls; it also carries a wish to stop out of them."""

        def on_progress(done: int, total: int) -> None:
            self.emit(Event("progress", stage, data={"done": done, "total": total, "unit": unit}))
            self.check_stop()

        return on_progress

    def check_stop(self) -> None:
        if self.should_stop():
            raise Interrupted("Stopped by request", remedy="Run the same command again to go on.")

    def is_current(self, step: str, key: str) -> bool:
        """Whether a step need not run; says so in the stream."""
        if self.force or not self.project.step_is_current(step, key):
            return False
        self.emit(Event("stage_skipped", step, "nothing changed", self.project.step_result(step) or {}))
        return True

    @cached_property
    def ledger(self) -> SpendLedger:
        return SpendLedger(self.project.data / "spend.jsonl", self.config.budget.max_usd)

    @property
    def passages(self) -> list[Passage]:
        if not self.project.passages_path.is_file():
            raise StoryError("Nothing has been imported yet", place=str(self.project.root), remedy="Run `giong import` first.")
        return [Passage(**row) for row in read_jsonl(self.project.passages_path)]

    @property
    def split(self) -> Split:
        return load_split(self.project.split_path, self.passages)

    def passage_texts(self, side: Side) -> list[str]:
        return [passage.text for passage in self.split.passages(side, self.passages)]

    def check_examples(self) -> None:
        """Raise StoryError before `synth` has made requests."""
        if not self.project.examples_path.is_file():
            raise StoryError("There are no requests yet", place=str(self.project.root), remedy="Run `giong synth` first.")

    @cached_property
    def examples(self) -> list[Example]:
        self.check_examples()
        return read_examples(self.project.examples_path)

    def examples_of(self, side: Side) -> list[Example]:
        """Requests and answers of a side; conversations with tools are not among them."""
        return [example for example in self.examples if example.side == side and example.answer]

    @property
    def training_examples(self) -> list[Example]:
        """All that is trained on, conversations with tools included."""
        return [example for example in self.examples if example.side == "train"]

    @property
    def conversations(self) -> list[Conversation]:
        """The author's own conversations, as imported."""
        path = self.project.conversations_path
        return conversations_from(read_jsonl(path)) if path.is_file() else []

    @cached_property
    def preferences(self) -> dict[Side, list[Any]]:
        """The pairs or ratings of `data.preferences` to learn from and those held out. Raises DataError naming every bad row."""
        return self._preferences(read_ratings if self.config.objective.learns_from == "ratings" else read_preferences)

    @cached_property
    def held_out_pairs(self) -> list[Preference]:
        """The pairs held out, whatever the objective learns from; none where `data.preferences` has none. Raises DataError as `preferences`."""
        given = self.config.data.preferences
        return self._preferences(read_preferences)["calibration"] if given and has_pairs(self._path(given)) else []

    def _preferences(self, read: Callable[[Path], list[Any]]) -> dict[Side, list[Any]]:
        data = self.config.data
        assert data.preferences is not None
        found = read(self._path(data.preferences))
        if data.validation_preferences:
            return {"train": found, "calibration": read(self._path(data.validation_preferences))}
        return hold_out(found, data.calibration_share, data.seed)

    def _path(self, given: str) -> Path:
        return (self.project.root / Path(given).expanduser()).resolve()

    def learnt_from(self, side: Side) -> list[Example] | list[Preference]:
        """What the objective learns from on that side: the author's examples, or pairs of answers."""
        if self.config.objective.learns_from != "examples":
            return self.preferences[side]
        return self.training_examples if side == "train" else self.examples_of(side)

    @property
    def test_examples(self) -> list[Example]:
        """The requests that are measured: `frozen_test` of the project's."""
        return frozen_test(self.examples, self.config, self.project.root)

    @cached_property
    def model_identity(self) -> str:
        from giong.models.load import model_identity

        return model_identity(self.config.model)

    @cached_property
    def local(self) -> LocalModel:
        """The base model that is tuned, in the measured dtype, loaded once."""
        from giong.workflow.probing import load_base

        return load_base(self)


class Stage:
    """A step under way: emits its start and end with the seconds it took."""

    def __init__(self, story: Story, name: str, message: str = "") -> None:
        self.story, self.name, self.message = story, name, message
        self.seconds = 0.0

    def __enter__(self) -> Stage:
        self._started = time.monotonic()
        self.story.check_stop()
        self.story.emit(Event("stage_started", self.name, self.message))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.seconds = time.monotonic() - self._started
        if kind is None:
            self.story.emit(Event("stage_finished", self.name, data={"seconds": self.seconds}))


def examples_hash(examples: Iterable[Example | Preference]) -> str:
    return content_hash(list(examples))
