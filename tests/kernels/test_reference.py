"""Tests of the eager reference against the definitions in the paper."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasttrain_kernels import (
    cosettle_head_loss,
    cosettle_loss,
    cycle_consistency_loss,
    reference,
    separability_loss,
)


def test_return_probabilities_and_loss_match_the_complete_cycle_matrix() -> None:
    walk = torch.nn.functional.normalize(torch.randn(2, 5, 7, 12, dtype=torch.float64), dim=-1)
    affinities = reference.cycle_affinities(walk, 0.1)
    whole = affinities[0] @ affinities[1] @ affinities[2] @ affinities[3]
    torch.testing.assert_close(reference.return_probability(affinities), whole.diagonal(dim1=1, dim2=2))
    logits = torch.log(whole + reference.CYCLE_EPS).flatten(0, 1)
    truth = torch.nn.functional.cross_entropy(logits, torch.arange(7).repeat(2))
    torch.testing.assert_close(reference.cycle_consistency_loss(walk, 0.1), truth)


def test_a_walk_there_and_back_visits_the_same_views_in_reverse() -> None:
    walk = torch.nn.functional.normalize(torch.randn(2, 4, 7, 12, dtype=torch.float64), dim=-1)
    returned = cycle_consistency_loss(walk, 0.1, there_and_back=True, backend="eager")
    assert torch.equal(returned, cycle_consistency_loss(walk[:, [0, 1, 2, 3, 2, 1, 0]], 0.1, backend="eager"))


def test_pooling_matches_avg_pool2d() -> None:
    tokens = torch.randn(2, 3, 5 * 7, 4, dtype=torch.float64)
    images = tokens.flatten(0, 1).transpose(1, 2).unflatten(2, (5, 7))
    truth = torch.nn.functional.avg_pool2d(images, 2).flatten(2).transpose(1, 2).unflatten(0, (2, 3))
    torch.testing.assert_close(reference.pool_tokens(tokens, (5, 7), 2), truth)


@pytest.mark.parametrize("regularizer", ["kl", "mse"])
def test_losses_per_sample_are_those_of_the_sample_alone(regularizer: str) -> None:
    frozen, projected = torch.randn(2, 3, 3, 16, 8, dtype=torch.float64)

    def losses(rows: slice, reduction: str) -> list[torch.Tensor]:
        tokens = (frozen[rows], projected[rows])
        out = cosettle_loss(*tokens, (4, 4), regularizer=regularizer, reduction=reduction)
        walk = cycle_consistency_loss(0.1 * tokens[1], reduction=reduction)
        return [*out[:3], walk, separability_loss(*tokens, regularizer, reduction=reduction)]

    whole = slice(0, 3)
    alone = [
        torch.stack(each) for each in zip(*(losses(slice(i, i + 1), "mean") for i in range(3)), strict=True)
    ]
    for mean, each, truth in zip(losses(whole, "mean"), losses(whole, "none"), alone, strict=True):
        torch.testing.assert_close(each, truth)
        torch.testing.assert_close(each.mean(), mean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    frozen, projected = (torch.randn(2, 3, 16, 8).to(dtype) for _ in range(2))
    half, single = (
        cosettle_loss(*tokens, grid=(4, 4), backend="eager")
        for tokens in ((frozen, projected), (frozen.float(), projected.float()))
    )
    assert all(torch.equal(one, other) for one, other in zip(half, single, strict=True))


@pytest.mark.parametrize("alone", [False, True])
def test_frozen_tokens_receive_no_gradient(alone: bool) -> None:
    frozen, projected = (torch.randn(1, 3, 16, 8, requires_grad=True) for _ in range(2))
    if alone:
        separability_loss(frozen, projected).backward()
    else:
        cosettle_loss(frozen, projected, grid=(4, 4)).loss.backward()
    assert frozen.grad is None
    assert projected.grad.abs().sum() > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_propagate_to_the_loss(value: float) -> None:
    frozen, projected = torch.randn(1, 3, 16, 8), torch.randn(1, 3, 16, 8)
    projected[0, 1, 5, 2] = value
    assert not cosettle_loss(frozen, projected, grid=(4, 4)).loss.isfinite()
    frozen[0, 2, 3, 1] = value
    assert not cosettle_loss(frozen, torch.randn(1, 3, 16, 8), grid=(4, 4)).loss.isfinite()


def test_diagnostics_can_be_disabled() -> None:
    frozen, projected = torch.randn(1, 3, 16, 8), torch.randn(1, 3, 16, 8)
    out = cosettle_loss(frozen, projected, grid=(4, 4), diagnostics=False)
    assert out.cycle_accuracy is None
    assert out.identity_similarity is None
    assert torch.equal(out.loss, cosettle_loss(frozen, projected, grid=(4, 4)).loss)


def per_sample(loss: Any, tensors: list[Tensor]) -> list[Tensor]:
    """Return the losses (B,), and the gradients of the sum of all losses."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    losses = loss(*leaves)
    return [*losses, *torch.autograd.grad(sum(each.sum() for each in losses), leaves)]


