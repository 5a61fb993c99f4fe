"""Scan video files and decode their frames by number, with PyAV.

The number of a frame is its zero-based index in presentation order, even if the frame rate varies. Frames
are decoded as ffmpeg displays them: with the colour matrix and range of the stream, rounded from 10 to 8
bits, and rotated upright according to the display matrix.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fasttrain.data.images import Frame, UnreadableFrameError
from fasttrain.errors import InputError
from fasttrain.files import os_reason

# Only video files need PyAV. Reading one begins with `probe_video`, which reports that it is missing.
try:
    import av
    from av.bitstream import BitStreamFilterContext
    from av.stream import Disposition

    HAS_PYAV = True
except ModuleNotFoundError:
    HAS_PYAV = False

Times = Sequence[int] | npt.NDArray[np.int64]
PacketTimes = list[int | None]
Matrix = Literal["bt601", "bt709", "bt2020"]

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"}
    | {".ts", ".m2ts", ".wmv", ".flv", ".3gp", ".ogv"}
)

# Values of ffmpeg's AVColorSpace. Other matrices, which are rare or close to BT.601, are treated as BT.601.
_MATRICES: dict[int, Matrix] = {1: "bt709", 9: "bt2020", 10: "bt2020"}

# Containers for which ffmpeg guesses the time stamps, incorrectly with B-frames and after a seek.
_GUESSED_TIMES = frozenset({"avi", "mpeg"})

# An H.264 IDR picture. It resets the decoder, unlike other pictures that ffmpeg flags as key frames.
_IDR = re.compile(rb"\x00\x00\x01[\x05\x25\x45\x65]")


@dataclass(frozen=True)
class VideoInfo:
    """The metadata of a video file for random access to its frames. Times are in the stream's time base."""

    path: Path
    codec: str
    pix_fmt: str
    width: int
    """Width in pixels as stored, before rotation."""
    height: int
    """Height in pixels as stored, before rotation."""
    cropped: bool
    """Whether coded pictures are larger than displayed ones (H.264: if a side is not a multiple of 16)."""
    interlaced: bool
    """Whether the first frame is interlaced."""
    quarter_turns: int
    """Counter-clockwise quarter turns that rotate a decoded frame upright."""
    matrix: Matrix
    """YCbCr matrix; BT.601 if the stream does not specify one, as in ffmpeg."""
    times: Times | None
    """Presentation times of all frames, ascending; None if they are unreliable (AVI, MPEG-PS)."""
    key_times: Sequence[int]
    """Presentation times of the key frames, ascending."""
    reset_times: Sequence[int]
    """Presentation times of the key frames that reset the decoder, even those that are not displayed."""
    num_frames: int
    miscounted: bool
    """Whether DALI miscounts frames: a packet hides its frame (VP8) or repeats an earlier one (VP9)."""


def probe_video(path: Path) -> VideoInfo:
    """Scan a video file: read all of its packets and decode its first frame.

    If the time stamps are unreliable, decode all frames to count them. Raises UnreadableFrameError if the
    file is damaged, and InputError if PyAV is not installed.
    """
    require_pyav("reading")
    try:
        with open_video(path) as container:
            stream = video_stream(container)
            context = stream.codec_context
            times, key_times, reset_times, miscounted = _packet_times(container, stream)
            if not times:
                raise UnreadableFrameError("the file contains no video frames")
            sorted_times = _sorted(times)
            # The first frame may have a negative time. `seek` expects microseconds.
            start = sorted_times[0] * (stream.time_base or 0) * av.time_base if sorted_times else 0
            container.seek(min(0, int(start)))
            pictures = container.decode(stream)
            first = next(pictures, None)
            if first is None:
                raise UnreadableFrameError("the first frame cannot be decoded")
            has_times = len(set(sorted_times)) == len(times) and container.format.name not in _GUESSED_TIMES
            if has_times and first.pts in sorted_times:
                # If the first key frame was cut off, the frames up to the next one cannot be decoded.
                sorted_times = sorted_times[sorted_times.index(first.pts) :]
            return VideoInfo(
                path=path,
                codec=context.codec.canonical_name,
                pix_fmt=first.format.name,
                width=first.width,
                height=first.height,
                cropped=(context.coded_width, context.coded_height) != (first.width, first.height),
                interlaced=first.interlaced_frame,
                quarter_turns=_quarter_turns(first),
                matrix=_MATRICES.get(int(first.colorspace), "bt601"),
                times=_compact(sorted_times) if has_times else None,
                key_times=_sorted(key_times),
                reset_times=_sorted(reset_times),
                # Count decoded frames, not packets: in AVI, an MPEG-4 packet may only repeat a frame.
                num_frames=len(sorted_times) if has_times else 1 + sum(1 for _ in pictures),
                miscounted=miscounted,
            )
    except (av.FFmpegError, OSError) as error:
        raise UnreadableFrameError(os_reason(error)) from error


