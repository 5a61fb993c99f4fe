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

With a mask, tokens and windows have weights (see reference.py). The former multiply the terms and s, the
latter the pooled tokens and G. Tokens of weight 0 are not loaded, and their gradients are 0.

A program processes one token at a time with one or a few warps, so that reductions over channels are mostly
warp shuffles. With a head, only as many programs are launched as the GPU can run at once. Each processes many
cells.

Source: arXiv 2603.26597, section 3.

Shape suffixes: B samples, T views, N tokens, M whole windows, D channels. Inside the kernels, rows (see
rows.py) hold one token and have no suffix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .checks import check_choice, check_mask, check_tensors
from .primitives import LOG2_E, exp2, exp2m1, log1p, sum_two, tanh
from .reference import Reduction, Regularizer
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
    ceil_div,
    differentiate,
    inline,
    jit,
    needs_grad,
    next_power_of_2,
    on_device,
    operator,
    programs_at_once,
    tl,
    unit_stride,
    use_triton,
)

# Numbers stored per token for the backward: mean and 1 / (standard deviation) of the layer norm; 1 / ||v||
# and 1 / ||z||; the sum of exp(y); the mean of exp(p - y) - 1, weighted with q.
STATISTICS = 6


class Schedule(NamedTuple):
    """How a kernel with a head is executed; benchmarks/kernels.py compares the choices."""

    # Channels for each warp. Fewer channels need fewer registers per thread.
    channels_per_warp: int
    # Stages of the loop over the tokens of a cell: with 2, the next token is loaded during the arithmetic.
    stages: int
    # Whether the head's parameters stay in registers instead of being loaded again for each token.
    keep_head: bool


FORWARD_SCHEDULE = Schedule(channels_per_warp=1024, stages=1, keep_head=False)
BACKWARD_SCHEDULE = Schedule(channels_per_warp=768, stages=1, keep_head=False)


class Epilogue(NamedTuple):
    """Inputs of both kernels: tokens (B, T, N, D), the parameters (D,) of a head or None, and options.

    With a mask, there are weights of the tokens (B, N) and, for pooling, of the windows (B, M) in fp32.

    The grid is divided into cells, each of which covers one window of tokens. Cells at the bottom and at the
    right may be partial.
    """

    inputs: Tensor
    frozen: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    token_weights: Tensor | None
    window_weights: Tensor | None
    norm_eps: float
    tanh: bool
    height: int
    width: int
    window_height: int
    window_width: int
    kl: bool
    # Whether there is one loss per sample instead of their mean.
    per_sample: bool = False

    @property
    def head(self) -> list[Tensor]:
        """Bias of the linear layer, weight and bias of the layer norm; empty without a head."""
        parameters = (self.bias, self.norm_weight, self.norm_bias)
        return [parameter for parameter in parameters if parameter is not None]

    @property
    def cycle_weights(self) -> Tensor | None:
        """Weights (B, M) of the pooled tokens in the cycle loss; None without a mask."""
        return None if self.window_weights is None else reference.mean_weights(self.window_weights > 0)

    @property
    def losses_shape(self) -> tuple[int, ...]:
        return tuple(self.inputs.shape[: int(self.per_sample)])

    @property
    def cells(self) -> int:
        return ceil_div(self.height, self.window_height) * ceil_div(self.width, self.window_width)

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
def _growth(frozen, difference, D, BLOCK, HALF):
    """Return exp(y), with 0 beyond the last channel, and exp(p - y) - 1."""
    weight = ()
    growth = ()
    for c in tl.static_range(len(frozen)):
        channel = c * BLOCK + tl.arange(0, BLOCK) < D
        weight = append(weight, tl.where(channel, exp2(frozen[c]), 0.0))
        # The KL divergence is of second order in the difference, which magnifies an error in this term.
        growth = append(growth, exp2(difference[c]) - 1.0 if HALF else exp2m1(difference[c]))
    return weight, growth


@inline
def _load_or_zero(pointer, offset):
    """Load a number as fp32; 0 if the pointer is None."""
    return 0.0 if pointer is None else tl.load(pointer + offset).to(tl.float32)


