"""How fast the fused objective is beside eager PyTorch and torch.compile of eager.

    python -m benchmarks.kernels [--short]     results/kernels-cuda.json and its plot

A contender is the head's linear layer, its epilogue, both losses and, but for the forward rows, the
gradients of all parameters: what a training step runs between the frozen tokens and the optimiser. Frozen
tokens are bf16, the head's parameters fp32 under autocast, as in training.

`step` calls a contender from Python; `graph` replays the same from a CUDA graph, which is the GPU's own time.
In training Python runs ahead while the encoder computes, so that the goals are about `graph`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.measure import Results, copy_ceiling, interleave, parser, plot_bars, speedup
from fasttrain.cuda_graph import CapturedCall
from fasttrain.errors import InputError
from fasttrain_kernels import cosettle_head_loss


class Shape(NamedTuple):
    """Samples, token grid, channels, and the side of the pooling window."""

    batch: int
    grid: tuple[int, int]
    channels: int
    window: int = 2

    @property
    def label(self) -> str:
        return f"B {self.batch}, N {self.tokens}, D {self.channels}, window {self.window}"

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


def prepare(name: str, shape: Shape, frozen: Tensor) -> tuple[Contender, int | None]:
    """A contender after its first steps, and the memory that one takes."""
    contender = Contender(name, shape, frozen.device)
    try:
        contender.step(frozen)
        return contender, peak_bytes(partial(contender.step, frozen)) if frozen.is_cuda else None
    except torch.OutOfMemoryError:
        # Larger than this machine, not a fault.
        raise InputError("out of memory") from None


def record_graph(step: Callable[[], None]) -> CapturedCall:
    try:
        return CapturedCall(step, ())
    except torch.OutOfMemoryError:
        raise InputError("out of memory beside the other graphs") from None


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
    results: Results,
    device: torch.device,
    names: tuple[str, ...] = CONTENDERS,
    rounds: int = 9,
    calls: int = 10,
) -> dict[str, Any]:
    """The contenders at one shape, without those that fail.

    Raises:
        RuntimeError: the fused gradients are wrong, not merely rounded.
    """
    torch.compiler.reset()
    frozen = torch.randn(shape.batch, 3, shape.tokens, shape.channels, device=device).bfloat16()
    prepared = {
        name: results.attempt(f"{shape.label}: {name}", partial(prepare, name, shape, frozen))
        for name in names
    }
    contenders = {name: found[0] for name, found in prepared.items() if found}
    differences = disagreement(contenders)
    if not differences.get("fused", 0.0) < 0.1:
        raise RuntimeError(f"the fused gradients differ from eager's by {differences['fused']:.2%}")
    row: dict[str, Any] = {
        **shape._asdict(),
        "peak_bytes": {name: found[1] for name, found in prepared.items() if found},
        "gradient_difference_from_eager": differences,
    }
    steps = {name: partial(each.step, frozen) for name, each in contenders.items()}
    graphs = {
        name: results.attempt(f"{shape.label}: {name}, graph", partial(record_graph, step))
        for name, step in steps.items()
        if frozen.is_cuda
    }
    phases: dict[str, dict[str, Callable[[], Any]]] = {
        "forward": {name: partial(each.forward, frozen) for name, each in contenders.items()},
        "step": dict(steps),
        "graph": {name: graph for name, graph in graphs.items() if graph is not None},
    }
    for phase, functions in phases.items():
        timings = interleave(functions, rounds=rounds, calls=calls, device=device)
        row[phase] = {name: timing.result(shape.batch) for name, timing in timings.items()}
        fused = timings.pop("fused", None)
        if fused is not None:
            row[f"{phase}_speedup"] = {name: speedup(each, fused)["wall"] for name, each in timings.items()}
            bound = moved_bytes(shape, backward=phase != "forward") / results.content["copy_bytes_per_second"]
            row[f"{phase}_share_of_copy_bandwidth"] = bound / statistics.median(fused.wall)
    return row


def goals(content: dict[str, Any]) -> list[str]:
    """A line per goal that can be judged: met or not."""
    verdicts = []
    for figure, read, sign, goal in GOALS:
        # A contender may have failed, or have no graph.
        with suppress(KeyError, TypeError):
            value = read(content[PAPER.label])
            met = value <= goal if sign == "<=" else value >= goal
            verdicts.append(
                f"on an H200, {figure} {sign} {goal:g}: {value:.3g}: {'met' if met else 'NOT MET'}"
            )
    ran = "fused" in content.get(UNPOOLED.label, {}).get("step", {})
    verdicts.append(f"N = 1369 at B = 128 runs: {'met' if ran else 'NOT MET'}")
    return [f"goal {verdict} (on {content['environment']['device']})" for verdict in verdicts]


def plot(path: Path) -> Path:
    """Of each contender's step the GPU's own time where a graph was recorded, else Python's."""
    panels: dict[str, dict[str, dict[str, float]]] = {f"{name}, ms": {} for name in CONTENDERS}
    content = json.loads(path.read_text(encoding="utf-8"))
    for label, row in content.items():
        if label.startswith("B "):
            for name, timing in {**row["step"], **row["graph"]}.items():
                panels[f"{name}, ms"][label] = timing
    return plot_bars(path, "Linear layer to gradients", panels, "ms")


def main() -> None:
    given = parser(__doc__).parse_args()
    if given.plot:
        print(plot(given.plot))
        return
    device = torch.device(given.device)
    results = Results("kernels", given, copy_bytes_per_second=copy_ceiling(device))
    for shape in SHORT if given.short else EVERY:
        # torch.compile takes its time: in the short form at the paper's shape alone.
        names = CONTENDERS if not given.short or shape == PAPER else ("fused", "eager")
        # The larger half takes tens of milliseconds a call.
        calls = 10 if shape.map_bytes < 2**29 else 2
        results.record(shape.label, partial(measure_shape, shape, results, device, names, calls=calls))
    print("\n".join(goals(results.content)))
    results.finish()


if __name__ == "__main__":
    main()
