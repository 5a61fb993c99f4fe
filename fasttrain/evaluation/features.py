"""Features of videos, extracted once: mean tokens per video or per frame, cached by content.

A feature is the mean over a frame's tokens of the L2-normalised tokens; a video's is the mean over its
frames. The cache holds one safetensors file per video and variant (before, after the projection), named by a
hash of all that the feature is a function of: encoder, weights and, after, the projection's; which frames,
how large; and what is in the file. Frame folders and packed sets are hashed by the frames that are used,
byte by byte; a video file by its size and 16 parts of 4 KiB from first to last, as fast as opening it. A run
that finds everything in the cache decodes nothing; a file of the cache that is damaged is made again.

Shape suffixes: T frames, H W pixels, N tokens, D channels.
"""

import argparse
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from fasttrain.data.images import UnreadableFrameError
from fasttrain.data.index import FolderIndex, FrameIndex, VideoIndex
from fasttrain.data.map_ahead import map_ahead
from fasttrain.data.packed import PackedIndex
from fasttrain.data.sampling import evenly_spaced
from fasttrain.data.sources import find_source
from fasttrain.data.video import probe_video, stream_video_frames
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.evaluation.frames import centre_crop
from fasttrain.evaluation.model import EvaluatedModel
from fasttrain.files import os_reason, write_atomically

Frame = npt.NDArray[np.uint8]
Precision = Literal["fp32", "bf16"]

# Part of every key: raise it when what is computed changes.
FORMAT = 1
THUMBNAIL_HEIGHT = 96
_PARTS, _PART_BYTES = 16, 1 << 12
# Frames that are decoded by one job; a longer video is several, which bounds memory.
_CHUNK = 64


@dataclass(frozen=True)
class PackedVideo:
    """A video of a packed set: where the set is open, and the video's number there."""

    index: PackedIndex
    video: int


# Where a video lies: a file or a folder of frames, or in a packed set.
Place = Path | PackedVideo


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which frames of a video go into its feature, and how."""

    pool: Literal["video", "frame"]
    """One feature for the video, with a thumbnail of its middle frame, or one for each frame."""
    num_frames: int | None
    """Evenly spread over the video; None: every `stride`-th."""
    stride: int
    image_size: int
    """Side of the middle crop in pixels."""
    precision: Precision = "fp32"
    """Of the encoder's and the projection's matrix products."""

    def choose(self, length: int) -> list[int]:
        return (
            list(range(0, length, self.stride))
            if self.num_frames is None
            else evenly_spaced(length, self.num_frames)
        )


@dataclass(frozen=True)
class VideoFeatures:
    """Features of one video at one variant."""

    features_TD: Tensor
    """float32; T is 1 where frames are pooled."""
    num_frames: int
    """Of the whole video."""
    thumbnail: bytes
    """JPEG of the middle frame; empty where frames are not pooled."""

    def picture(self) -> Frame:
        """The thumbnail (h, w, 3) uint8."""
        with Image.open(io.BytesIO(self.thumbnail)) as image:
            return np.asarray(image.convert("RGB"))


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


class FeatureStore:
    """The cache: reads and writes `VideoFeatures` by key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def load(self, key: str) -> VideoFeatures | None:
        """What was saved under the key; None where there is nothing, or nothing whole."""
        try:
            with safe_open(self.path(key), framework="pt") as file:
                metadata = file.metadata() or {}
                # A copy: the tensor itself would keep its file mapped, and a data set has too many.
                features_TD = file.get_tensor("features").clone()
                thumbnail = file.get_tensor("thumbnail").numpy().tobytes()
            found = VideoFeatures(features_TD, int(metadata["num_frames"]), thumbnail)
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        whole = metadata.get("key") == key and metadata.get("digest") == _digest(found)
        return found if whole else None

    def save(self, key: str, found: VideoFeatures) -> None:
        """Atomic: a reader sees the whole file or none."""
        thumbnail = torch.from_numpy(np.frombuffer(found.thumbnail, dtype=np.uint8).copy())
        tensors = {"features": found.features_TD.contiguous(), "thumbnail": thumbnail}
        about = {"key": key, "num_frames": str(found.num_frames), "digest": _digest(found)}
        write_atomically(self.path(key), save(tensors, about))


