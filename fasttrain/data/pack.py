"""Pack videos or frame folders into tar shards of JPEG frames with random access.

    fasttrain pack SOURCE DESTINATION              pack; run it again to continue where it stopped
    fasttrain pack SOURCE DESTINATION --shard 1/4  the first of four machines that share the work
    fasttrain pack --check DESTINATION             verify every frame of a packed set
    fasttrain RECIPE data.source=DESTINATION       train on it

Any WebDataset reader takes the shards; training reads two byte ranges per pair. What could not be read is
listed, with the reason, in DESTINATION/pack-IofN.json. A run may be stopped at any time (Ctrl-C, SIGTERM, a
power cut): no file is ever half written, and the same command continues to the same bytes.

Several machines: each runs the same command on the same SOURCE with its own --shard I/N, into one shared
DESTINATION, or into a folder of its own: copy these into one then.

Frames keep their order; of --frames K, the first and the last are kept. A JPEG that is small enough keeps its
bytes. A frame folder's unreadable frames are left out, a video that cannot be decoded to its end is left out
whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import av
import numpy as np
import torch
from PIL import ExifTags, Image

from fasttrain.data.images import Bytes, Frame, UnreadableFrameError, decode_image, read_encoded
from fasttrain.data.index import Skipped
from fasttrain.data.map_ahead import map_ahead
from fasttrain.data.nvdec import cut_clip, has_nvdec, nvdec_refusal, rgb_correction
from fasttrain.data.packed import (
    FORMAT,
    FRAME,
    TAR_BLOCK,
    Part,
    ShardIndex,
    check_shard,
    finished_parts,
    tar_header,
)
from fasttrain.data.sampling import evenly_spaced
from fasttrain.data.sources import Found, Kind, find_source
from fasttrain.data.video import VideoInfo, probe_video, stream_video_frames
from fasttrain.errors import InputError, check_options
from fasttrain.files import file_lock, open_atomically, write_atomically
from fasttrain.loggers import Progress, say

# Frames that the GPU decodes at once; a clip of 1080p frames then takes 400 MB.
GPU_FRAMES = 64
# Bad files that are named on the terminal; all are listed in the manifest.
MAX_NAMED = 20


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """What decides the bytes of a packed set."""

    frames: int = 0
    """Frames kept of each video, evenly spaced; 0 keeps all."""
    short_side: int = 256
    """Short side of a frame in pixels; smaller frames are left as they are."""
    quality: int = 90
    """JPEG quality, 1..100."""
    shard_bytes: int = 2**30
    """A shard is closed after the video that takes it past so many bytes."""
    decoder: Literal["pyav", "nvdec"] = "pyav"


class EncodedVideo(NamedTuple):
    """A video's frames as JPEG, none where it cannot be read, and what of it could not be read."""

    name: str
    frames: list[bytes]
    skipped: Skipped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        help="a folder with frame folders or video files at any depth, a video file, or a text file with a "
        "frame folder or a video file per line; with --check a packed set",
    )
    parser.add_argument("destination", type=Path, nargs="?", help="folder for the shards")
    kinds = ("auto", "folders", "list", "videos")
    parser.add_argument("--kind", choices=kinds, default="auto", help="how to read the source (auto: look)")
    for option, metavar, default, meaning in (
        ("--frames", "K", PackOptions.frames, "frames kept of a video, evenly spaced; 0: all"),
        ("--short-side", "PIXELS", PackOptions.short_side, "larger frames get this short side"),
        ("--quality", "Q", PackOptions.quality, "JPEG quality, 1 to 100"),
        ("--shard-size", "MB", PackOptions.shard_bytes >> 20, "a shard ends with the video that fills it"),
        ("--workers", "N", 0, "videos encoded at once, each in memory as JPEG; 0: one per core"),
    ):
        help = f"{meaning} ({default})"
        parser.add_argument(option, metavar=metavar, default=default, type=int, help=help)
    shard = "pack part I of N, from 1: N machines share the work (1/1)"
    parser.add_argument("--shard", metavar="I/N", default="1/1", type=_shard, help=shard)
    parser.add_argument(
        "--decoder",
        choices=("auto", "cpu", "gpu"),
        default="auto",
        help="decode videos with PyAV, or with the GPU's NVDEC through DALI (auto: NVDEC where there is one)",
    )
    parser.add_argument("--check", action="store_true", help="verify the packed set SOURCE, every frame")


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 1 to N, such as 2/4")
    return int(number), int(count)


