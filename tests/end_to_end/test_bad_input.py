"""Bad input through the real command line: one sentence with the place and the remedy, the documented exit code, nothing lost.

Every case runs `python -m giong` as a process; where the cause can be removed, the same command then goes on. That a request
for a model that is not served is a 404 in OpenAI's shape is shown in test_serve.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small_writing
import yaml
from command_line import Running, eventually, giong
from fake_teacher import Answer, Call, Failure, FakeTeacher, Scripted

from giong import errors
from giong.project import init
from giong.workspace import Project, read_json, read_jsonl

IS_ROOT = os.geteuid() == 0
NUM_DOCUMENTS, PER_DOCUMENT = 6, 4


def make_project(folder: Path, **settings: Any) -> Project:
    """A project on a small author; nothing is done yet."""
    writing = small_writing.write_author(folder / "writing", num_documents=NUM_DOCUMENTS, passages_per_document=PER_DOCUMENT)
    merged = {section: dict(values) for section, values in small_writing.SETTINGS.items()}
    for section, values in settings.items():
        merged[section] = {**merged.get(section, {}), **values} if isinstance(values, dict) else values
    return init(folder / "voice", sources=[writing], settings=merged)


def change(project: Project, **settings: Any) -> None:
    """Settings as `section__key=value`, written into giong.yaml."""
    values = yaml.safe_load(project.config_path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        section, _, key = name.partition("__")
        if key:
            values.setdefault(section, {})[key] = value
        else:
            values[section] = value
    project.config_path.write_text(yaml.safe_dump(values), encoding="utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the journal's: that a step failed is written there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in ("JOURNAL.md", "journal.jsonl"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose writing is imported and whose requests are made (by the stand-in)."""
    project = make_project(tmp_path_factory.mktemp("prepared"))
    giong("run", "--project", project.root, "--steps", "import,synth").worked()
    return project


@pytest.fixture
def project(prepared: Project, tmp_path: Path) -> Project:
    """A copy of the prepared project for one test."""
    shutil.copytree(prepared.root, tmp_path / "voice")
    return Project(tmp_path / "voice")


