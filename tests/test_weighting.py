"""Adaptive weights of the two losses."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrain.backbone_trainer import BackboneTrainer
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.objective import CosettleObjective, CosettleOutput
from fasttrain.projection import Projection
from fasttrain.recipe import Recipe, recipe_from_dict
from fasttrain.weighting import MAX_FACTOR, build_weighting, distance_factor

METHODS = ("constrained", "uncertainty", "gradnorm")
GRID = (4, 4)


def make_recipe(method: str, accumulate: int = 1, **objective: Any) -> Recipe:
    return recipe_from_dict(
        {
            "backbone": {"name": "dino", "embed_dim": 32, "num_heads": 2, "depth": 1},
            "data": {"image_size": 64},
            "train": {"batch_size": 4 // accumulate, "accumulate": accumulate, "precision": "fp32"},
            "objective": {"weighting": method, **objective},
        }
    )


def take_steps(trainer: BackboneTrainer, first: int, last: int) -> None:
    """Take steps on four pairs each, in as many passes as the recipe says."""
    passes = trainer.recipe.train.accumulate
    for step_index in range(first, last):
        frames = torch.randn(2, 4, 3, 64, 64, generator=torch.Generator().manual_seed(step_index))
        for number, part in enumerate(frames.chunk(passes, dim=1)):
            trainer.forward_backward(part, step_index, last=number == passes - 1, diagnostics=False)
        trainer.update(1e-2)


def state(trainer: BackboneTrainer) -> dict[str, Tensor]:
    return {**trainer.projection.state_dict(), **trainer.weighting.state_dict()}


@pytest.mark.parametrize("method", METHODS)
def test_the_start_equals_fixed_weights(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    frozen = torch.randn(2, 3, 16, 24, generator=generator)
    projection = Projection(24)
    weight = projection.linears[-1].weight
    gradients = []
    for name in ("fixed", method):
        recipe = make_recipe(name, lambda_reg=2.5)
        losses = CosettleObjective(projection, recipe.objective)(frozen, GRID, False)
        losses = build_weighting(recipe, GRID, weight)(losses, weight, lambda loss: loss)
        projection.zero_grad()
        losses.loss.backward()
        gradients.append([losses.loss.detach(), *(p.grad.clone() for p in projection.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_continues_exactly(method: str) -> None:
    whole, stopped, resumed = (BackboneTrainer(make_recipe(method), World.single()) for _ in range(3))
    take_steps(whole, 0, 4)
    take_steps(stopped, 0, 2)
    resumed.load_state(copy.deepcopy(stopped.state()))
    take_steps(resumed, 2, 4)
    for name, value in state(whole).items():
        assert torch.equal(value, state(resumed)[name]), name
    metrics = whole.read_metrics()
    assert metrics["lambda"] != pytest.approx(3.0)
    assert metrics["cosine_distance"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_accumulated_passes_take_the_steps_of_one(method: str) -> None:
    one, two = (BackboneTrainer(make_recipe(method, accumulate), World.single()) for accumulate in (1, 2))
    take_steps(one, 0, 3)
    take_steps(two, 0, 3)
    for name in one.weighting.state_dict():
        torch.testing.assert_close(state(two)[name], state(one)[name], rtol=1e-3, atol=1e-4)


def test_checkpoints_of_earlier_versions_load() -> None:
    trainer = BackboneTrainer(make_recipe("fixed"), World.single())
    earlier = trainer.state()
    del earlier["weighting"]
    trainer.load_state(earlier)
    take_steps(trainer, 0, 1)
    assert "lambda" not in trainer.read_metrics()


def settle(method: str, cycle: Any, separability: Any, steps: int = 2000, **objective: Any) -> tuple:
    """Train a number x from 0 on two losses of x; return x and the weight of separability."""
    recipe = make_recipe(method, regularizer="mse", **objective)
    x = torch.zeros(1, 1, requires_grad=True)
    weighting = build_weighting(recipe, GRID, x)
    for _ in range(steps):
        losses = CosettleOutput(torch.zeros(()), cycle(x.sum()), separability(x.sum()), None, None)
        weighting(losses, x, lambda loss: loss).loss.backward()
        with torch.no_grad():
            x -= 0.01 * x.grad
        x.grad = None
        weighting.update(World.single())
    return x.item(), weighting.metrics(0.0)["lambda"]


def test_the_multiplier_of_a_constraint_converges() -> None:
    """Minimise (x - 2)^2 subject to x^2 / 2 <= 0.5: x = 1, where the gradients cancel for lambda = 1."""
    functions = (lambda x: (x - 2) ** 2, lambda x: x**2)
    x, multiplier = settle("constrained", *functions, separability_limit=0.5)
    assert x == pytest.approx(1.0, abs=0.01)
    assert multiplier == pytest.approx(1.0, abs=0.02)
    # Where the constraint is inactive, the multiplier falls to its bound.
    _, multiplier = settle("constrained", *functions, separability_limit=2.0, steps=1000, lambda_reg=0.5)
    assert multiplier >= 0.5 / MAX_FACTOR * 0.99


def test_uncertainty_weighs_by_the_inverse_of_the_losses() -> None:
    _, weight = settle("uncertainty", lambda x: 0 * x + 4.0, lambda x: 0 * x + 0.5, steps=1000)
    assert weight == pytest.approx(8.0, rel=1e-3)


def test_gradnorm_balances_the_gradients() -> None:
    """Both losses keep their values, so that the weighted gradients become equal."""
    _, weight = settle(
        "gradnorm", lambda x: x - x.detach() + 1, lambda x: 5 * (x - x.detach()) + 1, steps=200
    )
    assert weight == pytest.approx(1 / 5, rel=1e-2)


@pytest.mark.parametrize("factors", [(math.inf, 1), (0, 0)])
def test_gradients_that_overflow_or_vanish_change_nothing(factors: tuple[float, float]) -> None:
    """They vanish at the start of the head `residual`, whose gate is zero."""
    cycle, separability = factors
    _, weight = settle("gradnorm", lambda x: x * cycle, lambda x: x * separability + 1, steps=1)
    assert weight == pytest.approx(3.0)


@pytest.mark.parametrize("views", [3, 4])
@pytest.mark.parametrize("regularizer", ["kl", "mse"])
def test_the_distance_is_one_minus_the_cosine(regularizer: str, views: int) -> None:
    generator = torch.Generator().manual_seed(0)
    frozen = torch.randn(2, views, 16, 192, generator=generator)
    frozen -= frozen.mean(-1, keepdim=True)
    projection = Projection(192)
    recipe = make_recipe("constrained", regularizer=regularizer).objective
    separability = CosettleObjective(projection, recipe)(frozen, GRID, False).separability
    distance = 1 - torch.cosine_similarity(frozen, projection(frozen), dim=-1).mean()
    measured = distance_factor(regularizer, GRID, 192) * separability
    assert measured.item() == pytest.approx(distance.item(), rel=0.02 if regularizer == "kl" else 1e-5)


def test_a_weight_of_zero_cannot_be_adapted() -> None:
    with pytest.raises(InputError, match="weighting: expected fixed for lambda_reg=0"):
        make_recipe("constrained", lambda_reg=0.0)