@dataclass(frozen=True)
class Extracted:
    """What `extract` put into the cache; loaded when asked for, since a data set may not fit in memory."""

    store: FeatureStore
    keys: Mapping[str, Mapping[str, str]]
    """By video and variant."""
    num_frames: Mapping[str, int]
    """Frames of each whole video; its keys are the videos that can be read."""
    skipped: list[str]
    """`name: reason` of those that cannot."""

    def load(self, name: str, variant: str) -> VideoFeatures:
        """Raises InputError where another process wrote to a folder that this one does not see."""
        found = self.store.load(self.keys[name][variant])
        if found is None:
            raise InputError(f"features of {name} are not in {self.store.folder}; all processes must see it")
        return found


def extract(
    videos: Mapping[str, Place],
    sampling: Sampling,
    model: EvaluatedModel,
    arguments: argparse.Namespace,
    output: Path,
    world: World,
) -> Extracted | None:
    """Features of all videos, those that are not in the cache computed.

    Every process extracts its share; the main one gets everything, the others None. Raises InputError where
    the sizes do not fit the encoder.
    """
    if sampling.stride < 1 or (sampling.num_frames is not None and sampling.num_frames < 1):
        raise InputError(f"{sampling.num_frames} frames, every {sampling.stride}-th: expected at least 1")
    if arguments.batch_size < 1 or arguments.workers < 0:
        raise InputError(
            f"--batch-size {arguments.batch_size}, --workers {arguments.workers}: expected at least 1 and 0"
        )
    model.encoder.grid(sampling.image_size, sampling.image_size)
    store = FeatureStore(arguments.cache or output / "cache")
    share = {name: videos[name] for name in world.shard(sorted(videos))}
    merged = world.merge(_Extractor(sampling, model, store, arguments).run(share, world))
    if not world.is_main:
        return None
    readable = {name: found for name, found in merged.items() if found["reason"] is None}
    extracted = Extracted(
        store,
        {name: found["keys"] for name, found in readable.items()},
        {name: found["num_frames"] for name, found in readable.items()},
        [f"{name}: {found['reason']}" for name, found in merged.items() if name not in readable],
    )
    if extracted.skipped:
        print(
            f"{len(extracted.skipped)} of {len(videos)} videos cannot be read and are skipped, such as "
            f"{extracted.skipped[0]}"
        )
    return extracted


@dataclass
class _Job:
    """One video on its way: what its files are called, and what is still to be computed."""

    name: str
    keys: dict[str, str]
    num_frames: int = 0
    wanted: tuple[str, ...] = ()
    index: FrameIndex | None = None
    video: int = 0
    frames: Sequence[int] = ()
    reason: str | None = None


@dataclass
class _Chunk:
    """Decoded frames of a job; the last one ends it."""

    job: _Job
    last: bool
    frames_T3HW: Tensor | None = None
    thumbnail: bytes = b""
    reason: str | None = None