# Settings


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("modle: giong-tiny\n", [":2)", "Unknown setting `modle`", "Did you mean `model`?"]),
        ("train:\n  seed: 1\n  learnig_rate: 0.1\n", [":4)", "`train.learnig_rate`", "Did you mean `train.learning_rate`?"]),
        ("learning_rate: 0.1\n", [":2)", "Did you mean `train.learning_rate`?"]),
        ("sythesis:\n", [":2)", "Unknown setting `sythesis`", "Did you mean `synthesis`?"]),
        ("zzz: 1\n", [":2)", "Unknown setting `zzz`", "Known here: name, task, model, data"]),
        ("data:\n  min_words: many\n", [":3)", "`data.min_words`", "'many'"]),
        ("data:\n  seed: 1\n  seed: 2\n", [":4)", "`data.seed` stands twice", "the first is in line 3"]),
        ("data: [1, 2\n", ["not valid YAML", ":3)"]),
        ("data: &data {consent: *data}\n", [":2)", "nested too deeply"]),
    ],
)
def test_settings(tmp_path: Path, text: str, parts: list[str]) -> None:
    (tmp_path / "giong.yaml").write_text("name: voice\n" + text, encoding="utf-8")
    giong("import", "--project", tmp_path).refused(errors.ConfigError, str(tmp_path / "giong.yaml"), *parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["giong.yaml"]


def test_settings_that_are_no_text_or_no_name(project: Project) -> None:
    before = contents(project.root)
    project.config_path.write_bytes(b"name: caf\xe9\n")
    giong("import", "--project", project.root).refused(errors.ConfigError, "UTF-8", str(project.config_path))
    project.config_path.write_bytes(before["giong.yaml"])
    change(project, name="a/b")
    giong("synth", "--project", project.root).refused(errors.ConfigError, "'a/b'", "name", str(project.config_path))
    project.config_path.write_bytes(before["giong.yaml"])
    assert "nothing changed" in giong("synth", "--project", project.root).worked().told
    assert contents(project.root) == before


def test_an_empty_section_means_its_defaults(project: Project) -> None:
    with project.config_path.open("a", encoding="utf-8") as stream:
        stream.write("export:\n  # formats: [merged]\n")
    assert "nothing changed" in giong("synth", "--project", project.root).worked().told


# Commands


def test_commands(project: Project, tmp_path: Path) -> None:
    before = contents(project.root)
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    here = ("--project", project.root)
    for arguments, error, parts in (
        (("ls", "--project", nowhere), errors.ConfigError, [str(nowhere), "giong init"]),
        (("run", "--project", nowhere), errors.ConfigError, [str(nowhere), "giong init"]),
        (("run", *here, "--steps", "import,sinth"), errors.ConfigError, ["'sinth'", "import, synth"]),
        (("trian", *here), errors.ConfigError, ["'trian'", "--help"]),
        (("train", *here, "--frce"), errors.ConfigError, ["--frce", "giong train --help"]),
        (("delete", "nobody", "--yes", *here), errors.ConfigError, ["'nobody'", "There are: none"]),
        (("delete", "../writing", "--yes", *here), errors.ConfigError, ["'../writing'"]),
        (("init", tmp_path / "new"), errors.ConfigError, ["--from", "giong init --help"]),
        (("init", project.root, "--from", nowhere), errors.ConfigError, ["already is a project", str(project.config_path)]),
        (("init", tmp_path / "new", "--from", tmp_path / "gone"), errors.ConfigError, [str(tmp_path / "gone"), "--from"]),
        (("chat", *here), errors.DataError, ["no request on standard input"]),
    ):
        giong(*arguments).refused(error, *parts)
    assert contents(project.root) == before
    assert not (tmp_path / "new").exists()


def test_steps_in_the_wrong_order(project: Project) -> None:
    project.examples_path.unlink()
    giong("train", "--project", project.root).refused(errors.StoryError, "no requests", str(project.root), "giong synth")
    project.passages_path.unlink()
    giong("synth", "--project", project.root).refused(errors.StoryError, "imported", str(project.root), "giong import")
    giong("run", "--project", project.root, "--steps", "import,synth").worked()
    # The base's folder is there, but nothing has been tuned.
    giong("eval", "--project", project.root).refused(errors.StoryError, "giong train")


def test_missing_consent_is_said(tmp_path: Path) -> None:
    writing = small_writing.write_author(tmp_path / "writing", num_documents=4)
    asked = giong("init", tmp_path / "voice", "--from", writing).worked()
    assert "data.consent" in asked.told
    given = giong("init", tmp_path / "agreed", "--from", writing, "--author", "A. Writer", "--consent").worked()
    assert "data.consent" not in given.told
    for name, is_said in (("voice", True), ("agreed", False)):
        change(Project(tmp_path / name), data__min_words=12)
        assert ("no consent" in giong("import", "--project", tmp_path / name).worked().told) == is_said


# Writing


def test_too_little_writing(tmp_path: Path) -> None:
    writing = tmp_path / "writing"
    writing.mkdir()
    project = init(tmp_path / "voice", sources=[writing], settings=small_writing.SETTINGS)
    run = ("import", "--project", project.root)
    giong(*run).refused(errors.DataError, "the folder is empty", str(writing), ".md")
    (writing / "noise.txt").write_bytes(bytes(range(256)) * 8)
    giong(*run).refused(errors.DataError, str(writing / "noise.txt"), "binary")
    small_writing.write_author(writing, num_documents=1)
    giong(*run).refused(errors.DataError, "1 document", "note-00.md", "at least 3", "Add documents")
    # What became of the other file can be looked up although the import failed.
    listed = {Path(entry["place"]).name: entry for entry in read_json(project.data / "import_report.json")["files"]["entries"]}
    assert {name: entry["status"] for name, entry in listed.items()} == {"note-00.md": "kept", "noise.txt": "dropped"}
    assert not project.passages_path.exists()
    small_writing.write_author(writing, num_documents=4)
    giong(*run).worked()
    before = contents(project.data)
    shutil.move(writing, tmp_path / "elsewhere")
    giong(*run).refused(errors.DataError, str(writing), "data.paths")
    writing.mkdir()
    giong(*run).refused(errors.DataError, "the folder is empty")
    assert contents(project.data) == before


def test_bad_files_among_good_ones_are_listed_and_the_run_goes_on(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    writing = tmp_path / "writing"
    (writing / "empty.md").write_bytes(b"")
    (writing / "noise.md").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8)
    (writing / "broken.txt").write_bytes("Tôi ngồi ngoài hiên nhìn mưa, và con mèo ngủ. ".encode() * 9 + b"\xc3\x28 cut here \xff\xfe")
    (writing / "picture.png").write_bytes(b"\x89PNG")
    (writing / "rows.jsonl").write_text(json.dumps({"text": "One row is whole."}) + '\n{"text": "torn\n', encoding="utf-8")
    done = giong("import", "--project", project.root).worked()
    assert "data/import_report.json" in done.told
    report = read_json(project.data / "import_report.json")
    entries = {Path(entry["place"]).name: (entry["status"], entry["reason"]) for entry in report["files"]["entries"]}
    assert entries["empty.md"] == ("dropped", "the file is empty (0 bytes)")
    assert entries["noise.md"][0] == "dropped" and "binary" in entries["noise.md"][1]
    assert entries["broken.txt"][0] == "dropped" and "UTF-8 at byte" in entries["broken.txt"][1]
    assert entries["picture.png"] == ("skipped", "unknown kind '.png'")
    assert entries["rows.jsonl:2"][0] == "dropped"
    assert sum(status == "kept" for status, _ in entries.values()) == NUM_DOCUMENTS + 1
    documents = {row["document_id"] for row in read_jsonl(project.passages_path)}
    assert documents == {f"note-{number:02d}.md" for number in range(NUM_DOCUMENTS)}


# Models


def test_models(project: Project, tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    before = contents(project.data)
    good = tiny_folder("gpt2", n_positions=1024)
    for name, spoil, parts in (
        ("missing", lambda folder: shutil.rmtree(folder), ["no model at this path", "giong-tiny"]),
        ("bare", lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], ["no tokenizer", "tokenizer.json"]),
        ("pickled", lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), ["pickle", ".safetensors"]),
        ("torn", lambda folder: (folder / "config.json").write_text('{"model_type": "gp'), ["config.json is not valid JSON"]),
    ):
        folder = tmp_path / name
        shutil.copytree(good, folder)
        spoil(folder)
        change(project, model=str(folder))
        # Found before anything is paid: the whole story is asked for, and nothing of it is begun.
        done = giong("run", "--project", project.root)
        done.refused(errors.ModelError, str(folder), *parts)
        assert "import" not in done.told
    assert contents(project.data) == before


