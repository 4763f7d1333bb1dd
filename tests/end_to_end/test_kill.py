"""SIGKILL at drawn times, then the same command again: the run ends with the same bytes as one that nobody disturbed.

Three kills in every test run; twelve with `make soak`, which writes its result to the file in GIONG_SOAK_RECORD. The seed
of the drawing is printed; GIONG_KILL_SEED sets it.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import killing
import pytest
import small_writing
from fake_teacher import Call, FakeTeacher
from killing import INSIDE, Kill, Timeline, Worker, copy_project, differences, kill_again_and_again, run_to_end

from giong.project import init
from giong.workspace import Project, read_jsonl

SAVE_STEPS = 2


def make_project(folder: Path, model: Path | str, **settings: dict[str, object]) -> Path:
    """A small project that has not begun."""
    changes: dict[str, dict[str, object]] = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "data": {"calibration_share": 0.1},
        "baselines": {"arms": ["base"]},
        "sizing": {"pilot_shares": [0.3, 0.6, 1.0]},
        "train": {"num_epochs": 4, "batch_rows": 4, "save_steps": SAVE_STEPS, "save_seconds": 3600.0},
        "evaluation": {
            "max_requests": 4,
            "num_bootstrap": 100,
            "probes_per_kind": 0,
            "background": str(small_writing.write_background(folder / "voices.jsonl")),
        },
    }
    sections = [*small_writing.SETTINGS, *changes, *settings]
    merged = {
        name: {**small_writing.SETTINGS.get(name, {}), **changes.get(name, {}), **settings.get(name, {})}
        for name in dict.fromkeys(sections)
    }
    return init(folder / "voice", sources=[small_writing.write_author(folder / "writing")], settings=merged).root


class Reference:
    """A project that was run once without a kill, its clock, and copies of it as it was before."""

    def __init__(self, folder: Path, model: Path, steps: str = killing.STEPS, **settings: dict[str, object]) -> None:
        self.folder, self.steps = folder, steps
        self.initial = make_project(folder, model, **settings)
        self.finished = copy_project(self.initial, folder / "reference")
        self.timeline = Timeline(run_to_end(self.finished, steps), SAVE_STEPS)
        written = [moment.step for moment in self.timeline.moments if (moment.kind, moment.stage) == ("checkpoint", "train")]
        assert written[:3] == [SAVE_STEPS, 2 * SAVE_STEPS, 3 * SAVE_STEPS]
        self._num_copies = 0

    def copy(self) -> Path:
        self._num_copies += 1
        return copy_project(self.initial, self.folder / f"killed-{self._num_copies}")

    def kill(self, num: int, seed: int) -> list[Kill]:
        """Kill and finish; asserts that at least half landed inside and that nothing differs in the end."""
        print(f"GIONG_KILL_SEED={seed}; the uninterrupted run took {self.timeline.seconds:.1f} s")
        projects, kills = kill_again_and_again(self.copy, self.timeline, num, random.Random(seed), self.steps)
        assert len(kills) >= num
        assert 2 * sum(kill.landed_in in INSIDE for kill in kills) >= len(kills), kills
        for project in projects:
            assert not differences(self.finished, project), (seed, kills)
        return kills


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Reference:
    return Reference(tmp_path_factory.mktemp("kill"), tiny_folder("qwen2", max_position_embeddings=1024))


def seed_from(default: int) -> int:
    return int(os.environ.get("GIONG_KILL_SEED", default))


def test_three_kills(reference: Reference) -> None:
    reference.kill(3, seed_from(3))


def test_a_difference_is_noticed(reference: Reference, tmp_path: Path) -> None:
    """The comparison itself: one flipped bit, one lost reply, one leftover, one checkpoint cut short."""
    changed = copy_project(reference.finished, tmp_path / "changed")
    assert differences(reference.finished, changed) == []
    adapter = next(changed.glob("models/*/adapter/*.safetensors"))
    content = bytearray(adapter.read_bytes())
    content[-1] ^= 1
    adapter.write_bytes(content)
    answers = changed / "arms" / "base.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:-1]))
    (changed / "data" / ".split.json.x.giong-partial").touch()
    next(changed.glob("runs/*/checkpoints/*")).rename(changed / "gone")
    found = " ".join(differences(reference.finished, changed))
    for part in ("adapter_model.safetensors differs", "base.jsonl differ", ".giong-partial is left over", "has the checkpoints"):
        assert part in found


@pytest.mark.soak
def test_twelve_kills(reference: Reference) -> None:
    seed = seed_from(secrets.randbelow(2**32))
    kills = reference.kill(12, seed)
    if path := os.environ.get("GIONG_SOAK_RECORD"):
        Path(path).write_text(json.dumps(soak_record(reference, seed, kills), indent=1) + "\n", encoding="utf-8")


def soak_record(reference: Reference, seed: int, kills: Sequence[Kill]) -> dict[str, object]:
    """What the last soak found, as it is committed; only a soak that found no difference gets here."""
    return {
        "date": datetime.date.today().isoformat(),
        "seed": seed,
        "result": "the same bytes",
        "num_kills": len(kills),
        "landed_in": dict(Counter(kill.landed_in for kill in kills)),
        "uninterrupted_seconds": round(reference.timeline.seconds, 1),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "peft")}},
        "kills": [asdict(kill) for kill in kills],
    }


def test_full_weights_come_out_the_same(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    model = tiny_folder("llama", max_position_embeddings=1024)
    reference = Reference(tmp_path, model, "import,synth,train", method={"name": "full"})
    reference.kill(1, seed_from(1))
    assert list(reference.finished.glob("models/voice/weights/model.safetensors"))


def test_the_tensors_that_move_come_out_the_same(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    model = tiny_folder("llama", max_position_embeddings=1024)
    reference = Reference(tmp_path, model, "import,synth,train", method={"name": "last_layers", "num_layers": 1, "train_head": True})
    reference.kill(1, seed_from(4))
    assert list(reference.finished.glob("models/voice/partial/partial_model.safetensors"))


def rewrite(call: Call) -> str:
    """A slow teacher's answer, which depends on the passage alone and shares no run of words with it."""
    time.sleep(0.04)
    return f"Something is told about {sum(call.passage.encode())} in one sentence."


