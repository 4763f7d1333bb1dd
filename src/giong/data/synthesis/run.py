"""Asks the teacher for every passage and kind, and keeps every answer the moment it arrives.

The journal holds answers and not verdicts: on resume each is judged again by the settings of the day, so that a stricter
or looser leak limit never pays twice for the same text. Only a real teacher has a journal; the others cost nothing.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from giong.clients import RemoteModel, SpendLedger
from giong.clients.openai_compatible import asking_pool, estimate_tokens, in_order_of_completion
from giong.config.synthesis import SynthesisConfig
from giong.contracts import Emit, Event, Example, Message, OnProgress, Passage, Reply, Sampling
from giong.data.split import Split
from giong.data.synthesis.kinds import KINDS, Kind, strip_wrapping
from giong.data.synthesis.leak import why_rejected
from giong.data.synthesis.recorded import Recorded
from giong.data.synthesis.report import LeftOut, SynthesisReport
from giong.data.synthesis.stand_in import StandIn
from giong.errors import ConfigError, DataError, SpendCapReached, TeacherError
from giong.workspace import append_jsonl, content_hash, mend_torn_end, read_jsonl

MAX_FAILURES_IN_A_ROW = 3
"""A teacher that fails so often with nothing answered in between is down: asking on would only wait."""


NUM_TOLD = 5
"""Passages left out that are named one by one; the report has all."""


class Teacher(Protocol):
    """Anything that answers synthesis tasks: a RemoteModel, a StandIn, a Recorded."""

    name: str

    def ask(self, messages: Sequence[Message], sampling: Sampling) -> Reply: ...


@dataclass(frozen=True, slots=True)
class _Task:
    passage: Passage
    kind: Kind
    key: str


@dataclass(slots=True)
class _Outcome:
    request: str = ""
    reason: str = ""
    num_attempts: int = 0
    num_asked: int = 0
    num_resumed: int = 0
    cost_usd: float = 0.0


def make_teacher(
    config: SynthesisConfig, ledger: SpendLedger | None, passages: Sequence[Passage] = (), root: Path = Path(),
    stopping: threading.Event | None = None,
) -> Teacher:  # fmt: skip
    """The teacher that the settings name; a relative `recorded` is looked for in `root`. `stopping` ends its retries."""
    if config.source == "teacher" and config.teacher is not None:
        if ledger is None:
            raise ConfigError("A teacher needs a spend ledger", place="synthesis.source", remedy="Pass a SpendLedger.")
        return RemoteModel(config.teacher, ledger, purpose="synthesis", sleep=(stopping or threading.Event()).wait)
    if config.source == "recorded" and config.recorded:
        return Recorded(root / config.recorded, passages)
    return StandIn(config.max_shared_words)


def synthesise(
    passages: Sequence[Passage], split: Split, config: SynthesisConfig, *, journal: Path, ledger: SpendLedger | None = None,
    teacher: Teacher | None = None, root: Path = Path(), emit: Emit | None = None, on_progress: OnProgress | None = None,
) -> tuple[list[Example], SynthesisReport]:  # fmt: skip
    """Give every passage of the split a request of each kind; each answer is byte-equal to its passage.

    Raises SpendCapReached (after the answers under way are kept), and TeacherError where the teacher refuses for good, fails
    several times in a row or nothing could be made. Called again with the same journal it goes on where it stopped.
    """
    stopping = threading.Event()
    teacher = teacher or make_teacher(config, ledger, passages, root, stopping)
    remote = config.source == "teacher"
    report = SynthesisReport(teacher.name, num_passages=len(passages))
    tasks = _tasks(passages, split, config, teacher, report)
    asker = _Asker(teacher, config, journal if remote else None, stopping)
    num_threads = config.teacher.concurrency if remote and config.teacher else 1
    outcomes = _ask_all(tasks, asker, num_threads, report, on_progress)
    examples = []
    for task, outcome in zip(tasks, outcomes, strict=True):
        if outcome is None:
            continue
        _count(outcome, report)
        if not outcome.request:
            report.left_out.append(LeftOut(task.passage.id, task.kind.name, outcome.reason, outcome.num_attempts))
            continue
        examples.append(_example(task, outcome.request, split, config, teacher.name))
    if tasks and not examples:
        first = next(left for left in report.left_out if left.num_attempts or left.failed)
        raise TeacherError(
            f"The teacher {teacher.name!r} gave no usable request for any of {len(tasks)}; first: {first.reason}",
            place=first.passage_id,
            remedy="Try another teacher or kind, or a larger synthesis.max_shared_words; to ask this one again, raise max_attempts.",
        )  # fmt: skip
    if emit:
        _tell_left_out(report.left_out, emit)
    for example in examples:
        report.examples_per_kind[example.kind] = report.examples_per_kind.get(example.kind, 0) + 1
    report.num_examples = len(examples)
    return examples, report


def _tell_left_out(left_out: Sequence[LeftOut], emit: Emit) -> None:
    for left in left_out[:NUM_TOLD]:
        emit(Event("notice", "synth", f"{left.passage_id} ({left.kind}) is left out: {left.reason}"))
    if len(left_out) > NUM_TOLD:
        emit(Event("notice", "synth", f"and {len(left_out) - NUM_TOLD} more; all are in data/synthesis_report.json"))


def _tasks(passages: Sequence[Passage], split: Split, config: SynthesisConfig, teacher: Teacher, report: SynthesisReport) -> list[_Task]:
    model = f"{config.teacher.base_url} {config.teacher.model}" if config.source == "teacher" and config.teacher else teacher.name
    tasks = []
    for passage in passages:
        if split.side_of(passage) is None:
            original = split.removed.get(passage.id)
            reason = f"repeats {original}" if original else "is not in the split"
            report.left_out += [LeftOut(passage.id, kind, reason) for kind in config.kinds]
            continue
        for name in dict.fromkeys(config.kinds):
            kind = KINDS[name]
            key = content_hash(passage.text.encode(), name, model, kind.instruction_version(config.language))
            tasks.append(_Task(passage, kind, key))
    return tasks


def _ask_all(
    tasks: Sequence[_Task], asker: _Asker, num_threads: int, report: SynthesisReport, on_progress: OnProgress | None
) -> list[_Outcome | None]:
    """Ask for all tasks; on an error that ends the run, what has not begun is cancelled and what is under way is awaited."""
    outcomes: list[_Outcome | None] = [None] * len(tasks)
    with asking_pool(num_threads, "synthesis") as pool:
        futures: dict[Future[_Outcome], int] = {pool.submit(asker.settle, task): index for index, task in enumerate(tasks)}
        try:
            for future in in_order_of_completion(futures, on_progress):
                task = tasks[futures[future]]
                try:
                    outcomes[futures[future]] = future.result()
                except TeacherError as error:
                    if asker.stop_error:
                        raise asker.stop_error from None
                    num_attempts = asker.max_attempts if error.answered else 0
                    report.left_out.append(LeftOut(task.passage.id, task.kind.name, str(error), num_attempts, failed=not error.answered))
        finally:
            asker.stopping.set()
    return outcomes


def _count(outcome: _Outcome, report: SynthesisReport) -> None:
    report.num_asked += outcome.num_asked
    report.num_resumed += outcome.num_resumed
    report.num_rejected += outcome.num_attempts - (1 if outcome.request else 0)
    report.cost_usd += outcome.cost_usd


def _example(task: _Task, request: str, split: Split, config: SynthesisConfig, source: str) -> Example:
    passage, side = task.passage, split.side_of(task.passage)
    assert side is not None  # such passages were left out when the tasks were made
    return Example(
        id=f"{passage.id}:{task.kind.name}", document_id=passage.document_id, kind=task.kind.name, answer=passage.text, side=side,
        messages=task.kind.training_messages(request, drop_instruction=config.drop_instruction), source=source,
    )  # fmt: skip


class _Asker:
    """Settles one task at a time, from the journal as far as it goes and from the teacher beyond; used by many threads."""

    def __init__(self, teacher: Teacher, config: SynthesisConfig, journal: Path | None, stopping: threading.Event) -> None:
        self._teacher = teacher
        self._config = config
        self._journal = journal
        self.max_attempts = config.max_attempts if config.source == "teacher" else 1
        self.stopping = stopping
        self.stop_error: TeacherError | None = None
        self._failures_in_a_row = 0
        self._lock = threading.Lock()
        self._answered: dict[str, list[dict[str, Any]]] = defaultdict(list)
        if journal is not None and journal.is_file():
            mend_torn_end(journal)
            for number, row in enumerate(read_jsonl(journal), start=1):
                if not isinstance(row, dict) or not {"key", "text", "num_attempts"} <= set(row):
                    raise DataError("Not a line of the synthesis journal", place=f"{journal}:{number}", remedy="Mend or delete that line.")
                self._answered[row["key"]].append(row)

    def settle(self, task: _Task) -> _Outcome:
        """Ask until a request is accepted or the attempts are used up."""
        outcome = _Outcome()
        for row in self._answered.get(task.key, ()):
            outcome.num_attempts += row["num_attempts"]
            outcome.num_resumed += 1
            outcome.cost_usd += row.get("cost_usd", 0.0)
            if self._judge(task, Reply(row["text"], row.get("finish_reason", "stop")), outcome):
                return outcome
        while outcome.num_attempts < self.max_attempts and not self.stopping.is_set():
            try:
                reply = self._teacher.ask(*self._question(task, outcome))
            except TeacherError as error:
                self._note_failure(error)
                if error.answered:
                    # It was asked often enough and may have charged each time: the next run does not begin again.
                    self._keep(task, Reply(""), str(error), num_attempts=self.max_attempts)
                raise
            outcome.num_attempts += 1
            outcome.num_asked += 1
            outcome.cost_usd += reply.cost_usd
            self._failures_in_a_row = 0
            accepted = self._judge(task, reply, outcome)
            self._keep(task, reply, outcome.reason)
            if accepted:
                break
        return outcome

    def _note_failure(self, error: TeacherError) -> None:
        """Stop all threads where asking on is pointless: the key or the money is refused, or nothing is answered any more."""
        with self._lock:
            self._failures_in_a_row += 1
            is_down = self._config.source == "teacher" and self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW
            if self.stop_error is None and (error.permanent or is_down or isinstance(error, SpendCapReached)):
                self.stop_error = error
                self.stopping.set()

    def _question(self, task: _Task, outcome: _Outcome) -> tuple[tuple[Message, ...], Sampling]:
        sterner = ""
        if outcome.reason:
            sterner = (
                f"Your last attempt was rejected: {outcome.reason}. Answer with the result only, keep no phrase of the text, and share at "
                f"most {max(1, self._config.max_shared_words - 3)} words in a row with it."
            )
        # Room for a rewrite of the same length; doubled after each attempt, for answers that were cut off.
        num_tokens = (512 + 2 * estimate_tokens(task.passage.text)) * 2**outcome.num_attempts
        sampling = Sampling(temperature=self._config.temperature, max_new_tokens=num_tokens, seed=outcome.num_attempts)
        return task.kind.teacher_messages(task.passage.text, self._config.language, sterner), sampling

    def _judge(self, task: _Task, reply: Reply, outcome: _Outcome) -> bool:
        """Accept the answer into `outcome`, or note there why not."""
        request = strip_wrapping(reply.text)
        if reply.finish_reason == "length":
            outcome.reason = "the teacher's answer was cut off at the length limit"
        else:
            outcome.reason = why_rejected(request, task.passage.text, self._config.max_shared_words)
        outcome.request = "" if outcome.reason else request
        return not outcome.reason

    def _keep(self, task: _Task, reply: Reply, reason: str, num_attempts: int = 1) -> None:
        if self._journal is None:
            return
        row = {
            "key": task.key, "passage_id": task.passage.id, "kind": task.kind.name, "text": reply.text,
            "finish_reason": reply.finish_reason, "rejected": reason, "num_attempts": num_attempts, "cost_usd": reply.cost_usd,
        }  # fmt: skip
        with self._lock:
            append_jsonl(self._journal, row)
