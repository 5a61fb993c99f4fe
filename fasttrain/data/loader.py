"""The loader of a training run: positions in the stream -> batches of frame pairs, in order, on the device.

A micro-batch is fetched ahead by a pool of threads (file reads and video decoding let go of the GIL), handed
to the stage of pipeline.py, which decodes ahead too, and yielded in order. A sample that cannot be read is
replaced on the spot, counted and named; how a replacement is drawn depends on (seed, epoch, sample, attempt)
alone, so no rank waits for another and none falls out of step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.data.dali import Decoder, Stage, Upright, open_stage
from fasttrain.data.images import UnreadableFrameError
from fasttrain.data.index import ClipIndex, FrameIndex, Storage, StoredPair, VideoIndex
from fasttrain.data.sampling import Draws, Ints, PairSampling
from fasttrain.data.video import has_nvdec, nvdec_decodes
from fasttrain.errors import InputError

# So many in a row mean that nothing can be read: at half the samples bad this happens once in 4 billion.
MAX_ATTEMPTS = 32
# The share of bad samples is taken of at least so many, or the first bad one would stop a run.
MIN_SEEN = 1000
# What is wrong with a frame that could be read and made the stage raise.
UNDECODABLE: dict[Storage, str] = {
    "images": "cannot be decoded, the file is damaged",
    "frames": "cannot be cropped",
    "clips": "NVDEC does not decode it; if the file is whole, use data.decoder=cpu",
}


@dataclass(frozen=True)
class Fault:
    """A sample that could not be read, and the video whose pair took its place."""

    name: str
    frame: int
    reason: str
    replaced_by: str

    def __str__(self) -> str:
        return f"{self.name}, frame {self.frame}: {self.reason}; replaced by a pair of {self.replaced_by}"


@dataclass(frozen=True)
class FramePairs:
    """A micro-batch of B pairs."""

    frames: Tensor  # (2, B, 3, S, S) on the device, normalised by the ImageNet mean and std
    samples: Ints  # (B,) sample ids, of the replacements where there were any
    videos: Ints  # (B,)


@dataclass
class _Batch:
    """A micro-batch on its way."""

    epochs: Ints
    wanted: Ints
    draws: Draws
    pairs: list[StoredPair]
    attempts: list[int]
    faults: list[Fault] = field(default_factory=list)


class PairLoader:
    """Iterates the micro-batches of steps first_step .. first_step + num_steps - 1 of one rank.

    With G = accumulate * world_size * batch_size, step s takes the positions [s G, (s + 1) G) of the stream,
    its micro-batch m on rank r the slice of batch_size from s G + (m world_size + r) batch_size. Batches go
    across the borders of epochs; nothing is dropped, nothing is taken twice, and any split of the same G
    sees the same samples in the same step.

    frames are fp32 on a CPU and `dtype` on a GPU. They are the caller's own: no later batch writes to them.
    Raises InputError where a global batch is larger than the data, and while iterating where more than
    max_bad_fraction of the samples had to be replaced. Of several ranks one alone sees too few to tell: there
    the trainer sums `num_seen` and `faults` over all and calls `check_bad_fraction`. `note` is a line for the
    user where videos are decoded otherwise than they may expect, or None.
    """

    def __init__(
        self,
        *,
        index: FrameIndex,
        sampling: PairSampling,
        image_size: int,
        batch_size: int,
        accumulate: int,
        first_step: int,
        num_steps: int,
        rank: int,
        world_size: int,
        device: torch.device,
        num_threads: int,
        prefetch: int,
        decoder: Decoder,
        jpeg_engine_load: float,
        dtype: torch.dtype,
        max_bad_fraction: float,
    ) -> None:
        self.index, self.note = _for_device(index, device, decoder)
        self.sampling = sampling
        self.num_samples = sampling.num_samples(len(index))
        self.global_batch = accumulate * world_size * batch_size
        if self.global_batch > self.num_samples:
            raise InputError(
                f"a global batch of {self.global_batch} pairs is larger than the data ({self.num_samples} "
                f"samples of {len(index)} videos); lower train.batch_size or raise data.pairs_per_video"
            )
        self.batch_size, self.accumulate = batch_size, accumulate
        self.rank, self.world_size = rank, world_size
        self.first_step, self.num_batches = first_step, num_steps * accumulate
        self.max_bad_fraction = max_bad_fraction
        self.faults: list[Fault] = []
        self.num_seen = 0
        self._drained = 0
        self._prefetch = max(1, min(prefetch, self.num_batches))
        self._fetchers = ThreadPoolExecutor(num_threads, thread_name_prefix="fetch")
        self._num_threads = num_threads
        self._stage: Stage = open_stage(
            storage=self.index.storage,
            videos=_upright(self.index, device),
            device=device,
            decoder=decoder,
            jpeg_engine_load=jpeg_engine_load,
            batch_size=batch_size,
            image_size=image_size,
            num_threads=num_threads,
            prefetch=self._prefetch,
            dtype=dtype,
        )

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[FramePairs]:
        fetching: deque[list[Future[_Batch]]] = deque()
        decoding: deque[_Batch] = deque()
        fetched = 0
        for done in range(self.num_batches):
            while fetched < min(self.num_batches, done + 2 * self._prefetch):
                fetching.append(self._fetch(fetched))
                fetched += 1
            self._submit_fetched(fetching, decoding, wait=True)
            frames = self._collect(decoding)
            batch = decoding.popleft()
            self._count(batch)
            # The stage gets its next batch before the caller goes off to train on this one.
            self._submit_fetched(fetching, decoding, wait=False)
            yield FramePairs(frames=frames, samples=batch.draws.samples, videos=batch.draws.videos)

    def _submit_fetched(
        self, fetching: deque[list[Future[_Batch]]], decoding: deque[_Batch], *, wait: bool
    ) -> None:
        """Keep the stage supplied, with what is there or, if told to wait, with what is still being read."""
        while fetching and len(decoding) < self._prefetch:
            parts = fetching[0]
            if not wait and not all(part.done() and part.exception() is None for part in parts):
                return
            batch = _join([part.result() for part in parts])
            fetching.popleft()
            self._submit(batch)
            decoding.append(batch)

    def samples_of_step(self, step: int) -> tuple[Ints, list[str]]:
        """Ids (G,) of the samples of a step over all ranks, and the names of their videos."""
        positions = np.arange(step * self.global_batch, (step + 1) * self.global_batch)
        _, samples = self.sampling.order(positions, self.num_samples)
        return samples, [self.index.names[i] for i in samples // self.sampling.pairs_per_video]

    def drain_faults(self) -> list[Fault]:
        """The faults since the last call; `faults` keeps them all."""
        new = self.faults[self._drained :]
        self._drained = len(self.faults)
        return new

    def close(self) -> None:
        """Stop the threads and let go of the pipeline."""
        self._fetchers.shutdown(cancel_futures=True)
        self._stage.close()

    def _positions(self, number: int) -> Ints:
        """Positions (batch_size,) in the stream of this rank's micro-batch of this number."""
        step, micro = divmod(number, self.accumulate)
        start = (self.first_step + step) * self.global_batch
        start += (micro * self.world_size + self.rank) * self.batch_size
        return np.arange(start, start + self.batch_size)

    def _fetch(self, number: int) -> list[Future[_Batch]]:
        epochs, samples = self.sampling.order(self._positions(number), self.num_samples)
        parts = np.array_split(np.arange(self.batch_size), min(self._num_threads, self.batch_size))
        return [self._fetchers.submit(self._read_part, epochs[part], samples[part]) for part in parts]

    def _read_part(self, epochs: Ints, samples: Ints) -> _Batch:
        draws = self.sampling.draw(self.index.num_frames, epochs, samples)
        batch = _Batch(epochs, samples, draws, [], [0] * len(samples))
        batch.pairs = [self._read_pair(batch, row) for row in range(len(samples))]
        return batch

    def _read_pair(self, batch: _Batch, row: int) -> StoredPair:
        """Both frames of a row of the batch; of its replacement where they cannot be read."""
        while True:
            try:
                return self.index.read(int(batch.draws.videos[row]), batch.draws.frames[row])
            except UnreadableFrameError as error:
                self._replace(batch, row, error.frame, str(error))

    def _replace(self, batch: _Batch, row: int, frame: int, reason: str) -> None:
        """Draw another sample into a row and note why."""
        name = self.index.names[batch.draws.videos[row]]
        batch.attempts[row] += 1
        if batch.attempts[row] > MAX_ATTEMPTS:
            raise InputError(
                f"{MAX_ATTEMPTS} samples in a row could not be read, the last {name}, frame {frame}: "
                f"{reason}; is the data there and whole?"
            )
        other = self.sampling.draw(
            self.index.num_frames,
            batch.epochs[row : row + 1],
            batch.wanted[row : row + 1],
            batch.attempts[row],
        )
        for mine, drawn in zip(_columns(batch.draws), _columns(other), strict=True):
            mine[row] = drawn[0]
        batch.faults.append(Fault(name, frame, reason, self.index.names[other.videos[0]]))

    def _submit(self, batch: _Batch) -> None:
        self._stage.submit(batch.pairs, batch.draws)

    def _collect(self, decoding: deque[_Batch]) -> Tensor:
        """The first batch's frames, with every sample that does not decode replaced."""
        while True:
            try:
                return self._stage.collect()
            # PyTorch's own: no frame is to blame.
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise
            # DALI has one exception for everything; `_repair` raises it again if no frame is to blame.
            except RuntimeError as error:
                self._repair(decoding, error)

    def _repair(self, decoding: deque[_Batch], error: RuntimeError) -> None:
        """Find the bad samples of the first batch, replace them, and submit all batches again, in order."""
        for _ in range(len(decoding) - 1):
            try:
                self._stage.collect()
            # It is submitted again below and raises when its turn comes.
            except RuntimeError:
                continue
        batch = decoding[0]
        found = False
        for row in range(len(batch.wanted)):
            while (frame := self._undecodable(batch, row)) is not None:
                found = True
                self._replace(batch, row, frame, UNDECODABLE[self.index.storage])
                batch.pairs[row] = self._read_pair(batch, row)
        if not found:
            raise error
        for waiting in decoding:
            self._submit(waiting)

    def _undecodable(self, batch: _Batch, row: int) -> int | None:
        """The frame of a row that the stage cannot decode, if any."""
        pair, frames = batch.pairs[row], batch.draws.frames[row]
        # A clip holds both frames; images are tried one by one, so that the right one is named.
        alone = [pair] if self.index.storage == "clips" else [[stored, stored] for stored in pair]
        for frame, stored in zip(frames, alone, strict=False):
            self._stage.submit([stored], Draws(*(column[row : row + 1] for column in _columns(batch.draws))))
            try:
                self._stage.collect()
            except RuntimeError:
                return int(frame)
        return None

    def _count(self, batch: _Batch) -> None:
        """Enter a batch into the books when it is delivered, not when it was read ahead."""
        self.num_seen += len(batch.wanted) + len(batch.faults)
        self.faults += batch.faults
        if self.world_size == 1 and batch.faults:
            check_bad_fraction(len(self.faults), self.num_seen, self.max_bad_fraction, self.faults[-1])


