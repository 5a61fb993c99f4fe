"""Consistency and separability: golden vectors, simple features with known metrics, invalid input."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fasttrain.errors import InputError
from fasttrain.evaluation import consistency_separability
from fasttrain.evaluation.trade_off import measure_video, summarise


def random_features(videos: int = 3, frames: int = 10, patches: int = 16, channels: int = 8) -> torch.Tensor:
    return torch.randn(videos, frames, patches, channels, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("given_patches", [True, False])
def test_equals_golden_vectors(shared: Path, given_patches: bool) -> None:
    golden = np.load(shared / "golden/eval/consistency_separability.npz")
    patches = golden["inter_patch_indices"] if given_patches else None
    metrics = consistency_separability(torch.from_numpy(golden["features"]), patches)
    assert set(metrics) == set(golden.files) - {"features", "inter_patch_indices"}
    for key, value in metrics.items():
        # The order of float32 sums changes the last digit. The published rank was computed in float32, where
        # the last digits of singular values depend on the number of threads; in float64 it is lower by
        # 2.7e-7.
        tolerance = 5e-7 if key == "effective_rank" else 2e-7
        assert value == pytest.approx(float(golden[key]), rel=tolerance), key


def test_identical_features_have_no_distances_and_minimal_rank() -> None:
    # Only one of the four channels is not zero.
    metrics = consistency_separability(torch.eye(4)[0].expand(3, 9, 16, 4))
    assert metrics["inter_normalized_95"] == metrics["intra_normalized_95"] == 0
    assert metrics["effective_rank"] == pytest.approx(1 / 4)


def test_distinct_patches_that_do_not_move() -> None:
    metrics = consistency_separability(10 * torch.eye(16)[None, None].repeat(1, 8, 1, 1))
    assert metrics["cycle_accuracy"] == 1
    assert metrics["intra_original"] == 0


def test_videos_of_different_lengths() -> None:
    videos = [measure_video(random_features(frames=frames)[0]) for frames in (14, 9)]
    assert summarise(videos)["inter_original"] > 0


def test_single_video_has_no_inter_video_distance() -> None:
    metrics = summarise([measure_video(random_features()[0])])
    assert np.isnan(metrics["inter_original"])
    assert metrics["intra_original"] > 0


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 7, 16, 4), "at least 8"), ((2, 9, 15, 4), "square grid")],
)
def test_invalid_shapes(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        consistency_separability(torch.ones(shape))


def test_non_finite_features_give_nan() -> None:
    """They must not raise an error, which would end the training."""
    metrics = consistency_separability(torch.full((2, 9, 16, 4), torch.nan))
    assert all(np.isnan(value) for value in metrics.values())
