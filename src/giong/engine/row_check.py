"""Whether packed rows come to what the model's own forward pass makes of each of them: asked of a model before its numbers count.

The engine puts its own attention, layers and head in the place of a family's, and gives positions and row lengths where a family
may expect a mask. What a family does beside that (a convolution along the tokens, a state, a head of its own kind) cannot be read off
its class, so it is tried: a few short rows, once per loaded model.

One decision a reader may question: a trial and not a list of families. transformers has some hundred and a few more with every
release, and one that is missing from a list is trained on wrong numbers without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import PreTrainedModel

from giong.engine.attention import check_chunks
from giong.engine.row_head import pooled_states
from giong.engine.step import evaluate_rows
from giong.errors import GiongError, ModelError
from giong.models.rows import Row
from giong.models.soft_prompt import with_soft_prompt

PACKED_ROWS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest difference of the two ways to compute a row, over the largest number: far above rounding, far below a wrong position."""

PACKED_TOKENS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Root mean square of the difference of two log-probabilities of a token, over the spread (standard deviation) of the model's own.

The mean because in bf16 one token of some dozens may well be off by half a nat (8 bits carry a logit of 30 to 1/8, and layers add to
that), while rows that see each other move most of their tokens; the spread because it is what there is to tell. fp32 comes to
1e-6. bf16 comes to 0.01 to 0.04 with 2 to 24 layers, dense or of experts, and 0.08 where weights are drawn absurdly wide; rows that see
each other come to 0.25 to 1.4, a short convolution over the borders alone (LFM2) to 0.15 to 0.6.
"""

TRIAL_LENGTHS = (11, 7, 14)
"""Tokens of the rows that are tried: of unlike length, as most packs are, and 32 together, so that no filler is added in bf16."""

_tried: WeakKeyDictionary[PreTrainedModel, float] = WeakKeyDictionary()
"""Models that were found right, with the longest row (tokens) for which that is known. Adapters that come and go change neither how
rows are kept apart nor the head."""


def check_tokens(model: PreTrainedModel, rows: Sequence[Row]) -> None:
    """Raise ModelError where the log-probabilities of packed rows of tokens like `rows` would not be the model's own.

    `rows` are what is about to be computed, without targets. They say how long a row gets and whether its tokens are predicted from
    their own positions (`labels`); what is tried are short rows of random tokens, once per loaded model, and once more before the first row
    that is longer than a sliding window. A soft prompt is left out for as long; adapters take part in both ways to compute. Random
    numbers and modes are left as they are.
    """
    longest = max(map(len, rows), default=0)
    check_chunks(model, longest)
    if longest <= _tried.get(model, 0):
        return
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    window = window if isinstance(window, int) and window > 0 else float("inf")
    # Attention refuses what it is not told of, before the run does. One such row costs no more than one of `rows`.
    lengths = TRIAL_LENGTHS if longest <= window else (*TRIAL_LENGTHS, min(longest, window + TRIAL_LENGTHS[-1]))
    check_rows(model, _trial_rows(model, lengths, hidden=rows[0].labels is not None))
    _tried[model] = window if longest <= window else float("inf")


def _trial_rows(model: PreTrainedModel, lengths: Sequence[int] = TRIAL_LENGTHS, *, hidden: bool) -> list[Row]:
    """Random tokens, none of them special: a family may count positions or sum attention without its padding. Of a longer row than
    those of `TRIAL_LENGTHS` only the end is asked for."""
    generator = np.random.Generator(np.random.Philox(key=[0, 0]))
    settings = {**model.config.get_text_config().to_dict(), **model.config.to_dict()}
    special = [value for name, value in settings.items() if name.endswith("_token_id")]
    flat = [token for value in special for token in (value if isinstance(value, list) else [value]) if token is not None]
    size = min(model.get_input_embeddings().weight.shape[0], settings.get("vocab_size") or 2**31)
    rows = []
    for length in lengths:
        ids, weights = generator.choice(np.setdiff1d(np.arange(size), flat), length).astype(np.int64), np.ones(length, dtype=np.float32)
        weights[: max(1, length - TRIAL_LENGTHS[-1])] = 0.0
        rows.append(Row(ids, weights, labels=ids if hidden else None))
    return rows


@contextmanager
def _plainly(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model has no dropout and no soft prompt, and random numbers are drawn that nobody misses."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), with_soft_prompt(model, None):
            yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def check_rows(model: PreTrainedModel, rows: Sequence[Row]) -> None:
    """Raise ModelError where packed rows come to other numbers than the model's own forward pass over each of them alone.

    Compared are the outputs of rows with a target, and of others the log-probabilities (nats) of the tokens that carry loss.
    """
    with _plainly(model):
        try:
            packed = torch.cat(evaluate_rows(model, rows, sum(map(len, rows)))).float()
        except (GiongError, torch.OutOfMemoryError):
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise _refusal(model, f"cannot be computed ({reason[:200]})") from error
        own = torch.cat([_own_outputs(model, row) for row in rows])
    if not own.isfinite().all():
        raise ModelError(
            "The model's own forward pass gives numbers that are not finite", place=model.config.name_or_path or model.config.model_type,
            remedy="Fetch the model again, or set model.dtype to float32.",
        )  # fmt: skip
    apart = packed - own
    if rows[0].target is not None:
        difference, unit, allowed = apart.abs().max() / packed.abs().max().clamp_min(1e-6), "the largest", PACKED_ROWS_TOLERANCE
    else:
        difference, unit, allowed = apart.square().mean().sqrt() / own.std().clamp_min(1e-6), "their spread", PACKED_TOKENS_TOLERANCE
    # What is not a number does not agree either.
    if not difference <= allowed.get(model.dtype, allowed[torch.bfloat16]):
        raise _refusal(model, f"come to other numbers than transformers' own forward pass (by {float(difference):.1g} of {unit})")


def _refusal(model: PreTrainedModel, problem: str) -> ModelError:
    family = model.config.model_type
    return ModelError(
        f"Packed rows of the {family} family {problem}", place=model.config.name_or_path or family,
        remedy="Use BERT, ModernBERT, or a decoder (Llama, Qwen, Gemma, Mistral, GPT-2).",
    )  # fmt: skip


def _own_outputs(model: PreTrainedModel, row: Row) -> torch.Tensor:
    """What `evaluate_rows` gives for a row, by the model's own forward pass over it alone: in fp32, on the CPU."""
    # A decoder would make a cache for tokens that do not come, which some families cannot for so few layers.
    settings = {"use_cache": False} if row.target is None and row.labels is None else {}
    output = model(input_ids=torch.as_tensor(row.input_ids, device=model.device)[None], **settings)
    if row.target is not None:
        own = output.logits if "logits" in output else pooled_states(output.last_hidden_state[0], (len(row),), model.config.pooling)
        return own[0].float().cpu()
    places, targets = np.flatnonzero(row.weights), row.input_ids if row.labels is None else row.labels
    logits_NV = output.logits[0, torch.as_tensor(places - (row.labels is None), device=model.device)]
    return logits_NV.float().cpu().log_softmax(-1)[np.arange(len(places)), targets[places]]
