"""Compare a training step with the published implementation and with the limits of the hardware.

    python -m benchmarks.step [--short] RECIPE [KEY=VALUE ...]

The sections are:

    training      the training command, with its time by part, and its continuation from a checkpoint
    end_to_end    a training step with data, of fasttrain and of the published implementation
    steps         the same without data
    parts         the encoder, the head with the losses, and the optimiser separately
    switches      variants of the encoder settings
    graphs        variants with CUDA graphs; only on a GPU
    scaling       several batch sizes and resolutions

Sections with data use the packed set data.source, or synthetic scenes if it is not given. Weights are random,
since they do not affect the speed. On a CPU, only the ratios are meaningful, and a smaller ViT keeps the run
short:

    python -m benchmarks.step recipes/dino.yaml backbone.embed_dim=192 backbone.depth=4 \\
        train.batch_size=16 encoder.compile=default
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import loaders
from benchmarks.baseline import BaselineStep
from benchmarks.measure import (
    WARM_UPS,
    Call,
    Results,
    Timing,
    command_line,
    copy_ceiling,
    in_own_process,
    interleave,
    matrix_ceiling,
    run_command,
    run_fasttrain,
    speedup,
    synchronize,
)
from fasttrain import distributed
from fasttrain.backbone_trainer import BackboneTrainer, backbone_recipes, backbone_settings
from fasttrain.backbones import Backbone, load_backbone
from fasttrain.checkpoint import drop_checkpoints
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.loggers import read_records
from fasttrain.projection import PROJECTION_FILE, Projection
from fasttrain.recipe import Recipe, load_recipe, to_dict, to_yaml

Switches = dict[str, dict[str, Any]]
SWITCHES: Switches = {"as it is": {}, "not compiled": {"compile": "none"}, "fp8": {"precision": "fp8"}}
# Not measured with --short, and last, because they take long to compile.
LONG_SWITCHES: Switches = {
    "three passes": {"batch_views": False},
    "weights cast at every step": {"cast_weights": False},
    "compiled, max-autotune": {"compile": "max-autotune"},
}
GPU_SWITCHES: Switches = {
    # PyTorch's default choice between these two depends on its version and on the GPU.
    "not compiled, cuDNN attention": {"compile": "none", "attention": "cudnn"},
    "not compiled, flash attention": {"compile": "none", "attention": "flash"},
    # The outputs of few pairs stay in the L2 cache.
    **{f"{chunk} pairs at a time": {"chunk": chunk} for chunk in (8, 16, 32)},
}
# The ways to start whose time is measured: the name, the mode of torch.compile, and whether caches are kept.
STARTS = (
    ("not compiled", "none", False),
    ("compiled", "default", False),
    ("compiled, cached", "default", True),
)
GRAPH_SWITCHES: Switches = {
    "CUDA graph": {"cuda_graph": True},
    "CUDA graph, fp8": {"cuda_graph": True, "precision": "fp8"},
}
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=1")
# Not measured on a GPU, where all pairs are processed at once by default.
CPU_SWITCHES: Switches = {
    "fused attention": {"attention": "flash"},
    "all pairs at once": {"chunk": 1_000_000},
}


class Run:
    """What all sections share: the recipe, the device, the results and the number of rounds."""

    def __init__(self, recipe: Recipe, world: World, results: Results, *, short: bool) -> None:
        self.recipe, self.world, self.results, self.short = recipe, world, results, short
        self.device, self.pairs = world.device, recipe.train.batch_size
        self.on_gpu = self.device.type == "cuda"
        self.rounds, self.calls = 3 if short else 7, 10 if self.on_gpu else 1

    def frames(self, recipe: Recipe) -> Tensor:
        size = recipe.data.image_size
        dtype = recipe.train.dtype if self.on_gpu else torch.float32
        return torch.randn(2, recipe.train.batch_size, 3, size, size, device=self.device, dtype=dtype)

    def cold_trainer(self, recipe: Recipe) -> BackboneTrainer:
        """Create the trainer of a backbone."""
        encoder = copy.deepcopy(random_encoder(tuple(backbone_settings(recipe).items())))
        trainer = BackboneTrainer(recipe, self.world, encoder)
        if trainer.runtime.awaits_calibration:
            trainer.calibrate(self.frames(recipe)[:, :4])
        return trainer

    def trainer(self, recipe: Recipe) -> BackboneTrainer:
        """Create the trainer of a backbone and warm it up."""
        trainer = self.cold_trainer(recipe)
        trainer.warm_up()
        if trainer.graph_failure:
            raise RuntimeError(f"the recording failed: {trainer.graph_failure}")
        return trainer

    def stepper(self, recipe: Recipe) -> Call:
        """Return a training step on frames that are already on the device."""
        return partial(take_step, self.trainer(recipe), self.frames(recipe))

    def time(self, makers: dict[str, Callable[[], Call]]) -> dict[str, Timing]:
        return self.results.time(makers, rounds=self.rounds, calls=self.calls)

    def prepare(self, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
        """Prepare the data in `folder`; return their paths by form, and a description."""
        source = self.recipe.data.source
        return loaders.prepare(folder, Path(source) if source else None, 8)


# Initialising a ViT-B takes seconds, whereas copying it is fast.
@lru_cache(maxsize=2)
def random_encoder(settings: tuple[tuple[str, Any], ...]) -> Backbone:
    return load_backbone(**dict(settings))


def take_step(trainer: BackboneTrainer, frames: Tensor) -> None:
    """Run one training step without diagnostics."""
    trainer.forward_backward(frames, 1, last=True, diagnostics=False)
    trainer.update(1e-4)


def with_changes(recipe: Recipe, section: str, **values: Any) -> Recipe:
    """Return `recipe` with the given values of one section changed."""
    changed = dataclasses.replace(getattr(recipe, section), **values)
    return dataclasses.replace(recipe, **{section: changed})


def training(run: Run) -> dict[str, Any]:
    """Train with the command line under torchrun, and once more from the checkpoint in the middle.

    The continued run must end with the same projection. The profile covers a few early steps, and the speed
    is that of the last quarter of the steps. The trace of the profile is written next to the results.
    """
    count = 200 if run.on_gpu else 8
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sources, data = run.prepare(root)
        output = root / "run"
        recipe = with_changes(run.recipe, "data", source=sources["packed"], pairs_per_video=run.pairs)
        recipe = with_changes(recipe, "train", steps=count, log_every=count // 4, save_every=count // 2)
        recipe = with_changes(recipe, "eval", every=0)
        path = root / "recipe.yaml"
        path.write_text(to_yaml(dataclasses.replace(recipe, output=str(output))), encoding="utf-8")

        def train(*options: str) -> tuple[float, Tensor]:
            """Return the speed and the parameters of the projection."""
            print(run_fasttrain(str(path), *options, launcher=TORCHRUN))
            parameters = Projection.load(output / PROJECTION_FILE).parameters()
            rate = read_records(output / "metrics.jsonl")[-1]["pairs_per_second"]
            return rate, torch.cat([parameter.detach().flatten() for parameter in parameters])

        rate, first = train("--profile")
        summary = json.loads((output / "profile" / "summary.json").read_text(encoding="utf-8"))
        shutil.copy(output / "profile" / "trace.json", run.results.path.with_suffix(".trace.json"))
        result = {"data": data, "pairs_per_second": rate, "profile": summary}
        # Save this now, because time may run out.
        run.results.content["training"] = result
        run.results.save()
        # Continue from the checkpoint in the middle.
        drop_checkpoints(output / "checkpoints", count // 2, keep=1)
        resumed = run.results.attempt("training, resumed", train)
        if resumed is not None:
            difference = (resumed[1] - first).norm() / first.norm()
            result["resumed"] = {"pairs_per_second": resumed[0], "difference": difference.item()}
        return result


def end_to_end(run: Run) -> dict[str, Any]:
    """Measure training with data: fasttrain on a packed set, the baseline on frame folders with PIL.

    Contenders run one after the other, not interleaved. Otherwise the workers of one contender would work
    during the turn of another.
    """
    calls = 24 if run.on_gpu else 6
    batches = run.rounds * calls + WARM_UPS
    with tempfile.TemporaryDirectory() as folder:
        sources, data = run.prepare(Path(folder))
        packed = with_changes(run.recipe, "data", source=sources["packed"], pairs_per_video=run.pairs)
        resident, trainer = run.frames(run.recipe), run.trainer(run.recipe)
        baseline = BaselineStep(run.recipe, run.device)
        ours = loaders.our_batches(packed, run.world, batches)
        published = loaders.published_pair
        theirs = loaders.worker_batches(sources["frames"], published, run.pairs, batches, run.device)
        contenders: dict[str, Call] = {
            "ours": lambda: take_step(trainer, next(ours)),
            "baseline": lambda: baseline(next(theirs).transpose(0, 1).contiguous()),
            "ours, resident": lambda: take_step(trainer, resident),
        }
        with closing(ours), closing(theirs):
            timings = {
                name: interleave({name: step}, rounds=run.rounds, calls=calls)[name]
                for name, step in contenders.items()
            }
    rows = {name: timing.result(run.pairs) for name, timing in timings.items()}
    return {
        "data": data,
        "timings": rows,
        "speedup": {"ours over baseline": speedup(timings["baseline"], timings["ours"])},
        "data_overhead": rows["ours"]["ms"] / rows["ours, resident"]["ms"] - 1,
    }


def steps(run: Run) -> dict[str, Any]:
    """Measure a step of fasttrain, and of the baseline at the same precision and, on a GPU, in fp16."""
    recipe, frames = run.recipe, run.frames(run.recipe)
    makers: dict[str, Callable[[], Call]] = {
        "ours": lambda: run.stepper(recipe),
        "baseline": lambda: partial(BaselineStep(recipe, run.device), frames),
        "baseline, fused attention": lambda: partial(BaselineStep(recipe, run.device, True), frames),
    }
    if run.on_gpu:
        fp16 = with_changes(recipe, "train", precision="fp16")
        makers["baseline, fp16"] = lambda: partial(BaselineStep(fp16, run.device), frames)
    timings = run.time(makers)
    return {
        "timings": {name: timing.result(run.pairs) for name, timing in timings.items()},
        "speedup": {
            f"ours over {name}": speedup(timing, timings["ours"])
            for name, timing in timings.items()
            if name != "ours"
        },
    }


def parts(run: Run) -> dict[str, Any]:
    """Measure the encoder, the head with the losses (forward and backward) and the optimiser separately.

    Compare the encoder with the speed of a large matrix product, and the losses with the speed of a copy.
    """
    trainer, frames = run.trainer(run.recipe), run.frames(run.recipe)
    positions = trainer.asymmetric_positions(0)
    frozen_B3ND = trainer.runtime.training_views(frames, positions).clone()

    def head_and_loss() -> None:
        with torch.autocast(run.device.type, trainer.dtype, enabled=trainer.dtype != torch.float32):
            losses = trainer.objective(frozen_B3ND, trainer.grid, False)
        losses.loss.backward()

    timings = run.time(
        {
            "encoder": lambda: lambda: trainer.runtime.training_views(frames, positions),
            "head and loss": lambda: head_and_loss,
            "optimiser": lambda: lambda: trainer.update(1e-4),
        }
    )
    result: dict[str, Any] = {name: timing.result(run.pairs) for name, timing in timings.items()}
    tflops = encoder_flops(trainer, frames, positions) * run.pairs / result["encoder"]["ms"] / 1e9
    ceiling = matrix_ceiling(trainer.dtype, run.device) / 1e12
    result["encoder"] |= {"tflops": tflops, "matrix_tflops": ceiling, "utilisation": tflops / ceiling}
    # Minimum traffic: the forward and the backward each read the frozen tokens once, and nothing else.
    moved_gb = 2 * frozen_B3ND.numel() * frozen_B3ND.element_size() / 1e9
    rate = moved_gb / result["head and loss"]["ms"] * 1e3
    copy_rate = copy_ceiling(run.device) / 1e9
    result["head and loss"] |= {"copy_gb_per_second": copy_rate, "copy_share": rate / copy_rate}
    return result


def encoder_flops(trainer: BackboneTrainer, frames: Tensor, positions: Tensor) -> float:
    """Number of floating-point operations for the three views of one pair, as counted by PyTorch."""

    def product(_: Any, rows_RK: list[int], weight_KO: list[int], **__: Any) -> int:
        return 2 * rows_RK[0] * rows_RK[1] * weight_KO[1]

    # PyTorch does not count the product with GELU.
    formulas = {torch.ops.aten._addmm_activation: product}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        trainer.encoder.training_views(frames[:, :1].to(positions.dtype), positions)
    return float(counter.get_total_flops())


def switches(run: Run) -> dict[str, Any]:
    """Measure the recipe (`as it is`), and variants in which encoder settings are changed.

    On a GPU, also measure the seconds before the second step, with and without compilation.
    """
    choices = SWITCHES | (GPU_SWITCHES if run.on_gpu else CPU_SWITCHES)
    choices |= {} if run.short else LONG_SWITCHES
    recipes = {name: with_changes(run.recipe, "encoder", **choice) for name, choice in choices.items()}
    timings = run.time({name: partial(run.stepper, recipe) for name, recipe in recipes.items()})
    rows: dict[str, Any] = {
        name: {**timing.result(run.pairs), "times_as_it_is": speedup(timings["as it is"], timing)}
        for name, timing in timings.items()
    }
    if run.on_gpu:
        # Saved before, because compilation may take the time that is left.
        run.results.content["switches"] = rows
        run.results.save()
        rows["start_seconds"] = starts(run)
    return rows


def starts(run: Run) -> dict[str, float]:
    """Measure `start_seconds` in new processes, without the caches of earlier compilations."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, mode, keeps_caches in STARTS:
            caches = Path(folder) / mode
            if not keeps_caches:
                shutil.rmtree(caches, ignore_errors=True)
            recipe = with_changes(run.recipe, "encoder", compile=mode)
            left = run.results.deadline - time.monotonic()
            measure = partial(in_own_process, start_seconds, recipe, run.results, seconds=left)
            variables = {
                "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
                "TRITON_CACHE_DIR": f"{caches}/triton",
            }
            with patch.dict(os.environ, variables):
                result = run.results.attempt(f"start, {name}", measure)
            if result is not None:
                seconds[name] = result
    return seconds


