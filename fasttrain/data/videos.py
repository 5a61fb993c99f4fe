"""Video files through PyAV: is the file whole, and its frames by number.

Used by sources.py (probe, read) and pack.py. A frame's number is its place in presentation order, whatever
the frame rate does. Frames come as ffmpeg shows them: colour matrix and range as the stream says, 10 bits
rounded to 8, turned upright by the display matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.bitstream import BitStreamFilterContext

from fasttrain.data.images import UnreadableFrameError

Frame = npt.NDArray[np.uint8]
Times = Sequence[int] | npt.NDArray[np.int64]

VIDEO_SUFFIXES = frozenset(
    {
        ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts",
        ".wmv", ".flv", ".3gp", ".ogv",
    }
)  # fmt: skip

# Filters that walk the length-prefixed NAL units of a stream: they find a damaged one without decoding.
_STRUCTURE_FILTERS = {"h264": "h264_mp4toannexb", "hevc": "hevc_mp4toannexb"}


@dataclass(frozen=True)
class VideoInfo:
    """What random access to a video file needs to know; times are in the stream's time base."""

    path: Path
    codec: str
    quarter_turns: int
    """Counter-clockwise quarter turns that set a decoded frame upright."""
    times: Times | None
    """Presentation time of every frame, ascending; None where the container has none (some AVI)."""
    key_times: Sequence[int]
    """Presentation times of the key frames, ascending."""
    num_frames: int


def probe_video(path: Path) -> VideoInfo:
    """Read every packet and decode the first frame. Raises UnreadableFrameError with the reason."""
    try:
        with av.open(str(path)) as container:
            stream = _video_stream(container)
            times, key_times = _packet_times(container, stream)
            if not times:
                raise UnreadableFrameError("it holds no video frames")
            container.seek(0)
            first = next(container.decode(stream), None)
            if first is None:
                raise UnreadableFrameError("its first frame cannot be decoded")
            known = [time for time in times if time is not None]
            return VideoInfo(
                path=path,
                codec=stream.codec_context.name,
                quarter_turns=_quarter_turns(first),
                times=_compact(sorted(known)) if len(known) == len(times) else None,
                key_times=sorted(time for time in key_times if time is not None),
                num_frames=len(times),
            )
    except (av.FFmpegError, OSError) as error:
        raise UnreadableFrameError(_reason(error)) from error


def read_video_frames(video: VideoInfo, frames: Sequence[int]) -> list[Frame]:
    """The frames of these numbers, each (H, W, 3) uint8 RGB. Decodes from the key frame before each.

    Raises UnreadableFrameError, with the number of the frame that could not be had.
    """
    found: dict[int, Frame] = {}
    frame = 0
    try:
        with av.open(str(video.path)) as container:
            stream = _video_stream(container)
            # Samples are decoded in parallel; threads inside each would only get in the way.
            stream.codec_context.thread_count = 1
            reader = _FrameReader(container, stream, video)
            for frame in sorted(set(frames)):
                found[frame] = to_rgb(reader.read(frame))
    except (av.FFmpegError, OSError) as error:
        raise UnreadableFrameError(_reason(error), frame) from error
    return [found[frame] for frame in frames]


def iterate_video(video: VideoInfo) -> Iterator[Frame]:
    """All frames of a video in order, each (H, W, 3) uint8 RGB. Raises UnreadableFrameError."""
    frame = 0
    try:
        with av.open(str(video.path)) as container:
            for picture in container.decode(_video_stream(container)):
                yield to_rgb(picture)
                frame += 1
    except (av.FFmpegError, OSError) as error:
        raise UnreadableFrameError(_reason(error), frame) from error


def to_rgb(picture: av.VideoFrame) -> Frame:
    """A decoded picture -> (H, W, 3) uint8 RGB, upright."""
    rgb = np.asarray(picture.to_ndarray(format="rgb24"), dtype=np.uint8)
    return np.ascontiguousarray(np.rot90(rgb, _quarter_turns(picture)))


class _FrameReader:
    """Reads frames in ascending order from one open container; seeks only past a key frame."""

    def __init__(
        self, container: av.container.InputContainer, stream: av.VideoStream, video: VideoInfo
    ) -> None:
        self.container, self.stream, self.video = container, stream, video
        self.pictures: Iterator[av.VideoFrame] = container.decode(stream)
        self.position: int | None = None

    def read(self, frame: int) -> av.VideoFrame:
        times = self.video.times
        if times is None:
            return self._count_to(frame)
        target = int(times[frame])
        keys = [time for time in self.video.key_times if time <= target]
        if self.position is not None and (not keys or keys[-1] <= self.position):
            picture = self._decode_to(target)
            if picture is not None:
                return picture
        # A container may seek by decoding time and land on a key frame that is shown after the target, and
        # pictures that an open group of pictures shows before its key frame need the group before it.
        for start in [*reversed(keys), int(times[0])]:
            self.container.seek(start, stream=self.stream)
            self.pictures = self.container.decode(self.stream)
            picture = self._decode_to(target)
            if picture is not None:
                return picture
        raise UnreadableFrameError("the frame cannot be decoded", frame)

    def _decode_to(self, target: int) -> av.VideoFrame | None:
        for picture in self.pictures:
            self.position = picture.pts
            if picture.pts is not None and picture.pts >= target:
                return picture if picture.pts == target else None
        return None

    def _count_to(self, frame: int) -> av.VideoFrame:
        for picture in self.pictures:
            self.position = 0 if self.position is None else self.position + 1
            if self.position == frame:
                return picture
        raise UnreadableFrameError("the frame cannot be decoded", frame)


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    if not container.streams.video:
        raise UnreadableFrameError("it holds no video stream")
    return container.streams.video[0]


def _packet_times(
    container: av.container.InputContainer, stream: av.VideoStream
) -> tuple[list[int | None], list[int | None]]:
    """Presentation times of all packets and of the key packets, in file order."""
    name = _STRUCTURE_FILTERS.get(stream.codec_context.name)
    structure = BitStreamFilterContext(name, stream) if name else None
    times: list[int | None] = []
    key_times: list[int | None] = []
    for packet in container.demux(stream):
        if not packet.size or packet.is_discard:
            continue
        if packet.is_corrupt:
            raise UnreadableFrameError(f"packet {len(times)} is corrupt")
        times.append(packet.pts)
        if packet.is_keyframe:
            key_times.append(packet.pts)
        if structure:
            try:
                structure.filter(packet)
            except av.FFmpegError as error:
                raise UnreadableFrameError(f"packet {len(times) - 1} is damaged: {_reason(error)}") from error
    return times, key_times


def _quarter_turns(picture: av.VideoFrame) -> int:
    return round(picture.rotation / 90) % 4


def _compact(times: list[int]) -> Times:
    """A constant frame rate as a `range`: thousands of videos then cost next to no memory."""
    step = times[1] - times[0] if len(times) > 1 else 1
    regular = range(times[0], times[0] + step * len(times), step) if step > 0 else range(0)
    return regular if list(regular) == times else np.asarray(times, dtype=np.int64)


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).rstrip(".").lower()
