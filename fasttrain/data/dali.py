"""Stored frames -> frame pairs on the device, through DALI. The only module that imports DALI.

A stage takes what the index stores of a batch's pairs, with a crop and a flip for each, works ahead on as
many batches as were submitted, and gives them back in order:

    submit(pairs, draws)  ->  collect() -> (2, B, 3, S, S)

Feeding is explicit, without callbacks: a callback that raises would poison the pipeline. A batch that DALI
cannot decode raises in `collect` and, under the dynamic executor, spoils no other batch.

On a GPU one graph does it all (`GraphStage`): decode on the host, on the JPEG engine or on NVDEC; crop and
resize; normalise. On a host (`HostStage`) DALI decodes and PyTorch's uint8 kernel resizes: DALI's
antialiased cubic takes 2.1 ms for a 256-pixel frame there, PyTorch's 0.25 ms, and both agree with Pillow.

Legend: B pairs, S side of the crop in pixels.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fasttrain.data.images import IMAGENET_MEAN, IMAGENET_STD, crop_resize
from fasttrain.data.index import Storage, StoredPair
from fasttrain.data.sampling import Bools, Draws, Floats, Ints, pixel_box
from fasttrain.data.video import Matrix
from fasttrain.errors import InputError, needs_extra

with needs_extra("cuda12", "cuda13"):
    from nvidia.dali import Pipeline, fn
    from nvidia.dali import math as dali_math
    from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType

Decoder = Literal["auto", "cpu", "mixed"]

# Share of red and blue in luma, by matrix (ITU-R BT.601-7, BT.709-6, BT.2020-2).
_LUMA: dict[Matrix, tuple[float, float]] = {
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "bt2020": (0.2627, 0.0593),
}


class Stage(Protocol):
    """What the loader needs of a stage."""

    def submit(self, pairs: Sequence[StoredPair], draws: Draws) -> None:
        """Start on a batch of B stored pairs."""

    def collect(self) -> Tensor:
        """The oldest batch, (2, B, 3, S, S). Raises RuntimeError where a frame cannot be decoded."""

    def close(self) -> None:
        """Let go of threads and memory."""


def open_stage(
    *,
    storage: Storage,
    videos: Upright | None,
    device: torch.device,
    decoder: Decoder,
    jpeg_engine_load: float,
    batch_size: int,
    image_size: int,
    num_threads: int,
    prefetch: int,
    dtype: torch.dtype,
) -> Stage:
    """The stage for this device and for what the index stores.

    `videos` tells how clips are set upright. `prefetch` batches must be submitted before the first is
    collected. Raises InputError where the decoder asked for needs a GPU.
    """
    if device.type == "cuda":
        return GraphStage(
            storage=storage,
            videos=videos,
            device=device,
            # The host decodes 256-pixel JPEG at 1,700 frames/s a core, and its faults are well known.
            decoder="mixed" if decoder == "mixed" or storage == "clips" else "cpu",
            jpeg_engine_load=jpeg_engine_load,
            batch_size=batch_size,
            image_size=image_size,
            num_threads=num_threads,
            prefetch=prefetch,
            dtype=dtype,
        )
    if decoder == "mixed":
        raise InputError("data.decoder=mixed needs a GPU; use auto or cpu here")
    decode = HostDecoder(2 * batch_size, num_threads, prefetch) if storage == "images" else None
    return HostStage(decode, image_size=image_size, num_threads=num_threads)


class Graph:
    """A DALI pipeline that is fed by hand: exactly one run for each batch fed."""

    def __init__(self, pipeline: Pipeline, prefetch: int) -> None:
        self._pipeline = pipeline
        # DALI's first run starts as many as its queue is deep, so those must have been fed by then.
        self._unfed = prefetch
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


def new_pipeline(*, device: torch.device, batch_size: int, num_threads: int, prefetch: int) -> Pipeline:
    """An empty pipeline with the dynamic executor, which alone survives a frame that does not decode."""
    return Pipeline(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=(device.index or 0) if device.type == "cuda" else None,
        prefetch_queue_depth=prefetch,
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


def decode_clips(stored: Any, numbers: Any, *, device: str) -> Any:
    """The graph's video decoder: of each clip the frames of these numbers, (F, H, W, 3).

    A number past the end must raise; DALI's own choice is a black frame.
    """
    return fn.decoders.video(stored, frames=numbers, device=device, pad_mode="none", affine=False)


class HostDecoder:
    """JPEG and PNG -> RGB on the CPU, bit for bit what Pillow decodes, upright by the EXIF tag."""

    def __init__(self, max_frames: int, num_threads: int, prefetch: int) -> None:
        pipeline = new_pipeline(
            device=torch.device("cpu"), batch_size=max_frames, num_threads=num_threads, prefetch=prefetch
        )
        with pipeline:
            pipeline.set_outputs(decode_images(_bytes_input(), device="cpu"))
        self._graph = Graph(pipeline, prefetch)

    def submit(self, frames: Sequence[npt.NDArray[np.uint8]]) -> None:
        self._graph.submit(stored=list(frames))

    def collect(self) -> list[npt.NDArray[np.uint8]]:
        decoded = self._graph.collect()
        # The views keep the batch alive; DALI takes another buffer for the next.
        return [np.asarray(decoded[i]) for i in range(len(decoded))]


class HostStage:
    """Decodes with DALI (frames that come as RGB need none), crops, resizes and normalises with PyTorch."""

    def __init__(self, decoder: HostDecoder | None, *, image_size: int, num_threads: int) -> None:
        self._decoder, self._size = decoder, image_size
        self._pool = _single_threaded_workers(num_threads)
        self._waiting: deque[tuple[list[npt.NDArray[np.uint8]], Draws]] = deque()
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        self._scale = (1 / (255 * std)).view(3, 1, 1)
        self._offset = (-mean / std).view(3, 1, 1)

    def submit(self, pairs: Sequence[StoredPair], draws: Draws) -> None:
        frames = _flat(pairs)
        if self._decoder:
            self._decoder.submit(frames)
        self._waiting.append((frames, draws))

    def collect(self) -> Tensor:
        frames, draws = self._waiting.popleft()
        if self._decoder:
            frames = self._decoder.collect()
        pairs = len(draws.boxes)
        out = torch.empty(2 * pairs, 3, self._size, self._size)
        work = [
            self._pool.submit(self._finish, frames[i], draws.boxes[i % pairs], draws.flips[i % pairs], out[i])
            for i in range(2 * pairs)
        ]
        for part in work:
            part.result()
        return out.view(2, pairs, *out.shape[1:])

    def _finish(self, frame_HW3: npt.NDArray[np.uint8], box: Floats, flip: bool, out_3SS: Tensor) -> None:
        crop_3SS = crop_resize(frame_HW3, pixel_box(box, *frame_HW3.shape[:2]), self._size)
        torch.addcmul(self._offset, crop_3SS.flip(-1) if flip else crop_3SS, self._scale, out=out_3SS)

    def close(self) -> None:
        self._pool.shutdown()


def _single_threaded_workers(number: int) -> ThreadPoolExecutor:
    """A pool in whose threads PyTorch runs single-threaded: frames are spread over the pool instead.

    torch.set_num_threads acts on the calling thread and on all that start later. So it is set back once all
    workers have begun, in a thread of its own: what the caller computes keeps its order of summation.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(number)
    all_started = threading.Barrier(number)

    def begin(_: int) -> None:
        torch.set_num_threads(1)
        all_started.wait()

    list(pool.map(begin, range(number)))
    reset = threading.Thread(target=torch.set_num_threads, args=(before,))
    reset.start()
    reset.join()
    return pool


