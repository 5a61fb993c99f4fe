"""The complete objective: `cosettle_loss` for projected tokens, `cosettle_head_loss` with a fused head.

    loss = cycle + lambda_reg * separability

On the Triton backend both functions call the same operator. Its first kernel (separability.py) reads every
token once and writes the separability terms and the pooled tokens. Its second kernel (cycle.py) computes the
cycle loss of the pooled tokens together with its gradient. The third adds up both terms. The backward is a
single kernel, which recomputes the projected tokens and writes the gradients of the inputs.

Besides its inputs, the operator stores the pooled tokens, their gradient, and six numbers per token for the
backward. With 2 x 2 windows, the pooled tokens take a quarter of the memory of the tokens.

Source: arXiv 2603.26597, section 3.

Shape suffixes: B samples, T = 3 views, N tokens, M pooled tokens, D channels.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .checks import check_choice, check_grid, check_mask, check_number, check_tensors
from .cycle import grad_scale, launch_cycle
from .reference import CosettleOutput, Reduction, Regularizer
from .runtime import Backend, differentiate, jit, needs_grad, on_device, operator, tl, use_triton
from .separability import Epilogue, launch_backward, launch_forward, pooled_dtype, statistics_shape

# The fields of `Epilogue`, followed by the temperature of the cycle.
_SCHEMA = (
    "Tensor inputs, Tensor frozen, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? token_weights, Tensor? window_weights, float norm_eps, bool tanh, int height, int width, "
    "int window_height, int window_width, bool kl, bool per_sample, float temperature, float lambda_reg"
)

# Bytes of the cycle matrices (in fp32) for which the diagnostics are computed at once.
DIAGNOSTIC_BYTES = 2**28


@jit(do_not_specialize=["terms", "rows"])
def _sum_kernel(
    terms_ptr,  # [losses, terms]
    rows_ptr,  # [losses, rows]
    loss_ptr, cycle_ptr, separability_ptr,  # [losses]
    terms, rows, lambda_reg,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the separability terms and average the cross-entropies, always in the same order.

    One program per loss.
    """
    program = tl.program_id(0).to(tl.int64)
    terms_ptr += program * terms
    rows_ptr += program * rows
    index = tl.arange(0, BLOCK)
    separability = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, terms, BLOCK):
        separability += tl.load(terms_ptr + start + index, mask=start + index < terms, other=0.0)
    cycle = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, rows, BLOCK):
        cycle += tl.load(rows_ptr + start + index, mask=start + index < rows, other=0.0)
    separability_sum = tl.sum(separability, 0)
    cycle_mean = tl.sum(cycle, 0) / rows
    tl.store(separability_ptr + program, separability_sum)
    tl.store(cycle_ptr + program, cycle_mean)
    tl.store(loss_ptr + program, cycle_mean + lambda_reg * separability_sum)


