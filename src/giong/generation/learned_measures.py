"""What learned models say of texts: BERTScore, entailment both ways, style vectors. The models lie on the disk; nothing is fetched.

BERTScore is written out here, thirty lines: the package `bert-score` finds a model's best layer by its name on a hub, which a folder does
not have, and brings a plotting library along.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch.nn.functional import normalize

from giong.config import ModelConfig
from giong.errors import ModelError
from giong.models.folder import entailment_label
from giong.models.parts import task_head
from giong.models.row_model import load_row_model
from giong.workspace import read_json

BATCH_TEXTS = 32
LAYER_SHARE = 0.75
"""How deep BERTScore looks: the authors' package has layer 9 of 12 for bert-base, 18 of 24 for bert-large and 17 for roberta-large."""


class _TextModel:
    """A model folder that reads whole texts, in fp32. `num_full` counts the texts that fill its window, and were cut unless they just fit."""

    def __init__(self, folder: Path, device: str, settings: dict[str, Any]) -> None:
        loaded = load_row_model(ModelConfig(name_or_path=str(folder), device=device), settings, dtype=torch.float32)
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.tokenizer.padding_side = "right"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.max_seq_length = min(loaded.max_seq_length, self.tokenizer.model_max_length)
        self.num_full = 0

    def batches(self, *columns: Sequence[str]) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """What the model reads, (B, T) each, and which tokens are text and no sign of the tokenizer's. Several columns are read together."""
        for start in range(0, len(columns[0]), BATCH_TEXTS):
            batch = self.tokenizer(
                *(list(column[start : start + BATCH_TEXTS]) for column in columns), padding=True, truncation=True,
                max_length=self.max_seq_length, return_tensors="pt", return_special_tokens_mask=True,
            ).to(self.model.device)  # fmt: skip
            is_text_BT = batch.pop("special_tokens_mask") == 0
            self.num_full += int((batch["attention_mask"].sum(1) == self.max_seq_length).sum())
            yield dict(batch), is_text_BT


class BertScore(_TextModel):
    """F1 of greedy matching of contextual embeddings (Zhang et al. 2020, 1904.09675, equations 1 to 3), without idf and rescaling.

    As in the authors' package, the tokenizer's own signs can be matched and do not count themselves.
    """

    def __init__(self, folder: Path, device: str = "auto") -> None:
        super().__init__(folder, device, {"pooling": "mean"})
        self.layer = round(LAYER_SHARE * self.model.config.num_hidden_layers)

    def __call__(self, texts: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """One value per pair; 1 for the same text, 0 where one of the two is empty."""
        pairs = zip(self._embedded(texts), self._embedded(references), strict=True)
        return np.array([_f1(*text, *reference) for text, reference in pairs])

    @torch.inference_mode()
    def _embedded(self, texts: Sequence[str]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Unit vectors (T, D) of each text's tokens, and which of them count (T,)."""
        for batch, is_text_BT in self.batches(texts):
            hidden_BTD = self.model(**batch, output_hidden_states=True).hidden_states[self.layer]
            for hidden_TD, is_text_T, length in zip(hidden_BTD, is_text_BT, batch["attention_mask"].sum(1)):
                yield normalize(hidden_TD[:length], dim=-1), is_text_T[:length]


def _f1(text_TD: torch.Tensor, counts_T: torch.Tensor, reference_UD: torch.Tensor, counts_U: torch.Tensor) -> float:
    if not counts_T.any() or not counts_U.any():
        return 0.0
    similarity_TU = text_TD @ reference_UD.T
    precision, recall = similarity_TU.amax(1)[counts_T].mean(), similarity_TU.amax(0)[counts_U].mean()
    return float(2 * precision * recall / (precision + recall))


class Entailment(_TextModel):
    """How probable it is, by a model for natural language inference, that each of two texts follows from the other: the mean of both ways."""

    def __init__(self, folder: Path, device: str = "auto") -> None:
        super().__init__(folder, device, {})
        stored = {name for path in folder.glob("*.safetensors") for name in safe_open(path, "pt").keys()}  # noqa: SIM118
        if lacking := [head for head in task_head(self.model) if not any(name.startswith(f"{head}.") for name in stored)]:
            # It would have been drawn at random, and its figures would look fine.
            raise ModelError(
                f"The weights of the classifier ({lacking[0]}) are missing", place=str(folder), remedy="Fetch the model again."
            )
        self.label = entailment_label(self.model.config.id2label)

    def __call__(self, texts: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """One value per pair, 0 to 1; the same with texts and references exchanged."""
        return (self._follows(texts, references) + self._follows(references, texts)) / 2

    @torch.inference_mode()
    def _follows(self, premises: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
        found = [self.model(**batch).logits.softmax(-1)[:, self.label].cpu() for batch, _ in self.batches(premises, hypotheses)]
        return torch.cat(found).numpy().astype(float)


class StyleVectors(_TextModel):
    """Texts (N) to vectors (N, D), pooled as `1_Pooling` of sentence-transformers says, by the mean where there is none; each text once."""

    def __init__(self, folder: Path, device: str = "auto") -> None:
        path = folder / "1_Pooling" / "config.json"
        modes = read_json(path) if path.is_file() else {}
        pooling = "cls" if modes.get("pooling_mode_cls_token") else "last" if modes.get("pooling_mode_lasttoken") else "mean"
        super().__init__(folder, device, {"pooling": pooling})
        self._known: dict[str, np.ndarray] = {}

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        vectors = [self._pooled(self.model(**batch).last_hidden_state, batch["attention_mask"]) for batch, _ in self.batches(new)]
        self._known |= dict(zip(new, torch.cat(vectors).cpu().numpy())) if new else {}
        return np.array([self._known[text] for text in texts])

    def _pooled(self, hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        if self.model.config.pooling == "mean":
            return (hidden_BTD * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)
        last_B = mask_BT.sum(1) - 1 if self.model.config.pooling == "last" else torch.zeros_like(mask_BT[:, 0])
        return hidden_BTD[torch.arange(len(hidden_BTD)), last_B]
