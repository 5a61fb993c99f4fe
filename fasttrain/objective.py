"""The training objective: from frozen tokens to losses. The only module that calls the kernels."""

from torch import Tensor, nn

from fasttrain.errors import InputError
from fasttrain.projection import Projection
from fasttrain.recipe import ObjectiveRecipe
from fasttrain_kernels import CosettleOutput, cosettle_head_loss
from fasttrain_kernels.runtime import use_triton

__all__ = ["CosettleObjective", "CosettleOutput"]


class CosettleObjective(nn.Module):
    """The projection and its losses in one module (Co-Settle, arXiv 2603.26597, section 3).

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

    def forward(self, frozen_B3ND: Tensor, grid: tuple[int, int], diagnostics: bool) -> CosettleOutput:
        """Compute the losses of frozen tokens.

        Args:
            frozen_B3ND: Tokens of frame 1, frame 2, and frame 1 with asymmetric positions, (B, 3, N, D).
            grid: The token grid (h, w) with h * w = N.
            diagnostics: Whether to also compute cycle accuracy and identity similarity, which need the full
                N x N cycle matrix.
        """
        # Bias, tanh and LayerNorm of the head are fused with the losses, so their outputs are never stored.
        linear_B3ND, rest = self.projection.split(frozen_B3ND)
        return cosettle_head_loss(
            frozen_B3ND,
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
