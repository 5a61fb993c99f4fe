"""Extract the features of videos, one per video or one per frame, and cache them on disk.

The feature of a frame is the mean of its L2-normalised tokens, that of a video the mean over its frames. The
cache has one safetensors file per video and variant. A file's name is a hash of everything that determines
the feature: the encoder and its weights, the projection (for `after`), the choice and size of the frames, and
the content of the video. A second evaluation of the same videos therefore need not decode or encode anything.

Shape suffixes: V videos, T frames, H W pixels, N tokens, D channels.
"""

import argparse
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional

from fasttrain.data.images import Frame, UnreadableFrameError
from fasttrain.data.index import FrameIndex, VideoIndex
from fasttrain.data.map_ahead import map_ahead
from fasttrain.data.preprocessing import centre_crop, stream_frames
from fasttrain.data.sampling import evenly_spaced
from fasttrain.data.video import probe_video
from fasttrain.distributed import World
from fasttrain.encoder_options import EvaluatedModel
from fasttrain.errors import InputError, check_options
from fasttrain.evaluation.datasets import (
    LabelledVideo,
    StoredVideo,
    VideoSplit,
    read_split,
)
from fasttrain.files import os_reason, write_atomically
from fasttrain.loggers import Progress, say
from fasttrain.weights import hash_state_dict

# Part of every cache key. Increase it when the computation changes.
FORMAT = 2
# A video file is identified by its size and this many chunks; hashing the whole file would be slow.
_CHUNKS, _CHUNK_BYTES = 16, 1 << 12


@dataclass(frozen=True)
class Extracted:
    """The cached features of a set of videos. They are loaded on demand, since they may not fit in memory."""

    entries: Mapping[str, Mapping[str, Path]]
    """Cache files by video and variant."""
    num_frames: Mapping[str, int]
    """The number of frames of each readable video."""
    skipped: list[str]
    """`name: reason` for each unreadable video."""

    def load(self, name: str, variant: str) -> Tensor:
        """Load the features (T, D) float32 of a video. T is 1 if they are averaged over frames."""
        return _load(self.entries[name][variant])["features"]

    def stack(self, videos: Sequence[LabelledVideo], variant: str) -> Tensor:
        """Load the features (V, D) of videos that have one feature each."""
        return torch.cat([self.load(video.name, variant) for video in videos])

    def readable(self, videos: Sequence[LabelledVideo]) -> list[LabelledVideo]:
        """Return the readable videos of a list. Raises InputError if there are none."""
        readable = [video for video in videos if video.name in self.num_frames]
        if not readable:
            raise InputError(
                f"none of the {len(videos)} videos in a list is readable: {'; '.join(self.skipped[:3])}"
            )
        return readable


def class_numbers(videos: Sequence[LabelledVideo]) -> Tensor:
    """Return the class numbers (V,) int64 of videos that have one label each."""
    return torch.tensor([video.label for video in videos])


def extract_split(
    arguments: argparse.Namespace, model: EvaluatedModel, output: Path, world: World
) -> tuple[VideoSplit, Extracted, dict[str, Any]] | None:
    """Read the lists of videos and extract their features.

    Returns the split without unreadable videos, the features and the `data` entry of the JSON file on the
    main process, and None on the others. Raises InputError as `read_split` does, if a class has test videos
    but no training videos, and if all videos of a list are unreadable.
    """
    split = read_split(arguments)
    untrained = {video.label for video in split.test} - {video.label for video in split.train}
    if untrained:
        raise InputError(
            f"class {split.classes[min(untrained)]!r} has test videos but no training videos "
            f"({len(untrained)} in total). Pass two lists of the same split."
        )
    videos = {video.name: video.path for video in (*split.train, *split.test)}
    extracted = extract(videos, arguments, model, output, world)
    if extracted is None:
        return None
    train, test = extracted.readable(split.train), extracted.readable(split.test)
    data = {
        "layout": split.layout,
        "classes": len(split.classes),
        "train_videos": len(train),
        "test_videos": len(test),
        "missing": split.missing,
        "skipped": extracted.skipped,
    }
    return replace(split, train=train, test=test), extracted, data


def extract(
    videos: Mapping[str, StoredVideo],
    arguments: argparse.Namespace,
    model: EvaluatedModel,
    output: Path,
    world: World,
) -> Extracted | None:
    """Return the features of all videos, extracting those that are not cached.

    A video has one feature if `arguments` has `num_frames`, and otherwise one for every `stride`-th frame.
    Every process extracts its share; the main process returns all features, the others None. Raises
    InputError if `--image-size` does not fit the encoder.
    """
    check_options(arguments, num_frames=1, stride=1, batch_size=1, workers=0)
    model.encoder.grid(arguments.image_size, arguments.image_size)
    cache = arguments.cache or output.parent / "cache"
    descriptions = {variant: _describe(model, arguments, variant) for variant in model.variants}
    encoding = Lock()

    def extract_one(name: str) -> tuple[dict[str, Path], int] | str:
        """Return a video's cache files by variant and its number of frames, or why it is unreadable."""
        try:
            content = _digest(videos[name], arguments)
            entries = {}
            for variant, description in descriptions.items():
                key = hashlib.sha256(description.encode() + content).hexdigest()
                entries[variant] = cache / key[:2] / f"{key}.safetensors"
            missing = {variant: entry for variant, entry in entries.items() if not entry.exists()}
            if not missing:
                return entries, int(_load(next(iter(entries.values())))["num_frames"])
            features, num_frames = _encode(videos[name], missing, arguments, model, world.device, encoding)
        except OSError as error:
            return os_reason(error)
        except UnreadableFrameError as error:
            return f"frame {error.frame}: {error}" if error.frame else str(error)
        for variant, entry in missing.items():
            tensors = {"features": features[variant], "num_frames": torch.tensor(num_frames)}
            write_atomically(entry, save(tensors))
        return entries, num_frames

    names = world.shard(sorted(videos))
    extracted = map_ahead(extract_one, names, workers=arguments.workers or min(16, os.cpu_count() or 1))
    results = {}
    with Progress("videos", len(names), enabled=world.is_main) as progress:
        for name, result in zip(names, extracted, strict=True):
            results[name] = result
            progress.advance()
    merged = world.merge(results)
    if not world.is_main:
        return None
    readable = {name: result for name, result in merged.items() if not isinstance(result, str)}
    skipped = [f"{name}: {reason}" for name, reason in merged.items() if isinstance(reason, str)]
    if skipped:
        say(f"skipped unreadable videos: {len(skipped)} of {len(videos)} (for example {skipped[0]})")
    return Extracted(
        entries={name: entries for name, (entries, _) in readable.items()},
        num_frames={name: num_frames for name, (_, num_frames) in readable.items()},
        skipped=skipped,
    )


