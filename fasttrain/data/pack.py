"""Pack videos or frame folders into tar shards of JPEG frames with random access.

    fasttrain pack SOURCE DESTINATION              pack; run it again and it goes on where it was
    fasttrain pack SOURCE DESTINATION --shard 1/4  the first of four machines that share the work
    fasttrain pack --check DESTINATION             verify every frame of a packed set
    fasttrain RECIPE data.source=DESTINATION       train on it

Any WebDataset reader takes the shards; training reads two byte ranges per pair. What could not be read is
listed, with the reason, in DESTINATION/pack-IofN.json. A run may be stopped at any time (Ctrl-C, SIGTERM, a
power cut): what stands under its name is whole, and the same command goes on to the same bytes.

Several machines: each runs the same command on the same SOURCE with its own --shard I/N. They may write into
one shared DESTINATION, which then is the packed set. Or each writes into a folder of its own: copy them all
into one folder, or give training a text file with one such folder per line (data.source=parts.txt).

Frames keep their order; of --frames K, the first and the last are kept. A JPEG that is small enough keeps its
bytes. A frame folder's unreadable frames are left out, a video that cannot be decoded to its end is left out
whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fasttrain.data.images import UnreadableFrameError, check_encoded, decode_image
from fasttrain.data.index import Skipped
from fasttrain.data.packed import (
    Part,
    ShardWriter,
    check_shard,
    finished_parts,
    misplaced_shards,
    read_manifest,
    write_manifest,
)
from fasttrain.data.sampling import evenly_spaced
from fasttrain.data.sources import Found, Kind, find_source, packed_folders
from fasttrain.data.video import (
    VideoInfo,
    check_jpeg,
    cut_clip,
    has_nvdec,
    nvdec_decodes,
    probe_video,
    stream_video_frames,
)
from fasttrain.errors import InputError
from fasttrain.files import file_lock, io_errors_as_input_errors, os_reason

Frame = npt.NDArray[np.uint8]

# Frames that the GPU decodes at once; a clip of 1080p frames then takes 400 MB.
GPU_FRAMES = 64
# Bad files that are named on the terminal; all are listed in the report.
SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """What decides the bytes of a packed set."""

    frames: int
    """Frames kept of each video, evenly spread; 0 keeps all."""
    short_side: int
    """Short side of a frame in pixels; smaller frames are left as they are."""
    quality: int
    """JPEG quality, 1..100."""
    shard_bytes: int
    """A shard is closed after the video that takes it past so many bytes."""
    decoder: Literal["pyav", "nvdec"]


@dataclass(frozen=True)
class PackedVideo:
    """A video's frames as JPEG, and what of it could not be read."""

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
    parser.add_argument(
        "--kind",
        choices=("auto", "folders", "list", "videos"),
        default="auto",
        help="how to read the source (auto: look)",
    )
    parser.add_argument(
        "--frames", type=int, default=0, metavar="K", help="frames per video, evenly spread (0: all)"
    )
    parser.add_argument(
        "--short-side",
        type=int,
        default=256,
        metavar="PIXELS",
        help="larger frames are made this small on their short side (256)",
    )
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality, 1 to 100 (90)")
    parser.add_argument(
        "--shard-size",
        type=int,
        default=1024,
        metavar="MB",
        help="a shard ends with the video that takes it past so many MB (1024)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="videos in work at a time; each is held in memory as JPEG (0: one per core)",
    )
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="part I of N machines, from 1 (1/1)")
    parser.add_argument(
        "--decoder",
        choices=("auto", "cpu", "gpu"),
        default="auto",
        help="who decodes videos: PyAV, or the GPU's NVDEC through DALI (auto: NVDEC where there is one)",
    )
    parser.add_argument("--check", action="store_true", help="verify the packed set SOURCE, every frame")


def run(args: argparse.Namespace) -> None:
    """Pack or check, as the arguments say. Raises InputError."""
    console = Console()
    _check_numbers(args)
    workers = args.workers or len(os.sched_getaffinity(0))
    if args.check:
        frames = check(args.source, workers=workers, console=console)
        _say(console, f"{args.source}: {frames} frames, each as it was packed")
        return
    if args.destination is None:
        raise InputError("pack needs a DESTINATION folder: fasttrain pack SOURCE DESTINATION")
    options = PackOptions(
        frames=args.frames,
        short_side=args.short_side,
        quality=args.quality,
        shard_bytes=args.shard_size * 2**20,
        decoder=_choose_decoder(args.decoder),
    )
    pack(
        args.source,
        args.destination,
        kind=args.kind,
        part=_parse_part(args.shard),
        options=options,
        workers=workers,
        console=console,
    )