class _Extractor:
    """Videos -> cached features: threads hash and decode ahead, this one encodes."""

    def __init__(
        self, sampling: Sampling, model: EvaluatedModel, store: FeatureStore, arguments: argparse.Namespace
    ) -> None:
        self.sampling, self.model, self.store = sampling, model, store
        self.batch_size = arguments.batch_size
        self.workers = arguments.workers or max(1, min(16, len(os.sched_getaffinity(0))))
        self.about = {variant: _describe(model, sampling, variant) for variant in model.variants}

    def run(self, videos: Mapping[str, Place], world: World) -> dict[str, dict[str, Any]]:
        """By name: each variant's key, the number of frames, the reason why it cannot be read or None."""
        results: dict[str, dict[str, Any]] = {}
        with _progress(len(videos), world) as advance:
            jobs = map_ahead(lambda item: self.prepare(*item), videos.items(), workers=self.workers)
            chunks = map_ahead(lambda work: work(), self.work(jobs), workers=self.workers, depth=self.workers)
            sums: dict[str, list[Tensor]] = {}
            reason, thumbnail = None, b""
            for chunk in chunks:
                reason, thumbnail = reason or chunk.reason, thumbnail or chunk.thumbnail
                if chunk.frames_T3HW is not None and reason is None:
                    for variant, pooled_TD in self.encode(chunk, world.device).items():
                        sums.setdefault(variant, []).append(pooled_TD)
                if chunk.last:
                    found = {"keys": chunk.job.keys, "num_frames": chunk.job.num_frames, "reason": reason}
                    results[chunk.job.name] = found
                    if reason is None:
                        self.finish(chunk.job, sums, thumbnail)
                    sums, reason, thumbnail = {}, None, b""
                    advance()
        return results

    def prepare(self, name: str, place: Place) -> _Job:
        """What is already in the cache, and the opened video if something is not."""
        try:
            content, frames = _identify(place, self.sampling)
        except OSError as error:
            return _Job(name, {}, reason=os_reason(error))
        except UnreadableFrameError as error:
            return _Job(name, {}, reason=str(error))
        keys = {variant: _hash(about, content) for variant, about in self.about.items()}
        cached = {variant: self.store.load(key) for variant, key in keys.items()}
        wanted = tuple(variant for variant, found in cached.items() if found is None)
        if not wanted:
            return _Job(name, keys, max(found.num_frames for found in cached.values() if found))
        try:
            index, video = _open(place)
        except UnreadableFrameError as error:
            return _Job(name, {}, reason=str(error))
        num_frames = int(index.num_frames[video])
        return _Job(name, keys, num_frames, wanted, index, video, frames or self.sampling.choose(num_frames))

    def work(self, jobs: Iterable[_Job]) -> Iterator[Callable[[], _Chunk]]:
        """Decoding jobs of all videos in order; a video from the cache is an empty one."""
        for job in jobs:
            if not job.wanted:
                yield partial(_Chunk, job, last=True, reason=job.reason)
                continue
            for start in range(0, len(job.frames), _CHUNK):
                yield partial(self.decode, job, start)

    def decode(self, job: _Job, start: int) -> _Chunk:
        numbers = job.frames[start : start + _CHUNK]
        chunk = _Chunk(job, last=start + _CHUNK >= len(job.frames))
        middle = job.frames[len(job.frames) // 2]
        assert job.index is not None
        crops = []
        try:
            for number, frame in zip(numbers, _stream(job.index, job.video, numbers), strict=True):
                crops.append(centre_crop(frame, self.sampling.image_size))
                if number == middle and self.sampling.pool == "video":
                    chunk.thumbnail = _thumbnail(frame)
            chunk.frames_T3HW = torch.stack(crops)
        except UnreadableFrameError as error:
            chunk.reason = f"frame {error.frame}: {error}"
        return chunk

    @torch.inference_mode()
    def encode(self, chunk: _Chunk, device: torch.device) -> dict[str, Tensor]:
        """Per wanted variant (T, D) on the CPU: each frame's mean of normalised tokens."""
        assert chunk.frames_T3HW is not None
        pooled: dict[str, list[Tensor]] = {variant: [] for variant in chunk.job.wanted}
        for frames_B3HW in chunk.frames_T3HW.split(self.batch_size):
            with torch.autocast(device.type, torch.bfloat16, enabled=self.sampling.precision == "bf16"):
                frozen_BND = self.model.encoder.tokens(frames_B3HW.to(device, non_blocking=True))
                tokens_BND = {"before": frozen_BND}
                if self.model.projection is not None and "after" in pooled:
                    tokens_BND["after"] = self.model.projection(frozen_BND)
            for variant, parts in pooled.items():
                normalised_BND = functional.normalize(tokens_BND[variant].float(), dim=-1)
                parts.append(normalised_BND.mean(dim=1).cpu())
        return {variant: torch.cat(parts) for variant, parts in pooled.items()}

    def finish(self, job: _Job, sums: dict[str, list[Tensor]], thumbnail: bytes) -> None:
        for variant, parts in sums.items():
            features_TD = torch.cat(parts)
            if self.sampling.pool == "video":
                features_TD = features_TD.mean(dim=0, keepdim=True)
            self.store.save(job.keys[variant], VideoFeatures(features_TD, job.num_frames, thumbnail))


def _describe(model: EvaluatedModel, sampling: Sampling, variant: str) -> str:
    """All but the video that a feature is a function of."""
    encoder = model.encoder
    heads = [block.attn.num_heads for block in encoder.blocks]
    parts = [FORMAT, encoder.name, encoder.weights_hash, encoder.image_size, heads, str(encoder)]
    parts.append(asdict(sampling))
    if variant == "after" and model.projection is not None:
        digest = hashlib.sha256(model.projection.head.encode())
        for name, tensor in sorted(model.projection.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        parts.append(digest.hexdigest())
    return repr(parts)


def _identify(place: Place, sampling: Sampling) -> tuple[bytes, list[int]]:
    """Digest of a video's content, and the frames that are used where they need no opening to be told.

    Raises OSError, UnreadableFrameError.
    """
    digest = hashlib.sha256()
    if isinstance(place, PackedVideo) or place.is_dir():
        index, video = _open(place)
        frames = sampling.choose(int(index.num_frames[video]))
        digest.update(f"{index.num_frames[video]} frames".encode())
        for frame in frames:
            try:
                (data,) = index.read(video, [frame])
            except UnreadableFrameError as error:
                raise UnreadableFrameError(f"frame {frame}: {error}", frame) from error
            digest.update(f"{frame} {len(data)}\0".encode() + data.tobytes())
        return digest.digest(), frames
    # A buffer would read more than is asked for.
    with place.open("rb", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(f"{size} bytes".encode())
        # Some downloads have their size from the first, and get their parts in any order.
        for part in range(_PARTS):
            file.seek(max(0, size - _PART_BYTES) * part // (_PARTS - 1))
            digest.update(file.read(_PART_BYTES))
    return digest.digest(), []


def _open(place: Place) -> tuple[FrameIndex, int]:
    """The index that holds a video, and its number there. Raises UnreadableFrameError."""
    if isinstance(place, PackedVideo):
        return place.index, place.video
    if not place.is_dir():
        return VideoIndex({place.name: probe_video(place)}, []), 0
    found = find_source(place, kind="folders").folders.get(place.resolve().name)
    if found is None:
        raise UnreadableFrameError("no jpg, jpeg or png in it")
    return FolderIndex({place.name: found}, []), 0


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


def _thumbnail(frame_HWC: Frame) -> bytes:
    image = Image.fromarray(frame_HWC)
    # A frame of a few rows would come out wider than a JPEG can be.
    width = min(max(1, round(image.width * THUMBNAIL_HEIGHT / image.height)), 4 * THUMBNAIL_HEIGHT)
    data = io.BytesIO()
    image.resize((width, THUMBNAIL_HEIGHT)).save(data, "JPEG", quality=85)
    return data.getvalue()


def _digest(found: VideoFeatures) -> str:
    return hashlib.sha256(found.features_TD.contiguous().numpy().tobytes() + found.thumbnail).hexdigest()


def _hash(about: str, content: bytes) -> str:
    return hashlib.sha256(about.encode() + content).hexdigest()


@contextmanager
def _progress(total: int, world: World) -> Iterator[Callable[[], None]]:
    """What to call after each video: a bar on the main process's terminal, a line per tenth elsewhere."""
    bar = Progress(
        TextColumn("[bold]videos"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        disable=not (world.is_main and Console().is_terminal),
    )
    done = 0
    with bar:
        task = bar.add_task("videos", total=total)

        def advance() -> None:
            nonlocal done
            done += 1
            bar.advance(task)
            if bar.disable and world.is_main and done * 10 // total > (done - 1) * 10 // total:
                print(f"features of {done} of {total} videos", flush=True)

        yield advance
