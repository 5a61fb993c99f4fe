"""Shape suffixes: B pairs, N tokens per frame, M rows, D channels."""

import numpy as np
import pytest
import torch
from synthetic import OneOfTwo
from torch import Tensor

from fasttrain.moments import TokenMoments, mutual_nearest


@pytest.fixture(scope="module")
def tokens_B2ND() -> Tensor:
    """Tokens far from zero, so that sums of squares would cancel; second frames are shuffled and noisy."""
    generator = torch.Generator().manual_seed(0)
    first_BND = torch.randn(40, 9, 6, generator=generator, dtype=torch.float64)
    first_BND += torch.randn(40, 1, 6, generator=generator) * 2
    second_BND = first_BND[:, torch.randperm(9, generator=generator)]
    second_BND = second_BND + 0.2 * torch.randn(second_BND.shape, generator=generator)
    return torch.stack((first_BND, second_BND), 1) + 1000


def two_pass(tokens_B2ND: Tensor) -> dict[str, np.ndarray]:
    """Compute the same moments from all tokens at once with NumPy."""
    tokens = tokens_B2ND.numpy()

    def covariance(rows: np.ndarray) -> np.ndarray:
        return np.cov(rows, rowvar=False, bias=True)

    rows = tokens.reshape(-1, tokens.shape[-1])
    frames = tokens.mean(2)
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    differences = []
    for pair, unit_pair in zip(tokens, unit, strict=True):
        similarity = unit_pair[0] @ unit_pair[1].T
        for i, j in enumerate(similarity.argmax(1)):
            if similarity[:, j].argmax() == i:
                differences.append(pair[0, i] - pair[1, j])
    return {
        "mean_D": rows.mean(0),
        "total_DD": covariance(rows),
        "noise_DD": np.array(differences).T @ np.array(differences) / 2 / len(differences),
        "frame_DD": covariance(frames.reshape(-1, rows.shape[1])),
        "within_frame_DD": covariance(rows) - covariance(frames.reshape(-1, rows.shape[1])),
    }


def check(moments: TokenMoments, tokens_B2ND: Tensor) -> None:
    for name, expected in two_pass(tokens_B2ND).items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(getattr(moments, name).numpy(), expected, rtol=0, atol=1e-12 * scale)
    assert (moments.num_samples, moments.num_tokens) == (40, 40 * 2 * 9)


@pytest.mark.parametrize("sizes", [[40], [1, 39], [17, 0, 3, 20]])
def test_equal_the_computation_in_two_passes_in_any_split_and_order(
    tokens_B2ND: Tensor, sizes: list[int]
) -> None:
    moments = TokenMoments(6)
    for batch_B2ND in tokens_B2ND.flip(0).split(sizes):
        moments.add(batch_B2ND)
    check(moments, tokens_B2ND)


def test_merging_and_ranks_give_the_same(tokens_B2ND: Tensor) -> None:
    halves = [TokenMoments(6), TokenMoments(6)]
    for half, batch_B2ND in zip(halves, tokens_B2ND.split([25, 15]), strict=True):
        half.add(batch_B2ND)
    check(halves[0].of_all_ranks(OneOfTwo(halves[1])), tokens_B2ND)
    halves[1].merge(halves[0])
    halves[1].merge(TokenMoments(6))
    check(halves[1], tokens_B2ND)


def test_without_pairs_all_moments_are_zero() -> None:
    moments = TokenMoments(3)
    assert moments.num_matches == moments.num_samples == moments.total_DD.count_nonzero() == 0
    assert moments.noise_DD.count_nonzero() == 0


def test_only_mutual_nearest_neighbours_match() -> None:
    # By angle: the first two tokens of frame 1 are both nearest to token 1 of frame 2, which prefers the
    # second of them.
    first_ND, second_ND = (
        torch.stack((torch.tensor(angles).cos(), torch.tensor(angles).sin()), -1)
        for angles in ([0.0, 0.1, 1.5], [1.4, 0.2, 3.0])
    )
    nearest_BN, is_mutual_BN = mutual_nearest(5 * first_ND[None], second_ND[None])
    assert nearest_BN.tolist() == [[1, 1, 0]]
    assert is_mutual_BN.tolist() == [[False, True, True]]
