"""Planted projects: for each it is known what the verdict has to be, and the whole story must come to it.

The bundled author in small: a prompt that already has the style and too little writing, where a random model serves; with the bundled
base requests with two answers each, and answers made of facts that no request holds.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_teacher import Call, FakeTeacher

from giong import samples
from giong.contracts import RUN_STEPS
from giong.project import init
from giong.sizing.verdict import MIN_PIECES
from giong.workflow import Story, perform
from giong.workspace import read_json, write_jsonl

SMALL = {
    "data": {"merge_paragraphs": False, "min_words": 20, "max_words": 160, "test_share": 0.25, "calibration_share": 0.15},
    "synthesis": {"source": "recorded", "recorded": "recorded.jsonl"},
    "baselines": {"arms": ["base", "instruction"], "likelihood": False},
    "sizing": {"pilot_shares": [0.1, 0.2, 1.0]},
    "sampling": {"temperature": 0.0, "repetition_penalty": 1.1},
    "train": {"num_epochs": 1, "max_tokens_per_pack": 1024},
    "evaluation": {"max_requests": 8, "num_bootstrap": 400, "probes_per_kind": 0},
}


def verdict_of(folder: Path, rows: list[dict], **settings: Any) -> dict[str, Any]:
    """Run the story on passages with recorded requests; returns the verdict."""
    folder.mkdir(parents=True, exist_ok=True)
    documents: dict[str, list[str]] = {}
    for row in rows:
        documents.setdefault(row["document_id"], []).append(row["text"])
    writing = folder / "writing"
    writing.mkdir()
    for name, texts in documents.items():
        (writing / f"{name}.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    merged = {section: {**SMALL.get(section, {}), **settings.get(section, {})} for section in {**SMALL, **settings}}
    project = init(folder / "voice", sources=[writing], settings=merged)
    write_jsonl(project.root / "recorded.jsonl", rows)
    perform(Story(project), RUN_STEPS)
    return read_json(project.root / "evaluation.json")["verdict"]


def author(num_documents: int) -> list[dict]:
    rows = samples.author_rows()
    kept = sorted({row["document_id"] for row in rows})[:num_documents]
    return [row for row in rows if row["document_id"] in kept]


@pytest.fixture
def twin(tiny_folder: Callable[..., Path]) -> dict[str, Any]:
    """A section `model`: a small random one instead of the bundled base."""
    return {"model": {"name_or_path": str(tiny_folder("qwen2", max_position_embeddings=2048)), "dtype": "float32"}}


def test_a_prompt_that_has_the_style_already(tmp_path: Path, twin: dict[str, Any]) -> None:
    """A hosted model answers as the author would: there is nothing left to train for."""
    rows = author(9)
    answers = {row["neutral_rewrite"]: row["text"] for row in rows}

    def answer(call: Call) -> str:
        asked = call.body["messages"][-1]["content"]
        return next(text for request, text in answers.items() if asked.endswith(request))

    with FakeTeacher(answer) as hosted:
        models = [{"name": "hosted", "remote": {"base_url": hosted.base_url, "model": "writer"}}]
        verdict = verdict_of(tmp_path, rows, baselines={"models": models}, **twin)
    assert verdict["decision"] == "prompt instead"
    assert verdict["numbers"]["best_prompt_arm"].endswith("(hosted)")


def test_twenty_passages_are_too_few(tmp_path: Path, twin: dict[str, Any]) -> None:
    rows = [row for row in author(10) if row["passage"] <= 2]
    assert len(rows) == 20 < MIN_PIECES
    verdict = verdict_of(tmp_path, rows, **twin)
    assert verdict["decision"] == "collect more"


def test_contradictory_pairs(tmp_path: Path) -> None:
    """Every request asks for two passages at once and has either of them as its answer: nothing can be learnt from that."""
    rows = author(9)
    requests = {(row["document_id"], row["passage"]): row["neutral_rewrite"] for row in rows}
    contradictory = []
    for row in rows:
        first = row["passage"] - (row["passage"] + 1) % 2
        pair = " ".join(requests[row["document_id"], passage] for passage in (first, first + 1))
        contradictory.append({**row, "neutral_rewrite": pair})
    assert len({row["neutral_rewrite"] for row in contradictory}) == len(rows) // 2
    verdict = verdict_of(tmp_path, contradictory)
    assert verdict["decision"] == "no-go"


def test_answers_made_of_facts(tmp_path: Path) -> None:
    rows = fact_rows(14, 5)
    questions = [{"question": row["neutral_rewrite"], "answer": row["text"].split(" by ")[1].split(" and ")[0]} for row in rows[:6]]
    write_jsonl(tmp_path / "questions.jsonl", questions)
    verdict = verdict_of(tmp_path, rows, data={"questions": str(tmp_path / "questions.jsonl")})
    assert verdict["decision"] == "retrieve"
    facts = read_json(tmp_path / "voice" / "evaluation.json")["facts"]
    # The passages of invented mills are found; who reads them is a model too small to answer well.
    assert facts["base+lookup"]["found"]["point"] == 1 and facts["fine_tuned"]["found"] is None
    assert set(facts) == {"base", "base+lookup", "fine_tuned", "fine_tuned+lookup"}
    assert verdict["numbers"]["num_facts_to_find"] > 0.5 * verdict["numbers"]["num_facts"]


def fact_rows(num_documents: int, per_document: int) -> list[dict]:
    """Entries on invented mills: who built them, when, how many worked there. The request names the mill alone."""
    generator = random.Random(5)
    starts, ends = (
        ("Brin", "Hal", "Cor", "Wes", "Tam", "Ald", "Mor", "Pel", "Sto", "Ren"),
        ("dle", "worth", "by", "ford", "sey", "wick", "ham", "low"),
    )
    places = generator.sample([start + end for start in starts for end in ends], num_documents * per_document)
    people = ("Lunt", "Orme", "Pask", "Tull", "Vane", "Yeo", "Rudge", "Fitch", "Gale", "Kemp")
    rows = []
    for index, place in enumerate(places):
        founder, owner = generator.sample(people, 2)
        text = (
            f"The mill at {place} was put up in {generator.randint(1760, 1890)} by Ada {founder} and her brother. It had "
            f"{generator.randint(12, 480)} looms and paid {generator.randint(3, 19)} shillings a week. In {generator.randint(1900, 1960)} it was "
            f"sold to Jonas {owner} for {generator.randint(200, 9000)} pounds, and it closed {generator.randint(2, 40)} years later."
        )
        rows.append({
            "document_id": f"f{index // per_document:02d}", "passage": index % per_document + 1, "text": text,
            "neutral_rewrite": f"Information is requested concerning the history of the manufacturing establishment located at {place}.",
        })  # fmt: skip
    return rows
