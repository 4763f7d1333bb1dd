"""Pilots at a provider: what is sent and said, that nothing is paid twice, and what becomes of jobs that fail or say nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from end_to_end.test_story import make_project
from fake_provider import FakeJob, FakeProvider, Training

from giong.config import with_settings
from giong.contracts import Event
from giong.errors import ConfigError, DataError, Interrupted, SpendCapReached, TeacherError
from giong.providers import contract
from giong.workflow import Story, perform
from giong.workflow.remote_pilots import NEXT_TO_NOTHING
from giong.workflow.sizing import load_curve
from giong.workspace import Project, read_json, read_jsonl

UNTUNED = 3.0
USD = 1000.0


def loss(num_rows: int) -> float:
    """The provider's model loses 0.4 nats per token by 10 rows, and that for every doubling after."""
    return UNTUNED - 0.4 * math.log2(num_rows / 5)


def trained(job: FakeJob) -> Training:
    value = UNTUNED if job.hyperparameters.get("learning_rate_multiplier") == NEXT_TO_NOTHING else loss(len(job.rows))
    return Training([{"step": 1, "valid_loss": 9.0}, {"step": 9, "train_loss": 1.0, "full_valid_loss": value}], trained_tokens=100)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Story:
    """A project with its requests made; its model is loaded once for all tests."""
    project = make_project(tmp_path_factory.mktemp("remote"), tiny_folder("qwen2", max_position_embeddings=1024))
    story = Story(project)
    perform(story, ["import", "synth"])
    return story


