"""Linear layers with a low-rank update as one autograd function: y = x W^T + b + s (x A^T) B^T (Hu et al. 2021, 2106.09685).

PEFT builds the sum from separate operations, which keep or copy tensors of the size of the output several times. Here the
update is added by the matrix product that computes it, the compute dtype is never left, W's gradient is formed only when W
itself is trained, and only x is kept: the low-rank projection of x is cheap to form again, and so is the mask of its dropout
(`lora_dropout`). Where x comes from a norm not even x is kept: the norm keeps what it was formed from.

One decision a reader may question: DoRA's column norm (Liu et al. 2024, 2402.09353, section 4.3: detached) is computed from
W A^T and A A^T and never from W + s B A, which would be a second copy of every weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from giong.engine.elementwise import kernels, normed_of
from giong.engine.lora_dropout import draw_dropout, dropped
from giong.models.nf4 import Nf4Linear


class LinearWeights(NamedTuple):
    """W (out, in), b (out) or None, and the update: A (rank, in), B (out, rank), both None without one; `scale` is s.

    `dropout` is the probability with which an element of x is zero on its way into A. A matrix in 4 bits is unpacked for each product
    from the layer `packed`, and W is None."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None = None
    lora_a: torch.Tensor | None = None
    lora_b: torch.Tensor | None = None
    scale: float = 0.0
    dropout: float = 0.0
    packed: Nf4Linear | None = None

    @property
    def matrix(self) -> torch.Tensor:
        return self.weight if self.packed is None else self.packed.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype if self.packed is None else self.packed.dtype


def linear_forward(x_TI: torch.Tensor, weights: LinearWeights, mask_TI: torch.Tensor | None = None) -> torch.Tensor:
    """y (T, out) for x (T, in). `mask_TI` is what `LoraDropout.mask` drew; the scale has to make up for it."""
    output = linear(x_TI, weights.matrix, weights.bias)
    if weights.lora_a is not None:
        low = linear(dropped(x_TI, mask_TI), weights.lora_a)
        kernels().add_product(output, low, weights.lora_b.T, weights.scale)
    return output


class LinearGradients(NamedTuple):
    x: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    lora_a: torch.Tensor | None
    lora_b: torch.Tensor | None


def linear_backward(
    grad_TO: torch.Tensor, x_TI: torch.Tensor, weights: LinearWeights, needs: tuple[bool, ...], mask_TI: torch.Tensor | None = None
) -> LinearGradients:
    """Gradients of `linear_forward` for what `needs` names, in the order (x, W, b, A, B)."""
    needs_x, needs_weight, needs_bias, needs_a, needs_b = needs
    of_x = grad_TO @ weights.matrix if needs_x else None
    of_a = of_b = None
    if weights.lora_a is not None and (needs_x or needs_a or needs_b):
        low = (grad_TO @ weights.lora_b).mul_(weights.scale)
        x_low = dropped(x_TI, mask_TI) if needs_a or needs_b else None
        if needs_b:
            of_b = (grad_TO.T @ linear(x_low, weights.lora_a)).mul_(weights.scale)
        if needs_a:
            of_a = low.T @ x_low
        if of_x is not None and mask_TI is None:
            kernels().add_product(of_x, low, weights.lora_a, 1.0)
        elif of_x is not None:
            of_x.add_(dropped(low @ weights.lora_a, mask_TI))
    of_weight = grad_TO.T @ x_TI if needs_weight else None
    of_bias = grad_TO.sum(0) if needs_bias else None
    return LinearGradients(of_x, of_weight, of_bias, of_a, of_b)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TI, weight, bias, lora_a, lora_b, scale, dropout, packed, normed):  # type: ignore[no-untyped-def]
        ctx.dropout, ctx.packed = draw_dropout(dropout), packed
        ctx.scale = scale * ctx.dropout.scale
        source, gain, ctx.again = (x_TI, None, None) if normed is None else normed[:3]
        if ctx.again is not None:
            ctx.again.num_readers += 1
        ctx.save_for_backward(source, gain, weight, bias, lora_a, lora_b)
        return linear_forward(x_TI, LinearWeights(weight, bias, lora_a, lora_b, ctx.scale, packed=packed), ctx.dropout.mask(x_TI))

    @staticmethod
    def backward(ctx, grad_TO):  # type: ignore[no-untyped-def]
        x_TI, gain, weight, bias, lora_a, lora_b = ctx.saved_tensors
        if ctx.again is not None:
            x_TI = ctx.again.read(x_TI, gain)
        weights = LinearWeights(weight, bias, lora_a, lora_b, ctx.scale, packed=ctx.packed)
        return *linear_backward(grad_TO, x_TI, weights, ctx.needs_input_grad[:5], ctx.dropout.mask(x_TI)), None, None, None, None


