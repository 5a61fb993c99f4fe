"""Semantic separability, optionally fused with the end of the head and with pooling.

The loss measures how much the direction of the projected tokens v differs from that of the frozen tokens z:

    kl:  (1 / B) sum over views and tokens of KL(softmax(z / ||z||) || softmax(v / ||v||)) over channels
    mse: mean over all elements of (z / ||z|| - v / ||v||)^2

A single pass over memory computes this loss and the pooled tokens for the cycle from the output of the head's
last matrix product (see cosettle.py). `separability_loss` uses the same kernels without head and pooling. For
an input token x, a frozen token z, and the epsilon E of the layer norm:

    v = layer_norm(tanh(x + bias); weight, shift, E)        with HEAD (tanh only with TANH), else v = x
    p = v / max(||v||, 1e-12),  y = z / max(||z||, 1e-12)
    kl:  q = softmax(y);  KL(q || softmax(p)) = log(sum_d q_d exp(p_d - y_d)) - sum_d q_d (p_d - y_d)
    mse: sum_d (p_d - y_d)^2
    pooled = mean of p over the tokens of one window

The textbook form of the KL divergence, sum_d q_d (log q_d - log softmax(p)_d), subtracts numbers close to
log D. If the divergence is small, this loses digits in fp32. The form above subtracts small numbers instead.

The backward starts from the gradient s of each separability term and the gradient G of the pooled tokens. It
recomputes the rows from x and z and from six numbers per token that the forward stores (24 bytes):

    dp = s (softmax(p) - q)  or  2 s (p - y),  plus  G / window^2
    dv = (dp - p (p . dp)) / ||v||                           (dp / 1e-12 if ||v|| is below 1e-12)
    dx = dv, or dv propagated through layer norm and tanh

The gradients of the head's parameters are summed over all tokens.

One warp processes one token at a time, so that reductions over channels are warp shuffles. More than 1024
channels (768 in the backward with a head) need two or more warps.

Source: arXiv 2603.26597, section 3.

Shape suffixes: B samples, T views, N tokens, M whole windows, D channels. Inside the kernels, rows (see
rows.py) hold one token and have no suffix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .checks import check_choice, check_tensors
from .primitives import LOG2_E, exp2, log1p, sum_two, tanh
from .reference import Regularizer
from .rows import (
    add_rows,
    append,
    dot_rows,
    inverse_norm,
    load_row,
    multiply_add_rows,
    multiply_rows,
    row_blocks,
    scale_row,
    store_row,
    sum_chunks,
    zero_row,
)
from .runtime import (
    Backend,
    differentiate,
    inline,
    jit,
    multiprocessors,
    needs_grad,
    on_device,
    operator,
    tl,
    triton,
    unit_stride,
    use_triton,
)

# Numbers stored per token for the backward: mean and 1 / (standard deviation) of the layer norm; 1 / ||v||
# and 1 / ||z||; the sum of exp(y); the mean of exp(p - y) - 1, weighted with q.
STATISTICS = 6


class Epilogue(NamedTuple):
    """Inputs of both kernels: tokens (B, T, N, D), the parameters (D,) of a head or None, and options.

    The grid is divided into cells, each of which covers one window of tokens. Cells at the bottom and at the
    right may be partial.
    """

    inputs: Tensor
    frozen: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    norm_eps: float
    tanh: bool
    height: int
    width: int
    window_height: int
    window_width: int
    kl: bool

    @property
    def head(self) -> list[Tensor]:
        """Bias of the linear layer, weight and bias of the layer norm; empty without a head."""
        parameters = (self.bias, self.norm_weight, self.norm_bias)
        return [parameter for parameter in parameters if parameter is not None]

    @property
    def cells(self) -> int:
        return int(triton.cdiv(self.height, self.window_height) * triton.cdiv(self.width, self.window_width))

    @property
    def whole_cells(self) -> int:
        return (self.height // self.window_height) * (self.width // self.window_width)


# --- the kernels ------------------------------------------------------------------------------------------


@inline
def _token_of_cell(cell, slot, height, width, WINDOW_H, WINDOW_W):
    """Return the grid index of token `slot` of a cell, and whether it exists, since cells may be partial."""
    cells_wide = tl.cdiv(width, WINDOW_W)
    row = cell // cells_wide * WINDOW_H + slot // WINDOW_W
    column = cell % cells_wide * WINDOW_W + slot % WINDOW_W
    return (row * width + column).to(tl.int64), (row < height) & (column < width)


@inline
def _whole_cell(cell, height, width, WINDOW_H, WINDOW_W):
    """Return the index of a cell among the whole cells, and whether it is whole."""
    cells_wide = tl.cdiv(width, WINDOW_W)
    row = cell // cells_wide
    column = cell % cells_wide
    return row * (width // WINDOW_W) + column, (row < height // WINDOW_H) & (column < width // WINDOW_W)


@inline
def _hidden(values, bias, TANH, HALF):
    """tanh(x + bias), or x + bias."""
    hidden = ()
    for c in tl.static_range(len(values)):
        shifted = values[c] + bias[c]
        hidden = append(hidden, tanh(shifted, HALF) if TANH else shifted)
    return hidden


@inline
def _centred(row, mean, D, BLOCK):
    """row - mean, 0 beyond the last channel."""
    centred = ()
    for c in tl.static_range(len(row)):
        channel = c * BLOCK + tl.arange(0, BLOCK) < D
        centred = append(centred, tl.where(channel, row[c] - mean, 0.0))
    return centred


@inline
def _growth(frozen, difference, D, BLOCK):
    """Return exp(y), with 0 beyond the last channel, and exp(p - y) - 1."""
    weight = ()
    growth = ()
    for c in tl.static_range(len(frozen)):
        channel = c * BLOCK + tl.arange(0, BLOCK) < D
        weight = append(weight, tl.where(channel, exp2(frozen[c]), 0.0))
        growth = append(growth, exp2(difference[c]) - 1.0)
    return weight, growth


@jit
def _forward_kernel(
    input_ptr, frozen_ptr,  # [B, T, N, D], channels contiguous
    bias_ptr, norm_weight_ptr, norm_bias_ptr,  # [D]
    terms_ptr,  # [B, T, N]
    statistics_ptr,  # [B, T, N, STATISTICS]
    pooled_ptr,  # [B, T, M, D]
    input_stride_b, input_stride_t, input_stride_n, frozen_stride_b, frozen_stride_t, frozen_stride_n,
    views, height, width, whole_cells, eps, term_scale,
    D: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    HEAD: tl.constexpr, TANH: tl.constexpr, KL: tl.constexpr, POOL: tl.constexpr, HALF: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """Write the separability terms times term_scale and, if requested, statistics and pooled tokens.

    One program per (cell, view of a sample).
    """
    cells = tl.cdiv(height, WINDOW_H) * tl.cdiv(width, WINDOW_W)
    cell = tl.program_id(0) % cells
    view_of_sample = (tl.program_id(0) // cells).to(tl.int64)
    view = view_of_sample % views
    sample = view_of_sample // views
    input_base = input_ptr + sample * input_stride_b + view * input_stride_t
    frozen_base = frozen_ptr + sample * frozen_stride_b + view * frozen_stride_t
    terms_base = terms_ptr + view_of_sample * height * width
    pooled = zero_row(BLOCK, CHUNKS)

    for slot in range(WINDOW_H * WINDOW_W):
        token, exists = _token_of_cell(cell, slot, height, width, WINDOW_H, WINDOW_W)
        values = load_row(input_base + token * input_stride_n, exists, D, BLOCK, CHUNKS)
        frozen = load_row(frozen_base + token * frozen_stride_n, exists, D, BLOCK, CHUNKS)
        if HEAD:
            bias = load_row(bias_ptr, True, D, BLOCK, CHUNKS)
            norm_weight = load_row(norm_weight_ptr, True, D, BLOCK, CHUNKS)
            norm_bias = load_row(norm_bias_ptr, True, D, BLOCK, CHUNKS)
            hidden = _hidden(values, bias, TANH, HALF)
            mean = tl.sum(sum_chunks(hidden), 0) * (1.0 / D)
            centred = _centred(hidden, mean, D, BLOCK)
            inverse_std = 1.0 / tl.sqrt(dot_rows(centred, centred) * (1.0 / D) + eps)
            standard = scale_row(centred, inverse_std)
            values = multiply_add_rows(standard, norm_weight, norm_bias)
        scale = inverse_norm(values)
        frozen_scale = inverse_norm(frozen)
        unit = scale_row(values, UNIT * scale)
        frozen = scale_row(frozen, UNIT * frozen_scale)
        difference = add_rows(unit, frozen, -1.0)
        if KL:
            weight, growth = _growth(frozen, difference, D, BLOCK)
            total = tl.sum(sum_chunks(weight), 0)
            mean_growth = dot_rows(weight, growth) / total
            term = log1p(mean_growth) - dot_rows(weight, difference) / (UNIT * total)
        else:
            term = dot_rows(difference, difference) / (UNIT * UNIT)
        tl.store(terms_base + token, term * term_scale, mask=exists)
        if STATISTICS:
            statistics = statistics_ptr + (view_of_sample * height * width + token) * STATISTICS
            if HEAD:
                tl.store(statistics, mean, mask=exists)
                tl.store(statistics + 1, inverse_std, mask=exists)
            tl.store(statistics + 2, scale, mask=exists)
            tl.store(statistics + 3, frozen_scale, mask=exists)
            if KL:
                tl.store(statistics + 4, total, mask=exists)
                tl.store(statistics + 5, mean_growth, mask=exists)
        if POOL:
            pooled = add_rows(pooled, unit, 1.0 / (UNIT * WINDOW_H * WINDOW_W))

    if POOL:
        whole_cell, is_whole = _whole_cell(cell, height, width, WINDOW_H, WINDOW_W)
        pooled_row = pooled_ptr + (view_of_sample * whole_cells + whole_cell) * D
        store_row(pooled_row, pooled, is_whole, D, BLOCK)


@jit
def _backward_kernel(
    input_ptr, frozen_ptr,  # [B, T, N, D], channels contiguous
    bias_ptr, norm_weight_ptr, norm_bias_ptr,  # [D]
    statistics_ptr,  # [B, T, N, STATISTICS]
    grad_term_ptr, grad_cycle_ptr,  # []
    grad_pooled_ptr,  # [B, T, M, D]
    grad_input_ptr,  # [B, T, N, D]
    grad_parameters_ptr,  # [programs, 3, D]: bias, layer norm weight, layer norm bias
    input_stride_b, input_stride_t, input_stride_n, frozen_stride_b, frozen_stride_t, frozen_stride_n,
    samples, views, height, width, whole_cells, term_scale, pooled_scale,
    D: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    HEAD: tl.constexpr, TANH: tl.constexpr, KL: tl.constexpr, POOL: tl.constexpr, HALF: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the inputs, and partial sums of the gradients of the head's parameters.

    Each program processes every num_programs-th cell and keeps its partial sums in registers.
    """
    program = tl.program_id(0)
    cells = tl.cdiv(height, WINDOW_H) * tl.cdiv(width, WINDOW_W)
    grad_term = tl.load(grad_term_ptr).to(tl.float32) * term_scale
    if POOL:
        grad_cycle = tl.load(grad_cycle_ptr).to(tl.float32) * (pooled_scale / (WINDOW_H * WINDOW_W))
    if HEAD:
        grad_bias = zero_row(BLOCK, CHUNKS)
        grad_norm_weight = zero_row(BLOCK, CHUNKS)
        grad_norm_bias = zero_row(BLOCK, CHUNKS)

    for work in range(program, samples * views * cells, tl.num_programs(0)):
        cell = work % cells
        view_of_sample = (work // cells).to(tl.int64)
        view = view_of_sample % views
        sample = view_of_sample // views
        input_base = input_ptr + sample * input_stride_b + view * input_stride_t
        frozen_base = frozen_ptr + sample * frozen_stride_b + view * frozen_stride_t
        grad_base = grad_input_ptr + view_of_sample * height * width * D
        if POOL:
            whole_cell, is_whole = _whole_cell(cell, height, width, WINDOW_H, WINDOW_W)
            pooled_row = grad_pooled_ptr + (view_of_sample * whole_cells + whole_cell) * D

        for slot in range(WINDOW_H * WINDOW_W):
            token, exists = _token_of_cell(cell, slot, height, width, WINDOW_H, WINDOW_W)
            values = load_row(input_base + token * input_stride_n, exists, D, BLOCK, CHUNKS)
            frozen = load_row(frozen_base + token * frozen_stride_n, exists, D, BLOCK, CHUNKS)
            statistics = statistics_ptr + (view_of_sample * height * width + token) * STATISTICS
            if HEAD:
                bias = load_row(bias_ptr, True, D, BLOCK, CHUNKS)
                norm_weight = load_row(norm_weight_ptr, True, D, BLOCK, CHUNKS)
                norm_bias = load_row(norm_bias_ptr, True, D, BLOCK, CHUNKS)
                mean = tl.load(statistics, mask=exists, other=0.0)
                inverse_std = tl.load(statistics + 1, mask=exists, other=0.0)
                hidden = _hidden(values, bias, TANH, HALF)
                standard = scale_row(_centred(hidden, mean, D, BLOCK), inverse_std)
                values = multiply_add_rows(standard, norm_weight, norm_bias)
            # For tokens that do not exist, a scale of 0 leaves the head's gradients unchanged.
            scale = tl.load(statistics + 2, mask=exists, other=0.0)
            unit = scale_row(values, UNIT * scale)
            frozen_scale = tl.load(statistics + 3, mask=exists, other=0.0)
            frozen = scale_row(frozen, UNIT * frozen_scale)
            difference = add_rows(unit, frozen, -1.0)
            if KL:
                weight, growth = _growth(frozen, difference, D, BLOCK)
                total = tl.load(statistics + 4, mask=exists, other=1.0)
                mean_growth = tl.load(statistics + 5, mask=exists, other=0.0)
                factor = grad_term / (total * (1.0 + mean_growth))
                grad = ()
                for c in tl.static_range(CHUNKS):
                    grad = append(grad, weight[c] * (growth[c] * factor - mean_growth * factor))
            else:
                grad = scale_row(difference, 2.0 * grad_term / UNIT)
            if POOL:
                grad_pooled = load_row(pooled_row, is_whole, D, BLOCK, CHUNKS)
                grad = add_rows(grad, grad_pooled, grad_cycle)

            # A norm below 1e-12 is replaced by this constant, so no gradient flows through it.
            along = tl.where(scale < 1e12, dot_rows(unit, grad) / (UNIT * UNIT), 0.0)
            grad = scale_row(add_rows(grad, unit, -along), scale)
            if HEAD:
                grad_norm_bias = add_rows(grad_norm_bias, grad, 1.0)
                grad_norm_weight = multiply_add_rows(grad, standard, grad_norm_weight)
                grad = multiply_rows(grad, norm_weight)
                grad_mean, along = sum_two(sum_chunks(grad), sum_chunks(multiply_rows(grad, standard)))
                grad_mean *= inverse_std / D
                along *= inverse_std / D
                through = ()
                for c in tl.static_range(CHUNKS):
                    centred = grad[c] * inverse_std - grad_mean - standard[c] * along
                    through = append(through, centred * (1.0 - hidden[c] * hidden[c]) if TANH else centred)
                grad = through
                grad_bias = add_rows(grad_bias, grad, 1.0)
            store_row(grad_base + token * D, grad, exists, D, BLOCK)

    if HEAD:
        parameters_row = grad_parameters_ptr + program * 3 * D
        store_row(parameters_row, grad_bias, True, D, BLOCK)
        store_row(parameters_row + D, grad_norm_weight, True, D, BLOCK)
        store_row(parameters_row + 2 * D, grad_norm_bias, True, D, BLOCK)


def pooled_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of pooled tokens: float32 for float32 tokens, else float16.

    Components of normalised tokens are at most one, where float16 is more precise than bfloat16.
    """
    return torch.float32 if dtype == torch.float32 else torch.float16


def statistics_shape(inputs_BTND: Tensor, keep: bool) -> tuple[int, ...]:
    return (*inputs_BTND.shape[:3], STATISTICS) if keep else (0,)


def launch_forward(epilogue: Epilogue, *, pool: bool, statistics: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward kernel.

    Returns the separability loss (0-d), the pooled tokens (B, T, M, D), which are empty without `pool`, and
    the statistics (B, T, N, 6) for `launch_backward`, which are empty without `statistics`.
    """
    inputs = epilogue.inputs
    samples, views, tokens, channels = inputs.shape
    tensors, strides, constants = _shared_arguments(epilogue, pool, channels_per_warp=1024)
    terms_BTN = inputs.new_empty((samples, views, tokens), dtype=torch.float32)
    statistics_BTNS = inputs.new_empty(statistics_shape(inputs, statistics), dtype=torch.float32)
    pooled_shape = (samples, views, epilogue.whole_cells, channels) if pool else (0,)
    pooled_BTMD = inputs.new_empty(pooled_shape, dtype=pooled_dtype(inputs.dtype))
    with on_device(inputs):
        _forward_kernel[(epilogue.cells * samples * views,)](
            *tensors, terms_BTN, statistics_BTNS, pooled_BTMD, *strides, views,
            epilogue.height, epilogue.width, epilogue.whole_cells, epilogue.norm_eps, _term_scale(epilogue),
            STATISTICS=STATISTICS if statistics else 0, **constants,
        )  # fmt: skip
    return terms_BTN.sum(), pooled_BTMD, statistics_BTNS


def launch_backward(
    epilogue: Epilogue,
    statistics_BTNS: Tensor,
    grad_separability: Tensor,
    grad_cycle: Tensor | None = None,
    grad_pooled_BTMD: Tensor | None = None,
    pooled_scale: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Compute the gradients of the inputs (B, T, N, D) and, with a head, of its parameters (3, D) in fp32.

    The gradient of the pooled tokens is grad_pooled * grad_cycle * pooled_scale. `grad_separability` and
    `grad_cycle` are 0-d tensors, which the kernel reads on the device.
    """
    inputs, head = epilogue.inputs, epilogue.head
    samples, views, _, channels = inputs.shape
    pool = grad_pooled_BTMD is not None
    tensors, strides, constants = _shared_arguments(epilogue, pool, channels_per_warp=768 if head else 1024)
    programs = epilogue.cells * samples * views
    if head:
        # Launch only as many programs as fit on the GPU at once, since each writes partial sums of its own.
        threads = 32 * constants["num_warps"]
        registers = min(255, 64 + 8 * constants["BLOCK"] * constants["CHUNKS"] // threads)
        at_once = max(1, 65536 // (threads * registers)) * multiprocessors(inputs.device)
        programs = min(programs, at_once)
    grad_BTND = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    partial_P3D = inputs.new_empty((programs, 3, channels), dtype=torch.float32) if head else None
    unused = tensors[0]
    with on_device(inputs):
        _backward_kernel[(programs,)](
            *tensors, statistics_BTNS, grad_separability, grad_cycle if pool else grad_separability,
            grad_pooled_BTMD if pool else unused, grad_BTND, partial_P3D if head else unused, *strides,
            samples, views, epilogue.height, epilogue.width, epilogue.whole_cells, _term_scale(epilogue),
            pooled_scale, STATISTICS=STATISTICS, **constants,
        )  # fmt: skip
    return grad_BTND, None if partial_P3D is None else partial_P3D.sum(0)


def _term_scale(epilogue: Epilogue) -> float:
    """Factor that turns the sum of the separability terms into the loss."""
    return 1.0 / (epilogue.inputs.shape[0] if epilogue.kl else epilogue.inputs.numel())


def _shared_arguments(
    epilogue: Epilogue, pool: bool, channels_per_warp: int
) -> tuple[list[Tensor], tuple[int, ...], dict[str, Any]]:
    """Arguments that both kernels share: the first tensors, the strides, and the compile-time constants."""
    inputs, frozen = unit_stride(epilogue.inputs), unit_stride(epilogue.frozen)
    block, chunks = row_blocks(inputs.shape[-1])
    parameters = [parameter.contiguous() for parameter in epilogue.head] or [inputs] * 3
    constants = {
        "D": inputs.shape[-1], "WINDOW_H": epilogue.window_height, "WINDOW_W": epilogue.window_width,
        "HEAD": bool(epilogue.head), "TANH": epilogue.tanh, "KL": epilogue.kl, "POOL": pool,
        "HALF": inputs.dtype != torch.float32, "UNIT": LOG2_E, "BLOCK": block, "CHUNKS": chunks,
        # Enough warps to hold a row in registers without spilling.
        "num_warps": triton.next_power_of_2(triton.cdiv(block * chunks, channels_per_warp)),
        # Newer versions of Triton fuse multiplications and additions only on request (triton PR 11270).
        "enable_fp_fusion": True,
    }  # fmt: skip
    strides = (*inputs.stride()[:3], *frozen.stride()[:3])
    return [inputs, frozen, *parameters], strides, constants


# --- the loss alone -----------------------------------------------------------------------------------


def _epilogue(projected: Tensor, frozen: Tensor, kl: bool) -> Epilogue:
    """Build the inputs for the loss alone. The grid matters only for pooling: use a row of 4-token cells."""
    return Epilogue(
        projected, frozen, bias=None, norm_weight=None, norm_bias=None, norm_eps=0.0, tanh=False,
        height=1, width=projected.shape[2], window_height=1, window_width=4, kl=kl,
    )  # fmt: skip


def _forward(projected: Tensor, frozen: Tensor, kl: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """Compute the loss (0-d) and the statistics for the backward, which are empty without `keep`."""
    loss, _, statistics = launch_forward(_epilogue(projected, frozen, kl), pool=False, statistics=keep)
    return loss, statistics


def _backward(grad: Tensor, statistics: Tensor, projected: Tensor, frozen: Tensor, kl: bool) -> Tensor:
    return launch_backward(_epilogue(projected, frozen, kl), statistics, grad)[0]


def _save(inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[bool]]:
    projected, frozen, kl, _ = inputs
    return (output[1], projected, frozen), (kl,)


_separability = operator(
    "separability",
    _forward,
    fake=lambda projected, frozen, kl, keep: (
        projected.new_empty((), dtype=torch.float32),
        projected.new_empty(statistics_shape(projected, keep), dtype=torch.float32),
    ),
)
_separability_backward = operator(
    "separability_backward",
    _backward,
    fake=lambda grad, statistics, projected, frozen, kl: projected.new_empty(projected.shape),
)
differentiate(_separability, lambda *args: (_separability_backward(*args),), losses=1, save=_save)


def separability_loss(
    frozen: Tensor, projected: Tensor, regularizer: Regularizer = "kl", backend: Backend = "auto"
) -> Tensor:
    """Compute the semantic separability loss: how far the projected tokens moved from the frozen ones.

    Both are L2-normalised first. `"kl"` is KL(softmax(frozen) || softmax(projected)) over channels, summed
    over views, tokens and channels, and divided by B. `"mse"` is the mean squared difference (arXiv
    2603.26597, section 3).

    Args:
        frozen: (B, T, N, D) tokens of the frozen encoder, in float16, bfloat16, float32 or (eager only)
            float64. They receive no gradient.
        projected: (B, T, N, D) output of the projection for the same tokens, before L2 normalisation. Its
            dtype may differ from that of `frozen`.
        regularizer: `"kl"` or `"mse"`.
        backend: `"triton"`, `"eager"` (plain PyTorch), or `"auto"`, which selects Triton if it is installed
            and the tensors are on an NVIDIA GPU of compute capability 8.0 or higher and not in float64.

    Returns:
        The loss as a 0-d tensor, in float32 or (for float64 tokens) float64.

    Raises:
        ValueError: If an argument has an invalid shape, dtype, device or value, or one that
            `backend="triton"` does not support.
    """
    check_tensors(frozen=(frozen, "BTND"), projected=(projected, "BTND"))
    check_choice("regularizer", regularizer, Regularizer)
    frozen = frozen.detach()
    if not use_triton(backend, frozen=frozen, projected=projected):
        return reference.separability_loss(reference.unit(frozen), reference.unit(projected), regularizer)
    loss: Tensor = _separability(projected, frozen, regularizer == "kl", needs_grad(projected))[0]
    return loss
