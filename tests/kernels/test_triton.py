"""Tests of the Triton kernels against the eager reference in float64.

The kernels run on the GPU if there is one, and under Triton's interpreter otherwise (see conftest.py).
test_published.py compares them with the golden vectors.

The tolerance is a small multiple of the error of eager PyTorch in the same dtype, or a few units in the last
place if that error happens to be smaller. As eager half precision can be far off, half-precision kernels are
also compared with the fp32 kernels on the same values.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasttrain_kernels import (
    cosettle,
    cosettle_head_loss,
    cosettle_loss,
    cycle,
    cycle_consistency_loss,
    cycle_streaming,
    separability_loss,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Loss = Callable[..., tuple[Tensor, ...]]


def norm_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the error relative to the norm of the truth.

    For losses, which are means of logarithms and can be near 0, the divisor is at least 0.1.
    """
    scale = truth.double().norm().item()
    if truth.ndim == 0:
        scale = max(scale, 0.1)
    error = (value.double() - truth.double()).norm().item()
    # The norm can be zero: a saturated tanh passes no gradient.
    return error / scale if scale > 0 else error


def evaluate(loss: Loss, backend: str, dtype: torch.dtype, tensors: list[Tensor]) -> list[Tensor]:
    """Return the results of `loss`, and the gradients of a weighted sum of the first result."""
    leaves = [tensor.to(dtype).detach().requires_grad_() for tensor in tensors]
    results = loss(backend, *leaves)
    weights = torch.linspace(0.5, 1.5, results[0].numel(), dtype=results[0].dtype, device=results[0].device)
    total = (results[0].flatten() * weights).sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*results, *(gradient for gradient in gradients if gradient is not None)]


def autocast_eager(loss: Loss, dtype: torch.dtype, tensors: list[Tensor]) -> list[Tensor]:
    """Run the eager reference as in mixed-precision training, with matrix products in half precision."""
    if dtype == torch.float32:
        return evaluate(loss, "eager", dtype, tensors)
    with torch.autocast(tensors[0].device.type, dtype=dtype):
        return evaluate(loss, "eager", dtype, tensors)


def check_against_eager(loss: Loss, dtype: torch.dtype, *tensors: Tensor) -> None:
    """Compare a loss and its gradients with eager PyTorch and, in half precision, with the fp32 kernels."""
    rounded = [tensor.to(dtype) for tensor in tensors]
    truth = evaluate(loss, "eager", torch.float64, rounded)
    eager = autocast_eager(loss, dtype, rounded)
    fused = evaluate(loss, "triton", dtype, rounded)
    # Logits are of the order of 1 / temperature, and their rounding error carries over to the probabilities.
    # On tensor cores, three tf32 products have a relative error of about 2^-21.
    logit_error = 4 * torch.finfo(torch.float32).eps / 0.01
    floor = max(8 * torch.finfo(dtype).eps, logit_error)
    for index, (true, baseline, value) in enumerate(zip(truth, eager, fused, strict=True)):
        allowed = max(4 * norm_error(baseline, true), floor)
        assert norm_error(value, true) <= allowed, f"result {index}"
    if dtype == torch.float32:
        return
    precise = evaluate(loss, "triton", torch.float32, [tensor.float() for tensor in rounded])
    for index, (true, reference, value) in enumerate(zip(truth, precise, fused, strict=True)):
        # Small gradients underflow in float16. The instruction for tanh has a relative error of 2^-11.
        rounding = norm_error(true.to(value.dtype), true)
        allowed = max(4 * torch.finfo(dtype).eps, 4 * rounding, 0.01)
        assert norm_error(value, reference) <= allowed, f"result {index}, compared with fp32"


def objective(grid: tuple[int, int], **options: object) -> Loss:
    def loss(backend: str, frozen: Tensor, projected: Tensor) -> tuple[Tensor, ...]:
        return cosettle_loss(frozen, projected, grid, backend=backend, diagnostics=False, **options)[:3]

    return loss


