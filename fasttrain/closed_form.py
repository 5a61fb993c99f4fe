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

import torch
from torch import Tensor

from fasttrain.errors import InputError
from fasttrain.moments import TokenMoments
from fasttrain.projection import Projection

# Variance that is added in every direction, relative to the mean variance. Directions in which the tokens do
# not vary then stay as they are, and the equations have a solution.
RIDGE = 1e-9


class ClosedForm:
    """The closed form of some moments for every strength, and its relatives.

    Args:
        moments: The moments of the frozen tokens.

    Attributes:
        reliability_D: The correlations 1 - rho of matched tokens in the closed form's directions, descending.
            A negative value means that matched tokens differ more than any two tokens do.

    Raises:
        InputError: The tokens do not vary, or are not finite.
    """

    def __init__(self, moments: TokenMoments) -> None:
        variance = moments.total_DD.diagonal().mean()
        if not (variance > 0 and variance.isfinite()):
            raise InputError(
                f"data.source: the frozen tokens of {moments.num_samples} pairs have the variance "
                f"{variance.item():g}; expected a positive number. Check the frames and the weights"
            )
        values_D, self._vectors_DD = torch.linalg.eigh(moments.total_DD)
        self._values_D = values_D.clamp_min(0) + RIDGE * variance
        self._inverse_DD = self._total_to(-0.5)
        # In whitened coordinates, T is the identity, and the eigenvectors of N are orthogonal.
        rho_D, self._directions_DD = torch.linalg.eigh(self._inverse_DD @ moments.noise_DD @ self._inverse_DD)
        self.reliability_D = 1 - rho_D

    def _total_to(self, power: float) -> Tensor:
        """Return the symmetric power of T."""
        return self._vectors_DD * self._values_D**power @ self._vectors_DD.T

    def solve(
        self, strength: float, *, whitening: float = 0.0, rank: int | None = None, identity: float = 0.0
    ) -> Tensor:
        """Return the matrix W (D, D).

        Args:
            strength: The weight mu > 0 of separability. Infinity gives the gain 1 to all directions.
            whitening: 0: the minimum above. 1: the tokens are also whitened, with the same gains; values in
                between whiten partly.
            rank: Number of the most reliable directions to keep. None: all.
            identity: The weight of the identity in a mixture with these gains.
        """
        gain_D = 1 / (1 + (1 - self.reliability_D).clamp_min(0) / strength)
        if rank is not None:
            gain_D[rank:] = 0
        gain_D = identity + (1 - identity) * gain_D
        filter_DD = self._directions_DD * gain_D @ self._directions_DD.T
        return self._total_to((1 - whitening) / 2) @ filter_DD @ self._inverse_DD


def solve(moments: TokenMoments, strength: float) -> Tensor:
    """Return the matrix W (D, D) of the closed form for one strength, in float64 (see `ClosedForm`)."""
    return ClosedForm(moments).solve(strength)


def linear_projection(moments: TokenMoments, weight_DD: Tensor) -> Projection:
    """Return the projection of a matrix W: W (z - mean), scaled, and tanh, which is nearly linear there."""
    variance = (weight_DD @ moments.total_DD * weight_DD).sum() / moments.dim
    return Projection.from_affine(weight_DD, -weight_DD @ moments.mean_D, variance.sqrt().item())
