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

Both numerators are bounded by M at any temperature, so half precision can represent them. A single kernel
handles up to 64 tokens per view, and the kernels of cycle_streaming.py handle more. Neither stores an M x M
matrix, not even for the diagnostics, which need all of C.

For other numbers of views, the transition matrices of affinity.py are stored and multiplied. Of the last
product, only the diagonal is computed.

Source: arXiv 2603.26597, section 3. The walk there and back through a clip is from Jabri et al., "Space-Time
Correspondence as a Contrastive Random Walk", NeurIPS 2020.

Shape suffixes: B samples, T views, M tokens of a view, D channels. Inside the kernel: I tokens of the first
or third view, J tokens of the second view, K channels of one loop iteration.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import reference
from .affinity import affinity_softmax
from .checks import check_number, check_tensors
from .cycle_streaming import launch_streaming
from .primitives import dot
from .reference import CYCLE_EPS
from .runtime import (
    Backend,
    differentiate,
    inline,
    jit,
    needs_grad,
    on_device,
    operator,
    tl,
    triton,
    use_triton,
)

MAX_FUSED_TOKENS = 64


@inline
def softmax(logits, exists, AXIS):
    """Softmax along AXIS over the entries that exist; the others are set to 0."""
    logits = tl.where(tl.expand_dims(exists, 1 - AXIS), logits, float("-inf"))
    weights = tl.exp(logits - tl.expand_dims(tl.max(logits, AXIS), AXIS))
    return weights / tl.expand_dims(tl.sum(weights, AXIS), AXIS)


@inline
def row_is_correct(cycle_IJ, BLOCK):
    """Return 1 for each row whose arg-max is the diagonal, else 0. Masked entries must be -1.

    Ties go to the first maximum, as in torch.argmax.
    """
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    diagonal = tl.sum(tl.where(row == column, cycle_IJ, 0.0), 1)[:, None]
    beaten = (cycle_IJ > diagonal) | ((cycle_IJ == diagonal) & (column < row))
    return tl.where(tl.max(beaten.to(tl.int32), 1) > 0, 0.0, 1.0)


@jit
def _cycle_kernel(
    walk_ptr,  # [B, 3, M, D]
    metrics_ptr,  # [4, B, M]: cross-entropy, whether the arg-max is the diagonal, sum of squares, diagonal
    grad_ptr,  # [B, 3, M, D], scaled by SCALE
    tokens, inverse_temperature,
    D: tl.constexpr, EPS: tl.constexpr, SCALE: tl.constexpr, GRAD: tl.constexpr, DIAGNOSTICS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, D_PER_PROGRAM: tl.constexpr, PARTS: tl.constexpr,
    VIEW_BY_VIEW: tl.constexpr,
):  # fmt: skip
    """Compute A and A', the metrics, and the gradient of a slice of channels.

    One program per (slice of channels, sample).
    """
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
    there_IJ = softmax(there_IJ * inverse_temperature, exists, 1)
    back_IJ = softmax(back_IJ * inverse_temperature, exists, 0)
    return_I = tl.sum(there_IJ * back_IJ, 1)

    if part == 0:
        # The average over rows is taken later: Triton 3.6 fails to compile a sum over rows here for sm_100.
        metrics = metrics_ptr + sample * tokens + row
        stride = tl.num_programs(0) // PARTS * tokens
        tl.store(metrics, tl.log(1.0 + tokens * EPS) - tl.log(return_I + EPS), mask=exists)
        if DIAGNOSTICS:
            tl.store(metrics + 3 * stride, return_I, mask=exists)
            # Columns beyond the last token must not be the arg-max. Rows beyond it are not stored.
            zero_II = tl.zeros([BLOCK_M, BLOCK_M], dtype=tl.float32)
            cycle_II = dot(there_IJ, tl.trans(back_IJ), zero_II)
            cycle_II = tl.where(exists[None, :], cycle_II, 0.0)
            tl.store(metrics + 2 * stride, tl.sum(cycle_II * cycle_II, 1), mask=exists)
            correct_I = row_is_correct(tl.where(exists[None, :], cycle_II, -1.0), BLOCK_M)
            tl.store(metrics + stride, correct_I, mask=exists)

    if GRAD:
        through_IJ = there_IJ * back_IJ / (return_I + EPS)[:, None]
        back_IJ = (back_IJ * tl.sum(through_IJ, 0)[None, :] - through_IJ) * SCALE
        there_IJ = (there_IJ * (return_I / (return_I + EPS))[:, None] - through_IJ) * SCALE
        there = there_IJ.to(walk_ptr.dtype.element_ty)
        back = back_IJ.to(walk_ptr.dtype.element_ty)
        grad_base = grad_ptr + sample * 3 * tokens * D
        element = grad_ptr.dtype.element_ty
        # For float32, process one view at a time to leave registers for the operands of the three tf32
        # products. The second view, which needs the most registers, comes first.
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


def grad_scale(tokens: int) -> float:
    """Factor s such that the cycle kernels store the gradient times s tau B M.

    The gradient times tau B M is at most 4 M times the largest component of a token. For components up to
    one, the stored values are at most 16384, so that none overflows in fp16 and few underflow.
    """
    return 4096.0 / triton.next_power_of_2(tokens)


