"""How fast the fused objective is beside eager PyTorch and torch.compile of eager, and what it compiles to.

    python -m benchmarks.kernels                  tests, timings, results/kernels.json, its plot (needs a GPU)
    python -m benchmarks.kernels --short          four shapes, without the tests
    python -m benchmarks.kernels --compile-only   results/kernels_compile.json (needs no GPU)
    python -m benchmarks.kernels --plot FILE      draw the plot and say again which goals are met

A contender is the head's linear layer, its epilogue, both losses and, but for the forward rows, the
gradients of all parameters: what a training step runs between the frozen tokens and the optimiser. Frozen
tokens are bf16, the head's parameters fp32 under autocast, as in training.

`step` calls a contender from Python; `graph` replays the same from a CUDA graph, which is the GPU's own time.
In training Python runs ahead while the encoder computes, so that the goals are about `graph`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gpu_check import KERNEL_TESTS, ROOT
from benchmarks.kernel_resources import compile_table, markdown_table, triton_version
from benchmarks.measure import (
    RESULTS,
    Timing,
    copy_ceiling,
    environment,
    interleave,
    speedup,
    synchronize,
    write_results,
)
from fasttrain.cuda_graph import CapturedCall
from fasttrain_kernels import cosettle_head_loss


class Shape(NamedTuple):
    """Samples, token grid, channels, and the side of the pooling window."""

    batch: int
    grid: tuple[int, int]
    channels: int
    window: int = 2

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def map_bytes(self) -> int:
        """One bf16 map of all tokens of the three views."""
        return self.batch * 3 * self.tokens * self.channels * 2


BATCHES, GRIDS, WIDTHS = (32, 128, 256), ((14, 14), (16, 16), (37, 37)), (384, 768, 1024)
PAPER = Shape(128, (14, 14), 768)
UNPOOLED = Shape(128, (37, 37), 768, window=1)
EVERY = [*(Shape(batch, grid, width) for grid in GRIDS for width in WIDTHS for batch in BATCHES), UNPOOLED]
# Those of the goals first: time may run out.
SHORT = [PAPER, UNPOOLED, Shape(128, (37, 37), 768), Shape(32, (16, 16), 384)]
CONTENDERS = ("fused", "compiled", "eager")
# Of the paper's shape on an H200: the figure, how it is read from a shape's results, and its goal.
GOALS: tuple[tuple[str, Callable[[dict[str, Any]], float], str, float], ...] = (
    ("milliseconds", lambda row: row["graph"]["fused"]["ms"], "<=", 0.6),
    ("times as fast as eager", lambda row: row["graph_speedup"]["eager"], ">=", 6.0),
    ("times as fast as torch.compile", lambda row: row["graph_speedup"]["compiled"], ">=", 3.0),
    (
        "peak memory over eager's",
        lambda row: row["peak_bytes"]["fused"] / row["peak_bytes"]["eager"],
        "<=",
        0.2,
    ),
)


class Contender:
    """The head and the objective on one backend."""

    def __init__(self, shape: Shape, backend: str, *, compiled: bool, device: torch.device) -> None:
        self.shape, self.backend, self.device = shape, backend, device
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear = nn.Linear(shape.channels, shape.channels).to(device)
        self.norm = nn.LayerNorm(shape.channels).to(device)
        self.parameters = (*self.linear.parameters(), *self.norm.parameters())
        self.loss: Callable[[Tensor], Tensor] = torch.compile(self._loss) if compiled else self._loss

    def _loss(self, frozen: Tensor) -> Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            product = nn.functional.linear(frozen, self.linear.weight)
        return cosettle_head_loss(
            frozen,
            product,
            self.linear.bias,
            self.norm.weight,
            self.norm.bias,
            self.shape.grid,
            window=self.shape.window,
            backend=self.backend,
            diagnostics=False,
        ).loss

    def forward(self, frozen: Tensor) -> Tensor:
        with torch.no_grad():
            return self.loss(frozen)

    def step(self, frozen: Tensor) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        self.loss(frozen).backward()


def moved_bytes(shape: Shape, *, backward: bool) -> int:
    """The floor: every tensor read and written once a launch, in passes over one map (kernels/README.md)."""
    pooled = 1 / shape.window**2
    maps = 9 + 4 * pooled if backward else 4 + 2 * pooled
    return int(maps * shape.map_bytes)


def peak_bytes(step: Callable[[Tensor], None], frozen: Tensor) -> int | None:
    """Memory of a step beyond what was there before it; None where the device does not tell."""
    if not frozen.is_cuda:
        step(frozen)
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(frozen)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def disagreement(contenders: dict[str, Contender], frozen: Tensor) -> dict[str, float]:
    """Relative difference of each contender's gradients (the norm of all) from eager's.

    Raises:
        RuntimeError: the fused ones are wrong, not merely rounded.
    """
    found = {}
    for name, contender in contenders.items():
        contender.step(frozen)
        found[name] = torch.cat([parameter.grad.flatten() for parameter in contender.parameters]).double()
    if "eager" not in found:
        return {}
    truth = found["eager"]
    relative = {name: ((value - truth).norm() / truth.norm()).item() for name, value in found.items()}
    if not relative.get("fused", 0.0) < 0.1:
        raise RuntimeError(
            f"the fused gradients differ from eager's by {relative['fused']:.2%} of their norm"
        )
    return relative


def captured(
    contenders: dict[str, Contender], frozen: Tensor, peaks: dict[str, Any], row: dict[str, Any]
) -> dict[str, Any]:
    """Each contender's step as a CUDA graph.

    One that would not fit beside those before it goes into the row's `skipped`, one that cannot be recorded
    into its `failed`, with the reason.
    """
    graphs: dict[str, Any] = {}
    if not frozen.is_cuda:
        return graphs
    for name, each in contenders.items():
        # Memory that is cached is not free.
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        # The graph keeps its peak for good, and the warm-up before the recording takes as much.
        if 2 * peaks[name] > free:
            row["skipped"][f"{name}, graph"] = (
                f"needs twice {peaks[name] / 1e9:.1f} GB, {free / 1e9:.1f} are free"
            )
            continue
        try:
            graphs[name] = CapturedCall(partial(each.step, frozen), ())
        # Whatever kind: the figures measured so far stand without it, and the exit code tells.
        except Exception as error:
            row["failed"][f"{name}, graph"] = _reason(error)
    return graphs


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:1000]


def measure_shape(
    shape: Shape,
    bandwidth: float,
    *,
    device: torch.device,
    compiled: bool = True,
    rounds: int = 9,
    calls: int | None = None,
) -> dict[str, Any]:
    """All contenders at one shape; one that runs out of memory, or that we only compare with and that fails,
    is reported as such."""
    torch.compiler.reset()
    # The larger half takes tens of milliseconds a call.
    calls = calls or (10 if shape.map_bytes < 2**29 else 2)
    frozen = torch.randn(shape.batch, 3, shape.tokens, shape.channels, device=device).bfloat16()
    result: dict[str, Any] = {**shape._asdict(), "out_of_memory": [], "skipped": {}, "failed": {}}
    contenders = {
        "fused": Contender(shape, "triton", compiled=False, device=device),
        "eager": Contender(shape, "eager", compiled=False, device=device),
    }
    if compiled:
        contenders["compiled"] = Contender(shape, "eager", compiled=True, device=device)
    peaks: dict[str, Any] = {}
    for name, contender in list(contenders.items()):
        try:
            contender.step(frozen)
            peaks[name] = peak_bytes(contender.step, frozen)
        except torch.OutOfMemoryError:
            result["out_of_memory"].append(name)
            del contenders[name]
        except Exception as error:
            # torch.compile's, say, on a machine without what it needs: the others' figures stand without it.
            if name == "fused":
                raise
            result["failed"][name] = _reason(error)
            del contenders[name]
        if device.type == "cuda":
            torch.cuda.empty_cache()
    result["peak_bytes"] = peaks
    result["gradient_difference_from_eager"] = disagreement(contenders, frozen)
    phases: dict[str, dict[str, Callable[[], Any]]] = {
        "forward": {name: partial(each.forward, frozen) for name, each in contenders.items()},
        "step": {name: partial(each.step, frozen) for name, each in contenders.items()},
        "graph": captured(contenders, frozen, peaks, result),
    }
    for phase, functions in phases.items():
        if not functions:
            continue
        timings = interleave(functions, rounds=rounds, calls=calls, device=device)
        result[phase] = {name: timing.result(shape.batch) for name, timing in timings.items()}
        result.update(
            _beside_fused(phase, timings, moved_bytes(shape, backward=phase != "forward"), bandwidth)
        )
    synchronize(device)
    return result


def _beside_fused(phase: str, timings: dict[str, Timing], floor: int, bandwidth: float) -> dict[str, Any]:
    """How many times faster the fused form is, and its floor of bytes over its time over the copy's."""
    if "fused" not in timings:
        return {}
    fused = timings["fused"]
    return {
        f"{phase}_speedup": {
            name: speedup(timing, fused)["wall"] for name, timing in timings.items() if name != "fused"
        },
        f"{phase}_share_of_copy_bandwidth": floor / statistics.median(fused.wall) / bandwidth,
    }


