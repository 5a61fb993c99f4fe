"""Which pair of frames and which crop a sample is: pure functions of (seed, epoch, sample).

The random numbers come from Philox, a counter-based generator (Salmon et al., SC 2011), with the key (seed,
epoch) and the counter (sample, attempt). So a sample does not depend on the order, the rank, the number of
threads or earlier samples.

Legend: B samples, n frames of a video, V videos.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fasttrain.recipe import DataRecipe

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
# (B,) of PARAMETERS.
SampleParameters = npt.NDArray[np.void]

PARAMETERS = np.dtype(
    [
        ("sample", np.int64),  # video * pairs_per_video + k
        ("video", np.int64),
        ("frames", np.int64, 2),
        # Both frames share the crop and the flip. Top, left, bottom, right on the unit square.
        ("box", np.float64, 4),
        ("flip", np.bool_),  # mirror left and right
    ]
)

# A sample's random numbers; all are drawn, used or not, so that none depends on another's outcome.
_FRAMES, _CROP, _FLIP, _SUBSTITUTE, _COUNT = slice(0, 2), slice(2, 6), 6, 7, 8


class PairSampling:
    """How samples are drawn (Co-Settle, section 3)."""

    def __init__(self, data: DataRecipe, seed: int) -> None:
        self.data, self.seed = data, seed

    def order(self, positions: npt.ArrayLike, num_samples: int) -> tuple[Ints, Ints]:
        """Epoch and sample id at positions (B,) of the endless training stream.

        The stream is the concatenation of every epoch's permutation of the sample ids.
        """
        epochs, indices = np.divmod(np.asarray(positions, dtype=np.int64), num_samples)
        samples = np.empty_like(epochs)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = _permutation(self.seed, int(epoch), num_samples)[indices[here]]
        return epochs, samples

    def draw(self, num_frames: Ints, epochs: Ints, samples: Ints, attempt: int = 0) -> SampleParameters:
        """Pairs, crops and flips of samples (B,) in epochs (B,), given the frames (V,) of every video.

        attempt > 0 draws the sample that stands in when attempt - 1 could not be read.
        """
        uniforms = _uniforms(self.seed, epochs, samples, attempt)
        if attempt:
            samples = _below(uniforms[:, _SUBSTITUTE], len(num_frames) * self.data.pairs_per_video)
        drawn = np.empty(len(samples), PARAMETERS)
        drawn["sample"] = samples
        drawn["video"] = samples // self.data.pairs_per_video
        drawn["frames"] = draw_pair(num_frames[drawn["video"]], uniforms[:, _FRAMES], gap=self.data.gap)
        drawn["box"] = draw_crop(uniforms[:, _CROP], area=self.data.crop_area, ratio=self.data.crop_ratio)
        drawn["flip"] = uniforms[:, _FLIP] < self.data.flip
        return drawn


def draw_pair(num_frames: npt.ArrayLike, uniforms: npt.ArrayLike, *, gap: float) -> Ints:
    """Two frame numbers (B, 2), 0-based, of videos with num_frames (B,), from uniforms (B, 2) in [0, 1).

    With distance = int(gap n): frame 1 is uniform on [1, n - distance), as in the published code, and frame 2
    = frame 1 + distance. Where n <= 4 or distance < 1, the two are drawn independently from all n frames.
    """
    n = np.asarray(num_frames, dtype=np.int64)
    u = np.asarray(uniforms, dtype=np.float64)
    distance = (gap * n).astype(np.int64)
    # A distance of n - 1 or more leaves no room for frame 1.
    independent = (n <= 4) | (distance < 1) | (distance > n - 2)
    either = _below(u, n[:, None])
    first = 1 + _below(u[:, 0], np.maximum(n - distance - 1, 1))
    spaced = np.stack([first, first + distance], axis=1)
    return np.where(independent[:, None], either, spaced)


def draw_crop(uniforms: npt.ArrayLike, *, area: tuple[float, float], ratio: tuple[float, float]) -> Floats:
    """Boxes (B, 4) top, left, bottom, right on the unit square, from uniforms (B, 4) in [0, 1).

    One draw of area and log-uniform ratio (width / height), each side cut to the frame, at a uniform offset:
    the rule of the published code (util/video/image_utils.py); torchvision draws again instead of cutting.
    """
    u = np.asarray(uniforms, dtype=np.float64)
    areas = area[0] + (area[1] - area[0]) * u[:, 0]
    low, high = np.log(ratio)
    ratios = np.exp(low + (high - low) * u[:, 1])
    height, width = np.minimum(np.sqrt(areas / ratios), 1), np.minimum(np.sqrt(areas * ratios), 1)
    top, left = u[:, 2] * (1 - height), u[:, 3] * (1 - width)
    return np.stack([top, left, top + height, left + width], axis=1)


def pixel_box(box: Floats, height: int, width: int) -> tuple[int, int, int, int]:
    """A box (4,) on the unit square -> top, left, bottom, right in whole pixels of a frame, never empty."""
    top, left = int(box[0] * height + 0.5), int(box[1] * width + 0.5)
    bottom, right = int(box[2] * height + 0.5), int(box[3] * width + 0.5)
    top, left = min(top, height - 1), min(left, width - 1)
    return top, left, min(max(bottom, top + 1), height), min(max(right, left + 1), width)


def evenly_spaced(length: int, count: int) -> list[int]:
    """At most `count` different numbers, evenly spaced over 0..length-1, both ends among them."""
    return sorted(set(np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()))


def _below(uniforms: Floats, bounds: Ints | int) -> Ints:
    """Integers uniform on [0, bound), from uniforms in [0, 1)."""
    return (uniforms * bounds).astype(np.int64)


def _uniforms(seed: int, epochs: Ints, samples: Ints, attempt: int) -> Floats:
    """(B, 8) numbers uniform on [0, 1), a row for every (epoch, sample, attempt)."""
    bits = _philox(seed, 0, (0, 0, 0, 0))
    generator = np.random.Generator(bits)
    # Setting the state of one generator is three times faster than making one for each sample.
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
    # The last word of the counter keeps this stream apart from those of the samples.
    order = np.random.Generator(_philox(seed, epoch, (0, 0, 0, 1))).permutation(num_samples)
    order.flags.writeable = False
    return order


def _philox(seed: int, epoch: int, counter: tuple[int, int, int, int]) -> np.random.Philox:
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array(counter, dtype=np.uint64))
