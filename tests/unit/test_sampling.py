"""What is saved where nothing can be tried: a model whose calibration side has no request."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from giong.config import SamplingConfig
from giong.contracts import Sampling
from giong.workflow import training


@pytest.mark.parametrize("given", [{}, {"temperature": 0.3}])
def test_a_model_without_calibration_requests_is_saved_with_what_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, float]
) -> None:
    """The training is done by then, and would be lost with every run."""
    saved, said = [], []
    run = SimpleNamespace(name="rows-1", artifact=tmp_path, record={"key": "a key"})
    monkeypatch.setattr(training, "plan_run", lambda story, share: run)
    monkeypatch.setattr(training, "perform_run", lambda *given: None)
    monkeypatch.setattr(training, "save_model", lambda story, run, folder, sampling, figures: saved.append((sampling, figures)))
    examples = tmp_path / "examples.jsonl"
    examples.touch()
    config = SimpleNamespace(
        name="voice", train=SimpleNamespace(pseudo=None), sampling=SamplingConfig(**given), data=SimpleNamespace(consent=None)
    )
    project = SimpleNamespace(model_path=lambda name: tmp_path / name, examples_path=examples, finish_step=lambda *given: None)
    story = SimpleNamespace(
        config=config,
        project=project,
        is_current=lambda *given: False,
        examples_of=lambda side: [],
        notice=lambda *told: said.append(told[1]),
    )
    training.train_model(story)
    ((sampling, figures),) = saved
    assert sampling["temperature"] == Sampling(**given).temperature and figures == []
    assert "no calibration request" in said[0]
