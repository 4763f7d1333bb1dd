"""Floating-point operations per token, for training and for generation.

N counts the weights that a token is multiplied with (layers and head), not all parameters: an embedding lookup multiplies nothing,
and in a small model with a vocabulary of its own for input and output that is a large part of all parameters.
"""

from __future__ import annotations

from typing import Literal

from giong.config import MethodConfig
from giong.contracts import ModelShape
from giong.sizing.moving import SOFT_PROMPTS, moving
from giong.sizing.shapes import LOW_RANK, linear_layers, num_matmul_parameters, settings_of

PROBE_ROW_TOKENS, PROBE_LOSS_SHARE = 512, 0.5
"""What the workflow's probe trains on: rows of that length, that share of their positions with loss, every weight frozen."""

LORA_SLOWDOWN, ATTENTION_SLOWDOWN = {"cpu": 3.0, "gpu": 20.0}, {"cpu": 1.5, "gpu": 4.0}
"""How much longer an operation takes in an adapter's products (of rank 16) and in attention than in a layer's own products.

On a CPU measured as processor time on one AVX-512 core, bf16, at the bundled base's shape, SmolLM2-135M's and Qwen2.5-0.5B's: 1.6, 2.6 and
3.4 for adapters (they are bound by memory, and two cores make that worse), 1.4 to 1.5 for attention (rows of 256 to 2,048 tokens).
On a GPU from the parts of a pass on an H200 (`docs/benchmarks.md`, *On a GPU*): at Qwen2.5-1.5B's shape adapters with their sums 23 and
attention 4.2; their products alone 16 there and 13 at Llama-3.1-8B's. No probe was compared with a run on a GPU yet.
"""


NEWTON_SCHULZ_STEPS = 5
"""By which Muon orthogonalises a matrix: torch's default."""


def attention_flops_per_token(shape: ModelShape, row_tokens: float) -> float:
    """Forward operations of the scores and of the weighted sum, over all layers, for a mean token of a causal row.

    Two products of 2 · heads · head_dim operations per earlier token, of which there are row_tokens / 2 in the mean: half of
    Chowdhery et al. 2022, 2204.02311, appendix B, which does not use causality. Windowed layers cost less.
    """
    return shape.num_hidden_layers * 2.0 * shape.num_attention_heads * shape.head_dim * row_tokens


def train_flops_per_token(
    shape: ModelShape,
    method: str | MethodConfig,
    num_trainable: int,
    row_tokens: float,
    *,
    loss_share: float = 1.0,
    num_checkpointed_layers: int = 0,
    has_kl: bool = False,
) -> float:
    """Operations of forward and backward pass per token: 6 N for `full`, 4 N + 6 N_adapter for `lora` and `bottleneck`, and three
    times attention.

    Per weight and token 2 operations forward, 2 for the gradient of the input and 2 for that of the weight (Kaplan et al. 2020,
    2001.08361, section 2.1); a frozen weight saves the last two, and in a layer below all that moves the second two as well. With
    `sparse` the layers save nothing: the gradient of a matrix is formed whole, of which the chosen entries are taken. The other
    methods move single tensors of the model: 2 operations for each of their numbers, which for a gain or a bias (a sum over
    tokens) is right to the order and little beside the rest. The head is multiplied where there is loss only (`loss_share`).
    Layers that are computed again cost their forward pass twice. With `has_kl` the divergence from the start (`engine.divergence`) is held
    down as well: one more forward pass, and the head once more for both distributions and their gradients. Raises ValueError for an unknown
    method.
    """
    return sum(_parts(shape, method, num_trainable, row_tokens, loss_share, num_checkpointed_layers, has_kl=has_kl))


def score_flops_per_token(
    shape: ModelShape, method: str | MethodConfig, num_trainable: int, row_tokens: float, *, loss_share: float = 1.0
) -> float:
    """Operations of a forward pass alone per token, with what the method puts beside the model. Raises ValueError for an unknown method."""
    return sum(_forward_parts(shape, settings_of(method), num_trainable, row_tokens, loss_share))


def slowdown_after_probe(
    shape: ModelShape,
    method: str | MethodConfig,
    num_trainable: int,
    row_tokens: float = PROBE_ROW_TOKENS,
    loss_share: float = PROBE_LOSS_SHARE,
    *,
    num_checkpointed_layers: int = 0,
    has_kl: bool = False,
    device: Literal["cpu", "gpu"] = "cpu",
) -> float:
    """How many times longer a token of a training run takes than a token of the probe on the same machine.

    The probe computes a frozen model's forward and backward pass; what it does not do (adapters, gradients of weights, rows of
    another length, layers computed again) is added by its operations, each kind weighed by how fast it runs. Below 1 where most layers have no backward
    pass.
    """
    run = _parts(shape, method, num_trainable, row_tokens, loss_share, num_checkpointed_layers, has_kl=has_kl)
    return _cost(run, device) / _probe_cost(shape, device)