def pair_graph(
    storage: Storage, *, decoder: str, engine_load: float, image_size: int, on_gpu: bool, float32: bool
) -> Any:
    """The nodes from what the index stores to normalised crops, (3, S, S) or for clips (2, 3, S, S) each."""
    box = fn.external_source(name="box", batch=True, ndim=1, dtype=DALIDataType.FLOAT)
    mirror = fn.external_source(name="mirror", batch=True, ndim=0, dtype=DALIDataType.INT32)
    first_axis = 0
    if storage == "images":
        frames = decode_images(_bytes_input(), device=decoder, engine_load=engine_load)
    elif storage == "clips":
        numbers = fn.external_source(name="numbers", batch=True, ndim=1, dtype=DALIDataType.INT32)
        frames = decode_clips(_bytes_input(), numbers, device=decoder)
        first_axis = 1
    else:
        frames = fn.external_source(
            name="stored", batch=True, no_copy=True, ndim=3, dtype=DALIDataType.UINT8, layout="HWC"
        )
    size = frames.shape(dtype=DALIDataType.FLOAT)[first_axis : first_axis + 2]
    # Whole pixels, by the rule of sampling.pixel_box.
    start = dali_math.min(dali_math.floor(box[0:2] * size + 0.5), size - 1)
    end = dali_math.max(dali_math.floor(box[2:4] * size + 0.5), start + 1)
    if on_gpu:
        frames = frames.gpu()
    resized: Any = fn.resize(
        frames,
        size=[image_size, image_size],
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
        dtype=DALIDataType.FLOAT if float32 else DALIDataType.FLOAT16,
        output_layout="FCHW" if first_axis else "CHW",
    )


