"""Measure the fused objective against eager PyTorch and `torch.compile` of the eager code.

    python -m benchmarks.kernels [--short]     # needs an NVIDIA GPU

A step computes what a training step computes between the frozen tokens and the optimiser: the head's linear
layer, its epilogue (bias, tanh and layer norm), both losses, and the gradients of all parameters. As in
training, frozen tokens are bf16, and the head's parameters are fp32 under autocast. The results have three
timings:

    forward   the losses without gradients
    step      a step called from Python
    graph     the same step replayed as a CUDA graph, which excludes the time of the host

The goals in docs/benchmarks.md refer to `graph`, because in training the host runs ahead while the GPU
computes the encoder. The sections `schedules` compare ways to run the two kernels of the epilogue.
"""

from __future__ import annotations

import statistics
import time
import traceback
from functools import partial
from itertools import product, starmap
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.measure import (
    Results,
    Timing,
    command_line,
    copy_ceiling,
    in_own_process,
    interleave,
    peak_bytes,
    run_command,
    speedup,
)
from fasttrain.cuda_graph import CapturedCall
from fasttrain.errors import InputError
from fasttrain.projection import Projection
from fasttrain_kernels import cosettle_head_loss, separability


class Shape(NamedTuple):
    """Number of samples, token grid, channels, and side of the pooling window."""

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
        """Size of the bf16 tokens of all three views."""
        return self.batch * 3 * self.tokens * self.channels * 2


PAPER = Shape(128, (14, 14), 768)
# The most important shapes come first, because time may run out.
SHORT = [PAPER, Shape(128, (37, 37), 768, window=1), Shape(128, (37, 37), 768), Shape(32, (16, 16), 384)]
SHAPES = [*SHORT, *(Shape(batch, (14, 14), width) for width in (384, 768, 1024) for batch in (32, 256))]
CONTENDERS = ("fused", "compiled", "eager")


class Contender:
    """One implementation of the linear head and the objective: `fused`, `compiled` or `eager`."""

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
        """Gradients of all parameters from the last step, as one vector."""
        return torch.cat([parameter.grad.flatten() for parameter in self.projection.parameters()]).double()


def moved_bytes(shape: Shape, *, backward: bool) -> int:
    """Memory traffic in bytes if each launch reads and writes its tensors once (see docs/benchmarks.md)."""
    pooled = 1 / shape.window**2
    maps = 9 + 4 * pooled if backward else 4 + 2 * pooled
    return int(maps * shape.map_bytes)


def prepare(name: str, shape: Shape, frozen: Tensor) -> tuple[Contender, int | None]:
    """Create a contender and run it once.

    Returns the contender and, on a GPU, the peak memory of one step beyond its inputs.
    """
    contender = Contender(name, shape, frozen.device)
    contender.step(frozen)
    return contender, peak_bytes(partial(contender.step, frozen), frozen.device) if frozen.is_cuda else None


def random_tokens(shape: Shape, device: torch.device) -> Tensor:
    return torch.randn(shape.batch, 3, shape.tokens, shape.channels, device=device).bfloat16()


def measure_shape(
    shape: Shape,
    results: Results,
    device: torch.device,
    names: tuple[str, ...] = CONTENDERS,
    rounds: int = 9,
    calls: int = 10,
) -> dict[str, Any]:
    """Measure the contenders at one shape.

    Contenders that fail are skipped, as are fused gradients that differ from the eager ones by 10 % or more.
    """
    torch.compiler.reset()
    frozen = random_tokens(shape, device)
    contenders, row = {}, {**shape._asdict(), "peak_bytes": {}, "gradient_difference_from_eager": {}}
    for name in names:
        prepared = results.attempt(f"{shape.label}: {name}", partial(prepare, name, shape, frozen))
        if prepared:
            contenders[name], row["peak_bytes"][name] = prepared
    if "eager" in contenders:
        truth = contenders["eager"].gradient()
        differences = {
            name: ((each.gradient() - truth).norm() / truth.norm()).item()
            for name, each in contenders.items()
            if name != "eager"
        }
        if not differences.get("fused", 0.0) < 0.1:
            wrong = f"failed: the gradients differ from eager ones by {differences['fused']:.2%}"
            results.skipped[f"{shape.label}: fused"] = wrong
            del contenders["fused"]
        row["gradient_difference_from_eager"] = differences
    timings_of_phases = {
        phase: interleave(
            {name: partial(getattr(each, phase), frozen) for name, each in contenders.items()},
            rounds=rounds,
            calls=calls,
        )
        for phase in ("forward", "step")
    }
    if frozen.is_cuda:
        del frozen
        timings_of_phases["graph"] = measure_graphs(shape, results, list(contenders), rounds, calls)
    for phase, timings in timings_of_phases.items():
        row[phase] = {name: timing.result(shape.batch) for name, timing in timings.items()}
        fused = timings.pop("fused", None)
        if fused is not None:
            row[f"{phase}_speedup"] = {name: speedup(each, fused)["wall"] for name, each in timings.items()}
            bound = moved_bytes(shape, backward=phase != "forward") / results.content["copy_bytes_per_second"]
            row[f"{phase}_share_of_copy_bandwidth"] = bound / statistics.median(fused.wall)
    return row


