"""How fast a recipe trains here, part by part, and beside it the published scheme, in one run.

    python -m benchmarks.step RECIPE [key=value ...]   write results/throughput-{cpu,cuda}.json, a plot
    python -m benchmarks.step --short RECIPE           fewer rounds and sizes
    python -m benchmarks.step --plot FILE.json         draw the plot again

Weights are `random`: they do not matter here. On a CPU a small ViT stands in for the recipe's backbone
(SMALL), in the recipe's precision and in fp32, and what counts are the ratios. Sections that cannot run (no
DALI, no second GPU), fail or are not reached stand in the JSON under `skipped` with the reason; it is written
after every section. With `--limit` nothing new is begun once that many seconds are over. Everything is
measured in turns (measure.py).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baseline import BaselineStep
from benchmarks.measure import (
    WARM_UPS,
    Timing,
    copy_ceiling,
    interleave,
    matrix_ceiling,
    speedup,
    synchronize,
)
from benchmarks.record import RESULTS, environment, write_results
from fasttrain import distributed
from fasttrain.backbone_trainer import DTYPES, BackboneTrainer, backbone_recipes, backbone_settings
from fasttrain.backbones import Backbone, load_backbone
from fasttrain.distributed import World
from fasttrain.recipe import BackboneRecipe, Recipe, load_recipe

T = TypeVar("T")
SMALL = (
    "backbone.name=dino",
    "backbone.embed_dim=192",
    "backbone.depth=4",
    "train.batch_size=16",
    # What `auto` means on a GPU.
    "encoder.compile=default",
)
SMALL_DEPTHS = (2, 4, 12)
KINETICS_VIDEOS, KINETICS_EPOCHS = 240_000, 5
SWITCHES = {
    "three passes": {"batch_views": False},
    "weights cast at every step": {"cast_weights": False},
    "not compiled": {"compile": "none"},
    "fp8": {"precision": "fp8"},
}
GPU_SWITCHES = {
    "compiled, max-autotune": {"compile": "max-autotune"},
    "not compiled, fp8": {"compile": "none", "precision": "fp8"},
    # Which of the two PyTorch takes by itself differs with its version and the chip.
    "not compiled, cuDNN attention": {"compile": "none", "attention": "cudnn"},
    "not compiled, flash attention": {"compile": "none", "attention": "flash"},
    "cuDNN attention": {"attention": "cudnn"},
    "flash attention": {"attention": "flash"},
    # Last: a recording that fails may take others with it.
    "CUDA graph": {"cuda_graph": True},
    "not compiled, CUDA graph": {"compile": "none", "cuda_graph": True},
    "CUDA graph, fp8": {"cuda_graph": True, "precision": "fp8"},
}
# On a GPU all pairs go at once as it is.
CPU_SWITCHES = {"fused attention": {"attention": "flash"}, "all pairs at once": {"chunk": 1_000_000}}
# Half a minute of compilation each on a GPU: left out of the short form.
LONG_ON_GPU = (
    "three passes",
    "weights cast at every step",
    "compiled, max-autotune",
    "cuDNN attention",
    "flash attention",
)


class Run:
    """One recipe on one device, with how often things are measured."""

    def __init__(self, recipe: Recipe, world: World, *, short: bool, seconds: float = math.inf) -> None:
        self.recipe, self.world, self.device, self.short = recipe, world, world.device, short
        self.rounds = 3 if short else 7
        self.calls = 10 if self.device.type == "cuda" else 1
        self.pairs = recipe.train.batch_size
        self.deadline = time.monotonic() + seconds
        # What was tried and did not run, and what was not begun, by name, with the reason.
        self.failed: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self._backbones: dict[Any, Backbone] = {}

    def time(self, contenders: dict[str, Callable[[], Any]]) -> dict[str, Timing]:
        return interleave(contenders, rounds=self.rounds, calls=self.calls, device=self.device)

    def frames(self, recipe: Recipe | None = None) -> Tensor:
        recipe = recipe or self.recipe
        size = recipe.data.image_size
        # Drawn on the CPU: a recording that failed may leave the GPU's generator unusable.
        frames = torch.randn(2, recipe.train.batch_size, 3, size, size)
        if self.device.type == "cuda":
            return frames.to(self.device, DTYPES[recipe.train.precision])
        return frames

    def student(self, recipe: Recipe | None = None) -> BackboneTrainer:
        """A student ready to step."""
        student = self.cold_student(recipe or self.recipe)
        student.warm_up()
        return student

    def cold_student(self, recipe: Recipe) -> BackboneTrainer:
        """A student before its warm-up."""
        settings = backbone_settings(recipe)
        # Drawing the random weights of a ViT-B takes seconds, copying them does not.
        key = tuple(settings.values())
        if key not in self._backbones:
            self._backbones[key] = load_backbone(**settings)
        return BackboneTrainer(recipe, self.world, copy.deepcopy(self._backbones[key]))

    def prepare(
        self, section: str, makers: dict[str, Callable[[], Callable[[], Any]]]
    ) -> dict[str, Callable[[], Any]]:
        """The contenders that can be made and called once, by name."""
        contenders = {}
        for name, make in makers.items():
            contender = self.attempt(f"{section}, {name}", partial(self._called_once, make))
            if contender is not None:
                contenders[name] = contender
        return contenders

    def _called_once(self, make: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
        contender = make()
        contender()
        synchronize(self.device)
        return contender

    def attempt(self, name: str, measure: Callable[[], T]) -> T | None:
        """What `measure` gives; None and a note in `failed` where it fails, which costs no other figure.

        After the deadline: None and a note in `left_out`.
        """
        if time.monotonic() > self.deadline:
            self.left_out[name] = "out of time"
            return None
        try:
            return measure()
        except Exception as error:
            traceback.print_exc()
            self.failed[name] = f"failed: {told(error)}"
            return None
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def told(error: BaseException) -> str:
    """Type and first line of an error, and of the one in whose handling it was raised."""
    # The end of a CUDA graph's recording fails in turn, and says nothing of why the recording did.
    lines = str(error).splitlines() or [""]
    before = f", after {told(error.__context__)}" if error.__context__ else ""
    return f"{type(error).__name__}: {lines[0]}{before}"


def with_encoder(recipe: Recipe, **switches: Any) -> Recipe:
    return dataclasses.replace(recipe, encoder=dataclasses.replace(recipe.encoder, **switches))


def stepper(student: BackboneTrainer, frames: Tensor) -> Callable[[], None]:
    """One training step on resident frames: forward, backward, optimiser; no log step."""

    def step() -> None:
        student.forward_backward(frames, 1, last=True, diagnostics=False)
        student.update(1e-4)

    return step


def ceilings(run: Run) -> dict[str, float]:
    dtype = DTYPES[run.recipe.train.precision]
    return {
        "matrix_tflops": matrix_ceiling(dtype, run.device) / 1e12,
        "copy_gb_per_second": copy_ceiling(run.device) / 1e9,
    }


def encoder_flops(student: BackboneTrainer, frames: Tensor) -> float:
    """Multiplications and additions of the three views of one pair, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        one = frames[:, :1].to(student.encoder.positions_ND.dtype)
        student.encoder.three_views(one, student.positions(0))
    return float(counter.get_total_flops())


