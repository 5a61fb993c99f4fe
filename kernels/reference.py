"""The eager reference: the Co-Settle objective in plain PyTorch.

The public functions use it on CPUs and wherever else Triton cannot run, and the tests of the kernels take
their expected values from it. float16 and bfloat16 inputs are converted to float32; others keep their dtype.
No function synchronises with the GPU.

A mask is True for the tokens that count, in all views of a sample. A pooled token exists, and counts for the
cycle, if a token of its window counts. Masks enter sums and means as weights: 0 for a token that does not
count, and 1 for all if all count. The losses expect finite numbers in masked tokens (`fill_masked`).

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

    With a mask, the diagnostics are over the pooled tokens that exist, and NaN if the batch has none.
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


def fill_masked(tokens_BTND: Tensor, mask_BN: Tensor) -> Tensor:
    """Replace tokens that do not count by a constant, so that NaN and infinity in them have no effect.

    The constant is a ramp: for zeros, a layer norm without epsilon would divide by zero.
    """
    ramp = torch.linspace(0, 1, tokens_BTND.shape[-1], dtype=tokens_BTND.dtype, device=tokens_BTND.device)
    return torch.where(mask_BN[:, None, :, None], tokens_BTND, ramp)


def mean_weights(mask_BN: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights (B, N) that turn the mean over all tokens of a sample into the mean over those that count."""
    return mask_BN.to(dtype) * mask_BN.shape[1] / mask_BN.sum(1, keepdim=True).clamp(min=1)


