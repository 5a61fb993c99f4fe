"""Decode and transform frames with DALI. This is the only module that imports DALI.

A stage receives the stored frames of a batch with their crops and flips, processes all submitted batches
concurrently, and returns them in order:

    submit(pairs, parameters)  ->  collect() -> (T, B, 3, S, S)

Batches are fed without callbacks, because an exception in a callback would make the pipeline unusable. If
DALI cannot decode a batch, `collect` raises; with the dynamic executor, other batches are not affected.

For a GPU, one DALI graph (`GpuStage`) decodes on the CPU, the JPEG engine or NVDEC, crops the frames where
they have been decoded, and resizes and normalises the crops on the GPU. For a CPU (`HostStage`), DALI only
decodes and PyTorch does the rest, because its antialiased bicubic interpolation of uint8 is faster there than
DALI's. The tests compare both with Pillow.

Legend: B samples of T frames, F frames of a clip, H x W pixels of a frame, S x S pixels of a crop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import Pipeline, fn
from nvidia.dali import math as dali_math
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType
from torch import Tensor

from fasttrain.data.images import Bytes, Frame
from fasttrain.data.index import ClipIndex, FrameIndex, Storage, StoredFrames
from fasttrain.data.nvdec import rgb_correction
from fasttrain.data.sampling import SampleParameters
from fasttrain.data.torch_stage import FrameTransform, frame_by_frame, num_frames
from fasttrain.normalization import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.recipe import Recipe


class Graph:
    """A DALI pipeline that runs the nodes returned by `define` exactly once for each submitted batch."""

    def __init__(
        self,
        define: Callable[[], Any],
        *,
        batch_size: int,
        num_threads: int = 1,
        depth: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self._pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=(device.index or 0) if device and device.type == "cuda" else None,
            prefetch_queue_depth=depth,
            # Only this executor can continue after a decoding error.
            exec_dynamic=True,
        )
        with self._pipeline:
            self._pipeline.set_outputs(define())
        self._pipeline.build()
        # The first call of `schedule_run` starts `depth` runs, so `depth` batches must have been fed by then.
        self._unfed = depth

    def submit(self, **inputs: Any) -> None:
        """Feed one batch, given as a value for each input node."""
        for name, values in inputs.items():
            self._pipeline.feed_input(name, values)
        self._unfed = max(0, self._unfed - 1)
        if self._unfed == 0:
            self._pipeline.schedule_run()

    def collect(self, stream: torch.cuda.Stream | None = None) -> Any:
        """Return the output of the oldest run, for use on `stream`. Without a stream, wait for the output."""
        (output,) = self._pipeline.outputs(cuda_stream=stream)
        return output


def decode_images(stored: Any, *, device: str, engine_load: float = 0.0, **part: Any) -> Any:
    """Define the decoder node for JPEG and PNG images, or for a part of each, given as for `fn.slice`.

    It applies the EXIF orientation. On the CPU, its output is identical to Pillow's.
    """
    decode = fn.decoders.image_slice if part else fn.decoders.image
    return decode(
        stored,
        device=device,
        output_type=DALIImageType.RGB,
        # Required for the GPU to agree with the CPU.
        jpeg_fancy_upsampling=True,
        hw_decoder_load=engine_load,
        affine=False,
        **part,
    )


def decode_clips(*, device: str) -> Any:
    """Define the decoder node for clips, (F, H, W, 3) each. The input `numbers` selects their frames."""
    numbers = _input("numbers", ndim=1, dtype=DALIDataType.INT32)
    # With `none`, a frame number beyond the end raises an error instead of returning a black frame.
    return fn.decoders.video(bytes_input(), frames=numbers, device=device, pad_mode="none", affine=False)


class HostStage:
    """Decode images with DALI on the CPU; crop, resize and normalise with PyTorch.

    Frames that are already RGB are not decoded. `depth` batches must be submitted before the first `collect`.
    """

    def __init__(self, recipe: Recipe, index: FrameIndex, *, num_threads: int, depth: int) -> None:
        self._size = recipe.data.image_size
        self._decoder: Graph | None = None
        if index.storage == "images":
            self._decoder = Graph(
                lambda: decode_images(bytes_input(), device="cpu"),
                batch_size=recipe.objective.frames * recipe.train.batch_size,
                num_threads=num_threads,
                depth=depth,
            )
        # The pool processes frames in parallel, so PyTorch must not use threads within a frame.
        self._pool = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,))
        self._pending: deque[tuple[list[Frame], SampleParameters]] = deque()
        self._transform = FrameTransform()

    def submit(self, pairs: Sequence[StoredFrames], parameters: SampleParameters) -> None:
        """Start processing a batch: the stored frames of B samples."""
        frames = frame_by_frame(pairs)
        if self._decoder:
            self._decoder.submit(stored=frames)
        self._pending.append((frames, parameters))

    def collect(self) -> Tensor:
        """Return the oldest batch, (T, B, 3, S, S). Raises RuntimeError if a frame cannot be decoded."""
        frames, parameters = self._pending.popleft()
        if self._decoder:
            decoded = self._decoder.collect()
            # These views keep the batch's buffer alive, so that DALI does not reuse it for the next batch.
            frames = [np.asarray(decoded[i]) for i in range(len(decoded))]
        count = num_frames(parameters)
        out = torch.empty(count, len(parameters), 3, self._size, self._size)
        list(self._pool.map(self._transform, frames, np.tile(parameters, count), out.flatten(0, 1)))
        return out

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()


def pair_graph(recipe: Recipe, storage: Storage, device: torch.device) -> Any:
    """Define the nodes from stored frames to normalised crops, (3, S, S), or (T, 3, S, S) for each clip."""
    size = recipe.data.image_size
    decoder = "mixed" if recipe.data.decoder == "mixed" else "cpu"
    corners = _input("box", ndim=2, dtype=DALIDataType.FLOAT)
    mirror = _input("mirror", ndim=0, dtype=DALIDataType.INT32)
    if storage == "images":
        stored = bytes_input()
        # The box need not wait for the decoder, because the header contains the size.
        sides = fn.peek_image_shape(stored, dtype=DALIDataType.FLOAT)[0:2]
    elif storage == "clips":
        frames = decode_clips(device=decoder)
        sides = frames.shape(dtype=DALIDataType.FLOAT)[1:3]
    else:
        frames = _input("stored", no_copy=True, ndim=3, dtype=DALIDataType.UINT8, layout="HWC")
        sides = frames.shape(dtype=DALIDataType.FLOAT)[0:2]
    # Round to pixels as sampling.pixel_box does.
    pixels = dali_math.floor(corners * sides + 0.5)
    start = dali_math.min(pixels[0], sides - 1)
    end = dali_math.max(pixels[1], start + 1)
    box: dict[str, Any] = {
        "start": fn.cast(start, dtype=DALIDataType.INT32),
        "end": fn.cast(end, dtype=DALIDataType.INT32),
        "axis_names": "HW",
    }
    # Frames on the host are cropped there, so that fewer bytes are copied to the GPU.
    crops: Any
    if storage != "images":
        crops = fn.slice(frames, **box)
    elif decoder == "cpu":
        crops = decode_images(stored, device="cpu", **box)
    else:
        # Whether the JPEG engine decodes parts of images has not been measured.
        frames = decode_images(stored, device="mixed", engine_load=recipe.data.jpeg_engine_load)
        crops = fn.slice(frames, **box)
    resized: Any = fn.resize(
        crops.gpu() if device.type == "cuda" else crops,
        size=[size, size],
        interp_type=DALIInterpType.INTERP_CUBIC,
        antialias=True,
    )
    return fn.crop_mirror_normalize(
        resized,
        mirror=mirror,
        mean=[255 * value for value in IMAGENET_MEAN],
        std=[255 * value for value in IMAGENET_STD],
        # DALI has no bfloat16; GpuStage.collect converts the frames.
        dtype=DALIDataType.FLOAT if recipe.train.precision == "fp32" else DALIDataType.FLOAT16,
        output_layout="FCHW" if storage == "clips" else "CHW",
    )


class GpuStage:
    """Decode, crop, resize and normalise in one DALI graph. For tests, it also runs on a CPU.

    `collect` returns a copy made on the current CUDA stream. `depth` batches must be submitted before the
    first `collect`.
    """

    def __init__(
        self, recipe: Recipe, index: FrameIndex, device: torch.device, *, num_threads: int, depth: int
    ) -> None:
        self._device, self._dtype = device, recipe.train.dtype
        self._videos = index.videos if isinstance(index, ClipIndex) else []
        self._mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
        self._std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)
        self._graph = Graph(
            lambda: pair_graph(recipe, index.storage, device),
            batch_size=recipe.objective.frames * recipe.train.batch_size,
            num_threads=num_threads,
            depth=depth,
            device=device,
        )
        self._pending: deque[SampleParameters] = deque()
        # DALI reuses a freed buffer immediately, even if a copy from it is still queued behind a training
        # step. Each buffer is therefore kept until its copy is done.
        self._in_flight: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._limit = depth + 1

    def submit(self, pairs: Sequence[StoredFrames], parameters: SampleParameters) -> None:
        """Start processing a batch: the stored frames of B samples."""
        inputs: dict[str, Any] = {}
        if self._videos:
            stored, inputs["numbers"] = [clip for clip, _ in pairs], [numbers for _, numbers in pairs]
            boxes, flips = parameters["box"], parameters["flip"]
        else:
            stored, count = frame_by_frame(pairs), num_frames(parameters)
            boxes, flips = np.tile(parameters["box"], (count, 1)), np.tile(parameters["flip"], count)
        inputs |= {"box": boxes.astype(np.float32).reshape(-1, 2, 2), "mirror": flips.astype(np.int32)}
        self._graph.submit(stored=stored, **inputs)
        self._pending.append(parameters)

    def collect(self) -> Tensor:
        """Return the oldest batch, (T, B, 3, S, S). Raises RuntimeError if a frame cannot be decoded."""
        parameters = self._pending.popleft()
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        batch = torch.from_dlpack(self._graph.collect(stream).as_tensor())
        views = batch.transpose(0, 1) if self._videos else batch.unflatten(0, (-1, len(parameters)))
        frames = torch.empty(views.shape, dtype=self._dtype, device=self._device)
        frames.copy_(views)
        if stream is not None:
            self._in_flight.append((stream.record_event(), batch))
            while self._in_flight and (len(self._in_flight) > self._limit or self._in_flight[0][0].query()):
                self._in_flight[0][0].synchronize()
                self._in_flight.popleft()
        if self._videos:
            self._recolour(frames, parameters)
        return frames

    def _recolour(self, frames: Tensor, parameters: SampleParameters) -> None:
        """Correct the colours of (T, B, 3, S, S) in place, because DALI decodes every video as BT.601."""
        matrices = [self._videos[video].matrix for video in parameters["video"]]
        if set(matrices) == {"bt601"}:
            return
        corrections = torch.from_numpy(np.stack([rgb_correction(matrix) for matrix in matrices])).float()
        # A blocking copy would synchronise the host with the device.
        corrections = corrections.to(self._device, non_blocking=True)
        colours = torch.addcmul(self._mean, frames.float(), self._std)
        corrected = torch.einsum("bij,vbjhw->vbihw", corrections, colours).clamp_(0, 1)
        frames.copy_((corrected - self._mean) / self._std)

    def close(self) -> None:
        """Free the buffers after the device has read them."""
        if self._in_flight:
            self._in_flight[-1][0].synchronize()
        self._in_flight.clear()
        self._pending.clear()


def clip_graph(device: torch.device) -> Any:
    """Define the nodes from a clip to its frames, resized to the input `short_side`, (F, H, W, 3)."""
    return fn.resize(
        decode_clips(device="mixed" if device.type == "cuda" else "cpu"),
        resize_shorter=_input("short_side", ndim=0, dtype=DALIDataType.FLOAT),
        interp_type=DALIInterpType.INTERP_CUBIC,
        antialias=True,
    )


class ClipDecoder:
    """Decode and downscale the frames of one clip at a time, and return them to the host. Used by `pack`."""

    def __init__(self, device: torch.device) -> None:
        self._graph = Graph(lambda: clip_graph(device), batch_size=1, device=device)

    def decode(self, clip: Bytes, numbers: Sequence[int], short_side: int) -> npt.NDArray[np.uint8]:
        """Decode frames by number, (F, H, W, 3) uint8, resized to `short_side`.

        Raises RuntimeError if a frame cannot be decoded.
        """
        self._graph.submit(
            stored=[clip],
            numbers=[np.array(numbers, dtype=np.int32)],
            short_side=np.array([short_side], dtype=np.float32),
        )
        return np.asarray(self._graph.collect().as_cpu()[0])


def _input(name: str, **options: Any) -> Any:
    return fn.external_source(name=name, batch=True, **options)


def bytes_input() -> Any:
    """Define the input node `stored`, files (n,)."""
    return _input("stored", no_copy=True, ndim=1, dtype=DALIDataType.UINT8)
