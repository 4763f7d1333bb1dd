"""The story of `task: embed`: import, baseline, train, eval, report, export. Each step reads and writes the project folder.

The texts (anchors) are passages and split like a writer's; `data/pairs.json` holds what belongs to each. All arms are measured by what
they find: every test text looks for its positive among the positives and negatives of the whole test side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from giong.contracts import Passage, Side
from giong.data.paired import Paired, read_paired
from giong.errors import StoryError
from giong.evaluation.metrics.retrieval import cosines, ranks, retrieval_figures
from giong.evaluation.results import TUNED, finite
from giong.evaluation.task_arms import compare_arms
from giong.workflow.importing_rows import import_rows
from giong.workflow.story import Stage, Story
from giong.workspace import content_hash, read_json, read_jsonl, write_json, write_jsonl

ARM_NAMES = {"bag_of_words": "bag of words", "base": "base, untuned", TUNED: "fine-tuned"}

Vectors = Callable[[list[str]], np.ndarray]
"""Texts (N) to vectors (N, D)."""


class PairedTexts:
    """What `import` left: the texts of each side, each with its positive and its negatives."""

    def __init__(self, story: Story) -> None:
        path = story.project.data / "pairs.json"
        if not path.is_file():
            raise StoryError("Nothing has been imported yet", place=str(story.project.root), remedy="Run `giong import` first.")
        self._story, self._others = story, read_json(path)
        self.key = content_hash(path, story.project.passages_path, story.project.split_path)

    def of(self, side: Side) -> list[tuple[Passage, list[str]]]:
        """The passages of a side with what belongs to each: the positive first."""
        passages = self._story.split.passages(side, self._story.passages)
        return [(passage, self._others[passage.id]) for passage in passages]


def import_pairs(story: Story) -> None:
    """Read the pairs, split them by document, freeze the test side."""
    config = story.config

    def look(found: Paired) -> tuple[dict[str, Any], str]:
        texts = PairedTexts(story)
        known = {others[0] for _, others in texts.of("train")}
        shared = sum(others[0] in known for _, others in texts.of("test"))
        sentence = f"{shared} test texts have a positive that training has seen: set embed.document_field to keep those together"
        return {}, sentence if shared else ""

    import_rows(
        story, config.embed.model_dump(exclude={"temperature", "margin", "pooling"}), lambda paths: read_paired(paths, config.data, config.embed),
        story.project.data / "pairs.json", lambda found: found.others, look,
    )  # fmt: skip


def retrieve_untuned(story: Story) -> None:
    """What a bag of words finds, and the base as it is."""
    from giong.workflow.row_training import load_base, row_outputs

    texts = PairedTexts(story)

    def by_base(wanted: list[str]) -> np.ndarray:
        return row_outputs(load_base(story, {"pooling": story.config.embed.pooling}), wanted)

    for name, vectors in (("bag_of_words", bag_of_words), ("base", by_base)):
        key = content_hash(texts.key, name, story.model_identity if name == "base" else "", story.config.embed.pooling)
        if story.is_current(f"baseline-{name}", key):
            continue
        with Stage(story, f"baseline-{name}", ARM_NAMES[name]) as stage:
            write_found(story, name, texts, vectors)
        story.project.finish_step(
            f"baseline-{name}", key, [story.project.arm_path(name)], {"seconds": stage.seconds, "label": ARM_NAMES[name]}
        )


def bag_of_words(texts: list[str]) -> np.ndarray:
    """Tf-idf over the words of these very texts."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        return TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b").fit_transform(texts).toarray()
    except ValueError:
        # Texts without a word.
        return np.zeros((len(texts), 1))


