"""Communication among the processes of a run; the only module that uses torch.distributed.

The environment variables that `torchrun` or `srun` sets describe each process (see `launcher`). Without them,
a run has a single process and no process group.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fasttrain.errors import InputError, LocalInputError, LostContactError, OtherRankError
from fasttrain.launcher import cores_of_process, describe_processes

Key = TypeVar("Key", str, int)
Item = TypeVar("Item")

# How long ranks wait for each other. NCCL's default of ten minutes is too short for evaluations, whose ranks
# finish at very different times. If a process dies, torchrun stops the others on its node immediately.
TIMEOUT = timedelta(hours=2)
# How long ranks wait for each other at the start of a run.
JOIN_TIMEOUT = timedelta(minutes=10)
# How long a process of several may take to end after an error. Its exit, like the destruction of its group,
# can wait forever for a device that waits for a rank that is gone.
EXIT_SECONDS = 60
# The key in the store under which the first rank that fails says why.
FAILED = "failed"
# Numbers the runs of a program.
_runs = itertools.count()
# Raised by a store whose server has ended.
StoreError = dist.DistError


@dataclass(frozen=True, kw_only=True)
class World:
    """The rank of this process, and its communication with the other processes of the run.

    Attributes:
        rank: Rank of this process among all processes.
        size: Number of processes.
        cores: Number of CPU cores for this process.
        device: Device of this process.
        store: Key-value store on the host, which all ranks share; None in a single process, which has no
            process group either.
    """

    rank: int
    size: int
    cores: int
    device: torch.device
    store: dist.Store | None = None

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> World:
        """Return a world that consists of this process only."""
        return cls(rank=0, size=1, cores=cores_of_process(), device=torch.device(device))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_single(self) -> bool:
        return self.store is None

    def wrap(self, module: nn.Module) -> nn.Module:
        """Wrap `module` so that each backward pass averages its gradients over all ranks."""
        if self.is_single:
            return module
        return DistributedDataParallel(module, gradient_as_bucket_view=True)

    def no_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which a wrapped module accumulates gradients without averaging them."""
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()

    def shard(self, items: Sequence[Item]) -> list[Item]:
        """Return this rank's share of `items`, which is every `size`-th item."""
        return list(items[self.rank :: self.size])

    def mean(self, values: Tensor) -> Tensor:
        """Average `values` over all ranks, in place if there are several, and return them."""
        if not self.is_single:
            dist.all_reduce(values, op=dist.ReduceOp.SUM)
            values /= self.size
        return values

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in the order of the ranks. Values must be small and picklable."""
        if self.is_single:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def merge(self, values: dict[Key, Item]) -> dict[Key, Item]:
        """Merge the dictionaries of all ranks, sorted by key."""
        return dict(sorted(entry for share in self.gather(values) for entry in share.items()))

    def run_on_all(self, function: Callable[[], Any]) -> Any:
        """Call `function`, and raise an InputError of any rank on all ranks, so that none waits forever."""
        result, reason = None, None
        try:
            result = function()
        except InputError as error:
            reason = str(error)
        reasons = [reason for reason in self.gather(reason) if reason is not None]
        if reasons:
            raise InputError(reasons[0])
        return result

    def check_same(self, value: Any, what: str) -> None:
        """Raise InputError on all ranks if their values differ. The message begins with `what`."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise InputError(f"{what}: ranks 0 and {rank} differ; all ranks must see the same files")

    def barrier(self) -> None:
        """Wait for all ranks."""
        if not self.is_single:
            dist.barrier()

    def connect(self) -> dist.Store | None:
        """Return another connection to the store, for use in another thread; None in a single process."""
        return None if self.store is None else self.store.clone()

    def fail(self, reason: str) -> str:
        """Tell the other ranks why this rank fails; return the reason of the rank that failed first."""
        assert self.store is not None
        return self.store.compare_set(FAILED, "", reason).decode()


@contextmanager
def start(device: Literal["auto", "cuda", "cpu"] = "auto") -> Iterator[World]:
    """Join the process group of the run that torchrun or srun started, with NCCL on GPUs and Gloo on CPUs.

    The group is destroyed when the context ends.

    Raises:
        InputError: `device` is `cuda`, but no GPU is available; the node has fewer GPUs than processes; or
            the environment variables are incomplete.
        OtherRankError: Another rank failed or is gone, so this one cannot continue.
    """
    describe_processes()
    own_device = _own_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World.single(own_device)
        return
    store = _join()
    backend, device_id = ("nccl", own_device) if own_device.type == "cuda" else ("gloo", None)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, device_id=device_id, timeout=TIMEOUT
    )
    world = World(rank=rank, size=size, cores=cores_of_process(), device=own_device, store=store)
    try:
        yield world
    except Exception as error:
        # The signal ends the process even while it waits in the driver.
        signal.alarm(EXIT_SECONDS)
        own = f"rank {rank} failed ({type(error).__name__})"
        try:
            first = world.fail(own)
        except StoreError:
            if isinstance(error, InputError):  # Rank 0 has ended for the same reason.
                raise error from None
            raise LostContactError(
                f"rank {rank} lost contact with rank 0 or with torchrun, so the run ends. Repeat the command "
                f"to continue"
            ) from error
        if first != own and not isinstance(error, InputError):
            raise OtherRankError(f"{first}, so the run ends. Repeat the command to continue") from error
        if isinstance(error, InputError):
            dist.destroy_process_group()
            signal.alarm(0)
        # After other errors, a rank may be waiting, and destroying the group might wait for it.
        raise
    except KeyboardInterrupt:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _join() -> dist.Store:
    """Connect to the store of the run."""
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
    except dist.DistError as error:
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        raise LocalInputError(
            f"could not reach rank 0 at {host}:{port} ({str(error).splitlines()[0]}). Check that "
            f"MASTER_ADDR and MASTER_PORT are right and that rank 0 is running"
        ) from error
    # A store may outlast a run: torchrun's serves all attempts of a run, and a program may start several
    # runs.
    return dist.PrefixStore(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_runs)}", store)


def _own_device(device: str, local_rank: int) -> torch.device:
    available = torch.cuda.is_available()
    if device == "cpu" or (device == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise InputError("device: 'cuda' is not available, because no GPU was detected. Use device=cpu")
    is_bound = "TORCHELASTIC_RUN_ID" not in os.environ and os.environ.get("SLURM_GPUS_ON_NODE") != "1"
    if torch.cuda.device_count() == 1 and is_bound:
        # `srun --gpus-per-task=1` shows each process its own GPU only. torchrun does not.
        local_rank = 0
    if local_rank >= torch.cuda.device_count():
        raise LocalInputError(
            f"local rank {local_rank} has no GPU. Start at most one process per GPU: "
            f"torchrun --nproc-per-node={torch.cuda.device_count()}"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
