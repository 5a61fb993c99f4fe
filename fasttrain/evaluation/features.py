"""Features of videos, extracted once: mean tokens per video or per frame, cached by content.

A feature is the mean over a frame's tokens of the L2-normalised tokens; a video's is the mean over its
frames. The cache holds one safetensors file per video and variant (before, after the projection). Its name is
a hash of all that the feature is a function of: the encoder and its weights, after it the projection's; which
frames, how large; and what is in the file. A second evaluation of the same videos decodes and encodes
nothing.

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
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional

from fasttrain.data.images import Frame, UnreadableFrameError
from fasttrain.data.index import FrameIndex, VideoIndex
from fasttrain.data.map_ahead import map_ahead
from fasttrain.data.sampling import evenly_spaced
from fasttrain.data.video import probe_video
from fasttrain.distributed import World
from fasttrain.errors import InputError, check_options
from fasttrain.evaluation.datasets import (
    LabelledVideo,
    StoredVideo,
    VideoSplit,
    add_video_arguments,
    read_split,
)
from fasttrain.evaluation.frames import centre_crop, stream_frames
from fasttrain.evaluation.model import EvaluatedModel
from fasttrain.files import os_reason, write_atomically
from fasttrain.loggers import Progress
from fasttrain.weights import hash_state_dict

# Part of every key: raise it when what is computed changes.
FORMAT = 2
# What is read of a video file to know it again, as fast as opening it.
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image-size", type=int, default=224, help="side of the middle crop (default: 224)")
    parser.add_argument(
        "--cache", type=Path, help="folder of extracted features, which tasks and runs may share; all "
        "processes must see it (default: cache in the output)"
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the encoder (default: fp32)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="frames encoded at a time (default: 32)")
    parser.add_argument("--workers", type=int, default=0, help="decoding threads; 0: the cores (default)")


def add_split_arguments(parser: argparse.ArgumentParser) -> None:
    """For `extract_split`."""
    add_video_arguments(parser)
    add_arguments(parser)
    parser.add_argument("--num-frames", type=int, default=16, help="evenly spaced, of a video (default: 16)")


@dataclass(frozen=True)
class Extracted:
    """What `extract` put into the cache; `load` reads it, since a data set may not fit in memory."""

    entries: Mapping[str, Mapping[str, Path]]
    """The files of the cache by video and variant."""
    num_frames: Mapping[str, int]
    """Frames of each whole video; its keys are the videos that can be read."""
    skipped: list[str]
    """`name: reason` of those that cannot."""

    def load(self, name: str, variant: str) -> Tensor:
        """Features (T, D) float32; T is 1 where frames are averaged."""
        return _load(self.entries[name][variant])["features"]

    def stack(self, videos: Sequence[LabelledVideo], variant: str) -> Tensor:
        """Features (V, D) of videos that have one each."""
        return torch.cat([self.load(video.name, variant) for video in videos])

    def readable(self, videos: Sequence[LabelledVideo]) -> list[LabelledVideo]:
        """The videos that have features. Raises InputError where none has."""
        found = [video for video in videos if video.name in self.num_frames]
        if not found:
            raise InputError(
                f"none of {len(videos)} videos of a list can be read: {'; '.join(self.skipped[:3])}"
            )
        return found


def class_numbers(videos: Sequence[LabelledVideo]) -> Tensor:
    """(V,) int64: the classes of videos that have one each."""
    return torch.tensor([video.label for video in videos])


def extract_split(
    arguments: argparse.Namespace, model: EvaluatedModel, output: Path, world: World
) -> tuple[VideoSplit, Extracted, dict[str, Any]] | None:
    """The split without the videos that cannot be read, the features, and facts for the JSON.

    None on all processes but the main one. Raises InputError as `read_split` does, and where no training or
    no test video can be read.
    """
    split = read_split(arguments)
    untrained = {video.label for video in split.test} - {video.label for video in split.train}
    if untrained:
        raise InputError(
            f"class {split.classes[min(untrained)]!r} has test videos, but no training videos "
            f"({len(untrained)} such classes); take both lists from one split"
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
    """Features of all videos; those that the cache lacks are computed.

    One feature for each video where `arguments` has `num_frames`, else one for every `stride`-th frame. Every
    process extracts its share; the main process gets everything, the others None. Raises InputError where
    `--image-size` does not fit the encoder.
    """
    check_options(arguments, num_frames=1, stride=1, batch_size=1, workers=0)
    model.encoder.grid(arguments.image_size, arguments.image_size)
    cache = arguments.cache or output / "cache"
    descriptions = {variant: _describe(model, arguments, variant) for variant in model.variants}
    encoding = Lock()

    def extract_one(name: str) -> tuple[dict[str, Path], int] | str:
        """The entries of a video by variant and its number of frames, or why it cannot be read."""
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
    found = map_ahead(extract_one, names, workers=arguments.workers or min(16, os.cpu_count() or 1))
    results = {}
    with Progress("videos", len(names), enabled=world.is_main) as progress:
        for name, result in zip(names, found, strict=True):
            results[name] = result
            progress.advance()
    merged = world.merge(results)
    if not world.is_main:
        return None
    readable = {name: result for name, result in merged.items() if not isinstance(result, str)}
    skipped = [f"{name}: {reason}" for name, reason in merged.items() if isinstance(reason, str)]
    if skipped:
        print(f"{len(skipped)} of {len(videos)} videos cannot be read and are skipped, such as {skipped[0]}")
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
    """Decode and encode a video: its features (T, D) by variant and its number of frames.

    Threads decode at the same time and encode one after another, under the lock `encoding`.
    """
    index, video = _open(path)
    num_frames = int(index.num_frames[video])
    frames = stream_frames(index, video, _choose(num_frames, arguments))
    pooled: dict[str, list[Tensor]] = {variant: [] for variant in variants}
    # A long video has more frames than fit in memory.
    while crops := [
        centre_crop(frame, arguments.image_size) for frame in islice(frames, arguments.batch_size)
    ]:
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
        return load_file(entry)
    except SafetensorError as error:
        raise InputError(f"cached features {entry} are damaged ({error}); delete the file") from error


def _describe(model: EvaluatedModel, arguments: argparse.Namespace, variant: str) -> str:
    """All but the video that a feature is a function of."""
    encoder = model.encoder
    heads = [block.attn.num_heads for block in encoder.blocks]
    parts = [FORMAT, encoder.name, encoder.weights_hash, encoder.image_size, heads, str(encoder)]
    sampling = ("num_frames", "stride", "image_size", "precision")
    parts += [getattr(arguments, name, None) for name in sampling]
    if variant == "after" and model.projection is not None:
        parts += [model.projection.head, hash_state_dict(model.projection.state_dict())]
    return repr(parts)


def _choose(length: int, arguments: argparse.Namespace) -> list[int]:
    """The frames that go into the features of a video of `length` frames."""
    if "num_frames" in arguments:
        return evenly_spaced(length, arguments.num_frames)
    return list(range(0, length, arguments.stride))


def _digest(path: StoredVideo, arguments: argparse.Namespace) -> bytes:
    """Digest of the frames that are used, byte by byte; of a video file its size and samples of its bytes.

    Raises OSError, UnreadableFrameError.
    """
    digest = hashlib.sha256()
    if isinstance(path, Path):
        # A buffer would read more than is asked for.
        with path.open("rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{size} bytes".encode())
            for sample in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    else:
        index, video = path
        digest.update(f"{index.num_frames[video]} frames".encode())
        for frame in _choose(int(index.num_frames[video]), arguments):
            (data,) = index.read(video, [frame])
            digest.update(f"{frame} {len(data)}\0".encode() + data.tobytes())
    return digest.digest()


def _open(path: StoredVideo) -> tuple[FrameIndex, int]:
    """The index that holds a video, and its number in it. Raises UnreadableFrameError."""
    return path if isinstance(path, tuple) else (VideoIndex({path.name: probe_video(path)}, []), 0)


def middle_frame(path: StoredVideo, num_frames: int) -> Frame:
    """The middle one of the frames that a video's feature is made of, (H, W, 3) uint8."""
    index, video = _open(path)
    frames = evenly_spaced(int(index.num_frames[video]), num_frames)
    return index.read_frame(video, frames[len(frames) // 2])
