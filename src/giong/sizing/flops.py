"""Floating-point operations per token, for training and for generation.

N counts the weights that a token is multiplied with (layers and head), not all parameters: an embedding lookup multiplies nothing,
and in a small model with a vocabulary of its own for input and output that is a large part of all parameters.
"""

from __future__ import annotations

from giong.contracts import ModelShape
from giong.sizing.shapes import num_matmul_parameters

PROBE_ROW_TOKENS, PROBE_LOSS_SHARE = 512, 0.5
"""What the workflow's probe trains on: rows of that length, that share of their positions with loss, every weight frozen."""

LORA_SLOWDOWN, ATTENTION_SLOWDOWN = 3.0, 1.5
"""How much longer an operation takes in an adapter's products (of rank 16) and in attention than in a layer's own products.

Measured as processor time on one AVX-512 core, bf16, at the bundled base's shape, SmolLM2-135M's and Qwen2.5-0.5B's: 1.6, 2.6 and
3.4 for adapters (they are bound by memory, and two cores make that worse), 1.4 to 1.5 for attention (rows of 256 to 2,048 tokens).
"""


def attention_flops_per_token(shape: ModelShape, row_tokens: float) -> float:
    """Forward operations of the scores and of the weighted sum, over all layers, for a mean token of a causal row.

    Two products of 2 · heads · head_dim operations per earlier token, of which there are row_tokens / 2 in the mean: half of
    Chowdhery et al. 2022, 2204.02311, appendix B, which does not use causality. Windowed layers cost less.
    """
    return shape.num_hidden_layers * 2.0 * shape.num_attention_heads * shape.head_dim * row_tokens


def train_flops_per_token(
    shape: ModelShape, method: str, num_trainable: int, row_tokens: float, *, loss_share: float = 1.0, num_checkpointed_layers: int = 0
) -> float:
    """Operations of forward and backward pass per token: 6 N for `full`, 4 N + 6 N_lora for `lora`, and three times attention.

    Per weight and token 2 operations forward, 2 for the gradient of the input and 2 for that of the weight (Kaplan et al. 2020,
    2001.08361, section 2.1); a frozen weight saves the last two. The head is multiplied where there is loss only (`loss_share`).
    Layers that are computed again cost their forward pass twice. Raises ValueError for an unknown method.
    """
    if method not in ("full", "lora"):
        raise ValueError(f"method must be `full` or `lora`, not {method!r}")
    weights, adapters, attention = _parts(shape, method == "full", num_trainable, row_tokens, loss_share)
    layers = 2.0 * (num_matmul_parameters(shape) - shape.hidden_size * shape.vocab_size) + attention / 3
    return weights + adapters + attention + num_checkpointed_layers / shape.num_hidden_layers * layers


def slowdown_after_probe(
    shape: ModelShape, method: str, num_trainable: int, row_tokens: float = PROBE_ROW_TOKENS, loss_share: float = PROBE_LOSS_SHARE
) -> float:
    """How many times longer a token of a training run takes than a token of the probe on the same machine.

    The probe computes a frozen model's forward and backward pass; what it does not do (adapters, gradients of weights, rows of
    another length) is added by its operations, each kind weighed by how fast it runs.
    """
    run = _parts(shape, method == "full", num_trainable, row_tokens, loss_share)
    probe = _parts(shape, False, 0, PROBE_ROW_TOKENS, PROBE_LOSS_SHARE)
    run_cost, probe_cost = (
        weights + LORA_SLOWDOWN * adapters + ATTENTION_SLOWDOWN * attention for weights, adapters, attention in (run, probe)
    )
    return run_cost / probe_cost


def _parts(shape: ModelShape, is_full: bool, num_trainable: int, row_tokens: float, loss_share: float) -> tuple[float, float, float]:
    """Operations per token of the model's own matrices, of adapters, and of attention, forward and backward."""
    head = shape.hidden_size * shape.vocab_size
    num_weights = num_matmul_parameters(shape) - (1.0 - loss_share) * head
    adapters = 0.0 if is_full else 6.0 * num_trainable
    return (6.0 if is_full else 4.0) * num_weights, adapters, 3.0 * attention_flops_per_token(shape, row_tokens)


def generation_flops_per_token(shape: ModelShape, row_tokens: float) -> float:
    """Operations of the forward pass per token read or written: 2 N and attention (`row_tokens`: request and answer)."""
    return 2.0 * num_matmul_parameters(shape) + attention_flops_per_token(shape, row_tokens)
