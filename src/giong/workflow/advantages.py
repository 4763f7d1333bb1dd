"""How much better than expected a drawn answer was: against its siblings (`grpo`, `rloo`), or token by token against a value (`ppo`)."""

from __future__ import annotations

import numpy as np


def group_relative(rewards: np.ndarray, num_generations: int) -> np.ndarray:
    """(reward - mean) / deviation within the answers to each request (2402.03300, section 4.1.2); 0 where all are alike."""
    groups = rewards.reshape(-1, num_generations)
    spread = groups.std(1, keepdims=True)
    return ((groups - groups.mean(1, keepdims=True)) / np.where(spread > 1e-6, spread, np.inf)).reshape(-1)


def leave_one_out(rewards: np.ndarray, num_generations: int) -> np.ndarray:
    """reward - mean of the others to the same request (2402.14740, equation 8)."""
    groups = rewards.reshape(-1, num_generations)
    return ((groups - groups.mean(1, keepdims=True)) * num_generations / (num_generations - 1)).reshape(-1)


def token_rewards(reward: float, divergences: np.ndarray, beta: float) -> np.ndarray:
    """-beta times each token's log(model / reference), and the answer's reward at its last token (2203.02155, equation 2)."""
    rewards = -beta * np.asarray(divergences, dtype=float)
    rewards[-1] += reward
    return rewards


def generalised_advantages(rewards: np.ndarray, values: np.ndarray, gamma: float, gae_lambda: float) -> np.ndarray:
    """A_t = sum over l of (gamma lambda)^l delta_(t+l), delta_t = r_t + gamma V_(t+1) - V_t (1506.02438, equations 9 and 16).

    An answer ends with its last token: nothing is to come after it, also where its length was cut.
    """
    deltas = rewards + gamma * np.append(values[1:], 0.0) - values
    advantages, behind = np.zeros(len(deltas)), 0.0
    for token in range(len(deltas) - 1, -1, -1):
        advantages[token] = behind = deltas[token] + gamma * gae_lambda * behind
    return advantages


def standardised(advantages: np.ndarray) -> np.ndarray:
    """Mean 0 and deviation 1 over all tokens of a draw; 0 where all are alike."""
    spread = advantages.std()
    return (advantages - advantages.mean()) / (spread if spread > 1e-6 else np.inf)


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """1 - Var(returns - values) / Var(returns): 1 where the values foretell the returns, 0 where they say nothing, lower where they mislead."""
    spread = returns.var()
    return float(1 - (returns - values).var() / spread) if spread > 1e-12 else 0.0
