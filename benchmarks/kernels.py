"""How fast the fused objective is beside eager PyTorch and torch.compile of eager.

    python -m benchmarks.kernels [--short]     write results/kernels-cuda.json

A contender is the head's linear layer, its epilogue, both losses and, but for the forward rows, the
gradients of all parameters: what a training step runs between the frozen tokens and the optimiser. Frozen
tokens are bf16, the head's parameters fp32 under autocast, as in training.

`step` calls a contender from Python; `graph` replays the same from a CUDA graph, which is the GPU's own time.
In training Python runs ahead while the encoder computes, so that the goals (docs/benchmarks.md) are about
`graph`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import Results, copy_ceiling, interleave, parser, peak_bytes, speedup
from fasttrain.cuda_graph import CapturedCall
from fasttrain.projection import Projection
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


PAPER = Shape(128, (14, 14), 768)
# Those of the goals first: time may run out.
SHORT = [PAPER, Shape(128, (37, 37), 768, window=1), Shape(128, (37, 37), 768), Shape(32, (16, 16), 384)]
SHAPES = [*SHORT, *(Shape(batch, (14, 14), width) for width in (384, 768, 1024) for batch in (32, 256))]
CONTENDERS = ("fused", "compiled", "eager")


class Contender:
    """The linear head with the objective, in one of the implementations."""

    def __init__(self, name: str, shape: Shape, device: torch.device) -> None:
        self.name, self.shape, self.projection = name, shape, Projection(shape.channels).to(device)
        self.loss = torch.compile(self._loss) if name == "compiled" else self._loss

    def _loss(self, frozen: Tensor) -> Tensor:
        with torch.autocast(frozen.device.type, dtype=torch.bfloat16):
            linear, rest = self.projection.split(frozen)
        backend = "triton" if self.name == "fused" else "eager"
        options = {"window": self.shape.window, "backend": backend, "diagnostics": False}
        return cosettle_head_loss(frozen, linear, **rest, grid=self.shape.grid, **options).loss

    def forward(self, frozen: Tensor) -> Tensor:
        with torch.no_grad():
            return self.loss(frozen)

    def step(self, frozen: Tensor) -> None:
        self.projection.zero_grad()
        self.loss(frozen).backward()

    def gradient(self) -> Tensor:
        """The last step's gradients of all parameters, in one vector."""
        return torch.cat([parameter.grad.flatten() for parameter in self.projection.parameters()]).double()


def moved_bytes(shape: Shape, *, backward: bool) -> int:
    """The floor: every tensor read and written once a launch, in passes over one map (docs/benchmarks.md)."""
    pooled = 1 / shape.window**2
    maps = 9 + 4 * pooled if backward else 4 + 2 * pooled
    return int(maps * shape.map_bytes)


def prepare(name: str, shape: Shape, frozen: Tensor) -> tuple[Contender, int | None]:
    """A contender after its first steps, and the memory of the GPU that one takes beyond its inputs."""
    contender = Contender(name, shape, frozen.device)
    contender.step(frozen)
    return contender, peak_bytes(partial(contender.step, frozen), frozen.device) if frozen.is_cuda else None


def measure_shape(
    shape: Shape,
    results: Results,
    device: torch.device,
    names: tuple[str, ...] = CONTENDERS,
    rounds: int = 9,
    calls: int = 10,
) -> dict[str, Any]:
    """The contenders at one shape, without those that fail; RuntimeError for wrong fused gradients."""
    torch.compiler.reset()
    frozen = torch.randn(shape.batch, 3, shape.tokens, shape.channels, device=device).bfloat16()
    contenders, row = {}, {**shape._asdict(), "peak_bytes": {}, "gradient_difference_from_eager": {}}
    for name in names:
        found = results.attempt(f"{shape.label}: {name}", partial(prepare, name, shape, frozen))
        if found:
            contenders[name], row["peak_bytes"][name] = found
    if "eager" in contenders:
        truth = contenders["eager"].gradient()
        differences = {
            name: ((each.gradient() - truth).norm() / truth.norm()).item()
            for name, each in contenders.items()
            if name != "eager"
        }
        if not differences.get("fused", 0.0) < 0.1:
            raise RuntimeError(f"the fused gradients differ from eager's by {differences['fused']:.2%}")
        row["gradient_difference_from_eager"] = differences
    phases: dict[str, dict[str, Callable[[], Any]]] = {
        "forward": {name: partial(each.forward, frozen) for name, each in contenders.items()},
        "step": {name: partial(each.step, frozen) for name, each in contenders.items()},
        "graph": {},
    }
    for name, step in phases["step"].items() if frozen.is_cuda else ():
        graph = results.attempt(f"{shape.label}: {name}, graph", partial(CapturedCall, step, ()))
        if graph:
            phases["graph"][name] = graph
    for phase, functions in phases.items():
        timings = interleave(functions, rounds=rounds, calls=calls)
        row[phase] = {name: timing.result(shape.batch) for name, timing in timings.items()}
        fused = timings.pop("fused", None)
        if fused is not None:
            row[f"{phase}_speedup"] = {name: speedup(each, fused)["wall"] for name, each in timings.items()}
            bound = moved_bytes(shape, backward=phase != "forward") / results.content["copy_bytes_per_second"]
            row[f"{phase}_share_of_copy_bandwidth"] = bound / statistics.median(fused.wall)
    return row


def main() -> None:
    given = parser(__doc__).parse_args()
    device = torch.device(given.device)
    results = Results("kernels", given, copy_bytes_per_second=copy_ceiling(device))
    for shape in SHORT if given.short else SHAPES:
        # torch.compile takes its time: in the short form at the paper's shape alone.
        names = CONTENDERS if not given.short or shape == PAPER else ("fused", "eager")
        # The larger half takes tens of milliseconds a call.
        calls = 10 if shape.map_bytes < 2**29 else 2
        results.record(shape.label, partial(measure_shape, shape, results, device, names, calls=calls))
    results.finish()


if __name__ == "__main__":
    main()
