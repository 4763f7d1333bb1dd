"""Log-probabilities of target tokens without ever holding positions x vocabulary.

The head runs in chunks over the positions that carry loss. The gradient of one log-probability with respect to its hidden
state is (W[target] - p W), whatever is done with the log-probability afterwards; so the forward pass keeps that vector
(N x D) and the backward pass only scales it: one pass over the frozen head serves every objective. The gradient of a trainable
head is a sum over positions, so its weights must be known: an objective that is a weighted sum of log-probabilities announces
them (`weights_N`) and is served in the same pass; for any other the head runs a second time, in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from giong.engine.elementwise import kernels
from giong.engine.shapes import LENGTH_MULTIPLE, padded, rounded, writes_code

CHUNK_POSITIONS = 256
"""Positions per matrix product with the head: enough of them to read its weight at the speed of the cores, not of memory."""

CHUNK_POSITIONS_ON_GPU = 8192
"""A GPU has to be given work for all its cores, and each call takes the host some ten microseconds."""

CHUNK_LOGITS = 64 * 1024 * 1024
"""Logits held at once in the compute dtype, whatever the vocabulary: 128 MiB in bf16."""


def chunk_positions(device: torch.device, vocabulary: int, copies: int = 1) -> int:
    """Positions whose logits are held at once, `copies` times over."""
    most = min(CHUNK_POSITIONS if device.type == "cpu" else CHUNK_POSITIONS_ON_GPU, CHUNK_LOGITS // (copies * vocabulary))
    return max(1, most - most % LENGTH_MULTIPLE or most)


@dataclass(frozen=True, slots=True)
class Head:
    """The output head: weight (V, D), optional bias (V,), and the tanh cap that some families put on logits."""

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, targets_N, weights_N, softcap, scale):  # type: ignore[no-untyped-def]
        needs_hidden, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        needs_head = needs_weight or (bias_V is not None and ctx.needs_input_grad[2])
        logprobs_N = torch.empty(hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        sums = _HeadGradient(weight_VD, bias_V, needs_weight) if needs_head and weights_N is not None else None
        for part, logits in _chunks_of_logits(hidden_ND, weight_VD, bias_V):
            kernels().logprobs_and_gradient(logits, targets_N[part], logprobs_N[part], softcap, scale, needs_hidden or sums is not None)
            # From here on `logits` holds -d(logprob)/d(logits).
            if needs_hidden:
                torch.mm(logits, weight_VD, out=grad_hidden_ND[part])
            if sums is not None:
                sums.add(logits, weights_N[part], hidden_ND[part])
        ctx.needs_head, ctx.needs_weight, ctx.softcap, ctx.scale = needs_head, needs_weight, softcap, scale
        summed = (sums.weight_VD, sums.bias_V) if sums is not None else (None, None)
        kept = (hidden_ND, weight_VD, bias_V, targets_N) if needs_head else (None, None, None, None)
        ctx.save_for_backward(grad_hidden_ND, weights_N, *summed, *kept)
        return logprobs_N

    @staticmethod
    def backward(ctx, grad_N):  # type: ignore[no-untyped-def]
        grad_hidden_ND, weights_N, of_weight_VD, of_bias_V, hidden_ND, weight_VD, bias_V, targets_N = ctx.saved_tensors
        hidden = None if grad_hidden_ND is None else grad_hidden_ND * -grad_N[:, None].to(grad_hidden_ND.dtype)
        if not ctx.needs_head:
            return hidden, None, None, None, None, None, None
        factor = -1.0
        is_summed = of_weight_VD is not None or of_bias_V is not None
        if is_summed:
            factor = -grad_N[0] / weights_N[0]
            is_summed = torch.allclose(grad_N, -factor * weights_N, rtol=1e-4, atol=0)
        if not is_summed:
            factor, sums, unused_N = -1.0, _HeadGradient(weight_VD, bias_V, ctx.needs_weight), torch.empty_like(grad_N)
            for part, logits in _chunks_of_logits(hidden_ND, weight_VD, bias_V):
                kernels().logprobs_and_gradient(logits, targets_N[part], unused_N[part], ctx.softcap, ctx.scale, True)
                sums.add(logits, grad_N[part], hidden_ND[part])
            of_weight_VD, of_bias_V = sums.weight_VD, sums.bias_V
        weight = None if of_weight_VD is None else of_weight_VD.mul_(factor)
        bias = None if of_bias_V is None else of_bias_V.mul_(factor)
        return hidden, weight, bias, None, None, None, None


class _HeadGradient:
    """The gradient of the head's weight (V, D) and bias (V,), in fp32, as far as they are trained."""

    def __init__(self, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, needs_weight: bool) -> None:
        self.weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        self.bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)

    def add(self, logits_NV: torch.Tensor, weights_N: torch.Tensor, hidden_ND: torch.Tensor) -> None:
        """Add weights * (softmax - onehot) of a chunk; `logits_NV` holds softmax - onehot and is overwritten."""
        logits_NV *= weights_N[:, None].to(logits_NV.dtype)
        if self.bias_V is not None:
            self.bias_V += logits_NV.sum(0, dtype=torch.float32)
        if self.weight_VD is None:
            return
        if logits_NV.dtype == torch.float32:
            self.weight_VD.addmm_(logits_NV.T, hidden_ND)
        else:
            self.weight_VD += logits_NV.T @ hidden_ND


def _chunks_of_logits(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Parts of the positions, as equal as can be, with their logits (n, V). All parts are computed in the same memory: its pages
    are faulted in once, and no two parts are held at a time."""
    num_positions, vocabulary = len(hidden_ND), len(weight_VD)
    largest = chunk_positions(hidden_ND.device, vocabulary)
    size = math.ceil(num_positions / math.ceil(num_positions / largest)) if num_positions else 1
    if writes_code(hidden_ND.device, hidden_ND.dtype):
        size = min(rounded(size), largest)
    buffer_NV = torch.empty(size, vocabulary, dtype=hidden_ND.dtype, device=hidden_ND.device)
    for start in range(0, num_positions, size):
        part = slice(start, min(start + size, num_positions))
        logits = buffer_NV[: part.stop - start]
        if bias_V is None:
            torch.mm(hidden_ND[part], weight_VD.T, out=logits)
        else:
            torch.addmm(bias_V, hidden_ND[part], weight_VD.T, out=logits)
        yield part, logits


def token_logprobs(hidden_ND: torch.Tensor, head: Head, targets_N: torch.Tensor, weights_N: torch.Tensor | None = None) -> torch.Tensor:
    """Log-probability (nats, fp32) of each target under the head, differentiable.

    Where the head itself is trained and the loss is a multiple of sum(weights_N * logprobs), one pass over the head is enough;
    for any other loss, or without `weights_N`, it runs once more in the backward pass.
    """
    if not torch.is_grad_enabled():
        head = Head(head.weight_VD.detach(), None if head.bias_V is None else head.bias_V.detach(), head.softcap, head.scale)
        hidden_ND = hidden_ND.detach()
    num_positions = len(hidden_ND)
    if writes_code(hidden_ND.device, hidden_ND.dtype):
        hidden_ND, targets_N = padded(hidden_ND), padded(targets_N)
        weights_N = None if weights_N is None else padded(weights_N)
    arguments = (hidden_ND, head.weight_VD, head.bias_V, targets_N, weights_N, head.softcap, head.scale)
    return _TokenLogprobs.apply(*arguments)[:num_positions]
