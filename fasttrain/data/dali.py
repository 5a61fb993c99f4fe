"""Stored frames -> frame pairs on the device, through DALI. The only module that imports DALI.

A stage takes what the index stores of a batch's pairs, with a crop and a flip for each, works ahead on as
many batches as were submitted, and gives them back in order:

    submit(pairs, parameters)  ->  collect() -> (2, B, 3, S, S)

Feeding is explicit, without callbacks: a callback that raises would poison the pipeline. A batch that DALI
cannot decode raises in `collect` and, under the dynamic executor, spoils no other batch.

On a GPU one graph does it all (`GpuStage`): decode on the host, on the JPEG engine or on NVDEC; crop and
resize; normalise. On a host (`HostStage`) DALI decodes and PyTorch's uint8 kernel resizes: DALI's
antialiased cubic takes 2.1 ms for a 256-pixel frame there, PyTorch's 0.25 ms, and both agree with Pillow.

Legend: B pairs, S side of the crop in pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import Pipeline, fn
from nvidia.dali import math as dali_math
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType
from torch import Tensor

from fasttrain.data.images import IMAGENET_MEAN, IMAGENET_STD, Bytes, Frame, crop_resize
from fasttrain.data.index import Storage, StoredPair
from fasttrain.data.nvdec import LUMA, rgb_correction
from fasttrain.data.sampling import Floats, SampleParameters, pixel_box
from fasttrain.data.video import Matrix, VideoInfo
from fasttrain.recipe import Recipe


class Graph:
    """A DALI pipeline that is fed by hand: exactly one run for each batch fed."""

    def __init__(self, pipeline: Pipeline, depth: int) -> None:
        self._pipeline = pipeline
        # DALI's first run starts as many as its queue is deep, so those must have been fed by then.
        self._unfed = depth
        pipeline.build()

    def submit(self, **inputs: Any) -> None:
        for name, values in inputs.items():
            self._pipeline.feed_input(name, values)
        self._unfed = max(0, self._unfed - 1)
        if self._unfed == 0:
            self._pipeline.schedule_run()

    def collect(self, stream: torch.cuda.Stream | None = None) -> Any:
        """The output of the oldest run, ordered on the stream; without one it is ready when this returns."""
        (output,) = self._pipeline.outputs(cuda_stream=stream)
        return output


def new_pipeline(*, device: torch.device, batch_size: int, num_threads: int, depth: int) -> Pipeline:
    """An empty pipeline with the dynamic executor, which alone survives a frame that does not decode."""
    return Pipeline(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=(device.index or 0) if device.type == "cuda" else None,
        prefetch_queue_depth=depth,
        exec_dynamic=True,
    )


def decode_images(stored: Any, *, device: str, engine_load: float = 0.0) -> Any:
    """The graph's JPEG and PNG decoder: upright by the EXIF tag, bit for bit Pillow's on the host.

    On a GPU (`mixed`) the JPEG engine takes the share `engine_load`. Smooth chroma upsampling makes it agree
    with the host.
    """
    return fn.decoders.image(
        stored,
        device=device,
        output_type=DALIImageType.RGB,
        jpeg_fancy_upsampling=True,
        hw_decoder_load=engine_load,
        affine=False,
    )


def decode_clips(stored: Any, *, device: str) -> Any:
    """The graph's video decoder: of each clip the frames of the input `numbers`, (F, H, W, 3).

    A number past the end must raise; DALI's own choice is a black frame.
    """
    numbers = _input("numbers", ndim=1, dtype=DALIDataType.INT32)
    return fn.decoders.video(stored, frames=numbers, device=device, pad_mode="none", affine=False)


class HostStage:
    """Decodes with DALI (frames that come as RGB need none), crops, resizes and normalises with PyTorch.

    `depth` batches must be submitted before the first is collected.
    """

    def __init__(self, recipe: Recipe, storage: Storage, *, num_threads: int, depth: int) -> None:
        self._size = recipe.data.image_size
        self._decoder: Graph | None = None
        if storage == "images":
            frames = 2 * recipe.train.batch_size
            cpu = torch.device("cpu")
            pipeline = new_pipeline(device=cpu, batch_size=frames, num_threads=num_threads, depth=depth)
            with pipeline:
                pipeline.set_outputs(decode_images(_bytes_input(), device="cpu"))
            self._decoder = Graph(pipeline, depth)
        # PyTorch's own threads would only get in the way: frames are shared out over the pool instead.
        self._pool = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,))
        self._waiting: deque[tuple[list[Frame], SampleParameters]] = deque()
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        self._scale = (1 / (255 * std)).view(3, 1, 1)
        self._offset = (-mean / std).view(3, 1, 1)

    def submit(self, pairs: Sequence[StoredPair], parameters: SampleParameters) -> None:
        """Start on a batch of B stored pairs."""
        frames = _first_then_second(pairs)
        if self._decoder:
            self._decoder.submit(stored=frames)
        self._waiting.append((frames, parameters))

    def collect(self) -> Tensor:
        """The oldest batch, (2, B, 3, S, S). Raises RuntimeError where a frame cannot be decoded."""
        frames, parameters = self._waiting.popleft()
        if self._decoder:
            decoded = self._decoder.collect()
            # The views keep the batch alive; DALI takes another buffer for the next.
            frames = [np.asarray(decoded[i]) for i in range(len(decoded))]
        out = torch.empty(2, len(parameters), 3, self._size, self._size)
        # Twice: first frames, then second frames.
        list(self._pool.map(self._finish, frames, [*parameters, *parameters], out.flatten(0, 1)))
        return out

    def _finish(self, frame_HW3: Frame, parameters: np.void, out_3SS: Tensor) -> None:
        box = pixel_box(parameters["box"], *frame_HW3.shape[:2])
        crop_3SS = crop_resize(frame_HW3, box, self._size)
        crop_3SS = crop_3SS.flip(-1) if parameters["flip"] else crop_3SS
        torch.addcmul(self._offset, crop_3SS, self._scale, out=out_3SS)

    def close(self) -> None:
        """Let go of threads and memory."""
        self._pool.shutdown()


def pair_graph(recipe: Recipe, storage: Storage, device: torch.device) -> Any:
    """The nodes from what the index stores to normalised crops, (3, S, S) or for clips (2, 3, S, S) each."""
    size, on_gpu = recipe.data.image_size, device.type == "cuda"
    decoder = "mixed" if on_gpu and recipe.data.decoder == "mixed" else "cpu"
    box = _input("box", ndim=1, dtype=DALIDataType.FLOAT)
    mirror = _input("mirror", ndim=0, dtype=DALIDataType.INT32)
    if storage == "images":
        frames = decode_images(_bytes_input(), device=decoder, engine_load=recipe.data.jpeg_engine_load)
    elif storage == "clips":
        frames = decode_clips(_bytes_input(), device=decoder)
    else:
        frames = _input("stored", no_copy=True, ndim=3, dtype=DALIDataType.UINT8, layout="HWC")
    shape = frames.shape(dtype=DALIDataType.FLOAT)
    sides = shape[1:3] if storage == "clips" else shape[0:2]
    # Whole pixels, by the rule of sampling.pixel_box.
    start = dali_math.min(dali_math.floor(box[0:2] * sides + 0.5), sides - 1)
    end = dali_math.max(dali_math.floor(box[2:4] * sides + 0.5), start + 1)
    resized: Any = fn.resize(
        frames.gpu() if on_gpu else frames,
        size=[size, size],
        roi_start=start,
        roi_end=end,
        interp_type=DALIInterpType.INTERP_CUBIC,
        antialias=True,
    )
    return fn.crop_mirror_normalize(
        resized,
        mirror=mirror,
        mean=[255 * value for value in IMAGENET_MEAN],
        std=[255 * value for value in IMAGENET_STD],
        # DALI has no bfloat16; PyTorch casts.
        dtype=DALIDataType.FLOAT if recipe.train.precision == "fp32" else DALIDataType.FLOAT16,
        output_layout="FCHW" if storage == "clips" else "CHW",
    )


class GpuStage:
    """Decode, crop, resize and normalise in one DALI graph. It runs on a CPU too, for tests.

    What `collect` gives is a copy on the current stream; DALI gets its buffer back when that copy is done.
    `videos`: those of the index, where it has video files. `depth` batches must be submitted before the
    first is collected.
    """

    def __init__(
        self,
        recipe: Recipe,
        storage: Storage,
        device: torch.device,
        *,
        videos: Sequence[VideoInfo] = (),
        num_threads: int,
        depth: int,
    ) -> None:
        self._device, self._dtype = device, recipe.train.dtype
        self._correction = ClipCorrection(videos, device) if storage == "clips" else None
        frames = 2 * recipe.train.batch_size
        pipeline = new_pipeline(device=device, batch_size=frames, num_threads=num_threads, depth=depth)
        with pipeline:
            pipeline.set_outputs(pair_graph(recipe, storage, device))
        self._graph = Graph(pipeline, depth)
        self._waiting: deque[tuple[list[Bytes], SampleParameters]] = deque()
        self._in_flight = InFlightBuffers(limit=depth + 1)

    def submit(self, pairs: Sequence[StoredPair], parameters: SampleParameters) -> None:
        """Start on a batch of B stored pairs."""
        inputs: dict[str, Any] = {}
        if self._correction:
            stored = [clip for clip, _ in pairs]
            inputs["numbers"] = [numbers.astype(np.int32) for _, numbers in pairs]
            boxes, flips = self._correction.as_stored(parameters)
        else:
            # The output is then (2, B, ...) as it stands.
            stored = _first_then_second(pairs)
            boxes, flips = np.tile(parameters["box"], (2, 1)), np.tile(parameters["flip"], 2)
        self._graph.submit(
            stored=stored, box=boxes.astype(np.float32), mirror=flips.astype(np.int32), **inputs
        )
        self._waiting.append((stored, parameters))

    def collect(self) -> Tensor:
        """The oldest batch, (2, B, 3, S, S). Raises RuntimeError where a frame cannot be decoded."""
        stored, parameters = self._waiting.popleft()
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        batch = torch.from_dlpack(self._graph.collect(stream).as_tensor())
        views = batch.transpose(0, 1) if self._correction else batch.unflatten(0, (2, len(parameters)))
        frames = torch.empty(views.shape, dtype=self._dtype, device=self._device)
        frames.copy_(views)
        if stream is not None:
            copied = torch.cuda.Event()
            copied.record(stream)
            # DALI's own copies from `stored` to the device come before this one.
            self._in_flight.keep((batch, stored), until=copied)
        if self._correction:
            self._correction.apply(frames, parameters)
        return frames

    def close(self) -> None:
        """Let go of memory."""
        self._in_flight.wait()
        self._waiting.clear()


class InFlightBuffers:
    """Buffers of DALI's that the device still reads from.

    A buffer that is let go of belongs to DALI's own stream again at once, whatever other streams have yet to
    read from it: the copy of a batch waits in the queue of the training step before it. So it is kept until
    an event behind the copy has come. The host waits only if it is `limit` batches ahead of the device.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: deque[tuple[torch.cuda.Event, object]] = deque()

    def keep(self, buffer: object, *, until: torch.cuda.Event) -> None:
        self._kept.append((until, buffer))
        while self._kept and (len(self._kept) > self._limit or self._kept[0][0].query()):
            self._kept[0][0].synchronize()
            self._kept.popleft()

    def wait(self) -> None:
        """Until the device has read them all."""
        for event, _ in self._kept:
            event.synchronize()
        self._kept.clear()


