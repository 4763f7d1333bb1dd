"""BERTScore, entailment and style vectors, with tiny random models: what must hold whatever the weights are, and values by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from answered_project import make_answered
from small_voices import background, examples, texts
from tiny_models import save_encoder
from transformers import AutoConfig, AutoModelForSequenceClassification

from giong.config import EvaluationConfig, with_settings
from giong.contracts import Event, Reply
from giong.errors import ConfigError, ModelError
from giong.evaluation.metrics.style import WITNESSES, StyleVerifier, split_background
from giong.evaluation.report.sections import detail_table
from giong.evaluation.report.table import arm_row
from giong.evaluation.results import AUTHOR, ArmOutput
from giong.evaluation.run import evaluate
from giong.generation.learned_measures import BertScore, Entailment, StyleVectors, _f1
from giong.workflow import Story, perform
from giong.workflow.learned import learned_figures, style_vectors
from giong.workspace import Project, write_json

TEXTS = [
    "the kettle sang before anyone asked it to",
    "a cup was found under the tap",
    "rain",
    "the boat and the lamp went to the harbour at night",
]
LABELS = {0: "contradiction", 1: "ENTAILMENT", 2: "neutral"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder("bert", tmp_path_factory.mktemp("learned") / "encoder", num_hidden_layers=4)


@pytest.fixture(scope="module")
def inference_model(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(encoder, tmp_path_factory.mktemp("learned") / "nli")
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(folder, num_labels=3, id2label=LABELS, label2id={name: index for index, name in LABELS.items()})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def test_bertscore_by_hand() -> None:
    both = torch.tensor([True, True])
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    reference = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    # Cosines (0, 1) and (0.8, 0.6): precision (1 + 0.8) / 2, recall (0.8 + 1) / 2.
    assert _f1(text, both, reference, both) == pytest.approx(0.9)
    # A sign of the tokenizer's does not count, and can be matched: precision 1 alone, recall 0.9.
    assert _f1(text, torch.tensor([True, False]), reference, both) == pytest.approx(2 * 0.9 / 1.9)


def test_bertscore_is_highest_for_the_same_text_symmetric_and_free_of_padding(encoder: Path) -> None:
    score = BertScore(encoder, "cpu")
    assert score.layer == 3
    assert score(TEXTS, TEXTS) == pytest.approx(np.ones(4), abs=1e-6)
    ahead, back = score(TEXTS, TEXTS[::-1]), score(TEXTS[::-1], TEXTS)
    assert ahead == pytest.approx(back, abs=1e-6)
    assert ahead.max() < 0.999
    assert [score([text], [other])[0] for text, other in zip(TEXTS, TEXTS[::-1])] == pytest.approx(ahead, abs=1e-5)
    assert score(["", "rain"], ["rain", " "]).tolist() == [0, 0]
    assert score.num_full == 0
    score(["rain " * 5000], ["rain"])
    assert score.num_full == 1


def test_entailment_is_the_models_own_probability_both_ways(inference_model: Path) -> None:
    measure = Entailment(inference_model, "cpu")
    found = measure(TEXTS, TEXTS[::-1])
    assert found == pytest.approx(measure(TEXTS[::-1], TEXTS), abs=1e-6)
    pairs = [measure.tokenizer(*pair, return_tensors="pt") for pair in ((TEXTS[0], TEXTS[3]), (TEXTS[3], TEXTS[0]))]
    with torch.inference_mode():
        by_hand = [float(measure.model(**pair).logits.softmax(-1)[0, 1]) for pair in pairs]
    assert abs(by_hand[0] - by_hand[1]) > 1e-4
    assert found[0] == pytest.approx(sum(by_hand) / 2, abs=1e-5)


def test_style_vectors_are_pooled_as_the_folder_says(encoder: Path, tmp_path: Path) -> None:
    vectors = StyleVectors(encoder, "cpu")
    alone = vectors(TEXTS[2:3])
    assert vectors([*TEXTS, TEXTS[2]])[[2, 4]] == pytest.approx(np.repeat(alone, 2, 0), abs=1e-5)
    with torch.inference_mode():
        states_TD = vectors.model(**vectors.tokenizer(TEXTS[2], return_tensors="pt")).last_hidden_state[0]
    assert alone[0] == pytest.approx(states_TD.mean(0).numpy(), abs=1e-5)
    for mode, place in (("pooling_mode_cls_token", 0), ("pooling_mode_lasttoken", -1)):
        folder = shutil.copytree(encoder, tmp_path / mode)
        write_json(folder / "1_Pooling" / "config.json", {mode: True})
        assert StyleVectors(folder, "cpu")(["x y z", TEXTS[2]])[1] == pytest.approx(states_TD[place].numpy(), abs=1e-5)


def signs(given: list[str]) -> np.ndarray:
    """Vectors by rule: how often the author's own words stand in a text, and that of all others."""
    return np.array([[text.count("So I") + 1.0, text.count("the") + 1.0] for text in given])