def goals(payload: dict[str, Any]) -> list[str]:
    """A line per goal: met, not met, or why it cannot be told."""
    rows = [
        row for row in payload["shapes"] if Shape(*(_tuple(row[name]) for name in Shape._fields)) == PAPER
    ]
    device = payload["environment"]["device"]
    lines = []
    for figure, read, sign, goal in GOALS:
        value = None
        for row in rows:
            # A contender that ran out of memory, or no graph.
            with suppress(KeyError, TypeError):
                value = read(row)
        if value is None:
            verdict = "not measured"
        else:
            met = value <= goal if sign == "<=" else value >= goal
            verdict = f"{value:.3g}: {'met' if met else 'NOT MET'}"
        lines.append(f"goal on an H200, {figure} {sign} {goal:g}: {verdict} (on {device})")
    large = [row for row in payload["shapes"] if row["batch"] == 128 and _tuple(row["grid"]) == (37, 37)]
    if large:
        ran = all("fused" in row.get("step", {}) for row in large)
        lines.append(f"goal, N = 1369 at B = 128 runs: {'met' if ran else 'NOT MET'} (on {device})")
    return lines


def _tuple(value: Any) -> Any:
    """What JSON made a list of."""
    return tuple(value) if isinstance(value, list) else value


def run_tests() -> bool | None:
    """Whether the kernels' tests pass on this GPU, without which figures are worth nothing; None: not run."""
    if any(importlib.util.find_spec(name) is None for name in ("pytest", "hypothesis")):
        print("the kernels' tests do not run: pytest or hypothesis is not installed", file=sys.stderr)
        return None
    return subprocess.run([sys.executable, *shlex.split(KERNEL_TESTS)], cwd=ROOT, check=False).returncode == 0


