"""A project whose arms have answered, without a model: requests and author from the bundled sample, the other arms by rules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from giong import samples
from giong.config import load
from giong.contracts import Example, Message, Reply
from giong.data.examples import frozen_test, read_examples
from giong.evaluation.answers import write_replies
from giong.evaluation.report.table import ARM_LABELS
from giong.evaluation.results import TUNED
from giong.project import init
from giong.workspace import Project, content_hash, write_jsonl


def make_answered(folder: Path, *, num_documents: int = 4, per_document: int = 2) -> Project:
    """Arms: base echoes the request, few_shot its first half, fine_tuned answers what the author does, reversed by sentence."""
    project = init(folder, settings={"evaluation": {"num_bootstrap": 200}, "data": {"consent": {"author": "Ann", "granted": True}}})
    rows = [row for row in samples.author_rows() if row["passage"] <= per_document]
    documents = sorted({row["document_id"] for row in rows})[:num_documents]
    examples = [
        Example(
            f"{row['document_id']}#{row['passage']}", row["document_id"], "neutral_rewrite", (Message("user", row["neutral_rewrite"]),),
            row["text"], "test",
        )
        for row in rows if row["document_id"] in documents
    ]  # fmt: skip
    write_jsonl(project.examples_path, examples)
    answer(project, "base", [request(example) for example in examples])
    answer(project, "few_shot", [request(example)[: len(request(example)) // 2] for example in examples])
    answer(project, TUNED, [". ".join(reversed(example.answer.split(". "))) for example in examples])
    return project


def request(example: Example) -> str:
    return example.messages[-1].content


def answer(project: Project, arm: str, texts: Sequence[str]) -> None:
    """Record an arm's replies as its step would."""
    test = frozen_test(read_examples(project.examples_path), load(project.config_path), project.root)
    write_replies(project, arm, [Reply(text) for text in texts])
    verdict = {"decision": "go", "reason": "Made up for the test."}
    step, result = ("eval", verdict) if arm == TUNED else (f"baseline-{arm}", {"label": ARM_LABELS[arm]})
    project.finish_step(step, "key", [project.arm_path(arm)], {**result, "examples_hash": content_hash(test)})
