"""The story of `task: mlm`: import, train, eval, report, export. An encoder goes on learning the language of the author's texts.

Texts are imported and split as for writing, without requests. Base and tuned model are asked for the same hidden tokens of the test side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from giong.contracts import Passage, Side
from giong.engine.feed import Corrupt
from giong.engine.row_check import check_tokens
from giong.engine.step import evaluate_rows
from giong.errors import ModelError
from giong.evaluation.metrics.classification import Figure, weighted_mean
from giong.evaluation.results import TUNED
from giong.evaluation.task_arms import compare_arms
from giong.models.row_model import RowModel
from giong.models.rows import Row
from giong.objectives import mlm
from giong.workflow.row_training import load_base, train_rows, trained_model
from giong.workflow.story import Stage, Story
from giong.workspace import content_hash, write_json

ARM_NAMES = {"base": "base, untuned", TUNED: "fine-tuned"}
EVALUATED = -1
"""The step, so to speak, whose masks a model is measured with: no step of a run has it."""


def masked_rows(loaded: RowModel, texts: Sequence[str], names: Sequence[str]) -> tuple[list[Row], list[str]]:
    """One row per text whose every token but the special ones may be hidden; and the names of texts that were cut.

    Raises ModelError for a tokenizer without a mask token.
    """
    if loaded.tokenizer.mask_token_id is None:
        raise ModelError("The tokenizer has no mask token", place=loaded.name_or_path, remedy="Use an encoder (BERT, ModernBERT).")
    special = list(loaded.tokenizer.all_special_ids)
    rows, cut = [], []
    for text, name in zip(texts, names, strict=True):
        ids = np.asarray(loaded.tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)
        if len(ids) > loaded.max_seq_length:
            cut.append(name)
            ids = np.asarray(loaded.tokenizer(text, truncation=True, max_length=loaded.max_seq_length)["input_ids"], dtype=np.int64)
        weights = (~np.isin(ids, special)).astype(np.float32)
        weights[0] = 0.0
        rows.append(Row(ids, weights, name, labels=ids))
    return rows, cut


def hide(loaded: RowModel, mask_share: float, *, seed: int) -> Corrupt:
    """What hides tokens in the rows of a step."""
    token_ids = np.setdiff1d(np.arange(len(loaded.tokenizer)), loaded.tokenizer.all_special_ids)

    def corrupt(rows: Sequence[Row], step: int) -> list[Row]:
        # Philox takes no negative numbers.
        return mlm.masked(
            rows, seed=seed, step=step % 2**63, mask_id=loaded.tokenizer.mask_token_id, token_ids=token_ids, mask_share=mask_share
        )

    return corrupt


def train_masked(story: Story) -> None:
    """Go on with the base's own pretraining on the training side, by any method."""
    config, seed = story.config, story.config.train.seed

    def rows_of(loaded: RowModel, side: Side) -> list[Row]:
        passages = story.split.passages(side, story.passages)
        rows, cut = masked_rows(loaded, [passage.text for passage in passages], [passage.id for passage in passages])
        if cut:
            story.notice("train", f"{len(cut)} {side} texts are cut to {loaded.max_seq_length} tokens, first: {cut[0]}")
        kept = [row for row in rows if row.weights.any()]
        return kept if side == "train" else hide(loaded, config.mlm.mask_share, seed=seed)(kept, EVALUATED)

    key = content_hash(story.project.passages_path, story.project.split_path)
    settings = {"mask_share": config.mlm.mask_share}
    train_rows(
        story, rows_of, mlm.loss, settings, key, corrupt=lambda loaded: hide(loaded, config.mlm.mask_share, seed=seed),
        new_head_epochs=False,
    )  # fmt: skip


def hidden_logprobs(story: Story, loaded: RowModel, passages: Sequence[Passage]) -> np.ndarray:
    """(N,): those of `token_logprobs`, text after text."""
    return torch.cat(token_logprobs(story, loaded, passages)).double().numpy()


def token_logprobs(story: Story, loaded: RowModel, passages: Sequence[Passage]) -> list[torch.Tensor]:
    """Log-probabilities (nats) of the hidden tokens of each passage, the same ones for every model with this tokenizer."""
    rows, _ = masked_rows(loaded, [passage.text for passage in passages], [passage.id for passage in passages])
    hidden = hide(loaded, story.config.mlm.mask_share, seed=story.config.evaluation.seed)(rows, EVALUATED)
    check_tokens(loaded.model, hidden)
    return evaluate_rows(loaded.model, hidden, story.config.train.max_tokens_per_pack)


def evaluate_masked(story: Story) -> None:
    """Base and tuned model on the same hidden tokens of the test side, with intervals by document and a verdict."""
    test = [passage for passage in story.split.passages("test", story.passages) if passage.text.strip()]
    record = (story.project.step_record("model") or {}).get("key", "")
    key = content_hash(record, story.config.evaluation, story.project.passages_path, story.project.split_path)
    if story.is_current("eval", key):
        return
    loaded, model = trained_model(story)
    with Stage(story, "eval", f"{len(ARM_NAMES)} arms, {len(test)} texts") as stage:
        arms: dict[str, dict[str, Figure]] = {}
        documents: list[str] = []
        bases: list[tuple[str, Callable[[], RowModel]]] = [("base", partial(load_base, story, model["config"])), (TUNED, lambda: loaded)]
        for name, load in bases:
            logprobs = token_logprobs(story, load(), test)
            arms[name] = {"nats per hidden token": weighted_mean(-torch.cat(logprobs).double().numpy())}
            documents = [passage.document_id for passage, part in zip(test, logprobs) for _ in range(len(part))]
        result = compare_arms(
            arms, documents, tuned=TUNED, labels=ARM_NAMES, num_bootstrap=story.config.evaluation.num_bootstrap,
            seed=story.config.evaluation.seed,
        )  # fmt: skip
    result |= {"task": story.config.task, "seconds": stage.seconds}
    write_json(story.project.root / "evaluation.json", result)
    story.project.finish_step("eval", key, [story.project.root / "evaluation.json"], {**result["verdict"], "seconds": stage.seconds})
