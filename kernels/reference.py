"""The eager reference: the Co-Settle objective in plain PyTorch.

The public functions use it on CPUs and wherever else Triton cannot run, and the tests of the kernels take
their expected values from it. float16 and bfloat16 inputs are converted to float32; others keep their dtype.
No function synchronises with the GPU.

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
Reduction = Literal["mean", "none"]

# Added to the return probabilities before the logarithm, as in the published implementation.
CYCLE_EPS = 1e-6


class CosettleOutput(NamedTuple):
    """Losses and diagnostics of the Co-Settle objective.

    The losses are differentiable: 0-d tensors, or (B,) with `reduction="none"`. The diagnostics are 0-d and
    detached, or None with `diagnostics=False`.

    Attributes:
        loss: cycle + lambda_reg * separability.
        cycle: Cycle consistency loss.
        separability: Semantic separability loss.
        cycle_accuracy: Share of rows of the cycle matrix whose arg-max is the diagonal.
        identity_similarity: Cosine similarity between the cycle matrix and the identity, over the whole
            batch.
    """

    loss: Tensor
    cycle: Tensor
    separability: Tensor
    cycle_accuracy: Tensor | None
    identity_similarity: Tensor | None


def at_least_float32(values: Tensor) -> Tensor:
    """Convert float16 and bfloat16 to float32; return wider dtypes unchanged."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def unit(tokens_BTND: Tensor) -> Tensor:
    """L2-normalise the tokens; a zero token stays zero."""
    return functional.normalize(at_least_float32(tokens_BTND), dim=-1, eps=1e-12)


def pool_tokens(tokens_BTND: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Average the tokens over windows: (B, T, h * w, D) -> (B, T, M, D).

    Rows at the bottom and columns at the right that do not fill a window are dropped.
    """
    if window == 1:
        return tokens_BTND
    height, width = grid[0] // window, grid[1] // window
    cells = tokens_BTND.unflatten(2, grid)[:, :, : height * window, : width * window]
    return cells.unflatten(3, (width, window)).unflatten(2, (height, window)).mean(dim=(3, 5)).flatten(2, 3)


def affinity_softmax(query_BMD: Tensor, key_BKD: Tensor, temperature: float) -> Tensor:
    """Compute softmax(query key^T / temperature) over the keys: (..., M, D), (..., K, D) -> (..., M, K)."""
    query, key = at_least_float32(query_BMD), at_least_float32(key_BKD)
    return torch.softmax(query @ key.transpose(-1, -2) / temperature, dim=-1)


def cycle_affinities(walk_BTMD: Tensor, temperature: float) -> list[Tensor]:
    """Compute the T - 1 transition matrices (B, M, M) of a walk through the views in order."""
    return [affinity_softmax(*step, temperature) for step in pairwise(walk_BTMD.unbind(1))]


def return_probability(affinities: list[Tensor]) -> Tensor:
    """Compute the diagonal (B, M) of C = A_1 ... A_K, the probabilities that a walk ends where it began.

    C_ii = sum_j (A_1 ... A_{K-1})_ij (A_K)_ji, so the last matrix product is not needed.
    """
    if len(affinities) == 1:
        return affinities[0].diagonal(dim1=-2, dim2=-1)
    *there, back = affinities
    forward = reduce(torch.matmul, there)
    return (forward * back.transpose(-1, -2)).sum(-1)


def cycle_loss_from_diagonal(return_BM: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Compute the mean cross-entropy of the logits log(C_i + 1e-6) against target i from C's diagonal (B, M).

    The mean is over tokens and, for "mean", over samples. The rows of C sum to one, so the denominator of the
    softmax is the constant 1 + M * 1e-6.
    """
    denominator = 1.0 + return_BM.shape[-1] * CYCLE_EPS
    entropy_BM = torch.log((return_BM + CYCLE_EPS) / denominator)
    return -(entropy_BM.mean() if reduction == "mean" else entropy_BM.mean(1))


def cycle_consistency_loss(walk_BTMD: Tensor, temperature: float, reduction: Reduction = "mean") -> Tensor:
    """Compute the cycle consistency loss of a walk through T >= 2 views in the given order."""
    return cycle_loss_from_diagonal(return_probability(cycle_affinities(walk_BTMD, temperature)), reduction)


def cycle_rows(affinities: list[Tensor]) -> Tensor:
    """Summarise each row of C = A_1 ... A_K: (3, B, M), without gradients.

    Returns whether its arg-max is the diagonal (1 or 0), its sum of squares, and its diagonal element.
    """
    # Detach instead of torch.no_grad: torch.export.save rejects a no_grad block whose result is unused.
    cycle_BMM = reduce(torch.matmul, [step.detach() for step in affinities])
    start = torch.arange(cycle_BMM.shape[-1], device=cycle_BMM.device)
    correct_BM = (cycle_BMM.argmax(-1) == start).to(cycle_BMM.dtype)
    return torch.stack((correct_BM, cycle_BMM.square().sum(-1), cycle_BMM.diagonal(dim1=-2, dim2=-1)))


def cycle_diagnostics(rows_3BM: Tensor) -> tuple[Tensor, Tensor]:
    """Compute cycle accuracy and identity similarity (0-d) from the result of `cycle_rows`.

    Cycle accuracy is the share of rows of C whose arg-max is the diagonal. Identity similarity is the cosine
    similarity between C and the identity, both flattened over the whole batch.
    """
    accuracy, squares, diagonal = rows_3BM.mean((1, 2))
    return accuracy, diagonal * squares.rsqrt()


def separability_loss(
    frozen_BTND: Tensor, projected_BTND: Tensor, regularizer: Regularizer, reduction: Reduction
) -> Tensor:
    """Compute the separability loss of L2-normalised tokens.

    "kl" is KL(softmax(frozen) || softmax(projected)) over channels, summed over views, tokens and channels.
    "mse" is the mean squared difference. The losses of the samples are averaged for "mean".
    """
    if regularizer == "mse":
        error = functional.mse_loss(projected_BTND, frozen_BTND, reduction=reduction)
        return error if reduction == "mean" else error.mean((1, 2, 3))
    divergence = functional.kl_div(projected_BTND.log_softmax(-1), frozen_BTND.softmax(-1), reduction="none")
    return divergence.sum() / len(divergence) if reduction == "mean" else divergence.sum((1, 2, 3))


def head_epilogue(
    linear_BTND: Tensor, bias_D: Tensor, norm_weight_D: Tensor, norm_bias_D: Tensor, eps: float, tanh: bool
) -> Tensor:
    """Compute what follows the last matrix product of the head: layer_norm(tanh(linear + bias))."""
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
    reduction: Reduction,
    diagnostics: bool,
) -> CosettleOutput:
    """Compute the complete objective; see `fasttrain_kernels.cosettle_loss`, which checks the arguments."""
    frozen, projected = unit(frozen_BTND.detach()), unit(projected_BTND)
    separability = separability_loss(frozen, projected, regularizer, reduction)
    affinities = cycle_affinities(pool_tokens(projected, grid, window), temperature)
    cycle = cycle_loss_from_diagonal(return_probability(affinities), reduction)
    accuracy, similarity = cycle_diagnostics(cycle_rows(affinities)) if diagnostics else (None, None)
    return CosettleOutput(cycle + lambda_reg * separability, cycle, separability, accuracy, similarity)
