"""Optimiser and schedule."""

import math
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fasttrain.errors import InputError
from fasttrain.optimizer import (
    build_optimizer,
    learning_rate_factor,
    portable_state,
    record_update,
    set_lr,
)
from fasttrain.recipe import OptimizerRecipe


def test_weight_decay_acts_on_matrices_only() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    optimizer = build_optimizer(OptimizerRecipe(weight_decay=0.5), module)
    set_lr(optimizer, 0.1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = module.state_dict()
    torch.testing.assert_close(after["0.weight"], before["0.weight"] * (1 - 0.1 * 0.5))
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(after[name], before[name])


@given(
    total=st.integers(2, 5000),
    epochs=st.floats(1.5, 100),
    warmup=st.floats(0, 1),
)
def test_schedule_rises_from_zero_to_one_and_falls_to_zero(total: int, epochs: float, warmup: float) -> None:
    factors = [
        learning_rate_factor(step, total_steps=total, epochs=epochs, warmup_epochs=warmup)
        for step in range(total + 1)
    ]
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[0] == (0 if warmup > 0 else 1)
    assert math.isclose(factors[-1], 0, abs_tol=1e-12)
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_schedule_values_of_the_paper() -> None:
    """Five epochs of ten steps, one of warm-up: half-way up, the peak, and half-way down the cosine."""
    factor = [learning_rate_factor(s, total_steps=50, epochs=5, warmup_epochs=1) for s in range(50)]
    assert factor[5] == 0.5
    assert factor[10] == 1.0
    assert math.isclose(factor[30], 0.5)


@pytest.mark.parametrize("installed", [None, types.ModuleType("apex")], ids=["absent", "that of PyPI"])
def test_without_the_real_apex_the_line_says_how_to_get_it(
    installed: types.ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "apex", installed)
    for name in ("apex_fused_adam", "apex_fused_lamb"):
        with pytest.raises(InputError, match="not on PyPI, where `apex` is an unrelated project"):
            build_optimizer(OptimizerRecipe(name=name), torch.nn.Linear(2, 2))


def test_the_real_apex_is_refused_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    real = types.ModuleType("apex.optimizers")
    real.FusedAdam = torch.optim.Adam
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", real)
    with pytest.raises(InputError, match="GPUs only"):
        build_optimizer(OptimizerRecipe(name="apex_fused_adam"), torch.nn.Linear(2, 2))


class Replay:
    """Stands in for a CUDA graph: runs the function ahead of time, as warm-up and recording do, and again."""

    def __init__(self, function: Callable[[], Any], inputs: tuple[()]) -> None:
        self.function = function
        for _ in range(3):
            function()

    def __call__(self) -> None:
        self.function()


class Run:
    """A layer trained on random gradients that follow from the step alone."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = torch.nn.Linear(5, 3)
        self.optimizer = build_optimizer(OptimizerRecipe(), self.module)

    def steps(self, numbers: range, update: Callable[[], Any] | None = None) -> None:
        for step in numbers:
            generator = torch.Generator().manual_seed(step)
            for parameter in self.module.parameters():
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad = gradient if parameter.grad is None else parameter.grad.copy_(gradient)
            set_lr(self.optimizer, 1e-2 * (step + 1))
            (update or self.optimizer.step)()

    def weights(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.module.parameters()])


def test_recorded_updates_are_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the middle of a run; the recording itself leaves no trace, and gradients end at zero."""
    monkeypatch.setattr("fasttrain.optimizer.CapturedCall", Replay)
    plain = Run()
    plain.steps(range(6))
    for resumed_at in (0, 2):
        run = Run()
        run.steps(range(resumed_at))
        before = run.weights()
        update = record_update(run.optimizer)
        assert torch.equal(run.weights(), before)
        run.steps(range(resumed_at, 6), update)
        # On the device the rate is a float32, on the host a float64.
        torch.testing.assert_close(run.weights(), plain.weights(), rtol=1e-6, atol=1e-7)
        assert not any(parameter.grad.any() for parameter in run.module.parameters())
    # A run may go on unrecorded from the state of a recorded one.
    recorded, after = Run(), Run()
    recorded.steps(range(2), record_update(recorded.optimizer))
    after.module.load_state_dict(recorded.module.state_dict())
    after.optimizer.load_state_dict(portable_state(recorded.optimizer))
    assert [type(group["lr"]) for group in after.optimizer.param_groups] == [float, float]
    after.steps(range(2, 6))
    torch.testing.assert_close(after.weights(), plain.weights(), rtol=1e-6, atol=1e-7)
