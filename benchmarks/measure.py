"""What the benchmarks share: timing side by side, the file of results with its plot, the command line.

Every contender is called once a round, so that the neighbours on a shared machine load all of them alike; CPU
seconds count only our own work. On a GPU many calls are queued between two synchronisations, so that the wall
time is the device's own.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fasttrain.errors import InputError
from fasttrain.files import write_json

if TYPE_CHECKING:
    # With pydantic, which a machine may lack that only lends its GPU.
    from fasttrain.recipe import Recipe

T = TypeVar("T")
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    *("torch", "triton", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "timm"),
    *("av", "numpy", "torchcodec", "decord"),
)
WARM_UPS = 2


@dataclass
class Timing:
    """Seconds a call, one entry a round: on the wall and of the process's CPUs."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def result(self, pairs: int, *, calls: int = 1) -> dict[str, float]:
        """Milliseconds (median, least, most) and CPU milliseconds of a step, and pairs a second.

        What was timed as one call are `calls` steps of `pairs` pairs each.
        """
        median = statistics.median(self.wall)
        return {
            "ms": 1e3 * median / calls,
            "ms_least": 1e3 * min(self.wall) / calls,
            "ms_most": 1e3 * max(self.wall) / calls,
            "cpu_ms": 1e3 * statistics.median(self.cpu) / calls,
            "pairs_per_second": calls * pairs / median,
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
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            synchronize(device)
            wall, cpu = time.perf_counter(), cpu_seconds()
            for _ in range(calls):
                contenders[name]()
            synchronize(device)
            timings[name].wall.append((time.perf_counter() - wall) / calls)
            timings[name].cpu.append((cpu_seconds() - cpu) / calls)
    return timings


def speedup(slow: Timing, fast: Timing) -> dict[str, float]:
    """How many times faster, round by round: median, least and most of the wall, and median of the CPU."""
    wall = [a / b for a, b in zip(slow.wall, fast.wall, strict=True)]
    cpu = [a / b for a, b in zip(slow.cpu, fast.cpu, strict=True)]
    extremes = {"wall_least": min(wall), "wall_most": max(wall)}
    return {"wall": statistics.median(wall), **extremes, "cpu": statistics.median(cpu)}


def with_changes(recipe: Recipe, section: str, **values: Any) -> Recipe:
    """`recipe` with some values of one section changed."""
    return replace(recipe, **{section: replace(getattr(recipe, section), **values)})


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    timing = interleave({"": lambda: a @ b}, rounds=5, calls=calls, device=device)[""]
    return 2 * side**3 / statistics.median(timing.wall)


def copy_ceiling(device: torch.device) -> float:
    """Bytes/s of a copy far larger than the caches, bytes read plus bytes written, the median."""
    size = 2**32 if device.type == "cuda" else 2**28
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    timing = interleave({"": lambda: target.copy_(source)}, rounds=5, calls=3, device=device)[""]
    return 2 * size / statistics.median(timing.wall)


def environment() -> dict[str, Any]:
    """The machine and the software: `device`, `cpu`, `versions`, `commit` and `date` (UTC, ISO 8601).

    `commit` ends in `-dirty` when tracked files differ from it. A copy of the files alone, as on a machine
    that only lends its GPU, takes it from FASTTRAIN_COMMIT.
    """
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    commit = os.environ.get("FASTTRAIN_COMMIT")
    with suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": {"model": models[0] if models else platform.machine(), "cores": os.cpu_count()},
        "versions": versions,
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def write_results(path: Path, payload: dict[str, Any]) -> Path:
    """Write `payload` as indented JSON; a reader sees the old file or the new one."""
    write_json(path, payload)
    return path


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    raw = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser(description=description, formatter_class=raw)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    found.add_argument("--out", type=Path, help="JSON file (results/NAME-DEVICE.json)")
    found.add_argument("--short", action="store_true", help="fewer rounds and cases")
    found.add_argument("--limit", type=float, default=math.inf, help="seconds after which nothing is begun")
    found.add_argument("--plot", type=Path, metavar="FILE", help="only draw the plot of this JSON file")
    found.add_argument("--device", choices=("cpu", "cuda"), default=default)
    return found


class Results:
    """A result file that is written after every section, so that nothing measured is lost.

    What fails, cannot run here or is not reached in time is listed in it under `skipped` with the reason.
    """

    def __init__(self, name: str, options: argparse.Namespace, **facts: Any) -> None:
        self.path: Path = options.out or RESULTS / f"{name}-{options.device}.json"
        self.deadline = time.monotonic() + options.limit
        self.skipped: dict[str, str] = {}
        self.content: dict[str, Any] = {"environment": environment(), **facts, "skipped": self.skipped}

    def attempt(self, name: str, measure: Callable[[], T]) -> T | None:
        """The result of `measure`; None, with a note in `skipped`, where time is up or it fails."""
        if time.monotonic() > self.deadline:
            self.skipped[name] = "out of time"
            return None
        try:
            return measure()
        except ModuleNotFoundError as error:
            self.skipped[name] = f"needs {error.name}, which is not installed"
        except InputError as error:
            self.skipped[name] = str(error)
        # Whatever it is, the other figures stand without this one.
        except Exception as error:
            traceback.print_exc()
            self.skipped[name] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        return None

    def record(self, section: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a section and write the file."""
        figures = self.attempt(section, lambda: json.loads(json.dumps(measure(), allow_nan=False)))
        self.write(section, figures)
        print(f"{section}: {self.skipped.get(section, 'done')}", flush=True)

    def write(self, section: str, figures: Any) -> None:
        if figures is not None:
            self.content[section] = figures
        write_results(self.path, self.content)

    def finish(self) -> None:
        """Name the file. Raises SystemExit where something failed."""
        print(self.path)
        failed = [f"{name} {why}" for name, why in self.skipped.items() if why.startswith("failed")]
        if failed:
            sys.exit("\n".join(failed))


def plot_bars(results: Path, title: str, panels: dict[str, dict[str, dict[str, Any]]], key: str) -> Path:
    """A PNG beside the JSON file: panels one below the other, each of bars with the rows' figure `key`."""
    from matplotlib.figure import Figure

    panels = {meaning: bars for meaning, bars in panels.items() if bars}
    rows = [len(bars) + 1 for bars in panels.values()]
    figure = Figure(figsize=(9, 1 + 0.35 * sum(rows)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=rows)
    for axis, (meaning, bars) in zip(axes[:, 0], panels.items(), strict=True):
        drawn = axis.barh(list(bars)[::-1], [row[key] for row in bars.values()][::-1])
        axis.bar_label(drawn, fmt=lambda value: f"{value:.3g}" if value < 100 else f"{value:.0f}", padding=3)
        axis.margins(x=0.12)
        axis.set_xlabel(meaning)
    environment = json.loads(results.read_text(encoding="utf-8"))["environment"]
    figure.suptitle(f"{title}, {environment['device'] or environment['cpu']['model']}")
    figure.savefig(results.with_suffix(".png"), dpi=110)
    return results.with_suffix(".png")