class GraphStage:
    """Decode, crop, resize and normalise in one DALI graph, meant for a GPU.

    It runs on a CPU too, where only tests use it. What `collect` gives is a copy on the current stream; DALI
    gets its buffer back when that copy is done.
    """

    def __init__(
        self,
        *,
        storage: Storage,
        videos: Upright | None,
        device: torch.device,
        decoder: Literal["cpu", "mixed"],
        jpeg_engine_load: float,
        batch_size: int,
        image_size: int,
        num_threads: int,
        prefetch: int,
        dtype: torch.dtype,
    ) -> None:
        self._storage, self._videos, self._device, self._dtype = storage, videos, device, dtype
        pipeline = new_pipeline(
            device=device, batch_size=2 * batch_size, num_threads=num_threads, prefetch=prefetch
        )
        with pipeline:
            pipeline.set_outputs(
                pair_graph(
                    storage,
                    decoder=decoder,
                    engine_load=jpeg_engine_load,
                    image_size=image_size,
                    on_gpu=device.type == "cuda",
                    float32=dtype == torch.float32,
                )
            )
        self._graph = Graph(pipeline, prefetch)
        self._waiting: deque[tuple[list[npt.NDArray[np.uint8]], Draws]] = deque()
        # A copy to the device may still read the bytes of a batch that was collected.
        self._retired: deque[list[npt.NDArray[np.uint8]]] = deque(maxlen=prefetch + 1)
        self._in_use = InUse(limit=prefetch + 2)

    def submit(self, pairs: Sequence[StoredPair], draws: Draws) -> None:
        boxes, mirror = draws.boxes, draws.flips
        if self._storage == "clips":
            assert self._videos is not None
            stored = [clip for clip, _ in pairs]
            boxes, mirror = self._videos.as_stored(draws)
            inputs = {"numbers": [numbers.astype(np.int32) for _, numbers in pairs]}
        else:
            # First frames, then second frames: the output is (2, B, ...) as it stands.
            stored, inputs = _flat(pairs), {}
            boxes, mirror = np.tile(boxes, (2, 1)), np.tile(mirror, 2)
        self._graph.submit(
            stored=stored, box=boxes.astype(np.float32), mirror=mirror.astype(np.int32), **inputs
        )
        self._waiting.append((stored, draws))

    def collect(self) -> Tensor:
        stored, draws = self._waiting.popleft()
        self._retired.append(stored)
        pairs = len(draws.boxes)
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        batch = torch.from_dlpack(self._graph.collect(stream).as_tensor())
        is_clip = self._storage == "clips"
        views = batch.transpose(0, 1) if is_clip else batch.view(2, pairs, *batch.shape[1:])
        frames = torch.empty(views.shape, dtype=self._dtype, device=self._device)
        frames.copy_(views)
        if stream is not None:
            copied = torch.cuda.Event()
            copied.record(stream)
            self._in_use.keep(batch, until=copied)
        if is_clip:
            assert self._videos is not None
            self._videos.set_upright(frames, draws)
        return frames

    def close(self) -> None:
        self._in_use.wait()
        self._waiting.clear()
        self._retired.clear()


class Event(Protocol):
    """What is needed of a torch.cuda.Event."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class InUse:
    """Buffers of DALI's that the device still reads from.

    A buffer that is let go of belongs to DALI's own stream again at once, whatever other streams have yet to
    read from it: the copy of a batch waits in the queue of the training step before it. So it is kept until
    an event behind the copy has come. The host waits only if it is `limit` batches ahead of the device.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: deque[tuple[Event, object]] = deque()

    def keep(self, buffer: object, *, until: Event) -> None:
        self._kept.append((until, buffer))
        while self._kept and self._kept[0][0].query():
            self._kept.popleft()
        while len(self._kept) > self._limit:
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
        pipeline = new_pipeline(device=device, batch_size=1, num_threads=1, prefetch=1)
        with pipeline:
            numbers = fn.external_source(name="numbers", batch=True, ndim=1, dtype=DALIDataType.INT32)
            short_side = fn.external_source(name="short_side", batch=True, ndim=0, dtype=DALIDataType.FLOAT)
            frames = decode_clips(_bytes_input(), numbers, device="mixed" if device.type == "cuda" else "cpu")
            pipeline.set_outputs(
                fn.resize(
                    frames,
                    resize_shorter=short_side,
                    interp_type=DALIInterpType.INTERP_CUBIC,
                    antialias=True,
                )
            )
        self._graph = Graph(pipeline, prefetch=1)

    def decode(
        self, clip: npt.NDArray[np.uint8], numbers: Sequence[int], short_side: int
    ) -> npt.NDArray[np.uint8]:
        """The frames of these numbers, (F, H, W, 3) uint8. Raises RuntimeError."""
        self._graph.submit(
            stored=[clip],
            numbers=[np.array(numbers, dtype=np.int32)],
            short_side=np.array([short_side], dtype=np.float32),
        )
        return np.asarray(self._graph.collect().as_cpu()[0])