def launch_sum(terms: Tensor, rows: Tensor, losses: list[Tensor], lambda_reg: float) -> None:
    """Write the loss, the cycle loss and the separability loss into three tensors, 0-d or (B,)."""
    programs = losses[0].numel()
    sizes = (terms.numel() // programs, rows.numel() // programs)
    with on_device(rows):
        _sum_kernel[(programs,)](terms, rows, *losses, *sizes, lambda_reg, BLOCK=4096, num_warps=8)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute the losses and save what the backward needs.

    Returns the loss, the cycle loss and the separability loss (0-d or (B,)), cycle accuracy and identity
    similarity (2,), the scaled gradient of the pooled tokens (B, T, M, D), and the statistics of each token.
    Results that were not requested are empty.
    """
    *given, temperature, lambda_reg, diagnostics, keep = arguments
    epilogue = Epilogue(*given)
    terms, pooled_BTMD, statistics = launch_forward(epilogue, pool=True, statistics=keep)
    weights_BM = epilogue.cycle_weights
    rows_BM, grad_pooled = launch_cycle(pooled_BTMD, weights_BM, temperature, grad=keep)
    losses = [rows_BM.new_empty(epilogue.losses_shape) for _ in range(3)]
    launch_sum(terms, rows_BM, losses, lambda_reg)
    measured = _diagnostics(pooled_BTMD, weights_BM, temperature) if diagnostics else rows_BM.new_empty(0)
    return *losses, measured, grad_pooled, statistics


def _diagnostics(walk_B3MD: Tensor, weights_BM: Tensor | None, temperature: float) -> Tensor:
    """Compute cycle accuracy and identity similarity (2,), some samples at a time to bound the memory."""
    group = max(1, DIAGNOSTIC_BYTES // (4 * walk_B3MD.shape[2] ** 2))
    parts = walk_B3MD.split(group)
    exists_BM = None if weights_BM is None else weights_BM > 0
    masks = [None] * len(parts) if exists_BM is None else exists_BM.split(group)
    # The autocast of a training step also applies inside an operator.
    with torch.autocast(walk_B3MD.device.type, enabled=False):
        rows = [
            reference.cycle_rows(reference.cycle_affinities(part, temperature, mask))
            for part, mask in zip(parts, masks, strict=True)
        ]
        return torch.stack(reference.cycle_diagnostics(torch.cat(rows, dim=1), exists_BM))


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    *given, _temperature, _lambda_reg, diagnostics, keep = arguments
    epilogue = Epilogue(*given)
    inputs, loss = epilogue.inputs, epilogue.losses_shape
    samples, views, _, channels = inputs.shape
    pooled = (samples, views, epilogue.whole_cells, channels) if keep else (0,)
    shapes = (loss, loss, loss, (2 if diagnostics else 0,), pooled, statistics_shape(inputs, keep))
    fp32 = torch.float32
    dtypes = (fp32, fp32, fp32, fp32, pooled_dtype(inputs.dtype), fp32)
    return tuple(inputs.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))


def _backward(
    grad_loss: Tensor | None,
    grad_cycle: Tensor | None,
    grad_separability: Tensor | None,
    grad_pooled: Tensor,
    statistics: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the inputs (B, T, N, D) and of the head's parameters (3, D).

    Without a head, the latter are zeros.
    """
    *given, temperature, lambda_reg = arguments
    epilogue = Epilogue(*given)
    window_weights, cycle_weights = epilogue.window_weights, epilogue.cycle_weights
    if window_weights is not None and cycle_weights is not None:
        # The stored gradient is without the weights of the cycle, with which it could overflow in fp16.
        epilogue = epilogue._replace(window_weights=window_weights * cycle_weights)
    samples, _, tokens, channels = grad_pooled.shape
    averaged = tokens if epilogue.per_sample else samples * tokens
    grad_inputs, grad_parameters = launch_backward(
        epilogue,
        statistics,
        grad_separability,
        grad_loss=grad_loss,
        lambda_reg=lambda_reg,
        grad_cycle=grad_cycle,
        grad_pooled_BTMD=grad_pooled,
        pooled_scale=1.0 / (grad_scale(tokens) * temperature * averaged),
    )
    if grad_parameters is None:
        grad_parameters = statistics.new_zeros((3, channels))
    return grad_inputs, grad_parameters


_cosettle = operator(
    "cosettle",
    _forward,
    fake=_forward_fake,
    schema=f"({_SCHEMA}, bool diagnostics, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_cosettle_backward = operator(
    "cosettle_backward",
    _backward,
    fake=lambda grad_loss, grad_cycle, grad_separability, grad_pooled, statistics, inputs, *_: (
        inputs.new_empty(inputs.shape),
        inputs.new_empty((3, inputs.shape[-1]), dtype=torch.float32),
    ),
    schema="(Tensor? grad_loss, Tensor? grad_cycle, Tensor? grad_separability, Tensor grad_pooled, "
    f"Tensor statistics, {_SCHEMA}) -> (Tensor, Tensor)",
)


def _save(
    arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]
) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    # The tensors of `Epilogue`, and its options and those of the objective.
    tensors, (*options, _diagnostics, _keep) = arguments[:7], arguments[7:]
    *_losses, _measured, grad_pooled, statistics = outputs
    return (grad_pooled, statistics, *tensors), tuple(options)


def _gradients(*arguments: Any) -> tuple[Tensor | None, ...]:
    """Compute the gradients of the inputs and of the head's parameters, with None for the frozen tokens."""
    grad_inputs, grad_parameters = _cosettle_backward(*arguments)
    # After three gradients, the scaled gradient of the pooled tokens, and the statistics.
    *epilogue, _temperature, _lambda_reg = arguments[5:]
    head_grads = zip(Epilogue(*epilogue).head, grad_parameters, strict=False)
    return grad_inputs, None, *(grad.to(parameter.dtype) for parameter, grad in head_grads)


differentiate(_cosettle, _gradients, losses=3, save=_save)


