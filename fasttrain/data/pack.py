"""Pack videos, frame folders or tars into a packed set, which provides fast random access to frames.

    fasttrain pack SOURCE DESTINATION              pack, or continue an interrupted run
    fasttrain pack SOURCE DESTINATION --shard 1/4  pack share 1 of 4, if four machines divide the work
    fasttrain pack --check DESTINATION             verify every frame of a packed set
    fasttrain RECIPE data.source=DESTINATION       train on a packed set

A packed set is a folder of shard files: tar files of JPEG frames, which any WebDataset reader can read.
Training reads two byte ranges per frame pair. Unreadable files are skipped and listed, with the reason,
in DESTINATION/pack-IofN.json.

You can stop a run at any time (Ctrl-C, SIGTERM, power failure). To continue, run the same command again: it
keeps the complete shard files, and the result is the same as without the interruption.

To divide the work among N machines, run the same command on each, with the same SOURCE and with
--shard 1/N to --shard N/N. DESTINATION can be a folder that all machines share. If it is a local folder
on each machine instead, copy the files into a single folder afterwards.

SOURCE can also be a WebDataset or another tar of videos or frames: a .tar or .tar.gz file, a folder of them,
a pattern such as train-{000000..000009}.tar, or a text file that lists them. Tars need not be extracted.

The frames keep their order. With --frames K, both the first and the last frame are kept (if K > 1).
JPEG files that are already small enough are stored unchanged. Unreadable frames of a frame folder are
skipped; a video file that cannot be decoded to its end is skipped entirely.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import functools
import hashlib
import io
import itertools
import json
import os
import shutil
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from fasttrain.data.images import (
    Bytes,
    Frame,
    UnreadableFrameError,
    decode_image,
    exif_orientation,
    read_encoded,
)
from fasttrain.data.index import Skipped
from fasttrain.data.map_ahead import map_ahead
from fasttrain.data.nvdec import cut_clip, has_dali, has_nvdec, nvdec_refusal, rgb_correction
from fasttrain.data.packed import (
    FORMAT,
    FRAME,
    TAR_BLOCK,
    ShardIndex,
    Share,
    check_shard,
    complete_shares,
    tar_header,
)
from fasttrain.data.sampling import evenly_spaced
from fasttrain.data.sources import Kind, SourceFiles, describe_left_out, describe_unreadable
from fasttrain.data.tars import TarFiles, TarVideo, find_packable, uncompressed
from fasttrain.data.video import (
    HAS_PYAV,
    VideoInfo,
    probe_video,
    skipped_frames,
    stream_video_frames,
)
from fasttrain.errors import InputError, check_options
from fasttrain.files import PARTIAL, file_lock, naming, open_atomically, write_atomically
from fasttrain.launcher import available_cores
from fasttrain.loggers import Progress, say
from fasttrain.options import PackOptions

if HAS_PYAV:
    import av

# Number of frames that the GPU decodes at once. At 1080p, they occupy 400 MB.
GPU_FRAMES = 64
# Maximum number of skipped files or problems to print. The manifest lists all skipped files.
MAX_PRINTED = 20
# Reasons for which a file may be unreadable now, but readable later.
MACHINE_ERRORS = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)


class EncodedVideo(NamedTuple):
    """The frames of a video as JPEG files."""

    name: str
    frames: list[bytes]
    """Empty if nothing was readable."""
    skipped: Skipped


def run(args: argparse.Namespace) -> None:
    """Run the command. Raises InputError."""
    check_options(args, frames=0, short_side=16, quality=1, shard_size=1, workers=0)
    if args.quality > 100:
        raise InputError(f"--quality {args.quality}: expected at most 100")
    workers = args.workers or available_cores()
    if args.check:
        say(f"{args.source}: all {check(args.source, workers=workers)} frames are intact")
        return
    if args.destination is None:
        raise InputError("DESTINATION is missing. Usage: fasttrain pack SOURCE DESTINATION")
    has_gpu = torch.cuda.is_available() and has_nvdec() and has_dali()
    if args.decoder == "gpu" and not has_gpu:
        raise InputError(
            "--decoder gpu requires a GPU, a driver with NVDEC (libnvcuvid.so.1) and DALI. Use --decoder "
            "cpu, or auto to use the GPU only if all of these are available."
        )
    if not HAS_PYAV:
        say("PyAV is not installed, so JPEG files are not checked for damaged data; pip install av")
    options = PackOptions(
        frames=args.frames,
        short_side=args.short_side,
        quality=args.quality,
        shard_bytes=args.shard_size * 2**20,
        decoder="nvdec" if has_gpu and args.decoder != "cpu" else "pyav",
    )
    try:
        pack(args.source, args.destination, options, kind=args.kind, share=args.share, workers=workers)
    except KeyboardInterrupt:
        say("Stopped. Run the same command again to continue after the last complete shard file.")
        raise


def pack(
    source: Path,
    destination: Path,
    options: PackOptions,
    *,
    kind: Kind = "auto",
    share: tuple[int, int] = (1, 1),
    workers: int = 1,
) -> None:
    """Pack one share of a source, or complete it after an interruption. Raises InputError.

    `share` is (I, N) for share I of N. The files written depend only on the source, the share and the
    options.
    """
    files = find_packable(source, destination, kind=kind, workers=workers)
    target = Share(destination, *share)
    names = _names_of(files, target)
    if not names and target.number == 1:
        raise InputError(
            f"{str(source)!r} {describe_unreadable(files.skipped, files.left_out)}. Pass a SOURCE with "
            "at least one."
        )
    identity = {**dataclasses.asdict(options), "source": _digest(files)}
    if target.manifest_path.exists():
        _check_identity(target, identity)
        if target.is_complete():
            say(
                f"{target.description} is already packed. "
                f"To verify it, run `fasttrain pack --check {destination}`."
            )
            return
    # Without the lock, two processes would write the same files.
    refusal = (
        f"Another process is packing {target.description}. Wait for it to finish, or give each machine its "
        "own --shard I/N."
    )
    with file_lock(destination / f"pack-{target}.lock", refusal):
        _write_manifest(target, identity, complete=False, skipped=[])
        done = [ShardIndex.read(path) for path in target.shard_paths()]
        first = done[-1].videos_done if done else 0
        with (
            Progress("videos", len(names), done=first) as progress,
            _temporary_folder(target, files) as folder,
        ):
            encoded = _encode_all(files, names[first:], options, folder, workers)
            skipped_last = _write_shards(target, done, _report(encoded, progress), options.shard_bytes)
        # Files that were skipped or left out before packing belong to no share, so share 1 reports them.
        skipped, left_out = (files.skipped, files.left_out) if target.number == 1 else ([], {})
        skipped = [*skipped, *(entry for index in done for entry in index.skipped), *skipped_last]
        if target.count == 1 and not done:
            raise InputError(
                f"{str(source)!r} {describe_unreadable(skipped, files.left_out)}. Pass a SOURCE with "
                "at least one."
            )
        totals = {
            "shards": len(done),
            "total_frames": sum(len(index.frames) for index in done),
            "total_bytes": sum(index.num_bytes for index in done),
        }
        # Without files left out, the manifest is the same as in earlier versions.
        counted = {"left_out": left_out} if left_out else {}
        _write_manifest(target, {**identity, **totals, **counted}, complete=True, skipped=skipped)
    for name, reason in skipped[:MAX_PRINTED]:
        say(f"skipped {name}: {reason}")
    if left_out:
        say(describe_left_out(left_out))
    listed = f" (listed in {target.manifest_path})" if skipped else ""
    say(
        f"frames: {totals['total_frames']}, shard files: {len(done)}, "
        f"size: {totals['total_bytes'] / 2**20:.1f} MiB, skipped: {len(skipped)}{listed}"
    )


def check(root: Path, *, workers: int = 1) -> int:
    """Verify a packed set and return its number of frames. Raises InputError if it is damaged."""
    shards = [path for share in complete_shares(root) for path in share.shard_paths()]
    frames, problems = 0, []
    with Progress("shard files", len(shards)) as progress:
        for count, found in map_ahead(check_shard, shards, workers=workers):
            frames += count
            problems += found
            progress.advance(status=f"problems: {len(problems)}")
    for line in problems[:MAX_PRINTED]:
        say(line)
    if problems:
        raise InputError(
            f"{str(root)!r} is damaged (problems: {len(problems)}, first: {problems[0]}). Delete the damaged "
            "files and run `fasttrain pack` again to restore them."
        )
    return frames


def _names_of(files: SourceFiles, share: Share) -> list[str]:
    """Return the names of the videos of a share, in the order in which they are packed."""
    if not isinstance(files, TarFiles):
        return sorted(files.folders or files.videos)[share.number - 1 :: share.count]
    # Videos of a share are neighbours, so that few machines read the same tar.
    names = list(files.tars)
    start, end = (len(names) * number // share.count for number in (share.number - 1, share.number))
    return names[start:end]


@contextmanager
def _temporary_folder(share: Share, files: SourceFiles) -> Iterator[Path]:
    """Provide an empty folder for the videos of compressed tars. The caller holds the lock of the share."""
    folder = share.folder / f".pack-{share}{PARTIAL}"
    if not (isinstance(files, TarFiles) and any(video.is_compressed for video in files.tars.values())):
        yield folder
        return
    # A process that was killed has left its files.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _digest(files: SourceFiles) -> str:
    """Hash the source without opening a video: names of videos and frames, sizes of video files."""
    digest = hashlib.sha256()
    for name in files.tars if isinstance(files, TarFiles) else sorted(files.folders or files.videos):
        if isinstance(files, TarFiles):
            details = tuple(f"{member.name} {member.size}" for member in files.tars[name].members)
        elif files.folders:
            _, details = files.folders[name]
        else:
            video = files.videos[name]
            details = (str(video.stat().st_size if video.exists() else -1),)
        digest.update("\0".join([name, *details, ""]).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def _check_identity(share: Share, identity: dict[str, Any]) -> None:
    """Raise InputError if packing of this share started from a different source or with other options."""
    manifest = share.read_manifest()
    for key, value in identity.items():
        before = manifest.get(key)
        if before == value:
            continue
        difference = f"with {key}={before}, but now {key}={value}"
        if key == "source":
            difference = "from a different source, or the names or sizes of its files have changed"
        raise InputError(
            f"{share.description}: packing started {difference}. Use the same source and options, or another "
            "DESTINATION."
        )


def _write_manifest(share: Share, content: dict[str, Any], *, complete: bool, skipped: Skipped) -> None:
    manifest = {"format": FORMAT, **content, "complete": complete, "skipped": skipped}
    content_bytes = (json.dumps(manifest, indent=1) + "\n").encode("ascii")
    write_atomically(share.manifest_path, content_bytes)


def _report(videos: Iterator[EncodedVideo], progress: Progress) -> Iterator[EncodedVideo]:
    """Advance the progress bar after each video."""
    frames = skipped = 0
    for video in videos:
        yield video
        frames += len(video.frames)
        skipped += len(video.skipped)
        progress.advance(status=f"frames: {frames}, skipped: {skipped}")


# --- writing shards ---


def _write_shards(
    share: Share, done: list[ShardIndex], videos: Iterator[EncodedVideo], shard_bytes: int
) -> Skipped:
    """Write `videos` to new shards and append these to `done`. Returns the files skipped after them."""
    numbered = enumerate(videos, start=1 + (done[-1].videos_done if done else 0))
    skipped: Skipped = []
    for number, video in numbered:
        if not video.frames:
            skipped += video.skipped
            continue
        path = share.shard_path(len(done))
        index = _write_shard(path, itertools.chain([(number, video)], numbered), skipped, shard_bytes)
        write_atomically(path.with_suffix(".npz"), index.to_bytes())
        done.append(index)
        skipped = []
    return skipped


def _write_shard(
    path: Path, numbered: Iterator[tuple[int, EncodedVideo]], skipped: Skipped, shard_bytes: int
) -> ShardIndex:
    """Write videos to one shard until it is full. The file gets its name only when it is complete."""
    names, lengths, frames = [], [], []
    with open_atomically(path) as file:
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


def _encode_all(
    files: SourceFiles, names: Sequence[str], options: PackOptions, folder: Path, workers: int
) -> Iterator[EncodedVideo]:
    """Encode videos in order, in several threads. `folder` is for temporary files."""
    if isinstance(files, TarFiles):
        videos = uncompressed((_selected(files.tars[name], options) for name in names), folder)
        return map_ahead(functools.partial(_encode_tar, options=options), videos, workers=workers)
    return map_ahead(functools.partial(_encode, files=files, options=options), names, workers=workers)


def _encode(name: str, files: SourceFiles, options: PackOptions) -> EncodedVideo:
    """Encode the frames of a video file or frame folder."""
    if files.folders:
        folder, frames = files.folders[name]
        return _encode_frames(name, folder, frames, lambda frame: read_encoded(folder / frame), options)
    path = files.videos[name]

    def read_through() -> None:
        with naming(path), path.open("rb") as file:
            while file.read(2**20):
                pass

    return _encode_file(name, path, read_through, options)


def _selected(video: TarVideo, options: PackOptions) -> TarVideo:
    """Return a video with only the frames to pack, so that the others are not read."""
    numbers = evenly_spaced(len(video.members), options.frames or len(video.members))
    return dataclasses.replace(video, members=tuple(video.members[number] for number in numbers))


def _encode_tar(video: TarVideo, options: PackOptions) -> EncodedVideo:
    """Encode the frames of a video in a tar, or copied from a compressed one."""
    try:
        if not video.is_frames:
            return _encode_file(video.name, video.url, video.read_through, options)
        members = {member.name: member for member in video.members}
        return _encode_frames(
            video.name, video.path, list(members), lambda frame: video.read_frame(members[frame]), options
        )
    finally:
        # The temporary copy may be as large as the video.
        if video.is_compressed:
            video.path.unlink(missing_ok=True)


def _encode_file(
    name: str, path: Path, read_through: Callable[[], None], options: PackOptions
) -> EncodedVideo:
    """Encode the frames of a video file. `read_through` raises OSError if the disk fails."""
    try:
        return _encode_video(name, path, options)
    except UnreadableFrameError as error:
        if _errno(error) == errno.EIO:
            # FFmpeg also has this error for damaged files, such as a truncated Matroska file. Reading the
            # file raises OSError if the disk fails. If it failed for a moment, the second attempt succeeds.
            read_through()
        else:
            _raise_disk_error(error, path)
            return EncodedVideo(name, [], [(name, str(error))])
    try:
        return _encode_video(name, path, options)
    except UnreadableFrameError as error:
        return EncodedVideo(name, [], [(name, str(error))])


def _encode_video(name: str, path: Path, options: PackOptions) -> EncodedVideo:
    video = probe_video(path)
    skipped = skipped_frames(name, video)
    numbers = evenly_spaced(video.num_frames, options.frames or video.num_frames)
    if options.decoder == "nvdec" and nvdec_refusal(video) is None:
        try:
            frames = [encode_jpeg(frame, options) for frame in _nvdec_frames(video, numbers, options)]
            return EncodedVideo(name, frames, skipped)
        # DALI raises RuntimeError for all decoding errors, whether or not the video is damaged.
        except RuntimeError:
            warnings.warn("NVDEC failed to decode some videos. PyAV decodes them instead.", stacklevel=1)
    frames = [encode_jpeg(frame, options) for frame in stream_video_frames(video, numbers)]
    return EncodedVideo(name, frames, skipped)


def _encode_frames(
    name: str, folder: Path, files: Sequence[str], read: Callable[[str], Bytes], options: PackOptions
) -> EncodedVideo:
    """Encode the readable frames of a frame folder or of a tar, numbered without gaps."""
    video = EncodedVideo(name, [], [])
    for number in evenly_spaced(len(files), options.frames or len(files)):
        try:
            video.frames.append(_encode_image(read(files[number]), options))
        except UnreadableFrameError as error:
            _raise_disk_error(error, folder / files[number])
            video.skipped.append((f"{name}/{files[number]}", str(error)))
    return video


def _raise_disk_error(error: UnreadableFrameError, path: Path) -> None:
    """Raise OSError if a frame was unreadable because of the machine, not of the file.

    Without this file, the packed set would stay incomplete when the machine works again.
    """
    number = _errno(error)
    if number in MACHINE_ERRORS:
        raise OSError(number, os.strerror(number), str(path))


def _errno(error: UnreadableFrameError) -> int:
    return getattr(error.__cause__, "errno", None) or 0


def _encode_image(data: Bytes, options: PackOptions) -> bytes:
    """Encode an image (n,) as JPEG in the requested size. A JPEG file that already fits is kept unchanged."""
    check_jpeg(data)
    frame = decode_image(data)
    content = data.tobytes()
    with Image.open(io.BytesIO(content)) as image:
        fits = exif_orientation(image) == 1 and image.format == "JPEG" and image.mode == "RGB"
    return content if fits and min(frame.shape[:2]) <= options.short_side else encode_jpeg(frame, options)


def check_jpeg(data: Bytes) -> None:
    """Raise UnreadableFrameError if ffmpeg reports damage in the coded data of a JPEG (n,).

    Pillow and DALI decode such data to garbage without an error. Other image formats are not checked. Damage
    that happens to form valid codes is not detected. Without PyAV, nothing is checked.
    """
    if data[:2].tobytes() != b"\xff\xd8" or not HAS_PYAV:
        return
    decoder: Any = av.CodecContext.create("mjpeg", "r")
    decoder.options = {"err_detect": "explode"}
    decoder.thread_count = 1
    try:
        decoder.decode(av.Packet(data.tobytes()))
    except av.InvalidDataError:
        raise UnreadableFrameError("damaged JPEG: invalid coded data") from None
    # ffmpeg does not support this kind of JPEG.
    except av.FFmpegError:
        return


def encode_jpeg(frame: Frame, options: PackOptions) -> bytes:
    """Encode RGB (H, W, 3) as JPEG. A larger frame is downscaled with antialiased bicubic interpolation."""
    image = Image.fromarray(frame)
    scale = options.short_side / min(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    try:
        image.save(buffer, "JPEG", quality=options.quality)
    # Pillow raises this if a side is too long for the format.
    except OSError as error:
        raise UnreadableFrameError(f"cannot be stored as JPEG ({error})") from error
    return buffer.getvalue()


# One decoder per thread.
_THREAD = threading.local()


def _nvdec_frames(video: VideoInfo, numbers: Sequence[int], options: PackOptions) -> Iterator[Frame]:
    """Decode and downscale frames on the GPU. Raises RuntimeError or UnreadableFrameError."""
    # Imported here, so that packing on a machine without a GPU does not require DALI.
    from fasttrain.data.dali import ClipDecoder

    if not hasattr(_THREAD, "decoder"):
        _THREAD.decoder = ClipDecoder(torch.device("cuda", torch.cuda.current_device()))
    short_side = min(options.short_side, video.width, video.height)
    for start in range(0, len(numbers), GPU_FRAMES):
        clip, clip_numbers = cut_clip(video, numbers[start : start + GPU_FRAMES])
        for frame in _THREAD.decoder.decode(clip, clip_numbers, short_side):
            if video.matrix != "bt601":
                frame = np.rint(frame @ rgb_correction(video.matrix).T).clip(0, 255).astype(np.uint8)
            yield frame
