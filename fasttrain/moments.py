"""Means and covariances of the tokens of frame pairs, gathered in one pass.

Everything is float64. Each batch is centred by its own mean, and batches are combined by the formula of Chan,
Golub and LeVeque (Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979). So the
result is that of a computation in two passes, whatever the order of the pairs and their division among
processes. `closed_form` derives a projection from these moments.

Shape suffixes: B pairs, N tokens per frame, M rows, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fasttrain.distributed import World

# Number of pairs to add at a time, which limits memory.
CHUNK = 16


class Covariance:
    """The number, mean and covariance of rows (M, D) that are added in batches.

    Attributes:
        count: Number of rows so far.
        mean_D: Their mean.
        scatter_DD: The sum of the outer products of the centred rows.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean_D = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter_DD = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @property
    def covariance_DD(self) -> Tensor:
        """The covariance, divided by the number of rows; zero without rows."""
        return self.scatter_DD / max(1, self.count)

    def add(self, rows_MD: Tensor) -> None:
        if len(rows_MD):
            mean_D = rows_MD.mean(0)
            centred_MD = rows_MD - mean_D
            self._combine(len(rows_MD), mean_D, centred_MD.T @ centred_MD)

    def merge(self, other: Covariance) -> None:
        if other.count:
            device = self.mean_D.device
            self._combine(other.count, other.mean_D.to(device), other.scatter_DD.to(device))

    def _combine(self, count: int, mean_D: Tensor, scatter_DD: Tensor) -> None:
        total = self.count + count
        shift_D = mean_D - self.mean_D
        self.mean_D = self.mean_D + shift_D * (count / total)
        outer_DD = torch.outer(shift_D, shift_D) * (self.count * count / total)
        self.scatter_DD = self.scatter_DD + scatter_DD + outer_DD
        self.count = total


class TokenMoments:
    """The moments of the frozen tokens of frame pairs that decide what a linear projection can do.

    Covariances are divided by the number of rows.

    Args:
        dim: Number of channels D.
        device: Device of the moments. Tokens are moved to it.

    Attributes:
        num_samples: Number of pairs so far.
        num_matches: Number of their matched tokens.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.dim, self.device = dim, torch.device(device)
        self._tokens = Covariance(dim, device)
        self._frames = Covariance(dim, device)
        self.num_samples = self.num_matches = 0
        self._noise_DD = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, tokens_B2ND: Tensor, match_by_B2ND: Tensor | None = None) -> None:
        """Add the tokens of both frames of B pairs, of any floating-point dtype.

        Tokens match if those of `match_by_B2ND` do, which are by default the same tokens.
        """
        if match_by_B2ND is None:
            match_by_B2ND = tokens_B2ND
        for chunks in zip(tokens_B2ND.split(CHUNK), match_by_B2ND.split(CHUNK), strict=True):
            self._add(*(chunk_B2ND.to(self.device, torch.float64) for chunk_B2ND in chunks))

    def _add(self, tokens_B2ND: Tensor, match_by_B2ND: Tensor) -> None:
        self._tokens.add(tokens_B2ND.flatten(0, 2))
        frames_B2D = tokens_B2ND.mean(2)
        self._frames.add(frames_B2D.flatten(0, 1))
        self.num_samples += len(frames_B2D)
        first_BND, second_BND = tokens_B2ND.unbind(1)
        nearest_BN, is_mutual_BN = mutual_nearest(*match_by_B2ND.unbind(1))
        partner_BND = second_BND.gather(1, nearest_BN[..., None].expand_as(second_BND))
        difference_MD = (first_BND - partner_BND)[is_mutual_BN]
        self._noise_DD = self._noise_DD + difference_MD.T @ difference_MD / 2
        self.num_matches += len(difference_MD)

    def merge(self, other: TokenMoments) -> None:
        """Add the moments of other pairs."""
        self._tokens.merge(other._tokens)
        self._frames.merge(other._frames)
        self._noise_DD = self._noise_DD + other._noise_DD.to(self.device)
        self.num_samples += other.num_samples
        self.num_matches += other.num_matches

    def of_all_ranks(self, world: World) -> TokenMoments:
        """Return the moments of the pairs of all ranks, the same on each, on the CPU."""
        own = TokenMoments(self.dim)
        own.merge(self)
        merged = TokenMoments(self.dim)
        for share in world.gather(own):
            merged.merge(share)
        return merged

    @property
    def num_tokens(self) -> int:
        return self._tokens.count

    @property
    def mean_D(self) -> Tensor:
        """The mean of all tokens."""
        return self._tokens.mean_D

    @property
    def total_DD(self) -> Tensor:
        """The covariance T of all tokens."""
        return self._tokens.covariance_DD

    @property
    def noise_DD(self) -> Tensor:
        """Half the mean of (z1 - z2)(z1 - z2)^T over matched tokens z1, z2 of two frames: N.

        With z = signal + noise, where a match shares the signal and the noise is independent, N is the
        covariance of the noise.
        """
        return self._noise_DD / max(1, self.num_matches)

    @property
    def within_frame_DD(self) -> Tensor:
        """The mean over frames of the covariance of their tokens: W."""
        return self.total_DD - self.frame_DD

    @property
    def frame_DD(self) -> Tensor:
        """The covariance of the mean tokens of frames: F = T - W."""
        return self._frames.covariance_DD


def mutual_nearest(first_BND: Tensor, second_BND: Tensor) -> tuple[Tensor, Tensor]:
    """Match the tokens of two frames by cosine similarity.

    Returns:
        The token (B, N) of the second frame that is nearest to each token of the first frame, and whether
        the latter is also nearest to the former.
    """
    first_BND, second_BND = functional.normalize(first_BND, dim=-1), functional.normalize(second_BND, dim=-1)
    similarity_BNN = first_BND @ second_BND.mT
    forth_BN, back_BN = similarity_BNN.argmax(2), similarity_BNN.argmax(1)
    own_N = torch.arange(forth_BN.shape[1], device=forth_BN.device)
    return forth_BN, back_BN.gather(1, forth_BN) == own_N
