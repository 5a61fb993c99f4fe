"""Draw the frame pair and the crop of each sample as a pure function of (seed, epoch, sample).

The random numbers come from Philox, a counter-based generator (Salmon et al., SC 2011), with (seed, epoch) as
the key and (sample, attempt) as the counter. A sample therefore does not depend on the order of the samples,
the rank or the number of threads.

Legend: B samples, n frames in a video, V videos.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fasttrain.recipe import DataRecipe

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
# (B,) array of dtype PARAMETERS.
SampleParameters = npt.NDArray[np.void]

PARAMETERS = np.dtype(
    [
        ("sample", np.int64),  # video * pairs_per_video + k
        ("video", np.int64),
        ("frames", np.int64, 2),
        # Top, left, bottom, right on the unit square. Both frames share the crop and the flip.
        ("box", np.float64, 4),
        ("flip", np.bool_),  # horizontal
    ]
)

# Columns of the random numbers of a sample. All are always drawn, so that each has a fixed position.
_FRAMES, _CROP, _FLIP, _REPLACEMENT, _COUNT = slice(0, 2), slice(2, 6), 6, 7, 8


class PairSampling:
    """The sampling rule of Co-Settle (section 3 of the paper)."""

    def __init__(self, data: DataRecipe, seed: int) -> None:
        self.data, self.seed = data, seed

    def order(self, positions: npt.ArrayLike, num_samples: int) -> tuple[Ints, Ints]:
        """Return the epochs and sample ids at positions (B,) of the training stream.

        The stream is infinite: it concatenates one permutation of all sample ids per epoch.
        """
        epochs, indices = np.divmod(np.asarray(positions, dtype=np.int64), num_samples)
        samples = np.empty_like(epochs)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            samples[in_epoch] = _permutation(self.seed, int(epoch), num_samples)[indices[in_epoch]]
        return epochs, samples

    def draw(self, num_frames: Ints, epochs: Ints, samples: Ints, attempt: int = 0) -> SampleParameters:
        """Draw the frame pairs, crops and flips of samples (B,) in epochs (B,).

        `num_frames` (V,) are the lengths of all videos. attempt > 0 draws the replacements of
        samples that were unreadable in attempt - 1.
        """
        uniforms = _uniforms(self.seed, epochs, samples, attempt)
        if attempt:
            samples = _below(uniforms[:, _REPLACEMENT], len(num_frames) * self.data.pairs_per_video)
        drawn = np.empty(len(samples), PARAMETERS)
        drawn["sample"] = samples
        drawn["video"] = samples // self.data.pairs_per_video
        drawn["frames"] = draw_pair(num_frames[drawn["video"]], uniforms[:, _FRAMES], gap=self.data.gap)
        drawn["box"] = draw_crop(uniforms[:, _CROP], area=self.data.crop_area, ratio=self.data.crop_ratio)
        drawn["flip"] = uniforms[:, _FLIP] < self.data.flip
        return drawn


def draw_pair(num_frames: npt.ArrayLike, uniforms: npt.ArrayLike, *, gap: float) -> Ints:
    """Draw two zero-based frame numbers (B, 2) per video, from uniforms (B, 2) in [0, 1).

    `num_frames` (B,) are the lengths n of the videos. With distance = int(gap n), frame 1 is uniform on
    [1, n - distance), as in the published implementation, and frame 2 = frame 1 + distance. If n <= 4, or if
    distance is 0 or leaves no choice for frame 1, both frames are drawn independently from all n frames.
    """
    n = np.asarray(num_frames, dtype=np.int64)
    u = np.asarray(uniforms, dtype=np.float64)
    distance = (gap * n).astype(np.int64)
    is_independent = (n <= 4) | (distance < 1) | (distance > n - 2)
    independent = _below(u, n[:, None])
    first = 1 + _below(u[:, 0], np.maximum(n - distance - 1, 1))
    spaced = np.stack([first, first + distance], axis=1)
    return np.where(is_independent[:, None], independent, spaced)


def draw_crop(uniforms: npt.ArrayLike, *, area: tuple[float, float], ratio: tuple[float, float]) -> Floats:
    """Draw crop boxes (B, 4), as top, left, bottom, right on the unit square, from uniforms (B, 4) in [0, 1).

    The area is uniform, the aspect ratio (width / height) log-uniform, and the offset uniform. A side that is
    longer than the frame is clipped to it, as in the published implementation (util/video/image_utils.py);
    torchvision draws again instead.
    """
    u = np.asarray(uniforms, dtype=np.float64)
    areas = area[0] + (area[1] - area[0]) * u[:, 0]
    low, high = np.log(ratio)
    ratios = np.exp(low + (high - low) * u[:, 1])
    height, width = np.minimum(np.sqrt(areas / ratios), 1), np.minimum(np.sqrt(areas * ratios), 1)
    top, left = u[:, 2] * (1 - height), u[:, 3] * (1 - width)
    return np.stack([top, left, top + height, left + width], axis=1)


def pixel_box(box: Floats, height: int, width: int) -> tuple[int, int, int, int]:
    """Round a box (4,) on the unit square to pixels (top, left, bottom, right); the result is never empty."""
    top, left = int(box[0] * height + 0.5), int(box[1] * width + 0.5)
    bottom, right = int(box[2] * height + 0.5), int(box[3] * width + 0.5)
    top, left = min(top, height - 1), min(left, width - 1)
    return top, left, min(max(bottom, top + 1), height), min(max(right, left + 1), width)


def evenly_spaced(length: int, count: int) -> list[int]:
    """Return up to `count` distinct integers, evenly spaced from 0 to length - 1 inclusive."""
    return sorted(set(np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()))


def _below(uniforms: Floats, bounds: Ints | int) -> Ints:
    """Convert uniforms in [0, 1) to integers that are uniform on [0, bound)."""
    return (uniforms * bounds).astype(np.int64)


def _uniforms(seed: int, epochs: Ints, samples: Ints, attempt: int) -> Floats:
    """Draw numbers (B, 8) that are uniform on [0, 1), one row per (epoch, sample, attempt)."""
    bits = _philox(seed, 0, (0, 0, 0, 0))
    generator = np.random.Generator(bits)
    # Setting the state of a generator is faster than constructing a new one for every sample.
    state = bits.state
    rows = np.empty((len(samples), _COUNT))
    for row, epoch, sample in zip(rows, epochs, samples, strict=True):
        state["state"]["key"][1] = epoch
        state["state"]["counter"][:] = (0, sample, attempt, 0)
        bits.state = state
        generator.random(out=row)
    return rows


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_samples: int) -> Ints:
    # The last counter word separates this random stream from those of the samples.
    order = np.random.Generator(_philox(seed, epoch, (0, 0, 0, 1))).permutation(num_samples)
    order.flags.writeable = False
    return order


def _philox(seed: int, epoch: int, counter: tuple[int, int, int, int]) -> np.random.Philox:
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array(counter, dtype=np.uint64))
