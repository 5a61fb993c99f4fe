"""Cycle consistency of a walk through three views of many tokens M, or in fp32.

The first three kernels compute the formulas of cycle.py in tiles of 64 x 64 logits (32 x 32 in fp32). Each
recomputes the logits from the tokens and stores only a few numbers per token for the next:

    1. back sums         n'_j = max_i t_ij,  S'_j = sum_i exp(t_ij - n'_j)
    2. return            n_i, S_i of the s_ij likewise,  C_ii = sum_j A_ij A'_ji
    3. through           W_j  = sum_i w_ij
    4. brackets          the gradients of all s_ij and t_ij
    5. gradient          four matrix products of the brackets and the tokens, by cuBLAS

Here s_ij = p1_i . p2_j / tau and t_ij = p2_j . p3_i / tau; cycle.py defines A, A', C and w. Steps 1 and 2
keep a running maximum, as FlashAttention does (Dao et al., 2022, arXiv 2205.14135). A_ij is computed as
exp(s_ij - n_i) / S_i: near 1, this is more precise than exp(s_ij - log sum_j exp(s_ij)). Steps 4 and 5
process a few samples at a time, so that the brackets stay in the L2 cache and need little memory.

With a mask, tokens have weights (see cycle.py), and those of weight 0 do not exist. What a tile without any
that exists adds to a sum is multiplied by 0 when the running maximum becomes that of a logit that exists.

Shape suffixes: B samples, G samples of one group, M tokens of a view, P tokens with padding, D channels.
Inside the kernels: I tokens of the first or third view, J tokens of the second view. Logarithms in the
kernels are to base 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .primitives import LOG2_E, drop_logits, exp2, logits_tile, own_block, tile_options
from .reference import CYCLE_EPS
from .runtime import ceil_div, inline, jit, on_device, tl

# Size of the brackets of one group of samples. An H100 has 50 MB of L2 cache, an A100 40 MB.
BRACKET_BYTES = 2**25


@inline
def _views(walk_ptr, sample, tokens, D):
    """Return pointers to the three views of a sample."""
    first_ptr = walk_ptr + sample * 3 * tokens * D
    second_ptr = first_ptr + tokens * D
    third_ptr = second_ptr + tokens * D
    return first_ptr, second_ptr, third_ptr


@inline
def token_exists(weights_ptr, sample, index, tokens):
    """Whether tokens of a sample exist: all `tokens` without weights, else those of a positive weight."""
    exists = index < tokens
    if weights_ptr is not None:
        exists = tl.load(weights_ptr + sample * tokens + index, mask=exists, other=0.0) > 0
    return exists


@inline
def cross_entropy(return_I, weights_ptr, sample, rows, tokens, EPS):
    """log(1 + M e) - log(C_ii + e), where M tokens exist, times the weight of the row."""
    if weights_ptr is None:
        entropy_I = tl.log(1.0 + tokens * EPS) - tl.log(return_I + EPS)
    else:
        weight_I = tl.load(weights_ptr + sample * tokens + rows, mask=rows < tokens, other=0.0)
        # The weight of a row that exists is the number of all tokens divided by that of those that exist.
        existing_I = tokens / tl.maximum(weight_I, 1.0)
        entropy_I = weight_I * (tl.log(1.0 + existing_I * EPS) - tl.log(return_I + EPS))
    return entropy_I


@inline
def _transitions(
    first_ptr, second_ptr, third_ptr, there_ptr, back_ptr, weights_ptr, sample,
    rows, columns, tokens, scale, D, BLOCK, BLOCK_K,
):  # fmt: skip
    """Compute tiles of A_ij and A'_ji, both [I, J], from maxima and sums; 0 where i or j does not exist."""
    exists_I = token_exists(weights_ptr, sample, rows, tokens)
    exists_J = token_exists(weights_ptr, sample, columns, tokens)
    exists = exists_I[:, None] & exists_J[None, :]
    largest_I = tl.load(there_ptr + rows, mask=rows < tokens, other=0.0)[:, None]
    inverse_I = tl.load(there_ptr + tokens + rows, mask=rows < tokens, other=0.0)[:, None]
    there_IJ = logits_tile(first_ptr, second_ptr, rows, columns, tokens, tokens, scale, D, BLOCK, BLOCK_K)
    there_IJ = tl.where(exists, exp2(there_IJ - largest_I) * inverse_I, 0.0)
    largest_J = tl.load(back_ptr + columns, mask=columns < tokens, other=0.0)[None, :]
    inverse_J = tl.load(back_ptr + tokens + columns, mask=columns < tokens, other=0.0)[None, :]
    back_IJ = logits_tile(third_ptr, second_ptr, rows, columns, tokens, tokens, scale, D, BLOCK, BLOCK_K)
    return there_IJ, tl.where(exists, exp2(back_IJ - largest_J) * inverse_J, 0.0)