def _encode(
    path: StoredVideo,
    variants: Iterable[str],
    arguments: argparse.Namespace,
    model: EvaluatedModel,
    device: torch.device,
    encoding: Lock,
) -> tuple[dict[str, Tensor], int]:
    """Decode and encode a video. Returns its features (T, D) by variant and its number of frames.

    Threads decode concurrently, but encode one at a time, holding the lock `encoding`.
    """
    index, video = _open(path)
    num_frames = int(index.num_frames[video])
    frames = stream_frames(index, video, _choose(num_frames, arguments))
    pooled: dict[str, list[Tensor]] = {variant: [] for variant in variants}
    # Decode in batches, because the frames of a long video do not fit in memory.
    side, mean, std = arguments.image_size, model.encoder.mean, model.encoder.std
    while crops := [centre_crop(frame, side, mean, std) for frame in islice(frames, arguments.batch_size)]:
        with encoding:
            with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16"):
                tokens_BND = model.tokens(torch.stack(crops).to(device))
            for variant, parts in pooled.items():
                parts.append(functional.normalize(tokens_BND[variant], dim=-1).mean(dim=1).cpu())
    features = {variant: torch.cat(parts) for variant, parts in pooled.items()}
    if "num_frames" in arguments:
        features = {
            variant: features_TD.mean(dim=0, keepdim=True) for variant, features_TD in features.items()
        }
    return features, num_frames


def _load(entry: Path) -> dict[str, Tensor]:
    try:
        # `load_file` would describe every error of the disk as a missing file.
        return load(entry.read_bytes())
    except SafetensorError as error:
        raise InputError(f"cached features '{entry}' are damaged ({error}). Delete the file.") from error
    except OSError as error:
        raise InputError(f"cached features '{entry}' cannot be read ({os_reason(error)})") from error


def _describe(model: EvaluatedModel, arguments: argparse.Namespace, variant: str) -> str:
    """Describe everything that determines a feature, except for the video."""
    encoder = model.encoder
    parts = [FORMAT, encoder.name, encoder.weights_hash, encoder.image_size, encoder.num_heads, str(encoder)]
    parts += [encoder.mean, encoder.std]
    sampling = ("num_frames", "stride", "image_size", "precision")
    parts += [getattr(arguments, name, None) for name in sampling]
    if variant == "after" and model.projection is not None:
        parts += [model.projection.head, hash_state_dict(model.projection.state_dict())]
    return repr(parts)


def _choose(length: int, arguments: argparse.Namespace) -> list[int]:
    """Return the numbers of the frames to encode of a video with `length` frames."""
    if "num_frames" in arguments:
        return evenly_spaced(length, arguments.num_frames)
    return list(range(0, length, arguments.stride))


def _digest(path: StoredVideo, arguments: argparse.Namespace) -> bytes:
    """Hash the encoded bytes of the chosen frames, or the size and some chunks of a video file.

    Raises OSError or UnreadableFrameError if the video is unreadable.
    """
    digest = hashlib.sha256()
    if isinstance(path, Path):
        # Unbuffered, because a buffer would read more than each chunk.
        with path.open("rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{size} bytes".encode())
            for chunk in range(_CHUNKS):
                file.seek(max(0, size - _CHUNK_BYTES) * chunk // (_CHUNKS - 1))
                digest.update(file.read(_CHUNK_BYTES))
    else:
        index, video = path
        digest.update(f"{index.num_frames[video]} frames".encode())
        for frame in _choose(int(index.num_frames[video]), arguments):
            (data,) = index.read(video, [frame])
            digest.update(f"{frame} {len(data)}\0".encode() + data.tobytes())
    return digest.digest()


def _open(path: StoredVideo) -> tuple[FrameIndex, int]:
    """Open a video. Returns an index and the video's position in it. Raises UnreadableFrameError."""
    return path if isinstance(path, tuple) else (VideoIndex({path.name: probe_video(path)}, []), 0)


def middle_frame(path: StoredVideo, num_frames: int) -> Frame:
    """Read the middle one of the frames that a video's feature is computed from, (H, W, 3) uint8."""
    index, video = _open(path)
    frames = evenly_spaced(int(index.num_frames[video]), num_frames)
    return index.read_frame(video, frames[len(frames) // 2])