def _objective(
    frozen: Tensor,
    tensors: dict[str, Tensor],
    grid: tuple[int, int],
    temperature: float,
    window: int,
    lambda_reg: float,
    regularizer: Regularizer,
    backend: Backend,
    reduction: Reduction,
    diagnostics: bool,
    mask: Tensor | None,
    norm_eps: float = 0.0,
    tanh: bool = False,
) -> CosettleOutput:
    """Check the arguments and compute the objective.

    `tensors` maps the argument names of the public function to its tensors: `projected` alone, or `linear`
    followed by the head's parameters.
    """
    shapes = {name: "D" if name in ("bias", "norm_weight", "norm_bias") else "B3ND" for name in tensors}
    check_tensors(frozen=(frozen, "B3ND"), **{name: (tensors[name], shapes[name]) for name in tensors})
    check_grid(grid, window, frozen.shape[2])
    check_number("temperature", temperature)
    check_number("lambda_reg", lambda_reg, zero=True)
    check_choice("regularizer", regularizer, Regularizer)
    check_choice("reduction", reduction, Reduction)
    check_number("norm_eps", norm_eps, zero=True)
    check_mask(mask, "frozen", frozen)
    inputs, *head = tensors.values()
    if not use_triton(backend, frozen=frozen, **tensors):
        if mask is not None:
            frozen, inputs = (reference.fill_masked(each, mask) for each in (frozen, inputs))
        if head:
            bias, norm_weight, norm_bias = head
            inputs = reference.head_epilogue(inputs, bias, norm_weight, norm_bias, norm_eps, tanh)
        return reference.cosettle_loss(
            frozen, inputs, grid, temperature, window, lambda_reg, regularizer, reduction, diagnostics, mask
        )
    height, width = grid
    epilogue = Epilogue(
        inputs=inputs,
        frozen=frozen.detach(),
        bias=tensors.get("bias"),
        norm_weight=tensors.get("norm_weight"),
        norm_bias=tensors.get("norm_bias"),
        token_weights=None if mask is None else reference.token_weights(mask, regularizer),
        window_weights=None if mask is None else reference.window_weights(mask, grid, window),
        norm_eps=norm_eps,
        tanh=tanh,
        height=height,
        width=width,
        window_height=window,
        window_width=window,
        kl=regularizer == "kl",
        per_sample=reduction == "none",
    )
    keep = needs_grad(*tensors.values())
    outputs = _cosettle(*epilogue, temperature, lambda_reg, diagnostics, keep)
    loss, cycle, separability, measured, _grad_pooled, _statistics = outputs
    accuracy, similarity = measured.unbind() if diagnostics else (None, None)
    return CosettleOutput(loss, cycle, separability, accuracy, similarity)


def cosettle_loss(
    frozen: Tensor,
    projected: Tensor,
    grid: tuple[int, int],
    temperature: float = 0.03,
    window: int = 2,
    lambda_reg: float = 3.0,
    regularizer: Regularizer = "kl",
    backend: Backend = "auto",
    *,
    reduction: Reduction = "mean",
    diagnostics: bool = True,
    mask: Tensor | None = None,
) -> CosettleOutput:
    """Compute the Co-Settle objective: cycle consistency plus weighted semantic separability.

    Source: arXiv 2603.26597, section 3. The views are frame 1, frame 2, and frame 1 with asymmetric
    positions. Gradients flow into `projected` only.

    Args:
        frozen: (B, 3, N, D) tokens of the frozen encoder, in float16, bfloat16, float32 or (eager only)
            float64. Any strides are supported.
        projected: (B, 3, N, D) output of the projection for the same tokens, before L2 normalisation. Its
            dtype may differ from that of `frozen`.
        grid: Height and width of the token grid, with h * w = N.
        temperature: Temperature of the transition probabilities, greater than 0.
        window: Side in tokens of the square windows over which the projected tokens are averaged for the
            cycle loss. 1 disables pooling.
        lambda_reg: Weight of the separability term, at least 0.
        regularizer: Form of the separability term: `"kl"` (Kullback-Leibler divergence) or `"mse"` (mean
            squared difference).
        backend: `"triton"`, `"eager"` (plain PyTorch), or `"auto"`, which selects Triton if it is installed
            and the tensors are on an NVIDIA GPU of compute capability 8.0 or higher and not in float64.
        reduction: `"mean"` averages the losses of the samples; `"none"` returns one loss per sample, for
            example to weigh them. The mean of the latter equals the former up to rounding.
        diagnostics: Whether to compute cycle accuracy and identity similarity, which need the complete cycle
            matrix.
        mask: (B, N) bool, True for the tokens that count, in all views. The others have no effect, whatever
            they contain, and receive zero gradients. A window is averaged over its tokens that count; without
            any, the walk neither starts there nor visits it. Sums and means of a sample are over what
            remains; its losses are 0 if nothing does.

    Returns:
        A `CosettleOutput` in float32 or (for float64 tokens) float64. Its losses are 0-d or, for
        `reduction="none"`, (B,).

    Raises:
        ValueError: If an argument has an invalid shape, dtype, device or value, or one that
            `backend="triton"` does not support.
    """
    options = (grid, temperature, window, lambda_reg, regularizer, backend, reduction, diagnostics, mask)
    return _objective(frozen, {"projected": projected}, *options)


