"""The training objective: from frozen tokens to losses. The only module that calls the kernels.

Shape suffixes: B samples, T frames, V = T + 1 views, N tokens, M pooled tokens, D channels.
"""

import torch
from torch import Tensor, nn

from fasttrain.errors import InputError
from fasttrain.projection import Projection
from fasttrain.recipe import ObjectiveRecipe
from fasttrain_kernels import (
    CosettleOutput,
    cosettle_head_loss,
    cycle_consistency_loss,
    separability_loss,
)
from fasttrain_kernels.reference import cycle_affinities, cycle_diagnostics, cycle_rows, pool_tokens, unit
from fasttrain_kernels.runtime import use_triton

__all__ = ["CosettleObjective", "CosettleOutput"]


class CosettleObjective(nn.Module):
    """The projection and its losses in one module (Co-Settle, arXiv 2603.26597, section 3).

    With two frames, these are the losses of the paper. With T frames, the walk visits 1, 2, ..., T, T - 1,
    ..., 2 and frame 1 with asymmetric positions, there and back as in Jabri et al., "Space-Time
    Correspondence as a Contrastive Random Walk", NeurIPS 2020. The separability loss compares all T + 1
    views. It does not grow with their number: `kl`, a sum over views, is multiplied by 3 / (T + 1).

    Args:
        projection: The projection to train, on the training device.
        recipe: The section `objective` of a recipe.

    Raises:
        InputError: The recipe selects the Triton kernels, which cannot run on the projection's device.
    """

    def __init__(self, projection: Projection, recipe: ObjectiveRecipe) -> None:
        super().__init__()
        if recipe.backend == "triton":
            try:
                use_triton("triton", weight=projection.norm.weight)
            except ValueError as error:
                raise InputError(
                    "objective.backend: 'triton' needs the package triton and an NVIDIA GPU of compute "
                    "capability 8.0 or newer, or an AMD GPU (gfx90a, gfx942). Use objective.backend=auto"
                ) from error
        self.projection = projection
        self.recipe = recipe

    def forward(
        self,
        frozen_BVND: Tensor,
        grid: tuple[int, int],
        diagnostics: bool,
        walk_frames: int | None = None,
    ) -> CosettleOutput:
        """Compute the losses of frozen tokens.

        Args:
            frozen_BVND: Tokens of T frames, and of frame 1 with asymmetric positions, (B, T + 1, N, D).
            grid: The token grid (h, w) with h * w = N.
            diagnostics: Whether to also compute cycle accuracy and identity similarity, which need the full
                N x N cycle matrix. They are those of the longest walk.
            walk_frames: Number of frames that the longest walk visits, from 2 to T; None: T.
        """
        if frozen_BVND.shape[1] > 3:
            return self._long_walk(frozen_BVND, grid, diagnostics, walk_frames)
        # Bias, tanh and LayerNorm of the head are fused with the losses, so their outputs are never stored.
        linear_B3ND, rest = self.projection.split(frozen_BVND)
        # Without Triton, autocast would compute the affinities in half precision.
        with torch.autocast(frozen_BVND.device.type, enabled=False):
            return cosettle_head_loss(
                frozen_BVND,
                linear_B3ND,
                **rest,
                grid=grid,
                temperature=self.recipe.temperature,
                window=self.recipe.window,
                lambda_reg=self.recipe.lambda_reg,
                regularizer=self.recipe.regularizer,
                backend=self.recipe.backend,
                diagnostics=diagnostics,
            )

    def _long_walk(
        self, frozen_BVND: Tensor, grid: tuple[int, int], diagnostics: bool, walk_frames: int | None
    ) -> CosettleOutput:
        """Compute the losses of more than two frames, which no fused kernel covers."""
        recipe, views = self.recipe, frozen_BVND.shape[1]
        projected_BVND = self.projection(frozen_BVND)
        # The losses are computed in float32, as in the kernels.
        with torch.autocast(frozen_BVND.device.type, enabled=False):
            separability = separability_loss(frozen_BVND, projected_BVND, recipe.regularizer, recipe.backend)
            if recipe.regularizer == "kl":
                separability = separability * (3 / views)
            pooled_BVMD = pool_tokens(unit(projected_BVND), grid, recipe.window)
            longest = views - 1 if walk_frames is None else walk_frames
            walks = [_walk(pooled_BVMD, frames) for frames in range(2, longest + 1)]
            if not recipe.sub_cycles:
                walks = walks[-1:]
            options = {"temperature": recipe.temperature, "backend": recipe.backend}
            cycle = torch.stack([cycle_consistency_loss(walk, **options) for walk in walks]).mean()
            accuracy, similarity = None, None
            if diagnostics:
                rows = cycle_rows(cycle_affinities(walks[-1], recipe.temperature))
                accuracy, similarity = cycle_diagnostics(rows)
        loss = cycle + recipe.lambda_reg * separability
        return CosettleOutput(loss, cycle, separability, accuracy, similarity)


def curriculum_frames(frames: int, step_index: int, total_steps: int) -> int:
    """Return how many frames the walk of a step visits: from 2 to `frames`, for equally many steps each."""
    return 2 + step_index * (frames - 1) // total_steps


def _walk(pooled_BVMD: Tensor, frames: int) -> Tensor:
    """Return the views of a walk through the first frames and back, (B, 2 * frames - 1, M, D)."""
    there_BFMD, last_B1MD = pooled_BVMD[:, :frames], pooled_BVMD[:, -1:]
    return torch.cat((there_BFMD, there_BFMD[:, 1:-1].flip(1), last_B1MD), dim=1)
