"""Video files through PyAV: is the file whole, and its frames by number.

A frame's number is its index in presentation order, whatever the frame rate does. Frames come as ffmpeg shows
them: colour matrix and range as the stream says, 10 bits rounded to 8, turned upright by the display matrix.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import numpy.typing as npt
from av.bitstream import BitStreamFilterContext
from av.stream import Disposition

from fasttrain.data.images import Frame, UnreadableFrameError
from fasttrain.files import os_reason

Times = Sequence[int] | npt.NDArray[np.int64]
PacketTimes = list[int | None]
Matrix = Literal["bt601", "bt709", "bt2020"]

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"}
    | {".ts", ".m2ts", ".wmv", ".flv", ".3gp", ".ogv"}
)

# ffmpeg's numbers of the matrices (AVColorSpace); all others are close to BT.601 or rare.
_MATRICES: dict[int, Matrix] = {1: "bt709", 9: "bt2020", 10: "bt2020"}

# Containers whose times ffmpeg guesses, wrongly with B-frames and after a seek.
_GUESSED_TIMES = frozenset({"avi", "mpeg"})

# PyAV reads titles in odd encodings from version 19 on; before, it raises without this option.
_ANY_ENCODING: dict[str, Any] = (
    {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
)

# An H.264 picture that resets the decoder: ffmpeg also marks mere recovery points as key frames.
_IDR = re.compile(rb"\x00\x00\x01[\x05\x25\x45\x65]")


@dataclass(frozen=True)
class VideoInfo:
    """What random access to a video file needs to know; times are in the stream's time base."""

    path: Path
    codec: str
    pix_fmt: str
    width: int
    """As stored, before it is turned upright."""
    height: int
    cropped: bool
    """Whether the coded picture is larger than the shown one (H.264: sides that are not multiples of 16)."""
    interlaced: bool
    """Whether the first frame is one of two fields."""
    quarter_turns: int
    """Counter-clockwise quarter turns that set a decoded frame upright."""
    matrix: Matrix
    """The YCbCr matrix of its colours; ffmpeg takes BT.601 where a stream does not say."""
    times: Times | None
    """Presentation time of every frame, ascending; None where a seek keeps none (AVI, MPEG-PS)."""
    key_times: Sequence[int]
    """Presentation times of the key frames, ascending."""
    reset_times: Sequence[int]
    """Those of the key frames, shown or not, that reset the decoder: nothing before them is needed."""
    num_frames: int
    miscounted: bool
    """Whether a packet hides its frame (VP8) or shows one decoded before (VP9): DALI's count is then off."""


def probe_video(path: Path) -> VideoInfo:
    """Read every packet and decode the first frame; all of them where the container's times are guesses.

    Raises UnreadableFrameError with the reason.
    """
    try:
        with open_video(path) as container:
            stream = video_stream(container)
            context = stream.codec_context
            times, key_times, reset_times, miscounted = _packet_times(container, stream)
            if not times:
                raise UnreadableFrameError("it holds no video frames")
            known = _sorted(times)
            # Before a start at negative times, too; in millionths of a second.
            container.seek(min(0, int(known[0] * (stream.time_base or 0) * av.time_base)) if known else 0)
            pictures = container.decode(stream)
            first = next(pictures, None)
            if first is None:
                raise UnreadableFrameError("its first frame cannot be decoded")
            seekable = len(set(known)) == len(times) and container.format.name not in _GUESSED_TIMES
            if seekable and first.pts in known:
                # A stream that was cut off from its first key frame begins with what nobody can decode.
                known = known[known.index(first.pts) :]
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
                times=_compact(known) if seekable else None,
                key_times=_sorted(key_times),
                reset_times=_sorted(reset_times),
                # MPEG-4 in AVI has packets that stand for a repeated frame and give none.
                num_frames=len(known) if seekable else 1 + sum(1 for _ in pictures),
                miscounted=miscounted,
            )
    except (av.FFmpegError, OSError) as error:
        raise UnreadableFrameError(os_reason(error)) from error


def read_video_frames(video: VideoInfo, frames: Sequence[int]) -> list[Frame]:
    """The frames of these numbers, each (H, W, 3) uint8 RGB. Decodes from the key frame before each.

    Raises UnreadableFrameError, with the number of the frame that cannot be read.
    """
    wanted = sorted(set(frames))
    found = dict(zip(wanted, stream_video_frames(video, wanted), strict=True))
    return [found[frame] for frame in frames]


def stream_video_frames(video: VideoInfo, frames: Sequence[int]) -> Iterator[Frame]:
    """The frames of these ascending numbers, one at a time, as read_video_frames gives them."""
    frame = 0
    try:
        with closing(_FrameReader(video, frames)) as reader:
            for frame in frames:
                yield to_rgb(reader.read(frame))
    except (av.FFmpegError, OSError) as error:
        raise UnreadableFrameError(os_reason(error), frame) from error


