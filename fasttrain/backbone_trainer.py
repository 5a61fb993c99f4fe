"""One backbone in training: its frozen encoder, the head that learns, and all that trains it.

`trainer` feeds frame pairs to one student or many; each owns one run folder. Nothing here reads data, so that
benchmarks can drive a student with frames that are on the device already.

Shape suffixes: B pairs, N tokens, D channels.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.backbones import Backbone, load_backbone
from fasttrain.checkpoint import save_checkpoint
from fasttrain.cuda_graph import CapturedCall
from fasttrain.distributed import World
from fasttrain.encoder_runtime import EncoderRuntime
from fasttrain.errors import InputError
from fasttrain.loggers import Meter
from fasttrain.objective import CosettleObjective, asymmetric_offset
from fasttrain.optimizer import build_optimizer, portable_state, record_update, set_lr
from fasttrain.profiling import RECORDED_PASS, part
from fasttrain.projection import Projection
from fasttrain.recipe import Recipe, to_dict
from fasttrain.video_encoder import projection_metadata

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class BackboneTrainer:
    """One frozen backbone, its trained head, optimiser, loss scale and meters."""

    def __init__(self, recipe: Recipe, world: World, encoder: Backbone | None = None) -> None:
        """`encoder`: the recipe's backbone as `load_backbone` gives it, where that is at hand; taken over."""
        self.recipe, self.world = recipe, world
        self.name = recipe.backbone.name
        self.folder = Path(recipe.output)
        self.dtype = DTYPES[recipe.train.precision]
        self.backbone_settings = backbone_settings(recipe)
        self.encoder = load_on_all(world, self.backbone_settings) if encoder is None else encoder
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
        self.meter = Meter(world.device)
        self.diagnostics: list[Tensor] = []
        self._encode: Callable[[Tensor, Tensor], Tensor] = self.runtime.three_views
        self._pass: CapturedCall | None = None
        self._recorded_update: Callable[[], Any] | None = None

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
        positions = self._positions(step=0)
        with self.world.no_sync(self.objective):
            self._forward_backward(frames, positions, diagnostics=True)
            if self._compiles_objective or device.type == "cuda":
                # Log steps and the others are two programs, of the compiler or of Triton.
                self._forward_backward(frames, positions)
            if uses_graph and self.world.size == 1 and not self.scaler.is_enabled():
                self._pass = CapturedCall(self._forward_backward, (frames, positions))
                if recipe.optimizer.name == "adamw":
                    self._recorded_update = record_update(self.optimizer)
            elif uses_graph:
                # The gradients' average over processes and the loss scale stay outside.
                self._encode = CapturedCall(self.runtime.three_views, (frames, positions))
        self.optimizer.zero_grad(set_to_none=False)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    def accumulate(self, frames: Tensor, step: int, *, last: bool, diagnostics: bool) -> None:
        """Forward and backward pass of one micro-batch, frames (2, B, 3, S, S).

        Processes average their gradients in the `last` pass of a step. Diagnostics take the plain way, for
        they need the whole cycle.
        """
        positions = self._positions(step)
        with nullcontext() if last else self.world.no_sync(self.objective):
            if self._pass is not None and not diagnostics:
                with part(RECORDED_PASS):
                    losses = self._pass(frames, positions)
            else:
                losses = self._forward_backward(frames, positions, diagnostics)
        with part("meters"):
            self.meter.add(step, losses.loss, losses.cycle, losses.separability)
            if diagnostics:
                self.diagnostics.append(torch.stack((losses.cycle_accuracy, losses.identity_similarity)))

    def _positions(self, step: int) -> Tensor:
        ratio = self.recipe.objective.asymmetric_ratio
        count = self.encoder.asymmetric_range(ratio)
        return self.encoder.asymmetric_positions(
            ratio=ratio, offset=asymmetric_offset(self.recipe.seed, step, count)
        )

    def _forward_backward(self, frames: Tensor, positions: Tensor, diagnostics: bool = False) -> Any:
        with part("encoder"):
            frozen_B3ND = self._encode(frames, positions)
        # A cast kept from one pass to the next would be frozen into a recorded graph.
        autocast = torch.autocast(
            self.world.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False
        )
        with part("head and loss"), autocast:
            losses = self.objective(frozen_B3ND, self.grid, diagnostics)
        with part("backward"):
            self.scaler.scale(losses.loss / self.recipe.train.accumulate).backward()
        # Without history, which in a recording would outlive the pass.
        return losses._make(value if value is None else value.detach() for value in losses)

    def update(self, lr: float) -> None:
        """One optimiser step."""
        with part("optimiser"):
            set_lr(self.optimizer, lr)
            if self._recorded_update is not None:
                self._recorded_update()
                return
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=False)

    def read_meters(self) -> tuple[dict[str, float], int | None]:
        """Readings since the last call and the first step whose loss was not finite; waits for the device."""
        readings, bad_step = self.meter.read(self.world)
        accuracy, similarity = self.world.mean(torch.stack(self.diagnostics).mean(dim=0)).tolist()
        self.diagnostics.clear()
        return {**readings, "cycle_accuracy": accuracy, "identity_similarity": similarity}, bad_step

    def state(self) -> dict[str, Any]:
        return {
            "projection": self.projection.state_dict(),
            "optimizer": portable_state(self.optimizer),
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
        self.projection.save(self.folder / "projection.safetensors", metadata)
        # Last: a run that is cut off in between takes the steps again, and with them the projection.
        state = {"step": step, **facts, **self.facts, **self.state()}
        save_checkpoint(self.folder / "checkpoints", step, state)


def backbone_settings(recipe: Recipe) -> dict[str, Any]:
    """The arguments of `load_backbone` for a recipe of one backbone."""
    return {
        **dataclasses.asdict(recipe.backbone),
        "image_size": recipe.data.image_size,
        "seed": recipe.seed,
    }


def load_on_all(world: World, settings: dict[str, Any]) -> Backbone:
    """The encoder; InputError on every process where one of them cannot have it, so that they stay alike."""
    encoder, reason = None, None
    try:
        encoder = load_backbone(**settings)
    except InputError as error:
        reason = str(error)
    reasons = [told for told in world.gather(reason) if told is not None]
    if encoder is None or reasons:
        raise InputError(reasons[0])
    return encoder


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