# Teachers


def with_teacher(project: Project, teacher: FakeTeacher, **settings: Any) -> None:
    remote = {"base_url": teacher.base_url, "model": "scribe", "timeout_seconds": 1.0, "max_retries": 0, "concurrency": 2, **settings}
    change(project, synthesis={"source": "teacher", "max_attempts": 2, "teacher": remote})


def rewrite(call: Call) -> str:
    return f"Number {call.number} is reported here in plain terms."


class Changing:
    """A script that can be exchanged while the teacher runs."""

    def __init__(self) -> None:
        self.answer: Callable[[Call], Scripted] = rewrite

    def __call__(self, call: Call) -> Scripted:
        return self.answer(call)


def test_teachers(project: Project) -> None:
    num_passages = len(read_jsonl(project.passages_path))
    before = contents(project.data)
    script = Changing()
    with FakeTeacher(script) as teacher:
        with_teacher(project, teacher)
        for answer, parts in (
            (Failure(401, "bad key"), ["HTTP 401: bad key", "OPENAI_API_KEY"]),
            (Failure(429, headers={"Retry-After": "0"}), ["HTTP 429", "Lower concurrency"]),
            (Failure(500), ["HTTP 500", "what was answered is kept"]),
            (Failure(delay_seconds=1.5), ["did not answer within 1 s", "timeout_seconds"]),
            (Answer(body=b'{"choices": [{'), ["malformed JSON", "OpenAI-compatible"]),
        ):
            script.answer = lambda call, answer=answer: answer
            giong("synth", "--project", project.root).refused(errors.TeacherError, "'scribe'", teacher.base_url, *parts)
            assert {name: content for name, content in contents(project.data).items() if name in before} == before
        # Each failure was noticed after few requests, and now every passage is asked once.
        num_failed = teacher.num_calls
        assert num_failed <= 6 * 4
        script.answer = rewrite
        giong("synth", "--project", project.root).worked()
        assert teacher.num_calls - num_failed == num_passages
        assert {row["source"] for row in read_jsonl(project.examples_path)} == {"scribe"}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (lambda call: call.passage, "the request is the answer itself"),
        (lambda call: "I'm sorry, I can't help with that.", "the teacher refused"),
        (lambda call: Answer(""), "answered with an empty text"),
    ],
)
def test_teachers_that_answer_what_cannot_be_used(project: Project, bad: Callable[[Call], Scripted], reason: str) -> None:
    old = project.examples_path.read_bytes()
    script = Changing()
    with FakeTeacher(script) as teacher:
        with_teacher(project, teacher)
        script.answer = bad
        giong("synth", "--project", project.root).refused(errors.TeacherError, reason)
        assert project.examples_path.read_bytes() == old
        # What was charged is not asked again unless that is allowed.
        change(project, synthesis={**yaml.safe_load(project.config_path.read_text())["synthesis"], "max_attempts": 3})
        script.answer = rewrite
        giong("synth", "--project", project.root).worked()
    answers = {row["id"]: row["text"] for row in read_jsonl(project.passages_path)}
    examples = read_jsonl(project.examples_path)
    assert len(examples) == len(answers)
    assert all(example["answer"] == answers[example["id"].rpartition(":")[0]] for example in examples)