def head_objective(grid: tuple[int, int], **options: object) -> Loss:
    def loss(backend: str, frozen: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return cosettle_head_loss(frozen, *tensors, grid, backend=backend, diagnostics=False, **options)[:3]

    return loss


def tokens(*shape: int, device: str, common: float = 2.0, seed: int = 0) -> Tensor:
    """Random tokens with a component that all views share, like tokens from frames of one video.

    Tensors of the same shape need different seeds; otherwise they are equal.
    """
    generator = torch.Generator().manual_seed(sum(shape) + 1000 * seed)
    values = torch.randn(shape, generator=generator)
    if common:
        values += common * torch.randn((shape[0], 1, *shape[2:]), generator=generator)
    return values.to(device)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """Return the same values with other strides."""
    if layout == "views last":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "channels first":
        return values.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "every other token":
        return values.repeat_interleave(2, dim=2)[:, :, ::2]
    return values


def some_mask(kind: str, batch: int, count: int, device: str) -> Tensor | None:
    """Return no mask, a mask in which about a third is False, or one whose first sample is all False.

    The mask is not contiguous.
    """
    if kind == "none":
        return None
    mask = torch.rand(count, batch, generator=torch.Generator().manual_seed(count)).T < 0.67
    mask[0] &= kind != "first empty"
    return mask.to(device)


def spoilt(values: Tensor, mask: Tensor | None) -> Tensor:
    """Fill the masked tokens with NaN."""
    return values if mask is None else values.masked_fill(~mask[:, None, :, None], float("nan"))


@pytest.mark.parametrize("channels", [768, 1024, 1536])
def test_widths_of_vision_transformers(device: str, channels: int) -> None:
    frozen = tokens(1, 3, 4, channels, device=device)
    check_against_eager(objective((2, 2), window=1), torch.bfloat16, frozen, frozen + 0.3)


@pytest.fixture(params=["fused", "streaming"])
def cycle_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Select the cycle kernels. As the interpreter is slow, streaming starts at 9 tokens instead of 65."""
    if request.param == "streaming":
        monkeypatch.setattr(cycle, "MAX_FUSED_TOKENS", 8)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_walk_over_several_tiles(device: str, dtype: torch.dtype) -> None:
    """65 tokens need two tiles in half precision and three in fp32."""
    walk = torch.nn.functional.normalize(tokens(1, 3, 65, 24, device=device), dim=-1)
    check_against_eager(
        lambda backend, walk: (cycle_consistency_loss(walk, 0.03, backend=backend),), dtype, walk
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counting", [slice(40, 63), slice(3, 30), slice(0, 0)])
def test_tiles_without_a_token_that_counts(device: str, dtype: torch.dtype, counting: slice) -> None:
    """In fp32, the tokens that count are in the second of three tiles, in the first, or in none.

    The views are opposite: logits are near -100, but not those of masked tokens.
    """
    views = torch.tensor([1.0, -1.0, 1.0], device=device).view(1, 3, 1, 1)
    walk = torch.nn.functional.normalize(views + 0.1 * tokens(1, 3, 70, 24, device=device), dim=-1)
    mask = torch.zeros(1, 70, dtype=torch.bool, device=device)
    mask[0, counting] = True

    def loss(backend: str, walk: Tensor) -> tuple[Tensor, ...]:
        return (cycle_consistency_loss(walk, 0.01, backend=backend, mask=mask),)

    check_against_eager(loss, dtype, spoilt(walk, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_streaming_matches_the_fused_kernel(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three samples in groups of two."""
    walk = torch.nn.functional.normalize(tokens(3, 3, 33, 40, device=device), dim=-1).to(dtype)
    fused, fused_grad = cycle.launch_cycle(walk, None, 0.5, grad=True)
    monkeypatch.setattr(cycle, "MAX_FUSED_TOKENS", 32)
    monkeypatch.setattr(cycle_streaming, "BRACKET_BYTES", 2 * 2 * 33 * 48 * walk.element_size())
    streamed, streamed_grad = cycle.launch_cycle(walk, None, 0.5, grad=True)
    assert norm_error(streamed, fused) < 1e-6
    assert norm_error(streamed_grad, fused_grad) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("masked", ["none", "some", "first empty"])
def test_diagnostics(device: str, masked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples, one at a time."""
    monkeypatch.setattr(cosettle, "DIAGNOSTIC_BYTES", 1)
    frozen, projected = (tokens(2, 3, 9, 32, device=device, common=0.6, seed=seed) for seed in range(2))
    options = {"window": 1, "mask": some_mask(masked, 2, 9, device)}
    truth = cosettle_loss(frozen.double(), projected.double(), (3, 3), **options, backend="eager")
    value = cosettle_loss(frozen, projected, (3, 3), **options, backend="triton")
    assert 0 < truth.cycle_accuracy < 1
    assert value.cycle_accuracy.item() == pytest.approx(truth.cycle_accuracy.item(), abs=1e-6)
    assert value.identity_similarity.item() == pytest.approx(truth.identity_similarity.item(), rel=1e-5)
    assert not value.cycle_accuracy.requires_grad
    with torch.autocast(device, dtype=torch.bfloat16):
        again = cosettle_loss(frozen, projected, (3, 3), **options, backend="triton")
    assert torch.equal(again.identity_similarity, value.identity_similarity)


def check_objective(
    batch: int,
    grid: tuple[int, int],
    channels: int,
    window: int,
    temperature: float,
    regularizer: str,
    dtype: torch.dtype,
    layout: str,
    magnitude: float,
    content: str,
    head: str,
    masked: str = "none",
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    window = min(window, *grid)
    if head == "tanh" and dtype != torch.float32:
        # The derivative of a saturated tanh is all rounding error in half precision.
        magnitude = min(magnitude, 1.0)
    shape = (batch, 3, grid[0] * grid[1], channels)
    frozen = tokens(*shape, device=device)
    inputs = frozen + 0.2 if content == "close to frozen" else tokens(*shape, device=device, seed=1)
    inputs *= magnitude
    if content == "identical frames":
        inputs = inputs[:, :1].repeat(1, 3, 1, 1)
    if content == "zero tokens":
        # Without a head, the gradient of a zero token would be 1e12 times any rounding error.
        frozen[:, :, 0] = 0
        inputs[:, :, 0] = 1 if head == "none" else 0
    mask = some_mask(masked, batch, shape[2], device)
    frozen, inputs = spoilt(frozen, mask), spoilt(inputs, mask)
    options = {"window": window, "temperature": temperature, "regularizer": regularizer, "mask": mask}
    if head == "none":
        parameters, loss = [], objective(grid, **options)
    else:
        parameters = [tokens(channels, device=device, common=0.0, seed=seed) for seed in range(3)]
        loss = head_objective(grid, tanh=head == "tanh", **options)

    def in_layout(backend: str, frozen: Tensor, inputs: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        if backend == "triton":
            frozen, inputs = laid_out(frozen, layout), laid_out(inputs, layout)
        return loss(backend, frozen, inputs, *parameters)

    check_against_eager(in_layout, dtype, frozen, inputs, *parameters)


OBJECTIVES = {
    "batch": st.integers(1, 2),
    "grid": st.tuples(st.integers(2, 4), st.integers(2, 4)),
    "channels": st.integers(8, 70),
    "window": st.integers(1, 3),
    "temperature": st.sampled_from([0.01, 0.03, 0.1, 1.0]),
    "regularizer": st.sampled_from(["kl", "mse"]),
    "dtype": st.sampled_from(DTYPES),
    "layout": st.sampled_from(["contiguous", "views last", "channels first", "every other token"]),
    "magnitude": st.sampled_from([1e-3, 1.0, 1e3]),
    "content": st.sampled_from(["random", "close to frozen", "identical frames", "zero tokens"]),
    "head": st.sampled_from(["none", "tanh", "no tanh"]),
    "masked": st.sampled_from(["none", "some", "first empty"]),
}


@pytest.mark.parametrize(
    "case",
    [
        (2, (2, 2), 8, 1, 0.01, "kl", torch.float32, "views last", 1e-3, "zero tokens", "tanh"),
        (1, (3, 4), 70, 3, 0.1, "mse", torch.float16, "channels first", 1.0, "identical frames", "no tanh"),
        (2, (2, 3), 33, 2, 1.0, "kl", torch.bfloat16, "every other token", 1e3, "random", "none"),
        (1, (2, 3), 16, 1, 0.03, "mse", torch.float32, "contiguous", 1e3, "zero tokens", "none"),
        (1, (3, 2), 20, 2, 0.03, "kl", torch.bfloat16, "views last", 1e-3, "random", "no tanh"),
        (2, (2, 2), 24, 2, 0.1, "kl", torch.float32, "contiguous", 1.0, "close to frozen", "none"),
        (2, (4, 5), 20, 2, 0.1, "mse", torch.float32, "views last", 1.0, "random", "tanh", "some"),
        (2, (3, 4), 24, 2, 0.03, "kl", torch.bfloat16, "contiguous", 1.0, "random", "none", "first empty"),
        (3, (3, 3), 20, 1, 0.1, "mse", torch.float16, "channels first", 1.0, "random", "no tanh", "some"),
        # A row of three blocks, and a row that needs two warps.
        (1, (2, 2), 384, 2, 0.03, "kl", torch.bfloat16, "contiguous", 1.0, "random", "tanh"),
        (1, (2, 2), 1024, 1, 0.03, "kl", torch.float16, "contiguous", 1.0, "random", "tanh"),
    ],
)
def test_shapes_layouts_and_extremes(device: str, case: tuple[Any, ...]) -> None:
    """Together, the cases cover every choice in `OBJECTIVES`."""
    check_objective(*case)


# On a GPU, almost every example compiles kernels of its own, which takes seconds.
@pytest.mark.slow
@settings(max_examples=4 if torch.cuda.is_available() else 100, deadline=None)
@given(case=st.fixed_dictionaries(OBJECTIVES))
def test_any_shape_layout_and_extreme(case: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    check_objective(**case)


def check_part(
    part: str,
    batch: int,
    views: int,
    cells: int,
    channels: int,
    temperature: float,
    there_and_back: bool,
    regularizer: str,
    dtype: torch.dtype,
    layout: str,
    content: str,
    masked: str = "none",
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    frozen = tokens(batch, views, cells, channels, device=device)
    inputs = tokens(batch, views, cells, channels, device=device, seed=1)
    if content == "close to frozen":
        inputs = frozen + 0.2
    if content == "identical frames":
        inputs = inputs[:, :1].repeat(1, views, 1, 1)
    if content == "zero tokens":
        frozen[:, :, 0] = 0
    # Walks expect normalised tokens. A zero token stays zero.
    unit = torch.nn.functional.normalize(frozen if content == "zero tokens" else inputs, dim=-1)
    mask = some_mask(masked, batch, cells, device)
    frozen, inputs, unit = (spoilt(values, mask) for values in (frozen, inputs, unit))

    def loss(backend: str, *given: Tensor) -> tuple[Tensor, ...]:
        if backend == "triton":
            given = tuple(laid_out(values, layout) for values in given)
        if part == "walk":
            return (cycle_consistency_loss(given[0], temperature, there_and_back, backend, mask=mask),)
        return (separability_loss(*given, regularizer, backend, mask=mask),)

    check_against_eager(loss, dtype, *((frozen, inputs) if part == "separability" else (unit,)))


PARTS = {
    "part": st.sampled_from(["walk", "separability"]),
    "batch": st.integers(1, 2),
    "views": st.integers(2, 5),
    "cells": st.integers(1, 20),
    "there_and_back": st.booleans(),
    **{
        name: OBJECTIVES[name]
        for name in ("channels", "temperature", "regularizer", "dtype", "layout", "content", "masked")
    },
}


@pytest.mark.parametrize(
    "case",
    [
        ("walk", 2, 2, 1, 3, 0.01, True, "kl", torch.float32, "channels first", "random"),
        ("walk", 1, 4, 20, 70, 0.1, False, "kl", torch.float16, "every other token", "identical frames"),
        ("walk", 1, 3, 9, 20, 0.03, False, "kl", torch.bfloat16, "views last", "zero tokens"),
        ("walk", 2, 2, 10, 24, 0.1, False, "kl", torch.float16, "contiguous", "random"),
        ("walk", 2, 3, 10, 24, 0.1, True, "kl", torch.bfloat16, "contiguous", "random"),
        ("separability", 1, 5, 6, 70, 0.1, False, "mse", torch.float16, "views last", "zero tokens"),
        ("separability", 2, 4, 7, 33, 0.1, False, "kl", torch.bfloat16, "contiguous", "random"),
        ("separability", 1, 3, 7, 24, 0.1, False, "kl", torch.float32, "contiguous", "close to frozen"),
        ("separability", 2, 2, 7, 3, 0.1, False, "kl", torch.float32, "channels first", "identical frames"),
        ("walk", 2, 3, 9, 20, 0.03, False, "kl", torch.float16, "views last", "random", "some"),
        ("walk", 2, 3, 10, 24, 0.1, False, "kl", torch.float32, "contiguous", "random", "first empty"),
        ("walk", 2, 4, 5, 8, 0.1, False, "kl", torch.float32, "contiguous", "random", "some"),
        ("separability", 2, 3, 7, 33, 0.1, False, "mse", torch.bfloat16, "contiguous", "random", "some"),
        ("separability", 2, 3, 7, 9, 0.1, False, "kl", torch.float32, "views last", "random", "first empty"),
    ],
)
def test_shapes_layouts_and_extremes_of_single_losses(device: str, case: tuple[Any, ...]) -> None:
    check_part(*case)


@pytest.mark.slow
@settings(max_examples=4 if torch.cuda.is_available() else 60, deadline=None)
@given(case=st.fixed_dictionaries(PARTS))
def test_single_losses_of_any_shape_layout_and_extreme(case: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    check_part(**case)


@pytest.mark.parametrize(
    ("term", "masked", "dtype"),
    [
        (0, "none", torch.float32),
        (0, "none", torch.bfloat16),
        (1, "none", torch.float32),
        (2, "none", torch.float32),
        (0, "some", torch.bfloat16),
        (2, "some", torch.float32),
    ],
)
def test_losses_per_sample(device: str, term: int, masked: str, dtype: torch.dtype) -> None:
    """The incoming gradients of the loss, the cycle loss or the separability loss differ between samples."""
    parameters = [tokens(24, device=device, common=0.0, seed=seed) for seed in range(3)]
    mask = some_mask(masked, 3, 6, device)
    regularizer = "mse" if term == 2 else "kl"
    loss = head_objective((3, 2), window=1, reduction="none", regularizer=regularizer, mask=mask)

    def chosen_first(backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        losses = loss(backend, *tensors)
        assert all(each.shape == (3,) for each in losses)
        return (losses[term], *losses)

    frozen = tokens(3, 3, 6, 24, device=device)
    check_against_eager(chosen_first, dtype, frozen, frozen + 0.3, *parameters)


@pytest.mark.parametrize("part", ["walk", "separability"])
def test_single_losses_per_sample(device: str, part: str) -> None:
    frozen = tokens(3, 3, 4, 24, device=device)
    walk = torch.nn.functional.normalize(frozen, dim=-1)

    def loss(backend: str, *given: Tensor) -> tuple[Tensor, ...]:
        if part == "walk":
            return (cycle_consistency_loss(given[0], 0.1, backend=backend, reduction="none"),)
        return (separability_loss(*given, backend=backend, reduction="none"),)

    given = (walk,) if part == "walk" else (frozen, frozen + 0.3)
    for dtype in (torch.float32, torch.bfloat16):
        check_against_eager(loss, dtype, *given)


def test_an_expanded_incoming_gradient(device: str) -> None:
    """The gradient of a sum over samples is one number, expanded to all samples."""
    frozen = tokens(2, 3, 4, 16, device=device)
    # Equal tokens and a single window would make both terms, and so the gradients, 0.
    projected = frozen.roll(1, dims=-1).requires_grad_()

    def gradient(reduction: str) -> Tensor:
        out = cosettle_loss(frozen, projected, (2, 2), window=1, backend="triton", reduction=reduction)
        return torch.autograd.grad(out.loss.sum(), projected)[0]

    torch.testing.assert_close(gradient("none"), 2 * gradient("mean"))


def test_low_temperature_with_the_head(device: str, cycle_kernels: str) -> None:
    """Logits are of the order of 100, the grid is odd, and 50 channels are not a power of two."""
    linear = 0.5 * tokens(1, 3, 9, 50, device=device, seed=1)
    parameters = [tokens(50, device=device, common=0.0, seed=seed) for seed in range(3)]
    loss = head_objective((3, 3), window=1, temperature=0.01, regularizer="mse")
    check_against_eager(loss, torch.bfloat16, tokens(1, 3, 9, 50, device=device), linear, *parameters)


def test_opposite_views_do_not_overflow_beyond_the_last_token(device: str) -> None:
    """Logits are near -100, but 0 in the padding of a tile, where the exponentials must be masked."""
    noise = torch.randn(1, 3, 70, 24, generator=torch.Generator().manual_seed(0))
    views = torch.tensor([1.0, -1.0, 1.0]).view(1, 3, 1, 1) + 0.1 * noise
    walk = torch.nn.functional.normalize(views, dim=-1).to(device)

    def loss(backend: str, walk: Tensor) -> tuple[Tensor, ...]:
        return (cycle_consistency_loss(walk, 0.01, backend=backend),)

    check_against_eager(loss, torch.float32, walk)


@pytest.mark.parametrize("factor", [0.0, 1e-14])
def test_a_projected_zero_token_is_normalised_as_in_torch(device: str, factor: float) -> None:
    """torch.nn.functional.normalize divides such a token and its gradient by 1e-12."""
    frozen, projected = (tokens(1, 3, 4, 16, device=device, seed=seed) for seed in range(2))
    projected[0, 1, 2] *= factor
    truth, value = (
        evaluate(objective((2, 2), window=1), backend, dtype, [frozen, projected])[-1][0, 1, 2]
        for backend, dtype in (("eager", torch.float64), ("triton", torch.float32))
    )
    assert truth.norm() > 1e9
    assert norm_error(value, truth) < 1e-4


@pytest.mark.parametrize("regularizer", ["kl", "mse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_mask_that_is_true_everywhere_changes_nothing(
    device: str, regularizer: str, dtype: torch.dtype
) -> None:
    frozen = tokens(2, 3, 9, 16, device=device)
    mask = torch.ones(2, 9, dtype=torch.bool, device=device)
    value, truth = (
        evaluate(
            objective((3, 3), window=1, regularizer=regularizer, mask=given),
            "triton",
            dtype,
            [frozen, frozen.roll(1, dims=-1)],
        )
        for given in (mask, None)
    )
    for one, other in zip(value, truth, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("masked", [0.0, float("nan"), float("inf")])
def test_masked_tokens_receive_exactly_zero_gradients(device: str, masked: float) -> None:
    """Without an epsilon, the layer norm of a token that is not loaded would divide by 0."""
    frozen, linear = (tokens(2, 3, 9, 16, device=device, seed=seed) for seed in range(2))
    mask = some_mask("first empty", 2, 9, device)
    linear.masked_fill_(~mask[:, None, :, None], masked)
    parameters = [frozen.new_zeros(16), frozen.new_ones(16), frozen.new_zeros(16)]
    loss = head_objective((3, 3), mask=mask, norm_eps=0.0)
    results = evaluate(loss, "triton", torch.float32, [frozen, linear, *parameters])
    assert all(each.isfinite().all() for each in results)
    assert torch.equal(results[3].any(-1), mask[:, None].expand(2, 3, 9))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_propagate_to_the_loss(device: str, value: float) -> None:
    frozen, projected = (tokens(1, 3, 8, 8, device=device, seed=seed) for seed in range(2))
    broken = projected.clone()
    broken[0, 1, 5, 2] = value
    out = cosettle_loss(frozen, broken, grid=(4, 2), backend="triton")
    assert not out.cycle.isfinite()
    assert not out.separability.isfinite()
    frozen[0, 2, 3, 1] = value
    assert not cosettle_loss(frozen, projected, grid=(4, 2), backend="triton").loss.isfinite()


def test_dtypes_of_frozen_and_projected_may_differ(device: str) -> None:
    """Under autocast, frozen tokens are in half precision but the output of the layer norm is not."""
    frozen, projected = (tokens(1, 3, 16, 8, device=device, seed=seed) for seed in range(2))
    mixed = cosettle_loss(frozen.bfloat16(), projected, grid=(4, 4), backend="triton")
    truth = cosettle_loss(frozen.bfloat16().double(), projected.double(), grid=(4, 4), backend="eager")
    assert mixed.loss.item() == pytest.approx(truth.loss.item(), rel=1e-5)


def test_results_are_bitwise_reproducible(device: str) -> None:
    frozen = tokens(2, 3, 4, 24, device=device)
    tensors = [frozen, frozen.roll(1, dims=-1)]
    first, second = (
        evaluate(objective((2, 2), window=1), "triton", torch.bfloat16, tensors) for _ in range(2)
    )
    assert first[-1].any()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
