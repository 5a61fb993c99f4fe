"""The training of one backbone: meters, position offsets, warm-up and state."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrain.backbone_trainer import BackboneTrainer, Meter, asymmetric_offset
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.objective import CosettleOutput
from fasttrain.recipe import recipe_from_dict


def make_trainer(**sections: dict[str, Any]) -> BackboneTrainer:
    tiny = {
        "backbone": {"name": "dino", "embed_dim": 32, "num_heads": 2, "depth": 1},
        "data": {"image_size": 64},
        "train": {"batch_size": 2, "precision": "fp32"},
    }
    return BackboneTrainer(recipe_from_dict(tiny | sections), World.single())


def losses(*values: float, diagnostics: Tensor | None = None) -> CosettleOutput:
    return CosettleOutput(*(torch.tensor(value) for value in values), diagnostics, diagnostics)


def test_meter_returns_means_and_resets() -> None:
    meter = Meter()
    meter.add(0, losses(1, 2, 3))
    meter.add(1, losses(3, 4, 5, diagnostics=torch.tensor(0.5)))
    means = {"loss": 2, "cycle": 3, "separability": 4, "cycle_accuracy": 0.5, "identity_similarity": 0.5}
    assert meter.read(World.single()) == means
    meter.add(2, losses(7, 7, 7))
    assert meter.read(World.single()) == {"loss": 7, "cycle": 7, "separability": 7}


@pytest.mark.parametrize("bad", [0, 1])
def test_meter_returns_the_first_step_with_a_non_finite_loss(bad: int) -> None:
    meter = Meter()
    for step_index in range(4):
        loss = math.nan if step_index == bad else math.inf if step_index == 3 else 1.0
        meter.add(step_index, losses(loss, 0, 0))
    assert meter.first_non_finite(World.single()) == bad


@pytest.mark.parametrize("generates_code", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_warm_up_has_no_side_effects(generates_code: bool, request: pytest.FixtureRequest) -> None:
    """With compilation on the CPU, it leaves weights, optimiser state and random state unchanged."""
    if not generates_code:
        request.getfixturevalue("no_code_generation")
    trainer = make_trainer(encoder={"compile": "default"})
    before = [p.clone() for p in trainer.projection.parameters()]
    random_state = torch.get_rng_state()
    assert trainer.warm_up() > 0
    assert torch.equal(torch.get_rng_state(), random_state)
    assert trainer.optimizer.state_dict()["state"] == {}
    for old, parameter in zip(before, trainer.projection.parameters(), strict=True):
        assert torch.equal(old, parameter)
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_the_state_includes_the_loss_scale() -> None:
    trainer = make_trainer(train={"batch_size": 2, "precision": "fp16"})
    state = trainer.state()
    state["scaler"] = {**state["scaler"], "scale": 8.0, "_growth_tracker": 5}
    trainer.load_state(state)
    assert trainer.state()["scaler"] == state["scaler"]


def test_offsets_depend_on_seed_and_step_and_cover_the_range() -> None:
    offsets = {asymmetric_offset(0, step_index, 3) for step_index in range(200)}
    assert offsets == {(row, column) for row in range(3) for column in range(3)}
    assert asymmetric_offset(0, 5, 100) == asymmetric_offset(0, 5, 100)
    assert asymmetric_offset(-1, 5, 2**30) == asymmetric_offset(2**64 - 1, 5, 2**30)
    assert asymmetric_offset(0, 5, 2**30) != asymmetric_offset(1, 5, 2**30)


@pytest.mark.parametrize("name", ["projection", "optimizer", "losses"])
def test_a_state_that_does_not_fit_is_refused(name: str) -> None:
    trainer = make_trainer()
    state = trainer.state() | {"losses": torch.zeros(0, 3, dtype=torch.float64)}
    trainer.load_state(state)
    with pytest.raises(InputError, match="does not fit this run"):
        trainer.load_state(state | {name: torch.zeros(2)})


def test_all_ranks_start_at_the_mean_of_rank_0() -> None:
    class Second(World):
        """Rank 1 of two simulated ranks."""

        def gather(self, value: Any) -> list[Any]:
            return [(torch.ones(32, dtype=torch.float64), 0.25), value]

    trainer = make_trainer(projection={"init": "frozen"})
    trainer.world = Second(**vars(trainer.world))
    trainer.start_at_frozen(torch.randn(3, 3, 64, 64))
    assert torch.equal(trainer.projection.get_parameter("linears.0.weight"), 2 * torch.eye(32))
    assert torch.equal(trainer.projection.get_parameter("linears.0.bias"), torch.full((32,), -2.0))


def test_an_fp8_encoder_must_be_calibrated_before_the_first_pass() -> None:
    trainer = make_trainer(encoder={"precision": "fp8", "compile": "default"})
    frames = torch.randn(2, 2, 3, 64, 64)
    message = r"encoder\.precision=fp8: .* call calibrate\(frames\)"
    with pytest.raises(RuntimeError, match=message):
        trainer.warm_up()
    with pytest.raises(RuntimeError, match=message):
        trainer.forward_backward(frames, 0, last=True, diagnostics=False)
    trainer.calibrate(frames)
    trainer.forward_backward(frames, 0, last=True, diagnostics=False)
    assert trainer.meter.first_non_finite(World.single()) is None


@pytest.mark.parametrize("changed", [{"0.mlp.fc1": math.nan}, {"0.mlp.fc1": "large"}, {"9.mlp.fc1": 1.0}])
def test_damaged_scales_of_fp8_are_refused(changed: dict[str, Any]) -> None:
    trainer, resumed = (make_trainer(encoder={"precision": "fp8"}) for _ in range(2))
    trainer.calibrate(torch.randn(2, 2, 3, 64, 64))
    state = trainer.state()
    with pytest.raises(InputError, match="does not fit this run"):
        resumed.load_state(state | {"largest_inputs": state["largest_inputs"] | changed})
    resumed.load_state(state)
    assert resumed.state()["largest_inputs"] == state["largest_inputs"]
