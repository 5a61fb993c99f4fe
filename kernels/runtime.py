"""Helpers that import Triton, choose the backend, register operators and launch kernels.

All modules import `jit`, `tl` and `triton` from here, so that the package can be imported where Triton is
missing or old. In that case, the kernels are plain Python functions that are never called.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
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

        # Older versions cannot compile functions that return tuples.
        if tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) < (3, 3):
            triton = tl = None
    except ImportError:
        triton = tl = None

Backend = Literal["auto", "triton", "eager"]

# Operators are registered under the import name of the package, so that a copy of this folder in another
# project does not collide with an installed fasttrain_kernels. The namespace must be an identifier, but a
# loader may import a copy under any name: "2-losses" becomes "_2_losses".
NAMESPACE = re.sub(r"^(?=\d)|\W", "_", __package__ or "fasttrain_kernels", flags=re.ASCII)

# Whether PyTorch was built for AMD GPUs (ROCm).
ROCM = torch.version.hip is not None

# AMD Instinct MI200 and MI300, for which the kernels have been compiled.
AMD_GPUS = ("gfx90a", "gfx942")


def jit(kernel: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Apply `triton.jit` with some options, or return the function unchanged without Triton."""
    if kernel is None:
        return partial(jit, **options)
    return kernel if triton is None else triton.jit(kernel, **options)


@jit
def _nothing() -> None:
    pass


# True if TRITON_INTERPRET=1 was set when the package was imported. The kernels then run on CPU tensors. (The
# variable itself is read differently by different versions of Triton.)
INTERPRETED = triton is not None and not isinstance(_nothing, triton.JITFunction)


def inline(function: Callable[..., Any]) -> Any:
    """Apply `jit` to a function that kernels call, except under the interpreter, where it would be slow."""
    return function if INTERPRETED else jit(function)


def use_triton(backend: str, **tensors: Tensor) -> bool:
    """Decide whether to use the Triton kernels for these tensors.

    Raises:
        ValueError: If `backend` is unknown, or if it is "triton" and the kernels do not support one of the
            tensors.
    """
    check_choice("backend", backend, Backend)
    obstacle = _obstacle(tensors)
    if backend == "triton" and obstacle:
        raise ValueError(obstacle)
    # The kernels have been compiled for AMD GPUs, but never run on one.
    chosen = not (obstacle or INTERPRETED or ROCM)
    return backend == "triton" or (backend == "auto" and chosen)


def _obstacle(tensors: dict[str, Tensor]) -> str | None:
    """Return why the Triton kernels do not support these tensors, or None if they do."""
    if triton is None:
        return (
            "backend='triton' needs Triton 3.3 or newer, as installed by PyTorch 2.7 or newer for CUDA. "
            "Install it, or pass backend='eager'."
        )
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"{name} must be float16, bfloat16 or float32 for backend='triton', got {tensor.dtype}"
        if not INTERPRETED and not _is_supported(tensor.device):
            return (
                f"{name} must be on an NVIDIA GPU of compute capability 8.0 or higher or an AMD GPU "
                f"({', '.join(AMD_GPUS)}) for backend='triton', got {tensor.device}. Move it, or pass "
                "backend='eager'."
            )
        # The operators would silently drop the tangent. (torch.compile does not support forward-mode anyway.)
        if not torch.compiler.is_compiling() and unpack_dual(tensor).tangent is not None:
            return (
                f"{name} has a forward-mode tangent, but backend='triton' does not support forward-mode "
                "differentiation. Pass backend='eager'."
            )
    return None


@torch.compiler.assume_constant_result
def _is_supported(device: torch.device) -> bool:
    """Whether the kernels support the device; torch.compile treats the answer as constant."""
    if device.type != "cuda":
        return False
    if ROCM:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0] in AMD_GPUS
    return compute_capability(device) >= (8, 0)


def operator(
    name: str, launcher: Callable[..., Any], *, fake: Callable[..., Any], schema: str | None = None
) -> CustomOpDef:
    """Register a launcher as the operator NAMESPACE::name, opaque to torch.compile and torch.export.

    `fake` returns empty outputs of the right shapes and dtypes. Without `schema`, the annotations of
    `launcher` define the schema.
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
    """Register the gradient of an operator that returns losses.

    The first `losses` outputs of `forward` must be the losses. Its last input (`keep` in the schemas) must
    be a flag that says whether a gradient will be needed.

    `save` maps the inputs and outputs of `forward` to tensors and constants to keep for `backward`, which
    receives the gradients of the losses (not all of them None), these tensors and these constants, and
    returns the gradients of the first inputs. It should call an operator that has no gradient, so that a
    second derivative is an error.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, ctx.constants = save(inputs, output)
        ctx.inputs, ctx.kept = len(inputs), inputs[-1]
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*output[losses:])
        # Otherwise autograd would allocate zeros as the gradients of the other outputs.
        ctx.set_materialize_grads(False)

    def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not ctx.kept:
            raise RuntimeError(
                f"{NAMESPACE} saved nothing for the backward pass, because no input required gradients when "
                "it was called or exported. (Under torch.vmap, no input does.) Pass backend='eager', or "
                "export with inputs that require gradients."
            )
        if all(grad is None for grad in grads[:losses]):
            return (None,) * ctx.inputs
        input_grads = backward(*grads[:losses], *ctx.saved_tensors, *ctx.constants)
        return (*input_grads, *(None,) * (ctx.inputs - len(input_grads)))

    forward.register_autograd(gradients, setup_context=setup_context)


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd may need the gradient of any of the tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def unit_stride(tensor: Tensor) -> Tensor:
    """Return the tensor itself if its channels are contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def next_power_of_2(number: int) -> int:
    """Smallest power of two that is at least `number`; triton.next_power_of_2 is slow on the host."""
    return 1 << (number - 1).bit_length()


def ceil_div(dividend: int, divisor: int) -> int:
    """Quotient, rounded up; triton.cdiv is slow on the host."""
    return -(-dividend // divisor)


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU, for example (8, 0) for an A100; (9, 0) for the CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


_PROGRAMS: dict[tuple[Any, ...], int] = {}


def programs_at_once(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> int:
    """Number of programs of a kernel that the current GPU can run at once; 1 under the interpreter.

    More would run in a second wave, after the first programs have ended. Compiles the kernel if necessary.
    The first two arguments must be the large tensors, whose dtypes determine the number of registers.
    """
    if INTERPRETED:
        return 1
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    absent = tuple(argument is None for argument in arguments)
    key = (kernel, device, arguments[0].dtype, arguments[1].dtype, absent, *constants.values())
    if key not in _PROGRAMS:
        compiled = kernel.warmup(*arguments, grid=(1,), **constants)
        # Loads the kernel, which sets `n_regs`.
        compiled._init_handles()
        # Each of the four partitions of a multiprocessor runs up to 16 warps (AMD: 8), which share 512
        # registers per lane. A warp takes a multiple of 8. A multiprocessor of an A100, H100 or B200 runs up
        # to 32 programs.
        warps = 4 * min(512 // (8 * ceil_div(compiled.n_regs, 8)), 8 if ROCM else 16)
        programs = max(1, min(32, warps // constants["num_warps"]))
        _PROGRAMS[key] = programs * driver.utils.get_device_properties(device)["multiprocessor_count"]
    return _PROGRAMS[key]


def on_device(tensor: Tensor) -> torch.cuda.device:
    """Return a context manager that makes the tensor's GPU current; it does nothing for CPU tensors."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
