"""Stored frames -> frame pairs on the device, through DALI. The only module that imports DALI.

A stage takes the 2B stored frames of a batch (first frames, then second frames) with a crop and a flip for
each pair, works ahead on as many batches as were submitted, and gives them back in order:

    submit(frames, boxes, flips)  ->  collect() -> (2, B, 3, S, S)

Feeding is explicit, without callbacks: a callback that raises would poison the pipeline. A batch that DALI
cannot decode raises in `collect` and, under the dynamic executor, spoils no other batch.

On a GPU the graph is decode (host or JPEG engine), crop and resize, normalise. On a host DALI decodes, and
PyTorch's uint8 kernel resizes: DALI's antialiased cubic takes 2.1 ms for a 256-pixel frame there, PyTorch's
0.25 ms, and both agree with Pillow to a level or so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import Pipeline, fn
from nvidia.dali.types import DALIDataType, DALIImageType
from torch import Tensor

from fasttrain.data.images import IMAGENET_MEAN, IMAGENET_STD, crop_resize
from fasttrain.data.sampling import Bools, Floats, pixel_box

Stored = npt.NDArray[np.uint8]
Decoder = Literal["auto", "cpu", "mixed"]


class Stage(Protocol):
    """What the loader needs of a stage."""

    def submit(self, frames: Sequence[Stored], boxes: Floats, flips: Bools) -> None:
        """Start on a batch: 2B stored frames, boxes (B, 4) on the unit square, flips (B,)."""

    def collect(self) -> Tensor:
        """The oldest batch, (2, B, 3, S, S). Raises RuntimeError where a frame cannot be decoded."""

    def close(self) -> None:
        """Let go of threads and memory."""


def open_stage(
    *,
    encoded: bool,
    device: torch.device,
    decoder: Decoder,
    batch_size: int,
    image_size: int,
    num_threads: int,
    prefetch: int,
    dtype: torch.dtype,
) -> Stage:
    """The stage for this device; `encoded` says whether frames come as JPEG or PNG or as RGB (H, W, 3).

    `prefetch` batches must be submitted before the first is collected.
    """
    decode = HostDecoder(2 * batch_size, num_threads, prefetch) if encoded else None
    return HostStage(decode, image_size=image_size, num_threads=num_threads)


class Graph:
    """A DALI pipeline that is fed by hand: exactly one run for each batch fed."""

    def __init__(self, pipeline: Pipeline, prefetch: int) -> None:
        self.pipeline = pipeline
        # DALI's first run starts as many as its queue is deep, so those must have been fed by then.
        self._unfed = prefetch
        pipeline.build()

    def submit(self, **inputs: object) -> None:
        for name, values in inputs.items():
            self.pipeline.feed_input(name, values)
        self._unfed = max(0, self._unfed - 1)
        if self._unfed == 0:
            self.pipeline.schedule_run()


class HostDecoder:
    """JPEG and PNG -> RGB on the CPU, bit for bit what Pillow decodes, upright by the EXIF tag."""

    def __init__(self, max_frames: int, num_threads: int, prefetch: int) -> None:
        pipeline = Pipeline(
            batch_size=max_frames,
            num_threads=num_threads,
            device_id=None,
            prefetch_queue_depth=prefetch,
            exec_dynamic=True,
        )
        with pipeline:
            stored = fn.external_source(
                name="stored", batch=True, no_copy=True, ndim=1, dtype=DALIDataType.UINT8
            )
            pipeline.set_outputs(decode_images(stored, device="cpu"))
        self._graph = Graph(pipeline, prefetch)

    def submit(self, frames: Sequence[Stored]) -> None:
        self._graph.submit(stored=list(frames))

    def collect(self) -> list[npt.NDArray[np.uint8]]:
        (decoded,) = self._graph.pipeline.outputs()
        # The views keep the batch alive; DALI takes another buffer for the next.
        return [np.asarray(decoded[i]) for i in range(len(decoded))]


def decode_images(stored, *, device: str):  # type: ignore[no-untyped-def]  # DALI has no types
    """The graph's decoder. Smooth chroma upsampling makes host and JPEG engine agree with Pillow."""
    return fn.decoders.image(stored, device=device, output_type=DALIImageType.RGB, jpeg_fancy_upsampling=True)


class HostStage:
    """Decodes with DALI (frames that come as RGB need none), crops, resizes and normalises with PyTorch."""

    def __init__(self, decoder: HostDecoder | None, *, image_size: int, num_threads: int) -> None:
        self._decoder, self._size = decoder, image_size
        # Frames are spread over the pool; threads inside each would only get in the way.
        self._pool = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,))
        self._waiting: deque[tuple[Sequence[Stored], Floats, Bools]] = deque()
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        self._scale = (1 / (255 * std)).view(3, 1, 1)
        self._offset = (-mean / std).view(3, 1, 1)

    def submit(self, frames: Sequence[Stored], boxes: Floats, flips: Bools) -> None:
        if self._decoder:
            self._decoder.submit(frames)
        self._waiting.append((frames, boxes, flips))

    def collect(self) -> Tensor:
        frames, boxes, flips = self._waiting.popleft()
        if self._decoder:
            frames = self._decoder.collect()
        pairs = len(boxes)
        out = torch.empty(2 * pairs, 3, self._size, self._size)
        work = [
            self._pool.submit(self._finish, frames[i], boxes[i % pairs], flips[i % pairs], out[i])
            for i in range(2 * pairs)
        ]
        for part in work:
            part.result()
        return out.view(2, pairs, *out.shape[1:])

    def _finish(self, frame_HW3: Stored, box: Floats, flip: bool, out: Tensor) -> None:
        crop = crop_resize(frame_HW3, pixel_box(box, *frame_HW3.shape[:2]), self._size)
        torch.addcmul(self._offset, crop.flip(-1) if flip else crop, self._scale, out=out)

    def close(self) -> None:
        self._pool.shutdown()
