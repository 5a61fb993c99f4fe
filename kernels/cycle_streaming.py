"""Cycle consistency of a walk through three views, in memory linear in the number of tokens M.

These kernels compute the formulas of cycle.py in tiles of 64 x 64 logits (32 x 32 in fp32). Each kernel
recomputes the logits from the tokens and stores only a few numbers per token for the next:

    1. back normaliser   L'_j = log sum_i exp(t_ij)
    2. return            L_i  = log sum_j exp(s_ij),  C_ii = sum_j exp(s_ij - L_i + t_ij - L'_j)
    3. through           W_j  = sum_i w_ij
    4. gradient of p1 and p3, as a sum over j
    5. gradient of p2, as a sum over i
    6. diagnostics, from tiles of C

Here s_ij = p1_i . p2_j / tau and t_ij = p2_j . p3_i / tau; cycle.py defines A, A', C and w. Steps 1 and 2
keep a running maximum, as FlashAttention does (Dao et al., 2022, arXiv 2205.14135).

Shape suffixes: B samples, M tokens of a view, D channels. Inside the kernels: I tokens of the first or third
view, J tokens of the second view, E tokens of the third view where a walk ends, K channels of one loop
iteration, O channels of the gradient. Logarithms in the kernels are to base 2.
"""

from __future__ import annotations

from torch import Tensor

from .primitives import LOG2_E, dot, exp2, load_tokens, logits_tile, own_block, tile_options
from .reference import CYCLE_EPS
from .runtime import inline, jit, on_device, tl, triton


@inline
def _views(walk_ptr, sample, tokens, D):
    """Return pointers to the three views of a sample."""
    first_ptr = walk_ptr + sample * 3 * tokens * D
    second_ptr = first_ptr + tokens * D
    third_ptr = second_ptr + tokens * D
    return first_ptr, second_ptr, third_ptr


@inline
def _transitions(
    first_ptr, second_ptr, third_ptr, there_ptr, back_ptr, rows, columns, tokens, scale, D, BLOCK, BLOCK_K
):
    """Compute tiles of A_ij and A'_ji, both [I, J], from the normalisers; 0 beyond the last token."""
    exists = (rows < tokens)[:, None] & (columns < tokens)[None, :]
    normaliser_I = tl.load(there_ptr + rows, mask=rows < tokens, other=0.0)
    there_IJ = logits_tile(first_ptr, second_ptr, rows, columns, tokens, tokens, scale, D, BLOCK, BLOCK_K)
    there_IJ = tl.where(exists, exp2(there_IJ - normaliser_I[:, None]), 0.0)
    normaliser_J = tl.load(back_ptr + columns, mask=columns < tokens, other=0.0)
    back_IJ = logits_tile(third_ptr, second_ptr, rows, columns, tokens, tokens, scale, D, BLOCK, BLOCK_K)
    return there_IJ, tl.where(exists, exp2(back_IJ - normaliser_J[None, :]), 0.0)


@jit
def _back_normaliser_kernel(
    walk_ptr,  # [B, 3, M, D]
    back_ptr,  # [B, M], L'
    tokens, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Step 1; one program per (block of j, sample)."""
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
    walk_ptr,  # [B, 3, M, D]
    back_ptr, there_ptr, return_ptr, loss_ptr,  # [B, M]: L' in; L, C_ii and the cross-entropy out
    tokens, scale,
    EPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Step 2; one program per (block of i, sample)."""
    sample, rows = own_block(tl.cdiv(tokens, BLOCK), BLOCK)
    first_ptr, second_ptr, third_ptr = _views(walk_ptr, sample, tokens, D)
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
    walk_ptr,  # [B, 3, M, D]
    there_ptr, back_ptr, return_ptr, through_ptr,  # [B, M]: L, L', C_ii in; W out
    tokens, scale,
    EPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Step 3; one program per (block of j, sample)."""
    sample, columns = own_block(tl.cdiv(tokens, BLOCK), BLOCK)
    first_ptr, second_ptr, third_ptr = _views(walk_ptr, sample, tokens, D)
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
    walk_ptr,  # [B, 3, M, D]
    there_ptr, back_ptr, return_ptr, through_ptr,  # [B, M]: L, L', C_ii, W
    grad_ptr,  # [B, 3, M, D], scaled by GRAD_SCALE
    tokens, scale,
    EPS: tl.constexpr, GRAD_SCALE: tl.constexpr, OF_SECOND: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Step 4, or step 5 with OF_SECOND; one program per (block of tokens, slice of channels, sample)."""
    sample, own = own_block(tl.cdiv(tokens, BLOCK), BLOCK)
    first_ptr, second_ptr, third_ptr = _views(walk_ptr, sample, tokens, D)
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
    walk_ptr,  # [B, 3, M, D]
    there_ptr, back_ptr, correct_ptr, squares_ptr,  # [B, M]: L, L' in; the diagnostics out
    tokens, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Step 6: accuracy and sum of squares of each row; one program per (block of i, sample)."""
    sample, rows = own_block(tl.cdiv(tokens, BLOCK), BLOCK)
    first_ptr, second_ptr, third_ptr = _views(walk_ptr, sample, tokens, D)
    normaliser_I = tl.load(there_ptr + sample * tokens + rows, mask=rows < tokens, other=0.0)
    # Take the diagonal from these tiles: step 2 rounds it differently, which would break ties arbitrarily.
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


def launch_streaming(
    walk_B3MD: Tensor,
    temperature: float,
    metrics_4BM: Tensor,
    grad_B3MD: Tensor,
    grad_scale: float,
    diagnostics: bool,
) -> None:
    """Write the results of `cycle.launch_cycle` into the given tensors; skip an empty `grad_B3MD`."""
    samples, _, tokens, channels = walk_B3MD.shape
    loss_BM, correct_BM, squares_BM, return_BM = metrics_4BM.unbind()
    there_BM, back_BM, through_BM = metrics_4BM.new_empty((3, samples, tokens)).unbind()
    tile, half = tile_options(walk_B3MD), walk_B3MD.element_size() == 2
    # Loading fewer channels per loop iteration leaves more registers for the accumulators.
    narrow = {**tile, "BLOCK_K": min(tile["BLOCK_K"], 32)}
    launch = (triton.cdiv(tokens, tile["BLOCK"]) * samples,)
    sizes = (tokens, LOG2_E / temperature)
    with on_device(walk_B3MD):
        _back_normaliser_kernel[launch](walk_B3MD, back_BM, *sizes, **tile)
        _return_kernel[launch](
            walk_B3MD, back_BM, there_BM, return_BM, loss_BM, *sizes, EPS=CYCLE_EPS, **tile
        )
        if grad_B3MD.numel():
            rows = (walk_B3MD, there_BM, back_BM, return_BM, through_BM)
            _through_kernel[launch](*rows, *sizes, EPS=CYCLE_EPS, **tile)
            slice_channels = min(max(triton.next_power_of_2(channels), 16), 128 if half else 64)
            launch_sliced = (*launch, triton.cdiv(channels, slice_channels))
            for of_second in (False, True):
                _gradient_kernel[launch_sliced](
                    *rows, grad_B3MD, *sizes, EPS=CYCLE_EPS, GRAD_SCALE=grad_scale, OF_SECOND=of_second,
                    BLOCK_O=slice_channels, **narrow,
                )  # fmt: skip
        if diagnostics:
            _diagnostics_kernel[launch](
                walk_B3MD, there_BM, back_BM, correct_BM, squares_BM, *sizes, num_stages=4, **narrow
            )
