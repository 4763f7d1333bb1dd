"""`task: classify` without a model: files to labelled texts, baselines, figures by hand and against scikit-learn, and the verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from giong.baselines.labels import bag_of_words, majority, named_label, prompted, shots_of
from giong.config import ClassifyConfig, DataConfig, parse
from giong.contracts import Reply, Request
from giong.data.labelled import read_labelled
from giong.errors import ConfigError, DataError
from giong.evaluation.metrics.classification import auc, bootstrap_weighted, calibration_error, f1, figures, rank_correlation
from giong.evaluation.task_arms import compare_arms, confusion


def written(tmp_path: Path, rows: Sequence[object], name: str = "rows.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def read(path: Path, **settings: object):  # type: ignore[no-untyped-def]
    return read_labelled([path], DataConfig(), ClassifyConfig(**settings))


def test_rows_become_labelled_texts_and_bad_ones_are_named(tmp_path: Path):
    path = written(
        tmp_path,
        [
            {"text": " It rained. ", "label": "wet", "thread": "t1"}, "{broken", {"text": "", "label": "wet"}, {"text": "No label."},
            {"text": "Sun.", "label": "dry", "id": "mine"}, {"text": "Sun again.", "label": "dry", "id": "mine"}, "[1]",
        ],
    )  # fmt: skip
    found, report = read(path, document_field="thread")
    assert [(p.id, p.document_id, p.text) for p in found.passages] == [("rows.jsonl:1", "t1", "It rained."), ("mine", "mine", "Sun.")]
    assert found.labels == {"rows.jsonl:1": ["wet"], "mine": ["dry"]}
    assert (found.problem, found.names) == ("single_label", ["dry", "wet"])
    dropped = {int(entry.place.rsplit(":", 1)[1]): entry.reason for entry in report.with_status("dropped")}
    assert sorted(dropped) == [2, 3, 4, 6, 7]
    assert "not valid JSON" in dropped[2] and "'text' is empty" in dropped[3] and "'label' is empty" in dropped[4]
    assert "already used" in dropped[6]


def test_the_kind_of_problem_is_read_off_the_labels(tmp_path: Path):
    several = written(tmp_path, [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": "x"}])
    assert (read(several)[0].problem, read(several)[0].labels["rows.jsonl:1"]) == ("multi_label", ["x", "y"])
    values = written(tmp_path, [{"text": "a", "label": 1.5}, {"text": "b", "label": "2"}])
    assert read(values)[0].labels == {"rows.jsonl:1": 1.5, "rows.jsonl:2": 2.0}
    whole = written(tmp_path, [{"text": "a", "label": 1}, {"text": "b", "label": 2}])
    assert (read(whole)[0].problem, read(whole)[0].names) == ("single_label", ["1", "2"])
    table = written(tmp_path, ["text;label", "a;x, y", "b;y"], "rows.csv")
    assert read(table, problem="multi_label")[0].labels == {"rows.csv:2": ["x", "y"], "rows.csv:3": ["y"]}
    _, report = read(
        written(tmp_path, [{"text": "a", "label": 1}, {"text": "b", "label": "two"}, {"text": "c", "label": 3}]), problem="regression"
    )
    assert [entry.reason for entry in report.with_status("dropped")] == ["the label 'two' is no number"]


@pytest.mark.parametrize(
    ("rows", "settings", "sentence"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "yes"}], {"labels": ["x", "yess"]}, r"The label 'yes' is not in classify.labels \(.*rows.jsonl:2\). Did you mean 'yess'\?"),
        ([{"text": "a", "label": 1.5}, {"text": "b", "label": 9}], {"problem": "regression", "value_range": (0, 5)}, r"The value 9 lies outside classify.value_range \[0.0, 5.0\] \(.*:2\)"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], {}, "Every row has the label 'x': there is nothing to tell apart"),
        ([{"text": "a", "label": 2.5}, {"text": "b", "label": 2.5}], {}, "Every row has the value 2.5"),
        ([{"text": "a", "tag": "x"}], {}, r"No field 'label' in rows.jsonl; it has: text, tag \(.*:1\)"),
        ([{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": "x"}], {"problem": "single_label"}, r"A row has 2 labels.*:1\)"),
        (["nothing"], {}, "No usable row was found: .*rows.jsonl:1: not valid JSON"),
    ],
)  # fmt: skip
def test_what_cannot_be_learnt_from_is_one_sentence(tmp_path: Path, rows: list, settings: dict, sentence: str):
    with pytest.raises(DataError, match=sentence):
        read(written(tmp_path, rows), **settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"classify": {"labels": ["one"]}}, "labels needs at least two names"),
        ({"classify": {"labels": ["a", "b"], "problem": "regression"}}, "a regression has no labels"),
        ({"classify": {"value_range": [5, 0]}}, "value_range needs its lower limit first"),
        ({"task": "classify", "train": {"num_processes": 2}}, "train.num_processes is made for task generate alone"),
        ({"task": "clasify"}, "Setting `task`"),
    ],
)
def test_settings_that_cannot_be(settings: dict, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        parse(settings)


# Four texts, three labels. Right are the first, third and fourth.
SCORES = np.array([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.0, 0.9]])
TARGETS = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]], dtype=float)
ONES = np.ones((1, 4))


def test_figures_of_one_label_by_hand():
    """F1 by label: 2/3, 2/3 and 1. Brier: (0.06 + 0.86 + 0.38 + 0.02) / 4. Calibration: gaps 0.2, -0.6, 0.5, 0.1 in four bins."""
    found = {name: float(figure(ONES)[0]) for name, figure in figures(SCORES, TARGETS, "single_label").items()}
    assert found["accuracy"] == pytest.approx(0.75)
    assert found["F1 macro"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert found["Brier score"] == pytest.approx((0.06 + 0.86 + 0.38 + 0.02) / 4)
    assert found["calibration error"] == pytest.approx((0.2 + 0.6 + 0.5 + 0.1) / 4)
    # Labels against the rest: every label's own texts score highest but for the second text, 0.3, below none of the others' 0.1 and 0.0.
    assert found["AUC"] == pytest.approx(1.0)
    assert next(iter(figures(SCORES, TARGETS, "single_label"))) == "accuracy"


def test_two_texts_in_one_bin_share_their_gap():
    """Confidence 0.70 and 0.72 fall into the bin (10/15, 11/15]: one right, one wrong, so |1 - 1.42| / 2. Apart it would be 0.51."""
    assert float(calibration_error(np.array([0.70, 0.72]), np.array([1.0, 0.0]))(np.ones((1, 2)))[0]) == pytest.approx(0.21)


def test_figures_of_several_labels_and_of_values_by_hand():
    """Chosen are {0}, {0}, {}, {2} (a half is not above a half): TP 2, FP 1, FN 2, so micro 4/7."""
    found = {name: float(figure(ONES)[0]) for name, figure in figures(SCORES, TARGETS, "multi_label").items()}
    assert found["F1 micro"] == pytest.approx(4 / 7)
    assert found["F1 macro"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert found["all labels right"] == pytest.approx(0.5)
    values = figures(np.array([[1.0], [2.0], [5.0], [4.0]]), np.array([[1.0], [3.0], [3.0], [4.0]]), "regression")
    assert float(values["mean absolute error"](ONES)[0]) == pytest.approx(0.75)
    assert float(values["root mean squared error"](ONES)[0]) == pytest.approx(np.sqrt(5 / 4))


def test_figures_agree_with_scikit_learn_also_on_a_resample():
    from scipy.stats import spearmanr
    from sklearn.metrics import f1_score, roc_auc_score

    generator = np.random.default_rng(0)
    labels, scores = generator.integers(0, 2, 60), generator.integers(0, 8, 60) / 8
    chosen = (scores > 0.4).astype(int)
    drawn = generator.integers(0, 60, 60)
    weights = np.bincount(drawn, minlength=60)[None].astype(float)
    assert float(auc(scores, labels.astype(float))(weights)[0]) == pytest.approx(roc_auc_score(labels[drawn], scores[drawn]))
    both = [np.stack([1 - side, side], axis=1).astype(float) for side in (chosen, labels)]
    for average in ("micro", "macro"):
        assert float(f1(*both, average)(weights)[0]) == pytest.approx(f1_score(labels[drawn], chosen[drawn], average=average))
    # Planted: weights that are not used give the figure of another sample.
    assert float(auc(scores, labels.astype(float))(np.ones((1, 60)))[0]) != pytest.approx(roc_auc_score(labels[drawn], scores[drawn]))
    assert float(rank_correlation(scores, labels.astype(float))(np.ones((1, 60)))[0]) == pytest.approx(spearmanr(scores, labels).statistic)


def test_intervals_are_drawn_by_document():
    """Eight texts that are right or wrong by document: the interval is as wide as that of two items, not of eight."""
    right = np.array([1.0] * 4 + [0.0] * 4)
    figure = lambda weights: weights @ right / weights.sum(1)  # noqa: E731
    by_document = bootstrap_weighted(figure, ["a"] * 4 + ["b"] * 4, num_bootstrap=500)
    assert (by_document.point, by_document.low, by_document.high) == (0.5, 0.0, 1.0)
    by_text = bootstrap_weighted(figure, list("abcdefgh"), num_bootstrap=500)
    assert by_text.low > 0.0 and by_text.high < 1.0


def test_the_verdict_needs_an_interval_above_nothing():
    generator = np.random.default_rng(0)
    targets = np.eye(2)[generator.integers(0, 2, 200)]
    good, poor = (figures(scores, targets, "single_label") for scores in (0.1 + 0.8 * targets, np.full((200, 2), 0.5)))
    documents = [f"d{number}" for number in range(200)]
    settings = {"tuned": "tuned", "labels": {"bag": "bag of words"}, "num_bootstrap": 200}
    won = compare_arms({"bag": poor, "tuned": good}, documents, **settings)
    assert won["verdict"]["decision"] == "train" and won["gain"]["low"] > 0 and won["best_baseline"] == "bag"
    equal = compare_arms({"bag": good, "tuned": good}, documents, **settings)
    assert equal["verdict"]["decision"] == "baseline" and "holds 0" in equal["verdict"]["reason"]
    lost = compare_arms({"bag": good, "tuned": poor}, documents, **settings)
    assert lost["verdict"]["decision"] == "baseline" and "beats the tuned model" in lost["verdict"]["reason"]
    header, *rows = won["table"]
    assert header[:2] == ["arm", "accuracy"] and rows[0][0] == "bag of words" and rows[1][1] == "1.000 [1.000, 1.000]"
    json.dumps(won)
    assert confusion(SCORES, TARGETS) == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_baselines_without_a_language_model():
    texts = ["rain and wind", "rain again", "sun and heat", "sunny, sun"] * 3
    targets = np.eye(3)[[0, 0, 1, 1] * 3]
    assert majority(targets, 2, "single_label").tolist() == [[0.5, 0.5, 0.0]] * 2
    scores = bag_of_words(texts, targets, ["so much rain", "the sun"], "single_label")
    assert scores.argmax(1).tolist() == [0, 1]
    assert scores[:, 2].tolist() == [0.0, 0.0]
    assert bag_of_words(texts, targets, ["rain", "sun"], "multi_label")[:, :2].argmax(1).tolist() == [0, 1]
    values = bag_of_words(texts, targets[:, :1], ["rain", "sun"], "regression")
    assert values[0, 0] > values[1, 0]
    assert bag_of_words(["..."] * 4, np.eye(2)[[0, 0, 0, 1]], ["!"], "single_label").tolist() == [[0.75, 0.25]]


class Echo:
    """A predictor that answers with the last word of the text; `asked` holds what it was shown."""

    name = "echo"

    def predict(self, requests: Sequence[Request], on_progress: object = None) -> list[Reply]:
        self.asked = list(requests)
        return [Reply(request.messages[-1].content.rsplit(" ", 1)[1]) for request in requests]


def test_a_generator_is_asked_with_examples_of_each_label():
    predictor, names = Echo(), ["dry", "wet"]
    shots = shots_of(["rain falls", "it pours all day long", "sun"], np.eye(2)[[1, 1, 0]], names, 1)
    assert [shot.answer for shot in shots] == names
    scores, num_unknown = prompted(predictor, ["I think wet", "surely Dry", "who knows"], names, shots)
    assert scores.tolist() == [[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]]
    assert num_unknown == 1
    roles = [message.role for message in predictor.asked[0].messages]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert "dry, wet" in predictor.asked[0].messages[0].content


@pytest.mark.parametrize(
    ("answer", "label"),
    [("wet", 1), ("**Dry**.", 0), ("The label is wet", 1), ("dry or wet", None), ("", None), ("wet\nbecause of rain", 1)],
)
def test_the_label_that_an_answer_names(answer: str, label: int | None):
    assert named_label(answer, ["dry", "wet"]) == label
