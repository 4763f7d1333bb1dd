"""Section `data`: whose writing it is, where it lies, how it is cut and split."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from giong.config.base import Section


class ConsentConfig(Section):
    author: str = ""
    """Whose writing this is. It travels with every model made from it."""
    granted: bool = False
    """Whether the author has agreed to be imitated."""
    until: str = ""
    """Date (YYYY-MM-DD) until which the consent holds; empty means until withdrawn."""


class DataConfig(Section):
    paths: list[str] = []
    """Files and folders with the author's writing: .md, .txt, .html, .jsonl, .csv (relative to giong.yaml)."""
    conversations: list[str] = []
    """Chat files in OpenAI's fine-tuning format (.jsonl, one object with `messages` per line, relative to giong.yaml) whose assistant's
    turns are the author's. They need no synthesised request; conversations with tools are trained on and not tested."""
    text_field: str = "text"
    """Column or key that holds the text in .jsonl and .csv files."""
    title_field: str = "title"
    """Column or key that holds the title."""
    date_field: str = "date"
    """Column or key that holds the date."""
    id_field: str = "id"
    """Column or key that holds the document's id; without it the file and line number serve."""
    min_words: int = Field(default=40, ge=1)
    """Shortest passage in words (for languages without spaces two characters count as one word)."""
    max_words: int = Field(default=160, ge=10)
    """Longest passage in words; longer documents are cut at paragraph ends, then at sentence ends."""
    merge_paragraphs: bool = True
    """Join neighbouring paragraphs up to max_words; false keeps every paragraph of at least min_words a passage of its own."""
    split: Literal["document", "date"] = "document"
    """`document` draws whole documents at random; `date` trains on the past and tests on the newest documents."""
    test_share: float = Field(default=0.25, gt=0, lt=0.9)
    """Share of the passages whose documents are frozen for the test."""
    calibration_share: float = Field(default=0.15, gt=0, lt=0.9)
    """Share of the passages that calibrate the style witnesses and choose among settings; never trained on."""
    seed: int = 0
    """Seed of the split."""
    preferences: str | None = None
    """JSON lines of requests with two answers, the preferred one named (relative to giong.yaml); for the objectives that learn from them."""
    validation_preferences: str | None = None
    """The same, held out; without it `calibration_share` of the requests in `preferences` is."""
    questions: str | None = None
    """JSON lines of `question` and `answer` about what the documents say (relative to giong.yaml). Base and tuned model answer them from
    memory and with passages that they have to cite."""
    consent: ConsentConfig = ConsentConfig()

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words ({self.min_words}) is larger than max_words ({self.max_words})")
        if self.test_share + self.calibration_share >= 0.95:
            raise ValueError("test_share + calibration_share must leave at least 0.05 for training")
        return self
