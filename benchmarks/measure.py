"""Timing side by side: every contender once a round, rounds repeated, medians and spread; and two ceilings.

On a shared machine the neighbours load all contenders alike this way, and CPU seconds count only our own
work. On a GPU the wall time between two synchronisations is the device's own, because many calls are queued.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

WARM_UPS = 2
CEILING_ROUNDS = 5


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Timing:
    """Seconds a call, one entry a round: on the wall and of the process's CPUs."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def result(self, pairs: int, *, calls: int = 1) -> dict[str, float]:
        """Milliseconds (median, least, most) and CPU milliseconds of a step, pairs a second.

        What was timed as one call are `calls` steps of `pairs` pairs each.
        """
        middle = statistics.median(self.wall)
        return {
            "ms": 1e3 * middle / calls,
            "ms_least": 1e3 * min(self.wall) / calls,
            "ms_most": 1e3 * max(self.wall) / calls,
            "cpu_ms": 1e3 * statistics.median(self.cpu) / calls,
            "pairs_per_second": calls * pairs / middle,
        }


def interleave(
    contenders: dict[str, Callable[[], Any]], *, rounds: int, calls: int, device: torch.device
) -> dict[str, Timing]:
    """`calls` calls of each contender in each of `rounds` rounds, after WARM_UPS single calls.

    Every second round goes through the contenders backwards.
    """
    for function in [*contenders.values()] * WARM_UPS:
        function()
    timings = {name: Timing() for name in contenders}
    for number in range(rounds):
        names = list(contenders)[:: -1 if number % 2 else 1]
        for name in names:
            function = contenders[name]
            synchronize(device)
            wall, cpu = time.perf_counter(), cpu_seconds()
            for _ in range(calls):
                function()
            synchronize(device)
            timings[name].wall.append((time.perf_counter() - wall) / calls)
            timings[name].cpu.append((cpu_seconds() - cpu) / calls)
    return timings


def speedup(slow: Timing, fast: Timing) -> dict[str, float]:
    """How many times faster, round by round: median, least and most of the wall, and median of the CPU."""
    wall = [a / b for a, b in zip(slow.wall, fast.wall, strict=True)]
    cpu = [a / b for a, b in zip(slow.cpu, fast.cpu, strict=True)]
    return {
        "wall": statistics.median(wall),
        "wall_least": min(wall),
        "wall_most": max(wall),
        "cpu": statistics.median(cpu),
    }


def cpu_seconds() -> float:
    """CPU time of this process and of its workers, those alive and those that have ended."""
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    alive = ticks / os.sysconf("SC_CLK_TCK")
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime + alive


def matrix_ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of one large matrix product of random numbers, the median."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    calls = 10 if device.type == "cuda" else 1
    timing = interleave({"": lambda: a @ b}, rounds=CEILING_ROUNDS, calls=calls, device=device)[""]
    return 2 * side**3 / statistics.median(timing.wall)


def copy_ceiling(device: torch.device) -> float:
    """Bytes/s of a copy far larger than the caches, bytes read plus bytes written, the median."""
    size = 2**32 if device.type == "cuda" else 2**28
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    timing = interleave({"": lambda: target.copy_(source)}, rounds=CEILING_ROUNDS, calls=3, device=device)[""]
    return 2 * size / statistics.median(timing.wall)