class CosettleLoss(nn.Module):
    """`cosettle_loss` as a module without parameters; its arguments have the same meaning."""

    def __init__(
        self,
        *,
        temperature: float = 0.03,
        window: int = 2,
        lambda_reg: float = 3.0,
        regularizer: Regularizer = "kl",
        backend: Backend = "auto",
        reduction: Reduction = "mean",
        diagnostics: bool = True,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.window = window
        self.lambda_reg = lambda_reg
        self.regularizer = regularizer
        self.backend = backend
        self.reduction = reduction
        self.diagnostics = diagnostics

    def extra_repr(self) -> str:
        """Return the options, which `print` shows."""
        names = inspect.signature(type(self)).parameters
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(
        self, frozen: Tensor, projected: Tensor, grid: tuple[int, int], mask: Tensor | None = None
    ) -> CosettleOutput:
        """Compute the losses of tokens (B, 3, N, D) on the grid (h, w) with h * w = N, and a mask (B, N)."""
        return cosettle_loss(
            frozen,
            projected,
            grid,
            self.temperature,
            self.window,
            self.lambda_reg,
            self.regularizer,
            self.backend,
            reduction=self.reduction,
            diagnostics=self.diagnostics,
            mask=mask,
        )


def cosettle_head_loss(
    frozen: Tensor,
    linear: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    grid: tuple[int, int],
    temperature: float = 0.03,
    window: int = 2,
    lambda_reg: float = 3.0,
    regularizer: Regularizer = "kl",
    backend: Backend = "auto",
    *,
    norm_eps: float = 1e-5,
    tanh: bool = True,
    reduction: Reduction = "mean",
    diagnostics: bool = True,
    mask: Tensor | None = None,
) -> CosettleOutput:
    """Compute `cosettle_loss` of layer_norm(tanh(linear + bias)) without storing the projected tokens.

    Gradients flow into `linear`, `bias`, `norm_weight` and `norm_bias`.

    Args:
        frozen: (B, 3, N, D) tokens of the frozen encoder, as in `cosettle_loss`.
        linear: (B, 3, N, D) output of the head's last linear layer, before its bias is added.
        bias: (D,) bias of the linear layer; zeros if it has none.
        norm_weight: (D,) weight of the layer norm; ones if it has none.
        norm_bias: (D,) bias of the layer norm; zeros if it has none.
        grid: Height and width of the token grid, with h * w = N.
        temperature: Temperature of the transition probabilities, greater than 0.
        window: Side of the pooling windows in tokens. 1 disables pooling.
        lambda_reg: Weight of the separability term, at least 0.
        regularizer: Form of the separability term, `"kl"` or `"mse"`.
        backend: `"triton"`, `"eager"` (plain PyTorch), or `"auto"`, which selects Triton if it is installed
            and the tensors are on an NVIDIA GPU of compute capability 8.0 or higher and not in float64.
        norm_eps: Epsilon of the layer norm, at least 0.
        tanh: Whether to apply tanh. Without it, the projected tokens are layer_norm(linear + bias).
        reduction: `"mean"` averages the losses of the samples; `"none"` returns one loss per sample, for
            example to weigh them. The mean of the latter equals the former up to rounding.
        diagnostics: Whether to compute cycle accuracy and identity similarity, which need the complete cycle
            matrix.
        mask: (B, N) bool, True for the tokens that count, as in `cosettle_loss`.

    Returns:
        A `CosettleOutput` in float32 or (for float64 tokens) float64. Its losses are 0-d or, for
        `reduction="none"`, (B,).

    Raises:
        ValueError: If an argument has an invalid shape, dtype, device or value, or one that
            `backend="triton"` does not support.
    """
    tensors = {"linear": linear, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    options = (grid, temperature, window, lambda_reg, regularizer, backend, reduction, diagnostics, mask)
    return _objective(frozen, tensors, *options, norm_eps, tanh)
