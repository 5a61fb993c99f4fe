"""Checks of user arguments. A ValueError names the argument, its value and what was expected.

The checks never read the elements of a tensor, so they do not synchronise with the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(**tensors: tuple[Tensor, str]) -> None:
    """Check tensors given as `name=(tensor, dimensions)`, for example `frozen=(frozen, "B3ND")`.

    Each character of `dimensions` is a fixed size or a letter; the same letter must have the same size in all
    tensors. All tensors must be non-empty, have a floating-point dtype and be on the same device.
    """
    first_name, (first, _) = next(iter(tensors.items()))
    sizes = {"3": 3}
    for name, (tensor, dims) in tensors.items():
        own_sizes = dict(zip(dims, tensor.shape, strict=False))
        fits = all(sizes.get(dim, size) == size > 0 for dim, size in own_sizes.items())
        if not fits or tensor.ndim != len(dims):
            given = ", ".join(f"{dim} = {sizes[dim]}" for dim in dims if dim in sizes and dim.isalpha())
            expected = f"shape ({', '.join(dims)})" + (f" with {given}" if given else "")
            raise ValueError(f"{name} must be a non-empty tensor of {expected}, got {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.device != first.device:
            expected = f"the same device as {first_name} ({first.device})"
            raise ValueError(f"{name} must be on {expected}, got {tensor.device}")
        sizes |= own_sizes


def check_mask(mask: Tensor | None, name: str, tokens: Tensor) -> None:
    """Check that `mask` is None or a bool tensor with one element per token of tokens (B, T, N, D)."""
    if mask is None:
        return
    batch, _, count, _ = tokens.shape
    if mask.dtype != torch.bool or mask.shape != (batch, count) or mask.device != tokens.device:
        expected = f"a bool tensor of shape {(batch, count)} on {tokens.device}, like the tokens of {name}"
        raise ValueError(f"mask must be {expected}, got {mask.dtype} {tuple(mask.shape)} on {mask.device}")


def check_grid(grid: tuple[int, int], window: int, tokens: int) -> None:
    """Check that `grid` has one cell per token and is at least one window high and wide."""
    if not isinstance(grid, Sequence) or len(grid) != 2:
        raise ValueError(f"grid must be (h, w), the rows and columns of tokens, got {grid!r}")
    height, width = grid
    if height < 1 or height * width != tokens:
        cells = f"{tuple(grid)} with {height * width} cells"
        advice = "Leave out class and register tokens."
        raise ValueError(f"grid must be (h, w) with h * w = N = {tokens} cells, got {cells}. {advice}")
    if not 1 <= window <= min(grid):
        raise ValueError(f"window must be from 1 to {min(grid)} (the grid's shorter side), got {window!r}")


def check_number(name: str, value: float, *, zero: bool = False) -> None:
    """Check that `value` is a finite number greater than 0, or at least 0 if `zero` is set."""
    if isinstance(value, Tensor):
        # Operators take numbers: reading the tensor would wait for the GPU, and its gradient would be lost.
        advice = f"Pass {name}.item(). It gets no gradient."
        raise ValueError(f"{name} must be a Python number, got a tensor. {advice}")
    # Comparisons instead of math.isfinite, which torch.compile cannot trace for dynamic floats.
    if not (0 < value < math.inf or (zero and value == 0)):
        expected = "at least" if zero else "greater than"
        raise ValueError(f"{name} must be finite and {expected} 0, got {value!r}")


def check_choice(name: str, value: str, choices: Any) -> None:
    """Check that `value` is one of the choices of the Literal type `choices`."""
    # torch.compile of PyTorch 2.6 cannot trace typing.get_args.
    if value not in choices.__args__:
        expected = ", ".join(map(repr, choices.__args__))
        raise ValueError(f"{name} must be one of {expected}, got {value!r}")
