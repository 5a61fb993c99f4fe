"""The corpus of video files and frame folders that differ in kind, and their page of the documentation.

    python tests/formats.py > docs/formats.md

Each case writes one file or frame folder with ffmpeg, PyAV or Pillow. The frames show `synthetic.picture`, so
neighbouring frames differ by more than ten levels.
"""

import io
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image
from synthetic import picture

SIZE, FRAMES = (64, 96), 12


@dataclass(frozen=True)
class Case:
    """One file or frame folder. `make` writes it to a given path."""

    name: str
    """Name of the file, or of the frame folder."""
    kind: str
    """What is special about it, for the documentation."""
    make: Callable[[Path], None]
    frames: int = FRAMES
    refused: str = ""
    """A part of the reason for which it is refused; empty if it is readable."""
    tolerance: float = 0
    """Mean difference to the reference that is allowed, in levels of 255; 0 requires equal frames."""
    reference: str = "ffmpeg"
    """`ffmpeg`, or `picture` for the encoded frames, where ffmpeg is less exact than Pillow."""
    options: str = ""
    """Options with which ffmpeg shows what is expected."""
    damaged: int | None = None
    """The number of a damaged frame that ffmpeg shows, but that is left out."""


def run_ffmpeg(*arguments: str | Path, stdin: bytes = b"") -> bytes:
    command = [get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, check=True).stdout


@lru_cache
def raw_frames(frames: int, height: int, width: int, first: int = 0) -> bytes:
    return np.stack([picture(0, first + t, height, width) for t in range(frames)]).tobytes()


def encode(
    path: Path,
    options: str,
    *,
    frames: int = FRAMES,
    size: tuple[int, int] = SIZE,
    rate: str = "25",
    first: int = 0,
    inputs: str = "",
) -> None:
    """Encode pictures with ffmpeg. `inputs` are options of further inputs."""
    run_ffmpeg(
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[1]}x{size[0]}", "-framerate", rate, "-i", "-"),
        *inputs.split(),
        # One thread and no version numbers, so that the file is the same on every machine.
        *("-threads", "1", "-fflags", "+bitexact", "-flags", "+bitexact"),
        *options.split(),
        path,
        stdin=raw_frames(frames, *size, first),
    )


def video(name: str, kind: str, options: str, **encode_options: Any) -> Case:
    """A video that is encoded with ffmpeg."""
    frames = encode_options.get("frames", FRAMES)
    return Case(name, kind, lambda path: encode(path, options, **encode_options), frames)


