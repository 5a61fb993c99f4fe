"""Features of videos, extracted once: mean tokens per video or per frame, cached by content.

A feature is the mean over a frame's tokens of the L2-normalised tokens; a video's is the mean over its
frames. The cache holds one safetensors file per video and variant (before, after the projection), named by a
hash of all that the feature is a function of: the encoder and its weights, after it the projection's; which
frames, how large; and what is in the file. A second evaluation of the same videos decodes and encodes
nothing. An entry that is damaged is made again.

Shape suffixes: V videos, T frames, H W pixels, N tokens, D channels.
"""

import argparse
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional

from fasttrain.data.images import UnreadableFrameError
from fasttrain.data.index import FolderIndex, FrameIndex, VideoIndex
from fasttrain.data.map_ahead import map_ahead
from fasttrain.data.sampling import evenly_spaced
from fasttrain.data.sources import find_source
from fasttrain.data.video import probe_video, stream_video_frames
from fasttrain.distributed import World
from fasttrain.errors import InputError, check_options
from fasttrain.evaluation.datasets import (
    LabelledVideo,
    PackedVideo,
    VideoPath,
    VideoSplit,
    add_video_arguments,
    read_videos,
)
from fasttrain.evaluation.frames import centre_crop
from fasttrain.evaluation.model import EvaluatedModel
from fasttrain.files import os_reason, write_atomically
from fasttrain.loggers import Progress
from fasttrain.weights import hash_state_dict

Frame = npt.NDArray[np.uint8]
Precision = Literal["fp32", "bf16"]

# Part of every key: raise it when what is computed changes.
FORMAT = 2
# What is read of a video file to know it again, as fast as opening it.
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 12
# Frames that are decoded at a time: a long video may have 10,000, which fit in no memory.
_CHUNK = 64


class Named(Protocol):
    """What has the name of a video."""

    @property
    def name(self) -> str: ...


Video = TypeVar("Video", bound=Named)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which frames of a video go into its features, and how."""

    num_frames: int | None
    """Evenly spaced over the video, averaged to one feature; None: a feature for every `stride`-th frame."""
    stride: int
    image_size: int
    """Side of the middle crop in pixels."""
    precision: Precision
    """Of the encoder's and the projection's matrix products."""

    def choose(self, length: int) -> list[int]:
        if self.num_frames is None:
            return list(range(0, length, self.stride))
        return evenly_spaced(length, self.num_frames)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image-size", type=int, default=224, help="side of the middle crop (default: 224)")
    parser.add_argument(
        "--cache", type=Path, help="folder of extracted features, which tasks and runs may share; all "
        "processes must see it (default: cache in the output)"
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=get_args(Precision), default="fp32",
        help="of the encoder, part of what the cache goes by (default: fp32)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=32, help="frames encoded at a time (default: 32)")
    parser.add_argument("--workers", type=int, default=0, help="decoding threads; 0: the cores (default)")


def add_split_arguments(parser: argparse.ArgumentParser) -> None:
    """For `extract_split`."""
    add_video_arguments(parser)
    add_arguments(parser)
    parser.add_argument(
        "--num-frames", type=int, default=16, help="evenly spaced over each video (default: 16)"
    )


class FeatureCache:
    """Files of features and of the length of the video, by key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def load(self, key: str) -> tuple[Tensor, int] | None:
        """Features (T, D) float32 and the number of frames; None where there is no whole entry."""
        try:
            entry = load(self.path(key).read_bytes())
            return entry["features"], int(entry["num_frames"])
        except (OSError, SafetensorError, KeyError):
            return None

    def save(self, key: str, features_TD: Tensor, num_frames: int) -> None:
        entry = {"features": features_TD.contiguous(), "num_frames": torch.tensor(num_frames)}
        write_atomically(self.path(key), save(entry))


@dataclass(frozen=True)
class Extracted:
    """What `extract` put into the cache; loaded when asked for, since a data set may not fit in memory."""

    cache: FeatureCache
    keys: Mapping[str, Mapping[str, str]]
    """By video and variant."""
    num_frames: Mapping[str, int]
    """Frames of each whole video; its keys are the videos that can be read."""
    skipped: list[str]
    """`name: reason` of those that cannot."""

    def load(self, name: str, variant: str) -> Tensor:
        """Features (T, D) float32; T is 1 where frames are averaged."""
        found = self.cache.load(self.keys[name][variant])
        if found is None:
            raise InputError(f"features of {name} are not in {self.cache.folder}; all processes must see it")
        return found[0]

    def stack(self, videos: Sequence[LabelledVideo], variant: str) -> Tensor:
        """Features (V, D) of videos that have one each."""
        return torch.cat([self.load(video.name, variant) for video in videos])

    def readable(self, videos: Sequence[Video]) -> list[Video]:
        """The videos that have features. Raises InputError where none has."""
        found = [video for video in videos if video.name in self.num_frames]
        if not found:
            raise InputError(
                f"none of {len(videos)} videos of a list can be read: {'; '.join(self.skipped[:3])}"
            )
        return found


