"""The normalisation of frames, and the size to which whole frames are resized."""

import numpy as np
import pytest
import torch

from fasttrain.data.preprocessing import centre_crop, encoded_size, normalise, resize


def test_frames_are_normalised_with_the_given_mean_and_std() -> None:
    frame_HWC = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    mean, std = (0.5, 0.4, 0.6), (0.5, 0.25, 0.3)
    expected = (frame_HWC / 255 - mean) / std
    normalised = normalise(torch.from_numpy(frame_HWC).movedim(-1, 0), mean, std)
    np.testing.assert_allclose(normalised.movedim(0, -1), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(normalise(resize(frame_HWC, (80, 90)), mean, std), normalised)
    np.testing.assert_allclose(centre_crop(frame_HWC, 70, mean, std), normalised[:, 5:75, 10:80])


@pytest.mark.parametrize(
    ("frame", "size", "expected"),
    [
        ((180, 320), 224, (224, 400)),
        ((1920, 1080), 224, (400, 224)),
        ((5, 4000), 16, (16, 12800)),
        ((180, 320), (100, 90), (96, 96)),
        ((180, 320), 3, (16, 16)),
    ],
)
def test_whole_frames_are_resized_to_multiples_of_the_patch_size(
    frame: tuple[int, int], size: int | tuple[int, int], expected: tuple[int, int]
) -> None:
    assert encoded_size(frame, size, 16) == expected
