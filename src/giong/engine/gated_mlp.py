"""The gated MLP's second half, down(act(gate) * up), as one autograd function that keeps gate and up and nothing else.

The product act(gate) * up is as wide as gate and up themselves; the down projection's own backward pass would keep it. It
is formed again from what is there, which costs one pass over memory and saves a third of what an MLP keeps.
"""

from __future__ import annotations

import torch

from giong.engine.elementwise import kernels
from giong.engine.lora_dropout import draw_dropout
from giong.engine.lora_linear import LinearWeights, linear_backward, linear_forward


class _GatedDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_TF, up_TF, weight, bias, lora_a, lora_b, scale, dropout, packed, activation):  # type: ignore[no-untyped-def]
        hidden = kernels().gated_forward(gate_TF, up_TF, activation)
        ctx.dropout, ctx.packed, ctx.activation = draw_dropout(dropout), packed, activation
        ctx.scale = scale * ctx.dropout.scale
        ctx.save_for_backward(gate_TF, up_TF, weight, bias, lora_a, lora_b)
        return linear_forward(hidden, LinearWeights(weight, bias, lora_a, lora_b, ctx.scale, packed=packed), ctx.dropout.mask(hidden))

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        gate_TF, up_TF, weight, bias, lora_a, lora_b = ctx.saved_tensors
        mask = ctx.dropout.mask(gate_TF)
        weights = LinearWeights(weight, bias, lora_a, lora_b, ctx.scale, packed=ctx.packed)
        needs_gate, needs_up, *needs = ctx.needs_input_grad[:6]
        of_gate = of_up = None
        if needs_gate or needs_up:
            of_hidden = linear_backward(grad_TD, gate_TF, weights, (True, False, False, False, False), mask).x
            of_gate, of_up, hidden = kernels().gated_backward(of_hidden, gate_TF, up_TF, ctx.activation)
        else:
            hidden = kernels().gated_forward(gate_TF, up_TF, ctx.activation)
        found = linear_backward(grad_TD, hidden, weights, (False, *needs), mask)
        return of_gate, of_up, found.weight, found.bias, found.lora_a, found.lora_b, None, None, None, None


def gated_down(gate: torch.Tensor, up: torch.Tensor, weights: LinearWeights, activation: str) -> torch.Tensor:
    """down(act(gate) * up) for gate and up (..., F); `activation` is a name in `elementwise.ACTIVATIONS`."""
    flat = (-1, gate.shape[-1])
    output = _GatedDown.apply(gate.reshape(flat), up.reshape(flat), *weights, activation)
    return output.view(*gate.shape[:-1], -1)
