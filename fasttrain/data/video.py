"""Scan video files and decode their frames by number, with PyAV.

The number of a frame is its zero-based index in presentation order, even if the frame rate varies. Frames
are decoded as ffmpeg displays them: with the colour matrix and range of the stream, rounded from 10 to 8
bits, and rotated or mirrored upright according to the display matrix.

A frame that is read alone equals that of sequential decoding. Decoding therefore starts at a key frame only
where this is exact, and otherwise at the beginning of the file.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
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
    import av.filter
    from av.bitstream import BitStreamFilterContext
    from av.stream import Disposition

    HAS_PYAV = True
except ModuleNotFoundError:
    HAS_PYAV = False

Times = Sequence[int] | npt.NDArray[np.int64]
Matrix = Literal["bt601", "bt709", "bt2020"]

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".mkv", ".mk3d", ".webm", ".avi", ".divx", ".flv"}
    | {".mpg", ".mpeg", ".mpe", ".mpv", ".m1v", ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".m2t", ".mxf"}
    | {".wmv", ".asf", ".ogv", ".ogm", ".rm", ".rmvb", ".dv", ".y4m", ".nut", ".ivf", ".gif", ".apng"}
    | {".h264", ".264", ".h265", ".265", ".hevc", ".mjpeg", ".mjpg", ".avc", ".obu"}
    | {".dav", ".lrv", ".mj2", ".swf", ".wtv"}
)

# Values of ffmpeg's AVColorSpace. Other matrices, which are rare or close to BT.601, are treated as BT.601.
_MATRICES: dict[int, Matrix] = {1: "bt709", 9: "bt2020", 10: "bt2020"}

# Containers that store the presentation time of every frame. For others, ffmpeg guesses the times,
# incorrectly with B-frames and after a seek.
_TIMED_CONTAINERS = ("mov", "matroska", "mpegts", "flv", "ivf", "nut")

# Codecs of which each packet holds one frame, and which can be decoded from any key frame. The same is true
# of all codecs without dependencies between frames. Others have packets without a frame (MPEG-4), or packets
# that are called key frames but depend on earlier ones (GIF).
_SEEKABLE_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mpeg1video", "mpeg2video"})

# Codecs whose first packet may be the only one with the parameter sets, or with the version of the encoder:
# early versions of x264 encode 4:4:4 in a way of their own, which the decoder must know.
_HEADERS_IN_FIRST_PACKET = frozenset({"h264", "hevc"})

# Number of decoded frames whose times are compared with those of the packets: some files have wrong times.
_NUM_CHECKED = 4

# Number of key frames before a frame to try, until decoding starts at the beginning of the file.
_MAX_SEEKS = 3

# The filters that transpose a picture, reverse its rows, and reverse its columns.
_TURNS = (("transpose", "cclock_flip"), ("vflip",), ("hflip",))

# An H.264 IDR picture. It resets the decoder, unlike other pictures that ffmpeg flags as key frames.
_IDR = re.compile(rb"\x00\x00\x01[\x05\x25\x45\x65]")
# The first byte of any H.264 slice, after a start code.
_SLICE = re.compile(rb"\x00\x00\x01([\x01\x21\x41\x61\x05\x25\x45\x65])")


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
    upright: bool
    """Whether the frames are stored upright, and need not be rotated or mirrored."""
    matrix: Matrix
    """YCbCr matrix; BT.601 if the stream does not specify one, as in ffmpeg."""
    times: Times | None
    """Presentation times of all frames, ascending; None if they are unreliable (AVI, MPEG-PS)."""
    key_times: Sequence[int]
    """Presentation times of the key frames, ascending; none if decoding must start at the beginning."""
    reset_times: Sequence[int]
    """Presentation times of the key frames that reset the decoder, even those that are not displayed."""
    num_frames: int
    num_damaged: int
    """Number of damaged frames at the ends of the file, which are left out."""
    miscounted: bool
    """Whether DALI miscounts frames: a packet hides its frame (VP8) or repeats an earlier one (VP9)."""


def probe_video(path: Path) -> VideoInfo:
    """Scan a video file: read all of its packets and decode its first frames.

    If the packets do not tell the frames, or seem damaged, decode all frames. Damaged frames at the beginning
    and at the end are left out, because many files are cut there. Raises UnreadableFrameError if another
    frame is damaged, and InputError if PyAV is not installed.
    """
    require_pyav("reading")
    try:
        # Not every file can be rewound, so it is opened twice.
        with open_video(path) as container:
            packets = _scan_packets(container, video_stream(container))
        with open_video(path) as container:
            stream = video_stream(container)
            context = stream.codec_context
            # With more threads, the decoder marks fewer damaged pictures.
            context.thread_count = 1
            decoder = _Decoder(container, stream)
            pictures = iter(decoder)
            first = next(pictures, None)
            if first is None:
                raise UnreadableFrameError("no frame can be decoded")
            checked = [first.pts, *(picture.pts for picture in islice(pictures, _NUM_CHECKED - 1))]
            # If the first key frame was cut off, the frames up to the next one cannot be decoded.
            skipped = packets.times.index(first.pts) if first.pts in packets.times else 0
            times = packets.times[skipped:]
            if times[:_NUM_CHECKED] != checked:
                times = [*checked, *(picture.pts for picture in pictures)]
            distinct = sorted({time for time in times if time is not None})
            return VideoInfo(
                path=path,
                codec=context.codec.canonical_name,
                pix_fmt=first.format.name,
                width=first.width,
                height=first.height,
                cropped=(context.coded_width, context.coded_height) != (first.width, first.height),
                interlaced=first.interlaced_frame,
                upright=not any(_orientation(first)),
                matrix=_MATRICES.get(int(first.colorspace), "bt601"),
                times=_compact(distinct) if packets.is_timed and distinct == times else None,
                key_times=packets.key_times,
                reset_times=packets.reset_times,
                num_frames=len(times),
                num_damaged=decoder.num_damaged,
                miscounted=packets.miscounted,
            )
    except (av.FFmpegError, OSError) as error:
        raise UnreadableFrameError(os_reason(error)) from error


def skipped_frames(name: str, video: VideoInfo) -> list[tuple[str, str]]:
    """Return an entry for the report of skipped files if damaged frames of a video are left out."""
    if not video.num_damaged:
        return []
    return [(name, f"frames left out, damaged where the file was cut off: {video.num_damaged}")]


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
        to_rgb = RgbConverter()
        with closing(_FrameReader(video, frames)) as reader:
            for frame in frames:
                yield to_rgb(reader.read(frame))
    except (av.FFmpegError, OSError) as error:
        raise UnreadableFrameError(os_reason(error), frame) from error


class RgbConverter:
    """Convert decoded pictures to (H, W, 3) uint8 RGB and turn them upright, one after another."""

    def __init__(self) -> None:
        self._graph: av.filter.Graph | None = None
        self._properties: tuple[Any, ...] = ()

    def __call__(self, picture: av.VideoFrame) -> Frame:
        colours = picture.format, picture.colorspace, picture.color_range
        properties = picture.width, picture.height, *colours, *_orientation(picture)
        if self._graph is None or properties != self._properties:
            self._graph, self._properties = _rgb_graph(picture), properties
        self._graph.vpush(picture)
        return np.asarray(self._graph.vpull().to_ndarray(), dtype=np.uint8)


def _rgb_graph(picture: av.VideoFrame) -> av.filter.Graph:
    """Return the graph by which the ffmpeg command would turn pictures like this one and convert them to RGB.

    PyAV's own conversion differs from that of ffmpeg for interlaced video, 10 bits, odd sides and others.
    """
    graph = av.filter.Graph()
    # With more threads, the graph starts new ones and hangs in a forked process.
    graph.threads = 1
    graph.link_nodes(
        graph.add_buffer(
            width=picture.width,
            height=picture.height,
            format=picture.format,
            time_base=picture.time_base or Fraction(1, 1000),
        ),
        *(
            graph.add(*turn)
            for turn, is_needed in zip(_TURNS, _orientation(picture), strict=True)
            if is_needed
        ),
        graph.add("format", "pix_fmts=rgb24"),
        graph.add("buffersink"),
    ).configure()
    return graph


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
        self.is_at_start = True

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
        for start in reversed(keys[-_MAX_SEEKS:]):
            if self.is_at_start and self.video.codec in _HEADERS_IN_FIRST_PACKET:
                self._read_headers()
            try:
                self.container.seek(start, stream=self.stream)
            # Some files can only be read from the beginning.
            except av.FFmpegError:
                break
            self.pictures = self._decode()
            yield
        # If no key frame leads to the target, decode from the start of the file.
        self.container.close()
        self._open()
        yield

    def _read_headers(self) -> None:
        """Give the first packet to the decoder, which keeps the headers but does not decode the picture."""
        self.is_at_start = False
        self.stream.codec_context.skip_frame = "ALL"
        with suppress(av.InvalidDataError):
            next(self.container.demux(self.stream)).decode()

    def _decode(self) -> Generator[tuple[int | None, av.VideoFrame], None, None]:
        """Decode from the current position. For H.264, skip unwanted pictures that are not references."""
        self.is_at_start = False
        context = self.stream.codec_context
        skips = context.name == "h264" and bool(self.wanted)
        extradata = context.extradata or b""
        # In MP4 and Matroska, NAL units follow their lengths (ISO/IEC 14496-15); elsewhere, start codes.
        length_size = (extradata[4] & 3) + 1 if extradata[:1] == b"\x01" else 0
        wanted = False
        number = 0
        for packet in self.container.demux(self.stream):
            # The second field of a picture may be in a separate packet, with a different time or none.
            is_second_field, wanted = wanted, packet.pts in self.wanted
            is_needed = not skips or wanted or is_second_field or _is_reference(packet, length_size)
            context.skip_frame = "DEFAULT" if is_needed else "NONREF"
            damage: av.InvalidDataError | None = None
            try:
                pictures = packet.decode()
            except av.InvalidDataError as error:
                # The packets before the first picture may depend on others: on those that were cut off, or on
                # headers that are only at the beginning of the file.
                if not number:
                    continue
                # Some intact pictures are still waiting to be displayed.
                pictures, damage = context.decode(None), error
            for picture in pictures:
                # Decoding may have started too close to this picture. If not, it is damaged.
                if picture.is_corrupt:
                    continue
                yield number if self.video.times is None else picture.pts, picture
                number += 1
            if damage:
                raise damage


def _is_reference(packet: av.Packet, length_size: int) -> bool:
    """Whether other pictures may depend on that of an H.264 packet: nal_ref_idc is not 0 in its first slice.

    Asking the decoder to skip all other pictures would also hide damage.
    """
    if not packet.size:
        return True
    data = memoryview(packet)
    if not length_size:
        first = _SLICE.search(data)
        return first is None or bool(first[1][0] & 0x60)
    position = 0
    while position + length_size < len(data):
        header = data[position + length_size]
        if header & 31 in (1, 2, 5):
            return bool(header & 0x60)
        position += length_size + int.from_bytes(data[position : position + length_size], "big")
    return True


def open_video(path: Path) -> av.container.InputContainer:
    """Open a video file for reading, whatever the encoding of its metadata."""
    # Before version 19, PyAV raises on metadata that is not valid UTF-8, unless this option is set.
    any_encoding: dict[str, Any] = {"metadata_errors": "replace"}
    return av.open(str(path), **({} if int(av.__version__.split(".")[0]) >= 19 else any_encoding))


def video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """Return the video stream that the ffmpeg command would choose. Raises UnreadableFrameError."""
    streams = [
        stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic
    ]
    if not streams:
        raise UnreadableFrameError("the file contains no video stream")
    decodable = [stream for stream in streams if stream.codec_context is not None]
    if not decodable:
        raise UnreadableFrameError("the codec is unknown to ffmpeg")
    # A default stream counts as much as five million pixels.
    return max(
        decodable,
        key=lambda stream: (
            stream.width * stream.height + 5_000_000 * bool(stream.disposition & Disposition.default)
        ),
    )


@dataclass(frozen=True)
class _Packets:
    """What the packets of a video tell about its frames. The other fields are those of VideoInfo."""

    times: Sequence[int | None]
    """Presentation times of the displayed frames, ascending; empty if only decoding can tell them."""
    is_timed: bool
    """Whether the container stores times, and none is earlier than those before it, as in joined files."""
    key_times: list[int]
    reset_times: list[int]
    miscounted: bool


def _scan_packets(container: av.container.InputContainer, stream: av.VideoStream) -> _Packets:
    """Read all packets of a stream."""
    codec = stream.codec_context.codec
    name, miscounted, damaged = codec.canonical_name, False, False
    latest, is_timed = None, container.format.name.startswith(_TIMED_CONTAINERS)
    # This filter detects damaged NAL units without decoding them.
    structure = BitStreamFilterContext(f"{name}_mp4toannexb", stream) if name in ("h264", "hevc") else None
    times: list[int | None] = []
    key_times: list[int] = []
    reset_times: list[int] = []
    for packet in container.demux(stream):
        if not packet.size:
            continue
        damaged |= packet.is_corrupt
        header = memoryview(packet)[0]
        # Frames that an edit list discards are not displayed, but displayed frames may depend on them.
        displayed = not packet.is_discard
        # The show_frame bit of a VP8 frame header.
        if name == "vp8" and not header & 0x10:
            displayed, miscounted = False, True
        # The show_existing_frame bit of a VP9 frame header (profiles 0 to 2).
        miscounted |= name == "vp9" and bool(header & 0x08)
        # Read now, because the filter moves the contents out of the packet.
        time, resets = packet.pts, packet.is_keyframe
        if displayed:
            times.append(time)
        if displayed and resets and time is not None:
            key_times.append(time)
        if packet.dts is not None:
            is_timed &= latest is None or packet.dts >= latest
            latest = packet.dts
        if structure:
            try:
                units = structure.filter(packet)
            except av.FFmpegError:
                structure, units, damaged = None, [], True
            if name == "h264":
                resets = resets and any(_IDR.search(bytes(unit)) for unit in units)
        if resets and time is not None:
            reset_times.append(time)
    seekable = name in _SEEKABLE_CODECS or codec.intra_only
    distinct = sorted({time for time in times if time is not None})
    # MPEG-TS does not tell the size of a packet, so the last one may be incomplete.
    intact = not damaged and container.format.name != "mpegts"
    are_told = intact and is_timed and seekable and len(distinct) == len(times)
    return _Packets(
        times=distinct if are_told else [],
        is_timed=is_timed,
        key_times=sorted(key_times) if seekable else [],
        reset_times=[] if damaged else sorted(reset_times),
        miscounted=miscounted,
    )


class _Decoder:
    """Decode a file from its beginning, leaving out damaged pictures at its beginning and end.

    Iteration raises UnreadableFrameError if a picture in between is damaged.
    """

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream) -> None:
        self._container, self._stream = container, stream
        self.num_damaged = 0

    def __iter__(self) -> Iterator[av.VideoFrame]:
        number = beyond = at_start = 0
        for packet in self._container.demux(self._stream):
            try:
                pictures = packet.decode()
            except av.InvalidDataError:
                # Before the first picture, there are packets that depend on others that were cut off.
                pictures, self.num_damaged = [], self.num_damaged + (number > 0)
            for picture in pictures:
                if picture.is_corrupt:
                    self.num_damaged += 1
                    continue
                at_start = at_start if number else self.num_damaged
                number += 1
                beyond += self.num_damaged > at_start
                yield picture
            # After a damaged picture at the end, only pictures that were waiting to be displayed can follow.
            if beyond > self._stream.codec_context.reorder_depth + 1:
                raise UnreadableFrameError(f"frame {number - beyond} is damaged", number - beyond)


def _orientation(picture: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Return whether to transpose a picture, then to reverse its rows, and its columns, to show it upright.

    This follows the display matrix (ISO/IEC 14496-12, section 6.2.2), which maps the pixel at (x, y) to
    (a x + c y, b x + d y). Like ffmpeg, round its rotation to right angles.
    """
    try:
        data: Any = picture.side_data.get("DISPLAYMATRIX")
    # PyAV cannot read the matrix beside side data that it does not know, such as EXIF, but its rotation.
    except ValueError:
        quarters = round(picture.rotation / 90) % 4
        return quarters in (1, 3), quarters in (1, 2), quarters in (2, 3)
    if data is None:
        return False, False, False
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), dtype=np.int32).tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, b < 0, c < 0
    return False, d < 0, a < 0


def _compact(times: list[int]) -> Times:
    """Represent the times of a constant frame rate as a `range`, which uses hardly any memory."""
    step = times[1] - times[0] if len(times) > 1 else 1
    regular = range(times[0], times[0] + step * len(times), step) if step > 0 else range(0)
    return regular if list(regular) == times else np.asarray(times, dtype=np.int64)
