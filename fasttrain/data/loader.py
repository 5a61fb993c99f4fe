"""The data loader of training: batches of frames on the device, in the order of the training stream.

Threads read micro-batches in advance (reading files and decoding videos release the GIL), and a stage decodes
images and transforms the frames in advance: a stage of dali.py if DALI is installed, otherwise one of
torch_stage.py. An unreadable sample is replaced and reported. The replacement sample depends only on (seed,
epoch, sample, attempt), so ranks need not communicate to stay in step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fasttrain.data.images import UnreadableFrameError
from fasttrain.data.index import ClipIndex, FrameIndex, StoredFrames, VideoIndex
from fasttrain.data.map_ahead import map_ahead
from fasttrain.data.nvdec import has_dali, has_nvdec, nvdec_refusal
from fasttrain.data.remote import READERS
from fasttrain.data.sampling import Ints, PairSampling, SampleParameters, evenly_spaced
from fasttrain.data.torch_stage import FrameTransform, TorchGpuStage, TorchHostStage
from fasttrain.distributed import World
from fasttrain.errors import InputError, LocalInputError, pip_install
from fasttrain.loggers import count
from fasttrain.recipe import Recipe

if TYPE_CHECKING:
    from fasttrain.data.dali import GpuStage, HostStage

# Number of frames by which the scales of FP8 layers are chosen.
CALIBRATION_FRAMES = 16
# Number of frames by which the mean of the frozen tokens is estimated.
MEAN_FRAMES = 128
INSTALL_DALI = pip_install("cuda12", "cuda13")
# After this many unreadable samples in a row, assume that nothing is readable.
MAX_ATTEMPTS = 32
# Minimum denominator of the fraction of bad samples, so that one bad sample at the start does not stop a run.
MIN_SEEN = 1000


@dataclass(frozen=True)
class FramePairs:
    """A micro-batch of B frame pairs, or of B samples of T frames with objective.frames=T."""

    frames: Tensor  # (T, B, 3, S, S) on the device, normalised with the ImageNet mean and std
    samples: Ints  # (B,) sample ids, after replacement
    bad_samples: list[str]  # one description per unreadable sample: frame, reason and replacement


@dataclass
class _Batch:
    """The state of a micro-batch of B samples while it is loaded."""

    epochs: Ints  # (B,)
    ids: Ints  # (B,) sample ids, before any replacement
    parameters: SampleParameters  # (B,) of the samples, or of their replacements
    pairs: list[StoredFrames]  # the frames of B samples
    bad: list[list[str]]  # B lists with a description of each failed attempt


class PairLoader:
    """The micro-batches of one rank for `num_steps` steps, starting at `first_step_index`.

    A loader can be iterated only once. With the global batch size G = accumulate * world.size * batch_size,
    step index s consists of positions [s G, (s + 1) G) of the training stream. Micro-batch m of rank r
    consists of the batch_size positions from s G + (m world.size + r) batch_size. A step therefore consists
    of the same samples however G is split into ranks and micro-batches. A batch may extend over the end of an
    epoch.

    Frames are float32 on a CPU and have the dtype of train.precision on a GPU. Each batch has its own memory.

    Raises InputError if the global batch is larger than an epoch or the data do not suit data.decoder, and,
    during iteration, LocalInputError if MAX_ATTEMPTS samples in a row are unreadable.
    """

    def __init__(
        self, *, index: FrameIndex, recipe: Recipe, world: World, first_step_index: int, num_steps: int
    ) -> None:
        self.recipe, self.world, self.first_step_index = recipe, world, first_step_index
        self.sampling = PairSampling(recipe)
        self.num_samples = len(index) * recipe.data.pairs_per_video
        self.batch_size, self.accumulate = recipe.train.batch_size, recipe.train.accumulate
        self.global_batch = self.accumulate * world.size * self.batch_size
        if self.global_batch > self.num_samples:
            raise InputError(
                f"train.batch_size, train.accumulate: the global batch of {self.global_batch} pairs "
                f"(batch_size {self.batch_size} x accumulate {self.accumulate} x "
                f"{count(world.size, 'process')}) is larger than an epoch "
                f"({count(self.num_samples, 'pair')} from {count(len(index), 'video')}). Lower one of "
                f"them, or raise data.pairs_per_video to {math.ceil(self.global_batch / len(index))} or more"
            )
        self.index = index_for_decoder(index, recipe.data.decoder, world.device)
        self.num_batches = num_steps * self.accumulate
        threads = recipe.data.num_threads or decoding_threads(world)
        # One batch is used for training while `prefetch` others are decoded.
        self._depth = max(1, min(recipe.data.prefetch + 1, self.num_batches))
        self._stage = open_stage(recipe, self.index, world.device, num_threads=threads, depth=self._depth)
        # The rows of a micro-batch are divided among the threads that read.
        readers = max(threads, READERS) if self.index.is_remote else threads
        self._chunks = np.array_split(np.arange(self.batch_size), min(readers, self.batch_size))
        self._reading = map_ahead(
            self._read_rows,
            ((batch, rows) for batch in self._drawn_batches() for rows in self._chunks),
            workers=readers,
            depth=self._depth * len(self._chunks),
        )

    def __iter__(self) -> Iterator[FramePairs]:
        decoding: deque[_Batch] = deque()
        for _ in range(self.num_batches):
            while len(decoding) < self._depth:
                chunks = list(islice(self._reading, len(self._chunks)))
                if not chunks:
                    break
                batch = chunks[0]
                self._stage.submit(batch.pairs, batch.parameters)
                decoding.append(batch)
            frames = self._collect(decoding)
            batch = decoding.popleft()
            yield FramePairs(
                frames=frames,
                samples=batch.parameters["sample"],
                bad_samples=[bad for attempts in batch.bad for bad in attempts],
            )

    def samples_of_step(self, step_index: int) -> tuple[Ints, list[str]]:
        """Return the sample ids (G,) and video names of a step on all ranks, before replacement."""
        positions = np.arange(step_index * self.global_batch, (step_index + 1) * self.global_batch)
        _, samples = self.sampling.order(positions, self.num_samples)
        return samples, [self.index.names[i] for i in samples // self.recipe.data.pairs_per_video]

    def close(self) -> None:
        """Stop the threads and free the pipeline."""
        self._reading.close()
        self._stage.close()

    def _drawn_batches(self) -> Iterator[_Batch]:
        """Draw the samples of each micro-batch, at once, because a call costs far more than a sample."""
        for number in range(self.num_batches):
            step, micro = divmod(number, self.accumulate)
            start = (self.first_step_index + step) * self.global_batch
            start += (micro * self.world.size + self.world.rank) * self.batch_size
            epochs, ids = self.sampling.order(np.arange(start, start + self.batch_size), self.num_samples)
            parameters = self.sampling.draw(self.index.num_frames, epochs, ids)
            yield _Batch(epochs, ids, parameters, [()] * len(ids), [[] for _ in ids])

    def _read_rows(self, item: tuple[_Batch, Ints]) -> _Batch:
        """Read some rows of a micro-batch."""
        batch, rows = item
        for row in rows:
            self._read(batch, row)
        return batch

    def _read(self, batch: _Batch, row: int) -> None:
        """Read the frames of a sample, replacing it until all are readable."""
        while True:
            video, frames = batch.parameters["video"][row], batch.parameters["frames"][row]
            try:
                batch.pairs[row] = self.index.read(int(video), frames)
                return
            except UnreadableFrameError as error:
                self._replace(batch, row, error.frame, str(error))

    def _replace(self, batch: _Batch, row: int, frame: int, reason: str) -> None:
        """Draw a replacement sample and record the reason."""
        name = self.index.names[batch.parameters["video"][row]]
        attempt = len(batch.bad[row]) + 1
        if attempt > MAX_ATTEMPTS:
            # LocalInputError, because other ranks do not raise this error.
            raise LocalInputError(
                f"data.source: {MAX_ATTEMPTS} samples in a row are unreadable; the last one is {name}, frame "
                f"{frame}: {reason}. Check that the data are present and undamaged."
            )
        one = slice(row, row + 1)
        batch.parameters[one] = self.sampling.draw(
            self.index.num_frames, batch.epochs[one], batch.ids[one], attempt
        )
        replacement = self.index.names[batch.parameters["video"][row]]
        batch.bad[row].append(
            f"{name}, frame {frame}: {reason}; replaced with a frame pair from {replacement}"
        )

    def _collect(self, decoding: deque[_Batch]) -> Tensor:
        """Return the frames of the oldest batch, after replacing all samples that cannot be decoded."""
        while True:
            try:
                return self._stage.collect()
            # PyTorch raises these subclasses of RuntimeError, and no damaged frame causes them.
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise
            # Stages raise RuntimeError for all errors; `_repair` raises it again if no frame causes it.
            except RuntimeError as error:
                # After a failure of the GPU, no frame can be decoded, so none is to blame. This raises
                # torch.AcceleratorError.
                if self.world.device.type == "cuda":
                    torch.cuda.synchronize(self.world.device)
                self._repair(decoding, error)

    def _repair(self, decoding: deque[_Batch], error: RuntimeError) -> None:
        """Replace the undecodable samples of the oldest batch, and submit all batches again, in order."""
        for _ in range(len(decoding) - 1):
            # An error in a later batch is raised again once that batch is the oldest.
            with suppress(RuntimeError):
                self._stage.collect()
        reason = "cannot be decoded (the file is damaged)"
        if self.index.storage == "clips":
            reason = "cannot be decoded with NVDEC (if the file is not damaged, set data.decoder=cpu)"
        batch, replaced = decoding[0], False
        for row in range(len(batch.pairs)):
            while (frame := self._undecodable_frame(batch, row)) is not None:
                replaced = True
                self._replace(batch, row, frame, reason)
                self._read(batch, row)
        if not replaced:
            raise error
        for batch in decoding:
            self._stage.submit(batch.pairs, batch.parameters)

    def _undecodable_frame(self, batch: _Batch, row: int) -> int | None:
        """Return the number of the frame that the stage cannot decode, or None."""
        # Images are decoded one by one to identify the damaged one. A clip contains all frames, so its first
        # frame is reported.
        clips, pair = self.index.storage == "clips", batch.pairs[row]
        pairs = [pair] if clips else [[stored] * len(pair) for stored in pair]
        for frame, one_pair in zip(batch.parameters["frames"][row], pairs, strict=False):
            self._stage.submit([one_pair], batch.parameters[row : row + 1])
            try:
                self._stage.collect()
            except RuntimeError:
                return int(frame)
        return None


def check_bad_fraction(bad: int, seen: int, limit: float, last: str) -> None:
    """Raise InputError if more than the fraction `limit` of all samples is unreadable."""
    if bad > limit * max(seen, MIN_SEEN):
        raise InputError(
            f"data.max_bad_fraction: {bad} of {seen} samples are unreadable, which exceeds the allowed "
            f"fraction of {limit:g}. Repair the data or raise the limit. Last unreadable sample: {last}"
        )


def decoding_threads(world: World) -> int:
    """Return the default number of decoding threads of a process.

    While a GPU trains, two other threads need a core each, or it waits for them: the main thread and that of
    the backward pass.
    """
    return max(1, world.cores - 2) if world.device.type == "cuda" else world.cores


def open_stage(
    recipe: Recipe, index: FrameIndex, device: torch.device, *, num_threads: int, depth: int
) -> GpuStage | HostStage | TorchGpuStage | TorchHostStage:
    """Return the stage for a device. `depth` batches will be submitted before the first `collect`."""
    if has_dali():
        # Imported on demand, because DALI is optional.
        from fasttrain.data.dali import GpuStage, HostStage

        if device.type == "cuda":
            return GpuStage(recipe, index, device, num_threads=num_threads, depth=depth)
        return HostStage(recipe, index, num_threads=num_threads, depth=depth)
    if device.type == "cuda":
        return TorchGpuStage(recipe, device, num_threads=num_threads)
    return TorchHostStage(recipe, num_threads=num_threads)


def calibration_frames(index: FrameIndex, image_size: int) -> Tensor:
    """Return some whole frames of the data (2, F, 3, S, S), normalised as in training.

    The second frames are the first ones in reverse order. Raises InputError if no frame is readable.
    """
    frames_F3SS = torch.stack(list(whole_frames(index, image_size, CALIBRATION_FRAMES)))
    return torch.stack((frames_F3SS, frames_F3SS.flip(0)))


def whole_frames(index: FrameIndex, image_size: int, count: int = MEAN_FRAMES) -> Iterator[Tensor]:
    """Yield up to `count` evenly spaced whole frames of the data (3, S, S), normalised as in training.

    Raises InputError if no frame is readable.
    """
    transform, readable, fault = FrameTransform(), False, ""
    ends = np.cumsum(index.num_frames)
    whole = np.array([([0.0, 0.0, 1.0, 1.0], False)], dtype=[("box", float, 4), ("flip", bool)])[0]
    for number in evenly_spaced(int(ends[-1]), count):
        video = int(np.searchsorted(ends, number, side="right"))
        out_3SS = torch.empty(3, image_size, image_size)
        try:
            frame = index.read_frame(video, number - int(ends[video]) + int(index.num_frames[video]))
            transform(frame, whole, out_3SS)
        except UnreadableFrameError as error:
            fault = f"{index.names[video]}: {error}"
            continue
        readable = True
        yield out_3SS
    if not readable:
        raise InputError(
            f"data.source: none of {count} frames can be read. Check that the data are undamaged. Last "
            f"unreadable frame: {fault}"
        )


def index_for_decoder(index: FrameIndex, decoder: str, device: torch.device) -> FrameIndex:
    """Return an index that reads frames in the form required by `decoder`, the value of data.decoder.

    Raises InputError if the device or the data do not suit the decoder.
    """
    if decoder != "mixed":
        return index
    use_cpu = "Set data.decoder to cpu (or to auto, which is the same in training)"
    if device.type != "cuda":
        raise InputError(
            f"data.decoder: 'mixed' decodes on the GPU, but the device is {device.type}. {use_cpu}."
        )
    if not has_dali():
        raise InputError(
            f"data.decoder: 'mixed' needs DALI, which is not installed. {use_cpu}, or run: {INSTALL_DALI}"
        )
    if not isinstance(index, VideoIndex):
        return index
    if not has_nvdec():
        raise InputError(
            "data.decoder: 'mixed' decodes video files with NVDEC, but the GPU driver does not provide it "
            f"(libnvcuvid.so.1). {use_cpu}, or pack the videos with `fasttrain pack`."
        )
    videos = dict(zip(index.names, index.videos, strict=True))
    for name, video in videos.items():
        if reason := nvdec_refusal(video):
            raise InputError(
                f"data.decoder: 'mixed' decodes video files with NVDEC, but {name!r} is unsuitable: "
                f"{reason}. {use_cpu}."
            )
    return ClipIndex(videos, index.skipped)
