"""`task: classify` from a file of texts to an exported classifier that plain transformers loads."""

from __future__ import annotations

import json
import random
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import tiny_models
import torch
from serving_here import served
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import giong
from giong.cli.results import show_results
from giong.config import with_settings
from giong.contracts import Event
from giong.errors import ConfigError, StoryError
from giong.workflow import Story, perform
from giong.workspace import Project, read_json, read_jsonl

WORDS = {"calm": "river quiet slow tea field", "cross": "angry shout bang never why", "glad": "sun song laugh gift dance"}


def sentences(num_rows: int) -> list[dict]:
    draw, filler = random.Random(0), ["the", "a", "of", "and", "one", "was", "in", "house"]
    labels = [draw.choice(list(WORDS)) for _ in range(num_rows)]
    texts = [" ".join(draw.choice([*WORDS[label].split(), *filler]) for _ in range(draw.randint(8, 18))) for label in labels]
    return [{"text": text, "label": label, "thread": f"t{n // 3}"} for n, (text, label) in enumerate(zip(texts, labels))]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    root = tmp_path_factory.mktemp("classify")
    rows = root / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, sentences(90))) + "\nnot a row\n", encoding="utf-8")
    settings = {
        "task": "classify", "classify": {"document_field": "thread"}, "method": {"name": "lora", "lora_dropout": 0.0},
        "train": {"num_epochs": 3, "learning_rate": 5e-3, "eval_steps": 10}, "evaluation": {"num_bootstrap": 200},
    }  # fmt: skip
    model = tiny_models.save_encoder("bert", root / "bert")
    return giong.init(root / "moods", sources=[rows], model=str(model), settings=settings)


def test_the_story_of_a_classifier(project: Project, capsys: pytest.CaptureFixture):
    events: list[Event] = []
    perform(Story(project, emit=events.append))
    perform(Story(project, emit=events.append), ["export"])
    notices = [event.message for event in events if event.kind == "notice"]
    assert any("1 rows were left out, first" in notice and "rows.jsonl:91" in notice for notice in notices)
    assert any(event.kind == "checkpoint" and "validation_loss" in event.data for event in events)

    threads = {side: set(Story(project).split.documents(side)) for side in ("train", "calibration", "test")}
    assert not threads["train"] & threads["test"]
    evaluation = read_json(project.root / "evaluation.json")
    figures = {arm["name"]: arm["figures"]["accuracy"] for arm in evaluation["arms"]}
    assert list(figures) == ["majority", "bag_of_words", "fine_tuned"]
    assert figures["fine_tuned"]["low"] > figures["majority"]["point"]
    assert giong.verdict(project).startswith(("train: ", "baseline: "))
    show_results(project)
    assert "fine-tuned" in capsys.readouterr().out
    page = project.report_path.read_text(encoding="utf-8")
    assert evaluation["verdict"]["decision"] in page and "calm" in page

    for fmt in ("adapter", "merged"):
        assert project.step_result(f"export-{fmt}")["parity"]["passed"]
    folder = project.root / "exports" / "moods-merged"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    test = Story(project).split.passages("test", Story(project).passages)
    with torch.no_grad():
        logits = model(**tokenizer([passage.text for passage in test], padding=True, return_tensors="pt")).logits
    ours = np.array([row["scores"] for row in read_jsonl(project.arm_path("fine_tuned"))])
    assert np.allclose(logits.softmax(-1).numpy(), ours, atol=1e-5)
    assert model.config.id2label == {0: "calm", 1: "cross", 2: "glad"}

    again: list[Event] = []
    later = Story(project, emit=again.append)
    # No result depends on it.
    later.config = with_settings(later.config, {"train.max_tokens_per_pack": 512})
    perform(later)
    assert {event.stage for event in again if event.kind == "stage_skipped"} == {
        "import",
        "baseline-majority",
        "baseline-bag_of_words",
        "model",
        "eval",
    }
    assert not [event for event in again if event.kind == "stage_started"]


def test_there_is_nothing_to_serve_before_training(project: Project, tmp_path: Path):
    from giong.engine.step import evaluate_rows
    from giong.serving.process import serve

    empty = giong.init(tmp_path / "empty", settings={"task": "classify", "model": str(project.root.parent / "bert")})
    with pytest.raises(StoryError, match="There is no tuned model to serve yet"):
        serve(empty.root, f"unix:{tmp_path}/model.sock", lambda event: None, evaluate_rows)


def test_a_step_that_a_classifier_has_not_is_refused(project: Project):
    with pytest.raises(ConfigError, match="There is no step 'synth' with task: classify"):
        perform(Story(project), ["synth"])


def test_a_classifier_is_served_with_the_names_of_its_labels(project: Project, tmp_path: Path):
    if not project.arm_path("fine_tuned").is_file():
        perform(Story(project))
    test = Story(project).split.passages("test", Story(project).passages)
    evaluated = [row["scores"] for row in read_jsonl(project.arm_path("fine_tuned"))]
    with served(project, tmp_path) as url, httpx.Client(base_url=url) as client:
        answer = client.post("/v1/classify", json={"model": "moods", "input": [passage.text for passage in test]}).json()
        assert np.allclose([item["probs"] for item in answer["data"]], evaluated, atol=1e-5)
        names = ("calm", "cross", "glad")
        assert [item["label"] for item in answer["data"]] == [names[int(np.argmax(scores))] for scores in evaluated]
        through_openai = openai.OpenAI(base_url=f"{url}/v1", api_key="local").post(
            "/classify", body={"model": "moods", "input": test[0].text}, cast_to=object
        )
        assert through_openai["data"][0]["label"] == answer["data"][0]["label"]  # type: ignore[index]
        assert answer["usage"]["prompt_tokens"] > len(test) and answer["data"][1]["index"] == 1
        assert client.get("/v1/models").json()["data"][0]["x_local"]["task"] == "classify"
        for route, body, status, sentence in (
            ("classify", {"model": "nobody", "input": "a"}, 404, "The model 'nobody' is not served here. Served are: moods."),
            ("classify", {"model": "moods", "input": []}, 400, "input"),
            ("classify", {"model": "moods", "input": [[1, 2]]}, 400, "only texts are taken here, not token ids"),
            ("classify", {"model": "moods", "input": "river " * 600}, 400, "has more tokens than this model's context holds (512)"),
            ("embeddings", {"model": "moods", "input": "a"}, 400, "was made for task classify. Ask /v1/classify instead"),
            ("chat/completions", {"model": "moods", "messages": [{"role": "user", "content": "a"}]}, 400, "label texts"),
        ):
            refused = client.post(f"/v1/{route}", json=body)
            assert (refused.status_code, sentence in refused.json()["error"]["message"]) == (status, True), refused.text
