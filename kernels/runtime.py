"""Where the kernels run: the one import of Triton, the choice of the backend, operators, launch helpers.

Every module takes `jit`, `tl` and `triton` from here, so that the package can be imported without Triton;
the kernels are then plain functions that nobody calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.library import CustomOpDef

from .checks import check_choice

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        triton = tl = None

Backend = Literal["auto", "triton", "eager"]

# Operators live under the package's own import name: a copy of this folder inside another project registers
# its own, and never collides with an installed fasttrain_kernels.
NAMESPACE = (__package__ or "fasttrain_kernels").replace(".", "_")

# True where TRITON_INTERPRET=1 was set when the kernels were imported: they then run on CPU tensors.
INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit` where Triton is installed, else the function itself."""
    return kernel if triton is None else triton.jit(kernel)


def inline(function: Callable[..., Any]) -> Any:
    """`jit` for what kernels call; under the interpreter a plain function, which it enters much faster."""
    return function if INTERPRETED else jit(function)


def use_triton(backend: str, **tensors: Tensor) -> bool:
    """Whether the Triton kernels are to take these tensors.

    Raises:
        ValueError: `backend` is unknown, or it is `triton` and the kernels cannot take one of the tensors.
    """
    check_choice("backend", backend, Backend)
    obstacle = _obstacle(tensors)
    if backend == "triton" and obstacle:
        raise ValueError(obstacle)
    return backend == "triton" or (backend == "auto" and not obstacle and not INTERPRETED)


def _obstacle(tensors: dict[str, Tensor]) -> str | None:
    """Why the Triton kernels cannot take these tensors, or None."""
    if triton is None:
        return "backend 'triton' needs the package triton: pip install triton, or use 'eager'"
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"{name} must be float16, bfloat16 or float32 for backend 'triton', got {tensor.dtype}"
        if not INTERPRETED and not _is_supported(tensor.device):
            expected = "an NVIDIA GPU of compute capability 8.0 or newer"
            return f"{name} must be on {expected} for backend 'triton', got {tensor.device}: use 'eager'"
        # Operators drop a tangent silently. (torch.compile does not support forward-mode differentiation.)
        if not torch.compiler.is_compiling() and unpack_dual(tensor).tangent is not None:
            return f"{name} must have no forward-mode tangent for backend 'triton': use 'eager'"
    return None


@torch.compiler.assume_constant_result
def _is_supported(device: torch.device) -> bool:
    """Whether the device is an NVIDIA GPU from Ampere on; torch.compile asks once, while it traces."""
    return device.type == "cuda" and torch.version.hip is None and compute_capability(device) >= (8, 0)


def operator(
    name: str, launcher: Callable[..., Any], *, fake: Callable[..., Any], schema: str | None = None
) -> CustomOpDef:
    """Register a launcher as the torch operator NAMESPACE::name, opaque to torch.compile and torch.export.

    `fake` gives the outputs' shapes and dtypes; the schema is read from the annotations unless given.
    """
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", launcher, mutates_args=(), schema=schema)
    op.register_fake(fake)
    return op


def differentiate(
    forward: CustomOpDef,
    backward: Callable[..., tuple[Any, ...]],
    *,
    losses: int,
    save: Callable[[tuple[Any, ...], tuple[Tensor, ...]], tuple[tuple[Any, ...], tuple[Any, ...]]],
) -> None:
    """Register the gradient of an operator whose first outputs are losses and whose last input, `keep`,
    says whether there will be a backward.

    `save` turns its inputs and outputs into the tensors and the constants that `backward` gets after the
    losses' gradients. `backward` returns the gradients of the first inputs; it should be an operator without
    a gradient of its own, so that a second derivative is an error.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, ctx.constants = save(inputs, output)
        ctx.inputs, ctx.kept = len(inputs), inputs[-1]
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*output[losses:])
        # Otherwise every backward would fill zeros of their size, for nothing.
        ctx.set_materialize_grads(False)

    def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not ctx.kept:
            raise RuntimeError(
                f"{NAMESPACE} kept nothing for its backward: no input required a gradient when it was called "
                "(in torch.vmap none does) or exported; use backend 'eager', or export with inputs that do"
            )
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None,) * ctx.inputs
        of_losses = [torch.zeros_like(given[0]) if grad is None else grad for grad in grads[:losses]]
        found = backward(*of_losses, *ctx.saved_tensors, *ctx.constants)
        return (*found, *(None,) * (ctx.inputs - len(found)))

    forward.register_autograd(gradients, setup_context=setup_context)


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd will ask for the gradient of any of them."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself where its channels lie side by side, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def multiprocessors(device: torch.device) -> int:
    """Number of streaming multiprocessors of the device; 1 under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def compute_capability(device: torch.device) -> tuple[int, int]:
    """The GPU's generation: (8, 0) Ampere, (9, 0) Hopper, (10, 0) Blackwell; (9, 0) for other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def on_device(tensor: Tensor) -> torch.cuda.device:
    """Context in which kernels launch on the tensor's GPU; does nothing for CPU tensors."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
