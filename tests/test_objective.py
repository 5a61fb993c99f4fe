"""The objective: the fused computation agrees with the separate projection and losses."""

from itertools import pairwise
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fasttrain.objective import CosettleObjective, curriculum_frames
from fasttrain.projection import Head, Projection
from fasttrain.recipe import ObjectiveRecipe
from fasttrain_kernels import cosettle_head_loss, cosettle_loss, cycle_consistency_loss


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


def random_tokens(*shape: int) -> Tensor:
    """Tokens of several views that have a component in common, like those of frames of one video."""
    generator = torch.Generator().manual_seed(0)
    own, common = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return own + common[:, :1]


def cycle_by_walking(pooled_VMD: Tensor, visited: list[int], temperature: float) -> Tensor:
    """Return the probabilities (M, M) of where a walk from each token ends, computed step by step."""
    rows = []
    for start in range(pooled_VMD.shape[1]):
        probability_M = torch.eye(pooled_VMD.shape[1], dtype=torch.float64)[start]
        for view, following in pairwise(visited):
            arrived = [
                p * torch.softmax(pooled_VMD[following] @ token / temperature, 0)
                for p, token in zip(probability_M, pooled_VMD[view], strict=True)
            ]
            probability_M = torch.stack(arrived).sum(0)
        rows.append(probability_M)
    return torch.stack(rows)


@pytest.mark.parametrize("head", ["linear", "mlp2"])
@pytest.mark.parametrize(
    ("regularizer", "options", "walk_frames", "walks"),
    [
        ("kl", {}, None, [[0, 1, 2, 3, 2, 1, 4]]),
        ("mse", {"sub_cycles": True}, None, [[0, 1, 4], [0, 1, 2, 1, 4], [0, 1, 2, 3, 2, 1, 4]]),
        ("kl", {"window": 1, "sub_cycles": True}, 3, [[0, 1, 4], [0, 1, 2, 1, 4]]),
        ("kl", {}, 2, [[0, 1, 4]]),
    ],
)
def test_walks_through_four_frames(
    head: Head,
    regularizer: Literal["kl", "mse"],
    options: dict[str, bool | int],
    walk_frames: int | None,
    walks: list[list[int]],
) -> None:
    """The fifth view is frame 1 with asymmetric positions."""
    frozen = random_tokens(2, 5, 16, 8)
    projection = Projection(8, head=head, init="xavier_uniform").double()
    recipe = ObjectiveRecipe(regularizer=regularizer, temperature=0.3, lambda_reg=0.7, **options)
    out = CosettleObjective(projection, recipe)(frozen, (4, 4), True, walk_frames)
    out.loss.backward()
    gradients = [parameter.grad.clone() for parameter in projection.parameters()]
    projection.zero_grad()

    moved = normalize(projection(frozen), dim=-1)
    kept = normalize(frozen, dim=-1)
    if regularizer == "kl":
        divergence = kept.softmax(-1) * (kept.log_softmax(-1) - moved.log_softmax(-1))
        # The mean over the five views, times the three views of the paper.
        separability = 3 * divergence.sum((2, 3)).mean()
    else:
        separability = (kept - moved).square().mean()
    side = 4 // recipe.window
    cells = moved.unflatten(2, (side, recipe.window, side, recipe.window))
    pooled = cells.mean((3, 5)).flatten(2, 3)
    cycles = [torch.stack([cycle_by_walking(sample, walk, 0.3) for sample in pooled]) for walk in walks]
    target = torch.arange(side**2).expand(2, -1)
    losses = [
        torch.nn.functional.cross_entropy((ends + 1e-6).log().flatten(0, 1), target.flatten())
        for ends in cycles
    ]
    cycle = torch.stack(losses).mean()
    torch.testing.assert_close(out.cycle, cycle)
    torch.testing.assert_close(out.separability, separability)
    torch.testing.assert_close(out.loss, cycle + 0.7 * separability)
    # The diagnostics are those of the longest walk.
    torch.testing.assert_close(out.cycle_accuracy, (cycles[-1].argmax(-1) == target).double().mean())
    identity = torch.eye(side**2, dtype=torch.float64).expand_as(cycles[-1])
    similarity = torch.cosine_similarity(cycles[-1].flatten(), identity.flatten(), dim=0)
    torch.testing.assert_close(out.identity_similarity, similarity)

    (cycle + 0.7 * separability).backward()
    for fused, parameter in zip(gradients, projection.parameters(), strict=True):
        torch.testing.assert_close(fused, parameter.grad)


def test_a_walk_through_the_first_two_of_three_frames_is_that_of_the_paper() -> None:
    """If all frames are equal, so is the separability loss, whatever their number."""
    frozen = random_tokens(2, 1, 16, 8).expand(-1, 4, -1, -1)
    objective = CosettleObjective(Projection(8).double(), ObjectiveRecipe())
    longer, published = objective(frozen, (4, 4), True, 2), objective(frozen[:, :3], (4, 4), True)
    torch.testing.assert_close(longer, published)


def test_autocast_rounds_the_projection_but_not_the_walk() -> None:
    frozen = random_tokens(2, 4, 16, 8).float()
    objective = CosettleObjective(Projection(8), ObjectiveRecipe(window=1))
    with torch.autocast("cpu", torch.bfloat16):
        out = objective(frozen, (4, 4), False)
        projected = objective.projection(frozen).double()
    walk = normalize(projected, dim=-1)[:, [0, 1, 2, 1, 3]]
    torch.testing.assert_close(out.cycle.double(), cycle_consistency_loss(walk), rtol=1e-4, atol=0)


def test_autocast_applies_to_the_matrix_products_of_the_head_only() -> None:
    frozen, projection = random_tokens(2, 3, 16, 24).bfloat16(), Projection(24)
    objective = CosettleObjective(projection, ObjectiveRecipe())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = objective(frozen, (4, 4), True)
        linear, rest = projection.split(frozen)
    assert linear.dtype == torch.bfloat16
    exact = cosettle_head_loss(frozen, linear, **rest, grid=(4, 4))
    torch.testing.assert_close(out, exact, rtol=0, atol=0)


def test_the_walks_of_a_curriculum_have_each_length_for_equally_many_steps() -> None:
    assert [curriculum_frames(4, step, 7) for step in range(7)] == [2, 2, 2, 3, 3, 4, 4]
