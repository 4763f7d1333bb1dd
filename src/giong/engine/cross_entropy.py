"""Log-probabilities of target tokens without ever holding positions x vocabulary.

The head runs in chunks over the positions that carry loss. The gradient of one log-probability with respect to its hidden
state is (W[target] - p W), whatever is done with the log-probability afterwards; so the forward pass keeps that vector
(N x D) and the backward pass only scales it: one pass over the head serves every objective. A trainable head needs the
loss weights beforehand (`weights_N`): objectives that are a weighted sum of log-probabilities have them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

CHUNK_POSITIONS = 256
"""Positions per matrix product with the head: enough of them to read its weight at the speed of the cores, not of memory."""

CHUNK_LOGITS = 64 * 1024 * 1024
"""Logits held at once in the compute dtype, whatever the vocabulary: 128 MiB in bf16."""

SLICE_LOGITS = 1024 * 1024
"""Logits taken to fp32 at once: 4 MiB, which stays in cache."""


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
        num_positions, vocab_size = hidden_ND.shape[0], weight_VD.shape[0]
        needs_hidden, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        needs_bias = bias_V is not None and ctx.needs_input_grad[2]
        if (needs_weight or needs_bias) and weights_N is None:
            raise ValueError("a trainable head needs the loss weights beforehand: pass weights_N")
        logprobs_N = torch.empty(num_positions, dtype=torch.float32, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if needs_bias else None
        chunk = max(1, min(num_positions, CHUNK_POSITIONS, CHUNK_LOGITS // vocab_size))
        for start in range(0, num_positions, chunk):
            part = slice(start, start + chunk)
            logits = torch.nn.functional.linear(hidden_ND[part], weight_VD, bias_V)
            _logprobs_and_gradient(logits, targets_N[part], logprobs_N[part], softcap, scale, needs_hidden or needs_weight or needs_bias)
            # From here on `logits` holds -d(logprob)/d(logits).
            if needs_hidden:
                torch.mm(logits, weight_VD, out=grad_hidden_ND[part])
            if needs_weight or needs_bias:
                logits *= weights_N[part, None].to(logits.dtype)
                if needs_bias:
                    grad_bias_V += logits.sum(0, dtype=torch.float32)
                if needs_weight and logits.dtype == torch.float32:
                    grad_weight_VD.addmm_(logits.T, hidden_ND[part])
                elif needs_weight:
                    grad_weight_VD += logits.T @ hidden_ND[part]
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_bias_V, weights_N)
        return logprobs_N

    @staticmethod
    def backward(ctx, grad_N):  # type: ignore[no-untyped-def]
        grad_hidden_ND, grad_weight_VD, grad_bias_V, weights_N = ctx.saved_tensors
        hidden = None if grad_hidden_ND is None else grad_hidden_ND * -grad_N[:, None].to(grad_hidden_ND.dtype)
        if grad_weight_VD is None and grad_bias_V is None:
            return hidden, None, None, None, None, None, None
        ratio_N = grad_N / weights_N
        factor = -ratio_N[0]
        if not torch.allclose(ratio_N, -factor.expand_as(ratio_N), rtol=1e-4, atol=0):
            raise ValueError("the loss is not the weighted sum of log-probabilities that weights_N announced")
        weight = None if grad_weight_VD is None else grad_weight_VD.mul_(factor).to(torch.float32)
        bias = None if grad_bias_V is None else grad_bias_V.mul_(factor)
        return hidden, weight, bias, None, None, None, None


def _logprobs_and_gradient(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, logprobs_N: torch.Tensor, softcap: float | None, scale: float, needs_gradient: bool
) -> None:
    """Fill `logprobs_N`; replace `logits_NV` by softmax - onehot (through scale and cap), rounded to its dtype, if needed."""
    step = max(1, SLICE_LOGITS // logits_NV.shape[1])
    for start in range(0, len(targets_N), step):
        part = slice(start, start + step)
        targets = targets_N[part, None]
        logits = logits_NV[part]
        if scale != 1.0 or softcap is not None:
            logits = logits.float() * scale
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        gradient = torch.softmax(logits, 1, dtype=torch.float32)
        chosen = gradient.gather(1, targets)
        if logits.is_cuda or not bool((chosen > torch.finfo(torch.float32).tiny).all()):
            # A share too small for fp32 has a logarithm all the same; a GPU would have to be waited for to know.
            logprobs_N[part] = torch.log_softmax(logits, 1, dtype=torch.float32).gather(1, targets)[:, 0]
        else:
            logprobs_N[part] = chosen.log()[:, 0]
        if not needs_gradient:
            continue
        gradient.scatter_add_(1, targets, chosen.new_full(chosen.shape, -1.0))
        if softcap is not None:
            gradient *= 1 - (logits / softcap) ** 2
        if scale != 1.0:
            gradient *= scale
        logits_NV[part] = gradient


def token_logprobs(hidden_ND: torch.Tensor, head: Head, targets_N: torch.Tensor, weights_N: torch.Tensor | None = None) -> torch.Tensor:
    """Log-probability (nats, fp32) of each target under the head, differentiable.

    `weights_N` is needed when the head itself is trained: the loss must then be a multiple of sum(weights * logprobs);
    anything else raises ValueError in the backward pass.
    """
    if not torch.is_grad_enabled():
        head = Head(head.weight_VD.detach(), None if head.bias_V is None else head.bias_V.detach(), head.softcap, head.scale)
        hidden_ND = hidden_ND.detach()
    return _TokenLogprobs.apply(hidden_ND, head.weight_VD, head.bias_V, targets_N, weights_N, head.softcap, head.scale)
