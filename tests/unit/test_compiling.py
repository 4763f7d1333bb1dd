"""When a run is compiled, what its record says of it, and that no run needs it: `train.compile` of every task."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch

import giong
import giong.engine.compiled as compiled
import giong.engine.kernel_choice as kernel_choice
import giong.workflow.compiling as compiling
import giong.workflow.row_training as row_training
from giong.contracts import Event
from giong.engine.elementwise import EAGER, kernels
from giong.workflow import Story, perform
from giong.workflow.compiling import AT_FIRST, compiling_of_run, pays_to_compile
from giong.workspace import read_json

WIDTH = 512
LONG, SHORT = 1000.0, 700.0


class Asked:
    """A run that asks: its model, and what was said to its user."""

    def __init__(self, width: int = WIDTH, device: str = "cpu") -> None:
        self.said: list[str] = []
        self.story = SimpleNamespace(notice=lambda stage, message: self.said.append(message))
        self.model = SimpleNamespace(device=torch.device(device), dtype=torch.float32, config=SimpleNamespace(hidden_size=width))

    def __call__(self, wanted: bool | str, earlier: dict | None = None, seconds: float | None = LONG) -> bool | str:
        return compiling_of_run(self.story, "train", self.model, wanted, earlier, seconds=seconds)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine on which compiling works, until a test says otherwise; `trials` counts how often it was tried."""
    state = SimpleNamespace(missing=None, serves=True, trials=0)

    def tried(model: object) -> object:
        state.trials += 1
        return EAGER if state.serves else None

    monkeypatch.setattr(compiling, "missing_to_compile", lambda device: state.missing)
    monkeypatch.setattr(compiling, "compiled_that_serve", tried)
    return state


@pytest.mark.parametrize(
    ("width", "seconds", "pays"),
    [(512, 880, False), (512, 890, True), (64, 890, True), (896, 4500, False), (896, 5100, True), (640, 4500, False), (897, 1e9, False)],
)
def test_it_pays_where_what_was_measured_earns_the_compiling_twice(width: int, seconds: float, pays: bool):
    """By hand: 890 s at +6 % are 50.4 s saved, 5,100 s at +1 % are 50.5 s; 50 are to be earned."""
    assert pays_to_compile(width, seconds) is pays


def test_auto_is_for_long_runs_on_a_cpu(machine: SimpleNamespace):
    assert Asked()("auto") is True
    for asked, seconds in ((Asked(), SHORT), (Asked(), None), (Asked(width=896), LONG), (Asked(device="cuda"), 1e9)):
        assert asked("auto", seconds=seconds) is False
        assert asked.said == []
    assert machine.trials == 1


def test_auto_leaves_passes_side_by_side_alone(machine: SimpleNamespace):
    """They gain more than compiled loops, which cannot be had with them."""
    asked = Asked()
    assert compiling_of_run(asked.story, "train", asked.model, "auto", None, seconds=LONG, num_lanes=2) is False
    assert compiling_of_run(asked.story, "train", asked.model, True, None, seconds=LONG, num_lanes=2) is True
    assert machine.trials == 1


def test_what_is_set_is_done_however_long(machine: SimpleNamespace):
    assert Asked()(True, seconds=None) is True
    assert Asked(width=4096, device="cuda")(True, seconds=SHORT) is True
    assert Asked()(False) is False
    assert machine.trials == 2


def test_what_was_asked_for_and_cannot_be_is_said_once(machine: SimpleNamespace):
    machine.missing = "torch.compile needs a C++ compiler"
    asked = Asked()
    assert asked(True) is False
    assert asked.said == ["torch.compile needs a C++ compiler; this run computes without"]
    assert machine.trials == 0
    machine.missing, machine.serves = None, False
    asked = Asked()
    assert asked(True) is False
    assert len(asked.said) == 2 and "fails here" in asked.said[1] and asked.said[1].endswith("computes without")


@pytest.mark.parametrize("lost", [{"missing": "torch.compile needs a C++ compiler"}, {"serves": False}], ids=["compiler", "trial"])
def test_a_resumed_run_that_can_no_longer_be_compiled_goes_on(machine: SimpleNamespace, lost: dict):
    vars(machine).update(lost)
    asked = Asked()
    assert asked("auto", {"compiled": True}) == AT_FIRST
    assert "goes on without, whose numbers agree to the rounding of float32" in asked.said[-1]
    again, trials = Asked(), machine.trials
    vars(machine).update(missing=None, serves=True)
    assert again("auto", {"compiled": AT_FIRST}) == AT_FIRST
    assert (again.said, machine.trials) == ([], trials)


def test_a_resumed_run_goes_on_as_it_began(machine: SimpleNamespace):
    assert Asked()("auto", {"compiled": True}, seconds=SHORT) is True
    assert Asked()(True, {"compiled": False}) is False
    assert Asked()(True, {"name": "from before there was a choice"}) is False


# ---- in a project ----------------------------------------------------------------------------------------------------


def pairs(path: Path) -> Path:
    draw = random.Random(0)
    topics = ["river field tea quiet", "angry shout bang never", "sun song laugh gift", "stone wall house door", "bread milk salt plate"]
    rows = []
    for index in range(60):
        a, b, c, d = draw.choice(topics).split()
        rows.append(f'{{"anchor": "{a} {index:x} {b}", "positive": "{c} {index} {d}"}}')
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def fails_when_called(function: Callable, **settings: object) -> Callable:
    def call(*given: object) -> object:
        raise RuntimeError("no headers")

    return call


@pytest.mark.parametrize(("wanted", "works"), [(True, True), (True, False), ("auto", True)])
def test_a_task_of_texts_is_compiled_as_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool | str, works: bool):
    """On a decoder of texts. A second training that is killed and cannot be compiled any more goes on without."""
    caches = (compiled.compiled_kernels, kernel_choice._compiled_that_serve)
    for function in caches:
        function.cache_clear()
    monkeypatch.setattr(kernel_choice, "missing_to_compile", lambda device: None)
    monkeypatch.setattr(compiling, "missing_to_compile", lambda device: None)
    monkeypatch.setattr(torch, "compile", (lambda function, **settings: function) if works else fails_when_called)
    used: list[bool] = []
    true_train = row_training.train

    def watched(*given: object, **settings: object) -> object:
        used.append(kernels() is not EAGER)
        return true_train(*given, **settings)

    monkeypatch.setattr(row_training, "train", watched)
    settings = {
        "task": "embed", "embed": {"pooling": "last"}, "method": {"name": "norm"},
        "train": {"num_epochs": 1, "compile": wanted},
    }  # fmt: skip
    model = tiny_models.save_model("qwen2", tmp_path / "qwen2")
    project = giong.init(tmp_path / "finder", sources=[pairs(tmp_path / "pairs.jsonl")], model=str(model), settings=settings)
    events: list[Event] = []
    try:
        perform(Story(project, emit=events.append), ["import", "train"])
        run = next(iter(project.list_runs()))
        expected = wanted is True and works
        assert used == [expected]
        assert read_json(run / "run.json")["compiled"] is expected
        assert any("computes without" in event.message for event in events) is (not works)
        if expected:
            for function in caches:
                function.cache_clear()
            monkeypatch.setattr(torch, "compile", fails_when_called)
            (run / "results.json").unlink()
            (project.root / "steps" / "model.json").unlink()
            perform(Story(project, emit=events.append), ["train"])
            assert used == [True, False]
            assert read_json(run / "run.json")["compiled"] == AT_FIRST
            assert any("began with compiled operations" in event.message for event in events)
    finally:
        for function in caches:
            function.cache_clear()
