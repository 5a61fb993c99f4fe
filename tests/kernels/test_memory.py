"""Tests that the Triton backend allocates few M x M matrices, and much less memory than the eager backend.

Memory is counted rather than measured: the tests record every tensor that an operation returns, and replace
the kernels by functions that do nothing.
"""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fasttrain_kernels import (
    cosettle,
    cosettle_head_loss,
    cosettle_loss,
    cycle,
    cycle_streaming,
    separability,
)


class Allocations(TorchDispatchMode):
    """Record the number of elements of the largest allocation, and the peak of the allocated bytes."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.upper()))
        self.largest = self.alive = self.peak = 0
        self.counted: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "fasttrain_kernels":
            # Run the operator's implementation with this mode enabled, to record its allocations.
            with self:
                result = function.redispatch(self.keys, *args, **(kwargs or {}))
        else:
            result = function(*args, **(kwargs or {}))
        inputs = {
            id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if id(storage) in self.counted or id(storage) in inputs:
                continue
            self.counted.add(id(storage))
            self.largest = max(self.largest, tensor.numel())
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        return result

    def _freed(self, storage_id: int, size: int) -> None:
        self.counted.discard(storage_id)
        self.alive -= size


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, device: str) -> list[tuple[int, ...]]:
    """Replace the kernels by functions that do nothing, and record the grids of their launches."""
    grids: list[tuple[int, ...]] = []

    def run(kernel: Any, *arguments: Any, grid: tuple[int, ...], **options: Any) -> None:
        grids.append(grid)

    monkeypatch.setattr(type(separability._forward_kernel), "run", run)
    return grids


@pytest.mark.parametrize("diagnostics", [False, True])
@pytest.mark.parametrize(("grid", "window", "matrices"), [((14, 14), 2, 0), ((18, 18), 1, 2)])
def test_cycle_matrices_exist_for_one_group_of_samples_at_a_time(
    launches: list[tuple[int, ...]],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    grid: tuple[int, int],
    window: int,
    matrices: int,
    diagnostics: bool,
) -> None:
    """49 tokens use the fused kernel and 324 the streaming kernels, here with groups of one sample."""
    monkeypatch.setattr(cycle_streaming, "BRACKET_BYTES", 1)
    monkeypatch.setattr(cosettle, "DIAGNOSTIC_BYTES", 1)
    frozen, projected = torch.randn(2, 8, 3, grid[0] * grid[1], 8, device=device, dtype=torch.bfloat16)
    largest = {}
    for backend in ("triton", "eager"):
        with Allocations(device) as allocations:
            options = {"window": window, "backend": backend, "diagnostics": diagnostics}
            cosettle_loss(frozen, projected.requires_grad_(), grid, **options).loss.backward()
        largest[backend] = allocations.largest
    pooled = (grid[0] // window) * (grid[1] // window)
    # Rows of the matrices are padded to a multiple of 16.
    assert largest["triton"] == max(frozen.numel(), matrices * pooled * (pooled + -pooled % 16))
    assert largest["eager"] >= 8 * pooled**2


@pytest.mark.parametrize("masked", [False, True])
def test_peak_memory_at_the_papers_shape_is_at_most_a_fifth_of_eager(
    launches: list[tuple[int, ...]], device: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linear layer, loss and gradients in mixed precision. Two samples suffice: memory grows linearly."""
    # On a real GPU, the partial sums of all programs would need more memory than two samples. They do not
    # grow with the batch.
    monkeypatch.setattr(separability, "programs_at_once", lambda *_: 1)
    weight = torch.randn(768, 768, device=device, requires_grad=True)
    parameters = [torch.randn(768, device=device, requires_grad=True) for _ in range(3)]
    frozen = torch.randn(2, 3, 196, 768, device=device, dtype=torch.bfloat16)
    mask = torch.ones(2, 196, device=device, dtype=torch.bool) if masked else None
    token_map = frozen.numel() * frozen.element_size()
    peaks = {}
    for backend in ("triton", "eager"):
        with Allocations(device) as allocations:
            with torch.autocast(device, dtype=torch.bfloat16):
                linear = torch.nn.functional.linear(frozen, weight)
            out = cosettle_head_loss(
                frozen, linear, *parameters, (14, 14), backend=backend, diagnostics=False, mask=mask
            )
            del linear
            out.loss.backward()
        peaks[backend] = allocations.peak / token_map
        for parameter in (weight, *parameters):
            parameter.grad = None
        del out
    assert peaks["triton"] <= peaks["eager"] / 5
    # One map for the product of the linear layer, one for its gradient, and a quarter for the gradient of the
    # pooled tokens. The rest is mostly copies of the weight.
    assert 2.25 < peaks["triton"] < 2.7


def test_any_number_of_samples_can_be_launched(launches: list[tuple[int, ...]]) -> None:
    """CUDA limits the axes of a launch grid to 2^31 - 1, 65,535 and 65,535."""
    for tokens in (49, 70):
        walk = torch.empty(100_000, 3, tokens, 8, device="meta", dtype=torch.bfloat16)
        cycle.launch_cycle(walk, None, 0.1, grad=True)
    given = separability.Epilogue(walk, walk, *[None] * 5, 0.0, False, 7, 10, 1, 1, kl=True)
    separability.launch_forward(given, pool=True, statistics=True)
    assert launches
    assert all(grid[0] < 2**31 and max((1, *grid[1:])) <= 65_535 for grid in launches)
