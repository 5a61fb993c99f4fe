"""The training of one backbone: its frozen encoder, projection, optimiser, loss scaling and metrics.

`trainer` feeds frames to one or several `BackboneTrainer`s, each with a run folder. This module does not
read data, so that benchmarks can run it on frames that are already on the device.

Shape suffixes: B samples, T frames, V = T + 1 views, S pixels per image side, N tokens, D channels.
In `Meter`: T steps, P passes per step.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fasttrain.backbones import Backbone, load_backbone
from fasttrain.checkpoint import save_checkpoint
from fasttrain.closed_form import partly_whitened
from fasttrain.cuda_graph import CapturedCall, is_recordable, recover
from fasttrain.distributed import World
from fasttrain.encoder_runtime import EncoderRuntime
from fasttrain.errors import InputError, LocalInputError
from fasttrain.moments import Covariance
from fasttrain.objective import CosettleObjective, CosettleOutput
from fasttrain.optimizer import build_optimizer
from fasttrain.profiling import RECORDED_PASS, span
from fasttrain.projection import LAST_PROJECTION_FILE, PROJECTION_FILE, Projection
from fasttrain.recipe import Recipe, to_dict
from fasttrain.video_encoder import UNSTORED, check_backbone, earlier_settings, projection_metadata
from fasttrain.weighting import build_weighting
from fasttrain.weights import hash_state_dict

# The power of the covariance by which frozen tokens are whitened as an alternative to training.
WHITENING = 0.2


class Meter:
    """Losses and diagnostics since the last report, kept on the device so that `add` does not synchronise."""

    def __init__(self) -> None:
        self._step_indices: list[int] = []
        self._losses: list[Tensor] = []
        self._diagnostics: list[Tensor] = []
        # The result of `losses` before the run was resumed.
        self._earlier_T3 = torch.zeros(0, 3, dtype=torch.float64)

    def add(self, step_index: int, losses: CosettleOutput) -> None:
        """Record the detached losses of one forward pass, and its diagnostics if they were computed."""
        self._step_indices.append(step_index)
        # Stacking copies the values, which the next replay of a CUDA graph overwrites.
        self._losses.append(torch.stack((losses.loss, losses.cycle, losses.separability)))
        if losses.cycle_accuracy is not None:
            self._diagnostics.append(torch.stack((losses.cycle_accuracy, losses.identity_similarity)))

    def first_non_finite(self, world: World) -> int | None:
        """Return the step index of the first loss on any rank that is not finite, or None."""
        finite = torch.stack(self._losses)[:, 0].isfinite().tolist() if self._losses else []
        bad_steps = [index for index, good in zip(self._step_indices, finite, strict=True) if not good]
        return min((index for indices in world.gather(bad_steps[:1]) for index in indices), default=None)

    def losses(self, world: World) -> Tensor:
        """Return the losses (T, 3) of each step, averaged over passes and ranks, in float64 on the CPU."""
        if not self._losses:
            return self._earlier_T3
        losses_TP3 = torch.stack(self._losses).double().unflatten(0, (len(set(self._step_indices)), -1))
        return torch.cat((self._earlier_T3, world.mean(losses_TP3.mean(dim=1)).cpu()))

    def restore(self, losses_T3: Tensor) -> None:
        """Continue after an interruption with its `losses`; raise ValueError for other values."""
        if losses_T3.ndim != 2 or losses_T3.shape[1] != 3 or losses_T3.dtype != torch.float64:
            raise ValueError(f"losses have the shape {tuple(losses_T3.shape)} and dtype {losses_T3.dtype}")
        self._earlier_T3 = losses_T3

    def read(self, world: World) -> dict[str, float]:
        """Return the means over steps and ranks, and empty the meter."""
        loss, cycle, separability = self.losses(world).mean(dim=0).tolist()
        metrics = {"loss": loss, "cycle": cycle, "separability": separability}
        if self._diagnostics:
            accuracy, similarity = world.mean(torch.stack(self._diagnostics).mean(dim=0)).tolist()
            metrics |= {"cycle_accuracy": accuracy, "identity_similarity": similarity}
        self._earlier_T3 = self._earlier_T3[:0]
        for values in (self._step_indices, self._losses, self._diagnostics):
            values.clear()
        return metrics


class BackboneTrainer:
    """One frozen backbone with its projection, optimiser, loss scaler and meter.

    Args:
        recipe: A recipe with a single backbone.
        world: This process among those of the run.
        encoder: The recipe's backbone, if it is already loaded. It is moved and cast in place.

    Attributes:
        graph_failure: The error that prevented the recording of a CUDA graph, or None.

    Raises:
        InputError: The weights cannot be loaded, or the recipe does not fit the backbone or the device.
    """

    def __init__(self, recipe: Recipe, world: World, encoder: Backbone | None = None) -> None:
        self.recipe, self.world = recipe, world
        self.name = recipe.backbone.name
        self.folder = Path(recipe.output)
        self.dtype = recipe.train.dtype
        self.backbone_settings = backbone_settings(recipe)
        self.encoder: Backbone = encoder or world.run_on_all(lambda: load_backbone(**self.backbone_settings))
        # Must not change when the run is resumed, but the file of the weights may have been replaced.
        self.facts = {
            "weights_hash": self.encoder.weights_hash,
            **{f"backbone.{name}": getattr(self.encoder, name) for name in UNSTORED},
        }
        # Checkpoints of 0.1.0 lack these.
        earlier = earlier_settings(self.name, recipe.backbone.num_heads, self.encoder.embed_dim)
        self.earlier_facts = {f"backbone.{name}": value for name, value in earlier.items()}
        self.grid = self.encoder.grid(recipe.data.image_size, recipe.data.image_size)
        if recipe.objective.window > min(self.grid):
            raise InputError(
                f"objective.window: {recipe.objective.window} is larger than the token grid of {self.name} "
                f"({self.grid[0]} x {self.grid[1]}); expected at most {min(self.grid)}"
            )
        self.runtime = EncoderRuntime(self.encoder, recipe.encoder, dtype=self.dtype, device=world.device)
        self.projection = Projection(
            self.encoder.embed_dim,
            head=recipe.projection.head,
            init=self.encoder.projection_init,
            seed=recipe.seed,
        ).to(world.device)
        objective = CosettleObjective(self.projection, recipe.objective)
        # Without the fused Triton kernels, compilation fuses the operations around the matrix products.
        # A compiled backward pass frees what the separate gradients of `gradnorm` need.
        self._compiles_objective = (
            self.runtime.compiled
            and (world.device.type == "cpu" or recipe.objective.backend == "eager")
            and recipe.objective.weighting != "gradnorm"
        )
        if self._compiles_objective:
            objective.compile(dynamic=False)
        self.objective = world.wrap(objective)
        # The last layer that both terms share.
        self._shared_weight = cast(torch.nn.Linear, self.projection.linears[-1]).weight
        self.weighting = build_weighting(recipe, self.grid, self._shared_weight)
        self.optimizer = build_optimizer(recipe.optimizer, self.projection)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.dtype == torch.float16)
        self.meter = Meter()
        self._encode: Callable[[Tensor, Tensor], Tensor] = self.runtime.training_views
        self._recorded_pass: CapturedCall | None = None
        self.graph_failure: str | None = None
        self._frozen: Covariance | None = None

    def load_projection(self) -> None:
        """Start from the projection that the recipe names, if any. Raises InputError if it does not fit."""
        location, own = self.recipe.projection.weights, self.projection
        if location == "random":
            return
        given = self.world.run_on_all(lambda: Projection.find(location))
        self.world.check_same(hash_state_dict(given.state_dict()), f"projection.weights: {location!r}")
        if (given.head, given.dim) != (own.head, own.dim):
            raise InputError(
                f"projection.weights: {location!r} has the head {given.head} and width {given.dim}, but this "
                f"run has the head {own.head} and width {own.dim} ({self.name}). Set projection.head, or "
                f"choose a projection that was trained on this backbone"
            )
        # Published projections do not say on which weights they were trained.
        if "weights_hash" in given.metadata:
            check_backbone(given, self.encoder, f"projection.weights: {location!r}")
        own.load_state_dict(given.state_dict())

    @property
    def starts_at_frozen(self) -> bool:
        """Whether the projection starts at the frozen features."""
        recipe = self.recipe.projection
        frozen = recipe.init == "frozen" or self.projection.always_starts_at_frozen
        return frozen and recipe.weights == "random"

    def start_at_frozen(self, frames: Iterable[Tensor]) -> None:
        """Start the projection at the frozen features, whose mean is estimated on frames (3, S, S).

        All ranks use the estimates of rank 0.
        """
        tokens = self._covariance(frames)
        std = tokens.covariance_DD.diagonal().mean().sqrt().item()
        self.projection.start_at_frozen_(*self.world.gather((tokens.mean_D, std))[0])

    def untrained(self, frames: Iterable[Tensor]) -> dict[float, Projection]:
        """Return projections that need no training, by whitening, given frames (3, S, S).

        They are the frozen encoder with its mean removed (0), and the same, partly whitened.
        """
        tokens = self._covariance(frames)
        return {power: partly_whitened(tokens, power) for power in (0.0, WHITENING)}

    def _covariance(self, frames: Iterable[Tensor]) -> Covariance:
        """Return the mean and covariance of the frozen tokens; only the first call encodes the frames."""
        if self._frozen is None:
            dtype = self.dtype if self.world.device.type == "cuda" else None
            self._frozen = Covariance(self.encoder.embed_dim)
            for frame in frames:
                tokens_1ND = self.runtime.tokens(frame[None].to(self.world.device, dtype))
                self._frozen.add(tokens_1ND[0].double().cpu())
        return self._frozen

    def calibrate(self, frames: Tensor) -> None:
        """Quantise the encoder to FP8 by its activations on frames (T, B, 3, S, S).

        Call it before the first pass if `runtime.awaits_calibration` is set. All ranks use the scales of rank
        0, and a resumed run those of its checkpoint.
        """
        frames = frames.to(self.world.device, self.dtype if self.world.device.type == "cuda" else None)
        largest = self.runtime.calibrate(frames, self.asymmetric_positions(step_index=0))
        self.runtime.quantise(self.world.gather(largest)[0])

    def warm_up(self) -> float:
        """Compile the model and record CUDA graphs if the recipe enables them; return the elapsed seconds.

        Weights, optimiser state, meter and the global random state are unchanged; gradients are zero. If a
        recording fails, passes run without it, and `graph_failure` says why.

        Raises LocalInputError if the process cannot continue after the failure.
        """
        recipe, device = self.recipe, self.world.device
        uses_graph = recipe.encoder.cuda_graph and is_recordable(device)
        if not (self.runtime.compiled or uses_graph):
            return 0.0
        start = time.perf_counter()
        size = recipe.data.image_size
        shape = (recipe.objective.frames, recipe.train.batch_size, 3, size, size)
        frames = torch.zeros(shape, device=device, dtype=self.dtype)
        positions = self.asymmetric_positions(step_index=0)
        with self.world.no_sync(self.objective):
            # Passes of each length of the walk, with and without diagnostics, are compiled separately.
            lengths = range(2, len(frames) + 1) if recipe.objective.curriculum else [None]
            for walk_frames in lengths:
                self._run_pass(frames, positions, diagnostics=True, walk_frames=walk_frames)
                if self._compiles_objective or device.type == "cuda":
                    self._run_pass(frames, positions, walk_frames=walk_frames)
            # A graph cannot average gradients over ranks, scale the loss or change the walk.
            whole = self.world.is_single and not self.scaler.is_enabled() and not recipe.objective.curriculum
            if uses_graph and whole:
                self._recorded_pass = self._record(self._run_pass, frames, positions)
            elif uses_graph:
                self._encode = self._record(self._encode, frames, positions) or self._encode
        self.optimizer.zero_grad(set_to_none=False)
        self.weighting.reset()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    def _record(self, function: Callable[..., Any], *examples: Tensor) -> CapturedCall | None:
        """Record `function` as a CUDA graph. If that fails, set `graph_failure` and return None."""
        try:
            return CapturedCall(function, examples)
        except RuntimeError as error:
            # Ending a failed recording is an error, too, which hides the one that says what went wrong.
            cause = error.__context__ or error
            self.graph_failure = (str(cause).splitlines() or [type(cause).__name__])[0]
        try:
            recover()
        except torch.AcceleratorError:
            raise
        except RuntimeError as error:
            raise LocalInputError(
                f"encoder.cuda_graph: the recording failed ({self.graph_failure}), and this process cannot "
                f"use the GPU any more. Repeat the command with encoder.cuda_graph=false"
            ) from error
        return None

    def forward_backward(
        self,
        frames: Tensor,
        step_index: int,
        *,
        last: bool,
        diagnostics: bool,
        walk_frames: int | None = None,
    ) -> None:
        """Run the forward and backward pass of one micro-batch, frames (T, B, 3, S, S).

        The longest walk visits the first `walk_frames` frames, by default all of them. Gradients are averaged
        over ranks in the `last` pass of a step. Passes with diagnostics bypass the CUDA graph, which is
        recorded without them.
        """
        positions = self.asymmetric_positions(step_index)
        with nullcontext() if last else self.world.no_sync(self.objective):
            if self._recorded_pass is not None and not diagnostics:
                with span(RECORDED_PASS):
                    losses = self._recorded_pass(frames, positions)
            else:
                losses = self._run_pass(frames, positions, diagnostics, walk_frames)
        with span("meters"):
            self.meter.add(step_index, losses)

    def asymmetric_positions(self, step_index: int) -> Tensor:
        """Return the asymmetric positions (N, D) of a step."""
        ratio = self.recipe.objective.asymmetric_ratio
        count = self.encoder.asymmetric_range(ratio)
        return self.encoder.asymmetric_positions(
            ratio=ratio, offset=asymmetric_offset(self.recipe.seed, step_index, count)
        )

    def _run_pass(
        self,
        frames: Tensor,
        positions: Tensor,
        diagnostics: bool = False,
        walk_frames: int | None = None,
    ) -> CosettleOutput:
        if self.runtime.awaits_calibration:
            raise RuntimeError(
                "encoder.precision=fp8: the encoder is not quantised yet; call calibrate(frames) before the "
                "first pass"
            )
        with span("encoder"):
            frozen_BVND = self._encode(frames, positions)
        # With the cache enabled, a CUDA graph would replay with the weights as cast during the recording.
        autocast = torch.autocast(
            self.world.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False
        )
        with span("head and loss"), autocast:
            losses: CosettleOutput = self.objective(frozen_BVND, self.grid, diagnostics, walk_frames)
        with span("backward"):
            losses = self.weighting(losses, self._shared_weight, self.scaler.scale)
            self.scaler.scale(losses.loss / self.recipe.train.accumulate).backward()
        # Detached, because the outputs of a recorded graph would keep its autograd history alive.
        return losses._make(value if value is None else value.detach() for value in losses)

    def update(self, lr: float) -> None:
        """Take one optimiser step and reset the gradients."""
        with span("optimiser"):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=False)
            self.weighting.update(self.world)

    def read_metrics(self) -> dict[str, float]:
        """Return the metrics since the last call: means over steps and ranks, and the adapted weights."""
        metrics = self.meter.read(self.world)
        return metrics | self.weighting.metrics(metrics["separability"])

    def state(self) -> dict[str, Any]:
        return {
            "projection": self.projection.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "weighting": self.weighting.state_dict(),
            "largest_inputs": self.runtime.largest_inputs,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `state` has returned. Raises InputError if it does not fit this projection."""
        try:
            self.projection.load_state_dict(state["projection"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            # Checkpoints of 0.1.0 lack these, and fixed weights have no state.
            self.weighting.load_state_dict(state.get("weighting", {}))
            if largest_inputs := state.get("largest_inputs"):
                self.runtime.quantise({name: float(value) for name, value in largest_inputs.items()})
            for parameter, averages in self.optimizer.state.items():
                if any(average.shape not in ((), parameter.shape) for average in averages.values()):
                    raise ValueError("the optimiser's state has other shapes than the projection")
            # Checkpoints of earlier versions lack the losses since the last report.
            if "losses" in state:
                self.meter.restore(state["losses"])
        # PyTorch raises these for states with missing keys, and for values of other types and shapes.
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"output: a checkpoint in {str(self.folder)!r} does not fit this run ({reason}). Delete it "
                f"to resume from an earlier one, or use another output=DIR"
            ) from error

    def save(self, completed_steps: int, facts: dict[str, Any], kept: Projection | None = None) -> None:
        """Write the projection and a checkpoint with some `facts`; call it on rank 0 only.

        If a better projection is `kept`, the current one is written to a file of its own.
        """
        if kept is None:
            (self.folder / LAST_PROJECTION_FILE).unlink(missing_ok=True)
            self._save_projection(self.projection, PROJECTION_FILE)
        else:
            self._save_projection(self.projection, LAST_PROJECTION_FILE)
            self._save_projection(kept, PROJECTION_FILE)
        # The checkpoint is written last: a run that is interrupted in between resumes from the previous
        # checkpoint and overwrites the projection.
        state = {"step": completed_steps, **facts, **self.facts, **self.state()}
        save_checkpoint(self.folder / "checkpoints", completed_steps, state)

    def _save_projection(self, projection: Projection, name: str) -> None:
        metadata = projection_metadata(self.backbone_settings, self.encoder, projection, to_dict(self.recipe))
        projection.save(self.folder / name, metadata)


def backbone_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments of `load_backbone` for a recipe with a single backbone."""
    return {**dataclasses.asdict(recipe.backbone), "image_size": recipe.data.image_size, "seed": recipe.seed}


def backbone_recipes(recipe: Recipe) -> list[Recipe]:
    """Split a recipe into one per backbone; with several backbones, each writes to `output/NAME`."""
    if not recipe.backbones:
        return [recipe]
    return [
        dataclasses.replace(
            recipe, backbone=backbone, backbones=(), output=str(Path(recipe.output) / backbone.name)
        )
        for backbone in recipe.backbones
    ]


def asymmetric_offset(seed: int, step_index: int, count: int) -> tuple[int, int]:
    """Draw the offset (row, column) of the third view's positions in a step, each uniform on [0, count).

    The offset is the same on all ranks and in all accumulated passes, so that a step does not depend on how
    its global batch is divided.
    """
    key = np.array([seed % 2**64, step_index], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    row, column = generator.integers(0, count, size=2)
    return int(row), int(column)
