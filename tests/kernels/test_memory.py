"""What the kernels' launchers allocate: nothing of size M x M, and a fraction of what eager PyTorch holds.

Counted, not measured: every tensor that an operation gives out, with the kernels themselves left out.
"""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fasttrain_kernels import (
    cosettle_head_loss,
    cosettle_loss,
    cycle,
    cycle_consistency_loss,
    separability,
)


class Allocations(TorchDispatchMode):
    """Largest number of elements given out at once, and the peak of the bytes alive."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.upper()))
        self.largest = self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "fasttrain_kernels":
            # Into the operator: from its implementation on, with this mode in force again.
            with self:
                result = function.redispatch(self.keys, *args, **(kwargs or {}))
        else:
            result = function(*args, **(kwargs or {}))
        given = {
            id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if id(storage) in self.known or id(storage) in given:
                continue
            self.known.add(id(storage))
            self.largest = max(self.largest, tensor.numel())
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        return result

    def _freed(self, name: int, size: int) -> None:
        self.known.discard(name)
        self.alive -= size


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, device: str) -> list[tuple[int, ...]]:
    """The kernels are left out; the grids that they would have been launched with."""
    grids: list[tuple[int, ...]] = []

    def run(kernel: Any, *arguments: Any, grid: tuple[int, ...], **options: Any) -> None:
        grids.append(grid)

    monkeypatch.setattr(type(separability._forward_kernel), "run", run)
    return grids


@pytest.mark.parametrize("diagnostics", [False, True])
@pytest.mark.parametrize(("grid", "window"), [((14, 14), 2), ((18, 18), 1)])
def test_the_loss_allocates_nothing_quadratic(
    launches: list[tuple[int, ...]], device: str, grid: tuple[int, int], window: int, diagnostics: bool
) -> None:
    """49 tokens of the fused kernel and 324 of the streaming form, with fewer channels than tokens."""
    frozen, projected = torch.randn(2, 2, 3, grid[0] * grid[1], 8, device=device)
    largest = {}
    for backend in ("triton", "eager"):
        with Allocations(device) as allocations:
            options = {"window": window, "backend": backend, "diagnostics": diagnostics}
            cosettle_loss(frozen, projected.requires_grad_(), grid, **options).loss.backward()
        largest[backend] = allocations.largest
    pooled = (grid[0] // window) * (grid[1] // window)
    assert largest["triton"] == frozen.numel()
    assert largest["eager"] >= 2 * pooled * pooled


def test_a_walk_over_three_views_allocates_nothing_quadratic(
    launches: list[tuple[int, ...]], device: str
) -> None:
    walk = torch.randn(2, 3, 100, 8, device=device, requires_grad=True)
    with Allocations(device) as allocations:
        cycle_consistency_loss(walk, backend="triton").backward()
    assert allocations.largest == walk.numel()


def test_peak_memory_at_the_papers_shape_is_a_fifth_of_eager(
    launches: list[tuple[int, ...]], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linear layer, loss and gradients in mixed precision, two samples: token maps scale with the batch."""
    # The partial sums of a real GPU's programs are large beside two samples, and do not grow with the batch.
    monkeypatch.setattr(separability, "multiprocessors", lambda device: 1)
    weight = torch.randn(768, 768, device=device, requires_grad=True)
    parameters = [torch.randn(768, device=device, requires_grad=True) for _ in range(3)]
    frozen = torch.randn(2, 3, 196, 768, device=device, dtype=torch.bfloat16)
    # Of the weight itself there are few copies in either case, and they do not grow with the batch.
    token_map = frozen.numel() * frozen.element_size()
    peaks = {}
    for backend in ("triton", "eager"):
        with Allocations(device) as allocations:
            with torch.autocast(device, dtype=torch.bfloat16):
                linear = torch.nn.functional.linear(frozen, weight)
            out = cosettle_head_loss(
                frozen, linear, *parameters, (14, 14), backend=backend, diagnostics=False
            )
            del linear
            out.loss.backward()
        peaks[backend] = allocations.peak / token_map
        for parameter in (weight, *parameters):
            parameter.grad = None
        del out
    assert peaks["triton"] <= peaks["eager"] / 5
    # The linear layer's product, its gradient and a quarter map of the pooled tokens'; copies of the weight.
    assert 2.25 < peaks["triton"] < 2.7


def test_any_number_of_samples_can_be_launched(launches: list[tuple[int, ...]]) -> None:
    """A launch's second and third axis end at 65,535."""
    for tokens in (49, 70):
        walk = torch.empty(100_000, 3, tokens, 8, device="meta")
        cycle.launch_cycle(walk, 0.1, grad_dtype=torch.float32, diagnostics=True)
    given = separability.Epilogue(walk, walk, None, None, None, 0.0, False, 7, 10, 1, 1, kl=True)
    separability.launch_forward(given, pool=True, statistics=True)
    assert len(launches) == 9
    assert all(side <= 65_535 for grid in launches for side in grid[1:])
