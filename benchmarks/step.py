"""Compare a training step with the published implementation and with the limits of the hardware.

    python -m benchmarks.step [--short] RECIPE [KEY=VALUE ...]

The sections are:

    steps         a step of fasttrain and of the published implementation
    parts         the encoder, the head with the losses, and the optimiser separately
    end_to_end    training with data
    switches      variants of the encoder settings
    scaling       several batch sizes and resolutions

Weights are random, since they do not affect the speed. On a CPU, only the ratios are meaningful, and a
smaller ViT keeps the run short:

    python -m benchmarks.step recipes/dino.yaml backbone.embed_dim=192 backbone.depth=4 \\
        train.batch_size=16 encoder.compile=default
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable
from contextlib import closing
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baseline import BaselineStep
from benchmarks.measure import (
    WARM_UPS,
    Results,
    Timing,
    command_line,
    copy_ceiling,
    interleave,
    matrix_ceiling,
    run_command,
    speedup,
    synchronize,
)
from fasttrain import distributed
from fasttrain.backbone_trainer import BackboneTrainer, backbone_recipes, backbone_settings
from fasttrain.backbones import Backbone, load_backbone
from fasttrain.distributed import World
from fasttrain.recipe import Recipe, load_recipe, to_dict

Switches = dict[str, dict[str, Any]]
SWITCHES: Switches = {"as it is": {}, "not compiled": {"compile": "none"}, "fp8": {"precision": "fp8"}}
# Not measured with --short, because they take long to compile.
LONG_SWITCHES: Switches = {
    "three passes": {"batch_views": False},
    "weights cast at every step": {"cast_weights": False},
    "compiled, max-autotune": {"compile": "max-autotune"},
}
GPU_SWITCHES: Switches = {
    # PyTorch's default choice between these two depends on its version and on the GPU.
    "not compiled, cuDNN attention": {"compile": "none", "attention": "cudnn"},
    "not compiled, flash attention": {"compile": "none", "attention": "flash"},
    # CUDA graphs come last, because a failed capture can make later measurements fail.
    "CUDA graph": {"cuda_graph": True},
    "CUDA graph, fp8": {"cuda_graph": True, "precision": "fp8"},
}
# Not measured on a GPU, where all pairs are processed at once by default.
CPU_SWITCHES: Switches = {
    "fused attention": {"attention": "flash"},
    "all pairs at once": {"chunk": 1_000_000},
}
Step = Callable[[], Any]


class Run:
    """What all sections share: the recipe, the device, the results and the number of rounds."""

    def __init__(self, recipe: Recipe, world: World, results: Results, *, short: bool) -> None:
        self.recipe, self.world, self.results, self.short = recipe, world, results, short
        self.device, self.pairs = world.device, recipe.train.batch_size
        self.on_gpu = self.device.type == "cuda"
        self.rounds = 3 if short else 7

    def frames(self, recipe: Recipe) -> Tensor:
        size = recipe.data.image_size
        dtype = recipe.train.dtype if self.on_gpu else torch.float32
        # Generate on the CPU, because a failed capture may leave the generator of the GPU unusable.
        return torch.randn(2, recipe.train.batch_size, 3, size, size).to(self.device, dtype)

    def trainer(self, recipe: Recipe) -> BackboneTrainer:
        """Create the trainer of a backbone and warm it up."""
        encoder = copy.deepcopy(random_encoder(tuple(backbone_settings(recipe).items())))
        trainer = BackboneTrainer(recipe, self.world, encoder)
        trainer.warm_up()
        return trainer

    def stepper(self, recipe: Recipe) -> Step:
        """Return a training step on frames that are already on the device."""
        return partial(take_step, self.trainer(recipe), self.frames(recipe))

    def time(self, makers: dict[str, Callable[[], Step]]) -> dict[str, Timing]:
        """Time the contenders, interleaved. Those that cannot be created or called are skipped."""

        def called_once(make: Callable[[], Step]) -> Step:
            contender = make()
            contender()
            synchronize()
            return contender

        made = {name: self.results.attempt(name, partial(called_once, make)) for name, make in makers.items()}
        contenders = {name: contender for name, contender in made.items() if contender is not None}
        calls = 10 if self.on_gpu else 1
        return interleave(contenders, rounds=self.rounds, calls=calls)


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


def steps(run: Run) -> dict[str, Any]:
    """Measure a step of fasttrain, and of the baseline at the same precision and, on a GPU, in fp16."""
    recipe, frames = run.recipe, run.frames(run.recipe)
    makers: dict[str, Callable[[], Step]] = {
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
    frozen_B3ND = trainer.runtime.three_views(frames, positions).clone()

    def head_and_loss() -> None:
        with torch.autocast(run.device.type, trainer.dtype, enabled=trainer.dtype != torch.float32):
            losses = trainer.objective(frozen_B3ND, trainer.grid, False)
        losses.loss.backward()

    timings = run.time(
        {
            "encoder": lambda: lambda: trainer.runtime.three_views(frames, positions),
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
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        trainer.encoder.three_views(frames[:, :1].to(positions.dtype), positions)
    return float(counter.get_total_flops())


def switches(run: Run) -> dict[str, Any]:
    """Measure the recipe (`as it is`), and variants in which encoder settings are changed."""
    choices = {**SWITCHES, **({} if run.short else LONG_SWITCHES)}
    choices |= GPU_SWITCHES if run.on_gpu else CPU_SWITCHES
    recipes = {name: with_changes(run.recipe, "encoder", **choice) for name, choice in choices.items()}
    timings = run.time({name: partial(run.stepper, recipe) for name, recipe in recipes.items()})
    return {
        name: {**timing.result(run.pairs), "times_as_it_is": speedup(timings["as it is"], timing)}
        for name, timing in timings.items()
    }


def scaling(run: Run) -> dict[str, Any]:
    """Measure steps at several batch sizes and resolutions, or at one of each with --short."""
    count = 1 if run.short else 3
    batches = (256, 64, 32) if run.on_gpu else (8, 4, 32)
    changes = [("batch", "train", {"batch_size": pairs}) for pairs in batches[:count]]
    changes += [("resolution", "data", {"image_size": size}) for size in (288, 384, 512)[:count]]
    rows: dict[str, list[dict[str, Any]]] = {"batch": [], "resolution": []}
    for name, section, values in changes:
        recipe = with_changes(run.recipe, section, **values)
        pairs, size = recipe.train.batch_size, recipe.data.image_size
        tokens = (size // (recipe.backbone.patch_size or 16)) ** 2
        for timing in run.time({f"{pairs} pairs, {size} pixels": partial(run.stepper, recipe)}).values():
            rows[name].append({"batch": pairs, "tokens": tokens, **timing.result(pairs)})
    return rows


def end_to_end(run: Run) -> dict[str, Any]:
    """Measure training with data: fasttrain on a packed set, the baseline on frame folders with PIL.

    Contenders run one after the other, not interleaved. Otherwise the workers of one contender would work
    during the turn of another.
    """
    # Imported here because it needs DALI and PyAV.
    from benchmarks import loaders

    calls = 24 if run.on_gpu else 6
    batches = run.rounds * calls + WARM_UPS
    with tempfile.TemporaryDirectory() as folder:
        sources = loaders.prepare(Path(folder), None, 8)
        packed = with_changes(run.recipe, "data", source=sources["packed"], pairs_per_video=run.pairs)
        resident, trainer = run.frames(run.recipe), run.trainer(run.recipe)
        baseline = BaselineStep(run.recipe, run.device)
        ours = loaders.our_batches(packed, run.world, batches)
        published = loaders.published_pair
        theirs = loaders.worker_batches(sources["frames"], published, run.pairs, batches, run.device)
        contenders: dict[str, Step] = {
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
        "timings": rows,
        "speedup": {"ours over baseline": speedup(timings["baseline"], timings["ours"])},
        "data_overhead": rows["ours"]["ms"] / rows["ours, resident"]["ms"] - 1,
    }


# The most important sections come first, because time may run out.
SECTIONS = {f.__name__: f for f in (steps, parts, end_to_end, switches, scaling)}


def read_recipe(path: str, overrides: list[str]) -> Recipe:
    """Load the first backbone of a recipe, with random weights and one micro-batch per step."""
    first = backbone_recipes(load_recipe(path, ["train.accumulate=1", *overrides]))[0]
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
