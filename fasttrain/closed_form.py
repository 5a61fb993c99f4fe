"""The projection in closed form: the minimum of a quadratic version of the paper's objective.

With z the centred frozen tokens, T their covariance and N that of the noise (see `moments`):

    cycle consistency  ->  E |W (z1 - z2)|^2 / 2 = tr(W N W^T)    over matched tokens z1, z2
    separability       ->  E |W z - z|^2 = tr((W - I) T (W - I)^T)
    W = argmin tr(W N W^T) + mu tr((W - I) T (W - I)^T) = mu T (N + mu T)^-1

This is a Wiener filter. Let N v = rho T v. Then the filter multiplies the coordinate v^T z of a token by
mu / (mu + rho), where 1 - rho is the correlation of this coordinate between matched tokens, its reliability.
The greater the strength mu of separability, the nearer the projection is to the frozen features. The
derivation is in docs/theory.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fasttrain.errors import InputError
from fasttrain.moments import TokenMoments
from fasttrain.projection import Projection

# Variance that is added in every direction, relative to the mean variance. Directions in which the tokens do
# not vary then stay as they are, and the equations have a solution.
RIDGE = 1e-9


def solve(moments: TokenMoments, strength: float) -> Tensor:
    """Return the matrix W (D, D) of the closed form, in float64.

    Args:
        moments: The moments of the frozen tokens.
        strength: The weight mu > 0 of separability. Infinity gives the identity.
    """
    total_DD, noise_DD = _total(moments), moments.noise_DD
    if math.isinf(strength):
        return torch.eye(moments.dim, dtype=torch.float64, device=total_DD.device)
    # Divided by the greater one of 1 and mu, so that a very large mu does not overflow.
    noise_DD = noise_DD / max(1, strength)
    total_DD = total_DD * min(1, strength)
    # W is the transpose of (N + mu T)^-1 mu T, because N and T are symmetric.
    return torch.linalg.solve(noise_DD + total_DD, total_DD).T


def reliability(moments: TokenMoments) -> Tensor:
    """Return 1 - rho (D,), ascending: the correlations of matched tokens in the closed form's directions.

    Negative values are possible in directions where matched tokens differ more than any two tokens do.
    """
    # The eigenvalues of L^-1 N L^-T with T = L L^T are those of N v = rho T v.
    factor_DD = torch.linalg.cholesky(_total(moments))
    half_DD = torch.linalg.solve_triangular(factor_DD, moments.noise_DD, upper=False)
    whitened_DD = torch.linalg.solve_triangular(factor_DD, half_DD.T, upper=False)
    return 1 - torch.linalg.eigvalsh(whitened_DD).flip(0)


def linear_projection(moments: TokenMoments, weight_DD: Tensor) -> Projection:
    """Return the projection of a matrix W: W (z - mean), scaled, and tanh, which is nearly linear there."""
    variance = (weight_DD @ moments.total_DD * weight_DD).sum() / moments.dim
    return Projection.from_affine(weight_DD, -weight_DD @ moments.mean_D, variance.sqrt().item())


def _total(moments: TokenMoments) -> Tensor:
    """Return the covariance T (D, D) of the tokens with the ridge. Raises InputError if they do not vary."""
    total_DD = moments.total_DD
    variance = total_DD.diagonal().mean()
    if not (variance > 0 and variance.isfinite()):
        raise InputError(
            f"data.source: the frozen tokens of {moments.num_samples} pairs have the variance "
            f"{variance.item():g}; expected a positive number. Check the frames and the weights"
        )
    return total_DD + RIDGE * variance * torch.eye(moments.dim, dtype=torch.float64, device=total_DD.device)
