"""The bundled sample data and the demo's project: what the figures of the documents stand on."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

from giong import samples
from giong.cli.demo import make_demo_project
from giong.contracts import RUN_STEPS
from giong.data.synthesis.leak import longest_shared_run
from giong.data.synthesis.stand_in import is_english
from giong.project import init
from giong.workflow import Story, perform
from giong.workspace import read_jsonl


def sequences(text: str, length: int = 6) -> set[tuple[str, ...]]:
    found = re.findall(r"[\w']+", text.lower())
    return {tuple(found[start : start + length]) for start in range(len(found) - length + 1)}


def test_author_is_written_and_not_generated() -> None:
    rows = samples.author_rows()
    assert len(rows) == 240
    assert len({row["document_id"] for row in rows}) == 40
    assert all(60 <= len(row["text"].split()) <= 160 for row in rows)
    documents: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for row in rows:
        for sequence in sequences(row["text"]):
            documents[sequence].add(row["document_id"])
    assert not [sequence for sequence, found in documents.items() if len(found) > 2]


def test_rewrites_do_not_leak_the_answer() -> None:
    assert max(longest_shared_run(row["neutral_rewrite"], row["text"]) for row in samples.author_rows()) < 8


def test_other_voices() -> None:
    voices = samples.background_voices()
    assert len(voices) == 8
    assert all(len(texts) == 30 for texts in voices.values())
    author = {row["text"] for row in samples.author_rows()}
    assert not author & {text for texts in voices.values() for text in texts}


def test_vietnamese_author() -> None:
    rows = samples.vietnamese_author_rows()
    assert len(rows) >= 80
    assert len({row["document_id"] for row in rows}) >= 20
    documents: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for row in rows:
        assert 60 <= len(row["text"].split()) <= 160
        assert row["text"] == unicodedata.normalize("NFC", row["text"])
        assert not is_english(row["text"])
        assert is_english(row["translation"])
        for sequence in sequences(row["text"]):
            documents[sequence].add(row["document_id"])
    assert not [sequence for sequence, found in documents.items() if len(found) > 2]


def test_probes_share_nothing_with_the_author() -> None:
    written = {sequence for row in samples.author_rows() for sequence in sequences(row["text"]) | sequences(row["neutral_rewrite"])}
    assert not [item["id"] for item in samples.probe_rows() if sequences(item["request"]) & written]


def test_refusals_and_pairs() -> None:
    assert Counter(row["kind"] for row in samples.refusal_rows()) == {"harmful": 20, "harmless": 20}
    pairs = samples.bias_pairs()
    assert set(Counter(row["axis"] for row in pairs).values()) == {15}
    for row in pairs:
        first, second = row["stereotype"].split(), row["counter"].split()
        assert first != second
        assert abs(len(first) - len(second)) <= 2


def test_general_text_comes_from_python_itself() -> None:
    texts = samples.general_texts()
    assert sum(map(len, texts)) > 30_000
    assert texts == samples.general_texts()


def test_demo_project_replays_every_recorded_request(tmp_path: Path) -> None:
    project = make_demo_project(tmp_path / "giong-demo")
    perform(Story(project), RUN_STEPS[:2])
    examples = read_jsonl(project.examples_path)
    by_text = {row["text"]: row["neutral_rewrite"] for row in samples.author_rows()}
    assert len(examples) == 240
    for example in examples:
        assert example["messages"][-1]["content"].endswith(by_text[example["answer"]])
    assert {side: sum(row["side"] == side for row in examples) for side in ("train", "calibration", "test")} == {
        "train": 144, "calibration": 36, "test": 60,
    }  # fmt: skip


def test_the_vietnamese_author_is_a_translation_project(tmp_path: Path) -> None:
    """Every passage becomes an answer, byte for byte, and its request is the recorded English translation."""
    rows = samples.vietnamese_author_rows()
    writing = tmp_path / "writing"
    writing.mkdir()
    documents: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        documents[row["document_id"]].append(row["text"])
    for name, texts in documents.items():
        (writing / f"{name}.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    settings = {
        "data": {"merge_paragraphs": False, "min_words": 50, "max_words": 200},
        "synthesis": {"source": "recorded", "recorded": str(samples.AUTHOR_VI_PATH), "kinds": ["translation"]},
    }
    project = init(tmp_path / "giong-viet", sources=[writing], settings=settings)
    perform(Story(project), RUN_STEPS[:2])
    by_text = {row["text"]: row["translation"] for row in rows}
    examples = read_jsonl(project.examples_path)
    assert len(examples) == len(rows) == len(by_text)
    for example in examples:
        assert example["messages"][-1]["content"].endswith(by_text[example["answer"]])
