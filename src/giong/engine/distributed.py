"""Many processes, one run: who computes which rows, what is summed, what is decided together, and what happens when one is gone.

`torchrun` starts the processes; `connect` makes them known to each other and proves that they can add numbers before anything
heavy is loaded. Every process then calls `engine.loop.train` with the same arguments.

One decision a reader may question: neither DistributedDataParallel nor a sampler per process. The loss of a step is divided by
the weight of all its rows before the first pass, so processes may take any share of the rows and their gradients are only
summed, once per step, out of one fp32 buffer (docs/decisions/0007-distributed.md). The other path, where every weight is
trained and sharded, is `engine/sharding.py`.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from giong import errors
from giong.engine.packing import group_lengths, grouped, plan_packs
from giong.errors import GiongError, ResourceError
from giong.models.rows import Row

T = TypeVar("T")

ARRIVAL_SECONDS = 120.0
"""How long processes wait for each other at the start: the slowest machine has to import torch."""
SILENCE_SECONDS = 86_400.0
"""How long a process waits for another one in the middle of a run before it takes it for lost: longer than anything that the first one
does alone (validation, a sweep's scores, drawn answers). A process that dies closes its connections, which the others see at once;
only for a machine that vanishes from the network without a word do they wait so long."""
WORD_SECONDS = 5.0
"""How long a process that has failed, or sees another one fail, waits for the others' reasons."""
LEAVE_SECONDS = 20.0
"""How long an idle process waits to be sent home once it is asked to stop."""
LOST_WORDS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
"""How the back ends call a lost process; gloo raises plain RuntimeErrors."""
SEED_STRIDE = 0x9E3779B97F4A7C15
"""Odd, so that no two processes meet on one seed; 2^64 over the golden ratio spreads them."""


class Processes:
    """The processes of a run as one of them sees it; with one process every method does nothing or what its name says alone.

    `names` are for messages. `sharded` says whether the weights are spread over the processes (`sharding.shard` sets it): then
    every pass is a meeting of all, and all must make the same number of them.
    """

    def __init__(self, rank: int = 0, names: Sequence[str] = ("alone",), store: dist.Store | None = None) -> None:
        self.rank, self.size, self.names = rank, len(names), tuple(names)
        self.sharded = False
        self.gone: tuple[int, ...] = ()
        self._store = store
        self._round = self._depth = self._num_orders = 0
        self._broken = False
        self.group = dist.new_group(timeout=timedelta(seconds=SILENCE_SECONDS)) if self.size > 1 else None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes events, checkpoints and results."""
        return self.rank == 0

    @property
    def num_on_machine(self) -> int:
        """How many of them share this machine's memory."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.size > 1 else 1

    @property
    def is_spokesman(self) -> bool:
        """Whether this process says what went wrong: the first of those that are left."""
        return self.rank == min(set(range(self.size)) - set(self.gone))

    @property
    def is_broken(self) -> bool:
        """Whether the processes have lost each other: nothing can be done together any more."""
        return self._broken

    def name(self, rank: int) -> str:
        return f"process {rank} of {self.size} ({self.names[rank]})"

    # Work

    def passes(self, rows: Sequence[Row], max_tokens: int, lanes: int = 1) -> list[tuple[list[Row], float]]:
        """This process's share of the rows of a step as packs of at most `max_tokens`, each with the factor of its loss; groups stay whole.

        The factor is 1, or 0 for a pass that a sharded process makes only so that the others do not wait for it.
        """
        groups, lengths = [[rows[index] for index in group] for group in grouped(rows)], group_lengths(rows)
        shares = deal(lengths, self.size)
        plans = [
            [[share[index] for index in pack] for pack in plan_packs([lengths[i] for i in share], max_tokens, lanes)] for share in shares
        ]
        passes = [([row for index in pack for row in groups[index]], 1.0) for pack in plans[self.rank]]
        if self.sharded:
            passes += [(groups[lengths.index(min(lengths))], 0.0)] * (max(map(len, plans)) - len(passes))
        return passes

    def seed(self, seed: int) -> int:
        """A seed for this process: the given one in the first, so that one process computes what it always did."""
        return seed if self.is_first else (seed + self.rank * SEED_STRIDE) % 2**63

    # Numbers

    def sum_tensor(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by its sum over the processes, the same bytes in all of them."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)

    def copy_first(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give all processes the first one's values."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0, group=self.group)

    def sum_of(self, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Sums over the processes of what each computes, in the order of the processes. Where some fail, all raise the same, as `each` does.

        A sharded process cannot tell in time: its error goes straight up, and the others find it through `together`.
        """
        if self.size == 1:
            return compute()
        sums: dict[str, float] = {}
        for part in self.gather(compute()) if self.sharded else self.each(compute):
            for key, value in part.items():
                sums[key] = sums.get(key, 0.0) + value
        return sums

    # Decisions

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        if self.size == 1:
            return flag
        wanted = torch.tensor(int(flag))
        dist.all_reduce(wanted, op=dist.ReduceOp.MAX, group=self.group)
        return bool(wanted)

    def wants(self, flag: bool) -> bool:
        """Within a step: `flag` as it is here, or agreed on where every pass is a meeting and nobody may leave alone."""
        return self.any(flag) if self.sharded else flag

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order. Values are pickled; they come from these processes alone."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def each(self, function: Callable[[], T]) -> list[T]:
        """What `function` returns in each process, in their order. The first failure in that order is raised in all: whoever acts on it
        (smaller packs, a wish to stop, an older checkpoint) then does what the others do."""
        if self.size == 1:
            return [function()]
        outcome: T | None = None
        raised: Exception | None = None
        try:
            outcome = function()
        except Exception as error:
            raised = error
        outcomes = self.gather((outcome, _portable(raised)))
        for rank, (_, failure) in enumerate(outcomes):
            if failure:
                if raised and rank == self.rank:
                    # The error itself: it knows where it was raised.
                    raise raised
                failure.add_note(f"in {self.name(rank)}")
                raise failure
        return [value for value, _ in outcomes]

    def first(self, function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """What `function` returns in the first process, which alone calls it; what it raises there is raised in all.

        Where an error does not survive the way to another process, the others raise a RuntimeError with its words.
        """
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        raised: Exception | None = None
        if self.is_first:
            try:
                outcome[0] = function()
            except Exception as error:
                raised, outcome[1] = error, _portable(error)
        dist.broadcast_object_list(outcome, src=0, group=group or self.group)
        # Here it is the error itself, whatever became of it on its way: whoever waits for it knows it by its type.
        if error := raised or outcome[1]:
            raise error
        return outcome[0]

    # Failures

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all processes enter and leave together, well or not.

        Raises what another process failed with, or ResourceError naming the processes that are gone, instead of the back end's
        words. Where only this process failed, the others are woken and no further block can be entered.
        """
        if self.size == 1 or self._depth:
            yield
            return
        if self._broken:
            raise ResourceError("The processes of this run have lost each other", remedy="Run the same command again.")
        self._depth += 1
        try:
            yield
        except Exception as error:
            lost = is_lost(error)
            words = self._exchange_words(None if lost else error)
            if lost or len(words) < self.size:
                self._leave_group()
            if lost:
                raise self._reason(words) from error
            raise
        finally:
            self._depth -= 1
            self._round += 1

    @contextmanager
    def saying_at_once(self) -> Iterator[None]:
        """A part of `together` whose error the others hear of when it is raised: what has to be closed behind it, such as a checkpoint
        that is being written, may take longer than they wait for a word."""
        try:
            yield
        except Exception as error:
            if self.size > 1 and not is_lost(error):
                self._say(error)
            raise

    def _say(self, error: Exception | None) -> dict[str, Any] | None:
        """Leave in the store why this process ends the round (None: because of another one)."""
        assert self._store is not None
        told = None
        if error is not None:
            told = error.to_dict() if isinstance(error, GiongError) else {"message": f"{type(error).__name__}: {error}"}
        # The store itself may be gone: then there are no words.
        with suppress(RuntimeError):
            self._store.set(f"word/{self._round}/{self.rank}", json.dumps(told))
        return told

    def _exchange_words(self, error: Exception | None) -> dict[int, dict[str, Any] | None]:
        """Say why this process leaves and wait a little for what the others say, by rank."""
        assert self._store is not None
        words: dict[int, dict[str, Any] | None] = {self.rank: self._say(error)}
        deadline = time.monotonic() + WORD_SECONDS
        with suppress(RuntimeError):
            while len(words) < self.size and time.monotonic() < deadline:
                for rank in set(range(self.size)) - set(words):
                    if self._store.check([f"word/{self._round}/{rank}"]):
                        words[rank] = json.loads(self._store.get(f"word/{self._round}/{rank}"))
                time.sleep(0.05)
        return words

    def _reason(self, words: dict[int, dict[str, Any] | None]) -> GiongError:
        for rank, told in sorted(words.items()):
            if told:
                reason = errors.from_dict(told)
                reason.message = f"{reason.message.rstrip('.')}, in {self.name(rank)}"
                return reason
        self.gone = tuple(rank for rank in range(self.size) if rank not in words)
        named = ", ".join(self.name(rank) for rank in self.gone) or "the connection between the processes"
        return ResourceError(
            f"{named[0].upper()}{named[1:]} {'are' if len(self.gone) > 1 else 'is'} gone, so the run stops at its last checkpoint",
            remedy="Run the same command again, with any number of processes. Where the system killed it for memory, lower train.max_tokens_per_pack.",
        )

    def _leave_group(self) -> None:
        # Closes the connections, which wakes whoever waits for this process.
        self._broken, self.group = True, None
        with suppress(RuntimeError, ValueError):
            dist.destroy_process_group()

    def close(self) -> None:
        """Leave the others in peace; nothing can be done together afterwards."""
        if self.size > 1 and not self._broken:
            self._leave_group()

    # Orders: what the first process wants the others to join

    def order(self, order: Any) -> None:
        """As the first process: hand the others what to do next; None sends them home."""
        if self.size == 1:
            return
        assert self._store is not None
        # Who is sent home may have gone already, and the store with them.
        with suppress(dist.DistError) if order is None else nullcontext():
            self._store.set(f"order/{self._num_orders}", "home" if order is None else "come")
        self._num_orders += 1
        if order is not None:
            with self.together():
                self.first(lambda: order)

    def wait_for_order(self, should_stop: Callable[[], bool]) -> Any:
        """As another one: the next order, however long it takes; None when there is none to come.

        A wish to stop is the first process's to answer; it has `LEAVE_SECONDS` to do so.
        """
        assert self._store is not None
        deadline: float | None = None
        try:
            while not self._store.check([f"order/{self._num_orders}"]):
                deadline = deadline or (time.monotonic() + LEAVE_SECONDS if should_stop() else None)
                if deadline and time.monotonic() > deadline:
                    return None
                time.sleep(0.1)
            said = self._store.get(f"order/{self._num_orders}")
        except dist.DistError:
            # The store ends with its launcher.
            return None
        self._num_orders += 1
        if said == b"home":
            return None
        with self.together():
            return self.first(lambda: None)


ALONE = Processes()


def is_spread(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in shards over the processes (a DTensor)."""
    # By its method: the class costs half a second of imports that one process never needs.
    return hasattr(tensor, "full_tensor")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that lies in this process: its shard, or all of it."""
    return tensor.to_local() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, gathered where it is spread; every process has to ask for it."""
    return tensor.full_tensor() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def deal(lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    """Deal rows to shares of nearly equal tokens (longest first, to the smallest share so far); indices of each ascend.

    Rows and not packs are dealt: a step that fits into one pack would leave all but one process without work.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    totals = [0] * num_shares
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        smallest = min(range(num_shares), key=lambda share: totals[share])
        shares[smallest].append(index)
        totals[smallest] += lengths[index]
    return [sorted(share) for share in shares]


def is_lost(error: BaseException) -> bool:
    """Whether an exception means that another process does not answer."""
    # Our own errors name rows and files, which may be called as a library is.
    is_of_torch = isinstance(error, RuntimeError) and not isinstance(error, GiongError)
    return isinstance(error, dist.DistError) or (is_of_torch and any(words in str(error) for words in LOST_WORDS))


def _portable(error: Exception | None) -> Exception | None:
    """The error itself where it survives the way to another process, else its words."""
    if error is None:
        return None
    try:
        return pickle.loads(pickle.dumps(error))
    except (pickle.PicklingError, TypeError, AttributeError):
        return RuntimeError(f"{type(error).__name__}: {error}")


def connect(arrival_seconds: float = ARRIVAL_SECONDS) -> Processes:
    """Join the processes that torchrun started; alone, where it did not.

    Before anything is loaded each waits for all others by name, and they add a number up. Raises ResourceError naming who did not
    come, or that the processes see each other but cannot talk.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    arrival, rank, size = timedelta(seconds=arrival_seconds), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", "29500"))
    try:
        # torchrun keeps the store itself, and keeps it when it starts its processes again.
        is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        meeting = dist.TCPStore(host, port, is_master=is_host, timeout=arrival, wait_for_workers=False)
        store = dist.PrefixStore(f"giong/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", meeting)
        names = _wait_for_names(store, rank, size, arrival_seconds)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=arrival)
        _test_sum(rank, size, names)
        return Processes(rank, names, store)
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, GiongError):
            raise
        raise ResourceError(
            f"Process {rank} of {size} cannot talk to the others: {str(error).splitlines()[0]}", place=f"{host}:{port}",
            remedy="Open the ports between the machines; with several network interfaces set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME.",
        ) from error  # fmt: skip


def _wait_for_names(store: dist.Store, rank: int, size: int, arrival_seconds: float) -> list[str]:
    store.set(f"name/{rank}", f"{socket.gethostname()}, pid {os.getpid()}")
    deadline = time.monotonic() + arrival_seconds
    while missing := [other for other in range(size) if not store.check([f"name/{other}"])]:
        if time.monotonic() > deadline:
            raise ResourceError(
                f"{len(missing)} of {size} processes did not come within {arrival_seconds:g} s: {', '.join(map(str, missing))}",
                remedy="Look at the log of the machine that should have started them; all need the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE.",
            )
        time.sleep(0.05)
    return [store.get(f"name/{other}").decode() for other in range(size)]


def _test_sum(rank: int, size: int, names: Sequence[str]) -> None:
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        total = torch.tensor([float(rank + 1)], device=device)
        dist.all_reduce(total)
        if float(total) != size * (size + 1) / 2:
            raise ResourceError(f"The processes [{'; '.join(names)}] add up to {float(total):g} on {device}, which is wrong")
