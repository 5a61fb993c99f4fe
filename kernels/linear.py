"""The complete objective together with the linear layer of the head: `cosettle_linear_loss`.

`cosettle_head_loss` needs the product of the linear layer (B, 3, N, D) in the forward and in the backward,
where the gradient of the product joins it. Here the forward processes a few samples at a time and computes
their gradients at once, so that neither tensor exists for more than these samples. The backward only scales
the gradients by the incoming gradient. The number of multiplications is about the same.

The idea is that of the fused linear cross-entropy of Hsu et al., "Liger Kernel: Efficient Triton Kernels for
LLM Training", arXiv 2410.10989.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .checks import check_mask, check_tensors
from .cosettle import cosettle_head_loss
from .reference import CosettleOutput, Regularizer, fill_masked
from .runtime import Backend

# Bytes of the product that exist at once by default. They fit into the L2 cache of an A100 or H100, and are
# about 20,000 rows at the paper's shape in half precision, which keeps a GPU busy.
CHUNK_BYTES = 2**25


def _chunk_gradients(
    frozen: Tensor,
    inputs: Tensor,
    weight: Tensor,
    head: tuple[Tensor, ...],
    wanted: tuple[bool, ...],
    share: float,
    options: Any,
) -> tuple[Tensor, list[Tensor | None]]:
    """Compute the losses of some samples times their share of the batch (3,), and the gradients of the first.

    The gradients are those of the inputs, the weight and the parameters of the head, or None if not wanted.
    """
    wants_inputs, wants_weight, *wants_head = wanted
    wants = (wants_inputs or wants_weight, *wants_head)
    product = functional.linear(inputs, weight)
    leaves = [tensor.detach() for tensor in (product, *head)]
    targets = [leaf.requires_grad_() for leaf, want in zip(leaves, wants, strict=True) if want]
    with torch.enable_grad():
        product, bias, norm_weight, norm_bias = leaves
        out = cosettle_head_loss(frozen, product, bias, norm_weight, norm_bias, **options)
        found = iter(torch.autograd.grad(share * out.loss, targets) if targets else ())
    grad_product, *grad_head = (next(found) if want else None for want in wants)
    grad_inputs = grad_weight = None
    if grad_product is not None:
        grad_inputs = grad_product @ weight if wants_inputs else None
        grad_weight = grad_product.flatten(0, 2).T @ inputs.flatten(0, 2) if wants_weight else None
    return share * torch.stack(out[:3]).detach(), [grad_inputs, grad_weight, *grad_head]


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, wanted: tuple[bool, ...], chunk_size: int, options: dict[str, Any], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        frozen, inputs, weight, *head = tensors
        samples, dtype, device = len(inputs), inputs.dtype, inputs.device.type
        # Cast here instead of once per chunk. Autocast leaves float64 alone.
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            weight = weight.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        mask = options["mask"]
        losses = inputs.new_zeros(3, dtype=wide)
        wants_inputs, *wants = wanted
        totals = [
            torch.zeros_like(tensor, dtype=wide) if want else None
            for tensor, want in zip(tensors[2:], wants, strict=True)
        ]
        grad_inputs = torch.empty_like(inputs) if wants_inputs else None
        for start in range(0, samples, chunk_size):
            rows = slice(start, start + chunk_size)
            part = inputs[rows].to(dtype)
            share = len(part) / samples
            if mask is not None:
                # In the gradient of the weight, a masked input is multiplied by 0, which leaves NaN.
                part = fill_masked(part, mask[rows])
                options = {**options, "mask": mask[rows]}
            part_losses, (grad_part, *grads) = _chunk_gradients(
                frozen[rows], part, weight.detach(), tuple(head), wanted, share, options
            )
            losses += part_losses
            if grad_inputs is not None and grad_part is not None:
                grad_inputs[rows] = grad_part
            for total, grad in zip(totals, grads, strict=True):
                if total is not None and grad is not None:
                    total += grad
        # Autograd does not allow results that are views of one tensor.
        loss, cycle, separability = (each.clone() for each in losses)
        ctx.save_for_backward(loss, grad_inputs, *totals)
        ctx.dtypes = [tensor.dtype for tensor in tensors[1:]]
        ctx.mark_non_differentiable(cycle, separability)
        return loss, cycle, separability

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *_Scale.apply(ctx.dtypes, grad_loss, *ctx.saved_tensors)


class _Scale(torch.autograd.Function):
    """Multiply stored gradients by the incoming gradient of the loss.

    The argument `loss` is unused, but it depends on the inputs, so that a second derivative is an error.
    """

    @staticmethod
    def forward(
        ctx: Any, dtypes: list[torch.dtype], grad_loss: Tensor, loss: Tensor, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return tuple(
            None if grad is None else (grad * grad_loss).to(dtype)
            for grad, dtype in zip(grads, dtypes, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "cosettle_linear_loss has no second derivatives. Use cosettle_head_loss with backend='eager'."
        )


@torch.compiler.disable
def _apply(
    tensors: dict[str, Tensor], chunk_size: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the autograd function. torch.compile cannot trace it, because it computes gradients itself."""
    _frozen, *others = tensors.values()
    wanted = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in others)
    results: tuple[Tensor, Tensor, Tensor] = _LinearLoss.apply(wanted, chunk_size, options, *tensors.values())
    return results


