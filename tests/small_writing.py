"""A small author for end-to-end tests: short documents with a plain voice, other voices beside it, written for the tests."""

from __future__ import annotations

import json
import random
from pathlib import Path

THINGS = (
    "kettle",
    "ladder",
    "bicycle",
    "radio",
    "garden",
    "boat",
    "violin",
    "stove",
    "letter",
    "window",
    "clock",
    "coat",
    "bridge",
    "lamp",
    "bread",
    "map",
)
PLACES = ("the shed", "the hall", "the market", "my kitchen", "the old mill", "the harbour", "the attic", "the yard")
OPENINGS = ("So I took the", "I went back for the", "You would have laughed at the", "There I was with the", "Well, I found the")
MIDDLES = (
    "and I didn't know what to do with it",
    "and it wasn't even mine",
    "but it's a good one, I think",
    "and I couldn't lift it, mind you",
)
ENDINGS = ("It held, for a bit.", "I was wrong, of course.", "That was fine with me.", "You know how it goes.", "I'd do it again.")
FORMAL = (
    "The {thing} was relocated to {place} at {hour} hours, and the responsible department has taken note of the matter.",
    "It should be recorded that a {thing} was situated in {place}, where {hour} persons were required to attend to it.",
    "With regard to the {thing}, {hour} separate inspections were carried out in {place} in accordance with the regulations.",
)


def author_passage(generator: random.Random) -> str:
    thing, place, hour = generator.choice(THINGS), generator.choice(PLACES), generator.randint(2, 90)
    return (
        f"{generator.choice(OPENINGS)} {thing} in {place} on day {hour}, {generator.choice(MIDDLES)}. "
        f"It's {generator.randint(2, 9)} years old (I counted). {generator.choice(ENDINGS)}"
    )


def formal_passage(generator: random.Random, voice: int) -> str:
    thing, place, hour = generator.choice(THINGS), generator.choice(PLACES), generator.randint(2, 90)
    rotated = FORMAL[voice % len(FORMAL) :] + FORMAL[: voice % len(FORMAL)]
    return " ".join(sentence.format(thing=thing, place=place, hour=hour) for sentence in rotated[:2])


def write_author(folder: Path, *, num_documents: int = 14, passages_per_document: int = 5, seed: int = 0) -> Path:
    """Markdown files, one document each."""
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_documents):
        body = "\n\n".join(author_passage(generator) for _ in range(passages_per_document))
        front = f"---\ntitle: Note {number}\ndate: 2024-{number % 12 + 1:02d}-{number % 27 + 1:02d}\n---\n\n"
        (folder / f"note-{number:02d}.md").write_text(front + body + "\n", encoding="utf-8")
    return folder


def write_background(path: Path, *, num_voices: int = 5, per_voice: int = 12, seed: int = 1) -> Path:
    """Other writers as a background file."""
    generator = random.Random(seed)
    rows = [{"voice": f"v{voice}", "text": formal_passage(generator, voice)} for voice in range(num_voices) for _ in range(per_voice)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


SETTINGS = {
    "data": {"min_words": 12, "max_words": 40, "merge_paragraphs": False, "test_share": 0.3, "calibration_share": 0.2},
    "baselines": {"num_shots": 1},
    "evaluation": {"max_requests": 6, "num_bootstrap": 200, "probes_per_kind": 1},
    "train": {"num_epochs": 2, "batch_rows": 4},
}
"""Settings that make a story small enough for a test."""
