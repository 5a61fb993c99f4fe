"""The eager reference: the Co-Settle objective in plain PyTorch, each part on its own.

It is the CPU path of `cosettle_loss`, and gives the expected values of every kernel's test. Half precision is
computed in float32, wider dtypes as they are. Nothing here waits for the GPU.

Source: Liu et al., "From Static to Dynamic: Exploring Self-supervised Image-to-Video Representation Transfer
Learning", CVPR 2026, arXiv 2603.26597, section 3.

Shape suffixes: B samples, T views, N tokens of the h x w grid, M tokens after pooling, D channels.
"""

from __future__ import annotations

from functools import reduce
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Regularizer = Literal["kl", "mse"]

# Added to the return probabilities before the logarithm, as the published code does.
CYCLE_EPS = 1e-6


class CosettleLoss(NamedTuple):
    """0-d tensors, the first three with gradient: `loss` = `cycle` + lambda_reg x `separability`.

    The diagnostics `cycle_accuracy` and `identity_similarity` are detached, or None if not asked for.
    """

    loss: Tensor
    cycle: Tensor
    separability: Tensor
    cycle_accuracy: Tensor | None
    identity_similarity: Tensor | None


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision as float32, anything wider as it is."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def unit(tokens_BTND: Tensor) -> Tensor:
    """The tokens L2-normalised; a zero token stays zero."""
    return functional.normalize(at_least_float32(tokens_BTND), dim=-1, eps=1e-12)


def pool_tokens(tokens_BTND: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Average over the whole window x window cells of the grid: (B, T, h * w, D) -> (B, T, M, D)."""
    if window == 1:
        return tokens_BTND
    height, width = grid[0] // window, grid[1] // window
    cells = tokens_BTND.unflatten(2, grid)[:, :, : height * window, : width * window]
    return cells.unflatten(3, (width, window)).unflatten(2, (height, window)).mean(dim=(3, 5)).flatten(2, 3)


def affinity_softmax(query_BMD: Tensor, key_BKD: Tensor, temperature: float) -> Tensor:
    """softmax(query key^T / temperature) over keys: (..., M, D), (..., K, D) -> (..., M, K)."""
    query, key = at_least_float32(query_BMD), at_least_float32(key_BKD)
    return torch.softmax(query @ key.transpose(-1, -2) / temperature, dim=-1)


def cycle_affinities(walk_BTMD: Tensor, temperature: float) -> list[Tensor]:
    """The T - 1 transition matrices (B, M, M) of a walk through the views in order."""
    return [affinity_softmax(*step, temperature) for step in pairwise(walk_BTMD.unbind(1))]


def return_probability(affinities: list[Tensor]) -> Tensor:
    """The diagonal of the chained product A_1 ... A_K: the chance to end in the cell of the start, (B, M).

    C_ii = sum_j (A_1 ... A_{K-1})_ij (A_K)_ji: the last product is never formed.
    """
    if len(affinities) == 1:
        return affinities[0].diagonal(dim1=-2, dim2=-1)
    *there, back = affinities
    forward = reduce(torch.matmul, there)
    return (forward * back.transpose(-1, -2)).sum(-1)


def cycle_loss_of(return_BM: Tensor) -> Tensor:
    """Mean cross-entropy of the logits log(C_i + 1e-6) against target i, from C's diagonal (B, M) alone.

    C's rows sum to one, so the softmax's denominator is the constant 1 + M x 1e-6.
    """
    denominator = 1.0 + return_BM.shape[-1] * CYCLE_EPS
    return -torch.log((return_BM + CYCLE_EPS) / denominator).mean()


def cycle_consistency_loss(walk_BTMD: Tensor, temperature: float) -> Tensor:
    """Cycle consistency of a walk through T >= 2 views in the order given, a 0-d tensor."""
    return cycle_loss_of(return_probability(cycle_affinities(walk_BTMD, temperature)))


def cycle_diagnostics(affinities: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Cycle accuracy and identity similarity, 0-d each; needs the whole of C = A_1 ... A_K.

    Accuracy is the share of rows of C whose arg-max is the diagonal; similarity is the cosine between all of
    C and all of the identity, taken over the batch at once. Neither has gradients.
    """
    # Detached, not under no_grad: torch.export.save refuses such a block where its result is not used.
    cycle_BMM = reduce(torch.matmul, [step.detach() for step in affinities])
    start = torch.arange(cycle_BMM.shape[-1], device=cycle_BMM.device)
    accuracy = (cycle_BMM.argmax(-1) == start).to(cycle_BMM.dtype).mean()
    diagonal = cycle_BMM.diagonal(dim1=-2, dim2=-1)
    similarity = diagonal.sum() / (cycle_BMM.square().sum().sqrt() * diagonal.numel() ** 0.5)
    return accuracy, similarity


def separability_loss(frozen_BTND: Tensor, projected_BTND: Tensor, regularizer: Regularizer) -> Tensor:
    """How far the projected tokens moved from the frozen ones, both L2-normalised, a 0-d tensor.

    `kl`: KL(softmax(frozen) || softmax(projected)) over channels, summed over views, tokens and channels,
    divided by B. `mse`: the mean squared difference.
    """
    if regularizer == "mse":
        return functional.mse_loss(projected_BTND, frozen_BTND)
    divergence = functional.kl_div(projected_BTND.log_softmax(-1), frozen_BTND.softmax(-1), reduction="sum")
    return divergence / frozen_BTND.shape[0]


def head_epilogue(
    linear_BTND: Tensor, bias_D: Tensor, norm_weight_D: Tensor, norm_bias_D: Tensor, eps: float, tanh: bool
) -> Tensor:
    """What follows the head's last matrix product: layer_norm(tanh(linear + bias)), `tanh` or not."""
    hidden = at_least_float32(linear_BTND) + bias_D
    if tanh:
        hidden = hidden.tanh()
    affine = (norm_weight_D.to(hidden.dtype), norm_bias_D.to(hidden.dtype))
    return functional.layer_norm(hidden, hidden.shape[-1:], *affine, eps)


def cosettle_loss(
    frozen_BTND: Tensor,
    projected_BTND: Tensor,
    grid: tuple[int, int],
    temperature: float,
    window: int,
    lambda_reg: float,
    regularizer: Regularizer,
    diagnostics: bool,
) -> CosettleLoss:
    """The whole objective; arguments as in `fasttrain_kernels.cosettle_loss`, which checks them first."""
    frozen, projected = unit(frozen_BTND.detach()), unit(projected_BTND)
    separability = separability_loss(frozen, projected, regularizer)
    affinities = cycle_affinities(pool_tokens(projected, grid, window), temperature)
    cycle = cycle_loss_of(return_probability(affinities))
    accuracy, similarity = cycle_diagnostics(affinities) if diagnostics else (None, None)
    return CosettleLoss(cycle + lambda_reg * separability, cycle, separability, accuracy, similarity)