def scoring_after_probe(
    shape: ModelShape,
    method: str | MethodConfig,
    num_trainable: int,
    row_tokens: float = PROBE_ROW_TOKENS,
    loss_share: float = PROBE_LOSS_SHARE,
    *,
    device: Literal["cpu", "gpu"] = "cpu",
) -> float:
    """The same for a token of a forward pass alone."""
    return _cost(_forward_parts(shape, settings_of(method), num_trainable, row_tokens, loss_share), device) / _probe_cost(shape, device)


def _cost(parts: tuple[float, float, float], device: str) -> float:
    weights, adapters, attention = parts
    return weights + LORA_SLOWDOWN[device] * adapters + ATTENTION_SLOWDOWN[device] * attention


def _probe_cost(shape: ModelShape, device: str) -> float:
    return _cost(_parts(shape, "lora", 0, PROBE_ROW_TOKENS, PROBE_LOSS_SHARE), device)


def _layer_weights(shape: ModelShape) -> int:
    return num_matmul_parameters(shape) - shape.hidden_size * shape.vocab_size


def _parts(
    shape: ModelShape, method: str | MethodConfig, num_trainable: int, row_tokens: float, loss_share: float, num_checkpointed_layers: int = 0,
    *, has_kl: bool = False,
) -> tuple[float, float, float]:  # fmt: skip
    """Operations per token of the model's own matrices, of adapters, and of attention, forward and backward."""
    settings, moves = settings_of(method), moving(shape, method)
    forward = _forward_parts(shape, settings, num_trainable, row_tokens, loss_share)
    weights, adapters, attention = _parts_kept(shape, settings, num_trainable, loss_share, forward)
    # Where nothing goes backward nothing is computed again.
    again = max(0, num_checkpointed_layers - (shape.num_hidden_layers - moves.num_backward_layers))
    share = again / shape.num_hidden_layers
    weights, attention = weights + share * 2.0 * _layer_weights(shape), attention + share * attention_flops_per_token(shape, row_tokens)
    if has_kl:
        head = loss_share * shape.hidden_size * shape.vocab_size
        # The logits of the start are in the forward pass. Those of now, and the gradient of the states; for that of a head both logits anew.
        weights += forward[0] + (10.0 if moves.trains_head else 4.0) * head
        adapters, attention = adapters + forward[1], attention + forward[2]
    return weights, adapters, attention


def _forward_parts(
    shape: ModelShape, settings: MethodConfig, num_trainable: int, row_tokens: float, loss_share: float
) -> tuple[float, float, float]:  # fmt: skip
    """The same of a forward pass alone."""
    name, layers = settings.name, float(_layer_weights(shape))
    if name in SOFT_PROMPTS:
        # Virtual tokens are computed with every row.
        layers *= 1.0 + settings.num_virtual_tokens / row_tokens
    # PiSSA takes off again what its update started as.
    updates = 2.0 if settings.init_lora_weights == "pissa" else 1.0
    adapters = 2.0 * updates * num_trainable if name in (*LOW_RANK, "bottleneck") else 0.0
    return 2.0 * (layers + loss_share * shape.hidden_size * shape.vocab_size), adapters, attention_flops_per_token(shape, row_tokens)


def _parts_kept(
    shape: ModelShape, settings: MethodConfig, num_trainable: int, loss_share: float, forward: tuple[float, float, float]
) -> tuple[float, float, float]:  # fmt: skip
    """Forward and backward with all activations kept."""
    moves, name, (weights, adapters, attention) = moving(shape, settings), settings.name, forward
    head, layers = loss_share * shape.hidden_size * shape.vocab_size, _layer_weights(shape)
    backward_share = moves.num_backward_layers / shape.num_hidden_layers
    attention *= 1.0 + 2.0 * backward_share
    if name == "full":
        return 3.0 * weights, 0.0, attention
    if name == "sparse":
        return 2.0 * weights + 2.0 * layers, 0.0, attention
    if name in (*LOW_RANK, "bottleneck", *SOFT_PROMPTS):
        # A frozen weight needs no gradient, and an embedding that is trained is multiplied with nothing.
        return 2.0 * weights, 3.0 * adapters, attention
    without_loss = (1.0 - loss_share) * shape.num_head_parameters if moves.trains_head else 0.0
    return weights + 2.0 * (backward_share * layers + head) + 2.0 * (num_trainable - without_loss), 0.0, attention


def muon_flops(shape: ModelShape) -> float:
    """Operations of one Muon update: for each matrix of a layer the Newton-Schulz steps of `torch.optim.Muon`, with three products each
    (Liu et al. 2025, 2502.16982, section 2.1)."""
    sides = [sorted((linear.in_features, linear.out_features)) for linear in linear_layers(shape)]
    return shape.num_hidden_layers * NEWTON_SCHULZ_STEPS * sum(2.0 * (2 * short**2 * long + short**3) for short, long in sides)


def generation_flops_per_token(shape: ModelShape, row_tokens: float) -> float:
    """Operations of the forward pass per token read or written: 2 N and attention (`row_tokens`: request and answer)."""
    return 2.0 * num_matmul_parameters(shape) + attention_flops_per_token(shape, row_tokens)
