"""NVDEC, the GPU's video decoder, through DALI: which videos it decodes correctly, its clips and colours.

DALI gets a small Matroska file with the packets that the wanted frames take, so that NVDEC decodes a dozen
pictures instead of the whole video.
"""

from __future__ import annotations

import ctypes
import io
import re
from collections.abc import Sequence
from functools import cache

import av
import numpy as np
import numpy.typing as npt
from av.bitstream import BitStreamFilterContext

from fasttrain.data.images import Bytes, UnreadableFrameError
from fasttrain.data.video import Matrix, VideoInfo, open_video, video_stream
from fasttrain.files import os_reason

# By codec: pixel formats, and the longest side. Not AV1: DALI 2.4 counts its repeated frames wrong.
_CODECS = {
    "h264": ({"yuv420p", "yuvj420p"}, 4096),
    "hevc": ({"yuv420p", "yuvj420p", "yuv420p10le"}, 8192),
    "vp8": ({"yuv420p"}, 4096),
    "vp9": ({"yuv420p", "yuv420p10le"}, 8192),
}
_MIN_SIDE = 144
# The host decodes smaller frames as fast.
_MIN_PIXELS = 640 * 360

# A slice of an H.264 picture that others refer to (nal_ref_idc is not 0).
_REFERENCE = re.compile(rb"\x00\x00\x01[\x21\x22\x25\x41\x42\x45\x61\x62\x65]")


def has_nvdec() -> bool:
    """Whether the driver comes with NVDEC; containers are often started without it."""
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError:
        return False
    return True


def nvdec_refusal(video: VideoInfo) -> str | None:
    """Why a video is not for NVDEC; None where it is. Most rules avoid a fault of DALI 2.4."""
    formats, max_side = _CODECS.get(video.codec, (set(), 0))
    sides = sorted((video.width, video.height))
    rules = {
        f"NVDEC does not take {video.codec} in {video.pix_fmt}": video.pix_fmt in formats,
        f"its sides are not {_MIN_SIDE} to {max_side} pixels": _MIN_SIDE <= sides[0] <= sides[1] <= max_side,
        # The kernel that converts colours works on two columns and rows, and checks only the first.
        "DALI writes odd sides out of bounds": not any(side % 2 for side in sides),
        # Decoders are kept by display size and looked up by coded size: a new one for every clip takes 50 to
        # 70 ms, and one of another video that matches reads the colours from the wrong rows.
        "DALI mixes up decoders where the coded size is another": not video.cropped,
        # Two time stamps are used up for every picture of two fields.
        "DALI miscounts the frames of interlaced video": not video.interlaced,
        "DALI miscounts its hidden or repeated frames": not video.miscounted,
        "DALI does not turn it upright": video.quarter_turns == 0,
        # A decoder must be able to start at or before the first frame, and to find frames by time.
        "its frames cannot be found by time": video.times is not None
        and any(time <= video.times[0] for time in video.reset_times),
        "the host decodes small frames as fast": video.width * video.height >= _MIN_PIXELS,
    }
    return next((reason for reason, holds in rules.items() if not holds), None)


def cut_clip(video: VideoInfo, frames: Sequence[int]) -> tuple[Bytes, list[int]]:
    """The packets that decoding these frames takes, as a small Matroska file, and the frames' numbers in it.

    Nothing is decoded. The file is (n,) uint8. Raises UnreadableFrameError.
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
                needed = _referred_to(stream, packets) | set(targets)
                packets = {time: packet for time, packet in packets.items() if time in needed}
            out = clip.add_stream_from_template(stream)
            # Decoding times may be missing or wrong: these ascend, and end before any frame is shown.
            for dts, packet in enumerate(packets.values(), start=min(packets) - len(packets)):
                packet.dts = dts
                packet.stream = out
                clip.mux(packet)
    except (av.FFmpegError, OSError) as error:
        raise UnreadableFrameError(os_reason(error), frames[0]) from error
    # A decoder counts frames in the order in which they are shown.
    shown = sorted(packets)
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8), [shown.index(target) for target in targets]


def _packets_between(
    container: av.container.InputContainer, stream: av.VideoStream, start: int, target: int
) -> dict[int, av.Packet]:
    """By time and in decoding order: from the key frame shown at `start` to the packet of `target`."""
    # A stream without an index (MPEG-TS) is sought by guesses, and one may land too late.
    for position in (start, 0):
        container.seek(position, stream=stream)
        packets: dict[int, av.Packet] = {}
        for packet in container.demux(stream):
            time = packet.pts
            # What comes before the key frame, or is shown before it, is needed by nothing after it.
            if time is None or time < start or not (packets or time == start):
                continue
            packets[time] = packet
            if time == target:
                return packets
    raise UnreadableFrameError("its packets changed since it was indexed")


def _referred_to(stream: av.VideoStream, packets: dict[int, av.Packet]) -> set[int]:
    """Times of the H.264 pictures that others may refer to."""
    start_codes = BitStreamFilterContext("h264_mp4toannexb", stream)
    return {
        time
        for time, packet in packets.items()
        # A copy, for the filter takes the packet's contents away.
        if any(_REFERENCE.search(bytes(unit)) for unit in start_codes.filter(av.Packet(bytes(packet))))
    }


# --- colours: DALI takes every stream for BT.601 ---

# Share of red and blue in luma, by matrix (ITU-R BT.601-7, BT.709-6, BT.2020-2).
_LUMA: dict[Matrix, tuple[float, float]] = {
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "bt2020": (0.2627, 0.0593),
}


@cache
def rgb_correction(matrix: Matrix) -> npt.NDArray[np.float64]:
    """(3, 3): RGB that was decoded by BT.601 -> RGB by the stream's own matrix."""
    return _ycc_to_rgb(matrix) @ np.linalg.inv(_ycc_to_rgb("bt601"))


def _ycc_to_rgb(matrix: Matrix) -> npt.NDArray[np.float64]:
    """(3, 3): Y in 0..1 and Cb, Cr in -1/2..1/2 -> RGB in 0..1."""
    red, blue = _LUMA[matrix]
    cr, cb = 2 * (1 - red), 2 * (1 - blue)
    green = 1 - red - blue
    return np.array([[1, 0, cr], [1, -cb * blue / green, -cr * red / green], [1, cb, 0]])
