"""Options against the risks and pseudo-answers in a whole (tiny) project: what is on, what is recorded, what is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from end_to_end.test_story import make_project

import giong.engine.kernel_choice as kernel_choice
from giong.config import with_settings
from giong.contracts import Event, Example, Message, Reply
from giong.engine.compiled import compiled_kernels
from giong.engine.loop import train
from giong.errors import DataError, Interrupted
from giong.evaluation.gates import CollapseBand
from giong.evaluation.metrics.text import CorpusIndex
from giong.models.rows import Row
from giong.workflow import Story, perform
from giong.workflow.compiling import AT_FIRST
from giong.workflow.pseudo import AnswerLimits, read_requests
from giong.workflow.replay import replay_rows
from giong.workflow.training import OPTIONS, perform_run, plan_run, rows_of
from giong.workspace import Project, content_hash, read_json, read_jsonl, write_json, write_jsonl


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Project:
    """A project with its requests, and nothing trained."""
    made = make_project(tmp_path_factory.mktemp("options"), tiny_folder("qwen2", max_position_embeddings=1024))
    perform(Story(made), ["import", "synth"])
    return made


def story_of(project: Project, events: list[Event] | None = None, **settings: object) -> Story:
    story = Story(project, emit=(events if events is not None else []).append)
    story.config = with_settings(story.config, {"train.num_epochs": 1, "sampling.temperature": 0.0, **settings})
    return story


def test_options_at_their_defaults_are_not_in_the_record(project: Project):
    record = plan_run(story_of(project), 1.0).record
    assert not {*OPTIONS, "pseudo"} & set(record["settings"]["train"])
    assert record["settings"]["objective"] == {"name": "sft"}
    assert "pseudo" not in record


def test_a_run_goes_on_in_the_packs_of_the_day(project: Project):
    """Whoever lowers what did not fit into memory finds the run where it was; and the default's key holds the default."""
    settings = {"train.seed": 3, "train.batch_rows": 4}
    events: list[Event] = []
    later: list[Event] = []
    story = story_of(project, events, **settings)
    story.should_stop = lambda: any(event.kind == "step" and event.data["step"] == 3 for event in events)
    run, smaller = plan_run(story, 1.0), story_of(project, later, **settings, **{"train.max_tokens_per_pack": 256})
    recorded = run.record["settings"]
    keyed = {**recorded, "train": {**recorded["train"], "max_tokens_per_pack": 2048}}
    assert run.record["key"] == content_hash(story.model_identity, run.record["examples_hash"], keyed)
    with pytest.raises(Interrupted):
        perform_run(story, run, "train")
    perform_run(smaller, plan_run(smaller, 1.0), "train")
    assert run.is_finished
    assert [event.data["step"] for event in later if event.kind == "step"] == list(range(4, run.results["num_steps"] + 1))
    assert run.results["max_tokens_per_pack"] == 256


