"""Prepare videos for NVDEC, the GPU's video decoder, which is used through DALI.

DALI receives clips: small Matroska files with only the packets needed for the requested frames, so that NVDEC
need not decode the whole video. This module also decides which videos DALI and NVDEC decode correctly, and
computes the colour corrections.
"""

from __future__ import annotations

import ctypes
import io
import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt

from fasttrain.data.images import Bytes, UnreadableFrameError
from fasttrain.data.video import HAS_PYAV, Matrix, VideoInfo, open_video, video_stream
from fasttrain.files import os_reason

if HAS_PYAV:
    import av
    from av.bitstream import BitStreamFilterContext

# Codec -> supported pixel formats and maximum side. AV1 is excluded: DALI 2.4 miscounts its repeated frames.
_CODECS = {
    "h264": ({"yuv420p", "yuvj420p"}, 4096),
    "hevc": ({"yuv420p", "yuvj420p", "yuv420p10le"}, 8192),
    "vp8": ({"yuv420p"}, 4096),
    "vp9": ({"yuv420p", "yuv420p10le"}, 8192),
}
_MIN_SIDE = 144
# The CPU decodes smaller frames just as fast.
_MIN_PIXELS = 640 * 360

# A slice of a reference picture in H.264 (nal_ref_idc is not 0).
_REFERENCE = re.compile(rb"\x00\x00\x01[\x21\x22\x25\x41\x42\x45\x61\x62\x65]")


def has_dali() -> bool:
    """Whether DALI is installed."""
    try:
        return find_spec("nvidia.dali") is not None
    # No package of NVIDIA is installed.
    except ModuleNotFoundError:
        return False


def has_nvdec() -> bool:
    """Whether the GPU driver provides NVDEC. In containers, it is often missing."""
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError:
        return False
    return True


def nvdec_refusal(video: VideoInfo) -> str | None:
    """Return the reason not to decode a video with NVDEC, or None. Most rules avoid bugs in DALI 2.4."""
    formats, max_side = _CODECS.get(video.codec, (set(), 0))
    sides = sorted((video.width, video.height))
    rules = {
        f"NVDEC does not support {video.codec} with pixel format {video.pix_fmt}": video.pix_fmt in formats,
        f"width and height must be {_MIN_SIDE} to {max_side} pixels": (
            _MIN_SIDE <= sides[0] <= sides[1] <= max_side
        ),
        # The colour conversion kernel processes 2 x 2 pixels and checks the bounds of only the first one.
        "DALI writes out of bounds if the width or height is odd": not any(side % 2 for side in sides),
        # DALI caches decoders by displayed size but looks them up by coded size. It creates a new decoder for
        # every clip, which is slow, or takes that of another video and reads the colours from wrong rows.
        "DALI confuses decoders if the coded and the displayed size differ": not video.cropped,
        # DALI consumes two time stamps for each picture with two fields.
        "DALI miscounts the frames of interlaced video": not video.interlaced,
        "DALI miscounts hidden and repeated frames": not video.miscounted,
        "DALI does not apply the rotation of the video": video.upright,
        # cut_clip selects packets by time and starts at a decoder reset.
        "its frames cannot be located by time": video.times is not None
        and any(time <= video.times[0] for time in video.reset_times),
        "the CPU decodes small frames just as fast": video.width * video.height >= _MIN_PIXELS,
    }
    return next((reason for reason, passed in rules.items() if not passed), None)


def cut_clip(video: VideoInfo, frames: Sequence[int]) -> tuple[Bytes, list[int]]:
    """Copy the packets needed to decode `frames` into a small Matroska file, without decoding them.

    Returns the file, (n,) uint8, and the numbers of the requested frames in it. Raises UnreadableFrameError.
    """
    assert video.times is not None
    packets: dict[int, av.Packet] = {}
    targets = [int(video.times[frame]) for frame in frames]
    buffer = io.BytesIO()
    try:
        with open_video(video.path) as source, av.open(buffer, "w", format="matroska") as clip:
            stream = video_stream(source)
            for target in sorted(targets):
                if target not in packets:
                    start = max(time for time in video.reset_times if time <= target)
                    packets |= _packets_between(source, stream, start, target)
            if stream.codec_context.name == "h264":
                needed = _reference_times(stream, packets) | set(targets)
                packets = {time: packet for time, packet in packets.items() if time in needed}
            out = clip.add_stream_from_template(stream)
            # Decoding times may be missing or wrong, so assign ascending ones before all presentation times.
            for dts, packet in enumerate(packets.values(), start=min(packets) - len(packets)):
                packet.dts = dts
                packet.stream = out
                clip.mux(packet)
    except (av.FFmpegError, OSError) as error:
        raise UnreadableFrameError(os_reason(error), frames[0]) from error
    # DALI numbers the frames in presentation order.
    times = sorted(packets)
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8), [times.index(target) for target in targets]


def _packets_between(
    container: av.container.InputContainer, stream: av.VideoStream, start: int, target: int
) -> dict[int, av.Packet]:
    """Return the packets from the key frame at `start` to `target`, by time and in decoding order."""
    # Without an index (MPEG-TS), seeking is approximate and may land too late; then read from the beginning.
    for position in (start, 0):
        container.seek(position, stream=stream)
        packets: dict[int, av.Packet] = {}
        for packet in container.demux(stream):
            time = packet.pts
            # The key frame resets the decoder, so packets stored or displayed before it are not needed.
            if time is None or time < start or not (packets or time == start):
                continue
            packets[time] = packet
            if time == target:
                return packets
    raise UnreadableFrameError("the file has changed since it was scanned")


def _reference_times(stream: av.VideoStream, packets: dict[int, av.Packet]) -> set[int]:
    """Return the times of the reference pictures of an H.264 stream."""
    start_codes = BitStreamFilterContext("h264_mp4toannexb", stream)
    return {
        time
        for time, packet in packets.items()
        # Filter a copy, because the filter moves the contents out of the packet.
        if any(_REFERENCE.search(bytes(unit)) for unit in start_codes.filter(av.Packet(bytes(packet))))
    }


# --- colour correction: DALI decodes every stream as BT.601 ---

# Luma coefficients of red and blue (ITU-R BT.601-7, BT.709-6, BT.2020-2).
_LUMA: dict[Matrix, tuple[float, float]] = {
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "bt2020": (0.2627, 0.0593),
}


@cache
def rgb_correction(matrix: Matrix) -> npt.NDArray[np.float64]:
    """Return the (3, 3) matrix that converts RGB decoded as BT.601 to the RGB of the stream's own matrix."""
    return _ycc_to_rgb(matrix) @ np.linalg.inv(_ycc_to_rgb("bt601"))


def _ycc_to_rgb(matrix: Matrix) -> npt.NDArray[np.float64]:
    """Return the (3, 3) matrix from Y in 0..1 and Cb, Cr in -1/2..1/2 to RGB in 0..1."""
    red, blue = _LUMA[matrix]
    cr, cb = 2 * (1 - red), 2 * (1 - blue)
    green = 1 - red - blue
    return np.array([[1, 0, cr], [1, -cb * blue / green, -cr * red / green], [1, cb, 0]])