def require_pyav(action: str) -> None:
    """Raise InputError if PyAV is not installed. `action` is what needs it: reading or writing."""
    if not HAS_PYAV:
        raise InputError(
            f"{action} video files needs the package av (PyAV), which is not installed. Run: pip install av"
        )


def read_video_frames(video: VideoInfo, frames: Sequence[int]) -> list[Frame]:
    """Decode frames by number, in any order, each (H, W, 3) uint8 RGB. Seeks to the key frame before each.

    Raises UnreadableFrameError with the number of the frame that cannot be read.
    """
    ascending = sorted(set(frames))
    decoded = dict(zip(ascending, stream_video_frames(video, ascending), strict=True))
    return [decoded[frame] for frame in frames]


def stream_video_frames(video: VideoInfo, frames: Sequence[int]) -> Iterator[Frame]:
    """Yield frames one at a time, given ascending numbers; otherwise the same as `read_video_frames`."""
    frame = 0
    try:
        with closing(_FrameReader(video, frames)) as reader:
            for frame in frames:
                yield to_rgb(reader.read(frame))
    except (av.FFmpegError, OSError) as error:
        raise UnreadableFrameError(os_reason(error), frame) from error


def to_rgb(picture: av.VideoFrame) -> Frame:
    """Convert a decoded picture to (H, W, 3) uint8 RGB and rotate it upright."""
    # With more threads, the converter starts new ones for every picture and hangs in a forked process.
    rgb = np.asarray(picture.to_ndarray(format="rgb24", threads=1), dtype=np.uint8)
    return np.ascontiguousarray(np.rot90(rgb, _quarter_turns(picture)))


class _FrameReader:
    """Decode frames in ascending order from one open file, seeking only to reach a later key frame."""

    def __init__(self, video: VideoInfo, frames: Sequence[int]) -> None:
        """`frames` are the numbers of all frames that will be read."""
        self.video = video
        # Without reliable times, a frame is identified by counting.
        self.times: Times = range(video.num_frames) if video.times is None else video.times
        self.wanted = set() if video.times is None else {int(video.times[frame]) for frame in frames}
        self._open()

    def close(self) -> None:
        self.pictures.close()
        self.container.close()

    def _open(self) -> None:
        self.container = open_video(self.video.path)
        self.stream = video_stream(self.container)
        # Several videos are decoded in parallel, so threads within a video would only compete for cores.
        self.stream.codec_context.thread_count = 1
        self.pictures = self._decode()
        self.position: int | None = None

    def read(self, frame: int) -> av.VideoFrame:
        target = int(self.times[frame])
        for _ in self._attempts(target):
            for time, picture in self.pictures:
                self.position = time
                if time == target:
                    return picture
                if time is not None and time > target:
                    break
        raise UnreadableFrameError("the frame cannot be decoded", frame)

    def _attempts(self, target: int) -> Iterator[None]:
        """Position the decoder before the frame at `target`. Each iteration tries another starting point."""
        keys = [] if self.video.times is None else [time for time in self.video.key_times if time <= target]
        if not keys or (self.position is not None and keys[-1] <= self.position):
            yield
        # The nearest key frame may not suffice: a container that seeks by decoding time may land on one shown
        # after the target, and in an open GOP, frames displayed before the key frame need the previous GOP.
        for start in reversed(keys):
            self.container.seek(start, stream=self.stream)
            self.pictures = self._decode()
            yield
        # If no key frame leads to the target, decode from the start of the file.
        self.container.close()
        self._open()
        yield

    def _decode(self) -> Generator[tuple[int | None, av.VideoFrame], None, None]:
        """Decode from the current position. For H.264, skip unwanted pictures that are not references."""
        context = self.stream.codec_context
        skips = context.name == "h264" and bool(self.wanted)
        wanted = False
        number = 0
        for packet in self.container.demux(self.stream):
            # The second field of a picture may be in a separate packet, with a different time or none.
            is_second_field, wanted = wanted, packet.pts in self.wanted
            context.skip_frame = "NONREF" if skips and not wanted and not is_second_field else "DEFAULT"
            for picture in packet.decode():
                yield number if self.video.times is None else picture.pts, picture
                number += 1