def objective_of_each_sample_alone(
    frozen: Tensor, projected: Tensor, mask: Tensor, grid: tuple[int, int], window: int, regularizer: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Cycle and separability losses (B,) and the cycle matrices, from the tokens that count only."""
    cycles, separabilities, matrices = [], [], []
    for sample, keep in enumerate(mask):
        # The gradient of a sample without tokens is zero.
        cycle = separability = projected[sample, :, keep].sum()
        if keep.any():
            kept = frozen[sample : sample + 1, :, keep], projected[sample : sample + 1, :, keep]
            separability = separability_loss(*kept, regularizer)
        tokens, counts = projected[sample].unflatten(1, grid), keep.unflatten(0, grid)
        pooled = []
        for top in range(0, grid[0] - window + 1, window):
            for left in range(0, grid[1] - window + 1, window):
                rows, columns = slice(top, top + window), slice(left, left + window)
                inside = tokens[:, rows, columns][:, counts[rows, columns]]
                if inside.numel():
                    pooled.append(torch.nn.functional.normalize(inside, dim=-1).mean(1))
        if pooled:
            walk = torch.stack(pooled, dim=1)[None]
            cycle = cycle_consistency_loss(walk, 0.1)
            there, back = reference.cycle_affinities(walk, 0.1)
            matrices.append((there @ back)[0].detach())
        cycles.append(cycle)
        separabilities.append(separability)
    return torch.stack(cycles), torch.stack(separabilities), matrices


MASKS = {
    "batch": st.integers(1, 3),
    "grid": st.tuples(st.integers(1, 5), st.integers(1, 5)),
    "window": st.integers(1, 3),
    "counting": st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    "regularizer": st.sampled_from(["kl", "mse"]),
    "content": st.sampled_from([0.0, 1e30, float("nan"), float("inf")]),
}


@settings(max_examples=40, deadline=None)
@given(case=st.fixed_dictionaries(MASKS))
def test_masked_losses_are_those_of_the_tokens_that_count_alone(case: dict[str, Any]) -> None:
    grid, regularizer = case["grid"], case["regularizer"]
    window = min(case["window"], *grid)
    generator = torch.Generator().manual_seed(0)
    shape = (case["batch"], 3, grid[0] * grid[1], 6)
    frozen, projected = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
    mask = torch.rand((shape[0], shape[2]), generator=generator) < case["counting"]
    for tokens in (frozen, projected):
        tokens.masked_fill_(~mask[:, None, :, None], case["content"])

    def masked(projected: Tensor) -> list[Tensor]:
        options = {"temperature": 0.1, "window": window, "regularizer": regularizer, "mask": mask}
        out = cosettle_loss(frozen, projected, grid, reduction="none", **options)
        mean = cosettle_loss(frozen, projected, grid, **options)
        for one, each in zip(mean[:3], out[:3], strict=True):
            torch.testing.assert_close(one, each.mean())
        torch.testing.assert_close(out.loss, out.cycle + 3.0 * out.separability)
        diagnostics.extend(out[3:])
        alone = separability_loss(frozen, projected, regularizer, reduction="none", mask=mask)
        torch.testing.assert_close(alone, out.separability)
        return [out.cycle, out.separability]

    def alone(projected: Tensor) -> list[Tensor]:
        *losses, found = objective_of_each_sample_alone(frozen, projected, mask, grid, window, regularizer)
        matrices.extend(found)
        return losses

    diagnostics: list[Tensor] = []
    matrices: list[Tensor] = []
    for value, truth in zip(per_sample(masked, [projected]), per_sample(alone, [projected]), strict=True):
        torch.testing.assert_close(value, truth)
    if not matrices:
        assert all(value.isnan() for value in diagnostics)
        return
    correct = torch.cat([matrix.argmax(1) == torch.arange(len(matrix)) for matrix in matrices])
    identity = torch.cat([torch.eye(len(matrix), dtype=torch.float64).flatten() for matrix in matrices])
    whole = torch.cat([matrix.flatten() for matrix in matrices])
    truth = [correct.double().mean(), torch.nn.functional.cosine_similarity(whole, identity, dim=0)]
    for value, expected in zip(diagnostics, truth, strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("views", [2, 3, 5])
@pytest.mark.parametrize("there_and_back", [False, True])
def test_a_masked_walk_is_that_of_the_tokens_that_count_alone(views: int, there_and_back: bool) -> None:
    """The last sample has no token that counts."""
    walk = torch.randn(3, views, 7, 6, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 1, 0, 0], [0] * 7], dtype=torch.bool)
    walk.masked_fill_(~mask[:, None, :, None], float("nan"))

    def masked(walk: Tensor) -> list[Tensor]:
        losses = cycle_consistency_loss(walk, 0.1, there_and_back, reduction="none", mask=mask)
        mean = cycle_consistency_loss(walk, 0.1, there_and_back, mask=mask)
        torch.testing.assert_close(mean, losses.mean())
        return [losses]

    def alone(walk: Tensor) -> list[Tensor]:
        kept = [walk[sample : sample + 1, :, mask[sample]] for sample in range(2)]
        losses = [cycle_consistency_loss(tokens, 0.1, there_and_back) for tokens in kept]
        return [torch.stack([*losses, torch.zeros((), dtype=torch.float64)])]

    for value, truth in zip(per_sample(masked, [walk]), per_sample(alone, [walk]), strict=True):
        torch.testing.assert_close(value, truth)


@pytest.mark.parametrize("norm_eps", [0.0, 1e-5])
def test_masked_tokens_do_not_reach_the_parameters_of_the_head(norm_eps: float) -> None:
    """A layer norm without epsilon would divide by the standard deviation 0 of a constant token."""
    frozen, linear = torch.randn(2, 2, 3, 4, 6, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)
    parameters = [torch.zeros(6), torch.ones(6), torch.zeros(6)]

    def head_loss(content: float, mask: Tensor | None) -> Any:
        def losses(linear: Tensor, *parameters: Tensor) -> list[Tensor]:
            out = cosettle_head_loss(
                frozen, linear, *parameters, (2, 2), window=1, norm_eps=norm_eps, mask=mask, reduction="none"
            )
            return list(out[:3])

        hidden = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0]], dtype=torch.bool)[:, None, :, None]
        tensors = [linear.masked_fill(hidden, content), *(each.double() for each in parameters)]
        return per_sample(losses, tensors)

    for one, other in zip(head_loss(float("nan"), mask), head_loss(1.0, mask), strict=True):
        assert torch.equal(one, other)


def test_a_mask_that_is_true_everywhere_changes_nothing() -> None:
    frozen, projected = torch.randn(2, 2, 3, 25, 8, dtype=torch.float64)
    mask = torch.ones(2, 25, dtype=torch.bool)
    for regularizer in ("kl", "mse"):
        out, truth = (
            cosettle_loss(frozen, projected, (5, 5), regularizer=regularizer, mask=given)
            for given in (mask, None)
        )
        for value, expected in zip(out, truth, strict=True):
            torch.testing.assert_close(value, expected)
