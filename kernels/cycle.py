"""Cycle consistency of a walk over three views of up to 64 tokens: loss and gradient in one launch.

With p1, p2, p3 the tokens of frame 1, frame 2 and frame 1 again, tau the temperature and e = 1e-6:

    A_ij = softmax_j(p1_i . p2_j / tau),  A'_ji = softmax_i(p2_j . p3_i / tau)
    C_ii = sum_j A_ij A'_ji
    loss = mean_i  log(1 + M e) - log(C_ii + e)              since the rows of C = A A' sum to one

The loss is a scalar, so its gradient is formed while A and A' are at hand. With w_ij = A_ij A'_ji / (C_ii +
e), the probability that a walk from i back to i went through j, and W_j = sum_i w_ij:

    dloss / d(p1_i . p2_j) = (A_ij C_ii / (C_ii + e) - w_ij) / (tau B M)
    dloss / d(p2_j . p3_i) = (A'_ji W_j - w_ij) / (tau B M)

Both brackets are bounded by M, whatever the temperature, so half precision holds them. C itself is formed for
the diagnostics alone. Nothing of size M x M leaves the program that owns the sample; cycle_streaming.py takes
over beyond 64 tokens.

Source: arXiv 2603.26597, section 3; Jabri et al., NeurIPS 2020.

Shape suffixes: B samples, M tokens of a view, D channels; inside the kernel I tokens of frame 1 (either
time), J tokens of frame 2, K channels of one step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import CYCLE_EPS
from .runtime import inline, jit, on_device, tl, triton
from .tiles import dot

MAX_FUSED_TOKENS = 64


def grad_scale(tokens: int) -> float:
    """Gradients leave the cycle kernels as this many times (tau B M) their value.

    The largest is at most 4 M times a token's component, so that fp16 holds it for components up to one, and
    keeps as much as can be of the small ones.
    """
    return 4096.0 / triton.next_power_of_2(tokens)


class CycleResult(NamedTuple):
    """What the cycle kernels return.

    `figures` (4, B, M) in fp32, a number per row of C: cross-entropy, 1 where the arg-max is the diagonal,
    sum of the squares, diagonal; (1, B, M) without diagnostics. `grad` (B, 3, M, D): the gradient of the mean
    cross-entropy, times grad_scale(M) x tau x B x M; or empty.
    """

    figures: Tensor
    grad: Tensor


@inline
def softmax_rows(logits_IJ: tl.tensor, column_exists: tl.tensor) -> tl.tensor:
    """Softmax over the existing columns; the others get 0."""
    logits_IJ = tl.where(column_exists[None, :], logits_IJ, float("-inf"))
    weights_IJ = tl.exp(logits_IJ - tl.max(logits_IJ, 1)[:, None])
    return weights_IJ / tl.sum(weights_IJ, 1)[:, None]


@inline
def softmax_columns(logits_IJ: tl.tensor, row_exists: tl.tensor) -> tl.tensor:
    """Softmax over the existing rows; the others get 0."""
    logits_IJ = tl.where(row_exists[:, None], logits_IJ, float("-inf"))
    weights_IJ = tl.exp(logits_IJ - tl.max(logits_IJ, 0)[None, :])
    return weights_IJ / tl.sum(weights_IJ, 0)[None, :]


@inline
def row_is_correct(cycle_IJ: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Per row 1 where the first of its largest entries is the diagonal, else 0; masked entries must be -1."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    diagonal = tl.sum(tl.where(row == column, cycle_IJ, 0.0), 1)[:, None]
    beaten = (cycle_IJ > diagonal) | ((cycle_IJ == diagonal) & (column < row))
    return tl.where(tl.max(beaten.to(tl.int32), 1) > 0, 0.0, 1.0)


@jit
def _cycle_kernel(
    walk_ptr: tl.tensor,
    figures_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    tokens: tl.tensor,
    inverse_temperature: tl.tensor,
    D: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    GRAD: tl.constexpr,
    DIAGNOSTICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    D_PER_PROGRAM: tl.constexpr,
    PARTS: tl.constexpr,
    VIEW_BY_VIEW: tl.constexpr,
) -> None:
    """One program per (slice of channels, sample): forms A and A', and the gradient of its own channels."""
    part = tl.program_id(0) % PARTS
    sample = (tl.program_id(0) // PARTS).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    exists = row < tokens
    step = tl.arange(0, BLOCK_D)
    first_ptr = walk_ptr + sample * 3 * tokens * D
    second_ptr = first_ptr + tokens * D
    third_ptr = second_ptr + tokens * D

    there_IJ = tl.zeros([BLOCK_M, BLOCK_M], dtype=tl.float32)
    back_IJ = tl.zeros([BLOCK_M, BLOCK_M], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        offsets = row[:, None] * D + start + step[None, :]
        mask = exists[:, None] & (start + step < D)[None, :]
        first_IK = tl.load(first_ptr + offsets, mask=mask, other=0.0)
        second_JK = tl.load(second_ptr + offsets, mask=mask, other=0.0)
        third_IK = tl.load(third_ptr + offsets, mask=mask, other=0.0)
        there_IJ = dot(first_IK, tl.trans(second_JK), there_IJ)
        back_IJ = dot(third_IK, tl.trans(second_JK), back_IJ)
    there_IJ = softmax_rows(there_IJ * inverse_temperature, exists)
    back_IJ = softmax_columns(back_IJ * inverse_temperature, exists)
    return_I = tl.sum(there_IJ * back_IJ, 1)

    if part == 0:
        # A number a row, averaged afterwards: Triton 3.6 fails for sm_100 where they are summed here.
        figures = figures_ptr + sample * tokens + row
        stride = tl.num_programs(0) // PARTS * tokens
        tl.store(figures, tl.log(1.0 + tokens * EPS) - tl.log(return_I + EPS), mask=exists)
        if DIAGNOSTICS:
            tl.store(figures + 3 * stride, return_I, mask=exists)
            # Rows beyond the last token hold a softmax of zeros; columns beyond it must never be the arg-max.
            zero_II = tl.zeros([BLOCK_M, BLOCK_M], dtype=tl.float32)
            cycle_II = dot(there_IJ, tl.trans(back_IJ), zero_II)
            cycle_II = tl.where(exists[None, :], cycle_II, 0.0)
            tl.store(figures + 2 * stride, tl.sum(cycle_II * cycle_II, 1), mask=exists)
            correct_I = row_is_correct(tl.where(exists[None, :], cycle_II, -1.0), BLOCK_M)
            tl.store(figures + stride, correct_I, mask=exists)

    if GRAD:
        through_IJ = there_IJ * back_IJ / (return_I + EPS)[:, None]
        back_IJ = (back_IJ * tl.sum(through_IJ, 0)[None, :] - through_IJ) * SCALE
        there_IJ = (there_IJ * (return_I / (return_I + EPS))[:, None] - through_IJ) * SCALE
        there = there_IJ.to(walk_ptr.dtype.element_ty)
        back = back_IJ.to(walk_ptr.dtype.element_ty)
        grad_base = grad_ptr + sample * 3 * tokens * D
        element = grad_ptr.dtype.element_ty
        # One view at a time leaves the registers to the operands of three tf32 products; the second first,
        # which takes the most.
        for view in tl.static_range(3 if VIEW_BY_VIEW else 1):
            for start in range(part * D_PER_PROGRAM, min(D, (part + 1) * D_PER_PROGRAM), BLOCK_D):
                offsets = row[:, None] * D + start + step[None, :]
                mask = exists[:, None] & (start + step < D)[None, :]
                zero_IK = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
                if not VIEW_BY_VIEW or view == 0:
                    first_IK = tl.load(first_ptr + offsets, mask=mask, other=0.0)
                    third_IK = tl.load(third_ptr + offsets, mask=mask, other=0.0)
                    grad_second_JK = dot(tl.trans(there), first_IK, zero_IK)
                    grad_second_JK = dot(tl.trans(back), third_IK, grad_second_JK)
                    tl.store(grad_base + tokens * D + offsets, grad_second_JK.to(element), mask=mask)
                if not VIEW_BY_VIEW or view > 0:
                    second_JK = tl.load(second_ptr + offsets, mask=mask, other=0.0)
                if not VIEW_BY_VIEW or view == 1:
                    grad_first_IK = dot(there, second_JK, zero_IK)
                    tl.store(grad_base + offsets, grad_first_IK.to(element), mask=mask)
                if not VIEW_BY_VIEW or view == 2:
                    grad_third_IK = dot(back, second_JK, zero_IK)
                    tl.store(grad_base + 2 * tokens * D + offsets, grad_third_IK.to(element), mask=mask)


def launch_cycle(
    walk_B3MD: Tensor, temperature: float, *, grad_dtype: torch.dtype | None, diagnostics: bool
) -> CycleResult:
    """Loss, diagnostics and, with a `grad_dtype`, the gradient of contiguous views (B, 3, M, D), M <= 64."""
    samples, _, tokens, channels = walk_B3MD.shape
    figures_FBM = walk_B3MD.new_empty((4 if diagnostics else 1, samples, tokens), dtype=torch.float32)
    grad_shape = walk_B3MD.shape if grad_dtype else (0,)
    grad_B3MD = torch.empty(grad_shape, device=walk_B3MD.device, dtype=grad_dtype or walk_B3MD.dtype)
    block = max(triton.next_power_of_2(tokens), 16)
    half = walk_B3MD.element_size() == 2
    block_channels = min(max(triton.next_power_of_2(channels), 16), 64 if half else 16)
    # Diagnostics are a launch of their own: together with the gradient they would not fit into registers.
    launches = [(grad_dtype is not None, False)] if grad_dtype or not diagnostics else []
    if diagnostics:
        launches.append((False, True))
    with on_device(walk_B3MD):
        for grad, measures in launches:
            # Two programs a sample hide each other's loads: a batch of 128 leaves one to a multiprocessor.
            parts = 2 if grad and channels > block_channels else 1
            _cycle_kernel[(parts * samples,)](
                walk_B3MD,
                figures_FBM,
                grad_B3MD,
                tokens,
                1.0 / temperature,
                D=channels,
                EPS=CYCLE_EPS,
                SCALE=grad_scale(tokens),
                GRAD=grad,
                DIAGNOSTICS=measures,
                BLOCK_M=block,
                BLOCK_D=block_channels,
                D_PER_PROGRAM=block_channels * triton.cdiv(channels, parts * block_channels),
                PARTS=parts,
                VIEW_BY_VIEW=not half,
                num_warps=4 if half else 8,
                num_stages=3 if half else 2,
                enable_fp_fusion=True,
            )
    return CycleResult(figures_FBM, grad_B3MD)