@inline
def _weight(weights_ptr, index, inside):
    """Return the weight of a token or window, and whether it exists: without weights, if inside the grid."""
    if weights_ptr is None:
        weight = 1.0
        exists = inside
    else:
        weight = tl.load(weights_ptr + index, mask=inside, other=0.0)
        exists = weight > 0
    return weight, exists


@inline
def _load_head(bias_ptr, norm_weight_ptr, norm_bias_ptr, D, BLOCK, CHUNKS):
    bias = load_row(bias_ptr, True, D, BLOCK, CHUNKS)
    norm_weight = load_row(norm_weight_ptr, True, D, BLOCK, CHUNKS)
    norm_bias = load_row(norm_bias_ptr, True, D, BLOCK, CHUNKS)
    return bias, norm_weight, norm_bias


# The number of cells depends on the batch size, for whose values Triton would compile separate kernels.
@jit(do_not_specialize=["all_cells"])
def _forward_kernel(
    input_ptr, frozen_ptr,  # [B, T, N, D], channels contiguous
    bias_ptr, norm_weight_ptr, norm_bias_ptr,  # [D]
    token_weights_ptr, window_weights_ptr,  # [B, N], [B, M]; may be None
    terms_ptr,  # [B, T, cells], sums over the tokens of a cell
    statistics_ptr,  # [B, T, N, STATISTICS]
    pooled_ptr,  # [B, T, M, D]
    input_stride_b, input_stride_t, input_stride_n, frozen_stride_b, frozen_stride_t, frozen_stride_n,
    all_cells, views, height, width, whole_cells, term_scale, eps,
    D: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    HEAD: tl.constexpr, TANH: tl.constexpr, KL: tl.constexpr, POOL: tl.constexpr, HALF: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, STATISTICS: tl.constexpr,
    STAGES: tl.constexpr, KEEP_HEAD: tl.constexpr,
):  # fmt: skip
    """Write the separability terms times term_scale and, if requested, statistics and pooled tokens.

    Each program processes every num_programs-th of the B T cells.
    """
    cells = tl.cdiv(height, WINDOW_H) * tl.cdiv(width, WINDOW_W)
    if HEAD and KEEP_HEAD:
        bias, norm_weight, norm_bias = _load_head(bias_ptr, norm_weight_ptr, norm_bias_ptr, D, BLOCK, CHUNKS)
    for work in range(tl.program_id(0), all_cells, tl.num_programs(0)):
        cell = work % cells
        view_of_sample = (work // cells).to(tl.int64)
        view = view_of_sample % views
        sample = view_of_sample // views
        input_base = input_ptr + sample * input_stride_b + view * input_stride_t
        frozen_base = frozen_ptr + sample * frozen_stride_b + view * frozen_stride_t
        pooled = zero_row(BLOCK, CHUNKS)
        cell_term = 0.0

        for slot in tl.range(0, WINDOW_H * WINDOW_W, num_stages=STAGES):
            token, inside = _token_of_cell(cell, slot, height, width, WINDOW_H, WINDOW_W)
            token_weight, exists = _weight(token_weights_ptr, sample * height * width + token, inside)
            values = load_row(input_base + token * input_stride_n, exists, D, BLOCK, CHUNKS)
            frozen = load_row(frozen_base + token * frozen_stride_n, exists, D, BLOCK, CHUNKS)
            if HEAD:
                if not KEEP_HEAD:
                    bias, norm_weight, norm_bias = _load_head(
                        bias_ptr, norm_weight_ptr, norm_bias_ptr, D, BLOCK, CHUNKS
                    )
                hidden = _hidden(values, bias, TANH, HALF)
                mean = tl.sum(sum_chunks(hidden), 0) * (1.0 / D)
                centred = _centred(hidden, mean, D, BLOCK)
                inverse_std = 1.0 / tl.sqrt(dot_rows(centred, centred) * (1.0 / D) + eps)
                if token_weights_ptr is not None:
                    # A token that does not exist may be constant, and must stay finite.
                    inverse_std = tl.where(exists, inverse_std, 0.0)
                standard = scale_row(centred, inverse_std)
                values = multiply_add_rows(standard, norm_weight, norm_bias)
            scale = inverse_norm(values)
            if token_weights_ptr is not None:
                # Keep tokens that do not exist out of the pooled token.
                scale = tl.where(exists, scale, 0.0)
            frozen_scale = inverse_norm(frozen)
            unit = scale_row(values, UNIT * scale)
            frozen = scale_row(frozen, UNIT * frozen_scale)
            difference = add_rows(unit, frozen, -1.0)
            if KL:
                weight, growth = _growth(frozen, difference, D, BLOCK, HALF)
                total = tl.sum(sum_chunks(weight), 0)
                mean_growth = dot_rows(weight, growth) / total
                term = log1p(mean_growth) - dot_rows(weight, difference) / (UNIT * total)
            else:
                term = dot_rows(difference, difference) / (UNIT * UNIT)
            cell_term += tl.where(exists, term * token_weight, 0.0)
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
                # Without a mask, `unit` may be nonzero beyond the grid, but then no pooled token is stored.
                pooled = add_rows(pooled, unit, 1.0 / (UNIT * WINDOW_H * WINDOW_W))

        tl.store(terms_ptr + work, cell_term * term_scale)
        if POOL:
            whole_cell, is_whole = _whole_cell(cell, height, width, WINDOW_H, WINDOW_W)
            window_weight, _ = _weight(window_weights_ptr, sample * whole_cells + whole_cell, is_whole)
            pooled = scale_row(pooled, window_weight)
            pooled_row = pooled_ptr + (view_of_sample * whole_cells + whole_cell) * D
            store_row(pooled_row, pooled, is_whole, D, BLOCK)


@jit(do_not_specialize=["all_cells"])
def _backward_kernel(
    input_ptr, frozen_ptr,  # [B, T, N, D], channels contiguous
    bias_ptr, norm_weight_ptr, norm_bias_ptr,  # [D]
    token_weights_ptr, window_weights_ptr,  # [B, N], [B, M]; may be None
    statistics_ptr,  # [B, T, N, STATISTICS]
    grad_loss_ptr, grad_cycle_ptr, grad_term_ptr,  # [], or [B] with GRAD_STRIDE = 1; may be None
    grad_pooled_ptr,  # [B, T, M, D]
    grad_input_ptr,  # [B, T, N, D]
    grad_parameters_ptr,  # [programs, 3, D]: bias, layer norm weight, layer norm bias
    input_stride_b, input_stride_t, input_stride_n, frozen_stride_b, frozen_stride_t, frozen_stride_n,
    all_cells, views, height, width, whole_cells, term_scale, pooled_scale, lambda_reg,
    GRAD_STRIDE: tl.constexpr,
    D: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    HEAD: tl.constexpr, TANH: tl.constexpr, KL: tl.constexpr, POOL: tl.constexpr, HALF: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, STATISTICS: tl.constexpr,
    STAGES: tl.constexpr, KEEP_HEAD: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the inputs, and partial sums of the gradients of the head's parameters.

    Each program processes every num_programs-th of the B T cells and keeps its partial sums in registers.
    """
    program = tl.program_id(0)
    cells = tl.cdiv(height, WINDOW_H) * tl.cdiv(width, WINDOW_W)
    if HEAD:
        if KEEP_HEAD:
            bias, norm_weight, norm_bias = _load_head(
                bias_ptr, norm_weight_ptr, norm_bias_ptr, D, BLOCK, CHUNKS
            )
        grad_bias = zero_row(BLOCK, CHUNKS)
        grad_norm_weight = zero_row(BLOCK, CHUNKS)
        grad_norm_bias = zero_row(BLOCK, CHUNKS)

    for work in range(program, all_cells, tl.num_programs(0)):
        cell = work % cells
        view_of_sample = (work // cells).to(tl.int64)
        view = view_of_sample % views
        sample = view_of_sample // views
        input_base = input_ptr + sample * input_stride_b + view * input_stride_t
        frozen_base = frozen_ptr + sample * frozen_stride_b + view * frozen_stride_t
        grad_base = grad_input_ptr + view_of_sample * height * width * D
        grad_loss = _load_or_zero(grad_loss_ptr, sample * GRAD_STRIDE)
        grad_term = _load_or_zero(grad_term_ptr, sample * GRAD_STRIDE) + lambda_reg * grad_loss
        grad_term *= term_scale
        if POOL:
            grad_cycle = _load_or_zero(grad_cycle_ptr, sample * GRAD_STRIDE) + grad_loss
            grad_cycle *= pooled_scale / (WINDOW_H * WINDOW_W)
            whole_cell, is_whole = _whole_cell(cell, height, width, WINDOW_H, WINDOW_W)
            pooled_row = grad_pooled_ptr + (view_of_sample * whole_cells + whole_cell) * D
            window_weight, _ = _weight(window_weights_ptr, sample * whole_cells + whole_cell, is_whole)
            grad_cycle *= window_weight

        for slot in tl.range(0, WINDOW_H * WINDOW_W, num_stages=STAGES):
            token, inside = _token_of_cell(cell, slot, height, width, WINDOW_H, WINDOW_W)
            token_weight, exists = _weight(token_weights_ptr, sample * height * width + token, inside)
            values = load_row(input_base + token * input_stride_n, exists, D, BLOCK, CHUNKS)
            frozen = load_row(frozen_base + token * frozen_stride_n, exists, D, BLOCK, CHUNKS)
            statistics = statistics_ptr + (view_of_sample * height * width + token) * STATISTICS
            if HEAD:
                if not KEEP_HEAD:
                    bias, norm_weight, norm_bias = _load_head(
                        bias_ptr, norm_weight_ptr, norm_bias_ptr, D, BLOCK, CHUNKS
                    )
                mean = tl.load(statistics, mask=exists, other=0.0)
                inverse_std = tl.load(statistics + 1, mask=exists, other=0.0)
                hidden = _hidden(values, bias, TANH, HALF)
                standard = scale_row(_centred(hidden, mean, D, BLOCK), inverse_std)
                values = multiply_add_rows(standard, norm_weight, norm_bias)
            # For tokens that do not exist, a scale of 0 makes all gradients 0.
            scale = tl.load(statistics + 2, mask=exists, other=0.0)
            unit = scale_row(values, UNIT * scale)
            frozen_scale = tl.load(statistics + 3, mask=exists, other=0.0)
            frozen = scale_row(frozen, UNIT * frozen_scale)
            difference = add_rows(unit, frozen, -1.0)
            if KL:
                weight, growth = _growth(frozen, difference, D, BLOCK, HALF)
                total = tl.load(statistics + 4, mask=exists, other=1.0)
                mean_growth = tl.load(statistics + 5, mask=exists, other=0.0)
                factor = grad_term * token_weight / (total * (1.0 + mean_growth))
                grad = ()
                for c in tl.static_range(CHUNKS):
                    grad = append(grad, weight[c] * (growth[c] * factor - mean_growth * factor))
            else:
                grad = scale_row(difference, 2.0 * grad_term * token_weight / UNIT)
            if POOL:
                grad_pooled = load_row(pooled_row, is_whole, D, BLOCK, CHUNKS)
                grad = add_rows(grad, grad_pooled, grad_cycle)

            # A norm below 1e-12 is replaced by this constant, so no gradient flows through it. The division
            # that gives the scale may round 1e12 down.
            along = tl.where(scale < 0.99999e12, dot_rows(unit, grad) / (UNIT * UNIT), 0.0)
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
            store_row(grad_base + token * D, grad, inside, D, BLOCK)

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

    Returns the separability terms (B, T, cells) in fp32, whose sum is the loss; the pooled tokens (B, T, M,
    D), which are empty without `pool`; and the statistics (B, T, N, 6) for `launch_backward`, which are empty
    without `statistics`.
    """
    inputs = epilogue.inputs
    samples, views, _, channels = inputs.shape
    tensors, numbers, constants = _shared_arguments(epilogue, pool, FORWARD_SCHEDULE)
    terms_BTC = inputs.new_empty((samples, views, epilogue.cells), dtype=torch.float32)
    statistics_BTNS = inputs.new_empty(statistics_shape(inputs, statistics), dtype=torch.float32)
    pooled_shape = (samples, views, epilogue.whole_cells, channels) if pool else (0,)
    pooled_BTMD = inputs.new_empty(pooled_shape, dtype=pooled_dtype(inputs.dtype))
    constants["STATISTICS"] = STATISTICS if statistics else 0
    arguments = (*tensors, terms_BTC, statistics_BTNS, pooled_BTMD, *numbers, epilogue.norm_eps)
    with on_device(inputs):
        programs = _programs(_forward_kernel, epilogue, arguments, constants)
        _forward_kernel[(programs,)](*arguments, **constants)
    return terms_BTC, pooled_BTMD, statistics_BTNS


def launch_backward(
    epilogue: Epilogue,
    statistics_BTNS: Tensor,
    grad_separability: Tensor | None,
    *,
    grad_loss: Tensor | None = None,
    lambda_reg: float = 0.0,
    grad_cycle: Tensor | None = None,
    grad_pooled_BTMD: Tensor | None = None,
    pooled_scale: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Compute the gradients of the inputs (B, T, N, D) and, with a head, of its parameters (3, D) in fp32.

    The incoming gradients are 0-d tensors, or (B,) if there is one loss per sample. The kernel reads them on
    the device. That of the separability is
    grad_separability + lambda_reg * grad_loss, and that of the pooled tokens is grad_pooled * (grad_cycle +
    grad_loss) * pooled_scale.
    """
    inputs, head, channels = epilogue.inputs, epilogue.head, epilogue.inputs.shape[-1]
    pool = grad_pooled_BTMD is not None
    tensors, numbers, constants = _shared_arguments(epilogue, pool, BACKWARD_SCHEDULE)
    grad_BTND = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    constants |= {"STATISTICS": STATISTICS, "GRAD_STRIDE": int(epilogue.per_sample)}
    # The incoming gradients of a sum or a mean over samples are expanded tensors.
    losses = (grad_loss, grad_cycle, grad_separability)
    grads = (None if grad is None else grad.contiguous() for grad in losses)
    first = (*tensors, statistics_BTNS, *grads, grad_pooled_BTMD, grad_BTND)
    last = (*numbers, pooled_scale, lambda_reg)
    empty = inputs.new_empty(0, dtype=torch.float32) if head else None
    with on_device(inputs):
        programs = _programs(_backward_kernel, epilogue, (*first, empty, *last), constants)
        # Each program writes partial sums of its own, which makes the sums reproducible.
        partial_P3D = inputs.new_empty((programs, 3, channels), dtype=torch.float32) if head else None
        _backward_kernel[(programs,)](*first, partial_P3D, *last, **constants)
    return grad_BTND, None if partial_P3D is None else partial_P3D.sum(0)


def _programs(kernel: Any, epilogue: Epilogue, arguments: tuple[Any, ...], constants: dict[str, Any]) -> int:
    """Number of programs to launch: one per cell, but with a head at most as many as run at once."""
    cells = _all_cells(epilogue)
    if not epilogue.head:
        return cells
    return min(cells, programs_at_once(kernel, arguments, constants))


def _all_cells(epilogue: Epilogue) -> int:
    samples, views, _, _ = epilogue.inputs.shape
    return samples * views * epilogue.cells


def _shared_arguments(
    epilogue: Epilogue, pool: bool, schedule: Schedule
) -> tuple[list[Tensor | None], tuple[Any, ...], dict[str, Any]]:
    """Arguments that both kernels share: the first tensors, the first numbers, and compile-time constants."""
    inputs, frozen = unit_stride(epilogue.inputs), unit_stride(epilogue.frozen)
    samples, views, _, channels = inputs.shape
    block, chunks = row_blocks(channels)
    parameters = [parameter.contiguous() for parameter in epilogue.head] or [inputs] * 3
    weights = [
        None if each is None else each.contiguous()
        for each in (epilogue.token_weights, epilogue.window_weights)
    ]
    # Turns the sum of the separability terms into the loss.
    term_scale = 1.0 / ((1 if epilogue.per_sample else samples) * (1 if epilogue.kl else inputs[0].numel()))
    numbers = (
        *inputs.stride()[:3], *frozen.stride()[:3],
        _all_cells(epilogue), views, epilogue.height, epilogue.width, epilogue.whole_cells, term_scale,
    )  # fmt: skip
    constants = {
        "D": channels, "WINDOW_H": epilogue.window_height, "WINDOW_W": epilogue.window_width,
        "HEAD": bool(epilogue.head), "TANH": epilogue.tanh, "KL": epilogue.kl, "POOL": pool,
        "HALF": inputs.dtype != torch.float32, "UNIT": LOG2_E, "BLOCK": block, "CHUNKS": chunks,
        "STAGES": schedule.stages, "KEEP_HEAD": schedule.keep_head,
        # Enough warps to hold a row in registers without spilling.
        "num_warps": next_power_of_2(ceil_div(block * chunks, schedule.channels_per_warp)),
        # Newer versions of Triton fuse multiplications and additions only on request (triton PR 11270).
        "enable_fp_fusion": True,
    }  # fmt: skip
    return [inputs, frozen, *parameters, *weights], numbers, constants


# --- the loss alone -----------------------------------------------------------------------------------


def _epilogue(
    projected: Tensor, frozen: Tensor, weights: Tensor | None, kl: bool, per_sample: bool
) -> Epilogue:
    """Build the inputs for the loss alone. The grid matters only for pooling: use a row of 4-token cells."""
    return Epilogue(
        projected, frozen, bias=None, norm_weight=None, norm_bias=None,
        token_weights=weights, window_weights=None, norm_eps=0.0, tanh=False,
        height=1, width=projected.shape[2], window_height=1, window_width=4, kl=kl,
        per_sample=per_sample,
    )  # fmt: skip


def _forward(
    projected: Tensor, frozen: Tensor, weights: Tensor | None, kl: bool, per_sample: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """Compute the loss, 0-d or (B,), and the statistics for the backward, which are empty without `keep`.

    The weights (B, N) are those of the tokens.
    """
    epilogue = _epilogue(projected, frozen, weights, kl, per_sample)
    terms, _, statistics = launch_forward(epilogue, pool=False, statistics=keep)
    return terms.sum((1, 2)) if per_sample else terms.sum(), statistics


def _backward(
    grad: Tensor,
    statistics: Tensor,
    projected: Tensor,
    frozen: Tensor,
    weights: Tensor | None,
    kl: bool,
    per_sample: bool,
) -> Tensor:
    return launch_backward(_epilogue(projected, frozen, weights, kl, per_sample), statistics, grad)[0]


def _save(
    inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> tuple[tuple[Tensor | None, ...], tuple[bool, ...]]:
    *tensors, kl, per_sample, _keep = inputs
    return (output[1], *tensors), (kl, per_sample)


_separability = operator(
    "separability",
    _forward,
    fake=lambda projected, frozen, weights, kl, per_sample, keep: (
        projected.new_empty(projected.shape[: int(per_sample)], dtype=torch.float32),
        projected.new_empty(statistics_shape(projected, keep), dtype=torch.float32),
    ),
)
_separability_backward = operator(
    "separability_backward",
    _backward,
    fake=lambda grad, statistics, projected, *_: projected.new_empty(projected.shape),
)
differentiate(_separability, lambda *args: (_separability_backward(*args),), losses=1, save=_save)


def separability_loss(
    frozen: Tensor,
    projected: Tensor,
    regularizer: Regularizer = "kl",
    backend: Backend = "auto",
    *,
    reduction: Reduction = "mean",
    mask: Tensor | None = None,
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
        reduction: `"mean"` averages the losses of the samples; `"none"` returns one loss per sample.
        mask: (B, N) bool, True for the tokens that count, in all views. The others have no effect, whatever
            they contain, and receive zero gradients. The sum or mean of a sample is over the tokens that
            count, and 0 if there is none.

    Returns:
        The loss as a 0-d tensor or, for `reduction="none"`, (B,), in float32 or (for float64 tokens) float64.

    Raises:
        ValueError: If an argument has an invalid shape, dtype, device or value, or one that
            `backend="triton"` does not support.
    """
    check_tensors(frozen=(frozen, "BTND"), projected=(projected, "BTND"))
    check_choice("regularizer", regularizer, Regularizer)
    check_choice("reduction", reduction, Reduction)
    check_mask(mask, "frozen", frozen)
    frozen = frozen.detach()
    if not use_triton(backend, frozen=frozen, projected=projected):
        if mask is not None:
            frozen, projected = (reference.fill_masked(each, mask) for each in (frozen, projected))
        units = reference.unit(frozen), reference.unit(projected)
        return reference.separability_loss(*units, regularizer, reduction, mask)
    weights = None if mask is None else reference.token_weights(mask, regularizer)
    options = (regularizer == "kl", reduction == "none", needs_grad(projected))
    loss: Tensor = _separability(projected, frozen, weights, *options)[0]
    return loss