def run(args: argparse.Namespace) -> None:
    """Pack or check, as the arguments say. Raises InputError."""
    check_options(args, frames=0, short_side=16, quality=1, shard_size=1, workers=0)
    if args.quality > 100:
        raise InputError(f"--quality {args.quality}: expected at most 100")
    workers = args.workers or len(os.sched_getaffinity(0))
    if args.check:
        say(f"{args.source}: {check(args.source, workers=workers)} frames, each as it was packed")
        return
    if args.destination is None:
        raise InputError("pack needs a DESTINATION folder: fasttrain pack SOURCE DESTINATION")
    has_dali = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
    has_gpu = torch.cuda.is_available() and has_nvdec() and has_dali
    if args.decoder == "gpu" and not has_gpu:
        raise InputError(
            "--decoder=gpu needs a GPU, a driver with NVDEC (libnvcuvid.so.1) and DALI; use auto or cpu"
        )
    options = PackOptions(
        frames=args.frames,
        short_side=args.short_side,
        quality=args.quality,
        shard_bytes=args.shard_size * 2**20,
        decoder="nvdec" if has_gpu and args.decoder != "cpu" else "pyav",
    )
    try:
        pack(args.source, args.destination, options, kind=args.kind, shard=args.shard, workers=workers)
    except KeyboardInterrupt:
        say(f"stopped; the same command continues from the last finished shard in {args.destination}")
        raise


def pack(
    source: Path,
    destination: Path,
    options: PackOptions,
    *,
    kind: Kind = "auto",
    shard: tuple[int, int] = (1, 1),
    workers: int = 1,
) -> None:
    """Write one part of a packed set, or what is missing of it. Raises InputError.

    The bytes follow from the source and the options alone.
    """
    found = find_source(source, kind=kind)
    part = Part(destination, *shard)
    names = sorted(found.folders or found.videos)[part.number - 1 :: part.count]
    if not names and part.number == 1:
        raise InputError(f"nothing in {source} to pack; expected frame folders or video files")
    identity = {**dataclasses.asdict(options), "source": _digest(found)}
    if part.manifest_path.exists():
        _check_begun(part, identity)
        if part.is_complete():
            say(f"{destination} is already packed; `fasttrain pack --check {destination}` verifies it")
            return
    # Two processes would delete each other's unfinished files.
    refusal = (
        f"another process is packing part {part.number} of {part.count} into {destination}; wait for it, or "
        "give each machine a --shard I/N of its own"
    )
    with file_lock(destination / f"pack-{part}.lock", refusal):
        for partial in destination.glob(f"*-{part}*.partial"):
            partial.unlink()
        _write_manifest(part, identity, complete=False, skipped=[])
        done = [ShardIndex.read(path) for path in part.shard_paths()]
        first = done[-1].videos_done if done else 0
        encode = functools.partial(_encode, found=found, options=options)
        with Progress("videos", len(names), done=first) as progress:
            videos = _shown(map_ahead(encode, names[first:], workers=workers), progress)
            skipped_last = _write_shards(part, done, videos, options.shard_bytes)
        # What is missing before any video is opened is reported by the first part.
        skipped = found.skipped if part.number == 1 else []
        skipped = [*skipped, *(bad for index in done for bad in index.skipped), *skipped_last]
        if part.count == 1 and not done:
            name, reason = skipped[0]
            raise InputError(f"no video of {source} can be read; the first, {name}: {reason}")
        totals = {
            "shards": len(done),
            "total_frames": sum(len(index.frames) for index in done),
            "total_bytes": sum(index.num_bytes for index in done),
        }
        _write_manifest(part, {**identity, **totals}, complete=True, skipped=skipped)
    for name, reason in skipped[:MAX_NAMED]:
        say(f"could not be read: {name}: {reason}")
    listed = f", listed in {part.manifest_path}" if skipped else ""
    say(
        f"{totals['total_frames']} frames in {len(done)} shards, {totals['total_bytes'] / 2**20:.1f} MB; "
        f"{len(skipped)} files could not be read{listed}"
    )