def test_a_run_with_options(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A user's own text for replay, the pull to the base, noise, and a stop: each is in the record and in what was trained."""
    text = tmp_path / "general.txt"
    text.write_text("\n\n".join(f"In the year {year} nothing of note was written about the harbour or its lamps." for year in range(40)))
    events: list[Event] = []
    settings = {
        "replay_share": 0.3, "replay_path": str(text), "kl_weight": 0.1, "neftune_noise_alpha": 5.0, "surprise_weight": 0.5, "eval_steps": 2,
        "early_stopping_patience": 50, "early_stopping_memorisation": 0.9,
    }  # fmt: skip
    story = story_of(project, events, **{f"train.{name}": value for name, value in settings.items()})
    run = plan_run(story, 1.0)
    assert settings.items() <= run.record["settings"]["train"].items()
    assert run.record["key"] != plan_run(story_of(project), 1.0).record["key"]
    trained: list[list[Row]] = []

    def watched(model, parameters, rows, *rest, **others):  # type: ignore[no-untyped-def]
        trained.append(list(rows))
        return train(model, parameters, rows, *rest, **others)

    monkeypatch.setattr("giong.workflow.training.train", watched)
    perform(story, ["train"])
    assert run.is_finished
    steps = [event.data for event in events if event.kind == "step" and event.stage == "train"]
    assert all("kl" in step for step in steps)
    own, _ = rows_of(story, run.examples)
    replayed = replay_rows(story, own)
    (weighed,) = (rows[: len(own)] for rows in trained)
    # Weighed by surprise, as many in sum as before.
    assert all(len(set(row.weights[row.weights > 0].tolist())) > 2 for row in weighed)
    assert sum(row.loss_weight for row in weighed) == pytest.approx(sum(row.loss_weight for row in own), rel=1e-5)
    assert sum(step["num_tokens"] for step in steps) == sum(map(len, [*own, *replayed]))
    own_loss, replayed_loss = (sum(float(row.weights.sum()) for row in rows) for rows in (own, replayed))
    longest = max(map(len, own))
    assert replayed_loss - longest < 0.3 / 0.7 * own_loss <= replayed_loss
    assert max(map(len, replayed)) <= longest
    measured = [event.data for event in events if event.kind == "checkpoint" and "validation_loss" in event.data]
    assert measured and all("memorisation" in each for each in measured)
    text.write_text("Other words altogether, of which there are enough to be read as prose by anyone who cares to.")
    assert plan_run(story, 1.0).record["key"] != run.record["key"]


def test_a_run_goes_on_where_compiling_fails(project: Project, monkeypatch: pytest.MonkeyPatch):
    """Asked for at its start; and recorded by a machine on which it worked, which this one is not."""

    def fails_when_called(function: Callable, **settings: object) -> Callable:
        def call(*given: object) -> object:
            raise RuntimeError("no headers")

        return call

    def forget() -> None:
        kernel_choice._compiled_that_serve.cache_clear()
        compiled_kernels.cache_clear()

    forget()
    monkeypatch.setattr(torch, "compile", fails_when_called)
    events: list[Event] = []
    try:
        story = story_of(project, events, **{"train.compile": True})
        run = plan_run(story, 1.0)
        perform_run(story, run, "train")
        assert run.is_finished
        assert read_json(run.folder / "run.json")["compiled"] is False
        assert any("fails here" in event.message and event.message.endswith("computes without") for event in events)
        (run.folder / "results.json").unlink()
        write_json(run.folder / "run.json", {**run.record, "compiled": True})
        perform_run(story, run, "train")
        assert run.is_finished
        assert read_json(run.folder / "run.json") == {**run.record, "compiled": AT_FIRST}
        assert any("began with compiled operations" in event.message for event in events)
    finally:
        forget()


LIMITS = AnswerLimits(
    CollapseBand(["The kettle sang before anyone asked it to, and I let it."] * 3), CorpusIndex(["I went back for the ladder in the hall on day nine."]),
    0.05, 0.5, frozenset(),
)  # fmt: skip
REQUEST = "The ladder was moved to the harbour at 9 hours."


@pytest.mark.parametrize(
    ("answer", "finish", "confidence", "reason"),
    [
        ("So I took the ladder to the harbour, at 9.", "stop", -0.4, ""),
        ("So I took the ladder to the harbour, at 9.", "stop", -1.2, "confidence"),
        ("So I took the ladder to the harbour, at 9.", "length", -0.4, "end by itself"),
        ("  ", "stop", -0.1, "empty"),
        ("I did. I did. I did. I did. I did. I did. I did. I did. ladder harbour 9", "stop", -0.01, "repeats"),
        ("I went back for the ladder in the hall on day nine.", "stop", -0.01, "training text"),
        ("Nobody knows who painted it, and so it goes with me.", "stop", -0.4, "key items"),
    ],
)
def test_what_is_kept(answer: str, finish: str, confidence: float, reason: str):
    found = LIMITS.why_rejected(Reply(answer, finish), confidence, REQUEST, -1.0)  # type: ignore[arg-type]
    assert reason in found and bool(found) == bool(reason)


def test_rounds_of_pseudo_answers(project: Project, tmp_path: Path):
    """A model that has learned nothing is sure of nothing; what a round has kept is trained on, marked, and not asked for again."""
    requests = tmp_path / "requests.jsonl"
    write_jsonl(requests, [{"request": "The lamp was moved to the attic."}, {"messages": [{"role": "user", "content": "And the boat?"}]}])
    events: list[Event] = []
    story = story_of(project, events, **{"train.pseudo": {"requests": str(requests), "rounds": 2, "min_confidence": -1.0}})
    before = project.examples_path.read_bytes()
    own = plan_run(story, 1.0)
    perform(story, ["train"])
    model = project.model_path(story.config.name) / "model.json"
    assert read_json(model)["run"] == own.name and "pseudo" not in read_json(model)
    (answered,) = own.folder.glob("pseudo-*.jsonl")
    rows = read_jsonl(answered)
    assert len(rows) == 2 and all(row["rejected"] and row["confidence"] < 0 for row in rows)
    write_jsonl(answered, [{**row, "answer": f"I kept it, you know: {index}.", "rejected": ""} for index, row in enumerate(rows)])
    perform(story, ["train"])
    record = read_json(project.run_path(read_json(model)["run"]) / "run.json")
    assert record["pseudo"] == {"num_rows": 2, "answered_by": own.name} == read_json(model)["pseudo"]
    assert record["num_rows"] == own.record["num_rows"] + 2
    assert any("2 of 2 answers are kept" in event.message for event in events)
    assert any("round 2: none of 2 answers was kept" in event.message for event in events)
    assert project.examples_path.read_bytes() == before


def test_requests_that_cannot_be_asked(project: Project, tmp_path: Path):
    path = tmp_path / "requests.jsonl"
    story = story_of(project, **{"train.pseudo": {"requests": str(path)}})
    frozen: Example = story.examples_of("test")[0]
    for row, problem in (
        ({"text": "x"}, "needs a text `request`"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "end with the user's"),
        ({"messages": [{"role": "user", "content": frozen.messages[-1].content}]}, "frozen test or validation side"),
    ):
        write_jsonl(path, [{"request": "fine"}, row])
        with pytest.raises(DataError, match=problem) as caught:
            read_requests(story, story.config.train.pseudo)
        assert caught.value.place == f"{path}:2"
    for settings in ({"train.pseudo": {"requests": "gone.jsonl"}}, {"train.replay_share": 0.1, "train.replay_path": "gone.txt"}):
        with pytest.raises(DataError, match="There is no file or folder 'gone"):
            perform(story_of(project, **settings), ["train"])
    write_jsonl(path, [{"request": "fine"}])
    (asked,) = read_requests(story, story.config.train.pseudo)
    assert asked.messages == (Message("user", "Rewrite the following text in my own voice:\n\nfine"),)
