"""Log-probabilities of target tokens without ever holding positions x vocabulary.

The head runs in chunks over the positions that carry loss. The gradient of one log-probability with respect to its hidden
state is (W[target] - p W), whatever is done with the log-probability afterwards; so the forward pass keeps that vector
(N x D) and the backward pass only scales it: one pass over the head serves every objective. A trainable head needs the
loss weights beforehand (`weights_N`): objectives that are a weighted sum of log-probabilities have them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

CHUNK_LOGITS = 4 * 1024 * 1024
"""Logits held at once: 16 MiB in fp32."""


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
        chunk = max(1, min(num_positions, CHUNK_LOGITS // vocab_size))
        for start in range(0, num_positions, chunk):
            part = slice(start, start + chunk)
            logits = torch.nn.functional.linear(hidden_ND[part], weight_VD, bias_V).float()
            if scale != 1.0:
                logits *= scale
            if softcap is not None:
                logits = softcap * torch.tanh_(logits / softcap)
            targets = targets_N[part, None]
            chosen = logits.gather(1, targets)
            normaliser = logits.logsumexp(1, keepdim=True)
            logprobs_N[part] = (chosen - normaliser)[:, 0]
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            # logits becomes d(logprob)/d(logits) in place: onehot - softmax, through the cap and the scale.
            slope = None if softcap is None else 1 - (logits / softcap) ** 2
            gradient = logits.sub_(normaliser).exp_().neg_()
            gradient.scatter_add_(1, targets, torch.ones_like(chosen))
            if slope is not None:
                gradient *= slope
            if scale != 1.0:
                gradient *= scale
            if needs_hidden:
                grad_hidden_ND[part] = gradient.to(weight_VD.dtype) @ weight_VD
            if needs_weight or needs_bias:
                gradient *= weights_N[part, None]
                if needs_bias:
                    grad_bias_V += gradient.sum(0)
                if needs_weight:
                    grad_weight_VD += gradient.to(hidden_ND.dtype).T @ hidden_ND[part]
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_bias_V, weights_N)
        return logprobs_N

    @staticmethod
    def backward(ctx, grad_N):  # type: ignore[no-untyped-def]
        grad_hidden_ND, grad_weight_VD, grad_bias_V, weights_N = ctx.saved_tensors
        hidden = None if grad_hidden_ND is None else grad_hidden_ND * grad_N[:, None].to(grad_hidden_ND.dtype)
        if grad_weight_VD is None and grad_bias_V is None:
            return hidden, None, None, None, None, None, None
        ratio_N = grad_N / weights_N
        factor = ratio_N[0]
        if not torch.allclose(ratio_N, factor.expand_as(ratio_N), rtol=1e-4, atol=0):
            raise ValueError("the loss is not the weighted sum of log-probabilities that weights_N announced")
        weight = None if grad_weight_VD is None else grad_weight_VD.mul_(factor).to(torch.float32)
        bias = None if grad_bias_V is None else grad_bias_V.mul_(factor)
        return hidden, weight, bias, None, None, None, None


def token_logprobs(hidden_ND: torch.Tensor, head: Head, targets_N: torch.Tensor, weights_N: torch.Tensor | None = None) -> torch.Tensor:
    """Log-probability (nats, fp32) of each target under the head, differentiable.

    `weights_N` is needed when the head itself is trained: the loss must then be a multiple of sum(weights * logprobs);
    anything else raises ValueError in the backward pass.
    """
    return _TokenLogprobs.apply(hidden_ND, head.weight_VD, head.bias_V, targets_N, weights_N, head.softcap, head.scale)
