"""The processes of one run, and what they say to one another: torch.distributed behind the few calls the program needs.

    torchrun --nproc_per_node=2 distributed_train.py --model resnet50

A process started alone is `ALONE`, for which every call is local and free. Started by torchrun (or anything else that
sets RANK, WORLD_SIZE and MASTER_ADDR), `joined` makes it one of many: NCCL between GPUs, gloo between CPUs. A call that
another process does not answer ends in a CollectiveError that names it.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from errors import CollectiveError, ConfigError, first_line
from runtime import resolve_device

Item = TypeVar("Item")
Result = TypeVar("Result")
IntArray = npt.NDArray[np.int64]

PATIENCE = timedelta(days=7)
"""For calls in which one process works while the others wait, as when a cache is built; a lost process ends them."""
_arguments = inspect.signature(nn.parallel.DistributedDataParallel).parameters
SENDING_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _arguments else "broadcast_buffers"
"""What torch calls sending the first process' buffers before every step; the second name until 2.13."""

_store: dist.Store | None = None
"""Of the group this process has joined; outlives it, so that a failing process can tell whether another one spoke."""


@dataclass
class Group:
    """This process among those of its run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this machine."""
    local_size: int = 1
    timeout_s: float = 600.0
    patient: Any = None
    """Process group for the calls that may take long; carries objects, over gloo."""
    node: Any = None
    """The same, of this machine's processes."""
    _vote: tuple[Tensor, Any] | None = field(default=None, repr=False)
    _signal: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    # -- shares of the work --

    def bounds(self, count: int) -> tuple[int, int]:
        """(start, stop) of this process' part of `count` items; parts differ by one item at most."""
        return _bounds(count, self.rank, self.size)

    def bounds_here(self, count: int) -> tuple[int, int]:
        """The same, `count` items being shared by the processes of this machine."""
        return _bounds(count, self.local_rank, self.local_size)

    def spread(
        self, items: Sequence[Item], work: Callable[[Sequence[Item]], Iterable[Result]], *, what: str
    ) -> list[Result]:
        """`work`'s result for each of `items`, in order, on every process; each process works on every size-th item."""
        everyones = self.each(lambda: list(work(items[self.rank :: self.size])), what=what)
        return [everyones[place % self.size][place // self.size] for place in range(len(items))]

    # -- what one tells the others --

    def each(self, make: Callable[[], Item], *, what: str, here: bool = False) -> list[Item]:
        """What `make` returns on every process, in order of rank, or an error it raises on any of them, on all.

        `here` leaves out other machines.
        """
        if self.size == 1:
            return [make()]
        outcomes: list[Any] = [None] * (self.local_size if here else self.size)
        with self.naming(what):
            dist.all_gather_object(outcomes, _outcome(make), group=self.node if here else self.patient)
        return [_opened(outcome) for outcome in outcomes]

    def from_main(self, make: Callable[[], Item], *, what: str) -> Item:
        """What `make` returns on the first process, or the error it raises there, on every process."""
        return self._from_first(make, self.is_main, self.patient, what)

    def from_node(self, make: Callable[[], Item], *, what: str) -> Item:
        """The same, made once on each machine."""
        return self._from_first(make, self.local_rank == 0, self.node, what)

    def _from_first(self, make: Callable[[], Item], is_first: bool, group: Any, what: str) -> Item:
        if self.size == 1:
            return make()
        outcome = [_outcome(make) if is_first else None]
        with self.naming(what):
            dist.broadcast_object_list(outcome, group=group, group_src=0)
        return _opened(outcome[0])

    def wait(self, *, what: str) -> None:
        """Go on when every process has come here."""
        self.each(lambda: None, what=what)

    def sum_(self, values: Tensor, *, what: str) -> Tensor:
        """`values` added up over the processes, in place."""
        if self.size > 1:
            with self.naming(what):
                dist.all_reduce(values)
        return values

    def max_(self, values: Tensor, *, what: str) -> Tensor:
        """The largest of the processes' `values`, in place."""
        if self.size > 1:
            with self.naming(what):
                dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def any_signal(self, own: int | None, *, what: str) -> int | None:
        """A signal that any process had at an earlier call, the same answer on all of them.

        The question is asked now and answered at the next call, a step later: nobody waits for anybody.
        """
        if self.size == 1:
            return own
        with self.naming(what):
            self._count_vote()
            vote = torch.tensor(own or 0)
            self._vote = vote, dist.all_reduce(vote, op=dist.ReduceOp.MAX, async_op=True)
        return self._signal or None

    def _count_vote(self) -> None:
        if self._vote is not None:
            vote, work = self._vote
            work.wait()
            self._signal, self._vote = max(self._signal, int(vote)), None

    # -- the network --

    def parallel(self, network: nn.Module, *, every_batch: bool) -> nn.Module:
        """`network` with its gradients averaged over the processes as they appear; itself for one process.

        `every_batch` says that no batch is left unaveraged (`no_sync`), which a static graph does not allow. Buffers
        stay each process' own: synchronised batch norm keeps them equal (`whole_batch`).
        """
        if self.size == 1:
            return network
        settings: dict[str, Any] = {SENDING_BUFFERS: False, "gradient_as_bucket_view": True}
        with self.naming("the network's first weights"):
            return nn.parallel.DistributedDataParallel(network, static_graph=every_batch, **settings)

    @contextlib.contextmanager
    def naming(self, what: str) -> Iterator[None]:
        """Turn what the library says when processes do not answer into a CollectiveError that says during `what`."""
        try:
            yield
        except RuntimeError as error:
            reason = self._lost(error)
            if reason is None:
                raise
            raise CollectiveError(f"process {self.rank} of {self.size}: {what}: {reason}") from error

    def _lost(self, error: RuntimeError) -> str | None:
        """Why `error` says that other processes do not answer; None when it says something else."""
        text = str(error)
        if not (isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text):
            return None
        if "imed out" in text or "timeout" in text.lower():
            return (
                f"not answered by the others within {self.timeout_s:g} s; look at their last lines, or allow more with "
                "--set runtime.collective_timeout_s=N"
            )
        return f"another process is gone ({first_line(error)})"


def _bounds(count: int, rank: int, size: int) -> tuple[int, int]:
    short, longer = divmod(count, size)
    start = rank * short + min(rank, longer)
    return start, start + short + (rank < longer)


def _outcome(make: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return make(), None
    except CollectiveError:
        raise
    except Exception as error:
        return None, error


def _opened(outcome: Any) -> Any:
    result, error = outcome
    if error is not None:
        raise error
    return result


ALONE = Group()


def started_among_many() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def joined(device: str, *, timeout_s: float) -> Iterator[Group]:
    """The group this process was started in; ALONE when it was started by itself.

    ConfigError when there are more processes here than GPUs; CollectiveError when the others do not come.
    """
    if not started_among_many():
        yield ALONE
        return
    group = _join(resolve_device(device), timeout_s)
    yield group
    # After an error this is not reached: processes that no longer agree cannot part in order.
    with group.naming("the end"):
        group._count_vote()
        dist.destroy_process_group()


def _join(device: torch.device, timeout_s: float) -> Group:
    global _store
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    group = Group(rank, size, int(os.environ.get("LOCAL_RANK", "0")), timeout_s=timeout_s)
    limit = timedelta(seconds=timeout_s)
    with group.naming("the meeting of the processes"):
        store, _, _ = next(dist.rendezvous("env://", timeout=limit))
        _store = dist.PrefixStore(_attempt(), store)
        if device.type == "cuda":
            _take_gpu(device, group.local_rank)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=limit)
        group.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        firsts = sorted(set(group.each(lambda: rank - group.local_rank, what="the machines of the run")))
        for first, end in zip(firsts, [*firsts[1:], size]):
            # Every process has to take part in making every group, its own or not.
            node = dist.new_group(list(range(first, end)), backend="gloo", timeout=PATIENCE)
            if first <= rank < end:
                group.node, group.local_size = node, end - first
    return group


def _attempt() -> str:
    """A name for this start of the processes by torchrun, which keeps its store, old addresses in it, when it restarts.

    On one machine only: on several, each counts its own restarts.
    """
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if alone else 'any'}"


def _take_gpu(device: torch.device, local_rank: int) -> None:
    visible = torch.cuda.device_count()
    if device.index is not None:
        raise ConfigError(
            f"runtime.device: {str(device)!r} is one GPU for several processes; use cuda or auto, and choose GPUs with "
            "CUDA_VISIBLE_DEVICES"
        )
    if local_rank >= visible:
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU: {visible} visible; start at most {visible} processes a "
            "machine, or use --device cpu"
        )
    torch.cuda.set_device(local_rank)


def launch_name() -> str | None:
    """What tells one start of torchrun from another, the same when it starts its processes anew; None without it."""
    given = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{socket.gethostname()}:{os.getppid()}" if given == "none" else given


def speaks_first() -> bool:
    """Whether this process, which has failed, is the first to say so; one mistake then makes one line."""
    if _store is None:
        return os.environ.get("RANK", "0") == "0"
    try:
        return _store.add("spoken", 1) == 1
    except RuntimeError:
        return True
