"""Semantic separability alone: how far the projected tokens moved from the frozen ones in direction.

    kl:  (1 / B) sum over views and tokens of KL(softmax(z / ||z||) || softmax(g / ||g||)) over channels
    mse: mean over everything of (z / ||z|| - g / ||g||)^2

The kernels are those of epilogue.py, without head and pooling: one pass forward, one backward.

Source: arXiv 2603.26597, section 3. Shape suffixes: B samples, T views, N tokens, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .checks import check_choice, check_tensors
from .epilogue import Epilogue, launch_backward, launch_forward, statistics_shape
from .reference import Regularizer
from .runtime import Backend, differentiate, needs_grad, operator, use_triton


def _epilogue(projected: Tensor, frozen: Tensor, kl: bool) -> Epilogue:
    """Four tokens to a program, as they come: without pooling the grid does not matter."""
    return Epilogue(
        projected, frozen, bias=None, norm_weight=None, norm_bias=None, norm_eps=0.0, tanh=False,
        height=1, width=projected.shape[2], window_height=1, window_width=4, kl=kl,
    )  # fmt: skip


def _forward(projected: Tensor, frozen: Tensor, kl: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """The loss, 0-d, and the statistics for the backward, empty without `keep`."""
    loss, _, statistics = launch_forward(_epilogue(projected, frozen, kl), pool=False, statistics=keep)
    return loss, statistics


def _backward(grad: Tensor, statistics: Tensor, projected: Tensor, frozen: Tensor, kl: bool) -> Tensor:
    return launch_backward(_epilogue(projected, frozen, kl), statistics, grad)[0]


def _save(inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[bool]]:
    projected, frozen, kl, _ = inputs
    return (output[1], projected, frozen), (kl,)


_separability = operator(
    "separability",
    _forward,
    fake=lambda projected, frozen, kl, keep: (
        projected.new_empty((), dtype=torch.float32),
        projected.new_empty(statistics_shape(projected, keep), dtype=torch.float32),
    ),
)
_separability_backward = operator(
    "separability_backward",
    _backward,
    fake=lambda grad, statistics, projected, frozen, kl: projected.new_empty(projected.shape),
)
differentiate(_separability, lambda *given: (_separability_backward(*given),), losses=1, save=_save)


def separability_loss(
    frozen: Tensor, projected: Tensor, regularizer: Regularizer = "kl", backend: Backend = "auto"
) -> Tensor:
    """Semantic separability (arXiv 2603.26597, section 3), a 0-d tensor.

    Args:
        frozen: (B, T, N, D) frozen tokens; no gradient reaches them.
        projected: (B, T, N, D) the head's output for them, before L2 normalisation.
        regularizer: `kl` or `mse`.
        backend: `auto` (Triton on CUDA tensors where Triton is installed, else eager), `triton` or `eager`.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and what is expected.
    """
    check_tensors(frozen=(frozen, "BTND"), projected=(projected, "BTND"))
    check_choice("regularizer", regularizer, Regularizer)
    frozen = frozen.detach()
    if not use_triton(backend, frozen=frozen, projected=projected):
        return reference.separability_loss(reference.unit(frozen), reference.unit(projected), regularizer)
    loss: Tensor = _separability(projected, frozen, regularizer == "kl", needs_grad(projected))[0]
    return loss
