"""Tests of the loss that computes the linear layer of the head for a few samples at a time."""

import re
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fasttrain_kernels import cosettle_head_loss, cosettle_linear_loss, linear
from tests.kernels.test_memory import Allocations
from tests.kernels.test_triton import norm_error

GRID = (3, 2)
OPTIONS = {"window": 1, "temperature": 0.1, "lambda_reg": 0.5, "regularizer": "mse", "norm_eps": 1e-3}


def separate(frozen: Tensor, inputs: Tensor, weight: Tensor, *head: Tensor, **options: Any) -> Any:
    product = torch.nn.functional.linear(inputs, weight)
    return cosettle_head_loss(frozen, product, *head, GRID, diagnostics=False, **options)


def tensors_of(dtype: torch.dtype, device: str, samples: int = 5) -> list[Tensor]:
    """Frozen tokens, inputs of 20 channels, and the parameters."""
    shapes = [(samples, 3, 6, 24), (samples, 3, 6, 20), (24, 20), (24,), (24,), (24,)]
    generator = torch.Generator().manual_seed(0)
    frozen, *others = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return [frozen, *(tensor.requires_grad_() for tensor in others)]


def losses_and_gradients(function: Any, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    out = function(*tensors, **options)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    return [*out[:3], *torch.autograd.grad(3.0 * out.loss, wanted)]


@pytest.mark.parametrize("chunk_size", [None, 2, 5])
@pytest.mark.parametrize("tanh", [True, False])
def test_it_equals_the_linear_layer_followed_by_the_loss(chunk_size: int | None, tanh: bool) -> None:
    """Chunks of two leave a chunk of one."""
    tensors = tensors_of(torch.float64, "cpu")
    truth = losses_and_gradients(separate, tensors, tanh=tanh, **OPTIONS)
    value = losses_and_gradients(
        cosettle_linear_loss, tensors, grid=GRID, tanh=tanh, chunk_size=chunk_size, **OPTIONS
    )
    for one, other in zip(value, truth, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("chunk_size", [2, 5])
def test_masked_tokens_have_no_effect(chunk_size: int) -> None:
    """Chunks of two leave a chunk of one. One sample has no token that counts."""
    tensors = tensors_of(torch.float64, "cpu")
    mask = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[3] = False
    truth = losses_and_gradients(separate, tensors, mask=mask, **OPTIONS)
    for tokens in tensors[:2]:
        tokens.detach().masked_fill_(~mask[:, None, :, None], float("nan"))
    value = losses_and_gradients(
        cosettle_linear_loss, tensors, grid=GRID, mask=mask, chunk_size=chunk_size, **OPTIONS
    )
    for one, other in zip(value, truth, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("frozen_inputs", [True, False])
def test_the_kernels_and_autocast(device: str, frozen_inputs: bool) -> None:
    """The error relative to float64 is about that of separate operations under autocast."""
    tensors = tensors_of(torch.float32, device, samples=3)
    tensors[0] = tensors[0].bfloat16()
    tensors[1].requires_grad_(not frozen_inputs)
    doubles = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
    truth = losses_and_gradients(separate, doubles, backend="eager")
    with torch.autocast(device, dtype=torch.bfloat16):
        baseline = losses_and_gradients(separate, tensors, backend="triton")
        value = losses_and_gradients(cosettle_linear_loss, tensors, grid=GRID, backend="triton", chunk_size=2)
    for each, plain, true in zip(value, baseline, truth, strict=True):
        assert each.dtype == plain.dtype
        assert norm_error(each, true) <= 2 * norm_error(plain, true) + 1e-3


def test_gradients_are_computed_only_if_they_are_needed() -> None:
    tensors = tensors_of(torch.float32, "cpu")
    with patch.object(torch.autograd, "grad") as grad, torch.no_grad():
        out = cosettle_linear_loss(*tensors, grid=GRID, chunk_size=1)
    assert not grad.called
    assert not out.loss.requires_grad
    tensors = [tensor.detach() for tensor in tensors]
    with patch.object(torch.autograd, "grad") as grad:
        cosettle_linear_loss(*tensors, grid=GRID, chunk_size=1)
    assert not grad.called
    tensors[3].requires_grad_()
    out = cosettle_linear_loss(*tensors, grid=GRID, chunk_size=2)
    assert not out.cycle.requires_grad
    assert not out.separability.requires_grad
    out.loss.backward()
    assert tensors[3].grad.abs().sum() > 0


def test_second_derivatives_are_errors() -> None:
    """Otherwise a gradient penalty would be silently wrong, because the gradients are constants."""
    tensors = tensors_of(torch.float32, "cpu")
    total = cosettle_linear_loss(*tensors, grid=GRID).loss + tensors[2].square().sum()
    (gradient,) = torch.autograd.grad(total, tensors[2], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient.square().sum().backward()


def test_torch_compile_leaves_it_alone() -> None:
    tensors = tensors_of(torch.float32, "cpu")

    def loss(*tensors: Tensor) -> Tensor:
        return 2 * cosettle_linear_loss(*tensors, grid=GRID).loss

    compiled = torch.compile(loss, backend="aot_eager")
    value, truth = (torch.autograd.grad(function(*tensors), tensors[1:]) for function in (compiled, loss))
    assert all(torch.equal(*both) for both in zip(value, truth, strict=True))


def test_the_product_exists_for_one_chunk_at_a_time(device: str) -> None:
    frozen = torch.randn(16, 3, 36, 8, device=device)
    head = [torch.randn(8, device=device, requires_grad=True) for _ in range(3)]
    weight = torch.randn(8, 8, device=device, requires_grad=True)
    largest, peaks = {}, {}
    for chunk_size in (2, 16):
        with Allocations(device) as allocations:
            out = cosettle_linear_loss(frozen, frozen, weight, *head, (6, 6), chunk_size=chunk_size)
            out.loss.backward()
        largest[chunk_size], peaks[chunk_size] = allocations.largest, allocations.peak
    assert largest[2] == frozen.numel() // 8
    assert peaks[2] < peaks[16] / 7


def test_the_default_chunk_is_bounded_in_bytes() -> None:
    tensors = tensors_of(torch.float32, "cpu")
    sizes = []
    with (
        patch.object(linear, "CHUNK_BYTES", 2 * 3 * 6 * 24 * 4),
        patch.object(linear, "cosettle_head_loss", side_effect=cosettle_head_loss) as loss,
    ):
        cosettle_linear_loss(*tensors, grid=GRID)
        sizes = [len(call.args[0]) for call in loss.call_args_list]
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"weight": torch.ones(24, 7)},
            "weight must be a non-empty tensor of shape (D, E) with D = 24, E = 20",
        ),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        (
            {"weight": torch.ones(24, 20, dtype=torch.bfloat16)},
            "weight must have the same dtype as inputs (torch.float32) without autocast, got torch.bfloat16",
        ),
        ({"grid": (2, 2)}, "grid must be (h, w) with h * w = N = 6 cells, got (2, 2) with 4 cells"),
    ],
)
def test_invalid_arguments_are_named(changed: dict[str, Any], message: str) -> None:
    names = ("frozen", "inputs", "weight", "bias", "norm_weight", "norm_bias")
    given = dict(zip(names, tensors_of(torch.float32, "cpu"), strict=True)) | {"grid": GRID}
    with pytest.raises(ValueError, match=re.escape(message)):
        cosettle_linear_loss(**(given | changed))
