"""Cycle consistency of a walk through any number of views, with a fused kernel for three views.

    A_k = softmax(p_k p_{k+1}^T / tau),  C = A_1 A_2 ... A_{T-1}
    loss = mean over tokens i of  log(1 + M e) - log(C_ii + e),  e = 1e-6

Here p_k are the tokens of view k. The loss is the cross-entropy of the logits log(C_i + e) against target i,
where C_i is row i of C. As the rows of C sum to one, the normaliser of the softmax is the constant 1 + M e.

For three views, as in Co-Settle, the loss needs only the diagonal of C. With A = A_1 and A' = A_2,

    C_ii = sum_j A_ij A'_ji

The gradient is computed in the forward pass, while A and A' are still in registers. Let w_ij = A_ij A'_ji /
(C_ii + e), which is (up to e) the probability that a walk from i back to i passes through j, and
W_j = sum_i w_ij. Then

    dloss / d(p1_i . p2_j) = (A_ij C_ii / (C_ii + e) - w_ij) / (tau B M)
    dloss / d(p2_j . p3_i) = (A'_ji W_j - w_ij) / (tau B M)

Both numerators are bounded by M at any temperature, so half precision can represent them. For up to 64 tokens
per view in half precision, a single kernel keeps all M x M matrices in registers. Otherwise, the kernels of
cycle_streaming.py store two of them, for a few samples at a time.

With a mask, only the tokens that count exist, and M is their number in a sample. The loss and its gradient
are multiplied by weights that turn the mean over all tokens into one over these (`reference.mean_weights`).

For other numbers of views, PyTorch computes the transition matrices and their product, of which only the
diagonal is needed.

Source: arXiv 2603.26597, section 3. The walk there and back through a clip is from Jabri et al., "Space-Time
Correspondence as a Contrastive Random Walk", NeurIPS 2020.

Shape suffixes: B samples, T views, M tokens of a view, D channels. Inside the kernel: I tokens of the first
or third view, J tokens of the second view, K channels of one loop iteration.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .checks import check_choice, check_mask, check_number, check_tensors
from .cycle_streaming import cross_entropy, launch_streaming, token_exists
from .primitives import dot, drop_logits
from .reference import CYCLE_EPS, Reduction
from .runtime import (
    Backend,
    ceil_div,
    differentiate,
    inline,
    jit,
    needs_grad,
    next_power_of_2,
    on_device,
    operator,
    tl,
    use_triton,
)

MAX_FUSED_TOKENS = 64


@inline
def softmax(logits, exists, AXIS):
    """Softmax along AXIS over the entries that exist; the others are set to 0."""
    logits = drop_logits(logits, tl.expand_dims(exists, 1 - AXIS))
    weights = tl.exp(logits - tl.expand_dims(tl.max(logits, AXIS), AXIS))
    return weights / tl.expand_dims(tl.sum(weights, AXIS), AXIS)


@jit
def _cycle_kernel(
    walk_ptr,  # [B, 3, M, D], in half precision
    weights_ptr,  # [B, M]; may be None
    loss_ptr,  # [B, M]
    grad_ptr,  # [B, 3, M, D], scaled by SCALE
    tokens, inverse_temperature,
    D: tl.constexpr, EPS: tl.constexpr, SCALE: tl.constexpr, GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, D_PER_PROGRAM: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Compute A and A', the loss of each token, and the gradient of a slice of channels.

    One program per (slice of channels, sample).
    """
    part = tl.program_id(0) % PARTS
    sample = (tl.program_id(0) // PARTS).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    inside = row < tokens
    exists = token_exists(weights_ptr, sample, row, tokens)
    step = tl.arange(0, BLOCK_D)
    first_ptr = walk_ptr + sample * 3 * tokens * D
    second_ptr = first_ptr + tokens * D
    third_ptr = second_ptr + tokens * D

    there_IJ = tl.zeros([BLOCK_M, BLOCK_M], dtype=tl.float32)
    back_IJ = tl.zeros([BLOCK_M, BLOCK_M], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        offsets = row[:, None] * D + start + step[None, :]
        mask = inside[:, None] & (start + step < D)[None, :]
        first_IK = tl.load(first_ptr + offsets, mask=mask, other=0.0)
        second_JK = tl.load(second_ptr + offsets, mask=mask, other=0.0)
        third_IK = tl.load(third_ptr + offsets, mask=mask, other=0.0)
        there_IJ = dot(first_IK, tl.trans(second_JK), there_IJ)
        back_IJ = dot(third_IK, tl.trans(second_JK), back_IJ)
    there_IJ = softmax(there_IJ * inverse_temperature, exists, 1)
    back_IJ = softmax(back_IJ * inverse_temperature, exists, 0)
    return_I = tl.sum(there_IJ * back_IJ, 1)

    if part == 0:
        # The average over rows is taken later: Triton 3.6 fails to compile a sum over rows here for sm_100.
        loss_I = cross_entropy(return_I, weights_ptr, sample, row, tokens, EPS)
        tl.store(loss_ptr + sample * tokens + row, loss_I, mask=inside)

    if GRAD:
        through_IJ = there_IJ * back_IJ / (return_I + EPS)[:, None]
        back_IJ = (back_IJ * tl.sum(through_IJ, 0)[None, :] - through_IJ) * SCALE
        there_IJ = (there_IJ * (return_I / (return_I + EPS))[:, None] - through_IJ) * SCALE
        element = walk_ptr.dtype.element_ty
        there = there_IJ.to(element)
        back = back_IJ.to(element)
        grad_base = grad_ptr + sample * 3 * tokens * D
        for start in range(part * D_PER_PROGRAM, min(D, (part + 1) * D_PER_PROGRAM), BLOCK_D):
            offsets = row[:, None] * D + start + step[None, :]
            mask = inside[:, None] & (start + step < D)[None, :]
            # The order of loads and products keeps few registers in use.
            zero_IK = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
            first_IK = tl.load(first_ptr + offsets, mask=mask, other=0.0)
            third_IK = tl.load(third_ptr + offsets, mask=mask, other=0.0)
            grad_second_JK = dot(tl.trans(there), first_IK, zero_IK)
            grad_second_JK = dot(tl.trans(back), third_IK, grad_second_JK)
            tl.store(grad_base + tokens * D + offsets, grad_second_JK.to(element), mask=mask)
            second_JK = tl.load(second_ptr + offsets, mask=mask, other=0.0)
            grad_first_IK = dot(there, second_JK, zero_IK)
            tl.store(grad_base + offsets, grad_first_IK.to(element), mask=mask)
            grad_third_IK = dot(back, second_JK, zero_IK)
            tl.store(grad_base + 2 * tokens * D + offsets, grad_third_IK.to(element), mask=mask)


def grad_scale(tokens: int) -> float:
    """Factor s such that the cycle kernels store the gradient times s tau B M.

    The gradient times tau B M is at most 4 M times the largest component of a token. For components up to
    one, the stored values are at most 16384, so that none overflows in fp16 and few underflow.
    """
    return 4096.0 / next_power_of_2(tokens)


def launch_cycle(
    walk_B3MD: Tensor, weights_BM: Tensor | None, temperature: float, *, grad: bool
) -> tuple[Tensor, Tensor]:
    """Run the cycle kernels on three contiguous views.

    Returns the cross-entropy of each row of C times its weight, (B, M) in fp32, and the gradient of the mean
    cross-entropy times grad_scale(M) tau B M, without the weights, (B, 3, M, D) in the dtype of the walk.
    Without `grad` it is empty. With weights, tokens that do not exist must be finite.
    """
    weights_BM = None if weights_BM is None else weights_BM.contiguous()
    samples, _, tokens, channels = walk_B3MD.shape
    loss_BM = walk_B3MD.new_empty((samples, tokens), dtype=torch.float32)
    grad_B3MD = walk_B3MD.new_empty(walk_B3MD.shape if grad else (0,))
    scale = grad_scale(tokens)
    if tokens > MAX_FUSED_TOKENS or walk_B3MD.dtype == torch.float32:
        launch_streaming(walk_B3MD, weights_BM, temperature, loss_BM, grad_B3MD, scale)
        return loss_BM, grad_B3MD
    block_channels = min(max(next_power_of_2(channels), 16), 64)
    # At a batch of 128, one program per sample would leave each multiprocessor with a single program. Two
    # programs hide each other's loads.
    parts = 2 if grad and channels > block_channels else 1
    with on_device(walk_B3MD):
        _cycle_kernel[(parts * samples,)](
            walk_B3MD, weights_BM, loss_BM, grad_B3MD, tokens, 1.0 / temperature,
            D=channels, EPS=CYCLE_EPS, SCALE=scale, GRAD=grad,
            BLOCK_M=max(next_power_of_2(tokens), 16), BLOCK_D=block_channels, PARTS=parts,
            D_PER_PROGRAM=block_channels * ceil_div(channels, parts * block_channels),
            num_warps=4, num_stages=3, enable_fp_fusion=True,
        )  # fmt: skip
    return loss_BM, grad_B3MD


def _three_views(
    walk: Tensor, weights: Tensor | None, temperature: float, per_sample: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """Compute the loss (0-d or (B,), fp32) and, with `keep`, its scaled gradient (see `launch_cycle`)."""
    loss_BM, grad_walk = launch_cycle(walk.contiguous(), weights, temperature, grad=keep)
    return loss_BM.mean(1) if per_sample else loss_BM.mean(), grad_walk


def _three_views_backward(
    grad: Tensor,
    loss: Tensor,
    grad_walk: Tensor,
    weights: Tensor | None,
    temperature: float,
    per_sample: bool,
) -> Tensor:
    """Multiply the scaled gradient of the walk by the incoming gradient of the loss.

    The argument `loss` is unused, but it depends on the walk. A second derivative therefore raises an error.
    """
    samples, _, tokens, _ = grad_walk.shape
    grad = grad / (grad_scale(tokens) * temperature * tokens * (1 if per_sample else samples))
    grad = grad.view(-1, 1, 1, 1)
    if weights is not None:
        grad = grad * weights[:, None, :, None]
    # In half precision, the factor alone could underflow: only the product is rounded.
    return torch.mul(grad_walk, grad, out=torch.empty_like(grad_walk))


_cycle_three_views = operator(
    "cycle_three_views",
    _three_views,
    fake=lambda walk, weights, temperature, per_sample, keep: (
        walk.new_empty(walk.shape[: int(per_sample)], dtype=torch.float32),
        walk.new_empty(walk.shape if keep else (0,)),
    ),
)
_cycle_three_views_backward = operator(
    "cycle_three_views_backward",
    _three_views_backward,
    fake=lambda grad, loss, grad_walk, *_: grad_walk.new_empty(grad_walk.shape),
)


def _save(
    inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    _walk, weights, *options, _keep = inputs
    return (*output, weights), tuple(options)


differentiate(_cycle_three_views, lambda *args: (_cycle_three_views_backward(*args),), losses=1, save=_save)


def cycle_consistency_loss(
    walk: Tensor,
    temperature: float = 0.03,
    there_and_back: bool = False,
    backend: Backend = "auto",
    *,
    reduction: Reduction = "mean",
    mask: Tensor | None = None,
) -> Tensor:
    """Compute the cross-entropy of a random walk through the views that should end where it began.

    With the transition probabilities A_k = softmax(p_k p_{k+1}^T / temperature) from the tokens of view k to
    those of view k + 1 and C = A_1 ... A_{T-1}, the loss is the mean over tokens i of
    log(1 + M e) - log(C_ii + e), where e = 1e-6 (arXiv 2603.26597, section 3).

    Args:
        walk: (B, T, M, D) tokens of T >= 2 views in the order of the walk, in float16, bfloat16, float32 or
            (eager only) float64. Normalise and pool the tokens first. The walk of Co-Settle visits frame 1,
            frame 2, and frame 1 with asymmetric positions.
        temperature: Temperature of the transition probabilities, greater than 0.
        there_and_back: Whether the walk returns from the last view through the others to the first, which
            makes 2 T - 2 transitions in total.
        backend: `"triton"`, `"eager"` (plain PyTorch), or `"auto"`, which selects Triton if it is installed
            and the tensors are on an NVIDIA GPU of compute capability 8.0 or higher and not in float64. The
            kernels are for walks that visit three views; PyTorch computes all others.
        reduction: `"mean"` averages the losses of the samples; `"none"` returns one loss per sample.
        mask: (B, M) bool, True for the tokens that count, in all views. The walk neither starts at the others
            nor visits them. They have no effect, whatever they contain, and receive zero gradients. The loss
            of a sample is the mean over the tokens that count, with their number as M, and 0 if there is
            none.

    Returns:
        The mean over tokens and samples as a 0-d tensor or, for `reduction="none"`, the mean over tokens
        (B,), in float32 or (for float64 tokens) float64.

    Raises:
        ValueError: If an argument has an invalid shape, dtype, device or value, or one that
            `backend="triton"` does not support.
    """
    check_tensors(walk=(walk, "BTMD"))
    if walk.shape[1] < 2:
        raise ValueError(f"walk must have at least 2 views in dimension 1, got shape {tuple(walk.shape)}")
    check_number("temperature", temperature)
    check_choice("reduction", reduction, Reduction)
    check_mask(mask, "walk", walk)
    if mask is not None:
        walk = reference.fill_masked(walk, mask)
    if there_and_back:
        walk = torch.cat([walk, walk[:, :-1].flip(1)], dim=1)
    if use_triton(backend, walk=walk) and walk.shape[1] == 3:
        weights = None if mask is None else reference.mean_weights(mask)
        options = (temperature, reduction == "none", needs_grad(walk))
        loss: Tensor = _cycle_three_views(walk, weights, *options)[0]
        return loss
    return reference.cycle_consistency_loss(walk, temperature, reduction, mask)
