"""The whole objective: `cosettle_loss` from projected tokens, `cosettle_head_loss` from the linear layer.

    loss = cycle + lambda_reg x separability

On the Triton backend both are one operator of two launches and two sums: epilogue.py reads every token once
and leaves the separability terms and the pooled tokens, cycle.py turns the pooled tokens into the cycle loss
and its gradient. The backward is one launch more, that recomputes a token's row and writes its gradient.
Memory beyond the inputs: the pooled tokens and, kept for the backward, their gradient, a quarter of a token
map each with 2 x 2 windows; and six numbers a token.

Source: arXiv 2603.26597, section 3. Shape suffixes: B samples, T = 3 views, N tokens, M pooled tokens, D
channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .checks import (
    check_grid,
    check_non_negative,
    check_parameter,
    check_regularizer,
    check_same,
    check_temperature,
    check_tokens,
    check_views,
)
from .cycle import grad_scale
from .cycle_streaming import launch_three_views
from .epilogue import (
    Cells,
    HeadParameters,
    launch_backward,
    launch_forward,
    pooled_dtype,
    separability_scale,
    statistics_shape,
)
from .reference import CosettleLoss, Regularizer
from .runtime import Backend, operator, require_kept, unit_stride, use_triton, wants_gradient

_ARGUMENTS = (
    "Tensor inputs, Tensor frozen, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, "
    "bool tanh, int height, int width, int window, float temperature, bool kl"
)


def _head(
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    tanh: bool,
) -> HeadParameters | None:
    if bias is None or norm_weight is None or norm_bias is None:
        return None
    return HeadParameters(bias.contiguous(), norm_weight.contiguous(), norm_bias.contiguous(), norm_eps, tanh)


def _backward_fake(
    grad_cycle: Tensor,
    grad_separability: Tensor,
    grad_pooled: Tensor,
    statistics: Tensor,
    inputs: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    return inputs.new_empty(inputs.shape), inputs.new_empty((3, inputs.shape[-1]), dtype=torch.float32)


@operator(
    "cosettle_backward",
    f"(Tensor grad_cycle, Tensor grad_separability, Tensor grad_pooled, Tensor statistics, {_ARGUMENTS}) "
    "-> (Tensor, Tensor)",
    fake=_backward_fake,
)
def _cosettle_backward(
    grad_cycle: Tensor,
    grad_separability: Tensor,
    grad_pooled: Tensor,
    statistics: Tensor,
    inputs: Tensor,
    frozen: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    tanh: bool,
    height: int,
    width: int,
    window: int,
    temperature: float,
    kl: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the inputs (B, T, N, D) and of the head's parameters (3, D), zeros without a head."""
    samples, _, tokens, channels = grad_pooled.shape
    grad_inputs, grad_parameters = launch_backward(
        unit_stride(inputs),
        unit_stride(frozen),
        _head(bias, norm_weight, norm_bias, norm_eps, tanh),
        Cells((height, width), (window, window)),
        statistics,
        grad_separability,
        grad_cycle,
        grad_pooled,
        kl=kl,
        term_scale=separability_scale(inputs, kl),
        pooled_scale=1.0 / (grad_scale(tokens) * temperature * samples * tokens),
    )
    if grad_parameters is None:
        grad_parameters = inputs.new_zeros((3, channels), dtype=torch.float32)
    return grad_inputs, grad_parameters


