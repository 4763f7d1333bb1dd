"""The weights that a run starts from, kept so that it can be held near them: pulled back in weights, or in what it says.

One decision a reader may question: the base is computed by putting the start of what moves in its place for one forward pass, and
not by switching an adapter off. Every method starts as the base, so one way serves all of them, and nothing here knows an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from giong.contracts import LossSum
from giong.engine.distributed import local
from giong.engine.divergence import token_kl
from giong.engine.packing import Pack
from giong.engine.step import Forward, before_head, forward_logprobs, hidden_states, output_head
from giong.errors import ConfigError


class Anchor:
    """A copy of the parameters that move, as they are now. It takes as much memory as they do."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.start = {name: local(parameter.detach()).clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def pull(self, masters: Mapping[str, torch.Tensor], share: float) -> None:
        """Move the fp32 master of each by `share` of its way back (L2-SP: Li et al. 2018, 1802.01483, equation 2; decoupled from the
        gradient as weight decay is by Loshchilov and Hutter 2019, 1711.05101, so `share` is learning rate times strength)."""
        for name, start in self.start.items():
            local(masters[name]).lerp_(start.to(torch.float32), share)

    @contextmanager
    def in_place(self, model: PreTrainedModel) -> Iterator[None]:
        """Within the block `model` is what it was at the start, without dropout. Nothing may be differentiated there."""
        now = {name: parameter.data for name, parameter in self.parameters.items()}
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.start[name]
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = now[name]
            for module in training:
                module.training = True

    def forward(self, model: PreTrainedModel, pack: Pack, forward: Forward = forward_logprobs) -> dict[str, torch.Tensor]:
        """As `forward`, with `kl_N`: KL(start || now) of the next token at each position with loss.

        Raises ConfigError for rows that are judged as a whole: they have no next token.
        """
        if pack.targets_RC is not None:
            raise ConfigError(
                "Rows with a target have no next token, whose distribution could be held near the base", place="train.kl_weight",
                remedy="Leave it out, or use train.l2_to_base or train.weight_decay.",
            )  # fmt: skip
        with self.in_place(model), torch.no_grad():
            start_ND = before_head(model, hidden_states(model, pack).index_select(0, pack.loss_positions_N.to(model.device)))
            head = output_head(model)
            start_head = replace(head, weight_VD=head.weight_VD.detach(), bias_V=None if head.bias_V is None else head.bias_V.detach())
        tensors = forward(model, pack)
        tensors["kl_N"] = token_kl(tensors["hidden_ND"], output_head(model), start_ND, start_head)
        return tensors


def with_kl(result: LossSum, tensors: Mapping[str, torch.Tensor], kl_weight: float) -> LossSum:
    """The objective plus `kl_weight` times the divergence of each position with loss, weighted as its log-probability is.

    Rows that are compared (`group_of_R`) weigh as such and not by their tokens: each counts with its mean over positions.
    """
    if "group_of_R" in tensors:
        row_of_N, num_rows = tensors["row_of_N"], len(tensors["group_of_R"])
        counts_R = torch.bincount(row_of_N, minlength=num_rows).clamp_min(1)
        kl_sum = (tensors["kl_N"] / counts_R[row_of_N]).sum() * result.weight_sum / num_rows
    else:
        kl_sum = (tensors["weights_N"] * tensors["kl_N"]).sum()
    return LossSum(result.loss_sum + kl_weight * kl_sum, result.weight_sum, {**result.metrics, "kl": kl_sum.detach()})
