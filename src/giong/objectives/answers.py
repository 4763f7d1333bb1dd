"""What objectives on whole answers share: sums over the tokens of each answer, and the two answers of each pair side by side.

Axis letters beside the engine's: P pairs. A row's `sign_R` is 1 for the answer that is preferred and -1 for the other one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

Tensors = Mapping[str, torch.Tensor]


def sum_per_row(tensors: Tensors, values_N: torch.Tensor) -> torch.Tensor:
    """(R,): values of tokens summed over each answer."""
    return values_N.new_zeros(len(tensors["sign_R"])).index_add(0, tensors["row_of_N"], values_N)


def num_tokens(tensors: Tensors) -> torch.Tensor:
    """(R,): the tokens of each answer, its end-of-turn token among them."""
    return sum_per_row(tensors, torch.ones_like(tensors["logprobs_N"]))


def mean_per_row(tensors: Tensors) -> torch.Tensor:
    """(R,): the mean log-probability of each answer's tokens, in nats."""
    return sum_per_row(tensors, tensors["logprobs_N"]) / num_tokens(tensors)


def of_pairs(tensors: Tensors, values_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(P,) of the chosen and (P,) of the rejected answers, in the order of the pairs."""
    group_of_R, sign_R = tensors["group_of_R"], tensors["sign_R"]
    empty_P = values_R.new_zeros(len(group_of_R) // 2)
    return tuple(empty_P.index_add(0, group_of_R, values_R * (sign_R == sign)) for sign in (1, -1))  # type: ignore[return-value]


def pair_metrics(tensors: Tensors, rewards_R: torch.Tensor) -> dict[str, torch.Tensor]:
    """`reward_metrics`, and the lengths of both answers in tokens."""
    chosen_P, rejected_P = of_pairs(tensors, num_tokens(tensors))
    return reward_metrics(tensors, rewards_R) | {"length_chosen": chosen_P.sum(), "length_rejected": rejected_P.sum()}


def reward_metrics(tensors: Tensors, rewards_R: torch.Tensor) -> dict[str, torch.Tensor]:
    """Detached sums over pairs: rewards of both answers, their margin, and how often the chosen one has the larger."""
    chosen_P, rejected_P = of_pairs(tensors, rewards_R.detach())
    return {
        "rewards_chosen": chosen_P.sum(), "rewards_rejected": rejected_P.sum(), "rewards_margin": (chosen_P - rejected_P).sum(),
        "rewards_accuracy": (chosen_P > rejected_P).sum(),
    }  # fmt: skip
