"""Optimizers over fp32 masters: the model computes in its own dtype, the small part that moves is kept exactly.

Each trainable parameter has an fp32 master and an fp32 gradient; one that is fp32 itself is its own master. Gradients are moved into
the masters the moment autograd finishes them, so accumulation over passes never rounds to bf16 and no second copy of all gradients
exists.

Over many processes the masters are the same everywhere and their gradients lie in one buffer, which is summed once per step;
or they are FSDP's fp32 shards themselves, whose gradients FSDP has summed already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from transformers import PreTrainedModel

from giong.engine.distributed import ALONE, Processes, is_spread, local
from giong.models.parts import embeddings_and_heads


class MasterOptimizer:
    """AdamW (or Muon for matrices, AdamW for the rest) over fp32 masters of named parameters.

    `learning_rate_factors` multiply the learning rate of single parameters, under AdamW.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        *,
        optimizer: str,
        learning_rate: float,
        weight_decay: float,
        muon_excluded: frozenset[str] = frozenset(),
        learning_rate_factors: Mapping[str, float] = MappingProxyType({}),
        processes: Processes = ALONE,
    ) -> None:
        self.parameters = dict(parameters)
        self.processes = processes
        self.masters = {name: _master_of(parameter) for name, parameter in self.parameters.items()}
        self._hooks = []
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            master.grad = torch.zeros_like(master, requires_grad=False)
            if master is not parameter:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(_move_gradient(master)))
        self._shared_gradients: torch.Tensor | None = None
        if processes.size > 1 and not processes.sharded:
            self._shared_gradients = _one_buffer(list(self.masters.values()))
            processes.copy_first([master.detach() for master in self.masters.values()])
        matrices = [n for n, m in self.masters.items() if optimizer == "muon" and m.ndim == 2 and n not in muon_excluded]
        rest = [name for name in self.masters if name not in set(matrices)]
        alike: dict[tuple[float, float], list[torch.Tensor]] = {}
        for name in rest:
            decay, factor = weight_decay if self.masters[name].ndim >= 2 else 0.0, learning_rate_factors.get(name, 1.0)
            alike.setdefault((decay, factor), []).append(self.masters[name])
        self.parts: dict[str, torch.optim.Optimizer] = {}
        if alike:
            groups = [{"params": part, "weight_decay": decay, "factor": factor} for (decay, factor), part in alike.items()]
            self.parts["adamw"] = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
        if matrices:
            # "match_rms_adamw" lets both parts share one learning rate (Liu et al. 2025, 2502.16982, equation 4).
            self.parts["muon"] = torch.optim.Muon(
                [self.masters[name] for name in matrices], lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )

    def gradient_norm(self) -> float:
        """Euclidean norm over all gradients; of all shards where they are spread over processes."""
        norms = torch._foreach_norm([local(master.grad) for master in self.masters.values()])
        square = torch.stack(norms).double().square().sum()
        if self.processes.sharded:
            self.processes.sum_tensor(square)
        return math.sqrt(float(square))

    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """Sum over the processes, clip, update masters, copy them into the model, clear gradients. Returns the norm before clipping."""
        if self._shared_gradients is not None:
            self.processes.sum_tensor(self._shared_gradients)
        norm = self.gradient_norm()
        gradients = [local(master.grad) for master in self.masters.values()]
        if math.isfinite(norm) and norm > max_grad_norm:
            torch._foreach_mul_(gradients, max_grad_norm / norm)
        if math.isfinite(norm):
            for part in self.parts.values():
                for group in part.param_groups:
                    group["lr"] = learning_rate * group.get("factor", 1.0)
                part.step()
            self.write_parameters()
        torch._foreach_zero_(gradients)
        return norm

    @torch.no_grad()
    def write_parameters(self) -> None:
        """Copy the masters into the model's parameters (rounding to their dtype)."""
        copied = [(parameter, self.masters[name]) for name, parameter in self.parameters.items() if self.masters[name] is not parameter]
        if copied:
            torch._foreach_copy_([parameter.detach() for parameter, _ in copied], [master.detach() for _, master in copied])

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a resumed run needs, as flat named tensors: masters and optimizer states."""
        tensors = {f"master/{name}": master.detach() for name, master in self.masters.items()}
        names = {id(master): name for name, master in self.masters.items()}
        for part_name, part in self.parts.items():
            for master, state in part.state.items():
                for key, value in state.items():
                    tensors[f"{part_name}/{key}/{names[id(master)]}"] = torch.as_tensor(value)
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Inverse of `state_tensors`, from tensors on any device. Raises KeyError where the checkpoint belongs to other parameters."""
        for name, master in self.masters.items():
            master.copy_(tensors[f"master/{name}"])
        for part_name, part in self.parts.items():
            part.state.clear()
            for group in part.param_groups:
                for master in group["params"]:
                    name = next(n for n, m in self.masters.items() if m is master)
                    suffix = f"/{name}"
                    # All of it beside the master, the count of steps too: there the fused kernels made it and look for it.
                    found = {
                        key.removeprefix(f"{part_name}/").removesuffix(suffix): value.to(master.device, copy=True)
                        for key, value in tensors.items()
                        if key.startswith(f"{part_name}/") and key.removeprefix(f"{part_name}/").partition("/")[2] == name
                    }
                    if found:
                        part.state[master] = found
        self.write_parameters()

    def close(self) -> None:
        """Take the hooks and the gradients off the model's parameters."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self.parameters.values():
            parameter.grad = None


def _master_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    if is_spread(parameter) or parameter.dtype == torch.float32:
        return parameter
    return parameter.detach().to(torch.float32)


def _one_buffer(masters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Put the gradients of the masters side by side into one tensor, which is returned: one message instead of hundreds."""
    buffer = torch.zeros(sum(master.numel() for master in masters), device=masters[0].device)
    for master, part in zip(masters, buffer.split([master.numel() for master in masters])):
        master.grad = part.view_as(master)
    return buffer


def _move_gradient(master: torch.Tensor):  # type: ignore[no-untyped-def]
    def hook(parameter: torch.nn.Parameter) -> None:
        master.grad.add_(parameter.grad)
        parameter.grad = None

    return hook


def not_for_muon(model: PreTrainedModel, parameters: Mapping[str, torch.nn.Parameter]) -> frozenset[str]:
    """Names of the matrices that AdamW moves under Muon as well. It is made for matrices between hidden layers: rows of an embedding are
    looked up one by one, and those of a head are outputs, each of a size of its own (Jordan et al. 2024, "Muon", leave both to AdamW)."""
    # By identity: what they are called differs from family to family (GPT-2's are wte and wpe).
    excluded = {id(parameter) for parameter in embeddings_and_heads(model)}
    return frozenset(name for name, parameter in parameters.items() if id(parameter) in excluded)


def learning_rate_at(step: int, num_steps: int, *, peak: float, warmup_share: float, schedule: str) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then cosine or linear to a tenth resp. zero, or constant."""
    warmup_steps = round(num_steps * warmup_share)
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    if schedule == "linear":
        return peak * (1 - progress)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
