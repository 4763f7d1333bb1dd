"""Raw-text pretraining: every token of a document after its first is predicted, the end-of-text token included.

Mathematically `sft` with all weights 1: what differs is how rows are made (`giong.models.rows.raw_text_rows`).
"""

from __future__ import annotations

from giong.objectives.sft import NEEDS, loss

__all__ = ["NEEDS", "loss"]
