"""The objective: the fused computation agrees with the separate projection and losses."""

from typing import Literal, get_args

import pytest
import torch

from fasttrain.objective import CosettleObjective
from fasttrain.projection import Head, Projection
from fasttrain.recipe import ObjectiveRecipe
from fasttrain_kernels import cosettle_loss


@pytest.mark.parametrize("head", get_args(Head))
@pytest.mark.parametrize("regularizer", ["kl", "mse"])
def test_the_objective_equals_projection_and_losses(head: Head, regularizer: Literal["kl", "mse"]) -> None:
    generator = torch.Generator().manual_seed(0)
    frozen = torch.randn(2, 3, 16, 24, generator=generator, dtype=torch.float64)
    projection = Projection(24, head=head).double()
    with torch.no_grad():
        for tensor in (*projection.parameters(), *projection.buffers()):
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    objective = CosettleObjective(projection, ObjectiveRecipe(regularizer=regularizer))
    out = objective(frozen, (4, 4), True)
    out.loss.backward()
    gradients = [parameter.grad.clone() for parameter in projection.parameters()]
    projection.zero_grad()
    separate = cosettle_loss(frozen, projection(frozen), (4, 4), regularizer=regularizer)
    separate.loss.backward()
    torch.testing.assert_close(out, separate)
    for fused, parameter in zip(gradients, projection.parameters(), strict=True):
        torch.testing.assert_close(fused, parameter.grad)


def test_diagnostics_are_computed_only_if_requested() -> None:
    objective = CosettleObjective(Projection(8), ObjectiveRecipe())
    out = objective(torch.randn(1, 3, 4, 8), (2, 2), False)
    assert out.cycle_accuracy is None
    assert out.identity_similarity is None