def test_vectors_are_a_fifth_witness_on_the_scale_of_the_others() -> None:
    fit, calibration, _ = split_background(background(32), 60)
    verifier = StyleVerifier(signs).fit(texts("author", 100, 40), fit).calibrate(texts("author", 200, 16), calibration)
    scores = verifier.score(texts("author", 300, 8))
    assert list(scores) == [*WITNESSES, "learned", "combined"]
    assert scores["combined"] == pytest.approx(np.mean([scores[name] for name in (*WITNESSES, "learned")], axis=0))
    own, other = (verifier.score(group)["learned"] for group in (texts("author", 200, 16), [t for p in calibration.values() for t in p]))
    assert own.mean() + other.mean() == pytest.approx(0, abs=1e-9)
    assert (own.var() + other.var()) / 2 == pytest.approx(1)


def test_figures_have_intervals_and_stand_beside_chrf() -> None:
    test = examples(3000, 12)
    arms = [ArmOutput("base", [Reply(example.messages[0].content) for example in test])]
    found = evaluate(
        arms, test, texts("author", 1000, 40), texts("author", 2000, 16), background(), EvaluationConfig(num_bootstrap=200), tuned_arms=(),
        learned={"bertscore": {"base": [0.5] * 6 + [0.7] * 6, AUTHOR: [1.0] * 12}}, style_vectors=signs,
    )  # fmt: skip
    interval = found.arm("base").learned["bertscore"]
    assert interval.point == pytest.approx(0.6)
    assert 0.5 <= interval.low < 0.6 < interval.high <= 0.7
    assert "learned" in found.arm("base").style
    shown = found.to_dict()
    assert "chrF++" in (meaning := arm_row(shown["arms"][0]).meaning) and meaning.endswith(", BERTScore F1 0.60")
    header, base, author = detail_table(shown)
    column = header.index("BERTScore F1")
    assert base[column].startswith("0.600 [0.5") and author[column] == "1.000 [1.000 to 1.000]"
    assert "style: learned vectors" in header and "entailment both ways" not in header


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_answered(tmp_path_factory.mktemp("learned") / "voice")


def story_of(project: Project, events: list[Event] | None = None, **settings: object) -> Story:
    story = Story(project, emit=(events if events is not None else []).append)
    story.config = with_settings(story.config, {f"evaluation.{name}": value for name, value in settings.items()})
    return story


def test_named_models_measure_and_others_are_not_missed(project: Project, encoder: Path, inference_model: Path) -> None:
    assert learned_figures(story_of(project), []) == {}
    assert style_vectors(story_of(project)) is None
    events: list[Event] = []
    story = story_of(project, events, bertscore_model=str(encoder), nli_model=str(inference_model), style_model=str(encoder))
    replies = [Reply(example.messages[-1].content) for example in story.test_examples]
    found = learned_figures(story, [ArmOutput("base", replies)])
    assert {name: sorted(arms) for name, arms in found.items()} == {"bertscore": [AUTHOR, "base"], "entailment": [AUTHOR, "base"]}
    assert found["bertscore"][AUTHOR] == pytest.approx(np.ones(8), abs=1e-5)
    assert found["bertscore"]["base"].max() < 0.999
    assert style_vectors(story)(TEXTS).shape == (4, 64)
    # The tiny model reads 512 tokens; two passages in a row are longer. One alone fills them only with some of the vocabularies that
    # training the tiny tokenizer can end in.
    assert any("evaluation.nli_model reads: what is longer was cut" in event.message for event in events)


def test_what_cannot_measure_is_said_before_anything_is_loaded(
    project: Project, encoder: Path, inference_model: Path, tmp_path: Path
) -> None:
    for name in ("bertscore_model", "nli_model", "style_model"):
        with pytest.raises(ConfigError, match=r"There is no model folder 'org/nowhere'") as caught:
            perform(story_of(project, **{name: "org/nowhere"}), ["eval"])
        assert caught.value.place == f"evaluation.{name}"
    with pytest.raises(ConfigError, match="not made for natural language inference: its labels are not named"):
        perform(story_of(project, nli_model=str(encoder)), ["eval"])
    folder = shutil.copytree(inference_model, tmp_path / "headless")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \.safetensors"):
        perform(story_of(project, nli_model=str(folder)), ["eval"])
    # A base with the labels of a classifier and none of its weights.
    shutil.copy(encoder / "model.safetensors", folder)
    assert json.loads((folder / "config.json").read_text())["id2label"]["1"] == "ENTAILMENT"
    with pytest.raises(ModelError, match="The weights of the classifier .* are missing"):
        Entailment(folder, "cpu")
