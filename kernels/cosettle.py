"""`cosettle_loss`, the whole objective from frozen and projected tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from . import reference
from .checks import check_grid, check_lambda, check_regularizer, check_same, check_temperature, check_tokens
from .reference import CosettleLoss, Regularizer

Backend = Literal["auto", "triton", "eager"]


def cosettle_loss(
    frozen: Tensor,
    projected: Tensor,
    grid: tuple[int, int],
    temperature: float = 0.03,
    window: int = 2,
    lambda_reg: float = 3.0,
    regularizer: Regularizer = "kl",
    backend: Backend = "auto",
    *,
    diagnostics: bool = True,
) -> CosettleLoss:
    """The Co-Settle objective (arXiv 2603.26597, section 3): cycle consistency plus semantic separability.

    Args:
        frozen: (B, 3, N, D) frozen tokens: frame 1, frame 2, frame 1 with asymmetric positions.
        projected: (B, 3, N, D) the head's output for them, before L2 normalisation; alone gets gradients.
        grid: (h, w) with h * w == N.
        temperature: of the transition probabilities, above 0.
        window: side of the average pooling ahead of the cycle, in cells; 1 is none.
        lambda_reg: weight of the separability term.
        regularizer: `kl` or `mse`.
        backend: `auto` (Triton on CUDA tensors where Triton is installed, else eager), `triton` or `eager`.
        diagnostics: whether to form cycle accuracy and identity similarity, which need the whole of C.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and what is expected.
    """
    check_tokens("frozen", frozen, "B3ND")
    check_tokens("projected", projected, "B3ND")
    check_same("projected", projected, "frozen", frozen)
    if frozen.shape[1] != 3:
        raise ValueError(
            f"frozen must hold 3 views in its second dimension, got the shape {tuple(frozen.shape)}"
        )
    check_grid(grid, window, frozen.shape[2])
    check_temperature(temperature)
    check_lambda(lambda_reg)
    check_regularizer(regularizer)
    return reference.cosettle_loss(
        frozen,
        projected,
        grid=grid,
        temperature=temperature,
        window=window,
        lambda_reg=lambda_reg,
        regularizer=regularizer,
        diagnostics=diagnostics,
    )
