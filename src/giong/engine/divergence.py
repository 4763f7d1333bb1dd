"""How far the next-token distribution has moved from another one, over the whole vocabulary, in chunks like `cross_entropy`.

The divergence is KL(reference || now), exact at every position: the texts were written by the author and not by either model, so the
estimators of reinforcement learning, which see the drawn token alone (Schulman 2020, k1 to k3), would estimate something else. Its
gradient with respect to the logits is softmax(now) - softmax(reference): learning without forgetting (Li and Hoiem 2016, 1606.09282,
equation 2, temperature 1). docs/decisions/0012 has the alternatives.
"""

from __future__ import annotations

import torch

from giong.engine.cross_entropy import Head, chunk_positions
from giong.engine.shapes import padded, writes_code

FP32_COPIES = 8
"""Chunks are so much smaller than those of the loss: both distributions and what lies between them are held in fp32."""


def token_kl(hidden_ND: torch.Tensor, head: Head, reference_ND: torch.Tensor, reference_head: Head) -> torch.Tensor:
    """KL(reference || now) in nats per position (N, fp32), differentiable in `hidden_ND` and in the head; the reference is detached."""
    num_positions = len(hidden_ND)
    if writes_code(hidden_ND.device, hidden_ND.dtype):
        hidden_ND, reference_ND = padded(hidden_ND), padded(reference_ND)
    arguments = (hidden_ND, head.weight_VD, head.bias_V, reference_ND, reference_head, head.softcap, head.scale)
    return _TokenKL.apply(*arguments)[:num_positions]


class _TokenKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, reference_ND, reference_head, softcap, scale):  # type: ignore[no-untyped-def]
        ctx.reference_ND, ctx.reference_head, ctx.softcap, ctx.scale = reference_ND, reference_head, softcap, scale
        kl_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for part in _chunks(hidden_ND, weight_VD):
            kl_N[part], gradient_NV = _kl_and_gradient(ctx, hidden_ND[part], weight_VD, bias_V, part)
            if grad_hidden_ND is not None:
                grad_hidden_ND[part] = gradient_NV.to(weight_VD.dtype) @ weight_VD
        needs_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(grad_hidden_ND, *((hidden_ND, weight_VD, bias_V) if needs_head else (None, None, None)))
        return kl_N

    @staticmethod
    def backward(ctx, grad_N):  # type: ignore[no-untyped-def]
        grad_hidden_ND, hidden_ND, weight_VD, bias_V = ctx.saved_tensors
        of_hidden = None if grad_hidden_ND is None else grad_hidden_ND * grad_N[:, None].to(grad_hidden_ND.dtype)
        of_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias_V, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        # What a trained head needs is vocabulary x width: cheaper to run the head again than to keep.
        for part in _chunks(hidden_ND, weight_VD) if hidden_ND is not None else ():
            gradient_NV = _kl_and_gradient(ctx, hidden_ND[part], weight_VD, bias_V, part)[1] * grad_N[part, None]
            if of_weight is not None:
                of_weight += gradient_NV.T @ hidden_ND[part].float()
            if of_bias is not None:
                of_bias += gradient_NV.sum(0)
        return of_hidden, of_weight, of_bias, None, None, None, None


def _chunks(hidden_ND: torch.Tensor, weight_VD: torch.Tensor) -> list[slice]:
    size = chunk_positions(hidden_ND.device, len(weight_VD), FP32_COPIES)
    return [slice(start, start + size) for start in range(0, len(hidden_ND), size)]


@torch.no_grad()
def _kl_and_gradient(ctx, hidden_ND, weight_VD, bias_V, part):  # type: ignore[no-untyped-def]
    """KL (N) and its gradient with respect to the logits as the head gives them (N, V), both fp32."""
    logits = _logits(hidden_ND, weight_VD, bias_V, ctx.softcap, ctx.scale)
    head = ctx.reference_head
    reference = torch.log_softmax(_logits(ctx.reference_ND[part], head.weight_VD, head.bias_V, head.softcap, head.scale), 1)
    now = torch.log_softmax(logits, 1)
    kl_N = (reference.exp() * (reference - now)).sum(1)
    gradient = now.exp_().sub_(reference.exp_())
    if ctx.softcap is not None:
        gradient *= 1 - (logits / ctx.softcap) ** 2
    return kl_N, gradient.mul_(ctx.scale)


def _logits(hidden_ND, weight_VD, bias_V, softcap, scale):  # type: ignore[no-untyped-def]
    logits = torch.nn.functional.linear(hidden_ND, weight_VD, bias_V).float() * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
