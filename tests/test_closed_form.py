"""The closed form on tokens with known signal and noise. Shape suffixes: B pairs, N tokens, D channels."""

import math

import pytest
import torch
from torch import Tensor

from fasttrain.closed_form import ClosedForm, linear_projection
from fasttrain.errors import InputError
from fasttrain.moments import TokenMoments

DIM = 5


def gather(noise_D: Tensor, mixing_DD: Tensor | None = None, shared: float = 0.0) -> TokenMoments:
    """Return the moments of signals of unit variance that two frames share, plus noise of some deviation.

    The tokens of a pair also share a signal of the deviation `shared`.
    """
    generator = torch.Generator().manual_seed(0)
    dim = len(noise_D)
    signal_BND = torch.randn(400, 4, dim, generator=generator, dtype=torch.float64)
    signal_BND += shared * torch.randn(400, 1, dim, generator=generator, dtype=torch.float64)
    noise_B2ND = torch.randn(400, 2, 4, dim, generator=generator, dtype=torch.float64) * noise_D
    moments = TokenMoments(dim)
    tokens_B2ND = signal_BND[:, None] + noise_B2ND + 0.1
    moments.add(tokens_B2ND if mixing_DD is None else tokens_B2ND @ mixing_DD.T)
    return moments


@pytest.fixture(scope="module")
def moments() -> TokenMoments:
    mixing_DD = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return gather(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]), mixing_DD, shared=0.7)


@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0])
def test_the_solution_minimises_the_quadratic_objective(moments: TokenMoments, strength: float) -> None:
    """Compare with a numerical minimiser."""
    eye_DD = torch.eye(DIM, dtype=torch.float64)
    weight_DD = eye_DD.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight_DD], max_iter=1000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        noise = (weight_DD @ (moments.noise_DD + moments.frame_DD) * weight_DD).sum()
        signal = ((weight_DD - eye_DD) @ moments.within_frame_DD * (weight_DD - eye_DD)).sum()
        objective = noise + strength * signal
        objective.backward()
        return objective

    optimizer.step(loss)
    torch.testing.assert_close(ClosedForm(moments).solve(strength), weight_DD.detach(), rtol=0, atol=1e-6)


def test_an_infinite_strength_gives_the_frozen_features(moments: TokenMoments) -> None:
    eye_DD = torch.eye(DIM, dtype=torch.float64)
    torch.testing.assert_close(ClosedForm(moments).solve(math.inf), eye_DD, rtol=0, atol=1e-9)
    torch.testing.assert_close(ClosedForm(moments).solve(1e300), eye_DD)


def test_directions_are_kept_by_their_reliability() -> None:
    """Uncorrelated channels, of which the last one never varies, as in a dead unit."""
    noise_D = torch.tensor([0.0, 0.3, 0.6, 0.0], dtype=torch.float64)
    mixing_DD = torch.diag(torch.tensor([5.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    gain_D = ClosedForm(gather(noise_D, mixing_DD, shared=0.5)).solve(0.5).diagonal()
    assert gain_D[3] == pytest.approx(1)
    # Frame means have the variance of the shared signal and a quarter of that of the four tokens.
    within_D, frame_D = 0.75 * (1 + noise_D**2), 0.25 + (1 + noise_D**2) / 4
    expected_D = within_D / (within_D + (noise_D**2 + frame_D) / 0.5)
    torch.testing.assert_close(gain_D[:3], expected_D[:3], rtol=0, atol=0.05)


def test_reliability_is_the_share_of_the_signal(moments: TokenMoments) -> None:
    noise_DD = moments.noise_DD + moments.frame_DD
    rho_D = torch.linalg.eigvals(torch.linalg.solve(moments.within_frame_DD, noise_DD)).real
    expected_D = (1 / (1 + rho_D)).sort(descending=True).values
    torch.testing.assert_close(ClosedForm(moments).reliability_D, expected_D, rtol=0, atol=1e-7)


def test_whitening_multiplies_by_a_power_of_the_covariance(moments: TokenMoments) -> None:
    form = ClosedForm(moments)
    eye_DD = torch.eye(DIM, dtype=torch.float64)
    white_DD = form.solve(math.inf, whitening=0.5)
    torch.testing.assert_close(white_DD @ moments.total_DD @ white_DD.T, eye_DD, rtol=0, atol=1e-6)
    tenth_DD = form.solve(math.inf, whitening=0.1)
    torch.testing.assert_close(torch.linalg.matrix_power(tenth_DD, 5), white_DD, rtol=0, atol=1e-6)
    torch.testing.assert_close(form.solve(0.3, whitening=0.1), tenth_DD @ form.solve(0.3))


def test_a_rotation_of_the_tokens_rotates_the_solution() -> None:
    generator = torch.Generator().manual_seed(2)
    rotation_DD = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)).Q
    noise_D = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    expected_DD = rotation_DD @ ClosedForm(gather(noise_D)).solve(0.3) @ rotation_DD.T
    torch.testing.assert_close(ClosedForm(gather(noise_D, rotation_DD)).solve(0.3), expected_DD)


def test_the_projection_computes_the_centred_map(moments: TokenMoments) -> None:
    weight_DD = ClosedForm(moments).solve(0.1)
    projection = linear_projection(moments, weight_DD)
    tokens_BD = moments.mean_D + torch.randn(100, DIM, dtype=torch.float64)
    expected_BD = (tokens_BD - moments.mean_D) @ weight_DD.T
    expected_BD = expected_BD - expected_BD.mean(-1, keepdim=True)
    with torch.no_grad():
        projected_BD = projection(tokens_BD.float())
    similarity_B = torch.cosine_similarity(projected_BD, expected_BD.float(), dim=-1)
    assert similarity_B.mean() > 0.95


def test_tokens_without_variance_are_refused() -> None:
    moments = TokenMoments(DIM)
    moments.add(torch.ones(2, 2, 4, DIM))
    with pytest.raises(InputError, match=r"data\.source: the frozen tokens of 2 pairs have the variance 0;"):
        ClosedForm(moments).solve(1)