def to_rgb(picture: av.VideoFrame) -> Frame:
    """A decoded picture -> (H, W, 3) uint8 RGB, upright."""
    # Threads would be started for every picture, and a forked process would wait for them in vain.
    rgb = np.asarray(picture.to_ndarray(format="rgb24", threads=1), dtype=np.uint8)
    return np.ascontiguousarray(np.rot90(rgb, _quarter_turns(picture)))


class _FrameReader:
    """Reads frames in ascending order from one open container; seeks only past a key frame."""

    def __init__(self, video: VideoInfo, frames: Sequence[int]) -> None:
        """`frames` are all that will be read."""
        self.video = video
        # Without time stamps, frames are counted.
        self.times: Times = range(video.num_frames) if video.times is None else video.times
        self.wanted = set() if video.times is None else {int(video.times[frame]) for frame in frames}
        self._open()

    def close(self) -> None:
        self.pictures.close()
        self.container.close()

    def _open(self) -> None:
        self.container = open_video(self.video.path)
        self.stream = video_stream(self.container)
        # Videos are decoded in parallel; threads inside each would only get in the way.
        self.stream.codec_context.thread_count = 1
        self.pictures = self._decode()
        self.position: int | None = None

    def read(self, frame: int) -> av.VideoFrame:
        target = int(self.times[frame])
        for _ in self._approaches(target):
            for time, picture in self.pictures:
                self.position = time
                if time == target:
                    return picture
                if time is not None and time > target:
                    break
        raise UnreadableFrameError("the frame cannot be decoded", frame)

    def _approaches(self, target: int) -> Iterator[None]:
        """Bring the decoder before a frame, in one way after another until the frame is found."""
        keys = [] if self.video.times is None else [time for time in self.video.key_times if time <= target]
        if not keys or (self.position is not None and keys[-1] <= self.position):
            yield
        # A container may seek by decoding time and land on a key frame that is shown after the target, and
        # pictures that an open group of pictures shows before its key frame need the group before it.
        for start in reversed(keys):
            self.container.seek(start, stream=self.stream)
            self.pictures = self._decode()
            yield
        # What cannot be sought at all is read from its beginning.
        self.container.close()
        self._open()
        yield

    def _decode(self) -> Generator[tuple[int | None, av.VideoFrame], None, None]:
        """The pictures from here on; of H.264 those alone that are wanted, or that others refer to."""
        context = self.stream.codec_context
        skips = context.name == "h264" and bool(self.wanted)
        wanted = False
        number = 0
        for packet in self.container.demux(self.stream):
            # The second field of a picture may be a packet of its own, with another time or none.
            second, wanted = wanted, packet.pts in self.wanted
            context.skip_frame = "NONREF" if skips and not wanted and not second else "DEFAULT"
            for picture in packet.decode():
                yield number if self.video.times is None else picture.pts, picture
                number += 1


def open_video(path: Path) -> av.container.InputContainer:
    """A file for reading. Titles and the like, which nobody reads, may be in any encoding."""
    return av.open(str(path), **_ANY_ENCODING)


def video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The first video stream that is not a cover picture."""
    streams = (one for one in container.streams.video if not one.disposition & Disposition.attached_pic)
    stream = next(streams, None)
    if stream is None:
        raise UnreadableFrameError("it holds no video stream")
    if stream.codec_context is None:
        raise UnreadableFrameError("ffmpeg does not know its codec")
    return stream


def _packet_times(
    container: av.container.InputContainer, stream: av.VideoStream
) -> tuple[PacketTimes, PacketTimes, PacketTimes, bool]:
    """Times of the packets that show a frame, of key frames and of decoder resets, in file order; and
    `miscounted`."""
    codec, miscounted = stream.codec_context.codec.canonical_name, False
    # This filter finds a damaged unit of a stream without decoding it.
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
        # What an edit list leaves out is not shown, but what is shown may need it.
        shown = not packet.is_discard
        # A VP8 frame's show_frame bit.
        if codec == "vp8" and not header & 0x10:
            shown, miscounted = False, True
        # The fifth bit of a VP9 frame's header, in profiles 0 to 2: show_existing_frame.
        miscounted |= codec == "vp9" and bool(header & 0x08)
        # The filter takes the packet's contents away.
        time, resets = packet.pts, packet.is_keyframe
        if shown:
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
    """A constant frame rate as a `range`: thousands of videos then cost next to no memory."""
    step = times[1] - times[0] if len(times) > 1 else 1
    regular = range(times[0], times[0] + step * len(times), step) if step > 0 else range(0)
    return regular if list(regular) == times else np.asarray(times, dtype=np.int64)
