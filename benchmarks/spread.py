"""One and several backbones on several processes; started under torchrun by throughput.py.

One backbone: data parallel, every process with pairs of its own. As many backbones as processes, two ways.
Data parallel: every process holds all backbones and takes its share of the pairs; the heads' gradients are
averaged. Spread: every process holds its own backbones and takes all pairs, which are gathered from the
processes that decoded them. Both do the same work a step, and take the same steps.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.measure import interleave
from benchmarks.record import write_results
from benchmarks.step import read_recipe, stepper
from fasttrain import distributed
from fasttrain.backbone_trainer import DTYPES, BackboneTrainer
from fasttrain.distributed import World
from fasttrain.recipe import Recipe


def gather_pairs(frames: Tensor, size: int) -> Tensor:
    """The frames (2, B, ...) of all processes as (2, size x B, ...)."""
    parts = [torch.empty_like(frames) for _ in range(size)]
    dist.all_gather(parts, frames)
    return torch.cat(parts, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    recipe = read_recipe(arguments.recipe, arguments.overrides, small=not torch.cuda.is_available())
    with distributed.start(recipe.device) as world:
        size, batch = recipe.data.image_size, recipe.train.batch_size
        frames = torch.randn(2, batch, 3, size, size, device=world.device)
        if world.device.type == "cuda":
            # As the loader delivers them: float32 would be twice the bytes to gather.
            frames = frames.to(DTYPES[recipe.train.precision])
        steps = [stepper(warm_student(recipe, world), frames) for _ in range(world.size)]
        contenders: dict[str, Callable[[], Any]] = {"one backbone, data parallel": steps[0]}
        if world.size > 1:
            all_pairs = dataclasses.replace(recipe.train, batch_size=batch * world.size)
            own = warm_student(
                dataclasses.replace(recipe, train=all_pairs), dataclasses.replace(world, size=1)
            )
            contenders["data parallel"] = lambda: [step() for step in steps]
            contenders["backbones spread"] = lambda: stepper(own, gather_pairs(frames, world.size))()
        # The same calls in the same order on all processes: they meet in each.
        timings = interleave(contenders, rounds=5, calls=1, device=world.device)
        if world.is_main:
            pairs = batch * world.size
            rows = {name: timing.result(pairs) for name, timing in timings.items()}
            write_results(arguments.out, {"processes": world.size, "backbones": world.size, "timings": rows})


def warm_student(recipe: Recipe, world: World) -> BackboneTrainer:
    student = BackboneTrainer(recipe, world)
    student.warm_up()
    return student


if __name__ == "__main__":
    main()
