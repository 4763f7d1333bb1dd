"""What a kill leaves half-written: it is known by its name, swept away, and a folder on its way out comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from giong import workspace
from giong.errors import ResourceError
from giong.workspace import Project, atomic_folder, atomic_write, remove_folder, sweep_leftovers


def killed(code: str, *arguments: Path) -> None:
    """Run code in a process that kills itself."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


KILL_AT_REPLACE = """
import os, signal, sys
from pathlib import Path
from giong.workspace import atomic_folder
folder, number, count, replace = Path(sys.argv[1]), int(sys.argv[2]), 0, os.replace
def counted(*paths):
    global count
    count += 1
    if count == number:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = counted
with atomic_folder(folder) as temporary:
    (temporary / "file").write_text("new")
"""


@pytest.mark.parametrize("number", [1, 2])
def test_a_folder_survives_a_kill_while_it_is_replaced(tmp_path: Path, number: int) -> None:
    folder = tmp_path / "models" / "voice"
    with atomic_folder(folder) as temporary:
        (temporary / "file").write_text("old")
    killed(KILL_AT_REPLACE, folder, Path(str(number)))
    # Before the first renaming it is in place, before the second it is aside.
    assert folder.exists() == (number == 1)
    sweep_leftovers(tmp_path)
    assert (folder / "file").read_text() == "old"
    assert [path.name for path in folder.parent.iterdir()] == ["voice"]


def test_an_aside_folder_that_was_replaced_is_removed(tmp_path: Path) -> None:
    aside = tmp_path / f".voice.abc{workspace.ASIDE}"
    (aside / "voice").mkdir(parents=True)
    (tmp_path / "voice").mkdir()
    (tmp_path / "voice" / "file").write_text("new")
    sweep_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["voice"]
    assert (tmp_path / "voice" / "file").read_text() == "new"


def test_a_folder_comes_back_when_its_successor_cannot_be_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "voice"
    with atomic_folder(folder) as temporary:
        (temporary / "file").write_text("old")
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if str(source).endswith(workspace.PARTIAL):
            raise PermissionError(13, "no", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ResourceError), atomic_folder(folder) as temporary:
        (temporary / "file").write_text("new")
    assert (folder / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["voice"]


def test_only_own_leftovers_are_swept(tmp_path: Path) -> None:
    kept = [
        tmp_path / ".git" / "config",
        tmp_path / "writing" / ".draft.md.partial",
        tmp_path / ".env",
        tmp_path / "data" / "a.giong-partial",
    ]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    killed(
        "import os, signal, sys\nfrom pathlib import Path\nfrom giong.workspace import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as stream:\n    stream.write(b'half')\n    stream.flush()\n    os.kill(os.getpid(), signal.SIGKILL)",
        tmp_path / "data" / "deep" / "rows.jsonl",
    )
    assert len(list((tmp_path / "data" / "deep").iterdir())) == 1
    sweep_leftovers(tmp_path, recursive=False)
    assert len(list((tmp_path / "data" / "deep").iterdir())) == 1
    sweep_leftovers(tmp_path)
    assert list((tmp_path / "data" / "deep").iterdir()) == []
    assert all(path.read_text() == "mine" for path in kept)


def test_removing_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "run" / "inner").mkdir(parents=True)
    with atomic_write(tmp_path / "run" / "inner" / "file", "w") as stream:
        stream.write("x")
    remove_folder(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_one_process_at_a_time_and_a_kill_frees_the_project(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom giong.workspace import Project\n"
        "with Project(sys.argv[1]).claimed():\n    print('claimed', flush=True)\n    time.sleep(60)"
    )
    project = Project(tmp_path)
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == "claimed\n"
            half = tmp_path / f".rows.jsonl.abc{workspace.PARTIAL}"
            half.touch()
            with pytest.raises(ResourceError, match="Another process is working"), project.claimed(wait_seconds=0.2):
                pass
            assert half.exists(), "what another process is writing is not swept"
        finally:
            holder.kill()
    with project.claimed(wait_seconds=0.0):
        assert not half.exists()
    with project.claimed(wait_seconds=0.0):
        pass