def test_a_passage_that_got_no_answer_is_named_and_asked_by_the_next_run(project: Project) -> None:
    num_passages = len(read_jsonl(project.passages_path))
    script = Changing()
    failed: list[str] = []

    def fail_once_in_a_while(call: Call) -> Scripted:
        if call.number % 5 == 0:
            failed.append(call.passage)
            return Failure(500)
        return rewrite(call)

    with FakeTeacher(script) as teacher:
        with_teacher(project, teacher, concurrency=1)
        script.answer = fail_once_in_a_while
        done = giong("synth", "--project", project.root).worked()
        assert f"{len(failed)} requests got no answer" in done.told
        assert len(read_jsonl(project.examples_path)) == num_passages - len(failed)
        script.answer = rewrite
        giong("synth", "--project", project.root).worked()
        assert [call.passage for call in teacher.calls[num_passages:]] == failed
        assert len(read_jsonl(project.examples_path)) == num_passages
        assert "nothing changed" in giong("synth", "--project", project.root).worked().told


def test_the_spend_cap_stops_cleanly_and_goes_on_when_it_is_raised(project: Project) -> None:
    num_passages = len(read_jsonl(project.passages_path))
    with FakeTeacher(rewrite) as teacher:
        with_teacher(project, teacher, output_usd_per_million_tokens=1000.0, concurrency=1)
        # 50 tokens of answer are $0.05 each, and what may be needed is reserved before.
        change(project, budget__max_usd=1.5)
        giong("synth", "--project", project.root).refused(errors.SpendCapReached, "$1.50", "budget.max_usd", "spend.jsonl")
        answered = teacher.num_calls
        assert 0 < answered < num_passages
        spent = [row["cost_usd"] for row in read_jsonl(project.data / "spend.jsonl")]
        assert spent == pytest.approx([0.05] * answered)
        giong("synth", "--project", project.root).refused(errors.SpendCapReached)
        assert teacher.num_calls == answered
        change(project, budget__max_usd=50.0)
        giong("synth", "--project", project.root).worked()
        assert teacher.num_calls == num_passages
        assert len(read_jsonl(project.examples_path)) == num_passages


