"""The eager reference against the published code's numbers (`../shared/golden`) and its own definition."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fasttrain_kernels import cosettle_loss, cycle_consistency_loss, reference, separability_loss

LOSS_CASES = [
    "cold",
    "large_values",
    "linear_kl",
    "linear_mse",
    "mlp2",
    "mlp3",
    "odd_grid",
    "same_frames",
    "track",
    "warm",
    "window1",
    "zero_token",
]
FAMILIES = ["blip", "clip", "dino", "dinov2", "ibot", "ijepa", "mae", "mocov3"]
HEADS = {
    "linear": ("adapter_linear", "tanh", "adapter_layer_norm1"),
    "mlp2": ("adapter_linear1", "tanh", "adapter_linear2", "adapter_layer_norm1"),
    "mlp3": ("adapter_linear1", "tanh", "adapter_linear2", "tanh", "adapter_linear3", "adapter_layer_norm1"),
}


class Head(nn.Module):
    """The published projection head under its published parameter names."""

    def __init__(self, kind: str, parameters: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.steps = HEADS[kind]
        for name in self.steps:
            if name == "tanh":
                continue
            weight = parameters[f"{name}.weight"]
            layer = nn.Linear(*weight.shape[::-1]) if weight.ndim == 2 else nn.LayerNorm(weight.shape[0])
            self.add_module(name, layer)
        self.load_state_dict(parameters)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        for name in self.steps:
            tokens = tokens.tanh() if name == "tanh" else self.get_submodule(name)(tokens)
        return tokens


def with_prefix(case: dict[str, np.ndarray], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): torch.from_numpy(case[key]) for key in case if key.startswith(prefix)}


def check_case(
    case: dict[str, np.ndarray], frozen: torch.Tensor, *, head: str, window: int, regularizer: str
) -> None:
    model = Head(head, with_prefix(case, "projection."))
    side = int(frozen.shape[2] ** 0.5)
    out = cosettle_loss(
        frozen,
        model(frozen),
        grid=(side, side),
        temperature=float(case["temperature"]),
        window=window,
        lambda_reg=float(case["lambda_reg"]),
        regularizer=regularizer,
        backend="eager",
    )
    out.loss.backward()
    for name, value in [
        ("loss", out.loss),
        ("cycle_loss", out.cycle),
        ("separability_loss", out.separability),
    ]:
        assert value.item() == pytest.approx(float(case[name]), rel=1e-5), name
    assert out.cycle_accuracy.item() == pytest.approx(float(case["cycle_accuracy"]), abs=1e-6)
    assert out.identity_similarity.item() == pytest.approx(float(case["identity_similarity"]), rel=1e-5)
    for name, truth in with_prefix(case, "grad.").items():
        error = (model.get_parameter(name).grad - truth).norm() / truth.norm()
        assert error < 1e-4, f"gradient of {name}: {error:.2e}"


@pytest.mark.parametrize("name", LOSS_CASES)
def test_agrees_with_the_published_objective(shared: Path, name: str) -> None:
    case = dict(np.load(shared / "golden" / "loss" / f"{name}.npz"))
    check_case(
        case,
        torch.from_numpy(case["z"]),
        head=str(case["head"]),
        window=int(case["window"]),
        regularizer=str(case["regularizer"]),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_the_published_backbones(shared: Path, family: str) -> None:
    case = dict(np.load(shared / "golden" / "backbones" / f"{family}.npz"))
    frozen = torch.stack(
        [torch.from_numpy(case[key]) for key in ("tokens1", "tokens2", "tokens1_asym")], dim=1
    )
    check_case(case, frozen, head="linear", window=2, regularizer="kl")


def test_the_diagonal_is_that_of_the_whole_product() -> None:
    walk = torch.nn.functional.normalize(torch.randn(2, 5, 7, 12, dtype=torch.float64), dim=-1)
    affinities = reference.cycle_affinities(walk, 0.1)
    whole = affinities[0] @ affinities[1] @ affinities[2] @ affinities[3]
    torch.testing.assert_close(reference.return_probability(affinities), whole.diagonal(dim1=1, dim2=2))
    logits = torch.log(whole + reference.CYCLE_EPS).flatten(0, 1)
    truth = torch.nn.functional.cross_entropy(logits, torch.arange(7).repeat(2))
    torch.testing.assert_close(reference.cycle_consistency_loss(walk, 0.1), truth)


def test_a_walk_there_and_back_returns_through_the_same_views() -> None:
    walk = torch.nn.functional.normalize(torch.randn(2, 4, 7, 12, dtype=torch.float64), dim=-1)
    returned = cycle_consistency_loss(walk, 0.1, there_and_back=True, backend="eager")
    assert torch.equal(returned, cycle_consistency_loss(walk[:, [0, 1, 2, 3, 2, 1, 0]], 0.1, backend="eager"))


def test_pooling_is_average_pooling() -> None:
    tokens = torch.randn(2, 3, 5 * 7, 4, dtype=torch.float64)
    images = tokens.flatten(0, 1).transpose(1, 2).unflatten(2, (5, 7))
    truth = torch.nn.functional.avg_pool2d(images, 2).flatten(2).transpose(1, 2).unflatten(0, (2, 3))
    torch.testing.assert_close(reference.pool_tokens(tokens, (5, 7), 2), truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    frozen, projected = (torch.randn(2, 3, 16, 8).to(dtype) for _ in range(2))
    half, single = (
        cosettle_loss(*tokens, grid=(4, 4), backend="eager")
        for tokens in ((frozen, projected), (frozen.float(), projected.float()))
    )
    assert all(torch.equal(one, other) for one, other in zip(half, single, strict=True))


@pytest.mark.parametrize("alone", [False, True])
def test_nothing_flows_into_the_frozen_tokens(alone: bool) -> None:
    frozen, projected = (torch.randn(1, 3, 16, 8, requires_grad=True) for _ in range(2))
    if alone:
        separability_loss(frozen, projected).backward()
    else:
        cosettle_loss(frozen, projected, grid=(4, 4)).loss.backward()
    assert frozen.grad is None
    assert projected.grad.abs().sum() > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_loss(value: float) -> None:
    frozen, projected = torch.randn(1, 3, 16, 8), torch.randn(1, 3, 16, 8)
    projected[0, 1, 5, 2] = value
    assert not cosettle_loss(frozen, projected, grid=(4, 4)).loss.isfinite()
    frozen[0, 2, 3, 1] = value
    assert not cosettle_loss(frozen, torch.randn(1, 3, 16, 8), grid=(4, 4)).loss.isfinite()


def test_diagnostics_are_formed_only_when_asked() -> None:
    frozen, projected = torch.randn(1, 3, 16, 8), torch.randn(1, 3, 16, 8)
    out = cosettle_loss(frozen, projected, grid=(4, 4), diagnostics=False)
    assert out.cycle_accuracy is None
    assert out.identity_similarity is None
    assert torch.equal(out.loss, cosettle_loss(frozen, projected, grid=(4, 4)).loss)