def check(root: Path, *, workers: int = 1) -> int:
    """Verify all shards of a packed set; returns the number of frames. Raises InputError if it is damaged."""
    shards = [path for part in finished_parts(root) for path in part.shard_paths()]
    frames, damage = 0, []
    with Progress("shards", len(shards)) as progress:
        for count, found in map_ahead(check_shard, shards, workers=workers):
            frames += count
            damage += found
            progress.advance(status=f"{len(damage)} damaged")
    for line in damage[:MAX_NAMED]:
        say(line)
    if damage:
        raise InputError(
            f"{root} is damaged in {len(damage)} places, the first: {damage[0]}; delete the shards named and "
            "their .npz and pack again, which fills the gap"
        )
    return frames


def _digest(found: Found) -> str:
    """Of what a source shows without opening a video: names, the frames' names, the files' sizes."""
    digest = hashlib.sha256()
    for name in sorted(found.folders or found.videos):
        if found.folders:
            _, details = found.folders[name]
        else:
            video = found.videos[name]
            details = (str(video.stat().st_size if video.exists() else -1),)
        digest.update("\0".join([name, *details, ""]).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def _check_begun(part: Part, identity: dict[str, Any]) -> None:
    """Raise InputError where this part was begun with other videos or options."""
    manifest = part.read_manifest()
    for key, value in identity.items():
        if manifest.get(key) != value:
            raise InputError(
                f"{part.folder} was begun with {key}={manifest.get(key)}, now it is {value}; use the same "
                "source (names and sizes of its files) and options, or another folder"
            )


def _write_manifest(part: Part, content: dict[str, Any], *, complete: bool, skipped: Skipped) -> None:
    manifest = {"format": FORMAT, **content, "complete": complete, "skipped": skipped}
    content_bytes = (json.dumps(manifest, indent=1) + "\n").encode("ascii")
    write_atomically(part.manifest_path, content_bytes, fsync=True)


def _shown(videos: Iterator[EncodedVideo], progress: Progress) -> Iterator[EncodedVideo]:
    frames = bad = 0
    for video in videos:
        yield video
        frames += len(video.frames)
        bad += len(video.skipped)
        progress.advance(status=f"{frames} frames, {bad} bad")


# --- writing shards ---


def _write_shards(
    part: Part, done: list[ShardIndex], videos: Iterator[EncodedVideo], shard_bytes: int
) -> Skipped:
    """Write the videos behind those of `done`, which grows; returns what is skipped behind them."""
    numbered = enumerate(videos, start=1 + (done[-1].videos_done if done else 0))
    skipped: Skipped = []
    for number, video in numbered:
        if not video.frames:
            skipped += video.skipped
            continue
        path = part.shard_path(len(done))
        index = _write_shard(path, itertools.chain([(number, video)], numbered), skipped, shard_bytes)
        write_atomically(path.with_suffix(".npz"), index.to_bytes(), fsync=True)
        done.append(index)
        skipped = []
    return skipped


def _write_shard(
    path: Path, numbered: Iterator[tuple[int, EncodedVideo]], skipped: Skipped, shard_bytes: int
) -> ShardIndex:
    """Write videos until the shard is full; it gets its name when it is whole, and on the disk."""
    names, lengths, frames = [], [], []
    with open_atomically(path, fsync=True) as file:
        for number, video in numbered:
            videos_done = number
            skipped = skipped + video.skipped
            if video.frames:
                names.append(video.name)
                lengths.append(len(video.frames))
            for frame, data in enumerate(video.frames):
                file.write(tar_header(video.name, frame, len(data)))
                frames.append((file.tell() // TAR_BLOCK, len(data), zlib.crc32(data)))
                file.write(data + bytes(-len(data) % TAR_BLOCK))
            if file.tell() >= shard_bytes:
                break
        file.write(bytes(2 * TAR_BLOCK))
        size = file.tell()
    return ShardIndex(names, np.array(lengths, np.int32), np.array(frames, FRAME), skipped, videos_done, size)


# --- encoding videos ---


def _encode(name: str, found: Found, options: PackOptions) -> EncodedVideo:
    """The frames of a video or of a frame folder. It is called from many threads."""
    if found.folders:
        return _encode_folder(name, *found.folders[name], options)
    try:
        return EncodedVideo(name, _encode_video(found.videos[name], options), [])
    except UnreadableFrameError as error:
        return EncodedVideo(name, [], [(name, str(error))])


def _encode_video(path: Path, options: PackOptions) -> list[bytes]:
    video = probe_video(path)
    numbers = evenly_spaced(video.num_frames, options.frames or video.num_frames)
    if options.decoder == "nvdec" and nvdec_refusal(video) is None:
        try:
            return [encode_jpeg(frame, options) for frame in _nvdec_frames(video, numbers, options)]
        # DALI has one exception for everything that it cannot decode; PyAV has the last word.
        except RuntimeError:
            warnings.warn("NVDEC does not decode all of these videos; PyAV does", stacklevel=1)
    return [encode_jpeg(frame, options) for frame in stream_video_frames(video, numbers)]


def _encode_folder(name: str, folder: Path, files: Sequence[str], options: PackOptions) -> EncodedVideo:
    """A frame that cannot be read is left out; the others move up."""
    video = EncodedVideo(name, [], [])
    for number in evenly_spaced(len(files), options.frames or len(files)):
        try:
            video.frames.append(_encode_file(folder / files[number], options))
        except UnreadableFrameError as error:
            video.skipped.append((f"{name}/{files[number]}", str(error)))
    return video


def _encode_file(path: Path, options: PackOptions) -> bytes:
    """A stored image as JPEG of the wanted size; a JPEG that fits already keeps its bytes."""
    data = read_encoded(path)
    check_jpeg(data)
    frame = decode_image(data)
    content = data.tobytes()
    with Image.open(io.BytesIO(content)) as image:
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        fits = upright and image.format == "JPEG" and image.mode == "RGB"
    return content if fits and min(frame.shape[:2]) <= options.short_side else encode_jpeg(frame, options)


def check_jpeg(data: Bytes) -> None:
    """Raise UnreadableFrameError for a JPEG (n,) whose coded data ffmpeg finds damaged; others pass.

    Pillow and DALI decode such a picture to garbage without an error. Of 240 DAVIS frames with 512 bytes set
    to zero, 199 were found; the others are valid code.
    """
    if data[:2].tobytes() != b"\xff\xd8":
        return
    decoder: Any = av.CodecContext.create("mjpeg", "r")
    decoder.options = {"err_detect": "explode"}
    decoder.thread_count = 1
    try:
        decoder.decode(av.Packet(data.tobytes()))
    except av.InvalidDataError:
        raise UnreadableFrameError("damaged JPEG: its coded data is not valid") from None
    # A kind of JPEG that ffmpeg does not know.
    except av.FFmpegError:
        return


def encode_jpeg(frame: Frame, options: PackOptions) -> bytes:
    """RGB (H, W, 3) -> JPEG, made smaller (antialiased bicubic) where its short side is too long."""
    image = Image.fromarray(frame)
    scale = options.short_side / min(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=options.quality)
    return buffer.getvalue()


# Each thread has a decoder of its own.
_THREAD = threading.local()


def _nvdec_frames(video: VideoInfo, numbers: Sequence[int], options: PackOptions) -> Iterator[Frame]:
    """stream_video_frames, made smaller on the GPU. Raises RuntimeError, UnreadableFrameError."""
    # DALI is imported where there is a GPU to use it.
    from fasttrain.data.dali import ClipDecoder

    if not hasattr(_THREAD, "decoder"):
        _THREAD.decoder = ClipDecoder(torch.device("cuda", torch.cuda.current_device()))
    short_side = min(options.short_side, video.width, video.height)
    for start in range(0, len(numbers), GPU_FRAMES):
        clip, numbers_there = cut_clip(video, numbers[start : start + GPU_FRAMES])
        for frame in _THREAD.decoder.decode(clip, numbers_there, short_side):
            if video.matrix != "bt601":
                frame = np.rint(frame @ rgb_correction(video.matrix).T).clip(0, 255).astype(np.uint8)
            yield frame
