"""Cycle consistency of a walk over three views of any size, in memory linear in their number of tokens M.

The maths of cycle.py, in tiles of 64 x 64 logits (fp32: 32 x 32) that each kernel recomputes from the
tokens. What goes from one kernel to the next is one number a token:

    1. back normaliser   L'_j = log sum_i exp(p2_j . p3_i / tau)
    2. return            L_i  = log sum_j exp(p1_i . p2_j / tau),  C_ii = sum_j exp(s_ij - L_i + t_ij - L'_j)
    3. through           W_j  = sum_i w_ij
    4. gradient of p1 and p3, a sum over j;  5. of p2, a sum over i;  6. diagnostics, tiles of C itself

with s and t the logits there and back. Step 2 keeps a running maximum, as FlashAttention does (Dao et al.,
2022, arXiv 2205.14135).

Shape suffixes: B samples, M tokens of a view, D channels; inside the kernels I tokens of frame 1 (either
time), J tokens of frame 2, K channels of one step, O channels of the gradient. Logarithms are to base 2
there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cycle import MAX_FUSED_TOKENS, CycleResult, grad_scale, launch_cycle
from .elementary import LOG2_E, exp2
from .reference import CYCLE_EPS
from .runtime import compute_capability, inline, jit, on_device, tl, triton
from .tiles import dot, load_tokens, logits_tile, own_block


@inline
def _transitions(
    first_ptr: tl.tensor,
    second_ptr: tl.tensor,
    third_ptr: tl.tensor,
    there_ptr: tl.tensor,
    back_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    tokens: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Tiles of A_ij and A'_ji, both [I, J], from the normalisers; 0 beyond the last token."""
    exists = (rows < tokens)[:, None] & (columns < tokens)[None, :]
    normaliser_I = tl.load(there_ptr + rows, mask=rows < tokens, other=0.0)
    there_IJ = logits_tile(first_ptr, second_ptr, rows, columns, tokens, tokens, scale, D, BLOCK, BLOCK_K)
    there_IJ = tl.where(exists, exp2(there_IJ - normaliser_I[:, None]), 0.0)
    normaliser_J = tl.load(back_ptr + columns, mask=columns < tokens, other=0.0)
    back_IJ = logits_tile(third_ptr, second_ptr, rows, columns, tokens, tokens, scale, D, BLOCK, BLOCK_K)
    return there_IJ, tl.where(exists, exp2(back_IJ - normaliser_J[None, :]), 0.0)


