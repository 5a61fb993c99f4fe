"""Tests of the scalar functions of the kernels against float64."""

import math

import pytest
import torch

pytest.importorskip("triton")

from fasttrain_kernels.primitives import exp2, exp2m1, log1p, reciprocal, tanh
from fasttrain_kernels.runtime import jit, tl

SIZE = 2048


@jit
def _apply(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,  # [5, SIZE]
    SIZE: tl.constexpr,
) -> None:
    index = tl.arange(0, SIZE)
    x = tl.load(x_ptr + index)
    tl.store(out_ptr + index, exp2(x))
    tl.store(out_ptr + SIZE + index, reciprocal(x))
    tl.store(out_ptr + 2 * SIZE + index, tanh(x, False))
    tl.store(out_ptr + 3 * SIZE + index, log1p(x))
    tl.store(out_ptr + 4 * SIZE + index, exp2m1(x))


def test_functions_are_accurate_to_a_few_units_in_the_last_place(device: str) -> None:
    """x covers -0.9 to 20 and values near 0, where a difference of exponentials would lose all digits."""
    small = torch.logspace(-7, -0.05, SIZE // 4)
    x = torch.cat([small, -small, torch.linspace(0.9, 20, SIZE // 2)]).to(device)
    out = torch.empty(5, SIZE, device=device)
    _apply[(1,)](x, out, SIZE)
    truth = x.double()
    expected = {
        "exp2": truth.exp2(),
        "reciprocal": 1 / truth,
        "tanh": truth.tanh(),
        "log1p": truth.log1p(),
        "exp2m1": torch.expm1(truth * math.log(2)),
    }
    for value, (name, expected_value) in zip(out, expected.items(), strict=True):
        error = ((value.double() - expected_value) / expected_value).abs().max().item()
        assert error < 8 * torch.finfo(torch.float32).eps, name
