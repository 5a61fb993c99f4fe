"""What the benchmarks share: timing in turns, a process of one's own, the result file, the options.

Every contender is called once a round, so that the neighbours on a shared machine load all of them alike; CPU
seconds count only our own work. On a GPU many calls are queued between two synchronisations, so that the wall
time is the device's own.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import gc
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fasttrain.errors import InputError
from fasttrain.files import write_json

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "timm",
    "av",
    "numpy",
    "torchcodec",
)
WARM_UPS = 2


@dataclass
class Timing:
    """Seconds a call, one entry a round: on the wall and of the process's CPUs."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def result(self, pairs: int, *, steps: int = 1) -> dict[str, float]:
        """Milliseconds (median, least, most) and CPU milliseconds of a step, and pairs a second.

        A call took `steps` steps of `pairs` pairs each.
        """
        median = statistics.median(self.wall)
        return {
            "ms": 1e3 * median / steps,
            "ms_least": 1e3 * min(self.wall) / steps,
            "ms_most": 1e3 * max(self.wall) / steps,
            "cpu_ms": 1e3 * statistics.median(self.cpu) / steps,
            "pairs_per_second": steps * pairs / median,
        }


def interleave(contenders: dict[str, Callable[[], Any]], *, rounds: int, calls: int) -> dict[str, Timing]:
    """`calls` calls of each contender in each of `rounds` rounds, after WARM_UPS single calls.

    Every second round goes through the contenders backwards.
    """
    for function in [*contenders.values()] * WARM_UPS:
        function()
    timings = {name: Timing() for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            synchronize()
            wall, cpu = time.perf_counter(), cpu_seconds()
            for _ in range(calls):
                contenders[name]()
            synchronize()
            timings[name].wall.append((time.perf_counter() - wall) / calls)
            timings[name].cpu.append((cpu_seconds() - cpu) / calls)
    return timings


def speedup(slow: Timing, fast: Timing) -> dict[str, float]:
    """How many times faster, round by round: median, least and most of the wall, and median of the CPU."""
    wall = [a / b for a, b in zip(slow.wall, fast.wall, strict=True)]
    cpu = [a / b for a, b in zip(slow.cpu, fast.cpu, strict=True)]
    extremes = {"wall_least": min(wall), "wall_most": max(wall)}
    return {"wall": statistics.median(wall), **extremes, "cpu": statistics.median(cpu)}


def synchronize() -> None:
    """Wait for the GPU, where this machine has one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cpu_seconds() -> float:
    """CPU time of this process and of its workers, those alive and those that have ended."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    ended = os.times()
    alive = ticks / os.sysconf("SC_CLK_TCK")
    return time.process_time() + ended.children_user + ended.children_system + alive


def in_own_process(function: Callable[..., Any], *arguments: Any, seconds: float | None = None) -> Any:
    """What `function(*arguments)` returns or raises in a fresh process, which no thread or cache outlives.

    Raises TimeoutError after `seconds`, and kills the process.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        try:
            return pool.submit(function, *arguments).result(seconds)
        except concurrent.futures.TimeoutError:
            for process in multiprocessing.active_children():
                process.kill()
            raise


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Memory of `call` at its peak beyond what was held: of the GPU, or of a process that is fresh."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    def resident(field: str) -> int:
        # The peak that getrusage gives is inherited from the process that started this one.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.partition(f"{field}:")[2].split()[0])

    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def matrix_ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of one large matrix product of random numbers, the median."""
    side, calls = (8192, 10) if device.type == "cuda" else (1536, 1)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    timing = interleave({"": lambda: a @ b}, rounds=5, calls=calls)[""]
    return 2 * side**3 / statistics.median(timing.wall)


def copy_ceiling(device: torch.device) -> float:
    """Bytes/s of a copy far larger than the caches, bytes read plus bytes written, the median."""
    size = 2**32 if device.type == "cuda" else 2**28
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    timing = interleave({"": lambda: target.copy_(source)}, rounds=5, calls=3)[""]
    return 2 * size / statistics.median(timing.wall)


def environment() -> dict[str, Any]:
    """The machine and the software: `device`, `cpu`, `versions`, `commit` and `date` (UTC, ISO 8601).

    `commit` ends in `-dirty` when tracked files differ from it. A copy of the files without the repository
    takes it from FASTTRAIN_COMMIT.
    """
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    commit = os.environ.get("FASTTRAIN_COMMIT")
    with suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": {"model": model[1] if model else platform.machine(), "cores": os.cpu_count()},
        "versions": versions,
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    raw = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser(description=description, formatter_class=raw)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    options.add_argument("--out", type=Path, help="JSON file (results/NAME-DEVICE.json)")
    options.add_argument("--short", action="store_true", help="fewer rounds and cases")
    options.add_argument("--limit", type=float, default=1e5, help="seconds after which nothing is begun")
    options.add_argument("--device", choices=("cpu", "cuda"), default=default)
    return options


class Results:
    """A result file that is written after every section, so that nothing measured is lost.

    What fails, cannot run here or is not reached in time is listed under `skipped` with the reason.
    """

    def __init__(self, name: str, options: argparse.Namespace, **facts: Any) -> None:
        self.path: Path = options.out or RESULTS / f"{name}-{options.device}.json"
        self.deadline = time.monotonic() + options.limit
        self.skipped: dict[str, str] = {}
        self.content: dict[str, Any] = {"environment": environment(), **facts, "skipped": self.skipped}

    def attempt(self, name: str, measure: Callable[[], Any]) -> Any:
        """The result of `measure`. If it fails or time is up: None, and the reason under `skipped`."""
        if time.monotonic() > self.deadline:
            self.skipped[name] = "out of time"
            return None
        try:
            return measure()
        except ModuleNotFoundError as error:
            self.skipped[name] = f"needs {error.name}, which is not installed"
        except torch.OutOfMemoryError:
            self.skipped[name] = "out of memory"
        except concurrent.futures.TimeoutError:
            self.skipped[name] = "out of time"
        except InputError as error:
            self.skipped[name] = str(error)
        # Whatever it is, the other figures are good without this one.
        except Exception as error:
            traceback.print_exc()
            self.skipped[name] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        return None

    def record(self, name: str, measure: Callable[[], Any], group: str | None = None) -> None:
        """Keep what `measure` returns under its name, in a group if one is given, and write the file."""
        figures = self.attempt(name, measure)
        if figures is not None:
            section = self.content.setdefault(group, {}) if group else self.content
            section[name] = figures
        write_json(self.path, self.content)
        print(f"{name}: {self.skipped.get(name, 'done')}", flush=True)

    def finish(self) -> None:
        """Name the file. Raises SystemExit where something failed."""
        print(self.path)
        failed = [f"{name} {why}" for name, why in self.skipped.items() if why.startswith("failed")]
        if failed:
            sys.exit("\n".join(failed))
