"""Run the kernels of a training step once, for NVIDIA's profiler ncu to read the hardware counters.

    ncu --clock-control none --profile-from-start off python -m benchmarks.counters

Only the kernels of one step of the fused objective and of one pass through a single block of the encoder are
profiled, because ncu repeats each of them several times. All blocks have the same kernels.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.kernels import PAPER, Contender, random_tokens
from benchmarks.measure import run_command
from fasttrain.backbone_trainer import BackboneTrainer
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.recipe import recipe_from_dict


def main() -> None:
    if not torch.cuda.is_available():
        raise InputError(
            "no GPU is available, but hardware counters need one. Use a machine with an NVIDIA GPU"
        )
    device = torch.device("cuda", 0)
    frozen, fused = random_tokens(PAPER, device), Contender("fused", PAPER, device)
    recipe = recipe_from_dict(
        {
            "device": "cuda",
            "backbone": {"name": "dino", "depth": 1},
            "encoder": {"compile": "none"},  # Compiling under ncu takes long.
            "train": {"batch_size": PAPER.batch},
        }
    )
    trainer = BackboneTrainer(recipe, World.single(device))
    frames = torch.randn(2, PAPER.batch, 3, 224, 224, device=device, dtype=trainer.dtype)
    encode = partial(trainer.runtime.training_views, frames, trainer.asymmetric_positions(0))
    for profiled in (False, True):
        torch.cuda.synchronize()
        if profiled:
            torch.cuda.profiler.start()
        fused.step(frozen)
        encode()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    run_command(main)
