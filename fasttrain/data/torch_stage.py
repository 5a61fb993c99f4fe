"""Decode frames with Pillow and transform them with PyTorch. Training uses this where DALI is missing.

The stages have the interface of those in dali.py, except that a batch can be collected at any time:

    submit(pairs, parameters)  ->  collect() -> (T, B, 3, S, S)

Threads decode all submitted batches in order. On a CPU (`TorchHostStage`), they also crop, resize and
normalise each frame, with the same result as dali.HostStage. For a GPU (`TorchGpuStage`), one more thread
sends the frames to the GPU, which transforms them on a stream of its own, as dali.GpuStage does.

Legend: B samples of T frames, F frames, H x W pixels of a frame or of the largest crop, S x S pixels of a
resized crop, L pixels of the longest side, Y = 3 S rows of all colours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fasttrain.data.images import Frame, UnreadableFrameError, decode_image
from fasttrain.data.index import StoredFrames
from fasttrain.data.sampling import SampleParameters, pixel_box
from fasttrain.normalization import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.recipe import Recipe

# Number of frames that the GPU transforms at once. In float32, frames of 1080p take 800 MB.
GPU_FRAMES = 32


class TorchHostStage:
    """Decode, crop, resize and normalise each frame in a thread."""

    def __init__(self, recipe: Recipe, *, num_threads: int) -> None:
        self._size = recipe.data.image_size
        self._transform = FrameTransform()
        # The pool processes frames in parallel, so PyTorch must not use threads within a frame.
        self._pool = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,))
        self._pending: deque[tuple[list[Future[None]], Tensor]] = deque()

    def submit(self, pairs: Sequence[StoredFrames], parameters: SampleParameters) -> None:
        """Start processing a batch: the stored frames of B samples."""
        count = num_frames(parameters)
        out = torch.empty(count, len(parameters), 3, self._size, self._size)
        frames = zip(frame_by_frame(pairs), np.tile(parameters, count), out.flatten(0, 1), strict=True)
        self._pending.append(([self._pool.submit(self._process, *frame) for frame in frames], out))

    def collect(self) -> Tensor:
        """Return the oldest batch, (T, B, 3, S, S). Raises RuntimeError if a frame cannot be decoded."""
        frames, out = self._pending.popleft()
        for frame in frames:
            frame.result()
        return out

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _process(self, stored: npt.NDArray[np.uint8], parameters: np.void, out_3SS: Tensor) -> None:
        self._transform(_decode(stored), parameters, out_3SS)


class FrameTransform:
    """Crop, resize, flip and normalise a frame on the CPU."""

    def __init__(self) -> None:
        self._offset, self._scale = _normalisation()

    def __call__(self, frame_HW3: Frame, parameters: np.void, out_3SS: Tensor) -> None:
        """Write the result to `out_3SS`."""
        top, left, bottom, right = pixel_box(parameters["box"], *frame_HW3.shape[:2])
        # Copied, because a frame may be read-only, and slices of it are not contiguous.
        crop_HW3 = torch.from_numpy(np.array(frame_HW3[top:bottom, left:right]))
        # The uint8 kernel agrees with Pillow and is faster.
        crop_13SS = torch.nn.functional.interpolate(
            crop_HW3.permute(2, 0, 1)[None], size=out_3SS.shape[1:], mode="bicubic", antialias=True
        )
        crop_3SS = crop_13SS[0].flip(-1) if parameters["flip"] else crop_13SS[0]
        torch.addcmul(self._offset, crop_3SS, self._scale, out=out_3SS)


class TorchGpuStage:
    """Decode in threads; crop, resize, flip and normalise on the GPU. For tests, it also runs on a CPU."""

    def __init__(self, recipe: Recipe, device: torch.device, *, num_threads: int) -> None:
        self._size, self._device, self._dtype = recipe.data.image_size, device, recipe.train.dtype
        self._offset, self._scale = (values.to(device) for values in _normalisation())
        self._decoders = ThreadPoolExecutor(num_threads)
        # A new thread would use the first GPU.
        self._sender = ThreadPoolExecutor(1, initializer=self._use_device)
        self._pending: deque[Future[tuple[Tensor, torch.cuda.Event | None]]] = deque()
        # The work of later batches must not queue behind the training steps on their stream.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _use_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def submit(self, pairs: Sequence[StoredFrames], parameters: SampleParameters) -> None:
        """Start processing a batch: the stored frames of B samples."""
        frames = [self._decoders.submit(_decode, stored) for stored in frame_by_frame(pairs)]
        self._pending.append(self._sender.submit(self._send, frames, parameters))

    def collect(self) -> Tensor:
        """Return the oldest batch, (T, B, 3, S, S), for use on the current CUDA stream.

        The stream waits until the batch is complete; the host only waits until the frames are decoded. Raises
        RuntimeError if a frame cannot be decoded.
        """
        batch, done = self._pending.popleft().result()
        if done is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(done)
            # Otherwise a later batch could take the memory of this one while a training step reads it.
            batch.record_stream(stream)
        return batch

    def close(self) -> None:
        """Stop the threads."""
        self._decoders.shutdown(cancel_futures=True)
        self._sender.shutdown(cancel_futures=True)
        self._pending.clear()

    def _send(
        self, frames: list[Future[Frame]], parameters: SampleParameters
    ) -> tuple[Tensor, torch.cuda.Event | None]:
        """Transform the frames of a batch. Returns the batch and the event of its completion."""
        count = num_frames(parameters)
        parameters = np.tile(parameters, count)
        with torch.cuda.stream(self._stream):
            out = torch.empty(len(frames), 3, self._size, self._size, dtype=self._dtype, device=self._device)
            for start in range(0, len(frames), GPU_FRAMES):
                part = slice(start, start + GPU_FRAMES)
                out[part] = self._transform([frame.result() for frame in frames[part]], parameters[part])
            done = self._stream.record_event() if self._stream else None
        return out.unflatten(0, (count, -1)), done

    def _transform(self, frames: list[Frame], parameters: SampleParameters) -> Tensor:
        """Crop, resize, flip and normalise frames of any sizes, to (F, 3, S, S).

        Interpolation is linear, so a product with a matrix of weights resizes the columns of a crop, and
        another its rows. The weights of the padding are zero.
        """
        crops = []
        for frame, box in zip(frames, parameters["box"], strict=True):
            top, left, bottom, right = pixel_box(box, *frame.shape[:2])
            crops.append(frame[top:bottom, left:right])
        heights_F, widths_F, _ = np.array([crop.shape for crop in crops]).T
        rows_FSH = resize_weights(heights_F, self._size, self._device)
        columns_FSW = resize_weights(widths_F, self._size, self._device)
        height, width = rows_FSH.shape[2], columns_FSW.shape[2]
        on_gpu = self._device.type == "cuda"
        levels_FHW3 = torch.empty(len(crops), height, width, 3, dtype=torch.uint8, pin_memory=on_gpu)
        for target_HW3, crop_HW3 in zip(levels_FHW3.numpy(), crops, strict=True):
            target_HW3[: len(crop_HW3), : crop_HW3.shape[1]] = crop_HW3
        flips_F11 = _copy(torch.tensor(parameters["flip"])[:, None, None], self._device)
        columns_FSW = torch.where(flips_F11, columns_FSW.flip(1), columns_FSW)
        levels_FHX = _copy(levels_FHW3, self._device).float().flatten(2)
        levels_FSW3 = (rows_FSH @ levels_FHX).unflatten(2, (width, 3))
        levels_FYW = levels_FSW3.permute(0, 3, 1, 2).flatten(1, 2)
        levels_F3SS = (levels_FYW @ columns_FSW.mT).unflatten(1, (3, self._size))
        # DALI also rounds resized frames to levels.
        return torch.addcmul(self._offset, levels_F3SS.round_().clamp_(0, 255), self._scale)


def resize_weights(lengths_F: npt.NDArray[np.int64], size: int, device: torch.device) -> Tensor:
    """Return the weights (F, size, L) of the pixels of F sides that are resized to `size`.

    As in DALI, the first and the last pixel of a side stand in for those beyond. The filter is the cubic
    convolution kernel with a = -1/2 (Keys, "Cubic convolution interpolation for digital image processing",
    1981), stretched if the side is downscaled.
    """
    longest = int(lengths_F.max())
    margin = 2 + 2 * longest // size
    length_F11 = _copy(torch.tensor(lengths_F)[:, None, None], device)
    scale_F11 = length_F11 / size
    centres_FS1 = (torch.arange(size, device=device) + 0.5)[:, None] * scale_F11
    pixels_L = torch.arange(-margin, longest + margin, device=device)
    x = (pixels_L + 0.5 - centres_FS1).abs() / scale_F11.clamp(min=1)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = torch.where(x < 1, near, far) * (x < 2)
    weights /= weights.sum(2, keepdim=True)
    beyond_FS1 = (weights * (pixels_L >= length_F11)).sum(2, keepdim=True)
    before_FS1 = weights[:, :, :margin].sum(2, keepdim=True)
    inside = weights * (pixels_L < length_F11) + beyond_FS1 * (pixels_L == length_F11 - 1)
    return (inside + before_FS1 * (pixels_L == 0))[:, :, margin : margin + longest]


def frame_by_frame(pairs: Sequence[StoredFrames]) -> list[npt.NDArray[np.uint8]]:
    """Return the first frames of all samples, then the second ones, and so on."""
    return [stored for frames in zip(*pairs, strict=True) for stored in frames]


def num_frames(parameters: SampleParameters) -> int:
    """Return the number T of frames of each sample."""
    return int(parameters["frames"].shape[1])


def _decode(stored: npt.NDArray[np.uint8]) -> Frame:
    """Decode an image (n,); return a frame that is already RGB. Raises RuntimeError, as DALI does."""
    try:
        return decode_image(stored) if stored.ndim == 1 else stored
    except UnreadableFrameError as error:
        raise RuntimeError(str(error)) from error


def _copy(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device without waiting. PyTorch keeps pinned memory until it has been read."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def _normalisation() -> tuple[Tensor, Tensor]:
    """Return the offset and the scale (3, 1, 1) from levels 0..255 to normalised colours."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return (-mean / std).view(3, 1, 1), (1 / (255 * std)).view(3, 1, 1)