def steps_against_the_peer(run: Run, recipe: Recipe) -> dict[str, Any]:
    """A training step on resident frames: ours, and the published scheme at equal precision."""
    frames, device = run.frames(recipe), run.device
    dtype = DTYPES[recipe.train.precision]

    def ours(**switches: Any) -> Callable[[], Any]:
        return stepper(run.student(with_encoder(recipe, **switches)), frames)

    def peer(dtype: torch.dtype, **options: Any) -> Callable[[], Any]:
        return partial(BaselineStep(recipe, device=device, dtype=dtype, **options), frames)

    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        "ours": ours,
        "ours, not compiled": partial(ours, compile="none"),
        "peer": partial(peer, dtype),
        "peer, fused attention": partial(peer, dtype, fused_attention=True),
    }
    if device.type == "cuda":
        makers["peer, fp16"] = partial(peer, torch.float16)
    contenders = run.prepare("steps", makers)
    timings = run.time(contenders)
    result: dict[str, Any] = {
        "precision": recipe.train.precision,
        "timings": {name: timing.result(run.pairs) for name, timing in timings.items()},
        "speedup": {
            f"{name} over {other}": speedup(timings[other], timings[name])
            for name in timings
            for other in timings
            if name.startswith("ours") and other.startswith("peer")
        },
    }
    if device.type == "cuda":
        result["peak_memory_gb"] = {name: peak_memory_gb(step) for name, step in contenders.items()}
    return result


