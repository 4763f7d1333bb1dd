"""Arms of several models in one project: the base that is tuned, another local base, a remote model; and what they cost."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_teacher import Answer, Call, FakeTeacher
from test_story import giong, make_project

from giong.workspace import read_json, read_jsonl


def prompt_text(call: Call) -> str:
    return call.body["messages"][-1]["content"]


@pytest.fixture(scope="module")
def remote() -> FakeTeacher:
    with FakeTeacher(lambda call: Answer(prompt_text(call), num_prompt_tokens=100, num_completion_tokens=50)) as teacher:
        yield teacher


def prefers_whole_sentences(call: Call) -> str:
    """A judge who sees where a text begins and ends, which is enough to pass the self-test."""
    texts = [re.search(rf"<{place}>\n(.*?)\n</{place}>", prompt_text(call), re.DOTALL).group(1) for place in ("first", "second")]
    first, second = ((text[:1].isupper() + text.rstrip().endswith((".", "!"))) for text in texts)
    return f"VERDICT: {'TIE' if first == second else 1 if first > second else 2}"


def test_local_and_remote_models_are_arms(tmp_path: Path, tiny_folder: Callable[..., Path], remote: FakeTeacher) -> None:
    models = [
        {"name": "other", "name_or_path": str(tiny_folder("llama", max_position_embeddings=1024))},
        {
            "name": "hosted",
            "remote": {
                "base_url": remote.base_url,
                "model": "big",
                "input_usd_per_million_tokens": 1.0,
                "output_usd_per_million_tokens": 2.0,
            },
        },
    ]
    settings = {"baselines": {"arms": ["base", "few_shot"], "models": models}, "synthesis": {"drop_instruction": True}}
    with FakeTeacher(prefers_whole_sentences) as judge:
        settings["evaluation"] = {"judge": {"model": {"base_url": judge.base_url, "model": "judge"}, "arms": ["base@hosted", "author"]}}
        project = make_project(tmp_path, tiny_folder("qwen2", max_position_embeddings=1024), **settings)
        done = giong("--debug", "run", "--project", project.root)
    assert done.returncode == 0, done.stderr
    judged = read_json(project.root / "evaluation.json")["judge"]
    assert judged["passed"]
    assert [row["arms"] for row in judged["pairs"]] == [["base@hosted", "author"]]
    assert judged["num_asked"] == judge.num_calls == 2 * (6 + 6)
    assert "What a language model chose" in project.report_path.read_text(encoding="utf-8")
    arms = {arm["name"]: arm for arm in read_json(project.root / "evaluation.json")["evaluation"]["arms"]}
    assert set(arms) == {"base", "few_shot", "base@other", "few_shot@other", "base@hosted", "few_shot@hosted", "fine_tuned"}
    # An echo keeps all of the request's meaning; and a remote arm cannot score, which is said and not guessed.
    assert arms["base@hosted"]["key_recall"]["point"] == 1.0
    assert arms["base@hosted"]["likelihood"] is None
    local = {name: arms[name]["likelihood"]["bits_per_byte"] for name in ("base", "few_shot", "base@other", "few_shot@other", "fine_tuned")}
    # The same answers under other prompts and weights: five different likelihoods.
    assert len(set(local.values())) == 5
    assert arms["base"]["likelihood"]["gain_nats_per_token"]["point"] == 0.0
    assert "few-shot (hosted)" in done.stdout
    assert "not available" in project.report_path.read_text(encoding="utf-8")
    costs = read_jsonl(project.data / "spend.jsonl")
    assert sum(row["purpose"] == "judge" for row in costs) == judge.num_calls
    assert sum(row["cost_usd"] for row in costs) == pytest.approx(12 * (100 * 1.0 + 50 * 2.0) / 1e6)
    # The instruction was left out: what the model is asked is the bare content, for every arm alike.
    example = read_jsonl(project.examples_path)[0]
    assert len(example["messages"]) == 1
    assert not example["messages"][0]["content"].startswith("Rewrite")
    shots = [len(call.body["messages"]) for call in remote.calls]
    assert sorted(set(shots)) == [1, 3]
    # Without likelihoods the arms are answered anew: the remote ones from their journal, and no old likelihood is left to be read.
    likelihoods = {path.name for path in (project.root / "arms").glob("likelihood-*")}
    assert likelihoods == {f"likelihood-{name}.jsonl" for name in ("base", "few_shot", "base@other", "few_shot@other")}
    calls = len(remote.calls)
    text = project.config_path.read_text(encoding="utf-8")
    project.config_path.write_text(text.replace("baselines:\n", "baselines:\n  likelihood: false\n", 1), encoding="utf-8")
    done = giong("baseline", "--project", project.root)
    assert done.returncode == 0, done.stderr
    assert len(remote.calls) == calls
    assert {path.name for path in (project.root / "arms").glob("likelihood-*")} == {"likelihood-base.jsonl", "likelihood-base@other.jsonl"}


def test_doctor_says_what_is_there() -> None:
    done = giong("doctor")
    assert done.returncode == 0, done.stderr
    assert "ok        torch" in done.stdout
    assert "fastest   cpu" in done.stdout
    assert "GFLOP/s" in done.stdout