def pack(
    source: Path,
    destination: Path,
    *,
    kind: Kind,
    part: Part,
    options: PackOptions,
    workers: int,
    console: Console,
) -> None:
    """Write one part of a packed set, or what is missing of it. Raises InputError.

    The bytes follow from the source and the options alone: neither the number of workers nor where an
    earlier run was stopped shows in them.
    """
    found = find_source(source, kind=kind)
    all_names = sorted(found.folders or found.videos)
    names = all_names[part.number - 1 :: part.count]
    if not names and part.number == 1:
        raise InputError(f"nothing in {source} to pack; expected frame folders or video files")
    if destination.exists() and not destination.is_dir():
        raise InputError(f"the destination {destination} is a file; expected a folder")
    identity = {**dataclasses.asdict(options), "source": _digest(found)}
    if _is_packed(destination, part, identity):
        _say(console, f"{destination} is already packed; `fasttrain pack --check {destination}` verifies it")
        return
    with _alone(destination, part):
        _write_part(source, found, names, destination, part, identity, options, workers, console)


def _write_part(
    source: Path,
    found: Found,
    names: Sequence[str],
    destination: Path,
    part: Part,
    identity: dict[str, Any],
    options: PackOptions,
    workers: int,
    console: Console,
) -> None:
    """Pack what is missing of a part, in a destination that no other process writes to."""
    misplaced = misplaced_shards(destination, part)
    if misplaced:
        raise InputError(
            f"{misplaced[0]}; delete it and its .npz, or put the right ones there, and pack again"
        )
    with io_errors_as_input_errors(destination):
        write_manifest(part.manifest(destination), identity, complete=False, skipped=[])
        for partial in destination.glob(f"*-{part.number}of{part.count}*.partial"):
            partial.unlink()
    done = [shard for _, shard in part.shards(destination)]
    writer = ShardWriter(destination, part, options.shard_bytes, done)
    # What is missing before any video is opened belongs to the first part's report.
    skipped = found.skipped if part.number == 1 else []
    stop = threading.Event()
    encode = _make_encoder(found, options, console, stop)
    try:
        with (
            _sigterm_interrupts(),
            PackProgress(console, total=len(names), done=writer.videos_done) as progress,
        ):
            for name, video in _in_order(encode, names[writer.videos_done :], workers, stop):
                with io_errors_as_input_errors(destination):
                    writer.add(name, video.frames, video.skipped)
                progress.advance(len(video.frames), len(video.skipped))
        with io_errors_as_input_errors(destination):
            writer.close()
    except KeyboardInterrupt:
        # Not before the bar is gone and the workers have left.
        _say(
            console,
            f"stopped with {writer.number} shards in {destination}; the same command goes on from there",
        )
        raise
    skipped = skipped + writer.all_skipped
    totals = {"shards": writer.number, "total_frames": writer.num_frames, "total_bytes": writer.num_bytes}
    if part.count == 1 and not writer.num_frames:
        raise InputError(f"no video of {source} can be read; the first, {skipped[0][0]}: {skipped[0][1]}")
    with io_errors_as_input_errors(destination):
        write_manifest(part.manifest(destination), {**identity, **totals}, complete=True, skipped=skipped)
    _report(console, part.manifest(destination), totals, skipped)


def check(root: Path, *, workers: int, console: Console) -> int:
    """Verify all shards of a packed set; returns the number of frames. Raises InputError if it is damaged."""
    parts = finished_parts(packed_folders(root) or [root])
    shards = [path for folder, part in parts for path in part.paths(folder)]
    damage: list[str] = []
    frames = 0
    with PackProgress(console, total=len(shards), done=0) as progress, ThreadPoolExecutor(workers) as pool:
        for count, found in pool.map(check_shard, shards):
            frames += count
            damage += found
            progress.advance(count, len(found))
    damage += [one for folder, part in parts for one in misplaced_shards(folder, part)]
    # Other readers of the folder would take them.
    surplus = {path for folder, part in parts for path in part.files(folder)} - set(shards)
    damage += [f"{path}: a shard that the set does not have" for path in sorted(surplus)]
    _print_some(console, damage)
    if damage:
        raise InputError(
            f"{root} is damaged in {len(damage)} places, the first: {damage[0]}; delete the shards named and "
            "their .npz and pack again, which fills the gap"
        )
    return frames


