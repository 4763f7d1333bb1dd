"""What the benchmarks train: model shapes, row mixes and named cases.

Both sides read this file, giong's process and the peers' (which has no giong installed), so it needs numpy and nothing else:
the rows are drawn again from the seed in every process, and a digest of them stands in every measurement.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

LORA_R, LORA_ALPHA, LEARNING_RATE = 16, 32.0, 1e-4

PAD_ID, EOS_ID, NUM_SPECIAL_IDS = 0, 1, 3
"""The first ids are the stand-in tokenizer's own; rows never contain them."""


@dataclass(frozen=True, slots=True)
class RowMix:
    """Rows of one optimizer step, drawn from a seed. The same rows are trained on in every step.

    `answer_share` is the mean share of a row's tokens that carry loss; 1 means raw text, every token but the first.
    """

    num_rows: int
    min_tokens: int
    max_tokens: int
    answer_share: float
    seed: int = 7

    @property
    def objective(self) -> str:
        return "pretrain" if self.answer_share == 1.0 else "sft"

    def draw(self, vocab_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(token ids, loss weights) per row; the weight of a row's first token is 0."""
        generator = np.random.Generator(np.random.Philox(self.seed))
        lengths = generator.integers(self.min_tokens, self.max_tokens + 1, self.num_rows)
        # Answers differ in length as rows do: up to a fifth more or less than the mean.
        spread = np.ones(self.num_rows) if self.answer_share == 1.0 else generator.uniform(0.8, 1.2, self.num_rows)
        rows = []
        for length, share in zip(lengths.tolist(), (self.answer_share * spread).tolist()):
            weights = np.zeros(length, dtype=np.float32)
            weights[length - round(share * length) :] = 1.0
            weights[0] = 0.0
            rows.append((generator.integers(NUM_SPECIAL_IDS, vocab_size, length), weights))
        return rows


def digest(rows: list[tuple[np.ndarray, np.ndarray]]) -> str:
    """Names the content of the rows: two processes that report the same one trained on the same tokens."""
    state = hashlib.sha256()
    for ids, weights in rows:
        state.update(ids.astype("<i8").tobytes() + weights.astype("<f4").tobytes())
    return state.hexdigest()[:16]


MIXES = {
    # 16 chat turns of about 220 tokens, 58 % of them answer.
    "chat": RowMix(num_rows=16, min_tokens=140, max_tokens=300, answer_share=0.58, seed=41),
    # 4 documents of nearly 2k tokens, loss everywhere.
    "documents": RowMix(num_rows=4, min_tokens=1792, max_tokens=2048, answer_share=1.0),
    # Twice as many, for a GPU.
    "more documents": RowMix(num_rows=8, min_tokens=1792, max_tokens=2048, answer_share=1.0),
}

BUNDLED = "bundled"
"""The base that giong brings along, with its real weights; the other shapes get random ones."""


def _decoder(
    model_type: str, layers: int, width: int, intermediate: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type, "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": intermediate,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab, "tie_word_embeddings": True,
        "max_position_embeddings": 8192, **more,
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _decoder("llama", 2, 64, 128, 4, 2, 512),
    "135m": _decoder("llama", 30, 576, 1536, 9, 3, 49152),
    "0.5b": _decoder("qwen2", 24, 896, 4864, 14, 2, 151936, max_position_embeddings=32768),
    "1.5b": _decoder("qwen2", 28, 1536, 8960, 12, 2, 151936, max_position_embeddings=32768),
    "8b": _decoder("llama", 32, 4096, 14336, 32, 8, 128256, tie_word_embeddings=False),
}
"""The numbers of SmolLM2-135M, Qwen2.5-0.5B and -1.5B and Llama-3.1-8B, as their config.json files have them; `tiny` tests the scripts."""


@dataclass(frozen=True, slots=True)
class Case:
    """A shape, a method and a row mix under one name. `needs_cuda`: too large to be measured on a CPU."""

    name: str
    method: str
    shape: str
    mix: str
    needs_cuda: bool = False


def _cases() -> dict[str, Case]:
    cases = []
    for method, shape in (
        ("lora", "0.5b"), ("lora", "135m"), ("full", "135m"), ("lora", BUNDLED), ("full", BUNDLED), ("lora", "tiny"), ("full", "tiny")
    ):  # fmt: skip
        cases += [Case(f"{method}-{shape}", method, shape, "chat"), Case(f"{method}-{shape}-documents", method, shape, "documents")]
    cases += [Case(f"lora-{shape}", "lora", shape, "more documents", needs_cuda=True) for shape in ("1.5b", "8b")]
    return {case.name: case for case in cases}


CASES = _cases()
"""`METHOD-SHAPE` trains on chat rows, `METHOD-SHAPE-documents` on long ones; the two for CUDA only are long ones too."""
