"""Which activations are kept for the backward pass, which are computed again there, and which wait in the host's memory.

What a layer keeps is measured on the model at hand: one forward pass over the largest pack that its rows can make, in which
every tensor that autograd would keep is counted and let go. So method, dtype, dropout and family need no formula.

One decision a reader may question: it is the first layers that are computed again. The backward pass begins at the last one,
so by the time a layer is computed again, all that the later ones kept has been freed; the other way round, the peak would be
higher by a layer (Chen et al. 2016, 1604.06174, is the idea; which layers is not its subject).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from giong.engine import lora_dropout
from giong.engine.cross_entropy import chunk_positions
from giong.engine.out_of_memory import is_out_of_memory, release_memory
from giong.engine.packing import grouped, pack
from giong.engine.step import forward
from giong.errors import ConfigError
from giong.models.parts import decoder_layers
from giong.models.rows import Row
from giong.sizing.memory import USABLE_SHARE
from giong.sizing.units import format_bytes

BYTES_PER_PARAMETER = 12
"""What a trainable parameter takes beside the model: gradient and AdamW's two moments in fp32."""
MASTER_BYTES = 4
"""And its fp32 master, where it is not fp32 itself."""

LAYERS_AT_WORK = 2.0
"""Layers' worth of memory that the backward pass works in: one computed again, and as much for gradients of its inner tensors."""

MIN_OFFLOADED_BYTES = 1024**2
"""Smaller tensors stay: the copy would cost more than it frees."""

PACKS_TRIED = 64
"""Lengths of a first row with which the pack with most virtual tokens is looked for, among those that there are."""

FETCHED_AHEAD = 4
"""Tensors that are on their way back from the host while the backward pass works."""

Setting = Literal["auto", "none", "all"] | int


@dataclass(frozen=True, slots=True)
class KeptBytes:
    """What one pack keeps for the backward pass: by each decoder layer, a layer's input, and everything else."""

    layers: tuple[int, ...]
    entry: int
    rest: int

    def with_checkpointing(self, num_layers: int) -> int:
        """Bytes kept when the first `num_layers` layers keep their inputs alone; one without a backward pass keeps nothing anyway."""
        return self.rest + sum(min(self.entry, kept) for kept in self.layers[:num_layers]) + sum(self.layers[num_layers:])


@dataclass(frozen=True, slots=True)
class ActivationPlan:
    """The first `num_checkpointed` layers are computed again; `reason` is one sentence for the user, `fits` whether it promises anything."""

    num_checkpointed: int
    offload: bool
    kept_bytes: int
    reason: str
    fits: bool = True


