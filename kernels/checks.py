"""Checks of a caller's arguments: a ValueError names the argument, its value and what is expected.

They look at shapes, dtypes and devices only, never at values on the device, so that none waits for the GPU.
"""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(**tensors: tuple[Tensor, str]) -> None:
    """Each tensor must have the dimensions of its string, such as "B3ND": a letter is one size throughout.

    All must have floating dtypes, be non-empty, and lie on one device.
    """
    first_name, (first, _) = next(iter(tensors.items()))
    sizes = {"3": 3}
    for name, (tensor, dims) in tensors.items():
        found = dict(zip(dims, tensor.shape, strict=False))
        fits = all(sizes.get(dim, size) == size > 0 for dim, size in found.items())
        if not fits or tensor.ndim != len(dims):
            known = "".join(f", {dim} == {sizes[dim]}" for dim in dims if dim in sizes and dim.isalpha())
            expected = f"the non-empty shape ({', '.join(dims)}){known}"
            raise ValueError(f"{name} must have {expected}, got {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.device != first.device:
            expected = f"the device of {first_name}, {first.device}"
            raise ValueError(f"{name} must be on {expected}, got {tensor.device}")
        sizes |= found


def check_grid(grid: tuple[int, int], window: int, tokens: int) -> None:
    """`grid` must be (h, w) with h * w tokens, and hold at least one whole window."""
    height, width = grid
    if height * width != tokens:
        cells = f"{tuple(grid)} with {height * width} cells"
        raise ValueError(f"grid must have h * w == N == {tokens} cells, got {cells}")
    if not 1 <= window <= min(grid):
        raise ValueError(f"window must be from 1 to {min(grid)}, the grid's shorter side, got {window!r}")


def check_number(name: str, value: float, *, zero: bool = False) -> None:
    """`value` must be finite and above 0, or with `zero` at least 0."""
    # Compared: torch.compile cannot trace math.isfinite of a number that it keeps dynamic.
    if not (0 < value < math.inf or (zero and value == 0)):
        expected = ", 0 or more" if zero else " above 0"
        raise ValueError(f"{name} must be a finite number{expected}, got {value!r}")


def check_choice(name: str, value: str, choices: Any) -> None:
    """`value` must be one of the choices of a Literal."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")