def cosettle_linear_loss(
    frozen: Tensor,
    inputs: Tensor,
    weight: Tensor,
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
    chunk_size: int | None = None,
    mask: Tensor | None = None,
) -> CosettleOutput:
    """Compute `cosettle_loss` of layer_norm(tanh(inputs weight^T + bias)), a few samples at a time.

    The product exists only for `chunk_size` samples, and so does its gradient: if gradients are needed, the
    forward computes them. Under autocast, the product is computed in the dtype of autocast. Gradients flow
    from `loss` into all tensors but `frozen`; they are summed in at least float32.

    Args:
        frozen: (B, 3, N, D) tokens of the frozen encoder, as in `cosettle_loss`.
        inputs: (B, 3, N, E) input of the head's last linear layer. If the head has only one, these are the
            frozen tokens.
        weight: (D, E) weight of the linear layer, without autocast in the dtype of `inputs`.
        bias: (D,) bias of the linear layer; zeros if it has none.
        norm_weight: (D,) weight of the layer norm.
        norm_bias: (D,) bias of the layer norm.
        grid: Height and width of the token grid, with h * w = N.
        temperature: Temperature of the transition probabilities, greater than 0.
        window: Side of the pooling windows in tokens. 1 disables pooling.
        lambda_reg: Weight of the separability term, at least 0.
        regularizer: Form of the separability term, `"kl"` or `"mse"`.
        backend: `"triton"`, `"eager"` (plain PyTorch), or `"auto"`, as in `cosettle_head_loss`.
        norm_eps: Epsilon of the layer norm, at least 0.
        tanh: Whether to apply tanh. Without it, the projected tokens are layer_norm(inputs weight^T + bias).
        chunk_size: Number of samples that are processed at once. By default, as many as have a product of up
            to 32 MiB.
        mask: (B, N) bool, True for the tokens that count, as in `cosettle_loss`.

    Returns:
        A `CosettleOutput` of 0-d tensors without diagnostics. Only `loss` is differentiable, and only once.

    Raises:
        ValueError: If an argument has an invalid shape, dtype, device or value, or one that
            `backend="triton"` does not support.
    """
    tensors = {
        "frozen": frozen,
        "inputs": inputs,
        "weight": weight,
        "bias": bias,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
    }
    shapes = ("B3ND", "B3NE", "DE", "D", "D", "D")
    check_tensors(**{name: (tensors[name], shape) for name, shape in zip(tensors, shapes, strict=True)})
    if weight.dtype != inputs.dtype and not torch.is_autocast_enabled(inputs.device.type):
        expected = f"the same dtype as inputs ({inputs.dtype}) without autocast"
        raise ValueError(f"weight must have {expected}, got {weight.dtype}")
    if chunk_size is None:
        chunk_size = max(1, CHUNK_BYTES // (frozen[0].numel() * inputs.element_size()))
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    check_mask(mask, "frozen", frozen)
    options: dict[str, Any] = {
        "grid": grid,
        "temperature": temperature,
        "window": window,
        "lambda_reg": lambda_reg,
        "regularizer": regularizer,
        "backend": backend,
        "norm_eps": norm_eps,
        "tanh": tanh,
        "diagnostics": False,
        "mask": mask,
    }
    loss, cycle, separability = _apply(tensors, chunk_size, options)
    return CosettleOutput(loss, cycle, separability, None, None)