def largest_pack(rows: Sequence[Row], max_tokens: int | None, max_groups: int | None = None, num_virtual_tokens: int = 0) -> list[Row]:
    """The pack with most tokens that can be made of these rows: of whole groups, `max_groups` at most (those of a step); a group longer than
    a pack stands alone.

    `max_tokens` bounds the rows' own tokens, None stands for packs without a bound. The longest groups that fit are taken first; where
    `num_virtual_tokens` stand before every row, packs that begin with shorter ones, and so have more rows, are tried too.
    """
    with_loss = [row for row in rows if row.loss_weight]
    groups = sorted(([with_loss[index] for index in group] for group in grouped(with_loss)), key=_num_tokens, reverse=True)
    starts = range(0, len(groups), max(1, len(groups) // PACKS_TRIED) if num_virtual_tokens else max(1, len(groups)))
    packs = (_filled(groups[start:], max_tokens, max_groups) for start in starts)
    return max(packs, key=lambda made: _num_tokens(made) + num_virtual_tokens * len(made), default=[])


def _filled(groups: Sequence[Sequence[Row]], max_tokens: int | None, max_groups: int | None) -> list[Row]:
    """The first group, and of the others those that fit beside what was taken before."""
    chosen: list[Row] = []
    num_tokens = num_groups = 0
    for group in groups:
        if num_groups == max_groups:
            break
        if not chosen or max_tokens is None or num_tokens + _num_tokens(group) <= max_tokens:
            chosen += group
            num_tokens, num_groups = num_tokens + _num_tokens(group), num_groups + 1
    return chosen


def _num_tokens(rows: Sequence[Row]) -> int:
    return sum(map(len, rows))


def measure_kept_bytes(model: PreTrainedModel, rows: Sequence[Row]) -> KeptBytes:
    """What one pack of `rows` would keep with everything kept, in training mode. Leaves the random state as it was."""
    layers = decoder_layers(model)
    counts, entry, place = [0] * (len(layers) + 1), 0, len(layers)
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    # The references keep an address from standing for two storages, without keeping what lies there.
    seen: dict[int, StorageWeakRef] = {}

    def count(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in seen:
            seen[storage._cdata] = StorageWeakRef(storage)
            counts[place] += storage.nbytes()

    def enter(index: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, given: tuple, *rest: object) -> None:
            nonlocal place, entry
            place = index
            if index < len(layers) and given:
                entry = given[0].numel() * given[0].element_size()

        return hook

    training = model.training
    hooks = [layer.register_forward_pre_hook(enter(index)) for index, layer in enumerate(layers)]
    # After the last layer come the final norm and the head.
    hooks += [layer.register_forward_hook(enter(len(layers))) for layer in layers[-1:]]
    model.train()
    try:
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, _never):
            forward(model, pack(rows))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return KeptBytes(tuple(counts[:-1]), entry, counts[-1])


def _never(packed: object) -> torch.Tensor:
    raise AssertionError("nothing goes backward while activations are counted")


def logits_bytes(model: PreTrainedModel) -> int:
    """The chunk of logits that the head works in, with its softmax in fp32; 0 for a model without that head."""
    head = model.get_output_embeddings()
    if head is None:
        return 0
    weight = head.weight
    return chunk_positions(weight.device, weight.shape[0]) * weight.shape[0] * (weight.element_size() + torch.float32.itemsize)


def head_gradient_bytes(model: PreTrainedModel, rows: Sequence[Row]) -> int:
    """What the gradient (V, D) of a trained head takes for a moment beside what a pass of `rows` keeps; 0 where none is trained.

    It is summed in fp32, and a chunk's share of it is a product in the model's dtype (in fp32 added in place). Where the weights of the
    log-probabilities are known before the forward pass, that pass forms the sum and keeps it, so it is measured there already.
    """
    head = model.get_output_embeddings()
    if head is None or not head.weight.requires_grad or not rows or rows[0].target is not None:
        return 0
    weight = head.weight
    is_kept = not rows[0].extras and rows[0].group is None
    product = 0 if weight.dtype == torch.float32 else weight.element_size()
    return weight.numel() * (product + (0 if is_kept else torch.float32.itemsize))


def plan_activations(
    model: PreTrainedModel,
    largest: Sequence[Row],
    *,
    num_trainable: int,
    budget_bytes: int | None,
    anchor_bytes: int = 0,
    checkpointing: Setting = "auto",
    offload: Literal["auto"] | bool = "auto",
) -> ActivationPlan:
    """What to keep, from a measurement on the largest pack of a run and what is free now, before the optimizer takes its part: that of
    `num_trainable` numbers, of which a process holds a shard where they are spread over several.

    `anchor_bytes` is what the copies of what moves take that are made before the first step. `budget_bytes` None stands for a system that
    does not tell: then everything is kept. Where the measurement itself does not fit, as much as possible is computed again, and the loop
    finds smaller packs. Raises ConfigError for more layers than there are, and for a family whose layers cannot be computed again.
    """
    num_layers = len(decoder_layers(model))
    _check(checkpointing, num_layers, model.config.model_type)
    kept = _measured(model, largest)
    if kept is None:
        number = {"auto": num_layers, "none": 0, "all": num_layers}.get(checkpointing, checkpointing)  # type: ignore[call-overload]
        reason = f"activations: not even one pass fits; {number} of {num_layers} layers are computed again"
        return ActivationPlan(number, False, 0, reason, fits=False)
    state_bytes = num_trainable * (BYTES_PER_PARAMETER + (0 if model.dtype == torch.float32 else MASTER_BYTES))
    taken_bytes = state_bytes + anchor_bytes + logits_bytes(model) + head_gradient_bytes(model, largest)
    return choose_plan(
        kept, room_bytes=None if budget_bytes is None else round(USABLE_SHARE * budget_bytes) - taken_bytes,
        checkpointing=checkpointing, offload=offload, can_offload=model.device.type == "cuda",
    )  # fmt: skip


def _measured(model: PreTrainedModel, rows: Sequence[Row]) -> KeptBytes | None:
    """None where one forward pass does not fit into memory. Rows without loss keep nothing."""
    if not rows:
        return KeptBytes((0,) * len(decoder_layers(model)), 0, 0)
    try:
        return measure_kept_bytes(model, rows)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    release_memory()
    return None


def _check(checkpointing: Setting, num_layers: int, family: str) -> None:
    if checkpointing in ("auto", "none"):
        return
    if num_layers == 0:
        raise ConfigError(
            f"The layers of the {family} family cannot be computed again", place="train.activation_checkpointing",
            remedy="Set it to auto or none, and lower train.max_tokens_per_pack where memory does not suffice.",
        )  # fmt: skip
    if isinstance(checkpointing, int) and checkpointing > num_layers:
        raise ConfigError(
            f"{checkpointing} layers cannot be checkpointed: the model has {num_layers}", place="train.activation_checkpointing",
            remedy="Give a smaller number, or `all`.",
        )  # fmt: skip


def choose_plan(
    kept: KeptBytes, *, room_bytes: int | None, checkpointing: Setting, offload: Literal["auto"] | bool, can_offload: bool
) -> ActivationPlan:
    """Arithmetic alone: as few layers computed again as fit into `room_bytes`, all of them where nothing fits."""
    num_layers = len(kept.layers)
    working_bytes = round(LAYERS_AT_WORK * max(kept.layers, default=0))

    def fits(number: int) -> bool:
        return room_bytes is None or kept.with_checkpointing(number) + working_bytes <= room_bytes

    if checkpointing == "auto":
        number = next((number for number in range(num_layers + 1) if fits(number)), num_layers)
    else:
        number = {"none": 0, "all": num_layers}.get(checkpointing, checkpointing)  # type: ignore[call-overload]
    kept_bytes = kept.with_checkpointing(number)
    sends = can_offload and (not fits(number) if offload == "auto" else offload)
    # Layers below all that moves have no backward pass to be computed again for.
    num_again = sum(layer > 0 for layer in kept.layers[:number])
    room = "memory that the system does not tell" if room_bytes is None else f"{format_bytes(max(0, room_bytes))} of room"
    reason = f"activations: {num_again} of {num_layers} layers are computed again, a pack keeps {format_bytes(kept_bytes)} ({room})"
    if sends:
        reason += "; what is kept waits in the host's memory"
    elif offload is True:
        reason += "; they stay where they are: a CPU has no other memory to send them to"
    if may_not := not sends and not fits(number):
        reason += "; even so it may not fit, and packs become smaller where they can"
    return ActivationPlan(number, sends, kept_bytes, reason, fits=not may_not)


@contextlib.contextmanager
def activation_memory(model: PreTrainedModel, plan: ActivationPlan) -> Iterator[None]:
    """Within this block the model's forward and backward passes keep what `plan` says; no number changes."""
    chosen = decoder_layers(model)[: plan.num_checkpointed]
    for layer in chosen:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = _computed_again
    try:
        with offloaded(model) if plan.offload else contextlib.nullcontext():
            yield
    finally:
        for layer in chosen:
            del layer.gradient_checkpointing, layer._gradient_checkpointing_func


def _computed_again(layer: Callable, *given: Any, **options: Any) -> Any:
    """Not reentrant: the inputs of a frozen model's layers need no gradient, and dropout's random state is put back; of passes side by side
    (`lanes`) each has its own."""
    if lora_dropout.is_seeded():
        options = {"preserve_rng_state": False, "context_fn": lora_dropout.drawn_again, **options}
    return checkpoint(layer, *given, use_reentrant=False, **options)


class _Parcel:
    """A kept tensor in the host's memory; `back` is its copy on the device once that has been asked for."""

    __slots__ = ("__weakref__", "back", "device", "host", "ready")

    def __init__(self, host: torch.Tensor, device: torch.device) -> None:
        self.host, self.device = host, device
        self.back: torch.Tensor | None = None
        self.ready: torch.cuda.Event | None = None


class Offload:
    """Sends what autograd keeps to the host in the forward pass and fetches it, a few tensors ahead, in the backward pass.

    torch's own `save_on_cpu` is not used: it would send the frozen weights along (autograd functions keep those too), a tensor
    once for each function that keeps it, and on the stream that computes. Here copies run on a stream of their own, in order.
    Autograd alone holds the parcels, so they go when it lets go of them.
    """

    def __init__(self, model: torch.nn.Module, *, min_bytes: int = MIN_OFFLOADED_BYTES) -> None:
        device = next(model.parameters()).device
        self.own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self.min_bytes = min_bytes
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.num_sent_bytes = 0
        self._order: list[weakref.ref[_Parcel]] = []
        self._known: dict[tuple, tuple[StorageWeakRef, int]] = {}

    def send(self, tensor: torch.Tensor) -> torch.Tensor | tuple[int, _Parcel]:
        """The tensor itself where it is a weight or small; else its parcel, with its place in the order of sending."""
        storage, num_bytes = tensor.untyped_storage(), tensor.numel() * tensor.element_size()
        if num_bytes < self.min_bytes or storage._cdata in self.own:
            return tensor
        if self._order and self._order[-1]() is None:
            # The backward pass begins with the last one: it is over, or on its way to nothing that is still needed here.
            self._order.clear()
            self._known.clear()
        key = (storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version)
        if key in self._known and (parcel := self._order[self._known[key][1]]()) is not None:
            return self._known[key][1], parcel
        host = torch.empty_like(tensor, device="cpu", pin_memory=self.stream is not None)
        with self._beside(tensor):
            host.copy_(tensor, non_blocking=True)
        parcel = _Parcel(host, tensor.device)
        # The reference keeps the storage's address from standing for another one.
        self._known[key] = (StorageWeakRef(storage), len(self._order))
        self._order.append(weakref.ref(parcel))
        self.num_sent_bytes += num_bytes
        return len(self._order) - 1, parcel

    def fetch(self, kept: torch.Tensor | tuple[int, _Parcel]) -> torch.Tensor:
        """What `send` was given; what was sent just before it is wanted next and starts on its way."""
        if isinstance(kept, torch.Tensor):
            return kept
        place, parcel = kept
        self._bring(parcel)
        if place < len(self._order) and self._order[place]() is parcel:
            for reference in reversed(self._order[max(0, place - FETCHED_AHEAD) : place]):
                if (following := reference()) is not None:
                    self._bring(following)
        tensor = parcel.back
        assert tensor is not None
        if parcel.ready is not None:
            current = torch.cuda.current_stream(tensor.device)
            current.wait_event(parcel.ready)
            tensor.record_stream(current)
        return tensor

    def _bring(self, parcel: _Parcel) -> None:
        if parcel.back is None:
            with self._beside():
                parcel.back = parcel.host.to(parcel.device, non_blocking=True)
                parcel.ready = None if self.stream is None else self.stream.record_event()

    @contextlib.contextmanager
    def _beside(self, tensor: torch.Tensor | None = None) -> Iterator[None]:
        """On the stream of the copies; `tensor` is what the computing stream must have finished, and not free too early."""
        if self.stream is None:
            yield
            return
        if tensor is not None:
            self.stream.wait_stream(torch.cuda.current_stream(tensor.device))
            tensor.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            yield


@contextlib.contextmanager
def offloaded(model: torch.nn.Module, *, min_bytes: int = MIN_OFFLOADED_BYTES) -> Iterator[Offload]:
    """Within this block what autograd keeps waits in the host's memory, all but weights and small tensors."""
    offload = Offload(model, min_bytes=min_bytes)
    with torch.autograd.graph.saved_tensors_hooks(offload.send, offload.fetch):
        yield offload
