"""Tokens -> losses: the head and Co-Settle's objective as one module, the only caller of the kernels."""

from torch import Tensor, nn

from fasttrain.projection import Projection
from fasttrain.recipe import ObjectiveRecipe
from fasttrain_kernels import CosettleLoss, cosettle_head_loss

__all__ = ["CosettleLoss", "CosettleObjective"]


class CosettleObjective(nn.Module):
    """The trained head with its losses (Co-Settle, arXiv 2603.26597, section 3)."""

    def __init__(self, projection: Projection, recipe: ObjectiveRecipe) -> None:
        super().__init__()
        self.projection = projection
        self.recipe = recipe

    def forward(self, frozen_B3ND: Tensor, grid: tuple[int, int], diagnostics: bool) -> CosettleLoss:
        """Losses of the frozen tokens (B, 3, N, D) of frame 1, frame 2 and frame 1 with asymmetric positions.

        grid: (h, w) with h * w = N; diagnostics: also form the two diagnostics, which need all of the N x N
        cycle.
        """
        # What follows the last product is fused with the losses; bias, tanh and norm never reach memory.
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
