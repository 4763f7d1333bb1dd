"""Puts the engine's own layers in place of a model's for the length of a block: LoRA layers, gated MLPs, norms, rotary positions.

The model's modules, parameters and file format stay what they are; only `forward` is replaced, and only where a trial on
random numbers shows the same result. A family that computes something else (a norm with another rounding, a partial
rotation) keeps its own code without anybody having to list it.

One decision a reader may question: replacing `forward` on instances and not registering kernels by class, so the layers of other
models are left alone. The rotation is one function of the modelling module: as long as the block lasts, every model of the family in
this process computes with the one put there, in whatever thread. It may, for the numbers are the same to the rounding of the dtype,
and what is no single pack goes to the family's own function. A switch by thread would be worse: on a GPU autograd computes a
checkpointed layer again in a thread of its own. For the same reason blocks belong in one thread at a time: of two that overlap, the
one that ends first takes the function out of the other, and the other puts it back for good.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from weakref import WeakKeyDictionary, WeakSet

import torch
from peft.tuners.lora import Linear as PeftLinear
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from giong.engine.attention import packed_attention
from giong.engine.elementwise import ACTIVATIONS, rms_norm, rotary, use_kernels
from giong.engine.gated_mlp import gated_down
from giong.engine.lora_linear import LinearWeights, lora_linear_forward, lora_weights
from giong.models.nf4 import Nf4Linear

Forward = Callable[..., torch.Tensor]

_inside: WeakSet[PreTrainedModel] = WeakSet()
"""Models within the block: one more block inside it changes nothing, and finding that out would walk over all modules."""

_plans: WeakKeyDictionary[PreTrainedModel, list[tuple[torch.nn.Module, Forward]]] = WeakKeyDictionary()


@contextlib.contextmanager
def fast_path(model: PreTrainedModel) -> Iterator[None]:
    """Within this block the model's forward expects `lengths=`, keeps packed rows apart and runs on the engine's layers.

    Raises ModelError for a family that cannot keep packed rows apart.
    """
    if model in _inside:
        yield
        return
    modules = [(module, forward) for module, forward in _replacements(model) if "forward" not in module.__dict__]
    modelling = sys.modules[type(model).__module__]
    own_rotary = getattr(modelling, "apply_rotary_pos_emb", None)
    rotary_here = None if own_rotary is None else _rotary_of(modelling)
    with packed_attention(model):
        try:
            for module, forward in modules:
                module.forward = forward
            if rotary_here is not None:
                modelling.apply_rotary_pos_emb = rotary_here
            _inside.add(model)
            yield
        finally:
            _inside.discard(model)
            for module, _ in modules:
                module.__dict__.pop("forward", None)
            if own_rotary is not None:
                modelling.apply_rotary_pos_emb = own_rotary


def _replacements(model: PreTrainedModel) -> list[tuple[torch.nn.Module, Forward]]:
    """(module, forward) of all that is replaced; LoRA layers come and go with adapters, the rest is found once per model."""
    if model not in _plans:
        _plans[model] = _plan_blocks(model)
    lora = [(layer, _bind(lora_linear_forward, layer)) for layer in model.modules() if type(layer) is PeftLinear]
    return _plans[model] + lora


def _bind(function: Callable[..., torch.Tensor], module: torch.nn.Module) -> Forward:
    return lambda *args, **kwargs: function(module, *args, **kwargs)


def _plan_blocks(model: PreTrainedModel) -> list[tuple[torch.nn.Module, Forward]]:
    found: list[tuple[torch.nn.Module, Forward]] = []
    makers: dict[tuple, Callable[[torch.nn.Module], Forward] | None] = {}
    for module in model.modules():
        for matches, candidates in ((_is_rms_norm, _NORMS), (_is_gated_mlp, _MLPS)):
            if not matches(module):
                continue
            key = (type(module), matches, type(getattr(module, "act_fn", None)))
            if key not in makers:
                makers[key] = next((make for make in candidates if _agree(module, make(module))), None)
            if makers[key] is not None:
                found.append((module, makers[key](module)))
    return found


def _is_rms_norm(module: torch.nn.Module) -> bool:
    return "RMSNorm" in type(module).__name__ and getattr(module, "weight", None) is not None and module.weight.ndim == 1


def _epsilon(norm: torch.nn.Module) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


_NORMS = tuple(
    lambda norm, offset=offset: lambda x: rms_norm(x, norm.weight, epsilon=_epsilon(norm), offset=offset) for offset in (0.0, 1.0)
)
"""The gain is the weight (Llama) or one plus the weight (Gemma)."""


def _is_gated_mlp(module: torch.nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))


def _activation_name(mlp: torch.nn.Module) -> str:
    return next((name for name in ACTIVATIONS if type(ACT2FN[name]) is type(mlp.act_fn)), "silu")


def _gated_mlp(mlp: torch.nn.Module) -> Forward:
    activation = _activation_name(mlp)

    def forward(x: torch.Tensor) -> torch.Tensor:
        down = mlp.down_proj
        if type(down) is torch.nn.Linear:
            weights: LinearWeights | None = LinearWeights(down.weight, down.bias)
        elif type(down) is Nf4Linear:
            weights = LinearWeights(None, down.bias, packed=down)
        else:
            weights = lora_weights(down) if type(down) is PeftLinear and not down.lora_variant else None
        if weights is None:
            return down(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
        return gated_down(mlp.gate_proj(x), mlp.up_proj(x), weights, activation)

    return forward


_MLPS = (_gated_mlp,)


@torch.no_grad()
def _agree(module: torch.nn.Module, forward: Forward) -> bool:
    """Whether both give the same on a few random tokens, to the rounding of the dtype. Dropout is off while it is asked."""
    gate = getattr(module, "gate_proj", None)
    # A gated MLP in 4 bits may hold no parameter at all.
    parameter = module.weight if gate is None else gate.weight
    width = module.weight.shape[0] if gate is None else gate.in_features
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(1, 5, width, generator=generator) * torch.tensor([1e-3, 0.1, 1.0, 10.0, 100.0])[:, None]).to(parameter)
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        # The formulas are asked, whose kernels run on any device; those of a GPU have had a trial of their own.
        with use_kernels(None):
            ours, theirs = forward(x), type(module).forward(module, x)
    except (AttributeError, TypeError, RuntimeError):
        return False
    finally:
        for part, mode in modes:
            part.training = mode
    return _same(ours, theirs)


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    steps = 4 * torch.finfo(theirs.dtype).eps
    return ours.shape == theirs.shape and bool(((ours - theirs).abs().amax(-1) <= steps * theirs.abs().amax(-1).clamp_min(1e-30)).all())


_rotaries: dict[str, Callable] = {}


def _rotary_of(modelling: ModuleType) -> Callable:
    """The engine's rotary function for a modelling module, or the module's own where a trial shows that it computes another."""
    if modelling.__name__ not in _rotaries:
        own = modelling.apply_rotary_pos_emb

        def replaced(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
            plain = not args and not kwargs and q.shape[0] == 1 and cos.shape[0] == 1 and cos.ndim == 3
            if not plain or cos.shape[-1] != q.shape[-1] or cos.dtype != q.dtype or q.shape[2] != cos.shape[1]:
                return own(q, k, cos, sin, *args, **kwargs)
            return rotary(q, cos, sin), rotary(k, cos, sin)

        _rotaries[modelling.__name__] = replaced if _same_rotation(own, replaced) else own
    return _rotaries[modelling.__name__]


@torch.no_grad()
def _same_rotation(own: Callable, replaced: Callable) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 3, 5, 8, generator=generator), torch.randn(1, 1, 5, 8, generator=generator)
    angles = torch.randn(1, 5, 4, generator=generator).repeat(1, 1, 2)
    try:
        with use_kernels(None):
            ours, theirs = replaced(q, k, angles.cos(), angles.sin()), own(q, k, angles.cos(), angles.sin())
    except (TypeError, RuntimeError, IndexError):
        return False
    return all(_same(a, b) for a, b in zip(ours, theirs))