def extract_split(
    arguments: argparse.Namespace, model: EvaluatedModel, output: Path, world: World
) -> tuple[VideoSplit, Extracted, dict[str, Any]] | None:
    """The split without the videos that cannot be read, the features, and facts for the JSON.

    On the main process; None on the others. Raises InputError as `read_videos` does, and where no training or
    no test video can be read.
    """
    split = read_videos(arguments)
    videos = {video.name: video.path for video in (*split.train, *split.test)}
    extracted = extract(videos, arguments, model, output, world)
    if extracted is None:
        return None
    split = replace(split, train=extracted.readable(split.train), test=extracted.readable(split.test))
    return split, extracted, {**split.describe(), "skipped": extracted.skipped}


def extract(
    videos: Mapping[str, VideoPath],
    arguments: argparse.Namespace,
    model: EvaluatedModel,
    output: Path,
    world: World,
) -> Extracted | None:
    """Features of all videos, those that are not in the cache computed.

    One feature a video where `arguments` has `num_frames`, else one for every `stride`-th frame. Every
    process extracts its share; the main one gets everything, the others None. Raises InputError where the
    sizes do not fit the encoder.
    """
    sampling = Sampling(
        num_frames=getattr(arguments, "num_frames", None),
        stride=getattr(arguments, "stride", 1),
        image_size=arguments.image_size,
        precision=arguments.precision,
    )
    check_options(arguments, num_frames=1, stride=1, batch_size=1, workers=0)
    model.encoder.grid(sampling.image_size, sampling.image_size)
    cache = FeatureCache(arguments.cache or output / "cache")
    extractor = _Extractor(sampling, model, cache, arguments)
    share = {name: videos[name] for name in world.shard(sorted(videos))}
    merged = world.merge(extractor.run(share, world))
    if not world.is_main:
        return None
    extracted = Extracted(
        cache,
        {name: keys for name, (keys, _, _) in merged.items()},
        {name: num_frames for name, (_, num_frames, reason) in merged.items() if reason is None},
        [f"{name}: {reason}" for name, (_, _, reason) in merged.items() if reason is not None],
    )
    if extracted.skipped:
        print(
            f"{len(extracted.skipped)} of {len(videos)} videos cannot be read and are skipped, such as "
            f"{extracted.skipped[0]}"
        )
    return extracted


@dataclass(eq=False)
class _Video:
    """A video on its way through the extractor."""

    name: str
    keys: dict[str, str] = field(default_factory=dict)
    """Of its entries in the cache, by variant."""
    uncached: tuple[str, ...] = ()
    """The variants that are still to be computed."""
    num_frames: int = 0
    index: FrameIndex | None = None
    number: int = 0
    """In the index."""
    frames: Sequence[int] = ()
    """To be decoded."""
    reason: str | None = None
    """Why it cannot be read."""


