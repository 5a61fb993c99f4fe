"""One process or many: the only user of torch.distributed.

`torchrun` describes each process in the environment; without it a run is a world of one, without a group.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fasttrain.errors import InputError

Key = TypeVar("Key", str, int)
Item = TypeVar("Item")

# How long processes wait for one another. The default of NCCL, ten minutes, is too short: shards of an
# evaluation end far apart. When one process dies, torchrun ends the others of its node at once.
TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all of a run."""

    rank: int
    size: int
    local_size: int
    device: torch.device

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> World:
        """A world of this process alone."""
        return cls(rank=0, size=1, local_size=1, device=torch.device(device))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """`module` with its gradients averaged over the processes at the end of each backward pass."""
        if self.size == 1:
            return module
        return DistributedDataParallel(module, gradient_as_bucket_view=True)

    def no_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        """Context in which a wrapped module does not average its gradients (accumulation)."""
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()

    def shard(self, items: Sequence[Item]) -> list[Item]:
        """This process's share of `items`: every `size`-th."""
        return list(items[self.rank :: self.size])

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes, on the device."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM)
            values /= self.size
        return values

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank. Anything that can be pickled; not for large ones."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def merge(self, values: dict[Key, Item]) -> dict[Key, Item]:
        """The entries of all processes together, in the order of their keys."""
        return dict(sorted(entry for share in self.gather(values) for entry in share.items()))

    def run_on_all(self, function: Callable[[], Any]) -> Any:
        """`function()` in every process; an InputError in one is raised in all, so that none waits."""
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
        """InputError in every process where `value` is not the same in all of them."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise InputError(f"{what}: processes 0 and {rank} differ; all must see the same files")

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def start(device: Literal["auto", "cuda", "cpu"] = "auto") -> Iterator[World]:
    """Join the run that torchrun started, with NCCL on GPUs and gloo on CPUs; leave it at the end.

    Raises InputError without a GPU where `cuda` was asked for, and with fewer GPUs on a node than processes.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    own_device = _own_device(device, local_rank)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        backend, device_id = ("nccl", own_device) if own_device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, device_id=device_id, timeout=TIMEOUT)
    try:
        yield World(
            rank=int(os.environ.get("RANK", "0")),
            size=size,
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            device=own_device,
        )
    finally:
        if size > 1:
            dist.destroy_process_group()


def _own_device(device: str, local_rank: int) -> torch.device:
    available = torch.cuda.is_available()
    if device == "cpu" or (device == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise InputError("device: 'cuda' was asked for, but torch sees no GPU; use device=cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"process {local_rank} of this node has no GPU of its own; start at most as many processes as "
            f"there are GPUs: torchrun --nproc-per-node={torch.cuda.device_count()}"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
