"""The whole objective: `cosettle_loss` from projected tokens, `cosettle_head_loss` from the linear layer.

    loss = cycle + lambda_reg x separability

On the Triton backend both are one operator of two launches and two sums: separability.py reads every token
once and leaves its terms and the pooled tokens, cycle.py turns the pooled tokens into the cycle loss and its
gradient. The backward is one launch more, that recomputes a token's row and writes its gradient.
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
from .checks import check_choice, check_grid, check_number, check_tensors
from .cycle import grad_scale, launch_cycle
from .reference import CosettleLoss, Regularizer
from .runtime import Backend, differentiate, needs_grad, operator, use_triton
from .separability import Epilogue, launch_backward, launch_forward, pooled_dtype, statistics_shape

# The fields of `Epilogue`, and what only the cycle needs.
_SCHEMA = (
    "Tensor inputs, Tensor frozen, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, "
    "bool tanh, int height, int width, int window_height, int window_width, bool kl, float temperature"
)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cycle and separability, 0-d; accuracy and similarity (2,); the scaled gradient of the pooled tokens and
    the tokens' statistics, for the backward. What is not asked for is empty."""
    *epilogue, temperature, diagnostics, keep = arguments
    separability, pooled_BTMD, statistics = launch_forward(Epilogue(*epilogue), pool=True, statistics=keep)
    grad_dtype = pooled_BTMD.dtype if keep else None
    figures_4BM, grad_pooled = launch_cycle(
        pooled_BTMD, temperature, grad_dtype=grad_dtype, diagnostics=diagnostics
    )
    measures = figures_4BM.new_empty(0)
    if diagnostics:
        _, accuracy, squares, returns = figures_4BM.mean((1, 2))
        measures = torch.stack([accuracy, returns * torch.rsqrt(squares)])
    return figures_4BM[0].mean(), separability, measures, grad_pooled, statistics


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    *epilogue, _temperature, diagnostics, keep = arguments
    given = Epilogue(*epilogue)
    samples, views, _, channels = given.inputs.shape
    pooled = (samples, views, given.whole_cells, channels) if keep else (0,)
    shapes = ((), (), (2 if diagnostics else 0,), pooled, statistics_shape(given.inputs, keep))
    dtypes = (torch.float32, torch.float32, torch.float32, pooled_dtype(given.inputs.dtype), torch.float32)
    return tuple(
        given.inputs.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
    )


def _backward(
    grad_cycle: Tensor, grad_separability: Tensor, grad_pooled: Tensor, statistics: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """Gradients of the inputs (B, T, N, D) and of the head's parameters (3, D), zeros without a head."""
    *epilogue, temperature = arguments
    samples, _, tokens, channels = grad_pooled.shape
    scale = 1.0 / (grad_scale(tokens) * temperature * samples * tokens)
    grad_inputs, grad_parameters = launch_backward(
        Epilogue(*epilogue), statistics, grad_separability, grad_cycle, grad_pooled, scale
    )
    if grad_parameters is None:
        grad_parameters = statistics.new_zeros((3, channels))
    return grad_inputs, grad_parameters


_cosettle = operator(
    "cosettle",
    _forward,
    fake=_forward_fake,
    schema=f"({_SCHEMA}, bool diagnostics, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_cosettle_backward = operator(
    "cosettle_backward",
    _backward,
    fake=lambda grad_cycle, grad_separability, grad_pooled, statistics, inputs, *_: (
        inputs.new_empty(inputs.shape),
        inputs.new_empty((3, inputs.shape[-1]), dtype=torch.float32),
    ),
    schema="(Tensor grad_cycle, Tensor grad_separability, Tensor grad_pooled, Tensor statistics, "
    f"{_SCHEMA}) -> (Tensor, Tensor)",
)


def _save(
    arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]
) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    inputs, frozen, bias, norm_weight, norm_bias, *options, _diagnostics, _keep = arguments
    _cycle, _separability, _measures, grad_pooled, statistics = outputs
    return (grad_pooled, statistics, inputs, frozen, bias, norm_weight, norm_bias), tuple(options)