def open_video(path: Path) -> av.container.InputContainer:
    """Open a video file for reading, whatever the encoding of its metadata."""
    # Before version 19, PyAV raises on metadata that is not valid UTF-8, unless this option is set.
    any_encoding: dict[str, Any] = {"metadata_errors": "replace"}
    return av.open(str(path), **({} if int(av.__version__.split(".")[0]) >= 19 else any_encoding))


def video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """Return the first video stream that is not a cover image. Raises UnreadableFrameError."""
    for stream in container.streams.video:
        if stream.disposition & Disposition.attached_pic:
            continue
        if stream.codec_context is None:
            raise UnreadableFrameError("the codec is unknown to ffmpeg")
        return stream
    raise UnreadableFrameError("the file contains no video stream")


def _packet_times(
    container: av.container.InputContainer, stream: av.VideoStream
) -> tuple[PacketTimes, PacketTimes, PacketTimes, bool]:
    """Read all packets and return three lists of times, in file order, and whether DALI miscounts the frames.

    The lists are the times of all displayed frames, of key frames, and of decoder resets.
    """
    codec, miscounted = stream.codec_context.codec.canonical_name, False
    # This filter detects damaged NAL units without decoding them.
    structure = BitStreamFilterContext(f"{codec}_mp4toannexb", stream) if codec in ("h264", "hevc") else None
    times: PacketTimes = []
    key_times: PacketTimes = []
    reset_times: PacketTimes = []
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.is_corrupt:
            raise UnreadableFrameError(f"packet {len(times)} is corrupt")
        header = memoryview(packet)[0]
        # Frames that an edit list discards are not displayed, but displayed frames may depend on them.
        displayed = not packet.is_discard
        # The show_frame bit of a VP8 frame header.
        if codec == "vp8" and not header & 0x10:
            displayed, miscounted = False, True
        # The show_existing_frame bit of a VP9 frame header (profiles 0 to 2).
        miscounted |= codec == "vp9" and bool(header & 0x08)
        # Read now, because the filter moves the contents out of the packet.
        time, resets = packet.pts, packet.is_keyframe
        if displayed:
            times.append(time)
            if packet.is_keyframe:
                key_times.append(time)
        if structure:
            try:
                units = structure.filter(packet)
            except av.FFmpegError as error:
                raise UnreadableFrameError(
                    f"packet {len(times) - 1} is damaged: {os_reason(error)}"
                ) from error
            if codec == "h264":
                resets = resets and any(_IDR.search(bytes(unit)) for unit in units)
        if resets:
            reset_times.append(time)
    return times, key_times, reset_times, miscounted


def _sorted(times: PacketTimes) -> list[int]:
    return sorted(time for time in times if time is not None)


def _quarter_turns(picture: av.VideoFrame) -> int:
    return round(picture.rotation / 90) % 4


def _compact(times: list[int]) -> Times:
    """Represent the times of a constant frame rate as a `range`, which uses hardly any memory."""
    step = times[1] - times[0] if len(times) > 1 else 1
    regular = range(times[0], times[0] + step * len(times), step) if step > 0 else range(0)
    return regular if list(regular) == times else np.asarray(times, dtype=np.int64)
