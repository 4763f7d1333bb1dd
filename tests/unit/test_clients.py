"""RemoteModel against a scripted server, and the spend cap over threads and restarts."""

from __future__ import annotations

import email.utils
import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fake_teacher import Answer, Failure, FakeTeacher

from giong.clients import RemoteModel, SpendLedger
from giong.clients.reply_journal import ReplyJournal
from giong.config import RemoteModelConfig
from giong.contracts import Message, Predictor, Request, Sampling
from giong.errors import ConfigError, DataError, SpendCapReached, TeacherError

ASK = (Message("user", "Say something."),)


@pytest.fixture
def ledger(tmp_path: Path) -> SpendLedger:
    return SpendLedger(tmp_path / "costs.jsonl", max_usd=10.0)


def remote(teacher: FakeTeacher, ledger: SpendLedger, waits: list[float] | None = None, **settings) -> RemoteModel:
    config = RemoteModelConfig(base_url=teacher.base_url, model="writer-1", **{"timeout_seconds": 5, **settings})
    return RemoteModel(config, ledger, sleep=(waits if waits is not None else []).append)


def test_an_answer_carries_its_tokens_and_cost(ledger):
    with FakeTeacher(["Something."]) as teacher:
        model = remote(teacher, ledger, input_usd_per_million_tokens=2.0, output_usd_per_million_tokens=8.0)
        reply = model.ask((Message("system", "Be brief."), *ASK), Sampling(temperature=0.5, top_p=0.9, seed=7, max_new_tokens=33))
    assert (reply.text, reply.finish_reason, reply.num_prompt_tokens, reply.num_completion_tokens) == ("Something.", "stop", 100, 50)
    # 100 tokens at 2 $/M and 50 at 8 $/M
    assert reply.cost_usd == pytest.approx(0.0006, abs=1e-12)
    assert ledger.spent_usd == pytest.approx(0.0006, abs=1e-12)
    assert isinstance(model, Predictor)
    sent = teacher.calls[0]
    assert sent.path == "/v1/chat/completions"
    assert sent.headers["authorization"] == "Bearer local"
    assert {key: sent.body[key] for key in ("model", "temperature", "top_p", "seed", "max_tokens")} == {
        "model": "writer-1", "temperature": 0.5, "top_p": 0.9, "seed": 7, "max_tokens": 33,
    }  # fmt: skip
    assert [message["role"] for message in sent.body["messages"]] == ["system", "user"]
    row = json.loads(ledger.path.read_text())
    assert set(row) == {"time", "model", "num_prompt_tokens", "num_completion_tokens", "cost_usd", "purpose"}


def test_replies_come_in_the_order_of_the_requests_and_run_together(ledger):
    barrier = threading.Barrier(4, timeout=5)

    def script(call):
        barrier.wait()
        number = int(call.user)
        time.sleep(0.02 * (4 - number % 4))
        return f"answer {number}"

    progress = []
    with FakeTeacher(script) as teacher:
        model = remote(teacher, ledger, concurrency=4)
        requests = [Request(str(n), (Message("user", str(n)),)) for n in range(8)]
        replies = model.predict(requests, lambda done, total: progress.append((done, total)))
    assert [reply.text for reply in replies] == [f"answer {n}" for n in range(8)]
    assert progress == [(n, 8) for n in range(1, 9)]


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_passing_failures_are_asked_again(ledger, status):
    waits: list[float] = []
    with FakeTeacher([Failure(status), Failure(status), "At last."]) as teacher:
        assert remote(teacher, ledger, waits).ask(ASK, Sampling()).text == "At last."
    assert teacher.num_calls == 3
    # 0.5 s doubled each time, less at most a quarter
    assert 0.375 <= waits[0] <= 0.5
    assert 0.75 <= waits[1] <= 1.0


def test_retry_after_is_honoured_up_to_a_minute(ledger):
    in_20_seconds = email.utils.formatdate(time.time() + 20, usegmt=True)
    script = [Failure(429, headers={"Retry-After": value}) for value in ("7", "900", in_20_seconds)]
    waits: list[float] = []
    with FakeTeacher([*script, "Fine."]) as teacher:
        remote(teacher, ledger, waits).ask(ASK, Sampling())
    assert waits[:2] == [7.0, 60.0]
    assert 15 < waits[2] <= 20


