"""Checks of what a caller passes in.

Every fault is one ValueError that names the argument, its value and what is expected. The checks look at
shapes, dtypes and devices only, never at values on the device, so that none of them waits for the GPU.
"""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor

from .reference import Regularizer

EAGER_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tokens(name: str, tokens: Tensor, dims: str) -> None:
    """`tokens` must be a floating tensor with one dimension per letter of `dims`, none of them empty."""
    if not isinstance(tokens, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tokens).__name__}")
    if tokens.ndim != len(dims) or 0 in tokens.shape:
        raise ValueError(
            f"{name} must have the non-empty shape ({', '.join(dims)}), got {tuple(tokens.shape)}"
        )
    if tokens.dtype not in EAGER_DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tokens.dtype}")


def check_same(name: str, tokens: Tensor, other_name: str, other: Tensor) -> None:
    """Two tensors must agree in shape and device."""
    if tokens.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {tuple(other.shape)}, got {tuple(tokens.shape)}"
        )
    check_same_device(name, tokens, other_name, other)


def check_views(name: str, tokens: Tensor, views: int) -> None:
    if tokens.shape[1] != views:
        raise ValueError(
            f"{name} must hold {views} views in dimension 1, got the shape {tuple(tokens.shape)}"
        )


def check_parameter(name: str, parameter: Tensor, tokens_name: str, tokens: Tensor) -> None:
    """A parameter must hold one number per channel of the tokens, on their device."""
    check_tokens(name, parameter, "D")
    if parameter.shape[0] != tokens.shape[-1]:
        channels = tokens.shape[-1]
        raise ValueError(
            f"{name} must have the {channels} channels of {tokens_name}, got {tuple(parameter.shape)}"
        )
    check_same_device(name, parameter, tokens_name, tokens)


def check_same_device(name: str, tokens: Tensor, other_name: str, other: Tensor) -> None:
    if tokens.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {tokens.device}")


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


def check_temperature(temperature: float) -> None:
    if not (_is_number(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a finite number above 0, got {temperature!r}")


def check_non_negative(name: str, value: float) -> None:
    if not (_is_number(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number, 0 or more, got {value!r}")


def check_regularizer(regularizer: str) -> None:
    if regularizer not in get_args(Regularizer):
        raise ValueError(
            f"regularizer must be one of {', '.join(get_args(Regularizer))}, got {regularizer!r}"
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    # Compared, for torch.compile cannot trace math.isfinite of a number that it keeps dynamic.
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf
