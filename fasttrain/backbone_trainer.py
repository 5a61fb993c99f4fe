"""One backbone in training: its frozen encoder, the head that learns, and all that trains it.

`trainer` feeds frame pairs to one `BackboneTrainer` or to many; each owns one run folder. Nothing here reads
data, so that benchmarks can drive it with frames that are on the device already.

Shape suffixes: B pairs, N tokens, D channels, P passes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.backbones import Backbone, load_backbone
from fasttrain.checkpoint import save_checkpoint
from fasttrain.cuda_graph import CapturedCall
from fasttrain.distributed import World
from fasttrain.encoder_runtime import EncoderRuntime
from fasttrain.errors import InputError
from fasttrain.objective import CosettleLoss, CosettleObjective
from fasttrain.optimizer import build_optimizer
from fasttrain.profiling import RECORDED_PASS, span
from fasttrain.projection import Projection
from fasttrain.recipe import Recipe, to_dict
from fasttrain.video_encoder import PROJECTION_FILE, projection_metadata


class Meter:
    """The scalars of the passes since the last reading, kept on the device: adding never waits for it."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._losses: list[Tensor] = []
        self._diagnostics: list[Tensor] = []

    def add(self, step: int, losses: CosettleLoss) -> None:
        """Take in the detached losses of one forward pass, and its diagnostics where it has them."""
        self._steps.append(step)
        # A copy: the next replay of a CUDA graph overwrites its outputs.
        self._losses.append(torch.stack((losses.loss, losses.cycle, losses.separability)))
        if losses.cycle_accuracy is not None:
            self._diagnostics.append(torch.stack((losses.cycle_accuracy, losses.identity_similarity)))

    def read(self, world: World) -> tuple[dict[str, float], int | None]:
        """Means since the last reading over all processes, and the first step of a non-finite loss."""
        losses_P3 = torch.stack(self._losses).double()
        loss, cycle, separability = world.mean(losses_P3.mean(dim=0)).tolist()
        readings = {"loss": loss, "cycle": cycle, "separability": separability}
        if self._diagnostics:
            accuracy, similarity = world.mean(torch.stack(self._diagnostics).mean(dim=0)).tolist()
            readings |= {"cycle_accuracy": accuracy, "identity_similarity": similarity}
        finite = losses_P3[:, 0].isfinite().tolist()
        bad_steps = [step for step, good in zip(self._steps, finite, strict=True) if not good]
        for values in (self._steps, self._losses, self._diagnostics):
            values.clear()
        bad_steps = [step for steps in world.gather(bad_steps[:1]) for step in steps]
        return readings, min(bad_steps, default=None)