def launch_cycle(
    walk_B3MD: Tensor, temperature: float, *, grad_dtype: torch.dtype | None, diagnostics: bool
) -> tuple[Tensor, Tensor]:
    """Run the cycle kernels on three contiguous views.

    Returns four metrics of each row of C, (4, B, M) in fp32, and the gradient (B, 3, M, D). The metrics
    are the cross-entropy and, with `diagnostics`, whether the arg-max is the diagonal (1 or 0), the sum
    of squares, and the diagonal. The gradient is that of the mean cross-entropy, times grad_scale(M) tau
    B M. Without `grad_dtype` it is empty.
    """
    samples, _, tokens, channels = walk_B3MD.shape
    metrics_4BM = walk_B3MD.new_empty((4, samples, tokens), dtype=torch.float32)
    grad_B3MD = walk_B3MD.new_empty(walk_B3MD.shape if grad_dtype else (0,), dtype=grad_dtype)
    scale = grad_scale(tokens)
    if tokens > MAX_FUSED_TOKENS:
        launch_streaming(walk_B3MD, temperature, metrics_4BM, grad_B3MD, scale, diagnostics)
        return metrics_4BM, grad_B3MD
    block = max(triton.next_power_of_2(tokens), 16)
    half = walk_B3MD.element_size() == 2
    block_channels = min(max(triton.next_power_of_2(channels), 16), 64 if half else 16)
    # Diagnostics get a separate launch, since registers cannot hold them together with the gradient.
    launches = [(True, False)] if grad_dtype else []
    if diagnostics or not grad_dtype:
        launches.append((False, diagnostics))
    with on_device(walk_B3MD):
        for grad, with_diagnostics in launches:
            # At a batch of 128, one program per sample would leave each multiprocessor with a single program.
            # Two programs hide each other's loads.
            parts = 2 if grad and channels > block_channels else 1
            _cycle_kernel[(parts * samples,)](
                walk_B3MD, metrics_4BM, grad_B3MD, tokens, 1.0 / temperature,
                D=channels, EPS=CYCLE_EPS, SCALE=scale, GRAD=grad, DIAGNOSTICS=with_diagnostics,
                BLOCK_M=block, BLOCK_D=block_channels, PARTS=parts, VIEW_BY_VIEW=not half,
                D_PER_PROGRAM=block_channels * triton.cdiv(channels, parts * block_channels),
                num_warps=4 if half else 8, num_stages=3 if half else 2, enable_fp_fusion=True,
            )  # fmt: skip
    return metrics_4BM, grad_B3MD


def _three_views(walk: Tensor, temperature: float, keep: bool) -> tuple[Tensor, Tensor]:
    """Compute the loss (0-d) and, with `keep`, its gradient with respect to the walk, both in fp32."""
    rows = walk.shape[0] * walk.shape[2]
    metrics_4BM, grad_walk = launch_cycle(
        walk.contiguous(), temperature, grad_dtype=torch.float32 if keep else None, diagnostics=False
    )
    return metrics_4BM[0].mean(), grad_walk.div_(grad_scale(walk.shape[2]) * temperature * rows)


def _scaled_gradient(grad: Tensor, loss: Tensor, grad_walk: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply the gradient of the walk by the incoming gradient of the loss.

    The argument `loss` is unused, but it depends on the walk. A second derivative therefore raises an error.
    """
    return (grad * grad_walk).to(dtype)


_cycle_three_views = operator(
    "cycle_three_views",
    _three_views,
    fake=lambda walk, temperature, keep: (
        walk.new_empty((), dtype=torch.float32),
        walk.new_empty(walk.shape, dtype=torch.float32) if keep else walk.new_empty(0),
    ),
)
_cycle_three_views_backward = operator(
    "cycle_three_views_backward",
    _scaled_gradient,
    fake=lambda grad, loss, grad_walk, dtype: grad_walk.new_empty(grad_walk.shape, dtype=dtype),
)


def _save(inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Any]]:
    walk, _temperature, _keep = inputs
    return output, (walk.dtype,)


differentiate(_cycle_three_views, lambda *args: (_cycle_three_views_backward(*args),), losses=1, save=_save)


def cycle_consistency_loss(
    walk: Tensor, temperature: float = 0.03, there_and_back: bool = False, backend: Backend = "auto"
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
            and the tensors are on an NVIDIA GPU of compute capability 8.0 or higher and not in float64.

    Returns:
        The mean over tokens and samples as a 0-d tensor, in float32 or (for float64 tokens) float64.

    Raises:
        ValueError: If an argument has an invalid shape, dtype, device or value, or one that
            `backend="triton"` does not support.
    """
    check_tensors(walk=(walk, "BTMD"))
    if walk.shape[1] < 2:
        raise ValueError(f"walk must have at least 2 views in dimension 1, got shape {tuple(walk.shape)}")
    check_number("temperature", temperature)
    if there_and_back:
        walk = torch.cat([walk, walk[:, :-1].flip(1)], dim=1)
    if not use_triton(backend, walk=walk):
        return reference.cycle_consistency_loss(walk, temperature)
    if walk.shape[1] == 3:
        loss: Tensor = _cycle_three_views(walk, temperature, needs_grad(walk))[0]
        return loss
    steps = [affinity_softmax(*step, temperature, backend) for step in pairwise(walk.unbind(1))]
    return reference.cycle_loss_from_diagonal(reference.return_probability(steps))