@pytest.fixture
def sized(story: Story, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`sized(base_url)` does the step with pilots there, and gives back what it said; keywords are settings."""
    monkeypatch.setattr(contract, "FIRST_POLL_SECONDS", 0.01)

    def size(
        base_url: str, *, stop: Callable[[], bool] = lambda: False, api_key_env: str = "OPENAI_API_KEY", **sizing: object
    ) -> list[str]:
        events: list[Event] = []
        there = {
            "base_url": base_url,
            "model": "base-1",
            "training_usd_per_million_tokens": USD,
            "max_retries": 0,
            "api_key_env": api_key_env,
        }
        settings = {"pilot_shares": [0.3, 0.6, 1.0], "own_pilot": "none", **sizing}
        budget = {"budget.max_usd": settings.pop("max_usd", 1000.0)}
        train = {"train.num_epochs": 1, "train.batch_rows": 8, "train.learning_rate": 1e-3}
        config = with_settings(story.config, {
            **train, **budget, **{f"sizing.{name}": value for name, value in settings.items()}, "sizing.pilot_remote": there,
        })  # fmt: skip
        walk = Story(story.project, config, emit=events.append, should_stop=stop)
        walk.__dict__["local"] = story.local
        perform(walk, ["size"])
        return [event.message for event in events if event.stage == "size"]

    return size


def spent(project: Project) -> float:
    path = project.data / "spend.jsonl"
    return sum(row["cost_usd"] for row in read_jsonl(path)) if path.is_file() else 0.0


def test_a_budget_or_slice_that_is_too_small_and_a_missing_key_cost_nothing(story: Story, sized: Callable[..., list[str]]) -> None:
    with FakeProvider(trained) as provider:
        with pytest.raises(SpendCapReached, match=r"spend cap of \$0.01"):
            sized(provider.base_url, max_usd=0.01)
        with pytest.raises(DataError, match=r"A pilot of \d rows is too small .* which takes 10 or more"):
            sized(provider.base_url, pilot_shares=[0.1, 0.6, 1.0])
        assert not provider.requests
    with pytest.raises(ConfigError, match="variable NO_SUCH_KEY is not set"):
        sized("https://api.example.org/v1", api_key_env="NO_SUCH_KEY")
    assert spent(story.project) == 0.0


def test_a_killed_step_goes_on_with_its_jobs_and_ends_in_a_curve(story: Story, sized: Callable[..., list[str]]) -> None:
    started = spent(story.project)
    with FakeProvider(lambda job: replace(trained(job), num_polls=3)) as provider:
        with pytest.raises(Interrupted):
            # All jobs are made, and the first question is answered.
            sized(provider.base_url, stop=lambda: "GET fine_tuning/jobs/ftjob-4" in provider.requests, own_pilot="smallest")
        journal = story.project.data / "jobs.jsonl"
        *rest, last = journal.read_text().splitlines(keepends=True)
        assert len(provider.jobs) == 4 == len(rest) + 1
        # As a kill between the provider's answer and the journal would leave it: the job is found there, and its money counted twice.
        journal.write_text("".join(rest))
        said = sized(provider.base_url, own_pilot="smallest")
        assert len(provider.jobs) == 4 and provider.requests.count("POST fine_tuning/jobs") == 4
        num_requests = len(provider.requests)
        assert sized(provider.base_url, own_pilot="smallest") == ["nothing changed"] and len(provider.requests) == num_requests
    untuned, *pilots = provider.jobs.values()
    assert (len(untuned.rows), untuned.hyperparameters) == (10, {"n_epochs": 1, "learning_rate_multiplier": NEXT_TO_NOTHING})
    assert all(job.hyperparameters == {"n_epochs": 3} for job in pilots)
    rows = [[row["messages"][-1]["content"] for row in job.rows] for job in pilots]
    assert set(rows[0]) < set(rows[1]) < set(rows[2])
    test = [row["messages"][-1]["content"] for row in untuned.validation]
    assert test == [example.answer for example in story.test_examples] and not set(test) & set(rows[2])
    # Bytes over three are an upper estimate; what each job is charged in the end are the 100 tokens that the provider names.
    estimates = [json.loads(line)["job"]["usd"] for line in (*rest, last)]
    assert min(estimates) > 0.1 and spent(story.project) - started == pytest.approx(4 * 100 * USD / 1e6 + estimates[-1])
    result = story.project.step_result("size")
    assert result["usd"] == pytest.approx(0.4) and len(result["runs"]) == 1
    assert any(f"base-1 at {provider.base_url}: the shape of the curve" in message for message in said)
    # The model's own gain at the smallest slice, and at the others as much more as the provider's model gained there.
    curve = load_curve(story)
    gains = [curve.untuned_nll - nll for _, nll in curve.points]
    assert [num_rows for num_rows, _ in curve.points] == [len(job.rows) for job in pilots]
    expected = [(UNTUNED - loss(len(job.rows))) / (UNTUNED - loss(len(pilots[0].rows))) for job in pilots]
    assert [gain / gains[0] for gain in gains] == pytest.approx(expected)
    assert gains[0] > 0 and not curve.forecast(2 * curve.largest).speculative


def test_a_job_that_failed_is_said_and_alone_made_again(story: Story, sized: Callable[..., list[str]]) -> None:
    before = spent(story.project)

    def fails_once(job: FakeJob) -> Training:
        return Training(status="failed", reason="the file has a bad row 7") if job.id == "ftjob-2" else trained(job)

    with FakeProvider(fails_once) as provider:
        with pytest.raises(TeacherError, match=r"pilot on 10 rows \(ftjob-2\) failed: the file has a bad row 7 .* submitted again"):
            sized(provider.base_url)
        said = sized(provider.base_url)
        assert len(provider.jobs) == 5 and provider.jobs["ftjob-5"].rows == provider.jobs["ftjob-2"].rows
        assert any(message.startswith(f"1 training of base-1 at {provider.base_url}, which is sent 35 training rows") for message in said)
    # The one that never took a step is not charged.
    assert spent(story.project) - before == pytest.approx(4 * 100 * USD / 1e6)
    # Without a training of its own the model is taken to lose the same share of its loss.
    curve = load_curve(story)
    for num_rows, nll in curve.points:
        assert nll / curve.untuned_nll == pytest.approx(loss(num_rows) / UNTUNED)
    assert all(row["speculative"] for row in story.project.step_result("size")["forecasts"])


def test_losses_of_a_part_make_a_speculative_curve_and_none_makes_none(story: Story, sized: Callable[..., list[str]]) -> None:
    def part(job: FakeJob) -> Training:
        return Training([{"step": 1, "train_loss": 1.0, "valid_loss": trained(job).metrics[-1]["full_valid_loss"]}])

    with FakeProvider(part) as provider:
        assert any("a part of the held-out text" in message for message in sized(provider.base_url))
    with FakeProvider(lambda job: part(job) if job.id != "ftjob-3" else Training([{"step": 1, "train_loss": 1.0}])) as provider:
        for _ in range(2):
            # Asked again it is not paid again.
            with pytest.raises(TeacherError, match="no validation loss of the pilot on 21 rows"):
                sized(provider.base_url)
        assert len(provider.jobs) == 4
    assert read_json(story.project.root / "steps" / "sizing_detail.json")["transfer"]["partial"]