def check_bad_fraction(bad: int, seen: int, limit: float, last: object) -> None:
    """Raise InputError where more than `limit` of the samples seen could not be read."""
    if bad > limit * max(seen, MIN_SEEN):
        raise InputError(
            f"{bad} of {seen} samples could not be read, more than data.max_bad_fraction={limit:g} allows; "
            f"the last: {last}"
        )


def _for_device(index: FrameIndex, device: torch.device, decoder: Decoder) -> tuple[FrameIndex, str | None]:
    """Raw video as clips for NVDEC, where there is a GPU and it can decode them all; and why not."""
    if not isinstance(index, VideoIndex) or device.type != "cuda" or decoder == "cpu":
        return index, None
    if not has_nvdec():
        if decoder == "mixed":
            raise InputError(
                "data.decoder=mixed needs NVDEC for videos, and this driver comes without it "
                "(libnvcuvid.so.1); use auto or cpu, or pack the videos once"
            )
        return index, "videos are decoded on the CPU: the driver comes without NVDEC (libnvcuvid.so.1)"
    others = [name for name, video in zip(index.names, index.videos, strict=True) if not nvdec_decodes(video)]
    if others and decoder == "auto":
        return index, (
            f"videos are decoded on the CPU: NVDEC does not take {len(others)} of {len(index)}, the first "
            f"{others[0]}; pack them once, or leave these out of data.source"
        )
    return index.as_clips(), None


def _upright(index: FrameIndex, device: torch.device) -> Upright | None:
    if not isinstance(index, ClipIndex):
        return None
    turns = np.array([video.quarter_turns for video in index.videos], dtype=np.int64)
    return Upright(turns, [video.matrix for video in index.videos], device)


def _columns(draws: Draws) -> list[Any]:
    return [draws.samples, draws.videos, draws.frames, draws.boxes, draws.flips]


def _join(parts: list[_Batch]) -> _Batch:
    """The parts that several threads read, as one batch."""
    columns = zip(*(_columns(part.draws) for part in parts), strict=True)
    return _Batch(
        epochs=np.concatenate([part.epochs for part in parts]),
        wanted=np.concatenate([part.wanted for part in parts]),
        draws=Draws(*(np.concatenate(column) for column in columns)),
        pairs=[pair for part in parts for pair in part.pairs],
        attempts=[attempt for part in parts for attempt in part.attempts],
        faults=[fault for part in parts for fault in part.faults],
    )