def copied(
    name: str,
    kind: str,
    encoding: str,
    options: str,
    before: str = "",
    *,
    source: str = "x.mp4",
    **fields: Any,
) -> Case:
    """A video whose packets ffmpeg copies from `source`, with options `before` and after the input."""

    def make(path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            original = Path(folder, source)
            encode(original, encoding)
            run_ffmpeg(*before.split(), "-i", original, "-c", "copy", *options.split(), path)

    return Case(name, kind, make, **fields)


def edited(name: str, kind: str, encoding: str, edit: Callable[[bytes], bytes], **fields: Any) -> Case:
    """A video file whose bytes are edited."""

    def make(path: Path) -> None:
        encode(path, encoding)
        path.write_bytes(edit(path.read_bytes()))

    return Case(name, kind, make, **fields)


def joined(name: str, kind: str, first: str, second: str, *, size: Any = SIZE, **fields: Any) -> Case:
    """Two halves of a video, joined byte by byte, each given by its options. `size` is that of the second."""

    def make(path: Path) -> None:
        encode(path, first, frames=FRAMES // 2)
        data = path.read_bytes()
        encode(path, second, frames=FRAMES // 2, first=FRAMES // 2, size=size)
        path.write_bytes(data + path.read_bytes())

    return Case(name, kind, make, **fields)


H264 = "-c:v libx264 -preset veryfast -g 5 -bf 2 -pix_fmt yuv420p"
HEVC = "-c:v libx265 -preset ultrafast -pix_fmt yuv420p -x265-params keyint=5:bframes=2:log-level=none"
VP8 = "-c:v libvpx -deadline realtime -cpu-used 8 -g 5 -b:v 1M"
VP9 = "-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -g 5 -b:v 1M"
AV1 = "-c:v libsvtav1 -preset 12 -g 5 -crf 20 -svtav1-params lp=1"
MPEG2 = "-c:v mpeg2video -g 5 -bf 2 -q:v 2"
MPEG4 = "-c:v mpeg4 -g 5 -bf 2 -q:v 2"
SOUND = "-f lavfi -t 0.48 -i sine=sample_rate=44100"
PAL = {"size": (576, 720), "frames": 4}


def fake_h264_header(data: bytes) -> bytes:
    """Keep the parameter sets of the first key frame only; the others become NAL units without meaning."""
    first_slice = data.index(b"\0\0\1\x65")
    head, tail = data[:first_slice], data[first_slice:]
    for kind in (0x67, 0x68):
        tail = tail.replace(bytes([0, 0, 1, kind]), bytes([0, 0, 1, 0x60 | 30]))
    return head + tail


def fake_hevc_header(data: bytes) -> bytes:
    """As `fake_h264_header`: NAL units of types 32 to 34 become type 48."""
    first_slice = min(data.find(bytes([0, 0, 1, 2 * kind, 1])) % len(data) for kind in (19, 20))
    head, tail = data[:first_slice], data[first_slice:]
    for kind in (32, 33, 34):
        tail = tail.replace(bytes([0, 0, 1, 2 * kind, 1]), bytes([0, 0, 1, 2 * 48, 1]))
    return head + tail


def fake_mpeg2_header(data: bytes) -> bytes:
    """As `fake_h264_header`: sequence headers and their extensions become user data."""
    first_picture = data.index(b"\0\0\1\x00")
    head, tail = data[:first_picture], data[first_picture:]
    tail = re.sub(rb"\x00\x00\x01(\xb3|\xb5(?=[\x10-\x2f]))", lambda _: b"\0\0\1\xb2", tail)
    return head + tail


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: round(len(data) * share)]


def one_av1_header(path: Path) -> None:
    """Write AV1 in IVF whose sequence header is in the first packet only."""
    with tempfile.TemporaryDirectory() as folder:
        complete, stripped = Path(folder, "x.ivf"), Path(folder, "y.ivf")
        encode(complete, AV1)
        run_ffmpeg("-i", complete, "-c", "copy", "-bsf:v", "filter_units=remove_types=1", stripped)
        # The header of the file has 32 bytes; that of a packet has 12 and begins with its size.
        ends = [44 + int.from_bytes(file.read_bytes()[32:36], "little") for file in (complete, stripped)]
        path.write_bytes(complete.read_bytes()[: ends[0]] + stripped.read_bytes()[ends[1] :])


CONTAINERS = [
    video("h264.mp4", "MP4, index at the end", H264),
    video("faststart.mp4", "MP4, index at the start", f"{H264} -movflags faststart"),
    video("fragmented.mp4", "MP4, fragmented", f"{H264} -movflags frag_keyframe+empty_moov"),
    video(
        "dash.mp4",
        "MP4, DASH segments with a global index",
        f"{H264} -movflags dash+global_sidx -frag_duration 200000",
    ),
    video("hybrid.mp4", "MP4, hybrid fragmented", f"{H264} -movflags hybrid_fragmented"),
    video("h264.m4v", "M4V", H264),
    video("h264.mov", "QuickTime", H264),
    video("h264.qt", "QuickTime, .qt", f"{H264} -f mov"),
    video("h264.mkv", "Matroska", H264),
    video("live.mkv", "Matroska without an index (live)", f"{H264} -live 1"),
    video("vp9.webm", "WebM", VP9),
    video("mpeg4.avi", "AVI", f"{MPEG4} -bf 0"),
    video("mpeg4.divx", "AVI, .divx", f"{MPEG4} -bf 0 -f avi"),
    video("h264.ts", "MPEG-TS", H264),
    video("h264.m2ts", "MPEG-TS of Blu-ray", f"{H264} -mpegts_m2ts_mode 1 -f mpegts"),
    video("h264.MTS", "MPEG-TS of AVCHD, in capitals", f"{H264} -mpegts_m2ts_mode 1 -f mpegts"),
    video("mpeg2.mpg", "MPEG-PS", MPEG2),
    video("mpeg1.mpeg", "MPEG-1 system stream", "-c:v mpeg1video -g 5 -bf 2 -q:v 2 -f mpeg"),
    video("mpeg2.VOB", "DVD", f"{MPEG2} -f vob"),
    video("h264.flv", "Flash Video", H264),
    video("h264.f4v", "Flash MP4", H264),
    video("h263.3gp", "3GPP with H.263", "-c:v h263 -g 5 -q:v 2", size=(96, 128)),
    video("h264.3g2", "3GPP2", H264),
    video("msmpeg4.asf", "ASF", "-c:v msmpeg4 -g 5 -q:v 2"),
    video("wmv2.wmv", "Windows Media Video", "-c:v wmv2 -g 5 -q:v 2"),
    video("theora.ogv", "Ogg", "-c:v libtheora -g 5 -q:v 9"),
    video("mpeg2.mxf", "MXF", MPEG2),
    video("h264.mxf", "MXF with H.264", H264),
    video("raw.y4m", "YUV4MPEG2", "-pix_fmt yuv420p"),
    video("animation.gif", "animated GIF", ""),
    video("animation.apng", "animated PNG", "-f apng"),
    video("h264.nut", "NUT", H264),
    video("vp8.ivf", "IVF", VP8),
    video("raw.h264", "H.264 without a container", H264),
    video("raw.hevc", "HEVC without a container", HEVC),
    video("raw.m2v", "MPEG-2 without a container", MPEG2),
    video("raw.mjpeg", "Motion JPEG without a container", "-c:v mjpeg -q:v 2 -pix_fmt yuvj420p"),
    video("rv20.rm", "RealMedia", "-c:v rv20 -g 5 -q:v 2", size=(96, 128)),
    video("dv.dv", "DV", "-c:v dvvideo -pix_fmt yuv420p", **PAL),
    video("no_suffix", "MP4 without a suffix", f"{H264} -f mp4"),
    video("avi_named.mp4", "AVI named .mp4", f"{MPEG4} -bf 0 -f avi"),
]

CODECS = [
    video("hevc.mp4", "HEVC", HEVC),
    video("hevc.mkv", "HEVC in Matroska", HEVC),
    video("hevc.ts", "HEVC in MPEG-TS", HEVC),
    video("vp8.webm", "VP8", VP8),
    video(
        "vp8_altref.webm",
        "VP8 with hidden frames",
        "-c:v libvpx -cpu-used 4 -auto-alt-ref 1 -lag-in-frames 8 -arnr-maxframes 3 -b:v 200k",
        frames=24,
    ),
    video(
        "vp9_altref.webm",
        "VP9 with hidden and repeated frames",
        "-c:v libvpx-vp9 -cpu-used 6 -auto-alt-ref 1 -lag-in-frames 12 -b:v 200k",
        frames=24,
    ),
    video("vp9.mp4", "VP9 in MP4", VP9),
    video("av1.mp4", "AV1 (SVT-AV1)", AV1),
    video("av1.mkv", "AV1 in Matroska", AV1),
    video("av1_aom.webm", "AV1 (libaom)", "-c:v libaom-av1 -cpu-used 8 -usage realtime -g 5 -b:v 1M"),
    video(
        "vvc.mp4",
        "VVC",
        "-c:v libvvenc -preset faster -vvenc-params intraperiod=8:threads=1 -qp 20",
        frames=9,
    ),
    video("mpeg1.mp4", "MPEG-1", "-c:v mpeg1video -g 5 -bf 2 -q:v 2"),
    video("mpeg4_bframes.mp4", "MPEG-4 part 2 with B-frames", MPEG4),
    video("mpeg4_qpel.mp4", "MPEG-4 part 2, quarter-pixel motion", f"{MPEG4} -flags +qpel+mv4"),
    video("xvid.avi", "Xvid", "-c:v libxvid -g 5 -q:v 2"),
    video("msmpeg4v2.avi", "MS MPEG-4 version 2", "-c:v msmpeg4v2 -g 5 -q:v 2"),
    video("div3.avi", "DivX 3", "-c:v msmpeg4 -g 5 -q:v 2 -tag:v DIV3"),
    video("wmv1.wmv", "WMV 7", "-c:v wmv1 -g 5 -q:v 2"),
    video("flv1.flv", "Sorenson Spark", "-c:v flv -g 5 -q:v 2"),
    video("h261.mkv", "H.261", "-c:v h261 -g 5 -q:v 2", size=(144, 176)),
    video("h263p.avi", "H.263+", "-c:v h263p -g 5 -q:v 2"),
    video("mjpeg.avi", "Motion JPEG", "-c:v mjpeg -q:v 2 -pix_fmt yuvj420p"),
    video("mjpeg422.mov", "Motion JPEG 4:2:2", "-c:v mjpeg -q:v 2 -pix_fmt yuvj422p"),
    video("ljpeg.avi", "lossless JPEG", "-c:v ljpeg -pix_fmt bgr24"),
    video("jpeg2000.mxf", "JPEG 2000", "-c:v jpeg2000"),
    video("prores.mov", "ProRes 422", "-c:v prores_ks -profile:v 2 -pix_fmt yuv422p10le"),
    video("dnxhd.mov", "DNxHR", "-c:v dnxhd -profile:v dnxhr_sq -pix_fmt yuv422p", size=(128, 256)),
    video("cineform.mov", "CineForm", "-c:v cfhd -pix_fmt yuv422p10le"),
    video("hap.mov", "Hap", "-c:v hap"),
    video("dirac.mkv", "Dirac (VC-2)", "-c:v vc2 -pix_fmt yuv420p"),
    video("ffv1.mkv", "FFV1", "-c:v ffv1 -g 5 -pix_fmt yuv420p"),
    video("huffyuv.avi", "HuffYUV", "-c:v huffyuv -pix_fmt yuv422p"),
    video("utvideo.avi", "Ut Video", "-c:v utvideo -pix_fmt yuv420p"),
    video("magicyuv.mkv", "MagicYUV", "-c:v magicyuv -pix_fmt gbrp"),
    video("rgb24.avi", "uncompressed RGB", "-c:v rawvideo -pix_fmt bgr24"),
    video("uyvy.mov", "uncompressed 4:2:2", "-c:v rawvideo -pix_fmt uyvy422"),
    video("v210.mov", "uncompressed 4:2:2, 10 bits", "-c:v v210 -pix_fmt yuv422p10le"),
    video("cinepak.avi", "Cinepak", "-c:v cinepak -g 5", frames=6),
    video("qtrle.mov", "QuickTime Animation", "-c:v qtrle -g 5 -pix_fmt rgb24"),
    video("rpza.mov", "Apple Video", "-c:v rpza -g 5"),
    video("smc.mov", "Apple Graphics", "-c:v smc -g 5"),
    video("msvideo1.avi", "Microsoft Video 1", "-c:v msvideo1 -g 5"),
    video("msrle.avi", "Microsoft RLE with a palette", "-c:v msrle -g 5"),
    video("zmbv.avi", "screen capture of DOSBox", "-c:v zmbv -g 5 -pix_fmt bgr0"),
    video("flashsv.flv", "Flash Screen Video", "-c:v flashsv -g 5"),
    video("svq1.mov", "Sorenson Video 1", "-c:v svq1 -g 5 -q:v 2"),
    video("snow.avi", "Snow", "-c:v snow -g 5 -q:v 2", frames=6),
    video("rv10.rm", "RealVideo 1", "-c:v rv10 -g 5 -q:v 2", size=(96, 128)),
    video("dv.avi", "DV in AVI", "-c:v dvvideo -pix_fmt yuv420p", **PAL),
    video("png.mov", "PNG in QuickTime", "-c:v png"),
    video("asv2.avi", "ASUS V2", "-c:v asv2 -q:v 2"),
    video("speedhq.mkv", "NewTek SpeedHQ", "-c:v speedhq -pix_fmt yuv422p -q:v 2"),
]

TAGGED = {
    # ffmpeg's names of the matrix for the scaler and for the stream.
    "bt601": ("bt601", "smpte170m"),
    "bt709": ("bt709", "bt709"),
    "bt2020": ("bt2020", "bt2020nc"),
    "smpte240m": ("smpte240m", "smpte240m"),
    "fcc": ("fcc", "fcc"),
}
PIXELS = [
    *(
        video(
            f"{name}_{range_}.mp4",
            f"matrix {stream}, {'full' if range_ == 'pc' else 'limited'} range",
            f"-vf scale=out_color_matrix={scaler}:out_range={range_} {H264}"
            f" -colorspace {stream} -color_range {range_}",
            frames=6,
        )
        for name, (scaler, stream) in TAGGED.items()
        for range_ in ("tv", "pc")
    ),
    video("yuvj420p.mp4", "full range by its pixel format", H264.replace("yuv420p", "yuvj420p")),
    video("h264_10bit.mp4", "H.264, 10 bits", H264.replace("yuv420p", "yuv420p10le")),
    video("h264_422.mp4", "H.264, 4:2:2", H264.replace("yuv420p", "yuv422p")),
    video("h264_422_10bit.mov", "H.264, 4:2:2, 10 bits", H264.replace("yuv420p", "yuv422p10le")),
    video("h264_444.mp4", "H.264, 4:4:4", H264.replace("yuv420p", "yuv444p")),
    video("h264_grey.mp4", "H.264, grey", H264.replace("yuv420p", "gray")),
    video("h264_rgb.mp4", "H.264, RGB", "-c:v libx264rgb -preset veryfast -g 5 -pix_fmt rgb24"),
    video("h264_lossless.mp4", "H.264, lossless", f"{H264} -qp 0"),
    video("hevc_10bit.mp4", "HEVC, 10 bits", HEVC.replace("yuv420p", "yuv420p10le")),
    video(
        "hevc_pq.mp4",
        "HEVC, HDR10 (BT.2020, PQ)",
        f"-vf scale=out_color_matrix=bt2020 {HEVC.replace('yuv420p', 'yuv420p10le')}"
        " -colorspace bt2020nc -color_trc smpte2084 -color_primaries bt2020",
    ),
    video("hevc_12bit_444.mp4", "HEVC, 4:4:4, 12 bits", HEVC.replace("yuv420p", "yuv444p12le")),
    video("hevc_grey.mp4", "HEVC, grey", HEVC.replace("yuv420p", "gray")),
    video("hevc_rgb.mp4", "HEVC, RGB", HEVC.replace("yuv420p", "gbrp")),
    video("vp9_444.webm", "VP9, 4:4:4", f"{VP9} -pix_fmt yuv444p"),
    video("vp9_10bit.webm", "VP9, 10 bits", f"{VP9} -pix_fmt yuv420p10le -profile:v 2"),
    video("vp9_rgb.webm", "VP9, RGB", f"{VP9} -pix_fmt gbrp"),
    video("vp9_alpha.webm", "VP9 with alpha", f"{VP9} -pix_fmt yuva420p -auto-alt-ref 0"),
    video("vp8_alpha.webm", "VP8 with alpha", f"{VP8} -pix_fmt yuva420p -auto-alt-ref 0"),
    video("av1_10bit.mp4", "AV1, 10 bits", f"{AV1} -pix_fmt yuv420p10le"),
    video("mpeg2_422.ts", "MPEG-2, 4:2:2", f"{MPEG2} -pix_fmt yuv422p"),
    video("prores_4444.mov", "ProRes 4444 with alpha", "-c:v prores_ks -profile:v 4 -pix_fmt yuva444p10le"),
    video("ffv1_rgba.mkv", "FFV1, RGB with alpha", "-c:v ffv1 -pix_fmt bgra"),
    video("ffv1_16bit.mkv", "FFV1, 4:4:4, 16 bits", "-c:v ffv1 -pix_fmt yuv444p16le"),
    video("ffv1_rgb48.mkv", "FFV1, RGB, 16 bits", "-c:v ffv1 -pix_fmt gbrp16le"),
    video("ffv1_grey16.mkv", "FFV1, grey, 16 bits", "-c:v ffv1 -pix_fmt gray16le"),
    video("ffv1_410.mkv", "FFV1, 4:1:0", "-c:v ffv1 -pix_fmt yuv410p"),
    video("ffv1_440.mkv", "FFV1, 4:4:0", "-c:v ffv1 -pix_fmt yuv440p"),
    video(
        "dv_411.mov",
        "DV, 4:1:1",
        "-c:v dvvideo -pix_fmt yuv411p -r 30000/1001",
        size=(480, 720),
        frames=4,
        rate="30000/1001",
    ),
    video("qtrle_argb.mov", "QuickTime Animation with alpha", "-c:v qtrle -pix_fmt argb"),
    video("png_rgb48.mov", "PNG, 16 bits, in QuickTime", "-c:v png -pix_fmt rgb48be"),
    video("palette.mov", "uncompressed with a palette", "-c:v png -pix_fmt pal8"),
    video("monochrome.mkv", "FFV1, black and white", "-c:v png -pix_fmt monob"),
    Case("transparent.gif", "GIF with transparent and partial frames", lambda path: write_gif(path)),
]


def write_gif(path: Path) -> None:
    """Write frames that cover only a part of the canvas, with disposal to the background."""
    images = []
    for t in range(FRAMES):
        rgba = np.dstack([picture(0, t, *SIZE), np.zeros(SIZE, np.uint8)])
        rgba[8 : 40 + t, 16 : 60 + t, 3] = 255
        images.append(Image.fromarray(rgba, "RGBA"))
    images[0].save(
        path,
        save_all=True,
        append_images=images[1:],
        duration=40,
        disposal=[1 + t % 3 for t in range(FRAMES)],
    )


ROTATIONS = [(angle, flip) for angle in (0, 90, 180, 270) for flip in ("", "-display_hflip")]
TIMING = [
    video(
        "vfr.mp4",
        "variable frame rate",
        f"-vf settb=1/1000,setpts=N*N*7 -fps_mode passthrough -enc_time_base 1/1000 {H264}",
    ),
    video(
        "vfr.mkv",
        "variable frame rate in Matroska",
        f"-vf settb=1/1000,setpts=N*N*7 -fps_mode passthrough -enc_time_base 1/1000 {H264}",
    ),
    copied("edit_list.mp4", "edit list that starts between key frames", H264, "", "-ss 0.3", frames=4),
    copied("edit_list.mov", "edit list in QuickTime", MPEG4, "", "-ss 0.3", frames=3, source="x.mov"),
    copied("empty_edit.mp4", "empty edit (a late start)", H264, "-output_ts_offset 3"),
    copied(
        "negative.mkv",
        "negative time stamps in Matroska",
        H264,
        "-output_ts_offset -0.2 -avoid_negative_ts disabled",
    ),
    copied(
        "negative.mp4",
        "negative time stamps, no edit list",
        H264,
        "-use_editlist 0 -avoid_negative_ts disabled",
    ),
    video("one_second.mov", "time base of 1 s", f"{H264} -video_track_timescale 1", rate="1"),
    video("one_second.avi", "1 frame per second", f"{MPEG4} -bf 0", rate="1"),
    video("slow.mp4", "1 frame in 20 s", H264, rate="1/20"),
    video("fast.mp4", "1000 frames per second", H264, rate="1000"),
    video("ntsc.ts", "29.97 frames per second", H264, rate="30000/1001"),
    video("bframes.avi", "B-frames in AVI (H.264)", H264),
    video("bframes_mpeg4.avi", "B-frames in AVI (MPEG-4)", MPEG4),
    Case("packed.avi", "packed B-frames in AVI (XviD)", lambda path: write_packed(path)),
    copied(
        "duplicated.mkv", "each time stamp twice", f"{H264} -bf 0", "-bsf:v setts=ts=trunc(N/2)*2*40/TB/1000"
    ),
    copied(
        "duplicated.nut",
        "each time stamp twice in NUT",
        f"{H264} -bf 0",
        "-bsf:v setts=ts=trunc(N/2)*2*40/TB/1000",
    ),
    copied(
        "unordered.mkv",
        "a time stamp that jumps back",
        f"{H264} -bf 0",
        "-bsf:v setts=ts=mod(N*7\\,12)*40/TB/1000",
    ),
    video("negative_offsets.mp4", "negative composition offsets", f"{H264} -movflags negative_cts_offsets"),
    video("one_frame.mp4", "one frame", H264, frames=1),
    video("one_frame.ts", "one frame in MPEG-TS", H264, frames=1),
    video("one_frame.gif", "one frame in GIF", "", frames=1),
    video("two_frames.mkv", "two frames", H264, frames=2),
    copied("late.ts", "MPEG-TS that starts after 10 hours", H264, "-output_ts_offset 36000"),
    copied("wrap.ts", "MPEG-TS whose 33-bit time stamps wrap", H264, "-output_ts_offset 95442.1"),
    joined("jump.ts", "MPEG-TS with a jump of 100 s", H264, f"{H264} -output_ts_offset 100"),
    copied("no_times.avi", "HEVC in AVI", HEVC, "-tag:v HEVC"),
]


def write_packed(path: Path) -> None:
    """Put each B-frame into the packet of the P-frame before it, and an empty frame in its place."""
    import av

    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder, "x.avi")
        encode(original, MPEG4.replace("-bf 2", "-bf 1"))
        with av.open(str(original)) as source, av.open(str(path), "w") as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            packets = [bytes(packet) for packet in source.demux(video=0) if packet.size]
            kinds = [data[data.index(b"\0\0\1\xb6") + 4] >> 6 for data in packets]
            # A picture that is not coded: P, no modulo, marker, time, marker, not coded.
            empty = b"\0\0\1\xb6" + int("0101001100100010", 2).to_bytes(2, "big")
            packets = [
                empty if kind == 2 else data + (packets[n + 1] if kinds[n + 1 : n + 2] == [2] else b"")
                for n, (data, kind) in enumerate(zip(packets, kinds, strict=True))
            ]
            packets[0] = packets[0].replace(b"\0\0\1\xb6", b"\0\0\1\xb2DivX503b1393p\0\0\1\xb6", 1)
            for number, data in enumerate(packets):
                packet = av.Packet(data)
                packet.pts = packet.dts = number
                packet.time_base, packet.stream = stream.time_base, stream
                packet.is_keyframe = kinds[number] == 0
                target.mux(packet)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def write_exif(path: Path) -> None:
    """Write Motion JPEG whose pictures have an EXIF header that turns them, as from some cameras."""
    with tempfile.TemporaryDirectory() as folder:
        for frame in range(FRAMES):
            image = Image.fromarray(picture(0, frame, *SIZE))
            image.save(Path(folder, f"{frame}.jpg"), quality=95, exif=turned(6))
        run_ffmpeg("-framerate", "25", "-i", Path(folder, "%d.jpg"), "-c", "copy", path)


def write_cover(path: Path) -> None:
    """Attach a PNG, as Matroska stores covers."""
    with tempfile.TemporaryDirectory() as folder:
        cover = Path(folder, "cover.png")
        Image.fromarray(picture(1, 0, 200, 200)).save(cover)
        encode(path, f"{H264} -attach {cover} -metadata:s:t mimetype=image/png")


def write_clean_aperture(path: Path) -> None:
    """Add a `clap` box that shows the middle 64 x 48 of 96 x 64 pixels."""
    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder, "x.mp4")
        encode(original, H264)
        data = original.read_bytes()
    content = b"".join(number.to_bytes(4, "big") for number in (64, 1, 48, 1, 0, 1, 0, 1))
    box = (8 + len(content)).to_bytes(4, "big") + b"clap" + content
    # The index is at the end, so no offset changes. Enlarge the boxes that contain the new one.
    end = 0
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):
        start = data.index(name, end) - 4
        end = start + 8
        size = int.from_bytes(data[start : start + 4], "big")
        data = data[:start] + (size + len(box)).to_bytes(4, "big") + data[start + 4 :]
    data = data[: start + size] + box + data[start + size :]
    path.write_bytes(data)