def start_seconds(recipe: Recipe, results: Results) -> float:
    """Seconds for the warm-up and the first step of a trainer, without loading its weights."""
    with distributed.start(recipe.device) as world:
        run = Run(recipe, world, results, short=True)
        trainer, frames = run.cold_trainer(recipe), run.frames(recipe)
        synchronize()
        start = time.perf_counter()
        trainer.warm_up()
        take_step(trainer, frames)
        synchronize()
        return time.perf_counter() - start


def graphs(run: Run) -> dict[str, Any]:
    """Measure each variant with a CUDA graph, interleaved with the recipe, in a process of its own.

    A failed recording can make PyTorch's memory allocator unusable for the rest of the process.
    """
    if not run.on_gpu:
        raise InputError("--only graphs: needs a GPU")
    rows = {}
    for name, choice in GRAPH_SWITCHES.items():
        variant = with_changes(run.recipe, "encoder", **choice)
        left = run.results.deadline - time.monotonic()
        measure = partial(
            in_own_process, time_both, run.recipe, variant, run.results, run.short, seconds=left
        )
        timings = run.results.attempt(name, measure)
        if timings is not None:
            plain, graph = timings
            rows[name] = {**graph.result(run.pairs), "times_as_it_is": speedup(plain, graph)}
    return rows