def test_what_the_teacher_answered_is_not_asked_again(tmp_path: Path) -> None:
    """Every answer in the journal at a kill is kept; at most what was under way is asked twice."""
    generator = random.Random(seed_from(2))
    concurrency = 3
    with FakeTeacher(rewrite) as teacher:
        synthesis = {
            "source": "teacher",
            "teacher": {"base_url": teacher.base_url, "model": "m", "concurrency": concurrency, "output_usd_per_million_tokens": 1.0},
        }
        reference = make_project(tmp_path, "unused", synthesis=synthesis)
        project = copy_project(reference, tmp_path / "killed")
        run_to_end(reference, "import,synth")
        passages = [row["text"] for row in read_jsonl(Project(reference).passages_path)]
        assert sorted(call.passage for call in teacher.calls) == sorted(passages)
        teacher.calls.clear()

        kept = []
        for share in sorted(generator.uniform(0.1, 0.9) for _ in range(3)):
            kill_when_answered(project, round(share * len(passages)))
            kept.append((teacher.num_calls, answered(project)))
        run_to_end(project, "import,synth")
        for num_calls, texts in kept:
            assert not texts & {call.passage for call in teacher.calls[num_calls:]}
        assert teacher.num_calls <= len(passages) + len(kept) * concurrency
    assert Counter(row["passage_id"] for row in read_jsonl(project / "data" / "synthesis.jsonl")).most_common(1)[0][1] == 1
    assert Project(project).examples_path.read_bytes() == Project(reference).examples_path.read_bytes()


def kill_when_answered(project: Path, num_answers: int) -> None:
    worker = Worker(project, "import,synth")
    journal = project / "data" / "synthesis.jsonl"
    while not journal.is_file() or journal.read_bytes().count(b"\n") < num_answers:
        time.sleep(0.002)
    worker.kill()
    assert worker.end() < 0


def answered(project: Path) -> set[str]:
    """The passages whose answer is whole in the journal."""
    texts = {row["id"]: row["text"] for row in read_jsonl(Project(project).passages_path)}
    lines = (project / "data" / "synthesis.jsonl").read_bytes().splitlines(keepends=True)
    return {texts[json.loads(line)["passage_id"]] for line in lines if line.endswith(b"\n")}
