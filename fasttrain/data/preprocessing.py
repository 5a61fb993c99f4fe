"""Prepare whole frames for an encoder: read them in order, resize, crop and normalise them.

Training has stages of its own (`dali.py`, `torch_stage.py`), which read frame pairs and crop at random.

Shape suffixes: T frames, H W pixels, C colours, S side of a crop.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from fasttrain.data.images import Frame, UnreadableFrameError
from fasttrain.data.index import FrameIndex, VideoIndex
from fasttrain.data.sources import open_source
from fasttrain.data.video import stream_video_frames
from fasttrain.errors import InputError
from fasttrain.normalization import Triple


def stream_frames(index: FrameIndex, video: int, frames: Sequence[int]) -> Iterator[Frame]:
    """Read frames (H, W, 3) uint8 RGB of a video in ascending order. Raises UnreadableFrameError."""
    if isinstance(index, VideoIndex):
        # `read_frame` would open the file for every frame.
        return stream_video_frames(index.videos[video], frames)
    return (index.read_frame(video, frame) for frame in frames)


def read_resized(path: str | Path, frames: slice, size: int | Sequence[int], patch: int) -> Tensor:
    """Read the selected frames of the only video of a source and resize them: (T, 3, height, width) uint8.

    Raises InputError if the source has no video or several, or if a frame cannot be read.
    """
    index = open_source(path)
    if len(index) != 1:
        raise InputError(
            f"{str(path)!r} contains {len(index)} videos (first: {index.names[0]}); pass the path of one, or "
            "run `fasttrain embed` to encode all"
        )
    numbers = sorted(range(int(index.num_frames[0]))[frames])
    try:
        return resize_all(stream_frames(index, 0, numbers), size, patch)
    except UnreadableFrameError as error:
        raise InputError(f"{str(path)!r}: frame {error.frame} is unreadable ({error})") from error


def resize_all(frames: Iterator[Frame], size: int | Sequence[int], patch: int) -> Tensor:
    """Resize frames to the size that `encoded_size` gives for the first one: (T, 3, height, width) uint8."""
    first = next(frames, None)
    if first is None:
        raise InputError("no frame is selected; pass a video with frames, and a slice that selects some")
    target = encoded_size(first.shape[:2], size, patch)
    return torch.stack([resize(frame, target) for frame in chain([first], frames)])


def channels_last(frames: npt.NDArray[Any] | Tensor) -> Frame:
    """Return uint8 RGB frames (..., T, H, W, 3) of an array that has the channels last or before H and W.

    Raises InputError if the array has another dtype or shape.
    """
    array = frames.numpy(force=True) if isinstance(frames, Tensor) else np.asarray(frames)
    if array.ndim in (4, 5) and array.shape[-1] != 3 and array.shape[-3] == 3:
        array = np.moveaxis(array, -3, -1)
    if array.dtype != np.uint8 or array.ndim not in (4, 5) or array.shape[-1] != 3 or 0 in array.shape:
        raise InputError(
            f"frames have dtype {array.dtype} and shape {tuple(np.shape(frames))}; expected uint8 RGB, "
            "(T, H, W, 3) or (T, 3, H, W), or the same with a batch dimension before T"
        )
    return array


def fit_to_patches(size: tuple[float, float], patch: int) -> tuple[int, int]:
    """Round height and width to the nearest multiples of the patch size."""
    height, width = (max(patch, round(side / patch) * patch) for side in size)
    return height, width


def encoded_size(frame: tuple[int, int], size: int | Sequence[int], patch: int) -> tuple[int, int]:
    """Return height and width, in multiples of the patch size, to which a whole frame is resized.

    `frame` is its height and width; `size` is the short side, which keeps the aspect ratio, or both sides.
    Raises InputError if `size` has other values.
    """
    sides = (size,) if isinstance(size, int) else tuple(size)
    if min(sides) < 1 or len(sides) > 2:
        raise InputError(f"size {size}: expected the short side in pixels, or height and width")
    if not isinstance(size, int):
        height, width = size
        return fit_to_patches((height, width), patch)
    scale = size / min(frame)
    return fit_to_patches((frame[0] * scale, frame[1] * scale), patch)


def resize(frame_HWC: Frame, size: tuple[int, int]) -> Tensor:
    """Resize a frame (bilinear, antialiased): (3, height, width) uint8."""
    frame_13HW = torch.from_numpy(np.array(frame_HWC)).permute(2, 0, 1)[None]
    return functional.interpolate(frame_13HW, size=size, mode="bilinear", antialias=True)[0]


def centre_crop(frame_HWC: Frame, side: int, mean: Triple, std: Triple) -> Tensor:
    """Resize the short side to 8/7 S (256 for 224), crop the centre and normalise: (3, S, S) float32."""
    height, width = frame_HWC.shape[:2]
    scale = round(side * 8 / 7) / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return normalise(resize(frame_HWC, size)[:, top : top + side, left : left + side], mean, std)


def normalise(frames_3HW: Tensor, mean: Triple, std: Triple) -> Tensor:
    """Normalise uint8 RGB (..., 3, H, W) with the mean and std of an encoder, as float32."""
    mean_311, std_311 = (
        torch.tensor(values, device=frames_3HW.device).view(3, 1, 1) for values in (mean, std)
    )
    return (frames_3HW.float() / 255 - mean_311) / std_311
