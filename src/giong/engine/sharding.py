"""Full training over many processes: weights, gradients and optimizer state in shards (FSDP2, `fully_shard`).

Each decoder layer is a unit that is gathered for its forward and its backward pass; embedding, last norm and head are one more.
Shards are fp32, so that they are the masters themselves; layers are gathered, and compute, in the dtype that the model was loaded
in, and gradients are summed in fp32.

One decision a reader may question: the root is a module around the model whose forward computes log-probabilities. The engine
takes the head's weight without calling the head, and FSDP has whole weights, and hooks for their gradients, only within a call
of the module that owns them. The model's own class and names stay as they are.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from giong.engine.distributed import Processes, is_spread, whole
from giong.engine.fast_path import fast_path
from giong.engine.packing import Pack
from giong.engine.step import WHOLE_FORWARD, forward_logprobs


class _Root(torch.nn.Module):
    """What FSDP takes for the outermost module."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.originals = dict(model.named_parameters())

    def forward(self, pack: Pack) -> dict[str, torch.Tensor]:
        return forward_logprobs(self.model, pack)

    def logprobs(self, pack: Pack) -> dict[str, torch.Tensor]:
        """A call from outside."""
        del self.model.__dict__[WHOLE_FORWARD]
        try:
            result = self(pack)
        finally:
            self.model.__dict__[WHOLE_FORWARD] = self.logprobs
        if not torch.is_grad_enabled():
            # Without a backward pass nothing would throw the gathered weights away before the next update.
            self.reshard()
        return result


def shard(
    model: PreTrainedModel, parameters: dict[str, torch.nn.Parameter], processes: Processes, *, wanted: bool = True
) -> dict[str, torch.nn.Parameter]:  # fmt: skip
    """Spread the model over the processes if all of its weights are trained and it is `wanted`; returns the parameters by the same names.

    With adapters nothing happens: the frozen weights stay whole in every process. (Adapters on a model that does not fit into one
    process are not covered.)
    """
    processes.sharded = wanted and processes.size > 1 and all(parameter.requires_grad for parameter in model.parameters())
    if not processes.sharded:
        return parameters
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    with fast_path(model):
        # Which of the model's layers the engine may replace is tried out on whole weights, once.
        pass
    dtype = next(model.parameters()).dtype
    mesh = DeviceMesh.from_group(processes.group, model.device.type)
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    layer_names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in layer_names]
    root = _Root(model)
    for module in (*layers, root):
        unit = [parameter for parameter in module.parameters() if not is_spread(parameter)]
        for parameter in unit:
            parameter.data = parameter.data.float()
        fully_shard(module, mesh=mesh, mp_policy=policy)
        for parameter in unit:
            # The shard is a copy. `originals` still holds the parameter, which would keep all layers whole in fp32 to the end.
            parameter.data = torch.empty(0)
        # The loss is divided by the weight of all rows, so gradients are summed and not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    model.__dict__[WHOLE_FORWARD] = root.logprobs
    shards = dict(model.named_parameters())
    return {name: shards[name] for name in parameters}


@torch.no_grad()
def unshard(model: PreTrainedModel, dtype: torch.dtype, processes: Processes) -> None:
    """Put the parameters that `shard` took out back into the model, in the first process with the whole weights in `dtype`.

    Every process has to call it; the others' parameters are empty. The model can then be saved. To compute with it, load what was
    saved: FSDP's hooks stay in the modules.
    """
    if not processes.sharded:
        return
    from torch.distributed.fsdp import FSDPModule

    root = model.__dict__.pop(WHOLE_FORWARD).__self__
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    restored: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        # All take part in gathering each weight, one weight at a time.
        tensor = whole(parameter.detach()).to(dtype)
        restored[parameter] = root.originals[name]
        root.originals[name].data = tensor if processes.is_first else torch.empty(0, dtype=dtype)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter in restored:
                module._parameters[name] = restored[parameter]
    processes.sharded = False
