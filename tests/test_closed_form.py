"""The closed form on tokens with known signal and noise. Shape suffixes: B pairs, N tokens, D channels."""

import math

import pytest
import torch
from torch import Tensor

from fasttrain.closed_form import ClosedForm, linear_projection, solve
from fasttrain.errors import InputError
from fasttrain.moments import TokenMoments

DIM = 5


def gather(noise_D: Tensor, mixing_DD: Tensor | None = None) -> TokenMoments:
    """Return the moments of signals of unit variance that two frames share, plus noise of some deviation."""
    generator = torch.Generator().manual_seed(0)
    dim = len(noise_D)
    signal_BND = torch.randn(400, 4, dim, generator=generator, dtype=torch.float64)
    noise_B2ND = torch.randn(400, 2, 4, dim, generator=generator, dtype=torch.float64) * noise_D
    moments = TokenMoments(dim)
    tokens_B2ND = signal_BND[:, None] + noise_B2ND + 0.1
    moments.add(tokens_B2ND if mixing_DD is None else tokens_B2ND @ mixing_DD.T)
    return moments


@pytest.fixture(scope="module")
def moments() -> TokenMoments:
    mixing_DD = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return gather(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]), mixing_DD)


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
        consistency = (weight_DD @ moments.noise_DD * weight_DD).sum()
        separability = ((weight_DD - eye_DD) @ moments.total_DD * (weight_DD - eye_DD)).sum()
        objective = consistency + strength * separability
        objective.backward()
        return objective

    optimizer.step(loss)
    torch.testing.assert_close(solve(moments, strength), weight_DD.detach(), rtol=0, atol=1e-6)


def test_a_strong_separability_gives_the_frozen_features(moments: TokenMoments) -> None:
    eye_DD = torch.eye(DIM, dtype=torch.float64)
    torch.testing.assert_close(solve(moments, math.inf), eye_DD, rtol=0, atol=1e-9)
    torch.testing.assert_close(solve(moments, 1e300), eye_DD)


def test_directions_are_kept_by_their_reliability() -> None:
    """Uncorrelated channels, of which the last one never varies, as in a dead unit."""
    noise_D = torch.tensor([0.0, 0.3, 0.6, 0.0], dtype=torch.float64)
    moments = gather(noise_D, torch.diag(torch.tensor([5.0, 1.0, 1.0, 0.0], dtype=torch.float64)))
    gain_D = solve(moments, 0.5).diagonal()
    assert gain_D[0] > 0.9
    assert gain_D[3] == pytest.approx(1)
    # Nearly all matches are right, so rho is the share of the noise in the variance.
    share_D = noise_D.square() / (1 + noise_D.square())
    torch.testing.assert_close(gain_D[1:3], 0.5 / (0.5 + share_D[1:3]), rtol=0, atol=0.1)


def test_reliability_has_the_generalised_eigenvalues(moments: TokenMoments) -> None:
    rho_D = torch.linalg.eigvals(torch.linalg.solve(moments.total_DD, moments.noise_DD)).real
    expected_D = (1 - rho_D).sort(descending=True).values
    torch.testing.assert_close(ClosedForm(moments).reliability_D, expected_D, rtol=0, atol=1e-7)


def test_relatives_of_the_closed_form(moments: TokenMoments) -> None:
    form = ClosedForm(moments)
    eye_DD, plain_DD = torch.eye(DIM, dtype=torch.float64), form.solve(0.3)
    white_DD = form.solve(math.inf, whitening=1)
    torch.testing.assert_close(white_DD @ moments.total_DD @ white_DD.T, eye_DD, rtol=0, atol=1e-6)
    mixed_DD = form.solve(0.3, identity=0.25)
    torch.testing.assert_close(mixed_DD, 0.25 * eye_DD + 0.75 * plain_DD, rtol=0, atol=1e-9)
    # A projector on the most reliable directions leaves the two most reliable coordinates.
    kept_DD = form.solve(math.inf, rank=2)
    torch.testing.assert_close(kept_DD @ kept_DD, kept_DD, rtol=0, atol=1e-9)
    noise = [
        torch.trace(map_DD @ moments.noise_DD @ map_DD.T).item() for map_DD in (kept_DD, eye_DD - kept_DD)
    ]
    total = [
        torch.trace(map_DD @ moments.total_DD @ map_DD.T).item() for map_DD in (kept_DD, eye_DD - kept_DD)
    ]
    assert noise[0] / total[0] < noise[1] / total[1]
    assert torch.linalg.matrix_rank(kept_DD, tol=1e-6) == 2


def test_a_rotation_of_the_tokens_rotates_the_solution() -> None:
    generator = torch.Generator().manual_seed(2)
    rotation_DD = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)).Q
    noise_D = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    expected_DD = rotation_DD @ solve(gather(noise_D), 0.3) @ rotation_DD.T
    torch.testing.assert_close(solve(gather(noise_D, rotation_DD), 0.3), expected_DD)


def test_the_projection_computes_the_centred_map(moments: TokenMoments) -> None:
    weight_DD = solve(moments, 0.1)
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
        solve(moments, 1)
