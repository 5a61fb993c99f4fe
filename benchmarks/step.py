"""How fast a recipe trains here, part by part, beside the ceilings and the published implementation.

    python -m benchmarks.step RECIPE [key=value ...]   write results/step-{cpu,cuda}.json
    python -m benchmarks.step --short RECIPE           fewer rounds and cases
    python -m benchmarks.step --plot FILE.json         draw the plot

Weights are `random`: they do not matter here. On a CPU a small ViT stands in for the recipe's backbone
(SMALL), and what counts are the ratios.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
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
    copy_ceiling,
    interleave,
    matrix_ceiling,
    parser,
    plot_bars,
    speedup,
    synchronize,
    with_changes,
)
from fasttrain import distributed
from fasttrain.backbone_trainer import BackboneTrainer, backbone_recipes, backbone_settings
from fasttrain.backbones import Backbone, load_backbone
from fasttrain.distributed import World
from fasttrain.recipe import Recipe, load_recipe

SMALL = (
    "backbone.name=dino",
    "backbone.embed_dim=192",
    "backbone.depth=4",
    "train.batch_size=16",
    # What `auto` means on a GPU.
    "encoder.compile=default",
)
KINETICS_VIDEOS, KINETICS_EPOCHS = 240_000, 5
SWITCHES: dict[str, dict[str, Any]] = {
    "not compiled": {"compile": "none"},
    "fp8": {"precision": "fp8"},
    "three passes": {"batch_views": False},
    "weights cast at every step": {"cast_weights": False},
}
GPU_SWITCHES: dict[str, dict[str, Any]] = {
    "compiled, max-autotune": {"compile": "max-autotune"},
    # Which of the two PyTorch takes by itself differs with its version and the chip.
    "not compiled, cuDNN attention": {"compile": "none", "attention": "cudnn"},
    "not compiled, flash attention": {"compile": "none", "attention": "flash"},
    # Last: a recording that fails may take others with it.
    "CUDA graph": {"cuda_graph": True},
    "CUDA graph, fp8": {"cuda_graph": True, "precision": "fp8"},
}
# On a GPU all pairs go at once as it is.
CPU_SWITCHES: dict[str, dict[str, Any]] = {
    "fused attention": {"attention": "flash"},
    "all pairs at once": {"chunk": 1_000_000},
}
# Half a minute of compilation each on a GPU: left out of the short form.
LONG_ON_GPU = ("three passes", "weights cast at every step", "compiled, max-autotune")


class Run:
    """One recipe on one device, with how often things are measured."""

    def __init__(self, recipe: Recipe, world: World, results: Results, *, short: bool) -> None:
        self.recipe, self.world, self.results, self.short = recipe, world, results, short
        self.device, self.pairs = world.device, recipe.train.batch_size
        self.rounds = 3 if short else 7
        self.calls = 10 if self.device.type == "cuda" else 1

    def frames(self, recipe: Recipe) -> Tensor:
        size = recipe.data.image_size
        dtype = recipe.train.dtype if self.device.type == "cuda" else torch.float32
        # Drawn on the CPU: a recording that failed may leave the GPU's generator unusable.
        return torch.randn(2, recipe.train.batch_size, 3, size, size).to(self.device, dtype)

    def trainer(self, recipe: Recipe) -> BackboneTrainer:
        """A backbone's trainer, ready to step."""
        encoder = copy.deepcopy(random_encoder(tuple(backbone_settings(recipe).items())))
        trainer = BackboneTrainer(recipe, self.world, encoder)
        trainer.warm_up()
        return trainer

    def stepper(self, recipe: Recipe) -> Callable[[], None]:
        """One training step on resident frames."""
        return partial(take_step, self.trainer(recipe), self.frames(recipe))

    def time(self, makers: dict[str, Callable[[], Callable[[], Any]]]) -> dict[str, Timing]:
        """Timings of the contenders that can be made and called, in turns."""
        made = {name: self.results.attempt(name, partial(self._called_once, makers[name])) for name in makers}
        contenders = {name: contender for name, contender in made.items() if contender is not None}
        return interleave(contenders, rounds=self.rounds, calls=self.calls, device=self.device)

    def _called_once(self, make: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
        contender = make()
        contender()
        synchronize(self.device)
        return contender


# Drawing the random weights of a ViT-B takes seconds, copying them does not.
@lru_cache(maxsize=2)
def random_encoder(settings: tuple[tuple[str, Any], ...]) -> Backbone:
    return load_backbone(**dict(settings))


def take_step(trainer: BackboneTrainer, frames: Tensor) -> None:
    """Forward and backward pass and optimiser; no log step."""
    trainer.forward_backward(frames, 1, last=True, diagnostics=False)
    trainer.update(1e-4)


def steps(run: Run) -> dict[str, Any]:
    """A training step on resident frames: ours, and the published implementation at equal precision."""
    recipe, dtype = run.recipe, run.recipe.train.dtype

    def baseline(dtype: torch.dtype, **options: Any) -> Callable[[], Any]:
        return partial(BaselineStep(recipe, device=run.device, dtype=dtype, **options), run.frames(recipe))

    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        "ours": lambda: run.stepper(recipe),
        "ours, not compiled": lambda: run.stepper(with_changes(recipe, "encoder", compile="none")),
        "baseline": lambda: baseline(dtype),
        "baseline, fused attention": lambda: baseline(dtype, fused_attention=True),
    }
    if run.device.type == "cuda":
        makers["baseline, fp16"] = lambda: baseline(torch.float16)
    timings = run.time(makers)
    return {
        "precision": recipe.train.precision,
        "timings": {name: timing.result(run.pairs) for name, timing in timings.items()},
        "speedup": {
            f"{name} over {other}": speedup(timings[other], timings[name])
            for name in timings
            for other in timings
            if name.startswith("ours") and other.startswith("baseline")
        },
    }


