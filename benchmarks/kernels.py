"""How fast the fused objective is beside eager PyTorch and torch.compile of eager.

    python -m benchmarks.kernels             results/kernels.json and its plot (needs a GPU)
    python -m benchmarks.kernels --short     four shapes

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
import statistics
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.measure import RESULTS, copy_ceiling, environment, interleave, speedup, write_results
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
    ("milliseconds", lambda r: r["graph"]["fused"]["ms"], "<=", 0.6),
    ("times as fast as eager", lambda r: r["graph_speedup"]["eager"], ">=", 6.0),
    ("times as fast as torch.compile", lambda r: r["graph_speedup"]["compiled"], ">=", 3.0),
    ("peak memory over eager's", lambda r: r["peak_bytes"]["fused"] / r["peak_bytes"]["eager"], "<=", 0.2),
)


class Contender:
    """The head and the objective."""

    def __init__(self, name: str, shape: Shape, device: torch.device) -> None:
        self.shape, self.backend = shape, "triton" if name == "fused" else "eager"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear = nn.Linear(shape.channels, shape.channels).to(device)
        self.norm = nn.LayerNorm(shape.channels).to(device)
        self.parameters = (*self.linear.parameters(), *self.norm.parameters())
        self.loss = torch.compile(self._loss) if name == "compiled" else self._loss

    def _loss(self, frozen: Tensor) -> Tensor:
        with torch.autocast(frozen.device.type, dtype=torch.bfloat16):
            product = nn.functional.linear(frozen, self.linear.weight)
        head = (self.linear.bias, self.norm.weight, self.norm.bias)
        options = {"window": self.shape.window, "backend": self.backend, "diagnostics": False}
        return cosettle_head_loss(frozen, product, *head, self.shape.grid, **options).loss

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


def peak_bytes(step: Callable[[], None]) -> int:
    """Memory of a step on the GPU beyond what was there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def disagreement(contenders: dict[str, Contender]) -> dict[str, float]:
    """Norm of the difference of each contender's last gradients, all in one, from eager's, over theirs."""
    found = {
        name: torch.cat([parameter.grad.flatten() for parameter in contender.parameters]).double()
        for name, contender in contenders.items()
    }
    truth = found.pop("eager", None)
    if truth is None:
        return {}
    return {name: ((value - truth).norm() / truth.norm()).item() for name, value in found.items()}


def measure_shape(
    shape: Shape,
    bandwidth: float,
    names: tuple[str, ...] = CONTENDERS,
    *,
    device: torch.device,
    rounds: int = 9,
    calls: int = 10,
) -> dict[str, Any]:
    """The contenders at one shape. One that runs out of memory, or that fails, is reported as such."""
    torch.compiler.reset()
    on_gpu = device.type == "cuda"
    frozen = torch.randn(shape.batch, 3, shape.tokens, shape.channels, device=device).bfloat16()
    row: dict[str, Any] = {**shape._asdict(), "out_of_memory": [], "failed": {}, "peak_bytes": {}}

    def attempt(name: str, action: Callable[[], Any]) -> Any:
        """What the action gives; nothing but a note in the row where it fails."""
        try:
            return action()
        except torch.OutOfMemoryError:
            row["out_of_memory"].append(name)
        # Whatever kind: torch.compile's, say, on a machine without what it needs.
        except Exception as error:
            traceback.print_exc()
            row["failed"][name] = f"{type(error).__name__}: {error}"[:1000]
        finally:
            if on_gpu:
                # Memory that is cached is not free.
                torch.cuda.empty_cache()
        return None

    def prepared(name: str) -> Contender:
        contender = Contender(name, shape, device)
        contender.step(frozen)
        if on_gpu:
            row["peak_bytes"][name] = peak_bytes(partial(contender.step, frozen))
        return contender

    made = {name: attempt(name, partial(prepared, name)) for name in names}
    contenders = {name: contender for name, contender in made.items() if contender is not None}
    row["gradient_difference_from_eager"] = disagreement(contenders)
    if not row["gradient_difference_from_eager"].get("fused", 0.0) < 0.1:
        row["failed"]["fused"] = "wrong gradients, not merely rounded ones"
    phases: dict[str, dict[str, Callable[[], Any]]] = {
        "forward": {name: partial(each.forward, frozen) for name, each in contenders.items()},
        "step": {name: partial(each.step, frozen) for name, each in contenders.items()},
        "graph": {},
    }
    for name, step in phases["step"].items() if on_gpu else ():
        graph = attempt(f"{name}, graph", partial(CapturedCall, step, ()))
        if graph is not None:
            phases["graph"][name] = graph
    for phase, functions in phases.items():
        timings = interleave(functions, rounds=rounds, calls=calls, device=device)
        row[phase] = {name: timing.result(shape.batch) for name, timing in timings.items()}
        fused = timings.pop("fused", None)
        if fused is not None:
            row[f"{phase}_speedup"] = {name: speedup(each, fused)["wall"] for name, each in timings.items()}
            bound = moved_bytes(shape, backward=phase != "forward") / bandwidth
            row[f"{phase}_share_of_copy_bandwidth"] = bound / statistics.median(fused.wall)
    return row