@jit
def _back_sums_kernel(
    walk_ptr,  # [B, 3, M, D]
    weights_ptr,  # [B, M]; may be None
    back_ptr,  # [B, 2, M]: n', 1 / S'
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
        exists_I = token_exists(weights_ptr, sample, rows, tokens)
        back_IJ = drop_logits(back_IJ, exists_I[:, None])
        larger_J = tl.maximum(largest_J, tl.max(back_IJ, 0))
        total_J = total_J * exp2(largest_J - larger_J) + tl.sum(exp2(back_IJ - larger_J[None, :]), 0)
        largest_J = larger_J
    back_ptr += sample * 2 * tokens
    tl.store(back_ptr + columns, largest_J, mask=columns < tokens)
    tl.store(back_ptr + tokens + columns, 1.0 / total_J, mask=columns < tokens)


@jit
def _return_kernel(
    walk_ptr,  # [B, 3, M, D]
    weights_ptr,  # [B, M]; may be None
    back_ptr, there_ptr,  # [B, 2, M]: n', 1 / S' in; n, 1 / S out
    return_ptr, loss_ptr,  # [B, M]: C_ii and the cross-entropy
    tokens, scale,
    EPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Step 2; one program per (block of i, sample)."""
    sample, rows = own_block(tl.cdiv(tokens, BLOCK), BLOCK)
    first_ptr, second_ptr, third_ptr = _views(walk_ptr, sample, tokens, D)
    back_ptr += sample * 2 * tokens
    there_ptr += sample * 2 * tokens
    largest_I = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    total_I = tl.zeros([BLOCK], dtype=tl.float32)
    return_I = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        exists = token_exists(weights_ptr, sample, columns, tokens)[None, :]
        there_IJ = logits_tile(first_ptr, second_ptr, rows, columns, tokens, tokens, scale, D, BLOCK, BLOCK_K)
        there_IJ = drop_logits(there_IJ, exists)
        back_IJ = logits_tile(third_ptr, second_ptr, rows, columns, tokens, tokens, scale, D, BLOCK, BLOCK_K)
        largest_J = tl.load(back_ptr + columns, mask=columns < tokens, other=0.0)[None, :]
        inverse_J = tl.load(back_ptr + tokens + columns, mask=columns < tokens, other=0.0)[None, :]
        larger_I = tl.maximum(largest_I, tl.max(there_IJ, 1))
        shrink_I = exp2(largest_I - larger_I)
        weight_IJ = exp2(there_IJ - larger_I[:, None])
        total_I = total_I * shrink_I + tl.sum(weight_IJ, 1)
        arrived_IJ = tl.where(exists, weight_IJ * (exp2(back_IJ - largest_J) * inverse_J), 0.0)
        return_I = return_I * shrink_I + tl.sum(arrived_IJ, 1)
        largest_I = larger_I
    tl.store(there_ptr + rows, largest_I, mask=rows < tokens)
    tl.store(there_ptr + tokens + rows, 1.0 / total_I, mask=rows < tokens)
    return_I /= total_I
    if weights_ptr is not None:
        # For rows that do not exist, the exponentials may have overflowed.
        return_I = tl.where(token_exists(weights_ptr, sample, rows, tokens), return_I, 0.0)
    tl.store(return_ptr + sample * tokens + rows, return_I, mask=rows < tokens)
    loss_I = cross_entropy(return_I, weights_ptr, sample, rows, tokens, EPS)
    tl.store(loss_ptr + sample * tokens + rows, loss_I, mask=rows < tokens)


@jit
def _through_kernel(
    walk_ptr,  # [B, 3, M, D]
    weights_ptr,  # [B, M]; may be None
    there_ptr, back_ptr,  # [B, 2, M]: n, 1 / S; n', 1 / S'
    return_ptr, through_ptr,  # [B, M]: C_ii in; W out
    tokens, scale,
    EPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Step 3; one program per (block of j, sample)."""
    sample, columns = own_block(tl.cdiv(tokens, BLOCK), BLOCK)
    first_ptr, second_ptr, third_ptr = _views(walk_ptr, sample, tokens, D)
    there_ptr += sample * 2 * tokens
    back_ptr += sample * 2 * tokens
    through_J = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        there_IJ, back_IJ = _transitions(
            first_ptr, second_ptr, third_ptr, there_ptr, back_ptr, weights_ptr, sample,
            rows, columns, tokens, scale, D, BLOCK, BLOCK_K,
        )  # fmt: skip
        return_I = tl.load(return_ptr + sample * tokens + rows, mask=rows < tokens, other=0.0)
        through_J += tl.sum(there_IJ * back_IJ / (return_I + EPS)[:, None], 0)
    tl.store(through_ptr + sample * tokens + columns, through_J, mask=columns < tokens)


@jit(do_not_specialize=["start"])
def _bracket_kernel(
    walk_ptr,  # [B, 3, M, D]
    weights_ptr,  # [B, M]; may be None
    there_ptr, back_ptr,  # [B, 2, M]: n, 1 / S; n', 1 / S'
    return_ptr, through_ptr,  # [B, M]: C_ii, W
    bracket_ptr,  # [G, 2, M, pitch]: gradients of s and t, scaled by GRAD_SCALE
    start, pitch, tokens, scale,
    EPS: tl.constexpr, GRAD_SCALE: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Step 4 for the samples from `start`; one program per (block of i, block of j, sample of the group)."""
    blocks = tl.cdiv(tokens, BLOCK)
    sample_of_group = (tl.program_id(0) // (blocks * blocks)).to(tl.int64)
    sample = start + sample_of_group
    rows = tl.program_id(0) // blocks % blocks * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    first_ptr, second_ptr, third_ptr = _views(walk_ptr, sample, tokens, D)
    there_ptr += sample * 2 * tokens
    back_ptr += sample * 2 * tokens
    there_IJ, back_IJ = _transitions(
        first_ptr, second_ptr, third_ptr, there_ptr, back_ptr, weights_ptr, sample,
        rows, columns, tokens, scale, D, BLOCK, BLOCK_K,
    )  # fmt: skip
    return_I = tl.load(return_ptr + sample * tokens + rows, mask=rows < tokens, other=0.0)
    through_J = tl.load(through_ptr + sample * tokens + columns, mask=columns < tokens, other=0.0)
    path_IJ = there_IJ * back_IJ / (return_I + EPS)[:, None]
    back_IJ = (back_IJ * through_J[None, :] - path_IJ) * GRAD_SCALE
    there_IJ = (there_IJ * (return_I / (return_I + EPS))[:, None] - path_IJ) * GRAD_SCALE
    offsets = (sample_of_group * 2 * tokens + rows[:, None]) * pitch + columns[None, :]
    mask = (rows < tokens)[:, None] & (columns < tokens)[None, :]
    tl.store(bracket_ptr + offsets, there_IJ.to(bracket_ptr.dtype.element_ty), mask=mask)
    offsets += tokens * pitch
    tl.store(bracket_ptr + offsets, back_IJ.to(bracket_ptr.dtype.element_ty), mask=mask)


def launch_streaming(
    walk_B3MD: Tensor,
    weights_BM: Tensor | None,
    temperature: float,
    loss_BM: Tensor,
    grad_B3MD: Tensor,
    grad_scale: float,
) -> None:
    """Write the results of `cycle.launch_cycle` into the given tensors; skip an empty `grad_B3MD`."""
    samples, _, tokens, _ = walk_B3MD.shape
    there_B2M, back_B2M = loss_BM.new_empty((2, samples, 2, tokens)).unbind()
    return_BM, through_BM = loss_BM.new_empty((2, samples, tokens)).unbind()
    tile = tile_options(walk_B3MD)
    blocks = ceil_div(tokens, tile["BLOCK"])
    sizes = (tokens, LOG2_E / temperature)
    with on_device(walk_B3MD):
        launch = (blocks * samples,)
        given = (walk_B3MD, weights_BM)
        _back_sums_kernel[launch](*given, back_B2M, *sizes, **tile)
        _return_kernel[launch](*given, back_B2M, there_B2M, return_BM, loss_BM, *sizes, EPS=CYCLE_EPS, **tile)
        if not grad_B3MD.numel():
            return
        rows = (there_B2M, back_B2M, return_BM, through_BM)
        _through_kernel[launch](*given, *rows, *sizes, EPS=CYCLE_EPS, **tile)
        # cuBLAS is slow if rows are not aligned to 16 bytes.
        pitch = 16 * ceil_div(tokens, 16)
        group = max(1, BRACKET_BYTES // (2 * tokens * pitch * walk_B3MD.element_size()))
        bracket_G2MP = walk_B3MD.new_empty((min(group, samples), 2, tokens, pitch))
        for start in range(0, samples, group):
            walk_G3MD, grad_G3MD = (each[start : start + group] for each in (walk_B3MD, grad_B3MD))
            bracket = bracket_G2MP[: len(walk_G3MD)]
            _bracket_kernel[(blocks**2 * len(bracket),)](
                *given, *rows, bracket, start, pitch, *sizes,
                EPS=CYCLE_EPS, GRAD_SCALE=grad_scale, **tile,
            )  # fmt: skip
            there_GMM, back_GMM = bracket[..., :tokens].unbind(1)
            first_GMD, second_GMD, third_GMD = walk_G3MD.unbind(1)
            grad_first, grad_second, grad_third = grad_G3MD.unbind(1)
            torch.bmm(there_GMM, second_GMD, out=grad_first)
            torch.bmm(back_GMM, second_GMD, out=grad_third)
            torch.bmm(there_GMM.mT, first_GMD, out=grad_second)
            grad_second.baddbmm_(back_GMM.mT, third_GMD)