def parts(run: Run) -> dict[str, Any]:
    """Encoder, head with losses (forward and backward) and optimiser, each alone, against its ceiling."""
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
    # Frozen tokens read in the forward and in the backward pass; the head's products stay on chip at best.
    moved_gb = 2 * frozen_B3ND.numel() * frozen_B3ND.element_size() / 1e9
    rate = moved_gb / result["head and loss"]["ms"] * 1e3
    copy_rate = copy_ceiling(run.device) / 1e9
    result["head and loss"] |= {"copy_gb_per_second": copy_rate, "copy_share": rate / copy_rate}
    return result


def encoder_flops(trainer: BackboneTrainer, frames: Tensor, positions: Tensor) -> float:
    """Multiplications and additions of the three views of one pair, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        trainer.encoder.three_views(frames[:, :1].to(positions.dtype), positions)
    return float(counter.get_total_flops())


def switches(run: Run) -> dict[str, Any]:
    """Each switch of the encoder changed alone, against the recipe as it is."""
    on_gpu = run.device.type == "cuda"
    choices = {"as it is": {}, **SWITCHES, **(GPU_SWITCHES if on_gpu else CPU_SWITCHES)}
    recipes = {name: with_changes(run.recipe, "encoder", **choice) for name, choice in choices.items()}
    for name in LONG_ON_GPU if run.short and on_gpu else ():
        del recipes[name]
    timings = run.time({name: partial(run.stepper, recipe) for name, recipe in recipes.items()})
    return {
        name: {**timing.result(run.pairs), "times_as_it_is": speedup(timings["as it is"], timing)}
        for name, timing in timings.items()
    }


def scaling(run: Run) -> dict[str, Any]:
    """A step over batch and resolution (tokens), one of each in the short form."""
    batches = (256, 64, 32) if run.device.type == "cuda" else (8, 4, 32)
    count = 1 if run.short else 3
    rows: dict[str, list[dict[str, Any]]] = {"batch": [], "resolution": []}

    def add(section: str, recipe: Recipe) -> None:
        pairs, size = recipe.train.batch_size, recipe.data.image_size
        tokens = (size // (recipe.backbone.patch_size or 16)) ** 2
        for timing in run.time({f"{pairs} pairs, {size} pixels": partial(run.stepper, recipe)}).values():
            rows[section].append({"batch": pairs, "tokens": tokens, **timing.result(pairs)})

    for batch in batches[:count]:
        add("batch", with_changes(run.recipe, "train", batch_size=batch))
    for size in (288, 384, 512)[:count]:
        add("resolution", with_changes(run.recipe, "data", image_size=size))
    return rows


def end_to_end(run: Run) -> dict[str, Any]:
    """With data: ours from packed JPEG, the baseline through PIL (four frames), of the same videos."""
    # Needs DALI and PyAV.
    from benchmarks import loaders

    count = 6 if run.short else 24
    trainer = run.trainer(run.recipe)
    baseline = BaselineStep(run.recipe, device=run.device, dtype=run.recipe.train.dtype)
    resident = run.frames(run.recipe)
    with tempfile.TemporaryDirectory() as folder:
        sources = loaders.prepare(Path(folder), None, 8)
        total = count * (run.rounds + WARM_UPS)
        ours = loaders.our_pairs(run.recipe, sources["packed"], run.world, total)
        published = loaders.Pairs(sources["frames"], loaders.published_pair, total * run.pairs)
        theirs = loaders.workers(published, run.pairs, len(os.sched_getaffinity(0)), run.device)

        def many(step: Callable[[], Any]) -> Callable[[], Any]:
            return lambda: [step() for _ in range(count)]

        contenders = {
            "ours": many(lambda: take_step(trainer, next(ours).frames)),
            "baseline": many(lambda: baseline(next(theirs).transpose(0, 1).contiguous())),
            "ours, resident": many(lambda: take_step(trainer, resident)),
        }
        try:
            timings = interleave(contenders, rounds=run.rounds, calls=1, device=run.device)
        finally:
            ours.close()
    rows = {name: timing.result(run.pairs, calls=count) for name, timing in timings.items()}
    return {
        "timings": rows,
        "speedup": {"ours over baseline": speedup(timings["baseline"], timings["ours"])},
        "data_overhead": rows["ours"]["ms"] / rows["ours, resident"]["ms"] - 1,
        "kinetics400_hours": KINETICS_EPOCHS * KINETICS_VIDEOS / rows["ours"]["pairs_per_second"] / 3600,
    }


# The most wanted first: time may run out.
SECTIONS = {f.__name__: f for f in (steps, parts, end_to_end, switches, scaling)}


def read_recipe(path: str, overrides: list[str], *, small: bool) -> Recipe:
    """The first backbone of a recipe with random weights, one pass a step; on a CPU the stand-in."""
    fixed = ["backbone.weights=random", "train.accumulate=1"]
    first = backbone_recipes(load_recipe(path, [*fixed, *(SMALL if small else ()), *overrides]))[0]
    return with_changes(first, "backbone", weights="random")


def plot(path: Path) -> Path:
    content = json.loads(path.read_text(encoding="utf-8"))
    backbone, grown = content["backbone"], content.get("scaling", {})
    panels = {
        "pairs/s on resident frames": content.get("steps", {}).get("timings", {}),
        "pairs/s with data": content.get("end_to_end", {}).get("timings", {}),
        "pairs/s with one switch of the encoder changed": content.get("switches", {}),
        "pairs/s by pairs in a batch": {str(row["batch"]): row for row in grown.get("batch", ())},
        "pairs/s by tokens of a frame": {str(row["tokens"]): row for row in grown.get("resolution", ())},
    }
    title = f"{content['precision']}, width {backbone['embed_dim'] or 768}, depth {backbone['depth'] or 12}"
    return plot_bars(path, title, panels, "pairs_per_second")


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("recipe", nargs="?", default="recipes/dinov2.yaml")
    options.add_argument("overrides", nargs="*", metavar="key=value")
    options.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    given = options.parse_args(arguments)
    if given.plot:
        print(plot(given.plot))
        return
    overrides = [*given.overrides, f"device={given.device}"]
    recipe = read_recipe(given.recipe, overrides, small=given.device == "cpu")
    results = Results(
        "step",
        given,
        recipe=given.recipe,
        precision=recipe.train.precision,
        backbone=dataclasses.asdict(recipe.backbone),
        batch_size=recipe.train.batch_size,
        image_size=recipe.data.image_size,
        threads=torch.get_num_threads(),
    )
    with distributed.start(recipe.device) as world:
        run = Run(recipe, world, results, short=given.short)
        for name in given.only:
            results.record(name, partial(SECTIONS[name], run))
    results.finish()


if __name__ == "__main__":
    main()