def test_a_teacher_without_a_key(project: Project) -> None:
    with FakeTeacher(rewrite) as teacher:
        with_teacher(project, teacher, base_url="https://teacher.invalid/v1", api_key_env="A_KEY_THAT_IS_NOT_SET")
        giong("synth", "--project", project.root).refused(errors.ConfigError, "A_KEY_THAT_IS_NOT_SET", "export")


# The machine


def limit_files(num_bytes: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def without_override() -> None:
    """Let permissions hold for root too, by dropping what overrides them (capabilities 1 and 2 of the bounding set)."""
    if IS_ROOT:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (1, 2):
            if libc.prctl(24, capability, 0, 0, 0):
                os._exit(99)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    try:
        yield
    finally:
        for path in folders:
            path.chmod(0o755)


def test_a_file_that_the_system_refuses(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    giong("import", "--project", project.root, prepare=limit_files(2000)).refused(
        errors.ResourceError, "larger than the system allows", "data"
    )
    assert not project.passages_path.exists()
    giong("import", "--project", project.root).worked()
    before = contents(project.root)
    giong("synth", "--project", project.root, prepare=limit_files(4000)).refused(errors.ResourceError, str(project.examples_path))
    # No step was finished and nothing half-written stays behind.
    assert contents(project.root) == before
    giong("synth", "--project", project.root).worked()


@pytest.mark.skipif(not IS_ROOT or sys.platform != "linux", reason="a small file system can only be mounted by root on Linux")
def test_a_full_disk(prepared: Project, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "giong-test", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        project = Project(disk / "voice")
        project.root.mkdir()
        shutil.copy(prepared.config_path, project.config_path)
        giong("import", "--project", project.root).worked()
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(1024))
        before = contents(project.root)
        giong("synth", "--project", project.root).refused(errors.ResourceError, "The disk is full", str(project.root), "Free some space")
        giong("init", disk / "another", "--from", tmp_path).refused(errors.ResourceError, "The disk is full", str(disk / "another"))
        assert contents(project.root) == before
        filler.unlink()
        giong("synth", "--project", project.root).worked()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="root's override of permissions is dropped as Linux does it")
def test_no_permission(project: Project, tmp_path: Path) -> None:
    before = contents(project.root)
    change(project, data__seed=0, data__min_words=13)
    changed = contents(project.root)
    with read_only(project.root):
        giong("import", "--project", project.root, prepare=without_override).refused(
            errors.ResourceError, "No permission", str(project.root)
        )
        inside = project.root / "inner"
        giong("init", inside, "--from", tmp_path, prepare=without_override).refused(errors.ResourceError, "No permission", str(inside))
    assert contents(project.root) == changed
    project.config_path.write_bytes(before["giong.yaml"])
    project.config_path.chmod(0)
    giong("ls", "--project", project.root, prepare=without_override).worked()
    giong("import", "--project", project.root, prepare=without_override).refused(
        errors.ConfigError, "Permission denied", str(project.config_path)
    )
    project.config_path.chmod(0o644)
    # A file of the author's that may not be read is listed like any other that cannot be used.
    unreadable = Path(yaml.safe_load(before["giong.yaml"])["data"]["paths"][0]) / "private.md"
    try:
        unreadable.write_text("Nobody may read this.", encoding="utf-8")
        unreadable.chmod(0)
        giong("import", "--project", project.root, prepare=without_override).worked()
    finally:
        unreadable.unlink()
    entries = read_json(project.data / "import_report.json")["files"]["entries"]
    assert [(Path(entry["place"]).name, entry["reason"]) for entry in entries if entry["status"] == "dropped"] == [
        ("private.md", "cannot be read: Permission denied")
    ]


def test_a_port_in_use(project: Project) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        giong("serve", "--project", project.root, "--port", str(port)).refused(errors.ResourceError, f"Port {port} is in use", "--port 0")


# Ctrl-C


def test_ctrl_c_while_it_starts(project: Project) -> None:
    # All steps, so that it is not done before the signal arrives, however busy the machine is.
    started = Running("run", "--project", project.root, options=("-X", "importtime")).until("typer.")
    started.interrupted().refused(errors.Interrupted, "Run the same command again")


def test_ctrl_c_during_an_import(tmp_path: Path) -> None:
    writing = small_writing.write_author(tmp_path / "writing", num_documents=600, passages_per_document=8)
    project = init(tmp_path / "voice", sources=[writing], settings=small_writing.SETTINGS)
    started = Running("import", "--project", project.root).until("600 files")
    started.interrupted().refused(errors.Interrupted, "Run the same command again")
    assert not project.passages_path.exists()
    for path in sorted(writing.iterdir())[6:]:
        path.unlink()
    giong("import", "--project", project.root).worked()


def test_ctrl_c_during_a_synthesis(project: Project) -> None:
    num_passages = len(read_jsonl(project.passages_path))
    old = project.examples_path.read_bytes()

    def slowly(call: Call) -> str:
        time.sleep(0.2)
        return rewrite(call)

    with FakeTeacher(slowly) as teacher:
        with_teacher(project, teacher)
        started = Running("synth", "--project", project.root).until("about ")
        eventually(lambda: teacher.num_calls >= 5)
        started.interrupted().refused(errors.Interrupted, "Run the same command again")
        # What was under way was paid and is kept.
        kept = read_jsonl(project.data / "synthesis.jsonl")
        assert 0 < len(kept) == teacher.num_calls < num_passages
        assert project.examples_path.read_bytes() == old
        giong("synth", "--project", project.root).worked()
        assert teacher.num_calls == num_passages


def test_a_second_ctrl_c_does_not_wait_for_a_teacher_that_hangs(project: Project) -> None:
    with FakeTeacher(lambda call: Failure(delay_seconds=60.0)) as teacher:
        with_teacher(project, teacher, timeout_seconds=60.0)
        started = Running("synth", "--project", project.root).until("about ")
        eventually(lambda: teacher.num_calls >= 1)
        os.killpg(started.process.pid, signal.SIGINT)
        started.until("stopping at the next safe point")
        begun = time.monotonic()
        # Long enough for the first to have been noticed.
        time.sleep(1.0)
        started.interrupted().refused(errors.Interrupted, "Run the same command again")
        assert time.monotonic() - begun < 20.0


def test_ctrl_c_while_a_model_is_loaded_for_serving(project: Project, tiny_folder: Callable[..., Path]) -> None:
    change(project, model=str(tiny_folder("gpt2", n_positions=1024)))
    started = Running("serve", "--project", project.root, "--port", "0").until("Loading")
    started.interrupted().refused(errors.Interrupted)


def test_a_training_that_is_interrupted_or_cannot_write_goes_on(project: Project, tiny_folder: Callable[..., Path]) -> None:
    model = {"name_or_path": str(tiny_folder("gpt2", n_positions=1024)), "dtype": "float32"}
    change(project, model=model, train__num_epochs=15, train__save_steps=3)
    before = contents(project.data)
    train = ("train", "--project", project.root)
    started = Running(*train).until("train  ")
    assert any("brings no chat template; giong's plain one is used" in line for line in started.told)
    (run,) = project.list_runs()
    eventually(lambda: any(run.glob("checkpoints/step-*")))
    started.terminated().refused(errors.Interrupted, "Run the same command again")
    checkpoints = contents(run / "checkpoints")
    last_step = int(max(path.name for path in (run / "checkpoints").iterdir()).removeprefix("step-"))
    assert last_step < 15 * 3

    # A checkpoint is larger than this, the other files are not.
    refused = giong(*train, prepare=limit_files(100_000))
    refused.refused(errors.ResourceError, "larger than the system allows", str(run / "checkpoints"))
    assert f"going on from step {last_step} of 45" in refused.told
    assert contents(run / "checkpoints") == checkpoints
    assert contents(project.data) == before
    assert not project.list_models()
