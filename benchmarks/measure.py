"""Shared by all benchmarks: interleaved timing, separate processes, result files, command-line options.

All contenders run in every round, so that other work on a shared machine affects them equally. CPU time
excludes other processes on the machine. On a GPU, many calls are queued between two synchronisations, so that
wall time measures the device and not the launches.
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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
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
Call = Callable[[], Any]


@dataclass
class Timing:
    """Wall time and CPU time per call in seconds, with one entry per round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def result(self, pairs: int, *, steps: int = 1) -> dict[str, float]:
        """Return milliseconds (median, minimum, maximum) and CPU milliseconds per step, and pairs per second.

        Each call runs `steps` steps of `pairs` pairs.
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
    """Time `calls` calls of each contender in each round, after WARM_UPS single calls.

    Every second round runs the contenders in reverse order.
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
    """Compute `slow` / `fast` per round: median, minimum and maximum for wall time, median for CPU time."""
    wall = [a / b for a, b in zip(slow.wall, fast.wall, strict=True)]
    cpu = [a / b for a, b in zip(slow.cpu, fast.cpu, strict=True)]
    extremes = {"wall_least": min(wall), "wall_most": max(wall)}
    return {"wall": statistics.median(wall), **extremes, "cpu": statistics.median(cpu)}


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cpu_seconds() -> float:
    """CPU time of this process and its workers, including workers that have ended."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    ended = os.times()
    alive = ticks / os.sysconf("SC_CLK_TCK")
    return time.process_time() + ended.children_user + ended.children_system + alive


def in_own_process(function: Callable[..., Any], *arguments: Any, seconds: float | None = None) -> Any:
    """Run `function(*arguments)` in a new process, so that no threads or caches are left behind.

    Returns its result or raises its exception. Kills the process and raises TimeoutError after `seconds`.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        try:
            return pool.submit(function, *arguments).result(seconds)
        except concurrent.futures.TimeoutError:
            for process in multiprocessing.active_children():
                process.kill()
            raise


def run_fasttrain(*arguments: str, launcher: Sequence[str] = ()) -> str:
    """Run a fasttrain command and return its stdout.

    `launcher` is a module that starts it, with options. If the command fails, print its stderr and raise
    RuntimeError with the last line.
    """
    command = [sys.executable, *launcher, "-m", "fasttrain", *arguments]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        sys.stderr.write(result.stderr)
        reason = (result.stderr.splitlines() or [f"exit code {result.returncode}"])[-1]
        raise RuntimeError(f"fasttrain {arguments[0]} failed: {reason.removeprefix('fasttrain: ')}")
    return result.stdout


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Peak memory during `call`, in bytes beyond the memory in use before.

    On a GPU, this is the allocated memory. On a CPU, it is the resident memory, and the process must be new,
    because the peak cannot be reset.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    def resident(field: str) -> int:
        # getrusage is unsuitable, because a process inherits its peak from the parent process.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.partition(f"{field}:")[2].split()[0])

    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def matrix_ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """Median FLOP/s of a large product of random matrices."""
    side, calls = (8192, 10) if device.type == "cuda" else (1536, 1)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    timing = interleave({"": lambda: a @ b}, rounds=5, calls=calls)[""]
    return 2 * side**3 / statistics.median(timing.wall)


def copy_ceiling(device: torch.device) -> float:
    """Median bytes/s, read plus written, of a copy much larger than the caches."""
    size = 2**32 if device.type == "cuda" else 2**28
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    timing = interleave({"": lambda: target.copy_(source)}, rounds=5, calls=3)[""]
    return 2 * size / statistics.median(timing.wall)


def environment() -> dict[str, Any]:
    """Describe the machine and software: `device`, `cpu`, `versions`, `commit` and `date` (UTC, ISO 8601).

    `commit` ends in `-dirty` if tracked files have changes. Without a git repository, it is the value of the
    environment variable FASTTRAIN_COMMIT.
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


def command_line(name: str, description: str | None) -> argparse.ArgumentParser:
    """Create the parser of a benchmark, with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"result file (default: benchmarks/results/{name}-DEVICE.json)",
    )
    parser.add_argument("--short", action="store_true", help="measure fewer cases, in fewer rounds")
    parser.add_argument(
        "--limit",
        type=float,
        default=100_000,
        metavar="SECONDS",
        help="start no further measurement after this time (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default=default,
        help="device to measure (default: cuda if a GPU is available, otherwise cpu)",
    )
    return parser


def run_command(main: Callable[[], None]) -> None:
    """Call `main`. On invalid input, print one line and exit with code 2, as the fasttrain command does."""
    try:
        main()
    except InputError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        sys.exit(2)


class Results:
    """A result file that is written after every measurement, so that no result is lost.

    `skipped` contains, with the reason, the measurements that failed, cannot run on this machine or did not
    start in time.
    """

    def __init__(self, name: str, args: argparse.Namespace, **facts: Any) -> None:
        self.path: Path = args.out or RESULTS / f"{name}-{args.device}.json"
        self.deadline = time.monotonic() + args.limit
        self.skipped: dict[str, str] = {}
        self.content: dict[str, Any] = {"environment": environment(), **facts, "skipped": self.skipped}

    def attempt(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return the result of `measure`.

        If it fails or time is up, add the reason to `skipped` and return None.
        """
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
        # Continue after any other error, because it does not affect the remaining measurements.
        except Exception as error:
            traceback.print_exc()
            self.skipped[name] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        return None

    def record(self, name: str, measure: Callable[[], Any], group: str | None = None) -> None:
        """Store the result of `measure` under `name`, inside `group` if given, and write the file."""
        result = self.attempt(name, measure)
        if result is not None:
            section = self.content.setdefault(group, {}) if group else self.content
            section[name] = result
        self.save()
        print(f"{name}: {self.skipped.get(name, 'done')}", flush=True)

    def save(self) -> None:
        """Write the file."""
        write_json(self.path, self.content)

    def time(self, makers: dict[str, Callable[[], Call]], *, rounds: int, calls: int) -> dict[str, Timing]:
        """Time what `makers` return, interleaved. Functions that cannot be made or called are skipped."""

        def called_once(make: Callable[[], Call]) -> Call:
            contender = make()
            contender()
            synchronize()
            return contender

        made = {name: self.attempt(name, partial(called_once, make)) for name, make in makers.items()}
        contenders = {name: contender for name, contender in made.items() if contender is not None}
        return interleave(contenders, rounds=rounds, calls=calls)

    def finish(self) -> None:
        """Print the path of the file. Exit with an error message if a measurement failed."""
        print(self.path)
        failed = [f"{name} {why}" for name, why in self.skipped.items() if why.startswith("failed")]
        if failed:
            sys.exit("\n".join(failed))