def _gradients(
    grad_cycle: Tensor, grad_separability: Tensor, grad_pooled: Tensor, statistics: Tensor, *arguments: Any
) -> tuple[Tensor | None, ...]:
    """Those of the inputs, the frozen tokens, and the head's parameters in their own dtypes."""
    *epilogue, _temperature = arguments
    grad_inputs, grad_parameters = _cosettle_backward(
        grad_cycle, grad_separability, grad_pooled, statistics, *arguments
    )
    of_head = zip(Epilogue(*epilogue).head, grad_parameters, strict=False)
    return grad_inputs, None, *(grad.to(parameter.dtype) for parameter, grad in of_head)


differentiate(_cosettle, _gradients, losses=2, save=_save)


def _objective(
    frozen: Tensor,
    tensors: dict[str, Tensor],
    grid: tuple[int, int],
    temperature: float,
    window: int,
    lambda_reg: float,
    regularizer: Regularizer,
    backend: Backend,
    diagnostics: bool,
    norm_eps: float = 0.0,
    tanh: bool = False,
) -> CosettleLoss:
    """The objective of the first of the `tensors`, after a head's epilogue where its parameters follow."""
    shapes = {name: "D" if name in ("bias", "norm_weight", "norm_bias") else "B3ND" for name in tensors}
    check_tensors(frozen=(frozen, "B3ND"), **{name: (tensors[name], shapes[name]) for name in tensors})
    check_grid(grid, window, frozen.shape[2])
    check_number("temperature", temperature)
    check_number("lambda_reg", lambda_reg, zero=True)
    check_choice("regularizer", regularizer, Regularizer)
    check_number("norm_eps", norm_eps, zero=True)
    inputs, *head = tensors.values()
    if not use_triton(backend, frozen=frozen, **tensors):
        if head:
            bias, norm_weight, norm_bias = head
            inputs = reference.head_epilogue(inputs, bias, norm_weight, norm_bias, norm_eps, tanh)
        return reference.cosettle_loss(
            frozen, inputs, grid, temperature, window, lambda_reg, regularizer, diagnostics
        )
    height, width = grid
    epilogue = Epilogue(
        inputs=inputs,
        frozen=frozen.detach(),
        bias=tensors.get("bias"),
        norm_weight=tensors.get("norm_weight"),
        norm_bias=tensors.get("norm_bias"),
        norm_eps=norm_eps,
        tanh=tanh,
        height=height,
        width=width,
        window_height=window,
        window_width=window,
        kl=regularizer == "kl",
    )
    keep = needs_grad(*tensors.values())
    cycle, separability, measures, _, _ = _cosettle(*epilogue, temperature, diagnostics, keep)
    loss = torch.add(cycle, separability, alpha=lambda_reg)
    accuracy, similarity = measures.unbind() if diagnostics else (None, None)
    return CosettleLoss(loss, cycle, separability, accuracy, similarity)


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
        projected: (B, 3, N, D) the head's output for them, before L2 normalisation; the only one that gets
            gradients. Its dtype may differ from that of `frozen`; arithmetic is float32 at least.
        grid: (h, w) with h * w == N.
        temperature: of the transition probabilities, above 0.
        window: side of the average pooling before the cycle, in cells; 1 means none.
        lambda_reg: weight of the separability term.
        regularizer: `kl` or `mse`.
        backend: `auto` (Triton on CUDA tensors where Triton is installed, else eager), `triton` or `eager`.
        diagnostics: whether to form cycle accuracy and identity similarity, which need the whole of C.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and what is expected.
    """
    options = (grid, temperature, window, lambda_reg, regularizer, backend, diagnostics)
    return _objective(frozen, {"projected": projected}, *options)


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
        tanh: whether the head has a tanh; without it the head is layer_norm(linear + bias).

    The other arguments, the result and the errors are those of `cosettle_loss`.
    """
    tensors = {"linear": linear, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    options = (grid, temperature, window, lambda_reg, regularizer, backend, diagnostics)
    return _objective(frozen, tensors, *options, norm_eps, tanh)