X264 = "-c:v libx264 -preset veryfast -pix_fmt yuv420p -x264-params"
STRUCTURE = [
    video(
        "open_gop.mp4",
        "open GOP (H.264)",
        f"{X264} open-gop=1:keyint=5:min-keyint=5:bframes=3:b-adapt=0:scenecut=0",
    ),
    video(
        "open_gop.ts",
        "open GOP in MPEG-TS",
        f"{X264} open-gop=1:keyint=5:min-keyint=5:bframes=3:b-adapt=0:scenecut=0",
    ),
    video(
        "open_gop_hevc.mp4",
        "open GOP (HEVC)",
        HEVC.replace("keyint=5", "open-gop=1:keyint=5:min-keyint=5:b-adapt=0:scenecut=0"),
    ),
    video("open_gop.mpg", "open GOP (MPEG-2)", MPEG2),
    video(
        "intra_refresh.mp4", "intra refresh, only one key frame", f"{X264} intra-refresh=1:keyint=6:bframes=0"
    ),
    video("intra_refresh.ts", "intra refresh in MPEG-TS", f"{X264} intra-refresh=1:keyint=6:bframes=0"),
    copied(
        "no_key_frame.mkv", "the first key frame is missing", H264, "-bsf:v noise=drop=lt(n\\,2)", frames=7
    ),
    copied(
        "no_key_frame.ts",
        "the first key frame is missing in MPEG-TS",
        H264,
        "-bsf:v h264_mp4toannexb,noise=drop=lt(n\\,2) -copyinkf",
        frames=7,
    ),
    copied(
        "no_key_frame.mp4",
        "no key frame at all",
        f"{X264} keyint=100:bframes=0",
        "-bsf:v noise=drop=lt(n\\,2) -copyinkf",
        frames=0,
        refused="no frame can be decoded",
    ),
    copied(
        "missing_middle.mkv",
        "frames are missing in the middle",
        H264,
        "-bsf:v noise=drop=between(n\\,4\\,5)",
        frames=10,
    ),
    *(
        video(f"{field}.mp4", f"interlaced, {what}", f"{X264} {field}=1:keyint=5:bframes=2")
        for field, what in (
            ("tff", "top field first (MBAFF)"),
            ("bff", "bottom field first (MBAFF)"),
            ("fake-interlaced", "in name only"),
        )
    ),
    video("interlaced.ts", "interlaced in MPEG-TS", f"{X264} tff=1:keyint=5:bframes=2"),
    video("interlaced.mpg", "interlaced (MPEG-2)", f"{MPEG2} -flags +ilme+ildct"),
    video("interlaced_mpeg4.avi", "interlaced (MPEG-4)", f"{MPEG4} -bf 0 -flags +ilme+ildct"),
    video("interlaced.mov", "interlaced (ProRes)", "-c:v prores_ks -flags +ilme+ildct -pix_fmt yuv422p10le"),
    *(
        copied(
            f"rotated_{angle}{flip and '_flipped'}.mp4",
            f"display matrix: {angle} degrees{flip and ', mirrored'}",
            H264,
            "",
            f"-display_rotation {angle} {flip}",
        )
        for angle, flip in ROTATIONS
    ),
    copied(
        "rotated_10bit.mp4",
        "display matrix with 10 bits",
        H264.replace("yuv420p", "yuv420p10le"),
        "",
        "-display_rotation 90",
    ),
    Case("rotated_exif.avi", "Motion JPEG with an EXIF orientation", write_exif),
    copied("rotated.mkv", "display matrix in Matroska", H264, "", "-display_rotation 90"),
    copied("rotated_vflip.mov", "display matrix: vertical flip", H264, "", "-display_vflip"),
    edited("parameters_once.h264", "H.264 parameter sets only at the start", H264, fake_h264_header),
    edited(
        "parameters_once.ts", "H.264 parameter sets only at the start, in MPEG-TS", H264, fake_h264_header
    ),
    edited(
        "parameters_once_hevc.ts", "HEVC parameter sets only at the start, in MPEG-TS", HEVC, fake_hevc_header
    ),
    edited(
        "parameters_once_mpeg2.ts",
        "MPEG-2 sequence header only at the start, in MPEG-TS",
        MPEG2,
        fake_mpeg2_header,
    ),
    video(
        "avc3.mp4",
        "H.264 parameter sets in-band (avc3)",
        f"{H264} -tag:v avc3 -bsf:v dump_extra=freq=keyframe",
    ),
    Case("av1_header_once.ivf", "AV1 sequence header only at the start", one_av1_header),
    joined(
        "new_parameters.ts",
        "H.264 parameter sets that change",
        H264,
        f"{X264} ref=4:cabac=0:8x8dct=0:keyint=5:bframes=3:weightp=2 -output_ts_offset 0.24",
    ),
    joined(
        "new_parameters.h264",
        "H.264 parameter sets that change, without a container",
        H264,
        f"{X264} ref=4:cabac=0:8x8dct=0:keyint=5:bframes=3:weightp=2",
    ),
    joined(
        "new_size.ts", "a resolution that changes", H264, f"{H264} -output_ts_offset 0.24", size=(128, 160)
    ),
    joined("new_size.h264", "a resolution that changes, without a container", H264, H264, size=(128, 160)),
    joined(
        "new_format.ts",
        "10 bits after 8 bits",
        H264,
        f"{H264.replace('yuv420p', 'yuv420p10le')} -output_ts_offset 0.24",
    ),
    joined("concatenated.ts", "concatenated MPEG-TS; times start again", H264, H264),
    joined("concatenated.mpg", "concatenated MPEG-PS; times start again", MPEG2, MPEG2),
    joined("concatenated.flv", "concatenated FLV", f"{H264} -bf 0", f"{H264} -bf 0", frames=6),
    edited("truncated.mp4", "truncated MP4", f"{H264} -movflags faststart", cut(0.7), frames=6),
    edited(
        "truncated_fragments.mp4",
        "truncated fragmented MP4",
        f"{H264} -movflags frag_keyframe+empty_moov",
        cut(0.7),
        frames=7,
    ),
    edited("no_index.mp4", "MP4 without its index", H264, cut(0.7), frames=0, refused="invalid data"),
    edited("truncated.mkv", "truncated Matroska", H264, cut(0.7), frames=7),
    edited("truncated.avi", "truncated AVI", f"{MPEG4} -bf 0", cut(0.7), frames=6, damaged=6),
    edited("truncated.ts", "truncated MPEG-TS", H264, cut(0.7), frames=8),
    edited(
        "cut_start.ts",
        "MPEG-TS recorded from the middle",
        H264,
        lambda data: data[len(data) // 3 :],
        frames=7,
    ),
    edited("truncated.mpg", "truncated MPEG-PS", MPEG2, cut(0.7), frames=9, damaged=8),
    edited("truncated.webm", "truncated WebM", VP9, cut(0.7), frames=8),
    edited("truncated.flv", "truncated FLV", H264, cut(0.7), frames=7),
    edited("truncated.gif", "truncated GIF", "", cut(0.7), frames=9),
    edited("truncated.ogv", "truncated Ogg", "-c:v libtheora -g 5 -q:v 9", cut(0.7), frames=6),
    Case("empty.mp4", "empty file", lambda path: path.write_bytes(b""), frames=0, refused="invalid data"),
    Case(
        "text.mp4",
        "a web page named .mp4",
        lambda path: path.write_text("<html>404 not found</html>"),
        frames=0,
        refused="invalid data",
    ),
    video("odd.webm", "odd sides (VP9, 4:2:0)", VP9, size=(63, 95)),
    video("odd.mkv", "odd sides (FFV1, 4:2:2)", "-c:v ffv1 -pix_fmt yuv422p", size=(63, 95)),
    video("odd.avi", "odd sides (MPEG-4)", f"{MPEG4} -bf 0", size=(63, 95)),
    video("odd_hevc.mp4", "sides that 8 does not divide (HEVC)", HEVC, size=(62, 94)),
    video("odd_h264.mp4", "sides that 16 does not divide (H.264)", H264, size=(62, 94)),
    video("odd_444.mp4", "odd sides (H.264, 4:4:4)", H264.replace("yuv420p", "yuv444p"), size=(63, 95)),
    video("narrow.mp4", "2 pixels wide", H264, size=(64, 2)),
    video("tiny.mkv", "1 x 1 pixel", "-c:v ffv1 -pix_fmt yuv444p", size=(1, 1)),
    video("8k.mp4", "8K", f"-vf scale=7680:4320:flags=neighbor {H264} -preset ultrafast", frames=1),
    video("anamorphic.mp4", "pixels that are not square", f"-vf setsar=4/3 {H264}"),
    Case(
        "clean_aperture.mp4",
        "cropping in the container (clap)",
        write_clean_aperture,
        options="-apply_cropping codec",
    ),
    video(
        "two_videos.mp4",
        "a larger second video",
        f"-filter_complex [0:v]split[a][b];[b]scale=192:128[c] -map [a] -map [c] {H264}",
    ),
    video(
        "two_videos.ts",
        "a larger second video in MPEG-TS",
        f"-filter_complex [0:v]split[a][b];[b]scale=192:128[c] -map [a] -map [c] {H264}",
    ),
    video(
        "two_videos.mkv",
        "a smaller second video",
        f"-filter_complex [0:v]split[a][b];[b]scale=48:32[c] -map [a] -map [c] {H264}",
    ),
    video(
        "cover_first.mp4",
        "a cover picture before the video",
        f"-filter_complex [0:v]split[a][b];[b]trim=end_frame=1,scale=200:200[c] -map [c] -map [a] {H264}"
        " -c:v:0 png -pix_fmt:v:0 rgb24 -disposition:v:0 attached_pic",
    ),
    Case("cover.mkv", "a cover picture in Matroska", write_cover),
    video("audio_first.mp4", "audio before the video", f"-map 1:a -map 0:v {H264} -c:a aac", inputs=SOUND),
    video(
        "audio_first.mkv",
        "audio before the video in Matroska",
        f"-map 1:a -map 0:v {H264} -c:a aac",
        inputs=SOUND,
    ),
    video("audio.ts", "audio in MPEG-TS", f"{H264} -c:a mp2", inputs=SOUND),
    video("audio.mpg", "audio in MPEG-PS", f"{MPEG2} -c:a mp2", inputs=SOUND),
    video("audio.avi", "audio in AVI", f"{MPEG4} -c:a mp3", inputs=SOUND),
    video("timecode.mov", "a track of time codes", f"{H264} -timecode 01:00:00:00"),
    Case(
        "audio_only.mp4",
        "no video",
        lambda path: encode(path, "-map 1:a -c:a aac", inputs=SOUND),
        frames=0,
        refused="no video stream",
    ),
]


# --- frame folders ---

IMAGES_PER_FOLDER, IMAGE_STEP = 4, 3


def images(
    name: str,
    kind: str,
    suffix: str = ".jpg",
    form: str | None = None,
    mode: str = "RGB",
    size: Callable[[int], tuple[int, int]] = lambda frame: SIZE,
    edit: Callable[[bytes], bytes] = lambda data: data,
    refused: str = "",
    tolerance: float = 1,
    reference: str = "ffmpeg",
    **options,
) -> Case:
    """A frame folder written by Pillow: `form` is its name of the format, `options` are its own."""

    def make(folder: Path) -> None:
        folder.mkdir()
        for frame in range(IMAGES_PER_FOLDER):
            buffer = io.BytesIO()
            image = Image.fromarray(picture(0, IMAGE_STEP * frame, *size(frame))).convert(mode)
            image.save(buffer, form or Image.registered_extensions()[suffix], **options)
            (folder / f"{frame:03d}{suffix}").write_bytes(edit(buffer.getvalue()))

    return Case(name, kind, make, IMAGES_PER_FOLDER, refused, tolerance, reference)


def ffmpeg_images(name: str, kind: str, suffix: str, options: str) -> Case:
    """A frame folder written by ffmpeg, for what Pillow cannot write."""

    def make(folder: Path) -> None:
        folder.mkdir()
        encode(folder / f"%03d{suffix}", f"{options} -f image2", frames=IMAGES_PER_FOLDER)

    return Case(name, kind, make, IMAGES_PER_FOLDER, tolerance=1)


def with_thumbnail(data: bytes) -> bytes:
    """Put a small JPEG into a segment of the header, as cameras do."""
    buffer = io.BytesIO()
    Image.fromarray(picture(1, 0, 12, 16)).save(buffer, "JPEG")
    segment = b"\xff\xe1" + (len(buffer.getvalue()) + 2).to_bytes(2, "big") + buffer.getvalue()
    return data[:2] + segment + data[2:]


# ffmpeg shifts the chroma of images with odd sides, and its CMYK is off by one level.
AGAINST_PICTURE: dict = {"reference": "picture", "tolerance": 1.5}
FOLDERS = [
    images("jpeg", "JPEG, 4:2:0", quality=95),
    images("jpeg_444", "JPEG, 4:4:4", subsampling="4:4:4", quality=95),
    images("jpeg_422", "JPEG, 4:2:2", subsampling="4:2:2", quality=95),
    images("jpeg_progressive", "progressive JPEG", progressive=True, quality=95),
    images("jpeg_restart", "JPEG with restart markers", restart_marker_blocks=2, quality=95),
    images("jpeg_grey", "grey JPEG", mode="L", quality=95),
    images("jpeg_cmyk", "CMYK JPEG", mode="CMYK", quality=95, **AGAINST_PICTURE),
    images("jpeg_rgb", "JPEG that stores RGB", keep_rgb=True, quality=95),
    images("jpeg_thumbnail", "JPEG with a thumbnail", edit=with_thumbnail, quality=95),
    images("jpeg_trailer", "JPEG with bytes after its end", edit=lambda data: data + bytes(999), quality=95),
    images("jpeg_pair", "two JPEGs in one file (MPO)", edit=lambda data: data + data, quality=95),
    images(
        "jpeg_mpo",
        "MPO, as phones write it",
        form="MPO",
        save_all=True,
        append_images=[Image.fromarray(picture(1, 0, *SIZE))],
    ),
    images("jpeg_odd", "JPEG with odd sides", size=lambda frame: (63, 95), quality=95, **AGAINST_PICTURE),
    images("jpeg_one_pixel", "JPEG of 1 x 1 pixel", size=lambda frame: (1, 1), quality=95),
    images(
        "jpeg_sizes",
        "JPEGs of several sizes",
        size=lambda frame: (40 + 9 * frame, 90 - 5 * frame),
        quality=95,
        **AGAINST_PICTURE,
    ),
    *(
        images(f"exif_{number}", f"JPEG, EXIF orientation {number}", exif=turned(number), quality=95)
        for number in range(1, 9)
    ),
    images("exif_png", "PNG with an EXIF orientation", ".png", exif=turned(6)),
    images("exif_webp", "WebP with an EXIF orientation", ".webp", lossless=True, exif=turned(6)),
    images("png", "PNG", ".png"),
    images("png_grey", "grey PNG", ".png", mode="L"),
    images("png_palette", "PNG with a palette", ".png", mode="P"),
    images("png_palette_2", "PNG with a palette of 4 colours", ".png", mode="P", bits=2),
    images("png_transparent", "PNG with a palette and transparency", ".png", mode="P", transparency=3),
    images("png_alpha", "PNG with alpha", ".png", mode="RGBA"),
    images("png_grey_alpha", "grey PNG with alpha", ".png", mode="LA"),
    images("png_black_and_white", "black and white PNG", ".png", mode="1"),
    ffmpeg_images("png_grey16", "grey PNG, 16 bits", ".png", "-c:v png -pix_fmt gray16be"),
    ffmpeg_images("png_rgb48", "PNG, 16 bits", ".png", "-c:v png -pix_fmt rgb48be"),
    ffmpeg_images("png_rgba64", "PNG with alpha, 16 bits", ".png", "-c:v png -pix_fmt rgba64be"),
    ffmpeg_images("png_grey16_alpha", "grey PNG with alpha, 16 bits", ".png", "-c:v png -pix_fmt ya16be"),
    ffmpeg_images("png_interlaced", "interlaced PNG", ".png", "-c:v png -flags +ildct"),
    images(
        "png_animated",
        "animated PNG named .png",
        ".png",
        save_all=True,
        append_images=[Image.fromarray(picture(1, 0, *SIZE))],
        refused="2 images in one file",
    ),
    images("webp", "WebP", ".webp", quality=95),
    images("webp_lossless", "lossless WebP", ".webp", lossless=True),
    images("webp_alpha", "lossless WebP with alpha", ".webp", mode="RGBA", lossless=True, exact=True),
    images("avif", "AVIF", ".avif", quality=95, speed=10),
    images("avif_444", "AVIF, 4:4:4", ".avif", quality=95, speed=10, subsampling="4:4:4"),
    images("bmp", "BMP", ".bmp"),
    images("bmp_palette", "BMP with a palette", ".bmp", mode="P"),
    images("tiff", "TIFF", ".tif"),
    images("tiff_lzw", "TIFF with LZW", ".tiff", compression="tiff_lzw"),
    images("tiff_cmyk", "CMYK TIFF", ".tif", mode="CMYK", **AGAINST_PICTURE),
    ffmpeg_images("tiff_rgb48", "TIFF, 16 bits", ".tif", "-c:v tiff -pix_fmt rgb48le"),
    images("ppm", "PPM", ".ppm"),
    images("gif_in_jpg", "GIF named .jpg", form="GIF"),
    images("png_in_jpg", "PNG named .jpg", form="PNG"),
    images("webp_in_jpg", "WebP named .jpg", form="WEBP", lossless=True),
    images("bmp_in_jpg", "BMP named .jpg", form="BMP"),
    images("tiff_in_jpg", "TIFF named .jpg", form="TIFF"),
    images("avif_in_jpg", "AVIF named .jpg", form="AVIF", quality=95, speed=10),
    images("jpg_in_png", "JPEG named .png", ".png", form="JPEG", quality=95),
    images("capitals", "JPEG named .JPG", ".JPG", form="JPEG", quality=95),
    images(
        "html_in_jpg",
        "a web page named .jpg",
        edit=lambda data: b"<html>404 not found</html>",
        refused="cannot be decoded",
    ),
]

VIDEO_GROUPS = {
    "Containers": CONTAINERS,
    "Codecs": CODECS,
    "Pixel formats": PIXELS,
    "Times": TIMING,
    "Structure": STRUCTURE,
}
VIDEOS = [case for cases in VIDEO_GROUPS.values() for case in cases]


# --- the documentation ---

HEADER = """\
# Formats

The tests read these {videos} video files and {folders} frame folders with `open_source`, `fasttrain pack` and
the training loader, and compare all frames with the output of the ffmpeg command: read alone, in order, and
in random sets. *Equal* means that every level of every pixel is the same. The files are small, and
`tests/formats.py` generates them, as well as this page. Measured with PyAV 18.1 (FFmpeg 8.1), ffmpeg 9.0.2,
Pillow 13.0 and DALI 2.4.

For videos, ffmpeg converts to RGB with its default options. For images, it interpolates chroma, as Pillow and
DALI do. Where ffmpeg is less exact than Pillow (odd sides, CMYK), the reference is the encoded picture.
"""


def result(case: Case) -> str:
    """Describe what is expected of a case, as the tests check it."""
    if case.refused:
        return f"refused: {case.refused}"
    if case.damaged is not None:
        return f"equal, without the damaged frame {case.damaged}"
    if case.reference == "picture":
        return f"differs from the picture by less than {case.tolerance} levels on average"
    if case.tolerance:
        return f"differs by less than {case.tolerance} level on average"
    return f"equal to ffmpeg with `{case.options}`" if case.options else "equal"


def document() -> str:
    """Return the page of the documentation."""
    parts = [HEADER.format(videos=len(VIDEOS), folders=len(FOLDERS))]
    for group, cases in (VIDEO_GROUPS | {"Frame folders": FOLDERS}).items():
        parts.append(f"\n## {group}\n\n| Kind | File | Frames | Result |\n|---|---|---|---|\n")
        parts += [f"| {case.kind} | {case.name} | {case.frames} | {result(case)} |\n" for case in cases]
    return "".join(parts)


if __name__ == "__main__":
    print(document(), end="")