def goals(payload: dict[str, Any]) -> list[str]:
    """A line per goal that can be judged: met or not."""
    rows = {(row["batch"], *row["grid"], row["channels"], row["window"]): row for row in payload["shapes"]}
    paper = rows.get((PAPER.batch, *PAPER.grid, PAPER.channels, PAPER.window), {})
    verdicts = []
    for figure, read, sign, goal in GOALS:
        # A contender may have run out of memory, or have no graph.
        with suppress(KeyError):
            value = read(paper)
            met = value <= goal if sign == "<=" else value >= goal
            verdicts.append(
                f"on an H200, {figure} {sign} {goal:g}: {value:.3g}: {'met' if met else 'NOT MET'}"
            )
    large = [row for sizes, row in rows.items() if sizes[:3] == (128, 37, 37)]
    if large:
        ran = all("fused" in row.get("step", {}) for row in large)
        verdicts.append(f"N = 1369 at B = 128 runs: {'met' if ran else 'NOT MET'}")
    return [f"goal {verdict} (on {payload['environment']['device']})" for verdict in verdicts]


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
    for index, name in enumerate(CONTENDERS):
        timed = [
            (i, best_timings(shape)[name]) for i, shape in enumerate(shapes) if name in best_timings(shape)
        ]
        heights = [i + 0.27 * (index - 1) for i, _ in timed]
        middle, least, most = ([row[key] for _, row in timed] for key in ("ms", "ms_least", "ms_most"))
        axes.barh(heights, middle, 0.25, label=name)
        axes.hlines(heights, least, most, color="black")
    axes.set_yticks(range(len(shapes)), [label(shape) for shape in shapes])
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds, linear layer to gradients, median with least and most")
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path.with_suffix(".png"), dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    device = torch.device("cuda")
    bandwidth = copy_ceiling(device)
    rows: list[dict[str, Any]] = []
    payload = {"environment": environment(), "copy_bytes_per_second": bandwidth, "shapes": rows}
    path = arguments.output / "kernels.json"
    for shape in SHORT if arguments.short else EVERY:
        # torch.compile takes its time: in the short form at the paper's shape alone.
        names = CONTENDERS if not arguments.short or shape == PAPER else ("fused", "eager")
        # The larger half takes tens of milliseconds a call.
        calls = 10 if shape.map_bytes < 2**29 else 2
        row = measure_shape(shape, bandwidth, names, device=device, calls=calls)
        rows.append(row)
        write_results(path, payload)
        timings = {name: f"{timing['ms']:.3f} ms" for name, timing in best_timings(row).items()}
        print(f"{label(row)}: {timings} {row['failed'] or ''}", flush=True)
    if importlib.util.find_spec("matplotlib") is not None:
        plot(path)
    print("\n".join(goals(payload)), path, sep="\n")
    if any(row["failed"] for row in rows):
        sys.exit("some contenders failed")


if __name__ == "__main__":
    main()
