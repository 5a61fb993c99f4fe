"""Tests of the eager reference against the definitions in the paper."""

import pytest
import torch

from fasttrain_kernels import cosettle_loss, cycle_consistency_loss, reference, separability_loss


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