def time_both(recipe: Recipe, variant: Recipe, results: Results, short: bool) -> tuple[Timing, Timing]:
    """Time steps of a recipe and of a variant, interleaved."""
    with distributed.start(recipe.device) as world:
        run = Run(recipe, world, results, short=short)
        # Not `run.time`, because what this process skips would not be recorded.
        contenders = {"recipe": run.stepper(recipe), "variant": run.stepper(variant)}
        timings = interleave(contenders, rounds=run.rounds, calls=run.calls)
    return timings["recipe"], timings["variant"]


def scaling(run: Run) -> dict[str, Any]:
    """Measure steps at several batch sizes and resolutions, or on a CPU at one of each with --short."""
    count = 1 if run.short and not run.on_gpu else 3
    batches = (256, 64, 32) if run.on_gpu else (8, 4, 32)
    rows: dict[str, list[dict[str, Any]]] = {"batch": [], "resolution": []}
    # Saved after each row, because compilation may take the time of the last one.
    run.results.content["scaling"] = rows
    for batch, size in list(zip(batches, (288, 384, 512), strict=True))[:count]:
        for name, recipe in (
            ("batch", with_changes(run.recipe, "train", batch_size=batch)),
            ("resolution", with_changes(run.recipe, "data", image_size=size)),
        ):
            pairs, side = recipe.train.batch_size, recipe.data.image_size
            tokens = (side // (recipe.backbone.patch_size or 16)) ** 2
            made = run.time({f"{pairs} pairs, {side} pixels": partial(run.stepper, recipe)})
            for timing in made.values():
                rows[name].append({"batch": pairs, "tokens": tokens, **timing.result(pairs)})
            run.results.save()
    return rows


# The most important sections come first, because time may run out.
SECTIONS = {f.__name__: f for f in (training, end_to_end, steps, parts, switches, graphs, scaling)}


def read_recipe(path: str, overrides: list[str]) -> Recipe:
    """Load the first backbone of a recipe, with random weights and one micro-batch per step."""
    first = backbone_recipes(load_recipe(path, ["train.accumulate=1", "data.source=", *overrides]))[0]
    return with_changes(first, "backbone", weights="random")


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("step", __doc__)
    parser.add_argument("recipe", metavar="RECIPE", help="recipe file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe keys to override")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(SECTIONS),
        default=list(SECTIONS),
        metavar="SECTION",
        help="sections to measure (default: all)",
    )
    args = parser.parse_args(arguments)
    recipe = read_recipe(args.recipe, [*args.overrides, f"device={args.device}"])
    results = Results("step", args, recipe=to_dict(recipe), threads=torch.get_num_threads())
    with distributed.start(recipe.device) as world:
        run = Run(recipe, world, results, short=args.short)
        for name in args.only:
            results.record(name, partial(SECTIONS[name], run))
    results.finish()


if __name__ == "__main__":
    run_command(main)
