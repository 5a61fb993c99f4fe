"""How fast the fused objective is beside eager PyTorch and torch.compile of eager, and what it compiles to.

    python -m benchmarks.kernels                  tests, timings, results/kernels.json, its plot (needs a GPU)
    python -m benchmarks.kernels --short          three shapes instead of all
    python -m benchmarks.kernels --compile-only   results/kernels_compile.json (needs no GPU)
    python -m benchmarks.kernels --plot FILE      draw the plot again

A contender is the head's linear layer, its epilogue, both losses and, but for the forward rows, the
gradients of all parameters: what a training step runs between the frozen tokens and the optimiser. Frozen
tokens are bf16, the head's parameters fp32 under autocast, as in training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernel_resources import compile_table
from benchmarks.measure import copy_ceiling, interleave, speedup
from benchmarks.record import RESULTS, environment, write_results
from fasttrain_kernels import cosettle_head_loss

BATCHES, GRIDS, WIDTHS = (32, 128, 256), ((14, 14), (16, 16), (37, 37)), (384, 768, 1024)
PAPER = (128, (14, 14), 768)
SHORT = (PAPER, (32, (16, 16), 384), (128, (37, 37), 768))


class Contender:
    """The head and the objective on one backend."""

    def __init__(self, channels: int, grid: tuple[int, int], backend: str, compiled: bool) -> None:
        self.grid, self.backend = grid, backend
        self.linear, self.norm = nn.Linear(channels, channels).cuda(), nn.LayerNorm(channels).cuda()
        self.loss: Callable[[Tensor], Tensor] = torch.compile(self._loss) if compiled else self._loss

    def _loss(self, frozen: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            product = nn.functional.linear(frozen, self.linear.weight)
        return cosettle_head_loss(
            frozen,
            product,
            self.linear.bias,
            self.norm.weight,
            self.norm.bias,
            self.grid,
            backend=self.backend,
            diagnostics=False,
        ).loss

    def forward(self, frozen: Tensor) -> None:
        with torch.no_grad():
            self.loss(frozen)

    def step(self, frozen: Tensor) -> None:
        for parameter in (*self.linear.parameters(), *self.norm.parameters()):
            parameter.grad = None
        self.loss(frozen).backward()


def moved_bytes(batch: int, tokens: int, channels: int) -> int:
    """The floor of DESIGN.md: ten passes over one bf16 map of all tokens."""
    return 10 * batch * 3 * tokens * channels * 2


def peak_bytes(step: Callable[[Tensor], None], frozen: Tensor) -> int:
    """Memory of a step beyond what was there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(frozen)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure_shape(batch: int, grid: tuple[int, int], channels: int, bandwidth: float) -> dict[str, Any]:
    """All contenders at one shape; one that runs out of memory is reported as such."""
    torch.compiler.reset()
    frozen = torch.randn(batch, 3, grid[0] * grid[1], channels, device="cuda", dtype=torch.bfloat16)
    result: dict[str, Any] = {"batch": batch, "grid": grid, "channels": channels, "out_of_memory": []}
    contenders = {
        "fused": Contender(channels, grid, "triton", compiled=False),
        "eager": Contender(channels, grid, "eager", compiled=False),
        "compiled": Contender(channels, grid, "eager", compiled=True),
    }
    peaks = {}
    for name, contender in list(contenders.items()):
        try:
            contender.step(frozen)
            peaks[name] = peak_bytes(contender.step, frozen)
        except torch.cuda.OutOfMemoryError:
            result["out_of_memory"].append(name)
            del contenders[name]
        torch.cuda.empty_cache()
    device, floor = torch.device("cuda"), moved_bytes(batch, grid[0] * grid[1], channels)
    for phase in ("forward", "step"):
        calls = {name: partial(getattr(contender, phase), frozen) for name, contender in contenders.items()}
        timings = interleave(calls, rounds=9, calls=10, device=device)
        result[phase] = {name: timing.result(batch) for name, timing in timings.items()}
        result[f"{phase}_speedup"] = {
            name: speedup(timings[name], timings["fused"])["wall"] for name in timings if "fused" in timings
        }
        if phase == "step" and "fused" in timings:
            seconds = statistics.median(timings["fused"].wall)
            result["share_of_copy_bandwidth"] = floor / seconds / bandwidth
    return {**result, "peak_bytes": peaks, "floor_bytes": floor}


def run_tests() -> None:
    """The kernels' tests on this GPU: figures of a wrong kernel are worth nothing."""
    tests = Path(__file__).resolve().parents[1] / "tests" / "kernels"
    subprocess.run([sys.executable, "-m", "pytest", "-q", str(tests)], check=True)


def plot(path: Path) -> None:
    """Milliseconds of a step per shape, beside the JSON."""
    from matplotlib import pyplot

    shapes = json.loads(path.read_text(encoding="utf-8"))["shapes"]
    figure, axes = pyplot.subplots(figsize=(10, 0.5 * len(shapes) + 1.5), layout="constrained")
    labels = [f"B {s['batch']}, N {s['grid'][0] * s['grid'][1]}, D {s['channels']}" for s in shapes]
    for index, name in enumerate(("fused", "compiled", "eager")):
        rows = [(i, s["step"][name]) for i, s in enumerate(shapes) if name in s["step"]]
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
        return
    if arguments.compile_only:
        table = {"environment": environment(), "kernels": compile_table()}
        print(write_results(arguments.output / "kernels_compile.json", table))
        return
    if not torch.cuda.is_available():
        parser.error("timings need a CUDA device; --compile-only does not")
    run_tests()
    bandwidth = copy_ceiling(torch.device("cuda"))
    every = [(batch, grid, width) for grid in GRIDS for width in WIDTHS for batch in BATCHES]
    shapes = [measure_shape(*shape, bandwidth) for shape in (SHORT if arguments.short else every)]
    payload = {"environment": environment(), "copy_bytes_per_second": bandwidth, "shapes": shapes}
    path = write_results(arguments.output / "kernels.json", payload)
    plot(path)
    print(path)


if __name__ == "__main__":
    main()