def label(row: dict[str, Any]) -> str:
    tokens = row["grid"][0] * row["grid"][1]
    return f"B {row['batch']}, N {tokens}, D {row['channels']}, window {row['window']}"


def best_timings(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each contender's whole step: the GPU's own time where a graph was recorded, else Python's."""
    return {**row.get("step", {}), **row.get("graph", {})}


def plot(path: Path) -> None:
    """Milliseconds of a step per shape, beside the JSON."""
    from matplotlib import pyplot

    shapes = json.loads(path.read_text(encoding="utf-8"))["shapes"]
    figure, axes = pyplot.subplots(figsize=(10, 0.5 * len(shapes) + 1.5), layout="constrained")
    labels = [label(shape) for shape in shapes]
    for index, name in enumerate(CONTENDERS):
        timed = [(i, best_timings(shape)) for i, shape in enumerate(shapes)]
        rows = [(i, timings[name]) for i, timings in timed if name in timings]
        middle = [row["ms"] for _, row in rows]
        spread = [
            [row["ms"] - row["ms_least"] for _, row in rows],
            [row["ms_most"] - row["ms"] for _, row in rows],
        ]
        axes.barh([i + 0.27 * (index - 1) for i, _ in rows], middle, 0.25, xerr=spread, label=name)
    axes.set_yticks(range(len(shapes)), labels)
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds, linear layer to gradients, median with least and most")
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path.with_suffix(".png"), dpi=120)
    pyplot.close(figure)


def record_compilation(path: Path) -> Path:
    """Add this Triton's table to the file's; other versions' tables stay."""
    tables = json.loads(path.read_text(encoding="utf-8"))["triton"] if path.is_file() else {}
    tables[triton_version()] = {"environment": environment(), "kernels": compile_table()}
    return write_results(path, {"triton": dict(sorted(tables.items()))})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.plot:
        plot(arguments.plot)
        print("\n".join(goals(json.loads(arguments.plot.read_text(encoding="utf-8")))))
        return
    if arguments.compile_only:
        path = record_compilation(arguments.output / "kernels_compile.json")
        print(markdown_table(path), path, sep="\n")
        return
    if not torch.cuda.is_available():
        parser.error("timings need a CUDA device; --compile-only does not")
    # In the short form they are a step of `make gpu-check` of their own.
    passed = None if arguments.short else run_tests()
    device = torch.device("cuda")
    bandwidth = copy_ceiling(device)
    payload: dict[str, Any] = {
        "environment": environment(),
        "copy_bytes_per_second": bandwidth,
        "tests_passed": passed,
        "shapes": [],
    }
    path = arguments.output / "kernels.json"
    for shape in SHORT if arguments.short else EVERY:
        # torch.compile takes its time: in the short form at the paper's shape alone.
        compiled = not arguments.short or shape == PAPER
        try:
            row = measure_shape(shape, bandwidth, device=device, compiled=compiled)
        # Kernels that fail or are wrong at one shape cost no figure of the others; the exit code tells.
        except Exception as error:
            traceback.print_exc()
            row = {**shape._asdict(), "out_of_memory": [], "skipped": {}, "failed": {"fused": _reason(error)}}
        payload["shapes"].append(row)
        write_results(path, payload)
        told = {name: f"{timing['ms']:.3f} ms" for name, timing in best_timings(row).items()}
        print(f"{label(row)}: {told or row['failed']}", flush=True)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed", file=sys.stderr)
    else:
        plot(path)
    print("\n".join(goals(payload)), path, sep="\n")
    if passed is False:
        sys.exit("the kernels' tests failed: these figures are of kernels that are wrong")
    failed = [
        f"failed: {label(row)}: {name}: {reason}"
        for row in payload["shapes"]
        for name, reason in row["failed"].items()
    ]
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
