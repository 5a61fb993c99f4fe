"""The paper's analysis: its published numbers, and what its definitions say of simple features."""

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
def test_published_numbers(shared: Path, given_patches: bool) -> None:
    golden = np.load(shared / "golden/eval/consistency_separability.npz")
    patches = golden["inter_patch_indices"] if given_patches else None
    found = consistency_separability(torch.from_numpy(golden["features"]), patches)
    assert set(found) == set(golden.files) - {"features", "inter_patch_indices"}
    for key, value in found.items():
        # float32 sums in another order: an ulp. The rank rests on singular values, whose last digits follow
        # the number of threads; in float64 it is 2.7e-7 below the published number.
        tolerance = 5e-7 if key == "effective_rank" else 2e-7
        assert value == pytest.approx(float(golden[key]), rel=tolerance), key


def test_features_that_are_all_alike_lie_at_no_distance() -> None:
    """In one channel alone, so that the other singular values are zero."""
    found = consistency_separability(torch.eye(4)[0].expand(3, 9, 16, 4))
    assert found["inter_normalized_95"] == found["intra_normalized_95"] == 0
    assert found["effective_rank"] == pytest.approx(1 / 4)


def test_distinct_patches_that_stand_still() -> None:
    found = consistency_separability(10 * torch.eye(16)[None, None].repeat(1, 8, 1, 1))
    assert found["cycle_accuracy"] == 1
    assert found["intra_original"] == 0


def test_videos_of_different_lengths_and_one_alone() -> None:
    videos = [measure_video(random_features(frames=frames)[0]) for frames in (14, 9)]
    assert summarise(videos)["inter_original"] > 0
    found = summarise(videos[:1])
    assert np.isnan(found["inter_original"])
    assert found["intra_original"] > 0


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 7, 16, 4), "at least 8"), ((2, 9, 15, 4), "square grid")],
)
def test_bad_input(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        consistency_separability(torch.ones(shape))


def test_features_that_are_not_finite_say_nothing() -> None:
    """A validation during training has them to survive."""
    found = consistency_separability(torch.full((2, 9, 16, 4), torch.nan))
    assert all(np.isnan(value) for value in found.values())