class ClipDecoder:
    """Frames of one clip at a time, made smaller, on the host: what `pack` does with a GPU."""

    def __init__(self, device: torch.device) -> None:
        pipeline = new_pipeline(device=device, batch_size=1, num_threads=1, depth=1)
        with pipeline:
            frames = decode_clips(_bytes_input(), device="mixed" if device.type == "cuda" else "cpu")
            short_side = _input("short_side", ndim=0, dtype=DALIDataType.FLOAT)
            cubic = DALIInterpType.INTERP_CUBIC
            pipeline.set_outputs(
                fn.resize(frames, resize_shorter=short_side, interp_type=cubic, antialias=True)
            )
        self._graph = Graph(pipeline, depth=1)

    def decode(self, clip: Bytes, numbers: Sequence[int], short_side: int) -> npt.NDArray[np.uint8]:
        """The frames of these numbers, (F, H, W, 3) uint8. Raises RuntimeError."""
        self._graph.submit(
            stored=[clip],
            numbers=[np.array(numbers, dtype=np.int32)],
            short_side=np.array([short_side], dtype=np.float32),
        )
        return np.asarray(self._graph.collect().as_cpu()[0])


class ClipCorrection:
    """Turns and recolours decoded clips: NVDEC knows no rotation, and DALI takes every stream for BT.601.

    Both happen on the resized square: a crop and a quarter turn can change places, and a matrix over the
    colours commutes with a resize.
    """

    def __init__(self, videos: Sequence[VideoInfo], device: torch.device) -> None:
        self._turns = np.array([video.quarter_turns for video in videos], dtype=np.int64)
        self._matrices = [video.matrix for video in videos]
        self._corrections = {
            matrix: [values.to(device) for values in _normalised_correction(matrix)] for matrix in LUMA
        }
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        self._black = (-mean / std).view(3, 1, 1).to(device)
        self._white = ((1 - mean) / std).view(3, 1, 1).to(device)

    def as_stored(self, parameters: SampleParameters) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Boxes (B, 4) on the frames as they are stored, and the flips (B,) that can be made there."""
        boxes = parameters["box"].copy()
        turns = self._turns[parameters["video"]]
        for turn in range(3):
            turned = turns > turn
            top, left, bottom, right = boxes[turned].T
            boxes[turned] = np.stack([left, 1 - bottom, right, 1 - top], axis=1)
        return boxes, parameters["flip"] & (turns == 0)

    def apply(self, frames: Tensor, parameters: SampleParameters) -> None:
        """Turn and recolour (2, B, 3, S, S) in place."""
        turns = self._turns[parameters["video"]]
        for row in np.flatnonzero(turns).tolist():
            turned = torch.rot90(frames[:, row], int(turns[row]), (-2, -1))
            frames[:, row] = turned.flip(-1) if parameters["flip"][row] else turned
        matrices = [self._matrices[video] for video in parameters["video"]]
        # Most data sets have one matrix: one product for the whole batch. Else one by one: an index of rows
        # would have to be copied to the device, and the host would wait for it.
        alike = len(set(matrices)) == 1
        for row, matrix in enumerate(matrices[:1] if alike else matrices):
            if matrix != "bt601":
                rows = slice(None) if alike else slice(row, row + 1)
                weight, bias = self._corrections[matrix]
                mixed = torch.einsum("ij,vbjhw->vbihw", weight, frames[:, rows].float()) + bias
                frames[:, rows] = mixed.clamp(self._black, self._white).to(frames.dtype)


def _normalised_correction(matrix: Matrix) -> tuple[Tensor, Tensor]:
    """`rgb_correction` for normalised colours: weight (3, 3) and bias (3, 1, 1)."""
    correction = torch.from_numpy(rgb_correction(matrix))
    mean = torch.tensor(IMAGENET_MEAN, dtype=torch.float64)
    std = torch.tensor(IMAGENET_STD, dtype=torch.float64)
    weight = correction * std / std[:, None]
    bias = (correction @ mean - mean) / std
    return weight.float(), bias.float().view(3, 1, 1)


def _input(name: str, **options: Any) -> Any:
    return fn.external_source(name=name, batch=True, **options)


def _bytes_input() -> Any:
    return _input("stored", no_copy=True, ndim=1, dtype=DALIDataType.UINT8)


def _first_then_second(pairs: Sequence[StoredPair]) -> list[npt.NDArray[np.uint8]]:
    return [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
