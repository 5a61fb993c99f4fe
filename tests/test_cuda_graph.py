"""CUDA graphs compared with eager execution. All tests need a GPU."""

import dataclasses
from pathlib import Path

import pytest
import torch

from fasttrain import distributed
from fasttrain.backbone_trainer import BackboneTrainer
from fasttrain.cuda_graph import CapturedCall
from fasttrain.recipe import load_recipe

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "dino.yaml"


@pytest.mark.gpu
def test_a_captured_call_uses_its_new_inputs() -> None:
    weight = torch.randn(8, 8, device="cuda")
    call = CapturedCall(lambda x: x @ weight, (torch.zeros(4, 8, device="cuda"),))
    for _ in range(2):
        x = torch.randn(4, 8, device="cuda")
        assert torch.equal(call(x), x @ weight)


@pytest.mark.gpu
def test_recorded_steps_equal_eager_steps() -> None:
    """Three steps, one of them with diagnostics, give the same projection up to rounding errors."""
    overrides = [
        "backbone.weights=random", "backbone.embed_dim=128", "backbone.depth=2", "data.image_size=64",
        "train.batch_size=4", "train.accumulate=1", "encoder.compile=none",
    ]  # fmt: skip
    frames = torch.randn(3, 2, 4, 3, 64, 64, device="cuda", dtype=torch.bfloat16)
    trained = []
    with distributed.start("cuda") as world:
        for graph in (False, True):
            recipe = load_recipe(RECIPE, overrides)
            recipe = dataclasses.replace(
                recipe, encoder=dataclasses.replace(recipe.encoder, cuda_graph=graph)
            )
            trainer = BackboneTrainer(recipe, world)
            assert (trainer.warm_up() > 0) == graph
            for step_index in range(3):
                trainer.forward_backward(
                    frames[step_index], step_index, last=True, diagnostics=step_index == 1
                )
                trainer.update(1e-3)
            trained.append(torch.cat([p.detach().flatten() for p in trainer.projection.parameters()]))
    start = BackboneTrainer(load_recipe(RECIPE, overrides), world).projection
    change = trained[0] - torch.cat([p.detach().flatten() for p in start.parameters()])
    assert (trained[1] - trained[0]).norm() < torch.finfo(torch.bfloat16).eps * change.norm()