def measure_graphs(
    shape: Shape, results: Results, names: list[str], rounds: int, calls: int
) -> dict[str, Timing]:
    """Time steps replayed as CUDA graphs. Contenders that cannot be recorded are skipped.

    A failed recording can make PyTorch's memory allocator unusable for the rest of the process. Graphs
    therefore have a process of their own, and another one without the contender that fails.
    """
    # First without the contender that takes long to compile, so that a lack of time loses only its result.
    quick = [name for name in names if name != "compiled"]
    timings = measure_recorded(shape, results, quick, rounds, calls)
    return (measure_recorded(shape, results, names, rounds, calls) if quick != names else {}) or timings


def measure_recorded(
    shape: Shape, results: Results, names: list[str], rounds: int, calls: int
) -> dict[str, Timing]:
    """Time the replays of contenders, interleaved in a new process."""
    names = list(names)
    while names:
        left = results.deadline - time.monotonic()
        measure = partial(in_own_process, time_graphs, shape, names, rounds, calls, seconds=left)
        timings = results.attempt(f"{shape.label}: graphs", measure)
        if not isinstance(timings, str):
            return timings or {}
        failed, _, reason = timings.partition(": ")
        names.remove(failed)
        results.skipped[f"{shape.label}: {failed}, graph"] = f"failed: {reason}"
    return {}


def time_graphs(shape: Shape, names: list[str], rounds: int, calls: int) -> dict[str, Timing] | str:
    """Record a step of each contender and time the replays; return `NAME: REASON` if one fails."""
    device = torch.device("cuda")
    frozen = random_tokens(shape, device)
    graphs = {}
    for name in names:
        try:
            contender, _ = prepare(name, shape, frozen)
            graphs[name] = CapturedCall(partial(contender.step, frozen), ())
        except Exception as error:
            traceback.print_exc()
            return f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return interleave(graphs, rounds=rounds, calls=calls)


def measure_schedules(channels: int, rounds: int = 5, calls: int = 20) -> dict[str, Any]:
    """Time both kernels of the epilogue with each `separability.Schedule`, replayed as CUDA graphs.

    Returns milliseconds by kernel and schedule, for the paper's batch and grid.
    """
    shape = PAPER._replace(channels=channels)
    device = torch.device("cuda")
    frozen, inputs = random_tokens(shape, device), random_tokens(shape, device)
    head = [torch.randn(channels, device=device) for _ in range(3)]
    window = (shape.window, shape.window)
    epilogue = separability.Epilogue(
        inputs, frozen, *head, None, None, 1e-5, True, *shape.grid, *window, kl=True
    )
    _, pooled, statistics = separability.launch_forward(epilogue, pool=True, statistics=True)
    grads = {"grad_loss": torch.ones((), device=device), "lambda_reg": 3.0, "grad_pooled_BTMD": pooled}
    launches = {
        "FORWARD_SCHEDULE": lambda: separability.launch_forward(epilogue, pool=True, statistics=True),
        "BACKWARD_SCHEDULE": lambda: separability.launch_backward(epilogue, statistics, None, **grads),
    }
    results = {}
    for kernel, launch in launches.items():
        graphs = {}
        for schedule in starmap(separability.Schedule, product((1024, channels // 2), (1, 2), (False, True))):
            with patch.object(separability, kernel, schedule):
                graphs[str(schedule)] = CapturedCall(launch, ())
        timings = interleave(graphs, rounds=rounds, calls=calls)
        results[kernel] = {name: timing.result(shape.batch) for name, timing in timings.items()}
    return results


def main() -> None:
    parser = command_line("kernels", __doc__)
    parser.add_argument("--only", choices=("shapes", "schedules"), help="measure only these (default: both)")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type != "cuda":
        raise InputError(f"--device: the kernels need an NVIDIA GPU, got {args.device!r}.")
    results = Results("kernels", args, copy_bytes_per_second=copy_ceiling(device))
    shapes = SHORT if args.short else SHAPES
    for shape in () if args.only == "schedules" else shapes:
        # torch.compile is slow, so --short includes it only at the paper's shape.
        names = CONTENDERS if not args.short or shape == PAPER else ("fused", "eager")
        # A call takes long at large shapes, so a few are enough.
        calls = 10 if shape.map_bytes < 2**29 else 2
        results.record(shape.label, partial(measure_shape, shape, results, device, names, calls=calls))
    widths = (768,) if args.short else (768, 1024, 384)
    for channels in () if args.only == "shapes" else widths:
        measure = partial(in_own_process, measure_schedules, channels)
        results.record(f"schedules, D {channels}", measure)
    results.finish()


if __name__ == "__main__":
    run_command(main)