class PackProgress:
    """A bar with rate, time left and bad files; a line every minute where there is no terminal."""

    def __init__(self, console: Console, *, total: int, done: int) -> None:
        self._console, self._total, self._done = console, total, done
        self._done_before = done
        self._bad = self._frames = 0
        self._start = self._said = time.monotonic()
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.0f} frames/s"),
            TimeRemainingColumn(),
            TextColumn("left, {task.fields[bad]} bad"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=done, rate=0.0, bad=0)

    def __enter__(self) -> PackProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, frames: int, bad: int) -> None:
        """One more video or shard is done."""
        self._done += 1
        self._frames += frames
        self._bad += bad
        now = time.monotonic()
        rate = self._frames / max(now - self._start, 1e-9)
        self._bar.update(self._task, completed=self._done, rate=rate, bad=self._bad)
        if not self._console.is_terminal and now - self._said > 60:
            self._said = now
            seconds = (now - self._start) * (self._total - self._done) / (self._done - self._done_before)
            left = timedelta(seconds=round(seconds))
            self._console.print(
                f"{self._done}/{self._total}, {rate:.0f} frames/s, {left} left, {self._bad} bad",
                highlight=False,
            )


class _StoppedError(Exception):
    """A worker left its video because the run was stopped."""


def _make_encoder(
    found: Found, options: PackOptions, console: Console, stop: threading.Event
) -> Callable[[str], PackedVideo]:
    """The function that turns the video of a name into JPEG frames. It is called from many threads."""
    told = threading.Event()

    def encode_frames(frames: Iterator[Frame]) -> PackedVideo:
        encoded = []
        for frame in frames:
            if stop.is_set():
                raise _StoppedError
            encoded.append(encode_jpeg(frame, options))
        return PackedVideo(encoded, [])

    gpu = _GpuFrames(options.short_side) if options.decoder == "nvdec" and found.videos else None

    def encode(name: str) -> PackedVideo:
        if found.folders:
            return _encode_folder(name, *found.folders[name], options)
        try:
            video = probe_video(found.videos[name])
            wanted = evenly_spaced(video.num_frames, options.frames or video.num_frames)
            if gpu and nvdec_decodes(video):
                try:
                    return encode_frames(gpu.stream(video, wanted))
                # DALI has one exception for everything that it cannot decode; PyAV has the last word.
                except RuntimeError as error:
                    if not told.is_set():
                        told.set()
                        _say(
                            console,
                            f"{name}: NVDEC does not decode it ({str(error).splitlines()[0]}), PyAV will; "
                            "more such videos are not named",
                        )
            return encode_frames(stream_video_frames(video, wanted))
        except UnreadableFrameError as error:
            return PackedVideo([], [(name, str(error))])

    return encode


def _encode_folder(name: str, folder: Path, files: Sequence[str], options: PackOptions) -> PackedVideo:
    """A frame that cannot be read is left out; the others move up."""
    frames, skipped = [], []
    for number in evenly_spaced(len(files), options.frames or len(files)):
        file = files[number]
        try:
            data = np.fromfile(folder / file, dtype=np.uint8)
            frames.append(_reencode(data, options))
        except (UnreadableFrameError, OSError) as error:
            reason = os_reason(error) if isinstance(error, OSError) else str(error)
            skipped.append((f"{name}/{file}", reason))
    return PackedVideo(frames, skipped)


def _reencode(data: Frame, options: PackOptions) -> bytes:
    """A stored image as JPEG of the wanted size; a JPEG that fits already keeps its bytes."""
    check_encoded(data)
    check_jpeg(data)
    frame = decode_image(data)
    content = data.tobytes()
    with Image.open(io.BytesIO(content)) as image:
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        fits = upright and image.format == "JPEG" and image.mode == "RGB"
    return content if fits and min(frame.shape[:2]) <= options.short_side else encode_jpeg(frame, options)


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