def test_retries_end_with_one_sentence_that_says_what_to_do(ledger):
    with FakeTeacher([Failure(429, "slow down")]) as teacher, pytest.raises(TeacherError) as caught:
        remote(teacher, ledger, max_retries=2).ask(ASK, Sampling())
    assert teacher.num_calls == 3
    assert "'writer-1' is limiting the rate of requests (HTTP 429: slow down), asked 3 times" in caught.value.message
    assert caught.value.place == teacher.base_url
    assert "Lower concurrency" in caught.value.remedy
    assert not caught.value.permanent


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_fails_at_once_and_names_the_variable(ledger, monkeypatch, status):
    monkeypatch.setenv("WRITER_KEY", "sk-wrong")
    with FakeTeacher([Failure(status, "bad key")]) as teacher, pytest.raises(TeacherError) as caught:
        remote(teacher, ledger, api_key_env="WRITER_KEY").ask(ASK, Sampling())
    assert teacher.num_calls == 1
    assert teacher.calls[0].headers["authorization"] == "Bearer sk-wrong"
    assert "WRITER_KEY" in caught.value.message
    assert f"HTTP {status}: bad key" in caught.value.message
    assert "Set WRITER_KEY" in caught.value.remedy
    assert "sk-wrong" not in str(caught.value)
    assert caught.value.permanent


@pytest.mark.parametrize(("status", "permanent"), [(400, False), (404, True)])
def test_a_refused_request_carries_the_servers_words(ledger, status, permanent):
    with FakeTeacher([Failure(status, "no model called writer-1 here")]) as teacher, pytest.raises(TeacherError) as caught:
        remote(teacher, ledger).ask(ASK, Sampling())
    assert teacher.num_calls == 1
    assert f"HTTP {status}: no model called writer-1 here" in caught.value.message
    assert caught.value.permanent is permanent


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(""), "an empty text"),
        (Answer(" \n"), "an empty text"),
        (Answer(None), "without content"),
        (Answer(choices=[]), "an empty list of choices"),
        (Answer(body=b'{"id": "x"}'), "no chat completion"),
        (Answer(body=b"{broken"), "malformed JSON"),
        (Answer(body=b""), "malformed JSON"),
        (Answer(body=b"<html>proxy</html>", content_type="text/html"), "no chat completion"),
    ],
)
def test_unusable_answers_are_asked_again_and_then_named(ledger, answer, said):
    with FakeTeacher([answer, "Better."]) as teacher:
        assert remote(teacher, ledger).ask(ASK, Sampling()).text == "Better."
    with FakeTeacher([answer]) as teacher, pytest.raises(TeacherError, match=said) as caught:
        remote(teacher, ledger, max_retries=1).ask(ASK, Sampling())
    assert teacher.num_calls == 2
    assert caught.value.place == teacher.base_url
    assert caught.value.remedy


def test_a_time_out_is_asked_again_and_counts_as_charged(ledger):
    with FakeTeacher([Failure(delay_seconds=3), "In time."]) as teacher:
        model = remote(teacher, ledger, timeout_seconds=0.3, output_usd_per_million_tokens=1000.0)
        assert model.ask(ASK, Sampling(max_new_tokens=100)).text == "In time."
    rows = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    # 100 tokens at 1000 $/M that the server may have written, then the 50 that it did
    assert [row["cost_usd"] for row in rows] == pytest.approx([0.1, 0.05], abs=1e-9)
    assert rows[0]["estimated"] is True
    with FakeTeacher([Failure(delay_seconds=3)]) as teacher, pytest.raises(TeacherError, match=r"did not answer within 0\.2 s") as caught:
        remote(teacher, ledger, timeout_seconds=0.2, max_retries=0).ask(ASK, Sampling())
    assert "timeout_seconds" in caught.value.remedy


def test_a_dropped_line_and_a_server_that_is_gone(ledger):
    with FakeTeacher([Failure(drop=True), "Here."]) as teacher:
        assert remote(teacher, ledger).ask(ASK, Sampling()).text == "Here."
    with pytest.raises(TeacherError, match="cannot be reached") as caught:
        remote(teacher, ledger, max_retries=1).ask(ASK, Sampling())
    assert caught.value.place == teacher.base_url
    assert "base_url" in caught.value.remedy


