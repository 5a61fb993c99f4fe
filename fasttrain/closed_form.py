"""The projection in closed form: the minimum of a quadratic version of the paper's objective.

With z the centred frozen tokens and these covariances (see `moments`): T of all tokens, W within frames,
F = T - W of the means of frames, and N of the differences of matched tokens,

    noise       ->  tr(A (N + F) A^T)
    signal      ->  tr((A - I) W (A - I)^T)
    A = argmin tr(A (N + F) A^T) + mu tr((A - I) W (A - I)^T) = W (W + (N + F) / mu)^-1

In the cycle loss, all candidates are tokens of one frame. What these share (F) cannot tell them apart, and
what matched tokens do not share (N) misleads. Both are noise, and W is the signal. F also carries what
separates videos, so that the strength mu trades it for consistency within videos, as in the paper.

T^-p A also whitens the tokens partly. This stands for what the quadratic version leaves out: the denominator
of the softmax rewards variance in every direction, so that few directions do not dominate the cosine. The
derivation is in docs/theory.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttrain.errors import InputError
from fasttrain.moments import Covariance, TokenMoments
from fasttrain.projection import Projection

# Variance that is added within frames in every direction, relative to the mean variance. Directions in which
# the tokens do not vary then keep their gain of 1, and all powers exist.
RIDGE = 1e-9


class ClosedForm:
    """The closed form of some moments for every strength and whitening.

    Args:
        moments: The moments of the frozen tokens.

    Attributes:
        reliability_D: The shares 1 / (1 + rho) of the signal, from 0 to 1 and descending, in the directions v
            of the closed form, (N + F) v = rho W v.

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
        ridge_DD = RIDGE * variance * torch.eye(moments.dim, dtype=torch.float64)
        values_D, vectors_DD = torch.linalg.eigh(moments.total_DD + ridge_DD)
        self._values_D, self._vectors_DD = values_D, vectors_DD
        signal_DD = moments.within_frame_DD + ridge_DD
        values_D, vectors_DD = torch.linalg.eigh(signal_DD + moments.noise_DD + moments.frame_DD)
        self._root_DD = _power(values_D, vectors_DD, 0.5)
        self._inverse_DD = _power(values_D, vectors_DD, -0.5)
        # In these coordinates, signal plus noise is the identity, and the eigenvectors are orthogonal.
        share_D, directions_DD = torch.linalg.eigh(self._inverse_DD @ signal_DD @ self._inverse_DD)
        self.reliability_D = share_D.flip(0).clamp(torch.finfo(torch.float64).eps, 1)
        self._directions_DD = directions_DD.flip(1)

    def solve(self, strength: float, *, whitening: float = 0.0) -> Tensor:
        """Return the matrix T^-p A (D, D).

        Args:
            strength: The strength mu > 0 with which the signal is kept. Infinity: A is the identity.
            whitening: The power p. 1/2 whitens fully, and amplifies directions of little variance.
        """
        gain_D = 1 / (1 + (1 / self.reliability_D - 1) / strength)
        filter_DD = self._directions_DD * gain_D @ self._directions_DD.T
        whitening_DD = _power(self._values_D, self._vectors_DD, -whitening)
        return whitening_DD @ self._root_DD @ filter_DD @ self._inverse_DD


def _power(values_D: Tensor, vectors_DD: Tensor, power: float) -> Tensor:
    """Return the symmetric power of a positive matrix, given its eigenvalues and eigenvectors."""
    return vectors_DD * values_D**power @ vectors_DD.T


def partly_whitened(tokens: Covariance, power: float) -> Projection:
    """Return the map T^-p (z - mean) of tokens z as a projection; p = 0 removes only their mean."""
    total_DD = tokens.covariance_DD
    ridge_DD = RIDGE * total_DD.diagonal().mean() * torch.eye(len(total_DD), dtype=torch.float64)
    values_D, vectors_DD = torch.linalg.eigh(total_DD + ridge_DD)
    matrix_DD = _power(values_D, vectors_DD, -power)
    return _projection(matrix_DD, tokens.mean_D, total_DD)


def linear_projection(moments: TokenMoments, matrix_DD: Tensor) -> Projection:
    """Return the map A (z - mean) of tokens z as a projection, given the matrix A."""
    return _projection(matrix_DD, moments.mean_D, moments.total_DD)


def _projection(matrix_DD: Tensor, mean_D: Tensor, total_DD: Tensor) -> Projection:
    variance = (matrix_DD @ total_DD * matrix_DD).sum() / len(total_DD)
    return Projection.from_affine(matrix_DD, -matrix_DD @ mean_D, variance.sqrt().item())