def _forward_fake(
    inputs: Tensor,
    frozen: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    tanh: bool,
    height: int,
    width: int,
    window: int,
    temperature: float,
    kl: bool,
    grad: bool,
    diagnostics: bool,
) -> tuple[Tensor, ...]:
    samples, views, _, channels = inputs.shape
    pooled = (samples, views, (height // window) * (width // window), channels) if grad else (0,)
    return (
        inputs.new_empty((), dtype=torch.float32),
        inputs.new_empty((), dtype=torch.float32),
        inputs.new_empty((2 if diagnostics else 0,), dtype=torch.float32),
        inputs.new_empty(pooled, dtype=pooled_dtype(inputs.dtype)),
        inputs.new_empty(statistics_shape(inputs, grad), dtype=torch.float32),
    )


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, frozen, bias, norm_weight, norm_bias, *ctx.constants, ctx.kept, _ = inputs
    ctx.save_for_backward(*output[3:], tokens, frozen, bias, norm_weight, norm_bias)
    ctx.mark_non_differentiable(*output[2:])
    # Or every backward would fill zeros as large as the pooled tokens' gradient, for nothing.
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_cycle: Tensor | None, grad_separability: Tensor | None, *_: None
) -> tuple[Any, ...]:
    require_kept(ctx.kept)
    *saved, bias, norm_weight, norm_bias = ctx.saved_tensors
    statistics = saved[1]
    if grad_cycle is None:
        grad_cycle = statistics.new_zeros(())
    if grad_separability is None:
        grad_separability = statistics.new_zeros(())
    parameters = (bias, norm_weight, norm_bias)
    grad_tokens, grad_parameters = _cosettle_backward(
        grad_cycle, grad_separability, *saved, *parameters, *ctx.constants
    )
    of_head = [
        None if parameter is None else grad.to(parameter.dtype)
        for parameter, grad in zip(parameters, grad_parameters, strict=True)
    ]
    return grad_tokens, None, *of_head, *(None for _ in ctx.constants), None, None


@operator(
    "cosettle",
    f"({_ARGUMENTS}, bool grad, bool diagnostics) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    setup_context=_save_inputs,
    backward=_differentiate,
)
def _cosettle(
    inputs: Tensor,
    frozen: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    tanh: bool,
    height: int,
    width: int,
    window: int,
    temperature: float,
    kl: bool,
    grad: bool,
    diagnostics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cycle and separability, 0-d; accuracy and similarity (2,); what the backward needs.

    That is the pooled tokens' scaled gradient and the tokens' statistics. What is not asked for is empty.
    """
    terms_BTN, pooled_BTMD, statistics_BTNS = launch_forward(
        unit_stride(inputs),
        unit_stride(frozen),
        _head(bias, norm_weight, norm_bias, norm_eps, tanh),
        Cells((height, width), (window, window)),
        kl=kl,
        pool=True,
        term_scale=separability_scale(inputs, kl),
        statistics=grad,
    )
    figures_FBM, grad_pooled = launch_three_views(
        pooled_BTMD, temperature, grad_dtype=pooled_BTMD.dtype if grad else None, diagnostics=diagnostics
    )
    if diagnostics:
        _, accuracy, squares, returns = figures_FBM.mean((1, 2))
        measures = torch.stack([accuracy, returns * torch.rsqrt(squares)])
    else:
        measures = figures_FBM.new_empty(0)
    return figures_FBM[0].mean(), terms_BTN.sum(), measures, grad_pooled, statistics_BTNS


def _fused(
    inputs: Tensor,
    frozen: Tensor,
    head: tuple[Tensor, Tensor, Tensor] | None = None,
    norm_eps: float = 0.0,
    tanh: bool = False,
    *,
    grid: tuple[int, int],
    temperature: float,
    window: int,
    lambda_reg: float,
    regularizer: Regularizer,
    diagnostics: bool,
) -> CosettleLoss:
    parameters = head or (None, None, None)
    cycle, separability, measures, _, _ = _cosettle(
        inputs,
        frozen.detach(),
        *parameters,
        norm_eps,
        tanh,
        *grid,
        window,
        temperature,
        regularizer == "kl",
        wants_gradient(inputs, *parameters),
        diagnostics,
    )
    loss = torch.add(cycle, separability, alpha=lambda_reg)
    accuracy, similarity = measures.unbind() if diagnostics else (None, None)
    return CosettleLoss(loss, cycle, separability, accuracy, similarity)


def _checked_options(
    frozen: Tensor,
    name: str,
    tokens: Tensor,
    grid: tuple[int, int],
    temperature: float,
    window: int,
    lambda_reg: float,
    regularizer: str,
    diagnostics: bool,
) -> dict[str, Any]:
    """The options that the fused form and the reference share."""
    check_tokens("frozen", frozen, "B3ND")
    check_tokens(name, tokens, "B3ND")
    check_same(name, tokens, "frozen", frozen)
    check_views("frozen", frozen, 3)
    check_grid(grid, window, frozen.shape[2])
    check_temperature(temperature)
    check_non_negative("lambda_reg", lambda_reg)
    check_regularizer(regularizer)
    return {
        "grid": grid,
        "temperature": temperature,
        "window": window,
        "lambda_reg": lambda_reg,
        "regularizer": regularizer,
        "diagnostics": diagnostics,
    }


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
    diagnostics: bool = True,
) -> CosettleLoss:
    """The Co-Settle objective (arXiv 2603.26597, section 3): cycle consistency plus semantic separability.

    Args:
        frozen: (B, 3, N, D) frozen tokens: frame 1, frame 2, frame 1 with asymmetric positions; float16,
            bfloat16 or float32, on the eager backend float64 too; any strides.
        projected: (B, 3, N, D) the head's output for them, before L2 normalisation; alone gets gradients.
            Its dtype may differ from that of `frozen`; arithmetic is float32 at least.
        grid: (h, w) with h * w == N.
        temperature: of the transition probabilities, above 0.
        window: side of the average pooling ahead of the cycle, in cells; 1 is none.
        lambda_reg: weight of the separability term.
        regularizer: `kl` or `mse`.
        backend: `auto` (Triton on CUDA tensors where Triton is installed, else eager), `triton` or `eager`.
        diagnostics: whether to form cycle accuracy and identity similarity, which need the whole of C.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and what is expected.
    """
    options = _checked_options(
        frozen, "projected", projected, grid, temperature, window, lambda_reg, regularizer, diagnostics
    )
    if use_triton(backend, frozen=frozen, projected=projected):
        return _fused(projected, frozen, **options)
    return reference.cosettle_loss(frozen, projected, **options)


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
    diagnostics: bool = True,
) -> CosettleLoss:
    """`cosettle_loss` of layer_norm(tanh(linear + bias)), without that ever being in memory.

    Args:
        linear: (B, 3, N, D) the product of the head's last linear layer, before its bias.
        bias: (D,) of that layer. norm_weight, norm_bias: (D,) of the layer norm. All four get gradients.
        norm_eps: of the layer norm.
        tanh: whether a tanh stands between them; without it the head is layer_norm(linear + bias).

    The other arguments, the result and the errors are those of `cosettle_loss`.
    """
    options = _checked_options(
        frozen, "linear", linear, grid, temperature, window, lambda_reg, regularizer, diagnostics
    )
    parameters = {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, parameter in parameters.items():
        check_parameter(name, parameter, "linear", linear)
    check_non_negative("norm_eps", norm_eps)
    if use_triton(backend, frozen=frozen, linear=linear, **parameters):
        return _fused(linear, frozen, (bias, norm_weight, norm_bias), norm_eps, tanh, **options)
    projected = reference.head_epilogue(linear, bias, norm_weight, norm_bias, norm_eps, tanh)
    return reference.cosettle_loss(frozen, projected, **options)