class BackboneTrainer:
    """One frozen backbone, its trained head, optimiser, loss scale and meters."""

    def __init__(self, recipe: Recipe, world: World, encoder: Backbone | None = None) -> None:
        """`encoder`: the recipe's backbone, if it has been loaded already; it is moved and cast in place."""
        self.recipe, self.world = recipe, world
        self.name = recipe.backbone.name
        self.folder = Path(recipe.output)
        self.dtype = recipe.train.dtype
        self.backbone_settings = backbone_settings(recipe)
        self.encoder: Backbone = encoder or world.run_on_all(lambda: load_backbone(**self.backbone_settings))
        # What a resumed run must find unchanged: a file of weights may be another under the same name.
        self.facts = {"weights_hash": self.encoder.weights_hash}
        self.grid = self.encoder.grid(recipe.data.image_size, recipe.data.image_size)
        if recipe.objective.window > min(self.grid):
            raise InputError(
                f"objective.window: {recipe.objective.window} does not fit on the {self.grid[0]} x "
                f"{self.grid[1]} tokens of {self.name}; expected at most {min(self.grid)}"
            )
        self.runtime = EncoderRuntime(self.encoder, recipe.encoder, dtype=self.dtype, device=world.device)
        self.projection = Projection(
            self.encoder.embed_dim,
            head=recipe.projection.head,
            init=self.encoder.projection_init,
            seed=recipe.seed,
        ).to(world.device)
        objective = CosettleObjective(self.projection, recipe.objective)
        # Where no fused kernel computes it, compilation fuses what surrounds the head's products.
        self._compiles_objective = self.runtime.compiled and (
            world.device.type == "cpu" or recipe.objective.backend == "eager"
        )
        if self._compiles_objective:
            objective.compile(dynamic=False)
        self.objective = world.wrap(objective)
        self.optimizer = build_optimizer(recipe.optimizer, self.projection)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.dtype == torch.float16)
        self.meter = Meter()
        self._encode: Callable[[Tensor, Tensor], Tensor] = self.runtime.three_views
        self._recorded_pass: CapturedCall | None = None

    def warm_up(self) -> float:
        """Compile and record what the recipe wants, ahead of the first step; returns the seconds it took.

        Weights, optimiser, meters and the global random state are left as they were, gradients at zero.
        """
        recipe, device = self.recipe, self.world.device
        uses_graph = recipe.encoder.cuda_graph and device.type == "cuda"
        if not (self.runtime.compiled or uses_graph):
            return 0.0
        start = time.perf_counter()
        size = recipe.data.image_size
        frames = torch.zeros(2, recipe.train.batch_size, 3, size, size, device=device, dtype=self.dtype)
        positions = self.asymmetric_positions(step=0)
        with self.world.no_sync(self.objective):
            self._run_pass(frames, positions, diagnostics=True)
            if self._compiles_objective or device.type == "cuda":
                # Log steps and the others are two programs, of the compiler or of Triton.
                self._run_pass(frames, positions)
            if uses_graph and self.world.size == 1 and not self.scaler.is_enabled():
                self._recorded_pass = CapturedCall(self._run_pass, (frames, positions))
            elif uses_graph:
                # The gradients' average over processes and the loss scale stay outside.
                self._encode = CapturedCall(self.runtime.three_views, (frames, positions))
        self.optimizer.zero_grad(set_to_none=False)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    def forward_backward(self, frames: Tensor, step: int, *, last: bool, diagnostics: bool) -> None:
        """Forward and backward pass of one micro-batch, frames (2, B, 3, S, S).

        Processes average their gradients in the `last` pass of a step. Diagnostics are never recorded in the
        CUDA graph, for they need the whole cycle.
        """
        positions = self.asymmetric_positions(step)
        with nullcontext() if last else self.world.no_sync(self.objective):
            if self._recorded_pass is not None and not diagnostics:
                with span(RECORDED_PASS):
                    losses = self._recorded_pass(frames, positions)
            else:
                losses = self._run_pass(frames, positions, diagnostics)
        with span("meters"):
            self.meter.add(step, losses)

    def asymmetric_positions(self, step: int) -> Tensor:
        """The asymmetric positions (N, D) of a step."""
        ratio = self.recipe.objective.asymmetric_ratio
        count = self.encoder.asymmetric_range(ratio)
        return self.encoder.asymmetric_positions(
            ratio=ratio, offset=asymmetric_offset(self.recipe.seed, step, count)
        )

    def _run_pass(self, frames: Tensor, positions: Tensor, diagnostics: bool = False) -> CosettleLoss:
        with span("encoder"):
            frozen_B3ND = self._encode(frames, positions)
        # A cast kept from one pass to the next would be frozen into a recorded graph.
        autocast = torch.autocast(
            self.world.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False
        )
        with span("head and loss"), autocast:
            losses: CosettleLoss = self.objective(frozen_B3ND, self.grid, diagnostics)
        with span("backward"):
            self.scaler.scale(losses.loss / self.recipe.train.accumulate).backward()
        # Without history, which in a recording would outlive the pass.
        return losses._make(value if value is None else value.detach() for value in losses)

    def update(self, lr: float) -> None:
        """One optimiser step."""
        with span("optimiser"):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=False)

    def state(self) -> dict[str, Any]:
        return {
            "projection": self.projection.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.projection.load_state_dict(state["projection"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def save(self, step: int, facts: dict[str, Any]) -> None:
        """Write projection and checkpoint; the main process only."""
        metadata = projection_metadata(
            self.backbone_settings, self.encoder, self.projection, to_dict(self.recipe)
        )
        self.projection.save(self.folder / PROJECTION_FILE, metadata)
        # Last: a run that is cut off in between takes the steps again, and with them the projection.
        state = {"step": step, **facts, **self.facts, **self.state()}
        save_checkpoint(self.folder / "checkpoints", step, state)


def backbone_settings(recipe: Recipe) -> dict[str, Any]:
    """The arguments of `load_backbone` for a recipe of one backbone."""
    return {**dataclasses.asdict(recipe.backbone), "image_size": recipe.data.image_size, "seed": recipe.seed}


def backbone_recipes(recipe: Recipe) -> list[Recipe]:
    """The recipe of each backbone's own run: itself, or one per entry of `backbones` in `output/NAME`."""
    if not recipe.backbones:
        return [recipe]
    return [
        dataclasses.replace(
            recipe, backbone=backbone, backbones=(), output=str(Path(recipe.output) / backbone.name)
        )
        for backbone in recipe.backbones
    ]


def asymmetric_offset(seed: int, step: int, count: int) -> tuple[int, int]:
    """Where view 3's positions are cropped in this step: (row, column), each uniform on [0, count).

    A pure function, the same on all processes and in all accumulated passes of a step, so that a step does
    not depend on how its batch is divided.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, step], dtype=np.uint64)))
    row, column = generator.integers(0, count, size=2)
    return int(row), int(column)