def token_weights(mask_BN: Tensor, regularizer: Regularizer, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights (B, N) of the tokens in the separability loss, which is a mean for "mse" and a sum for "kl"."""
    return mean_weights(mask_BN, dtype) if regularizer == "mse" else mask_BN.to(dtype)


def window_weights(
    mask_BN: Tensor, grid: tuple[int, int], window: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weights (B, M) that turn the mean over a window into the mean over its tokens that count."""
    share_BM = pool_tokens(mask_BN[:, None, :, None].to(dtype), grid, window)[:, 0, :, 0]
    return torch.where(share_BM > 0, 1 / share_BM, 0)


def pool_tokens(tokens_BTND: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Average the tokens over windows: (B, T, h * w, D) -> (B, T, M, D).

    Rows at the bottom and columns at the right that do not fill a window are dropped.
    """
    if window == 1:
        return tokens_BTND
    height, width = grid[0] // window, grid[1] // window
    cells = tokens_BTND.unflatten(2, grid)[:, :, : height * window, : width * window]
    return cells.unflatten(3, (width, window)).unflatten(2, (height, window)).mean(dim=(3, 5)).flatten(2, 3)


def affinity_softmax(
    query_BMD: Tensor, key_BKD: Tensor, temperature: float, mask_BK: Tensor | None = None
) -> Tensor:
    """Compute softmax(query key^T / temperature) over the keys: (B, M, D), (B, K, D) -> (B, M, K).

    With a mask, the probabilities of the other keys are 0 (but equal for all if no key counts).
    """
    query, key = at_least_float32(query_BMD), at_least_float32(key_BKD)
    logits = query @ key.transpose(-1, -2) / temperature
    if mask_BK is not None:
        # Minus infinity would give NaN if no key counts.
        logits = logits.masked_fill(~mask_BK[:, None], torch.finfo(logits.dtype).min)
    return torch.softmax(logits, dim=-1)


def cycle_affinities(walk_BTMD: Tensor, temperature: float, mask_BM: Tensor | None = None) -> list[Tensor]:
    """Compute the T - 1 transition matrices (B, M, M) of a walk through the views in order."""
    return [affinity_softmax(*step, temperature, mask_BM) for step in pairwise(walk_BTMD.unbind(1))]


def return_probability(affinities: list[Tensor]) -> Tensor:
    """Compute the diagonal (B, M) of C = A_1 ... A_K, the probabilities that a walk ends where it began.

    C_ii = sum_j (A_1 ... A_{K-1})_ij (A_K)_ji, so the last matrix product is not needed.
    """
    if len(affinities) == 1:
        return affinities[0].diagonal(dim1=-2, dim2=-1)
    *there, back = affinities
    forward = reduce(torch.matmul, there)
    return (forward * back.transpose(-1, -2)).sum(-1)


def cycle_loss_from_diagonal(
    return_BM: Tensor, reduction: Reduction = "mean", mask_BM: Tensor | None = None
) -> Tensor:
    """Compute the mean cross-entropy of the logits log(C_i + 1e-6) against target i from C's diagonal (B, M).

    The mean is over the tokens that count and, for "mean", over samples. The rows of C sum to one, so the
    denominator of the softmax is 1 + M * 1e-6, where M is the number of tokens that count.
    """
    tokens = return_BM.shape[-1] if mask_BM is None else mask_BM.to(return_BM.dtype).sum(1, keepdim=True)
    entropy_BM = torch.log((return_BM + CYCLE_EPS) / (1.0 + tokens * CYCLE_EPS))
    if mask_BM is not None:
        entropy_BM = entropy_BM * mean_weights(mask_BM, return_BM.dtype)
    return -(entropy_BM.mean() if reduction == "mean" else entropy_BM.mean(1))


def cycle_consistency_loss(
    walk_BTMD: Tensor, temperature: float, reduction: Reduction = "mean", mask_BM: Tensor | None = None
) -> Tensor:
    """Compute the cycle consistency loss of a walk through T >= 2 views in the given order."""
    affinities = cycle_affinities(walk_BTMD, temperature, mask_BM)
    return cycle_loss_from_diagonal(return_probability(affinities), reduction, mask_BM)


def cycle_rows(affinities: list[Tensor]) -> Tensor:
    """Summarise each row of C = A_1 ... A_K: (3, B, M), without gradients.

    Returns whether its arg-max is the diagonal (1 or 0), its sum of squares, and its diagonal element.
    """
    # Detach instead of torch.no_grad: torch.export.save rejects a no_grad block whose result is unused.
    cycle_BMM = reduce(torch.matmul, [step.detach() for step in affinities])
    start = torch.arange(cycle_BMM.shape[-1], device=cycle_BMM.device)
    correct_BM = (cycle_BMM.argmax(-1) == start).to(cycle_BMM.dtype)
    return torch.stack((correct_BM, cycle_BMM.square().sum(-1), cycle_BMM.diagonal(dim1=-2, dim2=-1)))


def cycle_diagnostics(rows_3BM: Tensor, mask_BM: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute cycle accuracy and identity similarity (0-d) from the result of `cycle_rows`.

    Cycle accuracy is the share of rows of C whose arg-max is the diagonal. Identity similarity is the cosine
    similarity between C and the identity, both flattened over the whole batch. Both are over the tokens that
    count, and NaN if there is none.
    """
    if mask_BM is not None:
        rows_3BM = rows_3BM * mask_BM / mask_BM.to(rows_3BM.dtype).mean()
    accuracy, squares, diagonal = rows_3BM.mean((1, 2))
    return accuracy, diagonal * squares.rsqrt()


def separability_loss(
    frozen_BTND: Tensor,
    projected_BTND: Tensor,
    regularizer: Regularizer,
    reduction: Reduction,
    mask_BN: Tensor | None = None,
) -> Tensor:
    """Compute the separability loss of L2-normalised tokens.

    "kl" is KL(softmax(frozen) || softmax(projected)) over channels, summed over views, tokens and channels.
    "mse" is the mean squared difference. The losses of the samples are averaged for "mean".
    """
    if regularizer == "mse" and reduction == "mean" and mask_BN is None:
        # The gradient of the two operations below would be rounded differently.
        return functional.mse_loss(projected_BTND, frozen_BTND)
    if regularizer == "mse":
        terms = functional.mse_loss(projected_BTND, frozen_BTND, reduction="none")
    else:
        terms = functional.kl_div(projected_BTND.log_softmax(-1), frozen_BTND.softmax(-1), reduction="none")
    if mask_BN is not None:
        terms = terms * token_weights(mask_BN, regularizer, terms.dtype)[:, None, :, None]
    if regularizer == "mse":
        return terms.mean() if reduction == "mean" else terms.mean((1, 2, 3))
    return terms.sum() / terms.shape[0] if reduction == "mean" else terms.sum((1, 2, 3))


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
    mask_BN: Tensor | None = None,
) -> CosettleOutput:
    """Compute the complete objective; see `fasttrain_kernels.cosettle_loss`, which checks the arguments."""
    frozen, projected = unit(frozen_BTND.detach()), unit(projected_BTND)
    separability = separability_loss(frozen, projected, regularizer, reduction, mask_BN)
    exists_BM = None
    if mask_BN is None:
        pooled = pool_tokens(projected, grid, window)
    else:
        weights_BM = window_weights(mask_BN, grid, window, projected.dtype)
        exists_BM = weights_BM > 0
        pooled = pool_tokens(projected * mask_BN[:, None, :, None], grid, window)
        pooled = pooled * weights_BM[:, None, :, None]
    affinities = cycle_affinities(pooled, temperature, exists_BM)
    cycle = cycle_loss_from_diagonal(return_probability(affinities), reduction, exists_BM)
    rows = cycle_rows(affinities) if diagnostics else None
    accuracy, similarity = (None, None) if rows is None else cycle_diagnostics(rows, exists_BM)
    return CosettleOutput(cycle + lambda_reg * separability, cycle, separability, accuracy, similarity)
