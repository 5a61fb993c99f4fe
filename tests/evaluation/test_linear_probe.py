"""The linear probe: comparison with another optimiser, invariances, choice of the L2 strength."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fasttrain.errors import InputError
from fasttrain.evaluation.linear_probe import STRENGTHS, fit_linear
from fasttrain.evaluation.metrics import hold_out, top_accuracy


def blobs(seed: int, count: int = 60, channels: int = 6, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Return overlapping Gaussian clusters, one per class, on channels of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, channels, generator=generator)
    features = centres[labels] + torch.randn(count, channels, generator=generator)
    return features * torch.logspace(-3, 2, channels) + 5, labels


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_finds_the_same_minimum_as_another_optimiser(l2: float) -> None:
    features, labels = blobs(3)
    probe = fit_linear(features, labels, num_classes=3, strengths=[l2])
    assert probe.converged
    assert probe.l2 == l2
    deviation = features.double().std(dim=0, correction=0)
    standard = (features.double() - features.double().mean(dim=0)) / deviation
    weight = torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    other = torch.optim.LBFGS(
        [weight, bias], max_iter=2000, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        other.zero_grad()
        value = functional.cross_entropy(standard @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    other.step(loss)
    probe_weight = probe.weight_DC.T * deviation
    probe_loss = functional.cross_entropy(probe.scores(features), labels)
    probe_loss = probe_loss + l2 / 2 * probe_weight.square().sum()
    assert probe_loss.item() == pytest.approx(loss().item(), abs=1e-7)
    torch.testing.assert_close(probe_weight, weight.detach(), atol=2e-3, rtol=1e-2)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_predictions_do_not_depend_on_scale_or_order(seed: int) -> None:
    features, labels = blobs(seed)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out = hold_out(labels)
    one = fit_linear(features, labels, num_classes=3, held_out_S=held_out)
    moved = features[order] * torch.tensor([2.0, 0.5, 1, 8, 4, 0.25]) - 3
    other = fit_linear(moved, labels[order], num_classes=3, held_out_S=held_out[order])
    assert one.l2 == other.l2
    difference = one.scores(features[order]).softmax(dim=-1) - other.scores(moved).softmax(dim=-1)
    # The tolerance is for the features' rounding to float32, which the shift changes.
    assert difference.abs().max() < 1e-2


def test_the_strength_with_the_best_held_out_accuracy_is_chosen() -> None:
    features, labels = blobs(1, count=150)
    # Many noise channels, which overfit if the penalty is weak.
    noise = torch.randn(len(labels), 60, generator=torch.Generator().manual_seed(1))
    features, held_out = torch.cat([features, noise], dim=1), hold_out(labels)
    # With four strengths, the sweep cannot end early.
    strengths = STRENGTHS[:4]
    by_strength = {
        l2: fit_linear(features, labels, num_classes=3, held_out_S=held_out, strengths=[l2, l2])
        for l2 in strengths
    }
    accuracies = {l2: probe.held_out_accuracy or 0 for l2, probe in by_strength.items()}
    assert len(set(accuracies.values())) > 1
    chosen = fit_linear(features, labels, num_classes=3, held_out_S=held_out, strengths=strengths)
    assert chosen.held_out_accuracy == max(accuracies.values()) == accuracies[chosen.l2]
    # The final fit is to all training data.
    on_all = fit_linear(features, labels, num_classes=3, strengths=[chosen.l2])
    torch.testing.assert_close(chosen.weight_DC, on_all.weight_DC)


def test_separable_classes_with_a_constant_channel() -> None:
    features = torch.eye(4).repeat(5, 1) + 0.01 * torch.randn(
        20, 4, generator=torch.Generator().manual_seed(0)
    )
    features = torch.cat([features, torch.full((20, 1), 1 / 3)], dim=1)
    labels = torch.arange(4).repeat(5)
    probe = fit_linear(features, labels, num_classes=4, held_out_S=hold_out(labels))
    assert top_accuracy(probe.scores(features), labels, 1) == 100
    assert probe.scores(features).isfinite().all()


def test_non_finite_features() -> None:
    with pytest.raises(InputError, match="not all finite"):
        fit_linear(torch.full((2, 2), torch.nan), torch.tensor([0, 1]), num_classes=2)
