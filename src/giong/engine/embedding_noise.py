"""NEFTune: uniform noise on the embeddings of the rows that are trained on (Jain et al. 2023, 2310.05914, algorithm 1).

One decision a reader may question: a row's noise is drawn from the number of the step and the row's own tokens, and not from a
generator that runs along, so that neither packing nor the number of processes nor a resume changes it.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel


class EmbeddingNoise:
    """Noise in [-1, 1] times alpha / sqrt(L D) for a row of L tokens of width D. `step_seed` changes with every step."""

    def __init__(self, alpha: float) -> None:
        self.alpha, self.step_seed = alpha, 0
        # Passes may be computed side by side.
        self._of_thread = threading.local()

    @contextmanager
    def on(self, model: PreTrainedModel) -> Iterator[None]:
        """Within the block the model's embeddings are noisy in training mode; in evaluation mode they are as they were."""
        hooks = [
            model.base_model.register_forward_pre_hook(self._note_lengths, with_kwargs=True),
            model.get_input_embeddings().register_forward_hook(self._add),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note_lengths(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # What draws or scores within the block has no packs, and no noise.
        if module.training:
            self._of_thread.lengths = kwargs["lengths"]

    def _add(self, module: torch.nn.Module, args: tuple, embeddings_1TD: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embeddings_1TD
        width = embeddings_1TD.shape[-1]
        rows = args[0][0].cpu().split(list(self._of_thread.lengths))
        noise_TD = torch.cat([self.of_row(ids, width) for ids in rows])
        return embeddings_1TD + noise_TD.to(embeddings_1TD)[None]

    def of_row(self, input_ids: torch.Tensor, width: int) -> torch.Tensor:
        """Noise (L, D) in fp32, on the CPU."""
        # Not torch's own generator: on a CPU it looks at the lower half of a seed alone.
        generator = np.random.Generator(np.random.Philox(key=[self.step_seed, zlib.crc32(input_ids.numpy().tobytes())]))
        uniform = torch.from_numpy(generator.random((len(input_ids), width), dtype=np.float32))
        return (2 * uniform - 1) * (self.alpha / (len(input_ids) * width) ** 0.5)