@jit
def _back_normaliser_kernel(
    walk_ptr: tl.tensor,
    back_ptr: tl.tensor,
    tokens: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Step 1, one program per (block of j, sample)."""
    sample, columns = own_block(tl.cdiv(tokens, BLOCK), BLOCK)
    second_ptr = walk_ptr + (sample * 3 + 1) * tokens * D
    third_ptr = second_ptr + tokens * D
    largest_J = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    total_J = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        back_IJ = logits_tile(third_ptr, second_ptr, rows, columns, tokens, tokens, scale, D, BLOCK, BLOCK_K)
        back_IJ = tl.where((rows < tokens)[:, None], back_IJ, float("-inf"))
        larger_J = tl.maximum(largest_J, tl.max(back_IJ, 0))
        total_J = total_J * exp2(largest_J - larger_J) + tl.sum(exp2(back_IJ - larger_J[None, :]), 0)
        largest_J = larger_J
    tl.store(back_ptr + sample * tokens + columns, largest_J + tl.log2(total_J), mask=columns < tokens)


@jit
def _return_kernel(
    walk_ptr: tl.tensor,
    back_ptr: tl.tensor,
    there_ptr: tl.tensor,
    return_ptr: tl.tensor,
    loss_ptr: tl.tensor,
    tokens: tl.tensor,
    scale: tl.tensor,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Step 2, one program per (block of i, sample)."""
    sample, rows = own_block(tl.cdiv(tokens, BLOCK), BLOCK)
    first_ptr = walk_ptr + sample * 3 * tokens * D
    second_ptr = first_ptr + tokens * D
    third_ptr = second_ptr + tokens * D
    largest_I = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    total_I = tl.zeros([BLOCK], dtype=tl.float32)
    return_I = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        exists = (columns < tokens)[None, :]
        there_IJ = logits_tile(first_ptr, second_ptr, rows, columns, tokens, tokens, scale, D, BLOCK, BLOCK_K)
        there_IJ = tl.where(exists, there_IJ, float("-inf"))
        back_IJ = logits_tile(third_ptr, second_ptr, rows, columns, tokens, tokens, scale, D, BLOCK, BLOCK_K)
        normaliser_J = tl.load(back_ptr + sample * tokens + columns, mask=columns < tokens, other=0.0)
        larger_I = tl.maximum(largest_I, tl.max(there_IJ, 1))
        shrink_I = exp2(largest_I - larger_I)
        weight_IJ = exp2(there_IJ - larger_I[:, None])
        total_I = total_I * shrink_I + tl.sum(weight_IJ, 1)
        arrived_IJ = tl.where(exists, weight_IJ * exp2(back_IJ - normaliser_J[None, :]), 0.0)
        return_I = return_I * shrink_I + tl.sum(arrived_IJ, 1)
        largest_I = larger_I
    tl.store(there_ptr + sample * tokens + rows, largest_I + tl.log2(total_I), mask=rows < tokens)
    return_I /= total_I
    tl.store(return_ptr + sample * tokens + rows, return_I, mask=rows < tokens)
    loss_I = tl.log(1.0 + tokens * EPS) - tl.log(return_I + EPS)
    tl.store(loss_ptr + sample * tokens + rows, loss_I, mask=rows < tokens)


@jit
def _through_kernel(
    walk_ptr: tl.tensor,
    there_ptr: tl.tensor,
    back_ptr: tl.tensor,
    return_ptr: tl.tensor,
    through_ptr: tl.tensor,
    tokens: tl.tensor,
    scale: tl.tensor,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Step 3, one program per (block of j, sample)."""
    sample, columns = own_block(tl.cdiv(tokens, BLOCK), BLOCK)
    first_ptr = walk_ptr + sample * 3 * tokens * D
    second_ptr = first_ptr + tokens * D
    third_ptr = second_ptr + tokens * D
    there_ptr += sample * tokens
    back_ptr += sample * tokens
    through_J = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        there_IJ, back_IJ = _transitions(
            first_ptr, second_ptr, third_ptr, there_ptr, back_ptr,
            rows, columns, tokens, scale, D, BLOCK, BLOCK_K,
        )  # fmt: skip
        return_I = tl.load(return_ptr + sample * tokens + rows, mask=rows < tokens, other=0.0)
        through_J += tl.sum(there_IJ * back_IJ / (return_I + EPS)[:, None], 0)
    tl.store(through_ptr + sample * tokens + columns, through_J, mask=columns < tokens)


@jit
def _gradient_kernel(
    walk_ptr: tl.tensor,
    there_ptr: tl.tensor,
    back_ptr: tl.tensor,
    return_ptr: tl.tensor,
    through_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    tokens: tl.tensor,
    scale: tl.tensor,
    EPS: tl.constexpr,
    GRAD_SCALE: tl.constexpr,
    OF_SECOND: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> None:
    """Steps 4 and 5, one program per (block of the view's tokens, slice of channels, sample)."""
    sample, own = own_block(tl.cdiv(tokens, BLOCK), BLOCK)
    first_ptr = walk_ptr + sample * 3 * tokens * D
    second_ptr = first_ptr + tokens * D
    third_ptr = second_ptr + tokens * D
    there_ptr += sample * tokens
    back_ptr += sample * tokens
    channels = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    grad_there = tl.zeros([BLOCK, BLOCK_O], dtype=tl.float32)
    grad_back = tl.zeros([BLOCK, BLOCK_O], dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        other = start + tl.arange(0, BLOCK)
        rows = other if OF_SECOND else own
        columns = own if OF_SECOND else other
        there_IJ, back_IJ = _transitions(
            first_ptr, second_ptr, third_ptr, there_ptr, back_ptr,
            rows, columns, tokens, scale, D, BLOCK, BLOCK_K,
        )  # fmt: skip
        return_I = tl.load(return_ptr + sample * tokens + rows, mask=rows < tokens, other=0.0)
        through_J = tl.load(through_ptr + sample * tokens + columns, mask=columns < tokens, other=0.0)
        path_IJ = there_IJ * back_IJ / (return_I + EPS)[:, None]
        back_IJ = (back_IJ * through_J[None, :] - path_IJ) * GRAD_SCALE
        there_IJ = (there_IJ * (return_I / (return_I + EPS))[:, None] - path_IJ) * GRAD_SCALE
        there = there_IJ.to(walk_ptr.dtype.element_ty)
        back = back_IJ.to(walk_ptr.dtype.element_ty)
        if OF_SECOND:
            first_IO = load_tokens(first_ptr, rows, channels, tokens, D)
            grad_there = dot(tl.trans(there), first_IO, grad_there)
            third_IO = load_tokens(third_ptr, rows, channels, tokens, D)
            grad_there = dot(tl.trans(back), third_IO, grad_there)
        else:
            second_JO = load_tokens(second_ptr, columns, channels, tokens, D)
            grad_there = dot(there, second_JO, grad_there)
            grad_back = dot(back, second_JO, grad_back)

    element = grad_ptr.dtype.element_ty
    mask = (own < tokens)[:, None] & (channels < D)[None, :]
    grad_base = grad_ptr + sample * 3 * tokens * D + own[:, None] * D + channels[None, :]
    if OF_SECOND:
        tl.store(grad_base + tokens * D, grad_there.to(element), mask=mask)
    else:
        tl.store(grad_base, grad_there.to(element), mask=mask)
        tl.store(grad_base + 2 * tokens * D, grad_back.to(element), mask=mask)


@jit
def _diagnostics_kernel(
    walk_ptr: tl.tensor,
    there_ptr: tl.tensor,
    back_ptr: tl.tensor,
    correct_ptr: tl.tensor,
    squares_ptr: tl.tensor,
    tokens: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Step 6, one program per (block of i, sample): whether the arg-max is the diagonal, sum of squares."""
    sample, rows = own_block(tl.cdiv(tokens, BLOCK), BLOCK)
    first_ptr = walk_ptr + sample * 3 * tokens * D
    second_ptr = first_ptr + tokens * D
    third_ptr = second_ptr + tokens * D
    normaliser_I = tl.load(there_ptr + sample * tokens + rows, mask=rows < tokens, other=0.0)
    # The diagonal comes from these tiles, not from step 2: other rounding would decide between equal entries.
    diagonal_I = tl.zeros([BLOCK], dtype=tl.float32)
    before_I = tl.full([BLOCK], -1.0, dtype=tl.float32)
    after_I = tl.full([BLOCK], -1.0, dtype=tl.float32)
    squares_I = tl.zeros([BLOCK], dtype=tl.float32)
    for target in range(0, tokens, BLOCK):
        ends = target + tl.arange(0, BLOCK)
        cycle_IE = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
        for start in range(0, tokens, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            there_IJ = logits_tile(
                first_ptr, second_ptr, rows, columns, tokens, tokens, scale, D, BLOCK, BLOCK_K
            )
            exists = columns < tokens
            there_IJ = tl.where(exists[None, :], exp2(there_IJ - normaliser_I[:, None]), 0.0)
            back_JE = logits_tile(
                second_ptr, third_ptr, columns, ends, tokens, tokens, scale, D, BLOCK, BLOCK_K
            )
            normaliser_J = tl.load(back_ptr + sample * tokens + columns, mask=columns < tokens, other=0.0)
            back_JE = tl.where(exists[:, None], exp2(back_JE - normaliser_J[:, None]), 0.0)
            cycle_IE = dot(there_IJ, back_JE, cycle_IE)
        is_end = (ends < tokens)[None, :]
        cycle_IE = tl.where(is_end, cycle_IE, 0.0)
        squares_I += tl.sum(cycle_IE * cycle_IE, 1)
        earlier = ends[None, :] < rows[:, None]
        later = is_end & (ends[None, :] > rows[:, None])
        diagonal_I += tl.sum(tl.where(ends[None, :] == rows[:, None], cycle_IE, 0.0), 1)
        before_I = tl.maximum(before_I, tl.max(tl.where(earlier, cycle_IE, -1.0), 1))
        after_I = tl.maximum(after_I, tl.max(tl.where(later, cycle_IE, -1.0), 1))
    correct_I = tl.where((diagonal_I > before_I) & (diagonal_I >= after_I), 1.0, 0.0)
    tl.store(correct_ptr + sample * tokens + rows, correct_I, mask=rows < tokens)
    tl.store(squares_ptr + sample * tokens + rows, squares_I, mask=rows < tokens)


def tile_of(tokens: Tensor) -> dict[str, Any]:
    """The launch options of a kernel that streams over tiles of these tokens' logits.

    As large as registers allow: three products of tf32 take three times the operands, and before Hopper
    tensor cores read them all from registers.
    """
    half = tokens.element_size() == 2
    wide = half and compute_capability(tokens.device) >= (9, 0)
    channels = max(triton.next_power_of_2(tokens.shape[-1]), 16)
    return {
        "D": tokens.shape[-1],
        "BLOCK": 64 if half else 32,
        "BLOCK_K": min(channels, 64 if wide else 32),
        "num_warps": 8,
        "enable_fp_fusion": True,
    }


def launch_three_views(
    walk_B3MD: Tensor, temperature: float, *, grad_dtype: torch.dtype | None, diagnostics: bool
) -> CycleResult:
    """The fused kernel where the views are small enough for it, else the streaming form."""
    launch = launch_cycle if walk_B3MD.shape[2] <= MAX_FUSED_TOKENS else launch_streaming
    return launch(walk_B3MD, temperature, grad_dtype=grad_dtype, diagnostics=diagnostics)


def launch_streaming(
    walk_B3MD: Tensor, temperature: float, *, grad_dtype: torch.dtype | None, diagnostics: bool
) -> CycleResult:
    """As `launch_cycle`, for any number of tokens M: contiguous views (B, 3, M, D)."""
    samples, _, tokens, channels = walk_B3MD.shape
    figures_4BM, others_3BM = walk_B3MD.new_empty((7, samples, tokens), dtype=torch.float32).split([4, 3])
    loss_BM, correct_BM, squares_BM, return_BM = figures_4BM.unbind()
    there_BM, back_BM, through_BM = others_3BM.unbind()
    tile, half = tile_of(walk_B3MD), walk_B3MD.element_size() == 2
    blocks = triton.cdiv(tokens, tile["BLOCK"])
    scale = LOG2_E / temperature
    # Narrow steps leave the registers to a kernel's own sums.
    narrow = {**tile, "BLOCK_K": min(tile["BLOCK_K"], 32)}
    grad_B3MD = torch.empty(
        walk_B3MD.shape if grad_dtype else (0,), device=walk_B3MD.device, dtype=grad_dtype or walk_B3MD.dtype
    )
    with on_device(walk_B3MD):
        launch = (blocks * samples,)
        _back_normaliser_kernel[launch](walk_B3MD, back_BM, tokens, scale, **tile)
        _return_kernel[launch](
            walk_B3MD, back_BM, there_BM, return_BM, loss_BM, tokens, scale, EPS=CYCLE_EPS, **tile
        )
        if grad_dtype:
            rows = (walk_B3MD, there_BM, back_BM, return_BM, through_BM)
            _through_kernel[launch](*rows, tokens, scale, EPS=CYCLE_EPS, **tile)
            slice_channels = min(max(triton.next_power_of_2(channels), 16), 128 if half else 64)
            launch_sliced = (blocks * samples, triton.cdiv(channels, slice_channels))
            for of_second in (False, True):
                _gradient_kernel[launch_sliced](
                    *rows,
                    grad_B3MD,
                    tokens,
                    scale,
                    EPS=CYCLE_EPS,
                    GRAD_SCALE=grad_scale(tokens),
                    OF_SECOND=of_second,
                    BLOCK_O=slice_channels,
                    **narrow,
                )
        if diagnostics:
            _diagnostics_kernel[launch](
                walk_B3MD,
                there_BM,
                back_BM,
                correct_BM,
                squares_BM,
                tokens,
                scale,
                num_stages=4,
                **narrow,
            )
    return CycleResult(figures_4BM if diagnostics else figures_4BM[:1], grad_B3MD)