def apply_linear(x: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
    """x (..., in) -> (..., out), differentiable in everything that requires a gradient."""
    flat = x.reshape(-1, x.shape[-1])
    return _Linear.apply(flat, *weights, normed_of(x)).view(*x.shape[:-1], -1)


def lora_weights(layer: PeftLinear) -> LinearWeights | None:
    """The tensors of a PEFT layer, or None when it computes something else than low-rank updates of a plain linear layer
    (a merged one, a variant other than DoRA, several adapters with dropout or DoRA).

    Several adapters that are active at once are one of the sum of their ranks.
    """
    base = layer.base_layer
    if type(base) not in (torch.nn.Linear, Conv1D, Nf4Linear) or layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if not active or any(layer.lora_bias[name] or name in layer.lora_embedding_A for name in active):
        return None
    variants = [layer.lora_variant[name] for name in active if name in layer.lora_variant]
    dropouts = [layer.lora_dropout[name] for name in active]
    probability = max(dropout.p if isinstance(dropout, torch.nn.Dropout) and layer.training else 0.0 for dropout in dropouts)
    if any(type(variant) is not DoraLinearVariant for variant in variants) or (len(active) > 1 and (variants or probability)):
        return None
    of_a, of_b = ([matrices[name].weight for name in active] for matrices in (layer.lora_A, layer.lora_B))
    packed = base if type(base) is Nf4Linear else None
    weight = None if packed else base.weight.T if type(base) is Conv1D else base.weight
    if any(lora_a.dtype != (packed or weight).dtype for lora_a in of_a):
        return None
    scales = [layer.scaling[name] for name in active]
    if len(active) == 1:
        return LinearWeights(weight, base.bias, of_a[0], of_b[0], scales[0], probability, packed)
    of_b = [lora_b * (scale / scales[0]) for lora_b, scale in zip(of_b, scales)]
    return LinearWeights(weight, base.bias, torch.cat(of_a), torch.cat(of_b, dim=1), scales[0], packed=packed)


def lora_linear_forward(layer: PeftLinear, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """What stands in for the forward of a PEFT layer; falls back to PEFT's own where `lora_weights` says so."""
    weights = None if args or kwargs else lora_weights(layer)
    if weights is None or x.dtype != weights.dtype:
        return PeftLinear.forward(layer, x, *args, **kwargs)
    name = next(name for name in layer.active_adapters if name in layer.lora_A)
    if name not in layer.lora_variant:
        return apply_linear(x, weights)
    if weights.dropout:
        # PEFT drops elements on the way into W as well here: another function, which is PEFT's to define.
        return PeftLinear.forward(layer, x)
    magnitude = layer.lora_magnitude_vector[name].weight
    # The norm is rounded as PEFT rounds it and the magnitude that was made of it: their quotient starts as one in bf16 too.
    output = apply_linear(x, weights._replace(bias=None)) * (magnitude / column_norm(weights).to(magnitude.dtype))
    return output if weights.bias is None else output + weights.bias


@torch.no_grad()
def column_norm(weights: LinearWeights) -> torch.Tensor:
    """Norms of the rows of W + s B A in fp32, shape (out): |w|^2 + 2 s (W A^T . B) + s^2 (B A A^T . B), row by row."""
    lora_a, lora_b = weights.lora_a.float(), weights.lora_b.float()
    matrix = weights.matrix
    squares = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float32).square()
    cross = (linear(matrix, weights.lora_a).float() * lora_b).sum(1)
    own = ((lora_b @ (lora_a @ lora_a.T)) * lora_b).sum(1)
    return (squares + 2 * weights.scale * cross + weights.scale**2 * own).clamp_min_(0).sqrt_()
