"""Tests of the scalar functions of the kernels against float64."""

import pytest
import torch

pytest.importorskip("triton")

from fasttrain_kernels.primitives import exp2, log1p, reciprocal, tanh
from fasttrain_kernels.runtime import jit, tl

SIZE = 2048


@jit
def _apply(
    x_ptr: tl.tensor, out_ptr: tl.tensor, tanh_ptr: tl.tensor, log1p_ptr: tl.tensor, SIZE: tl.constexpr
) -> None:
    """Write exp2(x) and then 1 / x to `out_ptr`, tanh(x) and log1p(x) to the others."""
    index = tl.arange(0, SIZE)
    x = tl.load(x_ptr + index)
    tl.store(out_ptr + index, exp2(x))
    tl.store(out_ptr + SIZE + index, reciprocal(x))
    tl.store(tanh_ptr + index, tanh(x, False))
    tl.store(log1p_ptr + index, log1p(x))


def test_functions_are_accurate_to_a_few_units_in_the_last_place(device: str) -> None:
    """x covers -0.9 to 20 and values near 0, where a difference of exponentials would lose all digits."""
    small = torch.logspace(-7, -0.05, SIZE // 4)
    x = torch.cat([small, -small, torch.linspace(0.9, 20, SIZE // 2)]).to(device)
    both, hyperbolic, logarithm = (torch.empty(count * SIZE, device=device) for count in (2, 1, 1))
    _apply[(1,)](x, both, hyperbolic, logarithm, SIZE)
    truth = x.double()
    for name, value, expected in (
        ("exp2", both[:SIZE], truth.exp2()),
        ("reciprocal", both[SIZE:], 1 / truth),
        ("tanh", hyperbolic, truth.tanh()),
        ("log1p", logarithm, truth.log1p()),
    ):
        error = ((value.double() - expected) / expected).abs().max().item()
        assert error < 8 * torch.finfo(torch.float32).eps, name