class _Extractor:
    """Videos -> cached features: threads hash and decode ahead, this one encodes."""

    def __init__(
        self, sampling: Sampling, model: EvaluatedModel, cache: FeatureCache, arguments: argparse.Namespace
    ) -> None:
        self.sampling, self.model, self.cache = sampling, model, cache
        self.batch_size = arguments.batch_size
        self.workers = arguments.workers or min(16, os.cpu_count() or 1)
        self.descriptions = {variant: _describe(model, sampling, variant) for variant in model.variants}

    def run(
        self, videos: Mapping[str, VideoPath], world: World
    ) -> dict[str, tuple[dict[str, str], int, str | None]]:
        """By name: each variant's key, the number of frames, the reason why it cannot be read or None."""
        results = {}
        prepared = map_ahead(self.prepare, videos.items(), workers=self.workers)
        decoded = map_ahead(self.decode, self.chunks(prepared), workers=self.workers, depth=self.workers)
        with Progress("videos", len(videos), enabled=world.is_main) as progress:
            for video, chunks in groupby(decoded, itemgetter(0)):
                pooled: dict[str, list[Tensor]] = {variant: [] for variant in video.uncached}
                for _, frames_T3HW in chunks:
                    if isinstance(frames_T3HW, str):
                        video.reason = video.reason or frames_T3HW
                    elif frames_T3HW is not None and video.reason is None:
                        self.encode(frames_T3HW, pooled, world.device)
                if video.reason is None:
                    self.save(video, pooled)
                results[video.name] = video.keys, video.num_frames, video.reason
                progress.advance()
        return results

    def prepare(self, item: tuple[str, VideoPath]) -> _Video:
        """Look into the cache, and open the video if something is not there."""
        name, path = item
        video = _Video(name)
        try:
            content = _digest(path, self.sampling)
            for variant, description in self.descriptions.items():
                key = video.keys[variant] = hashlib.sha256(description.encode() + content).hexdigest()
                cached = self.cache.load(key)
                if cached is None:
                    video.uncached += (variant,)
                else:
                    video.num_frames = cached[1]
            if video.uncached:
                video.index, video.number = _open(path)
                video.num_frames = int(video.index.num_frames[video.number])
                video.frames = self.sampling.choose(video.num_frames)
        except OSError as error:
            video.reason = os_reason(error)
        except UnreadableFrameError as error:
            video.reason = str(error)
        return video

    def chunks(self, videos: Iterable[_Video]) -> Iterator[tuple[_Video, Sequence[int]]]:
        """The frames to be decoded; a video without any has one empty chunk."""
        for video in videos:
            for start in range(0, max(1, len(video.frames)), _CHUNK):
                yield video, video.frames[start : start + _CHUNK]

    def decode(self, chunk: tuple[_Video, Sequence[int]]) -> tuple[_Video, Tensor | str | None]:
        """Crops (T, 3, H, W) of the frames, or why one cannot be read; None for no frames."""
        video, frames = chunk
        if video.index is None or not frames:
            return video, None
        try:
            decoded = _stream(video.index, video.number, frames)
            return video, torch.stack([centre_crop(frame, self.sampling.image_size) for frame in decoded])
        except UnreadableFrameError as error:
            return video, f"frame {error.frame}: {error}"

    @torch.inference_mode()
    def encode(self, frames_T3HW: Tensor, pooled: dict[str, list[Tensor]], device: torch.device) -> None:
        """Add each frame's mean of normalised tokens (T, D), on the CPU, to every variant's."""
        for frames_B3HW in frames_T3HW.split(self.batch_size):
            with torch.autocast(device.type, torch.bfloat16, enabled=self.sampling.precision == "bf16"):
                frozen_BND = self.model.encoder.tokens(frames_B3HW.to(device, non_blocking=True))
                tokens_BND = {"before": frozen_BND}
                if self.model.projection is not None and "after" in pooled:
                    tokens_BND["after"] = self.model.projection(frozen_BND)
            for variant, parts in pooled.items():
                normalised_BND = functional.normalize(tokens_BND[variant].float(), dim=-1)
                parts.append(normalised_BND.mean(dim=1).cpu())

    def save(self, video: _Video, pooled: dict[str, list[Tensor]]) -> None:
        for variant, parts in pooled.items():
            features_TD = torch.cat(parts)
            if self.sampling.num_frames is not None:
                features_TD = features_TD.mean(dim=0, keepdim=True)
            self.cache.save(video.keys[variant], features_TD, video.num_frames)


def _describe(model: EvaluatedModel, sampling: Sampling, variant: str) -> str:
    """All but the video that a feature is a function of."""
    encoder = model.encoder
    heads = [block.attn.num_heads for block in encoder.blocks]
    parts = [FORMAT, encoder.name, encoder.weights_hash, encoder.image_size, heads, str(encoder)]
    parts.append(asdict(sampling))
    if variant == "after" and model.projection is not None:
        parts += [model.projection.head, hash_state_dict(model.projection.state_dict())]
    return repr(parts)


def _digest(path: VideoPath, sampling: Sampling) -> bytes:
    """Digest of the frames that are used, byte by byte; of a video file its size and samples of its bytes.

    Raises OSError, UnreadableFrameError.
    """
    digest = hashlib.sha256()
    if isinstance(path, Path) and not path.is_dir():
        # A buffer would read more than is asked for.
        with path.open("rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{size} bytes".encode())
            for sample in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
        return digest.digest()
    index, video = _open(path)
    frames = sampling.choose(int(index.num_frames[video]))
    digest.update(f"{index.num_frames[video]} frames".encode())
    for frame in frames:
        try:
            (data,) = index.read(video, [frame])
        except UnreadableFrameError as error:
            raise UnreadableFrameError(f"frame {frame}: {error}", frame) from error
        digest.update(f"{frame} {len(data)}\0".encode() + data.tobytes())
    return digest.digest()


def _open(path: VideoPath) -> tuple[FrameIndex, int]:
    """The index that holds a video, and its number there. Raises UnreadableFrameError."""
    if isinstance(path, PackedVideo):
        return path.index, path.video
    if not path.is_dir():
        return VideoIndex({path.name: probe_video(path)}, []), 0
    found = find_source(path, kind="folders").folders.get(path.resolve().name)
    if found is None:
        raise UnreadableFrameError("no jpg, jpeg or png in it")
    return FolderIndex({path.name: found}, []), 0


def _stream(index: FrameIndex, video: int, frames: Sequence[int]) -> Iterator[Frame]:
    """Ascending frames (H, W, 3) uint8, one at a time; a video file is opened once for all."""
    if isinstance(index, VideoIndex):
        yield from stream_video_frames(index.videos[video], frames)
        return
    for frame in frames:
        try:
            yield index.read_frame(video, frame)
        except UnreadableFrameError as error:
            raise UnreadableFrameError(str(error), frame) from error


def middle_frame(path: VideoPath, num_frames: int) -> Frame:
    """The one in the middle of the frames that a video's feature is made of, (H, W, 3) uint8."""
    index, video = _open(path)
    frames = evenly_spaced(int(index.num_frames[video]), num_frames)
    return index.read_frame(video, frames[len(frames) // 2])