class Upright:
    """Sets decoded clips right: NVDEC knows no rotation, and DALI takes every stream for BT.601.

    Both are undone on the resized square: a crop and a quarter turn can change places, and a matrix over the
    colours commutes with a resize.
    """

    def __init__(self, quarter_turns: Ints, matrices: Sequence[Matrix], device: torch.device) -> None:
        self._turns = quarter_turns
        kinds: list[Matrix] = list(_LUMA)
        self._kinds = np.array([kinds.index(matrix) for matrix in matrices])
        corrections = [_colour_correction(matrix) for matrix in kinds]
        self._weights = torch.stack([weight for weight, _ in corrections]).to(device)
        self._biases = torch.stack([bias for _, bias in corrections]).to(device)
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        self._black = (-mean / std).view(3, 1, 1).to(device)
        self._white = ((1 - mean) / std).view(3, 1, 1).to(device)

    def as_stored(self, draws: Draws) -> tuple[Floats, Bools]:
        """Boxes (B, 4) on the frames as they are stored, and the flips (B,) that can be made there."""
        boxes = draws.boxes.copy()
        turns = self._turns[draws.videos]
        for turn in range(3):
            turned = turns > turn
            top, left, bottom, right = boxes[turned].T
            boxes[turned] = np.stack([left, 1 - bottom, right, 1 - top], axis=1)
        return boxes, draws.flips & (turns == 0)

    def set_upright(self, frames: Tensor, draws: Draws) -> None:
        """Turn and recolour (2, B, 3, S, S) in place."""
        for row in np.flatnonzero(self._turns[draws.videos]):
            turned = torch.rot90(frames[:, row], int(self._turns[draws.videos[row]]), (-2, -1))
            frames[:, row] = turned.flip(-1) if draws.flips[row] else turned
        kinds = self._kinds[draws.videos]
        # Kind 0 is BT.601, as decoded.
        for kind in np.unique(kinds[kinds > 0]):
            rows = np.flatnonzero(kinds == kind).tolist()
            # Most data sets are of one kind. Else one by one: a list of rows would have to be copied to the
            # device, and the host would wait for it.
            whole = len(rows) == len(kinds)
            for place in [slice(None)] if whole else [slice(row, row + 1) for row in rows]:
                mixed = torch.einsum("ij,vbjhw->vbihw", self._weights[kind], frames[:, place].float())
                mixed += self._biases[kind].view(3, 1, 1)
                frames[:, place] = mixed.clamp(self._black, self._white).to(frames.dtype)


def rgb_correction(matrix: Matrix) -> npt.NDArray[np.float64]:
    """(3, 3): RGB that was decoded by BT.601 -> RGB by the stream's own matrix."""
    return _ycc_to_rgb(matrix) @ np.linalg.inv(_ycc_to_rgb("bt601"))


def _colour_correction(matrix: Matrix) -> tuple[Tensor, Tensor]:
    """`rgb_correction` for normalised colours: weight (3, 3) and bias (3,)."""
    correction = torch.from_numpy(rgb_correction(matrix))
    mean = torch.tensor(IMAGENET_MEAN, dtype=torch.float64)
    std = torch.tensor(IMAGENET_STD, dtype=torch.float64)
    weight = correction * std / std[:, None]
    bias = (correction @ mean - mean) / std
    return weight.float(), bias.float()


def _ycc_to_rgb(matrix: Matrix) -> npt.NDArray[np.float64]:
    """(3, 3): Y in 0..1 and Cb, Cr in -1/2..1/2 -> RGB in 0..1."""
    red, blue = _LUMA[matrix]
    green = 1 - red - blue
    return np.array(
        [
            [1, 0, 2 * (1 - red)],
            [1, -2 * (1 - blue) * blue / green, -2 * (1 - red) * red / green],
            [1, 2 * (1 - blue), 0],
        ]
    )


def _bytes_input() -> Any:
    return fn.external_source(name="stored", batch=True, no_copy=True, ndim=1, dtype=DALIDataType.UINT8)


def _flat(pairs: Sequence[StoredPair]) -> list[npt.NDArray[np.uint8]]:
    return [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
