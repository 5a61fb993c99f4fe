"""Checks of what a caller passes in.

Every fault is one ValueError that names the argument, its value and what is expected. The checks look at
shapes, dtypes and devices only, never at values on the device, so that none of them waits for the GPU.
"""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(**tensors: tuple[Tensor, str]) -> None:
    """Each argument is a tensor and its dimensions, such as "B3ND": a letter stands for one size in all of
    the tensors, a digit for itself. They must be of floating dtypes, not empty, and on one device.
    """
    (first, _), *_ = tensors.values()
    sizes: dict[str, int] = {}
    for name, (tensor, dims) in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
        expected = [int(dim) if dim.isdigit() else sizes.get(dim) for dim in dims]
        fits = tensor.ndim == len(dims) and 0 not in tensor.shape
        if not fits or any(
            want not in (None, size) for want, size in zip(expected, tensor.shape, strict=True)
        ):
            letters = ", ".join(dims)
            known = "".join(f", {dim} == {sizes[dim]}" for dim in dims if dim.isalpha() and dim in sizes)
            raise ValueError(
                f"{name} must have the non-empty shape ({letters}){known}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.device != first.device:
            device = f"the device of {next(iter(tensors))}, {first.device}"
            raise ValueError(f"{name} must be on {device}, got {tensor.device}")
        sizes.update(zip(dims, tensor.shape, strict=True))


def check_grid(grid: tuple[int, int], window: int, tokens: int) -> None:
    """`grid` must be (h, w) with h * w tokens, and hold at least one whole window."""
    if not (isinstance(grid, tuple | list) and len(grid) == 2 and all(_is_count(side) for side in grid)):
        raise ValueError(f"grid must be two positive integers (h, w), got {grid!r}")
    if grid[0] * grid[1] != tokens:
        raise ValueError(
            f"grid must have h * w == N == {tokens} cells, got {tuple(grid)} with {grid[0] * grid[1]} cells"
        )
    if not _is_count(window) or window > min(grid):
        raise ValueError(
            f"window must be an integer from 1 to {min(grid)}, the grid's shorter side, got {window!r}"
        )


def check_number(name: str, value: float, *, zero: bool = False) -> None:
    """`value` must be finite and above 0, or with `zero` at least 0."""
    # Compared, for torch.compile cannot trace math.isfinite of a number that it keeps dynamic.
    number = isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf
    if not (number and (value > 0 or (zero and value == 0))):
        expected = ", 0 or more" if zero else " above 0"
        raise ValueError(f"{name} must be a finite number{expected}, got {value!r}")


def check_choice(name: str, value: str, choices: Any) -> None:
    """`value` must be one of a Literal's."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
