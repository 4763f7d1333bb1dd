"""Floating-point operations per token, for training and for generation.

N counts the weights that a token is multiplied with (layers and head), not all parameters: an embedding lookup multiplies nothing,
and in a small model with a vocabulary of its own for input and output that is a large part of all parameters.
"""

from __future__ import annotations

from giong.contracts import ModelShape
from giong.sizing.shapes import num_matmul_parameters


def attention_flops_per_token(shape: ModelShape, row_tokens: float) -> float:
    """Forward operations of the scores and of the weighted sum, over all layers, for a mean token of a causal row.

    Two products of 2 · heads · head_dim operations per earlier token, of which there are row_tokens / 2 in the mean: half of
    Chowdhery et al. 2022, 2204.02311, appendix B, which does not use causality. Windowed layers cost less.
    """
    return shape.num_hidden_layers * 2.0 * shape.num_attention_heads * shape.head_dim * row_tokens


def train_flops_per_token(
    shape: ModelShape, method: str, num_trainable: int, row_tokens: float, *, gradient_checkpointing: bool = False
) -> float:
    """Operations of forward and backward pass per token: 6 N for `full`, 4 N + 6 N_lora for `lora`, and three times attention.

    Per weight and token 2 operations forward, 2 for the gradient of the input and 2 for that of the weight (Kaplan et al. 2020,
    2001.08361, section 2.1); a frozen weight saves the last two. Checkpointing computes the forward pass twice. Raises ValueError
    for an unknown method.
    """
    num_weights = num_matmul_parameters(shape)
    attention = attention_flops_per_token(shape, row_tokens)
    if method == "full":
        flops = 6.0 * num_weights
    elif method == "lora":
        flops = 4.0 * num_weights + 6.0 * num_trainable
    else:
        raise ValueError(f"method must be `full` or `lora`, not {method!r}")
    again = 2.0 * num_weights + attention if gradient_checkpointing else 0.0
    return flops + 3.0 * attention + again


def generation_flops_per_token(shape: ModelShape, row_tokens: float) -> float:
    """Operations of the forward pass per token read or written: 2 N and attention (`row_tokens`: request and answer)."""
    return 2.0 * num_matmul_parameters(shape) + attention_flops_per_token(shape, row_tokens)
