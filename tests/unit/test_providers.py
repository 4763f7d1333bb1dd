"""The contract of remote fine-tuning on OpenAI's API, against a scripted server: what is sent, what is read, what is never paid twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from fake_provider import FakeJob, FakeProvider, Training
from fake_teacher import Failure

from giong.config import RemoteTrainingConfig, parse
from giong.contracts import Example, Message
from giong.errors import ConfigError, DataError, TeacherError
from giong.providers import PROVIDERS, Job, JobJournal, JobResult, JobState, Metrics, Submitted, outcomes
from giong.providers.openai import OpenAIFineTuning

EXAMPLE = Example("a", "doc", "question", (Message("user", "Schreib über Öl."),), "So ist es.")
CALL = {"type": "function", "id": "c1", "function": {"name": "look_up", "arguments": {"word": "Öl"}}}
WITH_TOOL = Example(
    "b", "doc", "chat",
    (Message("user", "Öl?"), Message("assistant", "Hm.", weight=0.0), Message("assistant", "", tool_calls=[CALL]),
     Message("tool", "oil", tool_call_id="c1"), Message("assistant", "Oil.")),
    "", tools=({"type": "function", "function": {"name": "look_up"}},),
)  # fmt: skip
JOB = Job("base-1", (EXAMPLE, WITH_TOOL), (EXAMPLE,), n_epochs=3, seed=7, learning_rate_multiplier=0.5)
LOSSES = (
    {"step": 1, "train_loss": 3.0, "valid_loss": 2.5}, {"step": 2, "train_loss": 2.0, "valid_loss": 9.9},
    {"step": 2, "valid_loss": 2.2, "full_valid_loss": 2.25},
)  # fmt: skip


def at(provider: FakeProvider, **settings: object) -> OpenAIFineTuning:
    given = {"model": "base-1", "training_usd_per_million_tokens": 3.0, "max_retries": 0, **settings}
    return OpenAIFineTuning(RemoteTrainingConfig(base_url=provider.base_url, **given))


def test_the_table_has_every_provider_of_the_settings() -> None:
    assert set(PROVIDERS) == set(get_args(RemoteTrainingConfig.model_fields["provider"].annotation))


def test_a_job_is_sent_as_files_and_settings_and_read_back_as_losses(monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    many = [{"step": step, "train_loss": 1.0} for step in range(3, 260)]
    with FakeProvider(lambda job: Training([*LOSSES, *many], trained_tokens=321)) as server:
        provider = at(server)
        job_id = provider.submit(JOB)
        assert provider.poll(job_id) == JobState("running") and provider.poll(job_id) == JobState("succeeded")
        result = provider.result(job_id)
    (made,) = server.jobs.values()
    assert server.keys == {"Bearer secret"}
    suffix = made.body["suffix"]
    assert suffix == f"giong-{JOB.key[:12]}" and len(suffix) == 18
    assert {name: made.body[name] for name in ("model", "seed", "training_file", "validation_file")} == {
        "model": "base-1", "seed": 7, "training_file": "file-1", "validation_file": "file-2",
    }  # fmt: skip
    assert made.body["method"]["type"] == "supervised"
    # Nothing is said of the batch size, which is left to the provider.
    assert made.hyperparameters == {"n_epochs": 3, "learning_rate_multiplier": 0.5}
    answer = {"messages": [{"role": "user", "content": "Schreib über Öl."}, {"role": "assistant", "content": "So ist es."}]}
    assert made.rows[0] == answer and made.validation == [answer]
    messages = made.rows[1]["messages"]
    assert messages[1] == {"role": "assistant", "content": "Hm.", "weight": 0}
    assert messages[2]["tool_calls"] == [{**CALL, "function": {"name": "look_up", "arguments": '{"word": "Öl"}'}}]
    assert messages[3]["tool_call_id"] == "c1" and "weight" not in messages[4] and made.rows[1]["tools"] == list(WITH_TOOL.tools)
    # The events come in pages of a hundred, newest first.
    assert [row.step for row in result.metrics] == list(range(1, 260))
    assert result.metrics[:2] == (Metrics(1, 3.0, 2.5), Metrics(2, 2.0, 2.2, 2.25))
    assert (result.model, result.num_tokens) == ("ft:ftjob-1", 321)
    assert (result.last("valid_loss"), result.last("full_valid_loss"), result.last("train_loss")) == (2.2, 2.25, 1.0)
    assert JobResult(None, None, (Metrics(1, valid_loss=2.0), Metrics(2, valid_loss=float("nan")))).last("valid_loss") is None


def test_checkpoints_are_read_where_the_events_have_no_loss_of_the_whole_file() -> None:
    metrics = {"train_loss": 2.0, "full_valid_loss": 1.75}
    with FakeProvider(lambda job: Training(LOSSES[:1], checkpoints=[{"step_number": 5, "metrics": metrics}])) as server:
        provider = at(server)
        assert provider.result(provider.submit(JOB)).last("full_valid_loss") == 1.75


def test_a_job_is_made_once_unless_it_ended_badly() -> None:
    with FakeProvider(lambda job: Training(num_polls=99)) as server:
        first = at(server).submit(JOB)
        # Another process, which knows nothing of it.
        assert at(server).submit(JOB) == first and len(server.jobs) == 1
        assert at(server).submit(replace(JOB, seed=8)) != first
        at(server).cancel(first)
        assert at(server).poll(first).status == "cancelled"
        provider = at(server)
        again = provider.submit(JOB)
        assert again not in (first, "ftjob-2")
        uploads = len(server.files)
        provider.submit(replace(JOB, n_epochs=4))
        assert len(server.files) == uploads


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (Failure(401, "bad key"), r"refused a new job \(HTTP 401: bad key\) .* Set OPENAI_API_KEY to a key that may train 'base-1'"),
        (Failure(404, "no such model"), r"HTTP 404: no such model\) .* Check `model` and `base_url`"),
        (Failure(400, "n_epochs too high"), r"n_epochs too high\) .* Change the settings or the rows as it says"),
        (Failure(503, "busy"), r"busy\) .* Wait a little. Run the same command again: if the job was made, it is found"),
        (Failure(drop=True), r"cannot be reached \(asked for a new job: .* if the job was made, it is found"),
    ],
)
def test_a_refusal_says_what_and_what_next_and_is_not_repeated(failure: Failure, expected: str) -> None:
    asked: list[FakeJob] = []

    def refuse(job: FakeJob) -> Failure:
        asked.append(job)
        return failure

    with FakeProvider(refuse) as server, pytest.raises(TeacherError, match=expected) as caught:
        at(server, max_retries=3).submit(JOB)
    assert caught.value.place == server.base_url and len(asked) == 1


def test_openai_itself_is_said_to_close() -> None:
    config = RemoteTrainingConfig(base_url="https://api.openai.com/v1", model="m", training_usd_per_million_tokens=3.0, api_key_env="HOME")
    refused = type("Refused", (), {"status_code": 403})()
    assert "from nobody from 2027-01-06 on" in OpenAIFineTuning(config)._remedy(refused, "")


def test_waiting_asks_less_and_less_often_and_not_for_ever() -> None:
    with FakeProvider(lambda job: Training(num_polls=4 if job.body["seed"] == 7 else 2, status="failed", reason="no good")) as server:
        provider, waits = at(server), []
        ids = [provider.submit(JOB), provider.submit(replace(JOB, seed=8))]
        ended = list(outcomes(provider, ids, sleep=waits.append))
        assert ended == [(ids[1], JobState("failed", "no good")), (ids[0], JobState("failed", "no good"))]
        assert waits == [2.0, 3.0, 4.5, 6.75]
        late = provider.submit(replace(JOB, seed=7, n_epochs=9))
        server.jobs[late].num_polls = -99
        waits.clear()
        with pytest.raises(TeacherError, match=f"{late} had not ended after 120 s .* pays nothing twice"):
            list(outcomes(provider, [late], sleep=waits.append, max_wait_seconds=120))
        assert max(waits) <= 60 and 120 <= sum(waits) < 180


def test_a_wait_outlives_an_outage_and_not_a_refusal() -> None:
    with FakeProvider(lambda job: Training()) as server:
        provider, waits = at(server), []
        job_id = provider.submit(JOB)
        server.failed_polls = [Failure(503), Failure(drop=True), Failure(429)]
        server.jobs[job_id].num_polls = 1
        assert list(outcomes(provider, [job_id], sleep=waits.append)) == [(job_id, JobState("succeeded"))] and len(waits) == 3
        server.failed_polls = [Failure(404, "no such job")]
        with pytest.raises(TeacherError, match="refused the state of ftjob-1 .*no such job"):
            list(outcomes(provider, [job_id], sleep=waits.append))
        server.failed_polls = [Failure(503, "down")] * 99
        with pytest.raises(TeacherError, match="HTTP 503: down"):
            list(outcomes(provider, [job_id], sleep=waits.append))
        assert len(server.failed_polls) == 99 - 21


def test_the_journal_knows_every_job_that_may_still_be_good(tmp_path: Path) -> None:
    path, other = tmp_path / "jobs.jsonl", replace(JOB, seed=8)
    journal = JobJournal(path, "http://here")
    journal.submitted(JOB, Submitted("ftjob-1", 100, 0.5))
    journal.submitted(other, Submitted("ftjob-2", 100, 0.5))
    result = JobResult("ft:1", 90, (Metrics(3, 2.0, None, 1.5),))
    journal.succeeded(JOB, result, 90, 0.45)
    journal.ended_badly(other, JobState("failed", "no good"))
    with path.open("a") as stream:
        stream.write('{"key": "torn')
    again = JobJournal(path, "http://here")
    assert again.find(JOB) == journal.find(JOB) == Submitted("ftjob-1", 90, 0.45, result)
    assert again.find(other) is None and "no good" in path.read_text()
    assert JobJournal(path, "http://elsewhere").find(JOB) is None
    assert again.find(replace(JOB, examples=(EXAMPLE,))) is None
    path.write_text('{"key": "x"}\n')
    with pytest.raises(DataError, match=r"job journal \(.*jobs.jsonl:1\)"):
        JobJournal(path, "http://here")


REMOTE = {"base_url": "http://127.0.0.1:1/v1", "model": "m", "training_usd_per_million_tokens": 1.0}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sizing": {"pilot_remote": {**REMOTE, "epochs": 3}}}, "Unknown setting `sizing.pilot_remote.epochs`.*pilot_remote.n_epochs"),
        ({"sizing": {"pilot_remote": {"base_url": "x", "model": "m"}}}, "training_usd_per_million_tokens.*required"),
        ({"sizing": {"pilot_remote": REMOTE, "pilot_model": "small"}}, "leave one out"),
        ({"sizing": {"pilot_remote": REMOTE}, "method": {"start_from": "models/x"}}, "pilot_remote cannot go on from method.start_from"),
        ({"sizing": {"pilot_remote": REMOTE}, "objective": {"name": "pretrain"}}, "objective.name pretrain asks for something else"),
        ({"sizing": {"pilot_remote": REMOTE}, "objective": {"loss_on": "all"}}, "objective.loss_on all asks for something else"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse(settings)