def peak_memory_gb(step: Callable[[], Any]) -> float:
    """The most memory that a step takes beyond weights, states and recorded graphs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def parts_alone(run: Run, ceiling: dict[str, float]) -> dict[str, Any]:
    """Encoder, head with losses (forward and backward) and optimiser, each alone, against its ceiling."""
    student, frames = run.student(), run.frames()
    positions = student.positions(0)
    frozen_B3ND = student.runtime.three_views(frames, positions).clone()

    def head_and_loss() -> None:
        with torch.autocast(run.device.type, student.dtype, enabled=student.dtype != torch.float32):
            losses = student.objective(frozen_B3ND, student.grid, False)
        losses.loss.backward()

    timings = run.time(
        {
            "encoder": lambda: student.runtime.three_views(frames, positions),
            "head and loss": head_and_loss,
            "optimiser": lambda: student.update(1e-4),
        }
    )
    result: dict[str, Any] = {name: timing.result(run.pairs) for name, timing in timings.items()}
    flops = encoder_flops(student, frames) * run.pairs
    rate = flops / (result["encoder"]["ms"] / 1e3)
    result["encoder"] |= {
        "gflop_per_pair": flops / run.pairs / 1e9,
        "tflops": rate / 1e12,
        "utilisation": rate / 1e12 / ceiling["matrix_tflops"],
    }
    # Frozen tokens read in the forward and in the backward pass; the head's products stay on chip at best.
    floor_bytes = 2 * frozen_B3ND.numel() * frozen_B3ND.element_size()
    seconds = result["head and loss"]["ms"] / 1e3
    result["head and loss"] |= {
        "floor_bytes": floor_bytes,
        "copy_share": floor_bytes / seconds / 1e9 / ceiling["copy_gb_per_second"],
    }
    return result


def switches(run: Run) -> dict[str, Any]:
    """Each switch of the encoder changed alone, against the recipe as it is."""
    choices = SWITCHES | (GPU_SWITCHES if run.device.type == "cuda" else CPU_SWITCHES)
    if run.short and run.device.type == "cuda":
        choices = {name: choice for name, choice in choices.items() if name not in LONG_ON_GPU}
    if run.device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        choices = {name: c for name, c in choices.items() if c.get("precision") != "fp8"}
    frames = run.frames()
    seconds: dict[str, float] = {}

    def make(name: str, choice: dict[str, Any]) -> Callable[[], None]:
        student = run.cold_student(with_encoder(run.recipe, **choice))
        seconds[name] = student.warm_up()
        return stepper(student, frames)

    contenders = run.prepare(
        "switches", {name: partial(make, name, c) for name, c in {"as it is": {}, **choices}.items()}
    )
    timings = run.time(contenders)
    return {
        name: {
            **timing.result(run.pairs),
            "warm_up_seconds": seconds[name],
            **({"times_as_it_is": speedup(timings["as it is"], timing)} if "as it is" in timings else {}),
        }
        for name, timing in timings.items()
    }


def fp8_error(run: Run) -> dict[str, float]:
    """What FP8 does to tokens and loss, and beside it what bf16 does, against float32: relative."""
    frames = run.frames().float()
    outcome: dict[str, float] = {}
    exact: tuple[Tensor, float] | None = None
    for name, precision, encoder in (
        ("fp32", "fp32", "auto"),
        ("bf16", "bf16", "auto"),
        ("fp8", "bf16", "fp8"),
    ):
        recipe = with_encoder(run.recipe, precision=encoder, compile="none")
        recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, precision=precision))
        student = run.cold_student(recipe)
        tokens = student.runtime.three_views(frames, student.positions(0)).float()
        with torch.no_grad():
            loss = student.objective(tokens, student.grid, False).loss.item()
        if exact is None:
            exact = tokens, loss
        else:
            outcome[f"{name}_tokens"] = ((tokens - exact[0]).norm() / exact[0].norm()).item()
            outcome[f"{name}_loss"] = abs(loss - exact[1]) / abs(exact[1])
    return outcome


def scaling(run: Run) -> dict[str, Any]:
    """A step over batch, resolution (tokens), number of backbones and, on a CPU, depth beside the peer's."""
    base = run.recipe
    batches = (32, 64, 128, 256) if run.device.type == "cuda" else (4, 8, 16, 32)
    sizes: tuple[int, ...] = (224, 288, 384, 512)
    rows: dict[str, list[dict[str, Any]]] = {"batch": [], "resolution": [], "backbones": []}
    # The recipe as it is stands in all three: measured once.
    cost = lru_cache(maxsize=None)(partial(step_cost, run))
    counts: tuple[int, ...] = (1, 2, 4, 8)
    if run.short:
        # On a GPU every batch and every size takes half a minute of compilation.
        sizes = sizes[: 1 if run.device.type == "cuda" else 2]
        batches, counts = batches[::2], counts[::2]

    def add(section: str, name: str, facts: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        # One that runs out of memory costs no other row.
        found = run.attempt(f"scaling, {name}", measure)
        if found is not None:
            rows.setdefault(section, []).append({**facts, **found})

    for count in counts:
        add("backbones", f"{count} backbones", {"backbones": count}, partial(cost, base, count))
    for batch in batches:
        recipe = dataclasses.replace(base, train=dataclasses.replace(base.train, batch_size=batch))
        add("batch", f"{batch} pairs", {"batch": batch}, partial(cost, recipe, 1))
    for size in sizes:
        recipe = dataclasses.replace(base, data=dataclasses.replace(base.data, image_size=size))
        facts = {"size": size, "tokens": (size // (base.backbone.patch_size or 16)) ** 2}
        add("resolution", f"{size} pixels", facts, partial(cost, recipe, 1))
    if run.device.type == "cpu":
        for depth in SMALL_DEPTHS[: 2 if run.short else 3]:
            add("depth", f"depth {depth}", {"depth": depth}, partial(depth_beside_the_peer, run, depth))
    return rows


def depth_beside_the_peer(run: Run, depth: int) -> dict[str, Any]:
    """What is gained over the peer hangs on how much of a step the encoder's matrix products are."""
    backbone = dataclasses.replace(run.recipe.backbone, depth=depth)
    recipe = dataclasses.replace(run.recipe, backbone=backbone)
    frames = run.frames(recipe)
    peer = BaselineStep(recipe, device=run.device, dtype=DTYPES[recipe.train.precision])
    timings = run.time({"ours": stepper(run.student(recipe), frames), "peer": partial(peer, frames)})
    return {
        **timings["ours"].result(run.pairs),
        "speedup": {"ours over peer": speedup(timings["peer"], timings["ours"])},
    }


def step_cost(run: Run, recipe: Recipe, count: int) -> dict[str, float]:
    """A step of `count` students on the same frames: time, and on a GPU the peak of its memory."""
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    frames = run.frames(recipe)
    steps = [stepper(run.student(recipe), frames) for _ in range(count)]
    timing = run.time({"": lambda: [step() for step in steps]})[""]
    result = timing.result(recipe.train.batch_size)
    if run.device.type == "cuda":
        result["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return result


def end_to_end(run: Run) -> dict[str, Any]:
    """With data: ours from packed JPEG, the peer through PIL (four frames decoded), of the same videos.

    Workers run ahead while others have their turn, which flatters data alone: loaders.py measures that apart.
    """
    # Needs DALI and PyAV; `main` asks for them first.
    from benchmarks import loaders

    cores = len(os.sched_getaffinity(0))
    steps = 6 if run.short else 24
    student, dtype = run.student(), DTYPES[run.recipe.train.precision]
    peer = BaselineStep(run.recipe, device=run.device, dtype=dtype)
    resident = stepper(student, run.frames())
    with tempfile.TemporaryDirectory() as folder:
        places = loaders.prepare(Path(folder), None, 8)
        setting = loaders.Setting(**places, batch=run.pairs, pairs=0, threads=cores, device=run.device.type)
        # Each stream is read twice: with the training step and alone.
        total = 2 * steps * (run.rounds + WARM_UPS)
        published = loaders.FolderPairs(places["frames"], total * run.pairs, 4)
        ours = loaders.our_pairs(setting, places["packed"], "auto", total)
        theirs = loaders.workers(setting, published)
        try:
            contenders = {
                "ours": lambda: take(ours, steps, lambda pairs: stepper(student, pairs.frames)()),
                "peer": lambda: take(theirs, steps, lambda batch: peer(batch.transpose(0, 1).contiguous())),
                "ours, resident": lambda: [resident() for _ in range(steps)],
                "ours, data alone": lambda: take(ours, steps, lambda _: None),
                "peer, data alone": lambda: take(theirs, steps, lambda _: None),
            }
            timings = interleave(contenders, rounds=run.rounds, calls=1, device=run.device)
        finally:
            ours.close()
    rows = {name: timing.result(run.pairs, calls=steps) for name, timing in timings.items()}
    hours = KINETICS_EPOCHS * KINETICS_VIDEOS / rows["ours"]["pairs_per_second"] / 3600
    return {
        "timings": rows,
        "speedup": {
            "ours over peer": speedup(timings["peer"], timings["ours"]),
        },
        "data_overhead": rows["ours"]["ms"] / rows["ours, resident"]["ms"] - 1,
        "kinetics400_hours": hours,
    }


def take(batches: Iterator[Any], count: int, use: Callable[[Any], Any]) -> None:
    for _ in range(count):
        use(next(batches))


def over_processes(run: Run, arguments: argparse.Namespace) -> dict[str, Any]:
    """Growth with processes (GPUs, or cores): the pairs of a process stay the same; one backbone or several.

    Of several backbones, two ways: data parallel, or some backbones on each process, frames gathered.
    """
    available = torch.cuda.device_count() if run.device.type == "cuda" else len(os.sched_getaffinity(0))
    counts = [count for count in (1, 2, 4, 8) if count <= available]
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "spread.json"
            command = [
                sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}",
                "-m", "benchmarks.spread", "--out", str(out), arguments.recipe, *arguments.overrides,
            ]  # fmt: skip
            # As many threads a process for one as for all.
            threads = max(1, len(os.sched_getaffinity(0)) // counts[-1])
            environment_ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            run_to_end(command, environment_, seconds=240)
            rows.append(json.loads(out.read_text(encoding="utf-8")))
    rates = [row["timings"]["one backbone, data parallel"]["pairs_per_second"] for row in rows]
    for row, rate in zip(rows, rates, strict=True):
        row["efficiency"] = rate / (row["processes"] * rates[0])
    return {"rows": rows}


def run_to_end(command: list[str], environment_: dict[str, str], *, seconds: float) -> None:
    """Run torchrun; out of time it is asked to end, for it then ends its workers too."""
    process = subprocess.Popen(command, env=environment_)
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait(timeout=30)
        raise
    if code:
        raise subprocess.CalledProcessError(code, command)


def read_recipe(path: str, overrides: list[str], *, small: bool) -> Recipe:
    """The first backbone of a recipe with random weights, one pass a step; on a CPU the stand-in."""
    fixed = ["backbone.weights=random", "train.accumulate=1"]
    recipe = load_recipe(path, [*fixed, *(SMALL if small else ()), *overrides])
    first = backbone_recipes(recipe)[0]
    weights: BackboneRecipe = dataclasses.replace(first.backbone, weights="random")
    return dataclasses.replace(first, backbone=weights)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", default="recipes/dinov2.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--short", action="store_true", help="fewer rounds and sizes")
    parser.add_argument(
        "--limit", type=float, default=math.inf, metavar="SECONDS", help="begin nothing new after these"
    )
    parser.add_argument("--out", type=Path, help="JSON file (results/throughput-cpu.json or -cuda.json)")
    parser.add_argument("--plot", type=Path, help="only draw the plots of this JSON file")
    arguments = parser.parse_args()
    if arguments.plot:
        plot(arguments.plot)
        return
    cuda = torch.cuda.is_available()
    recipe = read_recipe(arguments.recipe, arguments.overrides, small=not cuda)
    path = arguments.out or RESULTS / f"throughput-{'cuda' if cuda else 'cpu'}.json"
    with distributed.start(recipe.device) as world:
        run = Run(recipe, world, short=arguments.short, seconds=arguments.limit)
        ceiling = ceilings(run)
        sections: dict[str, Callable[[], dict[str, Any]]] = {
            "steps": lambda: steps_against_the_peer(run, recipe),
            "steps_fp32": lambda: steps_against_the_peer(run, in_fp32(recipe)),
            "parts": lambda: parts_alone(run, ceiling),
            "end_to_end": lambda: end_to_end(run),
            "switches": lambda: switches(run),
            "fp8": lambda: fp8_error(run),
            "scaling": lambda: scaling(run),
            "processes": lambda: over_processes(run, arguments),
        }
        skipped = obstacles(world.device, recipe)
        payload: dict[str, Any] = {
            "environment": environment(),
            "command": " ".join(["benchmarks.step", *sys.argv[1:]]),
            "precision": recipe.train.precision,
            "backbone": dataclasses.asdict(recipe.backbone),
            "batch_size": recipe.train.batch_size,
            "image_size": recipe.data.image_size,
            "threads": torch.get_num_threads(),
            "ceilings": ceiling,
            "skipped": skipped,
        }
        wanted = {name: section for name, section in sections.items() if name not in skipped}
        for name, reason in skipped.items():
            print(f"skipped {name}: {reason}", flush=True)
        ahead = dict.fromkeys(wanted, "the run ended before")
        for name, section in wanted.items():
            figures = run.attempt(name, partial(writable, section))
            del ahead[name]
            if figures is not None:
                payload[name] = figures
            # After every section: what is measured stays, whatever comes next.
            payload["skipped"] = {**skipped, **run.failed, **run.left_out, **ahead}
            write_results(path, payload)
            print(f"{name}: {payload['skipped'].get(name, 'done')}", flush=True)
    plot(path)
    print(json.dumps({key: payload[key].get("speedup") for key in ("steps", "end_to_end") if key in payload}))
    if run.failed:
        sys.exit("\n".join(f"{name} {reason}" for name, reason in run.failed.items()))


def writable(section: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A section's figures. Raises ValueError where one is no number, which no JSON file can hold."""
    figures = section()
    json.dumps(figures, allow_nan=False)
    return figures


def in_fp32(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, precision="fp32"))


def obstacles(device: torch.device, recipe: Recipe) -> dict[str, str]:
    """Sections that cannot run here, and why."""
    found = {}
    if device.type == "cuda":
        found["steps_fp32"] = "on a GPU nobody trains in float32"
    elif recipe.train.precision == "fp32":
        found["steps_fp32"] = "the recipe's precision is fp32 itself"
    # find_spec imports the parent, which may be absent itself.
    needed = {"DALI": ("nvidia", "nvidia.dali"), "PyAV": ("av",)}
    missing = [
        name for name, specs in needed.items() if not all(importlib.util.find_spec(spec) for spec in specs)
    ]
    if missing:
        found["end_to_end"] = f"needs {' and '.join(missing)}, which is not installed"
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        found["processes"] = "needs two GPUs"
    return found


def plot(results: Path) -> Path:
    """Panels from the JSON alone: the peer, the switches, with data, and how a step grows."""
    import matplotlib.pyplot as plt

    content = json.loads(results.read_text(encoding="utf-8"))
    figure, axes = plt.subplots(2, 3, figsize=(16, 8), layout="constrained")
    for axis, rows, title in (
        (axes[0, 0], content.get("steps", {}).get("timings"), "training step on resident frames"),
        (axes[0, 1], content.get("switches"), "one switch of the encoder changed"),
        (axes[0, 2], content.get("end_to_end", {}).get("timings"), "with data, and data alone"),
    ):
        if rows:
            bars(axis, rows, title)
        else:
            axis.set_axis_off()
    for axis, (section, key) in zip(
        axes[1], {"batch": "batch", "resolution": "tokens", "backbones": "backbones"}.items(), strict=True
    ):
        rows = content.get("scaling", {}).get(section, [])
        axis.plot([row[key] for row in rows], [row["ms"] for row in rows], marker="o")
        axis.set(xlabel=key, ylabel="ms a step", xlim=(0, None), ylim=(0, None))
    device = content["environment"]["device"] or content["environment"]["cpu"]["model"]
    figure.suptitle(f"{device}, {content['precision']}, width {content['backbone']['embed_dim'] or 768}")
    path = results.with_suffix(".png")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def bars(axis: Any, rows: dict[str, dict[str, float]], title: str) -> None:
    names = list(rows)[::-1]
    drawn = axis.barh(names, [rows[name]["pairs_per_second"] for name in names])
    axis.bar_label(drawn, fmt="%.0f", padding=3)
    axis.set(xlabel="pairs per second", title=title)


if __name__ == "__main__":
    main()
