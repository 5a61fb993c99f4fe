"""Draw the frames and the crop of each sample as a pure function of (seed, epoch, sample).

The random numbers come from Philox, a counter-based generator (Salmon et al., SC 2011), with (seed, epoch) as
the key and (sample, attempt) as the counter. A sample therefore does not depend on the order of the samples,
the rank or the number of threads.

Legend: B samples, T frames of a sample (a pair, unless objective.frames is more than 2), n frames in a
video, V videos.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fasttrain.recipe import Recipe

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
# (B,) array of the dtype `parameters_dtype`.
SampleParameters = npt.NDArray[np.void]

# Columns of the random numbers of a sample. All are always drawn, so that each has a fixed position. Frames
# after the second one come last.
_FRAMES, _CROP, _FLIP, _REPLACEMENT, _COUNT = slice(0, 2), slice(2, 6), 6, 7, 8


def parameters_dtype(frames: int) -> np.dtype[np.void]:
    """Return the dtype of the parameters of a sample of T frames."""
    return np.dtype(
        [
            ("sample", np.int64),  # video * pairs_per_video + k
            ("video", np.int64),
            ("frames", np.int64, frames),
            # Top, left, bottom, right on the unit square. All frames share the crop and the flip.
            ("box", np.float64, 4),
            ("flip", np.bool_),  # horizontal
        ]
    )


class PairSampling:
    """The sampling rule of Co-Settle (section 3 of the paper), extended to T frames."""

    def __init__(self, recipe: Recipe) -> None:
        self.data, self.seed, self.frames = recipe.data, recipe.seed, recipe.objective.frames

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
        """Draw the frames, crops and flips of samples (B,) in epochs (B,).

        `num_frames` (V,) are the lengths of all videos. attempt > 0 draws the replacements of
        samples that were unreadable in attempt - 1.
        """
        uniforms = _uniforms(self.seed, epochs, samples, attempt, count=_COUNT + self.frames - 2)
        if attempt:
            samples = _below(uniforms[:, _REPLACEMENT], len(num_frames) * self.data.pairs_per_video)
        drawn = np.empty(len(samples), parameters_dtype(self.frames))
        drawn["sample"] = samples
        drawn["video"] = samples // self.data.pairs_per_video
        of_frames = np.concatenate((uniforms[:, _FRAMES], uniforms[:, _COUNT:]), axis=1)
        drawn["frames"] = draw_frames(num_frames[drawn["video"]], of_frames, gap=self.data.gap)
        drawn["box"] = draw_crop(uniforms[:, _CROP], area=self.data.crop_area, ratio=self.data.crop_ratio)
        drawn["flip"] = uniforms[:, _FLIP] < self.data.flip
        return drawn


def draw_frames(num_frames: npt.ArrayLike, uniforms: npt.ArrayLike, *, gap: float) -> Ints:
    """Draw T zero-based frame numbers (B, T) per video, from uniforms (B, T) in [0, 1).

    `num_frames` (B,) are the lengths n of the videos. With distance = int(gap n), frame 1 is uniform on
    [1, n - (T - 1) distance), as in the published implementation for T = 2, and each other frame is the one
    before plus distance. If n <= 4, or if distance is 0 or more than n - 2, which leaves two frames no
    choice, all frames are drawn independently from all n frames. More than two frames are then sorted, and a
    distance for which they are too many is the largest that fits.
    """
    n = np.asarray(num_frames, dtype=np.int64)
    u = np.asarray(uniforms, dtype=np.float64)
    last = u.shape[1] - 1
    asked = (gap * n).astype(np.int64)
    distance = np.minimum(asked, (n - 2) // last)
    is_independent = (n <= 4) | (distance < 1) | (asked > n - 2)
    independent = _below(u, n[:, None])
    if last > 1:
        independent.sort(axis=1)
    first = 1 + _below(u[:, 0], np.maximum(n - last * distance - 1, 1))
    spaced = first[:, None] + distance[:, None] * np.arange(last + 1)
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


def _uniforms(seed: int, epochs: Ints, samples: Ints, attempt: int, *, count: int) -> Floats:
    """Draw numbers (B, count) that are uniform on [0, 1), one row per (epoch, sample, attempt)."""
    bits = _philox(seed, 0, (0, 0, 0, 0))
    generator = np.random.Generator(bits)
    # Setting the state of a generator is faster than constructing a new one for every sample.
    state = bits.state
    rows = np.empty((len(samples), count))
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