def test_an_answer_cut_by_length_says_so(ledger):
    with FakeTeacher([Answer("And then the", finish_reason="length")]) as teacher:
        reply = remote(teacher, ledger).ask(ASK, Sampling())
    assert (reply.text, reply.finish_reason) == ("And then the", "length")


def test_a_setting_that_the_server_does_not_know_is_left_out(ledger):
    def script(call):
        if "max_tokens" in call.body:
            return Failure(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", param="max_tokens")
        if "temperature" in call.body:
            return Failure(400, "Unsupported value: 'temperature' does not support 0.3", param="temperature")
        return "Fine."

    with FakeTeacher(script) as teacher:
        model = remote(teacher, ledger)
        assert model.ask(ASK, Sampling(temperature=0.3, max_new_tokens=20)).text == "Fine."
        assert model.ask(ASK, Sampling(temperature=0.3, max_new_tokens=20)).text == "Fine."
    assert teacher.num_calls == 4
    assert teacher.calls[-1].body["max_completion_tokens"] == 20
    assert model.refused_settings == {"max_tokens", "temperature"}


def test_a_value_out_of_range_is_not_quietly_left_out(ledger):
    with FakeTeacher([Failure(400, "temperature must be at most 1", param="temperature")]) as teacher, pytest.raises(TeacherError):
        remote(teacher, ledger).ask(ASK, Sampling(temperature=1.5))
    assert teacher.num_calls == 1


def test_a_missing_key_is_a_config_error_except_on_this_machine(ledger, monkeypatch):
    monkeypatch.delenv("WRITER_KEY", raising=False)
    config = RemoteModelConfig(base_url="https://api.example.org/v1", model="writer-1", api_key_env="WRITER_KEY")
    with pytest.raises(ConfigError, match="WRITER_KEY is not set") as caught:
        RemoteModel(config, ledger)
    assert caught.value.place == "https://api.example.org/v1"
    assert "export WRITER_KEY" in caught.value.remedy
    RemoteModel(config.model_copy(update={"base_url": "http://localhost:8000/v1"}), ledger)


def test_usage_that_the_server_does_not_name_is_estimated_from_bytes(ledger):
    with FakeTeacher([Answer("x" * 300, num_prompt_tokens=None)]) as teacher:
        reply = remote(teacher, ledger).ask((Message("user", "y" * 30),), Sampling())
    # three bytes a token, and four tokens for the turn
    assert (reply.num_prompt_tokens, reply.num_completion_tokens) == (14, 100)
    assert json.loads(ledger.path.read_text())["estimated"] is True


def test_the_cap_counts_what_is_spent_reserved_and_asked_for(tmp_path):
    ledger = SpendLedger(tmp_path / "costs.jsonl", max_usd=1.0)
    ledger.record("m", 10, 10, 0.5, "test")
    ledger.reserve(0.3)
    with pytest.raises(SpendCapReached) as caught:
        ledger.reserve(0.25)
    assert "cap of $1.00" in caught.value.message
    assert caught.value.place == str(ledger.path)
    assert "Raise budget.max_usd" in caught.value.remedy
    ledger.reserve(0.2)
    ledger.release(0.2)
    ledger.record("m", 10, 10, 0.1, "test", reserved_usd=0.3)
    ledger.reserve(0.4)
    ledger.reserve(0.0)


def test_a_model_of_ones_own_never_reaches_the_cap(tmp_path):
    ledger = SpendLedger(tmp_path / "costs.jsonl", max_usd=0.0)
    with FakeTeacher(["Free."]) as teacher:
        assert remote(teacher, ledger).ask(ASK, Sampling()).text == "Free."


def test_the_cap_is_held_before_the_request_leaves(tmp_path):
    ledger = SpendLedger(tmp_path / "costs.jsonl", max_usd=0.01)
    with FakeTeacher(["Dear."]) as teacher, pytest.raises(SpendCapReached):
        # 100 tokens at 200 $/M may cost 0.02 $
        remote(teacher, ledger, output_usd_per_million_tokens=200.0).ask(ASK, Sampling(max_new_tokens=100))
    assert teacher.num_calls == 0


def test_a_failed_request_gives_its_reservation_back(tmp_path):
    ledger = SpendLedger(tmp_path / "costs.jsonl", max_usd=0.03)
    with FakeTeacher([Failure(500), Failure(500), "Done."]) as teacher:
        model = remote(teacher, ledger, output_usd_per_million_tokens=200.0)
        # each attempt may cost 0.02 $: kept reservations would stop the second one
        assert model.ask(ASK, Sampling(max_new_tokens=100)).text == "Done."
    ledger.reserve(0.019)


def test_the_total_survives_a_restart_and_a_line_cut_by_a_kill(tmp_path):
    path = tmp_path / "costs.jsonl"
    first = SpendLedger(path, max_usd=1.0)
    first.record("m", 1, 1, 0.25, "test")
    first.record("m", 1, 1, 0.50, "test")
    with path.open("ab") as stream:
        stream.write(b'{"time": 1, "cost_u')
    second = SpendLedger(path, max_usd=1.0)
    assert second.spent_usd == pytest.approx(0.75)
    second.record("m", 1, 1, 0.125, "test")
    assert SpendLedger(path, max_usd=1.0).spent_usd == pytest.approx(0.875)


def test_a_cost_record_that_cannot_be_summed_is_refused(tmp_path):
    path = tmp_path / "costs.jsonl"
    path.write_text('{"cost_usd": 0.1}\n{"model": "m"}\n')
    with pytest.raises(DataError, match="no `cost_usd`") as caught:
        SpendLedger(path, max_usd=1.0)
    assert caught.value.place == f"{path}:2"


def test_many_threads_never_pass_the_cap_together(tmp_path):
    ledger = SpendLedger(tmp_path / "costs.jsonl", max_usd=1.0)
    refused = []

    def spend() -> None:
        for _ in range(5):
            try:
                ledger.reserve(0.1)
            except SpendCapReached:
                refused.append(1)
            else:
                ledger.record("m", 1, 1, 0.1, "test", reserved_usd=0.1)

    threads = [threading.Thread(target=spend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.spent_usd == pytest.approx(1.0)
    assert len(refused) == 10
    assert SpendLedger(ledger.path, max_usd=1.0).spent_usd == pytest.approx(1.0)


# The journal of replies


def test_after_a_failure_only_what_was_not_answered_is_asked(ledger, tmp_path):
    asked = [Request(str(number), (Message("user", f"Say {number}."),)) for number in range(4)]
    path, down = tmp_path / "journal.jsonl", True

    def script(call):
        return Failure(401, "no such key") if down and call.user == "Say 3." else Answer(f"{call.user} Said.")

    with FakeTeacher(script) as teacher:
        config = remote(teacher, ledger, concurrency=1).config
        journalled = lambda: RemoteModel(config, ledger, journal=ReplyJournal(path, config))  # noqa: E731
        with pytest.raises(TeacherError, match="401"):
            journalled().predict(asked)
        # A kill in the middle of a line: what was whole stays, the rest is asked again.
        lines = path.read_text().splitlines()
        path.write_text("\n".join(lines) + "\n" + lines[0][:40])
        down, calls, seen = False, len(teacher.calls), []
        replies = journalled().predict(asked, lambda done, total: seen.append((done, total)))
        assert [call.user for call in teacher.calls[calls:]] == ["Say 3."]
        assert [reply.text for reply in replies] == [f"Say {number}. Said." for number in range(4)]
        assert seen[-1] == (4, 4)
        # Nothing is left to ask; another sampling, or another id, is another question.
        calls = len(teacher.calls)
        assert journalled().predict(asked) == replies
        assert len(teacher.calls) == calls
        journalled().predict([replace(asked[0], sampling=Sampling(temperature=0.7)), replace(asked[0], id="again")])
        assert len(teacher.calls) == calls + 2


def test_a_line_that_is_no_reply_is_named(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"key": "x"}\n')
    with pytest.raises(DataError, match=r"reply journal.*journal\.jsonl:1"):
        ReplyJournal(path, RemoteModelConfig(base_url="http://localhost:1/v1", model="m"))
