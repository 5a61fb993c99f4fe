"""The loader of a training run: positions in the stream -> batches of frame pairs, in order, on the device.

Threads read micro-batches ahead (file reads and video decoding release the GIL), the stage of dali.py decodes
ahead, and batches come in order. A sample that cannot be read is replaced and named; the replacement depends
on (seed, epoch, sample, attempt) alone, so no rank waits for another and none falls out of step.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from fasttrain.data.dali import GpuStage, HostStage
from fasttrain.data.images import UnreadableFrameError
from fasttrain.data.index import ClipIndex, FrameIndex, StoredFrames, VideoIndex
from fasttrain.data.map_ahead import map_ahead
from fasttrain.data.nvdec import has_nvdec, nvdec_refusal
from fasttrain.data.sampling import Ints, PairSampling, SampleParameters
from fasttrain.distributed import World
from fasttrain.errors import InputError, LocalInputError
from fasttrain.recipe import Recipe

# So many bad samples in a row mean that nothing can be read.
MAX_ATTEMPTS = 32


@dataclass(frozen=True)
class FramePairs:
    """A micro-batch of B pairs."""

    frames: Tensor  # (2, B, 3, S, S) on the device, normalised by the ImageNet mean and std
    samples: Ints  # (B,) sample ids, of the replacements where there were any
    bad_samples: list[str]  # what could not be read, why, and the video whose pair took its place


@dataclass
class _Sample:
    """One sample of a micro-batch on its way."""

    epoch: Ints  # (1,)
    wanted: Ints  # (1,) its id in the stream
    parameters: SampleParameters  # (1,) of what stands in for it, if it cannot be read
    pair: StoredFrames = ()
    bad: list[str] = field(default_factory=list)


class PairLoader:
    """The micro-batches of steps first_step .. first_step + num_steps - 1 of one rank; iterate once.

    With G = accumulate * world.size * batch_size, step s takes the positions [s G, (s + 1) G) of the stream,
    its micro-batch m on rank r the slice of batch_size from s G + (m world.size + r) batch_size. Batches go
    across the borders of epochs, and any split of the same G sees the same samples in the same step.

    frames are fp32 on a CPU and of train.precision on a GPU; no later batch writes to them. Raises InputError
    where a global batch is larger than the data, or the data are not for the decoder asked for; while
    iterating, where MAX_ATTEMPTS samples in a row cannot be read.
    """

    def __init__(
        self, *, index: FrameIndex, recipe: Recipe, world: World, first_step: int, num_steps: int
    ) -> None:
        self.recipe, self.world, self.first_step = recipe, world, first_step
        self.sampling = PairSampling(recipe.data, recipe.seed)
        self.num_samples = len(index) * recipe.data.pairs_per_video
        self.batch_size, self.accumulate = recipe.train.batch_size, recipe.train.accumulate
        self.global_batch = self.accumulate * world.size * self.batch_size
        if self.global_batch > self.num_samples:
            raise InputError(
                f"a global batch of {self.global_batch} pairs is larger than the data ({self.num_samples} "
                f"samples of {len(index)} videos); lower train.batch_size or raise data.pairs_per_video"
            )
        self.index = index_for_decoder(index, recipe.data.decoder, world.device)
        self.num_batches = num_steps * self.accumulate
        cores = len(os.sched_getaffinity(0))
        threads = recipe.data.num_threads or max(1, cores // world.local_size)
        # While one batch is trained on, `prefetch` others are being decoded.
        self._depth = max(1, min(recipe.data.prefetch + 1, self.num_batches))
        self._stage: HostStage | GpuStage = (
            GpuStage(recipe, self.index, world.device, num_threads=threads, depth=self._depth)
            if world.device.type == "cuda"
            else HostStage(recipe, self.index, num_threads=threads, depth=self._depth)
        )
        # The rows of a batch are shared out over the threads.
        self._parts = np.array_split(np.arange(self.batch_size), min(threads, self.batch_size))
        self._reading = map_ahead(
            self._read_part,
            ((number, rows) for number in range(self.num_batches) for rows in self._parts),
            workers=threads,
            depth=self._depth * len(self._parts),
        )

    def __iter__(self) -> Iterator[FramePairs]:
        decoding: deque[list[_Sample]] = deque()
        for _ in range(self.num_batches):
            while len(decoding) < self._depth and (parts := list(islice(self._reading, len(self._parts)))):
                batch = [sample for part in parts for sample in part]
                self._submit(batch)
                decoding.append(batch)
            frames = self._collect(decoding)
            batch = decoding.popleft()
            yield FramePairs(
                frames=frames,
                samples=_parameters(batch)["sample"],
                bad_samples=[bad for sample in batch for bad in sample.bad],
            )

    def samples_of_step(self, step: int) -> tuple[Ints, list[str]]:
        """Ids (G,) of a step's samples over all ranks, before any was replaced, and their videos' names."""
        positions = np.arange(step * self.global_batch, (step + 1) * self.global_batch)
        _, samples = self.sampling.order(positions, self.num_samples)
        return samples, [self.index.names[i] for i in samples // self.recipe.data.pairs_per_video]

    def close(self) -> None:
        """Stop the threads and free the pipeline."""
        self._reading.close()
        self._stage.close()

    def _read_part(self, part: tuple[int, Ints]) -> list[_Sample]:
        """Read some rows of this rank's micro-batch with this number."""
        number, rows = part
        step, micro = divmod(number, self.accumulate)
        start = (self.first_step + step) * self.global_batch
        start += (micro * self.world.size + self.world.rank) * self.batch_size
        epochs, wanted = self.sampling.order(start + rows, self.num_samples)
        parameters = self.sampling.draw(self.index.num_frames, epochs, wanted)
        one = [slice(i, i + 1) for i in range(len(rows))]
        samples = [_Sample(epochs[i], wanted[i], parameters[i]) for i in one]
        for sample in samples:
            self._read(sample)
        return samples

    def _read(self, sample: _Sample) -> None:
        """Read both frames, or those of a replacement where they cannot be read."""
        while True:
            video, frames = sample.parameters["video"][0], sample.parameters["frames"][0]
            try:
                sample.pair = self.index.read(int(video), frames)
                return
            except UnreadableFrameError as error:
                self._replace(sample, error.frame, str(error))

    def _replace(self, sample: _Sample, frame: int, reason: str) -> None:
        """Draw another sample instead, and note why."""
        name = self.index.names[sample.parameters["video"][0]]
        attempt = len(sample.bad) + 1
        if attempt > MAX_ATTEMPTS:
            # Other ranks do not see this.
            raise LocalInputError(
                f"{MAX_ATTEMPTS} samples in a row could not be read, the last {name}, frame {frame}: "
                f"{reason}; is the data there and whole?"
            )
        sample.parameters = self.sampling.draw(self.index.num_frames, sample.epoch, sample.wanted, attempt)
        replaced_by = self.index.names[sample.parameters["video"][0]]
        sample.bad.append(f"{name}, frame {frame}: {reason}; replaced by a pair of {replaced_by}")

    def _submit(self, batch: list[_Sample]) -> None:
        self._stage.submit([sample.pair for sample in batch], _parameters(batch))

    def _collect(self, decoding: deque[list[_Sample]]) -> Tensor:
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

    def _repair(self, decoding: deque[list[_Sample]], error: RuntimeError) -> None:
        """Find the bad samples of the first batch, replace them, and submit all batches again, in order."""
        for _ in range(len(decoding) - 1):
            # Another that does not decode raises again when its turn comes.
            with suppress(RuntimeError):
                self._stage.collect()
        reason = "cannot be decoded, the file is damaged"
        if self.index.storage == "clips":
            reason = "NVDEC does not decode it; if the file is whole, use data.decoder=cpu"
        found = False
        for sample in decoding[0]:
            while (frame := self._undecodable_frame(sample)) is not None:
                found = True
                self._replace(sample, frame, reason)
                self._read(sample)
        if not found:
            raise error
        for batch in decoding:
            self._submit(batch)

    def _undecodable_frame(self, sample: _Sample) -> int | None:
        """The frame that the stage cannot decode, if any."""
        # A clip holds both frames; images are tried one by one, so that the right one is named.
        clips = self.index.storage == "clips"
        pairs = [sample.pair] if clips else [[stored, stored] for stored in sample.pair]
        for frame, pair in zip(sample.parameters["frames"][0], pairs, strict=False):
            self._stage.submit([pair], sample.parameters)
            try:
                self._stage.collect()
            except RuntimeError:
                return int(frame)
        return None


def _parameters(batch: list[_Sample]) -> SampleParameters:
    return np.concatenate([sample.parameters for sample in batch])


def index_for_decoder(index: FrameIndex, decoder: str, device: torch.device) -> FrameIndex:
    """The index for data.decoder. Raises InputError where the device or the data do not suit the decoder."""
    if decoder != "mixed":
        return index
    if device.type != "cuda":
        raise InputError("data.decoder=mixed needs a GPU; use auto or cpu here")
    if not isinstance(index, VideoIndex):
        return index
    if not has_nvdec():
        raise InputError(
            "data.decoder=mixed needs NVDEC for videos, and this driver comes without it "
            "(libnvcuvid.so.1); use auto or cpu, or pack the videos once"
        )
    videos = dict(zip(index.names, index.videos, strict=True))
    for name, video in videos.items():
        if reason := nvdec_refusal(video):
            raise InputError(f"data.decoder=mixed: {name} is not for NVDEC, {reason}; use auto or cpu")
    return ClipIndex(videos, index.skipped)
