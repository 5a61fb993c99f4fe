"""Optimiser and schedule."""

import math
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fasttrain.errors import InputError
from fasttrain.optimizer import build_optimizer, learning_rate_factor, set_lr
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


def test_frozen_parameters_are_left_out() -> None:
    module = torch.nn.Linear(3, 3)
    module.weight.requires_grad_(False)
    groups = build_optimizer(OptimizerRecipe(), module).param_groups
    assert [len(group["params"]) for group in groups] == [0, 1]


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


@pytest.mark.parametrize("name", ["apex_fused_adam", "apex_fused_lamb"])
def test_absent_apex_says_how_to_get_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(InputError, match="not on PyPI"):
        build_optimizer(OptimizerRecipe(name=name), torch.nn.Linear(2, 2))


def test_pypis_apex_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    with pytest.raises(InputError, match="unrelated project"):
        build_optimizer(OptimizerRecipe(name="apex_fused_adam"), torch.nn.Linear(2, 2))


def test_the_real_apex_is_refused_on_the_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", types.ModuleType("apex.optimizers"))
    with pytest.raises(InputError, match="GPUs only"):
        build_optimizer(OptimizerRecipe(name="apex_fused_adam"), torch.nn.Linear(2, 2))