class _GpuFrames:
    """stream_video_frames through NVDEC; each thread has a decoder of its own."""

    def __init__(self, short_side: int) -> None:
        # DALI is imported where there is a GPU to use it.
        from fasttrain.data.dali import ClipDecoder, rgb_correction

        self._new_decoder, self._correction = ClipDecoder, rgb_correction
        self._short_side = short_side
        self._local = threading.local()

    def stream(self, video: VideoInfo, frames: Sequence[int]) -> Iterator[Frame]:
        if not hasattr(self._local, "decoder"):
            self._local.decoder = self._new_decoder(torch.device("cuda", torch.cuda.current_device()))
        short_side = min(self._short_side, video.width, video.height)
        for start in range(0, len(frames), GPU_FRAMES):
            data, numbers = cut_clip(video, frames[start : start + GPU_FRAMES])
            for frame in self._local.decoder.decode(data, numbers, short_side):
                turned = np.rot90(frame, video.quarter_turns)
                if video.matrix != "bt601":
                    turned = np.rint(turned @ self._correction(video.matrix).T).clip(0, 255).astype(np.uint8)
                yield np.ascontiguousarray(turned)


def _in_order(
    encode: Callable[[str], PackedVideo], names: Sequence[str], workers: int, stop: threading.Event
) -> Iterator[tuple[str, PackedVideo]]:
    """Results in the order of the names, with a few videos in work or waiting at any time.

    `stop` is set when no more are wanted, so that no worker goes on to the end of a long video.
    """
    waiting: deque[tuple[str, Future[PackedVideo]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for name in names:
                waiting.append((name, pool.submit(encode, name)))
                if len(waiting) >= 2 * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for name, future in waiting:
                yield name, future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _check_numbers(args: argparse.Namespace) -> None:
    limits = {
        "frames": (0, None),
        "short_side": (16, None),
        "quality": (1, 100),
        "shard_size": (1, None),
        "workers": (0, None),
    }
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value < low or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"{low} to {high}"
            raise InputError(f"--{name.replace('_', '-')}={value} is out of range; expected {bounds}")


def _choose_decoder(choice: str) -> Literal["pyav", "nvdec"]:
    there = torch.cuda.is_available() and has_nvdec()
    if choice == "gpu" and not there:
        lacks = "its driver comes without NVDEC" if torch.cuda.is_available() else "this machine shows none"
        raise InputError(f"--decoder=gpu needs a GPU with NVDEC, and {lacks}; use auto or cpu")
    return "nvdec" if choice != "cpu" and there else "pyav"


def _parse_part(text: str) -> Part:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise InputError(f"--shard={text} is not I/N with I from 1 to N, such as 2/4")
    return Part(int(number), int(count))


def _digest(found: Found) -> str:
    """Of what can be told of a source without opening a video: names, the frames' names, the files' sizes."""
    digest = hashlib.sha256()
    for name in sorted(found.folders or found.videos):
        told = found.folders[name][1] if found.folders else [str(_size(found.videos[name]))]
        digest.update("\0".join([name, *told, ""]).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _is_packed(destination: Path, part: Part, identity: dict[str, Any]) -> bool:
    """Whether this part is done. Raises InputError if it was begun from other videos or options."""
    if not part.manifest(destination).exists():
        return False
    manifest = read_manifest(part.manifest(destination))
    for key, value in identity.items():
        if manifest.get(key) != value:
            hint = ", which stands for the names of its files and their sizes" if key == "source" else ""
            raise InputError(
                f"{destination} was begun with {key}={manifest.get(key)}, now it is {value}{hint}; "
                "use the same source and options, or another folder"
            )
    return part.is_complete(destination)


def _alone(destination: Path, part: Part) -> AbstractContextManager[None]:
    """Refuse a part that another process is writing: each would take the other's half-written files."""
    return file_lock(
        destination / f"pack-{part.number}of{part.count}.lock",
        f"another process is packing part {part.number} of {part.count} into {destination}; wait for "
        "it, or give each machine a --shard I/N of its own",
    )


def _report(console: Console, manifest: Path, totals: dict[str, int], skipped: Skipped) -> None:
    _print_some(console, [f"could not be read: {name}: {reason}" for name, reason in skipped])
    listed = f", listed in {manifest}" if skipped else ""
    _say(
        console,
        f"{totals['total_frames']} frames in {totals['shards']} shards, "
        f"{totals['total_bytes'] / 2**20:.1f} MB; {len(skipped)} files could not be read{listed}",
    )


def _print_some(console: Console, lines: Sequence[str]) -> None:
    for line in lines[:SHOWN]:
        _say(console, line)
    if len(lines) > SHOWN:
        _say(console, f"and {len(lines) - SHOWN} more")


def _say(console: Console, line: str) -> None:
    """One line as it is: brackets in a path are no markup."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM, which schedulers send, ends a run as Ctrl-C does. Signals come to the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
