"""The optimiser and the learning-rate schedule."""

import math
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fasttrain.errors import InputError
from fasttrain.optimizer import build_optimizer, learning_rate_factor
from fasttrain.recipe import OptimizerRecipe, TrainRecipe


def test_weight_decay_applies_to_matrices_only() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    optimizer = build_optimizer(OptimizerRecipe(weight_decay=0.5), module)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = module.state_dict()
    torch.testing.assert_close(after["0.weight"], before["0.weight"] * (1 - 0.1 * 0.5))
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(after[name], before[name])


@given(total=st.integers(2, 5000), epochs=st.floats(1.5, 100), warmup=st.floats(0, 1))
def test_schedule_rises_from_zero_to_one_and_falls_to_zero(total: int, epochs: float, warmup: float) -> None:
    recipe = TrainRecipe(epochs=epochs, warmup_epochs=warmup)
    factors = [learning_rate_factor(recipe, step_index, total) for step_index in range(total + 1)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[0] == (0 if warmup > 0 else 1)
    assert math.isclose(factors[-1], 0, abs_tol=1e-12)
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_schedule_values_of_the_paper() -> None:
    """Five epochs of ten steps, the first for warm-up: check half-way up, the peak, and half-way down."""
    factor = [learning_rate_factor(TrainRecipe(), step_index, 50) for step_index in range(50)]
    assert factor[5] == 0.5
    assert factor[10] == 1.0
    assert math.isclose(factor[30], 0.5)


@pytest.mark.parametrize("installed", [None, types.ModuleType("apex")], ids=["missing", "PyPI"])
def test_the_message_about_a_missing_nvidia_apex(
    installed: types.ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "apex", installed)
    for name in ("apex_fused_adam", "apex_fused_lamb"):
        with pytest.raises(InputError, match="not on PyPI, where `apex` is an unrelated project"):
            build_optimizer(OptimizerRecipe(name=name), torch.nn.Linear(2, 2))


def test_nvidia_apex_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    real = types.ModuleType("apex.optimizers")
    real.FusedAdam = torch.optim.Adam
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", real)
    with pytest.raises(InputError, match="needs a GPU"):
        build_optimizer(OptimizerRecipe(name="apex_fused_adam"), torch.nn.Linear(2, 2))