def write_found(story: Story, arm: str, texts: PairedTexts, vectors: Vectors) -> None:
    """Write the rank of each test text's positive, and by how much it lies nearer than the nearest own negative (None without one)."""
    test = texts.of("test")
    candidates = list(dict.fromkeys(other for _, others in test for other in others))
    place = {text: index for index, text in enumerate(candidates)}
    found = vectors([passage.text for passage, _ in test] + candidates)
    similarity_QM = cosines(found[: len(test)], found[len(test) :])
    rank_Q = ranks(similarity_QM, [place[others[0]] for _, others in test])
    rows = []
    for (passage, others), rank, similarity_M in zip(test, rank_Q, similarity_QM):
        margin = similarity_M[place[others[0]]] - max((similarity_M[place[other]] for other in others[1:]), default=np.nan)
        rows.append({"id": passage.id, "rank": int(rank), "margin": finite(float(margin))})
    write_jsonl(story.project.arm_path(arm), rows)


def train_embedder(story: Story) -> None:
    """Fine-tune the base on the pairs of the training side, by any method."""
    from giong.models.row_model import RowModel, text_rows
    from giong.models.rows import Row
    from giong.objectives import embed
    from giong.workflow.row_training import train_rows

    texts, config = PairedTexts(story), story.config.embed

    def rows_of(loaded: RowModel, side: Side) -> list[Row]:
        pairs = texts.of(side)
        everything = [text for passage, others in pairs for text in (passage.text, *others)]
        names = [passage.id for passage, others in pairs for _ in range(1 + len(others))]
        number = {text: index for index, text in enumerate(dict.fromkeys(everything))}
        roles = [role for _, others in pairs for role in (embed.ANCHOR, embed.POSITIVE, *[embed.NEGATIVE] * (len(others) - 1))]
        rows, cut = text_rows(loaded, everything, names, [np.array([role, number[text]]) for role, text in zip(roles, everything)])
        if cut:
            story.notice("train", f"{len(cut)} {side} texts are cut to {loaded.max_seq_length} tokens, first in: {cut[0]}")
        groups = np.cumsum(np.array(roles) == embed.ANCHOR).tolist()
        return [replace(row, group=group) for row, group in zip(rows, groups)]

    loss = partial(embed.loss, kind=config.loss, temperature=config.temperature, margin=config.margin)
    key = content_hash(texts.key, config.loss, config.temperature, config.margin)
    train_rows(story, rows_of, loss, {"pooling": config.pooling}, key, couples_rows=embed.couples_rows(config.loss))


def evaluate_embedder(story: Story) -> None:
    """What the tuned model finds on the test side, beside the other arms, with intervals by document and a verdict."""
    from giong.workflow.row_training import row_outputs, trained_model

    texts = PairedTexts(story)
    arms = [name for name in list(ARM_NAMES)[:2] if story.project.arm_path(name).is_file()]
    if not arms:
        raise StoryError("No baseline has been measured yet", place=str(story.project.root), remedy="Run `giong baseline` first.")
    record = (story.project.step_record("model") or {}).get("key", "")
    key = content_hash(texts.key, record, story.config.evaluation, *(story.project.arm_path(name) for name in arms))
    if story.is_current("eval", key):
        return
    loaded, _ = trained_model(story)
    test = texts.of("test")
    with Stage(story, "eval", f"{len(arms) + 1} arms, {len(test)} texts") as stage:
        write_found(story, TUNED, texts, partial(row_outputs, loaded))
        result = compare_arms(
            {name: _figures(story, name) for name in [*arms, TUNED]}, [passage.document_id for passage, _ in test], tuned=TUNED,
            labels=ARM_NAMES, num_bootstrap=story.config.evaluation.num_bootstrap, seed=story.config.evaluation.seed,
        )  # fmt: skip
    result |= {"task": story.config.task, "seconds": stage.seconds}
    write_json(story.project.root / "evaluation.json", result)
    made = [story.project.root / "evaluation.json", story.project.arm_path(TUNED)]
    story.project.finish_step("eval", key, made, {**result["verdict"], "seconds": stage.seconds})


def _figures(story: Story, arm: str) -> dict:
    rows = read_jsonl(story.project.arm_path(arm))
    margins = [np.nan if row["margin"] is None else row["margin"] for row in rows]
    return retrieval_figures(np.array([row["rank"] for row in rows]), np.array(margins))
