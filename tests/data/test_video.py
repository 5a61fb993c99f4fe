"""Random access to video frames, compared with sequential decoding, for real and for unusual files."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from synthetic import encode_video, picture, remux

from fasttrain.data import video as module
from fasttrain.data.images import UnreadableFrameError
from fasttrain.data.sources import open_source
from fasttrain.data.video import (
    RgbConverter,
    VideoInfo,
    open_video,
    probe_video,
    read_video_frames,
    stream_video_frames,
    video_stream,
)


def sequential(path: Path) -> list[np.ndarray]:
    with open_video(path) as container:
        to_rgb = RgbConverter()
        return [to_rgb(picture) for picture in container.decode(video_stream(container))]


REAL = [
    "av1_video.mkv",
    "bt709_full_range.mp4",
    "flipping_a_pancake.mkv",
    "h265_video.mp4",
    "nasa_13013.mp4",
    "rotated_180.mov",
]


@pytest.mark.parametrize("name", REAL)
def test_frames_of_real_videos(shared: Path, name: str) -> None:
    video = probe_video(shared / "videos" / name)
    truth = sequential(video.path)
    assert video.num_frames == len(truth)
    last = len(truth) - 1
    # Single frames, pairs within a GOP and across GOPs, a pair in descending order, and a repeated frame.
    requests = [[0], [last], [last // 2, last // 2 + 1], [1, last], [last, 0], [last // 3] * 2]
    for frames in requests:
        for frame, got in zip(frames, read_video_frames(video, frames), strict=True):
            np.testing.assert_array_equal(got, truth[frame])


def check_frames(path: Path, expected: int) -> VideoInfo:
    """Compare every single frame and two pairs with those of sequential decoding."""
    video, truth = probe_video(path), sequential(path)
    assert video.num_frames == len(truth) == expected
    for frames in [*([frame] for frame in range(expected)), [0, expected - 1], [7, 3]]:
        for frame, got in zip(frames, read_video_frames(video, frames), strict=True):
            np.testing.assert_array_equal(got, truth[frame])
    return video


OPEN_GOP = {"x264-params": "open-gop=1:keyint=8:min-keyint=8:bframes=3:scenecut=0:b-adapt=0"}
UNEVEN = np.cumsum(np.random.default_rng(0).integers(10, 200, 40)).tolist()


@pytest.mark.parametrize(
    ("codec", "suffix", "options"),
    [
        ("libx264", ".mp4", OPEN_GOP),
        # AVI has no presentation times, so frames are counted from the start.
        ("libx264", ".avi", {"bf": 2}),
        # In MPEG-TS, seeking is approximate and may land after the target.
        ("libx264", ".ts", {"g": 8, "bf": 2}),
        ("libx265", ".ts", {"x265-params": "keyint=8:log-level=none"}),
        # A variable frame rate.
        ("libx264", ".mp4", {"times": UNEVEN, "g": 7}),
        ("libx264", ".mkv", {"times": UNEVEN, "g": 7}),
        # If a packet of MPEG-PS contains several small frames, times after a seek are off by a frame.
        ("mpeg1video", ".mpg", {"time_base": Fraction(1, 25), "times": range(40)}),
    ],
)
def test_frames_of_unusual_streams(tmp_path: Path, codec: str, suffix: str, options: dict) -> None:
    frames = [picture(0, t, 96, 144) for t in range(40)]
    video = check_frames(encode_video(tmp_path / f"x{suffix}", frames, codec, **options), 40)
    assert (video.times is None) == (suffix in (".avi", ".mpg"))
    if options is OPEN_GOP:
        assert len(video.key_times) > 3
        assert len(video.reset_times) == 1


@pytest.mark.parametrize(
    ("codec", "suffix", "pix_fmt", "level"),
    [
        ("libx265", ".mp4", "yuv420p10le", 6),
        ("libvpx-vp9", ".webm", "yuv420p", 6),
        ("mpeg4", ".avi", "yuv420p", 6),
        ("mjpeg", ".mov", "yuvj420p", 6),
        ("libsvtav1", ".mp4", "yuv420p10le", 8),
    ],
)
def test_decoded_frames_are_close_to_the_encoded_ones(
    tmp_path: Path, codec: str, suffix: str, pix_fmt: str, level: float
) -> None:
    frames = [picture(2, t, 128, 192) for t in range(12)]
    # At an excessive bit rate, newer versions of the AV1 encoder damage the last frame, so use crf.
    encoder_options = {"libx265": {"x265-params": "log-level=none"}, "libsvtav1": {"crf": 20}}
    options = encoder_options.get(codec, {"b": 8_000_000})
    path = encode_video(tmp_path / f"x{suffix}", frames, codec, pix_fmt=pix_fmt, **options)
    video = probe_video(path)
    assert video.num_frames == 12
    for frame in (11, 5):
        (got,) = read_video_frames(video, [frame])
        assert np.abs(got.astype(float) - frames[frame]).mean() < level


def test_colours_follow_the_matrix_and_range_of_the_stream(shared: Path) -> None:
    """The reference is the formula of BT.709 at full range."""
    path = shared / "videos" / "bt709_full_range.mp4"
    with av.open(str(path)) as container:
        planes = [
            np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
            for plane in next(container.decode(video=0)).planes
        ]
    y, u, v = (plane.astype(float) for plane in planes)
    u, v = (np.kron(plane - 128, np.ones((2, 2))) for plane in (u, v))
    red, blue = y + 2 * (1 - 0.2126) * v, y + 2 * (1 - 0.0722) * u
    green = (y - 0.2126 * red - 0.0722 * blue) / 0.7152
    truth = np.clip(np.stack([red, green, blue], axis=-1), 0, 255)
    (got,) = read_video_frames(probe_video(path), [0])
    assert np.abs(got - truth).mean() < 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # The first packet has the version of x264, without which the decoder makes garbage of 4:4:4.
        ("h264_444/cockatoo.mp4", 280),
        # Two joined files: the times start again, and the resolution changes.
        ("ts_concat/reschange.ts", 60),
        # It cannot be rewound.
        ("unseekable/neg.mkv", 30),
    ],
)
def test_frames_of_files_from_public_reports(shared: Path, name: str, expected: int) -> None:
    path = shared / "cases" / name
    video, truth = probe_video(path), sequential(path)
    assert video.num_frames == len(truth) == expected
    for frame in range(0, expected, 40):
        np.testing.assert_array_equal(read_video_frames(video, [frame])[0], truth[frame])


@pytest.mark.parametrize(
    ("name", "rows", "columns"), [("videos/rotated_180.mov", -1, -1), ("cases/hflip/data/hflip.mp4", 1, -1)]
)
def test_videos_are_decoded_upright(shared: Path, name: str, rows: int, columns: int) -> None:
    video = probe_video(shared / name)
    assert not video.upright
    with av.open(str(video.path)) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
    np.testing.assert_array_equal(read_video_frames(video, [0])[0], stored[::rows, ::columns])


def test_streaming_yields_the_requested_frames(shared: Path) -> None:
    video = probe_video(shared / "videos" / "nasa_13013.mp4")
    truth = sequential(video.path)[::20]
    for got, expected in zip(stream_video_frames(video, range(0, 390, 20)), truth, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    "x264", ["b-pyramid=none", "b-pyramid=strict", "b-pyramid=normal:open-gop=1:keyint=9", "tff=1"]
)
def test_unneeded_h264_pictures_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, x264: str
) -> None:
    params = f"bframes=7:b-adapt=0:{x264}"
    path = encode_video(tmp_path / "x.mp4", [picture(0, t) for t in range(24)], **{"x264-params": params})
    video, truth = probe_video(path), sequential(path)
    decoded = 0

    def counting(pictures: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        nonlocal decoded
        for image in pictures:
            decoded += 1
            yield image

    decode = module._FrameReader._decode
    monkeypatch.setattr(module._FrameReader, "_decode", lambda reader: counting(decode(reader)))
    for wanted in [[t] for t in range(24)] + [[3, 4], [3, 5, 6], [2, 22], list(range(24))]:
        decoded = 0
        for frame, got in zip(wanted, stream_video_frames(video, wanted), strict=True):
            np.testing.assert_array_equal(got, truth[frame])
        # At least every second picture is not a reference picture.
        assert decoded <= max(12, len(wanted)) + len(wanted)


def test_scanning_detects_damage(shared: Path) -> None:
    with pytest.raises(UnreadableFrameError, match="frame 28 is damaged"):
        probe_video(shared / "videos" / "corrupted.mp4")


def test_damaged_frames_at_the_end_of_a_file_are_left_out_and_reported(tmp_path: Path) -> None:
    """MPEG-TS does not tell where the last picture ends, so only decoding shows that it is incomplete."""
    whole = encode_video(tmp_path / "whole.ts", [picture(0, t, 96, 144) for t in range(40)], g=8, bf=0)
    truth = sequential(whole)
    (tmp_path / "cut.ts").write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    index = open_source(tmp_path)
    cut = index.names.index("cut.ts")
    assert index.skipped == [("cut.ts", "frames left out, damaged where the file was cut off: 1")]
    for frame in range(index.num_frames[cut]):
        np.testing.assert_array_equal(index.read_frame(cut, frame), truth[frame])


def test_a_deleted_video_is_an_unreadable_frame(tmp_path: Path) -> None:
    path = encode_video(tmp_path / "x.mp4", [picture(0, t) for t in range(5)])
    video = probe_video(path)
    path.unlink()
    with pytest.raises(UnreadableFrameError, match="no such file"):
        read_video_frames(video, [3])


@pytest.mark.parametrize("cover", [False, True])
def test_an_audio_file_has_no_video_stream(tmp_path: Path, cover: bool) -> None:
    """A cover image does not count as a video stream."""
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        if cover:
            still = container.add_stream("mjpeg", rate=1)
            still.height, still.width, still.pix_fmt = 48, 64, "yuvj420p"
            still.disposition = av.stream.Disposition.attached_pic
        sound = container.add_stream("aac", rate=16000)
        if cover:
            container.mux(still.encode(av.VideoFrame.from_ndarray(picture(0, 0), format="rgb24")))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    with pytest.raises(UnreadableFrameError, match="no video stream"):
        probe_video(path)


def test_an_edit_list_that_starts_between_key_frames(tmp_path: Path) -> None:
    """`ffmpeg -ss TIME -i IN.mp4 -c copy OUT.mp4` stores the key frame, but marks it as not displayed."""
    original = encode_video(tmp_path / "x.mp4", [picture(0, t) for t in range(30)], g=10, bf=2)
    cut = remux(original, tmp_path / "cut.mp4", lambda _, data: data, shift=-600, use_editlist="1")
    frames = probe_video(cut).num_frames
    assert 7 < frames < 20
    check_frames(cut, frames)


def test_a_stream_without_its_first_key_frame(tmp_path: Path) -> None:
    original = encode_video(tmp_path / "x.mp4", [picture(0, t) for t in range(30)], g=10, bf=2)
    cut = remux(original, tmp_path / "cut.mkv", lambda number, data: data if number > 5 else None)
    check_frames(cut, 20)


def test_an_untimed_stream_without_its_first_key_frame(tmp_path: Path) -> None:
    """The decoder reports errors until the next key frame, which ffmpeg passes over."""
    original = encode_video(tmp_path / "x.avi", [picture(0, t) for t in range(30)], "libvpx", g=10)
    cut = remux(original, tmp_path / "cut.avi", lambda number, data: data if number else None)
    video = probe_video(cut)
    truth = sequential(original)[10:]
    assert video.num_frames == len(truth)
    for frame in (0, 7, 19):
        np.testing.assert_array_equal(read_video_frames(video, [frame])[0], truth[frame])


def test_a_frame_that_depends_on_a_lost_one_is_unreadable(tmp_path: Path) -> None:
    """If the decoder skipped frames by itself, it would hide the loss."""
    original = encode_video(tmp_path / "x.mp4", [picture(0, t) for t in range(30)], g=30, bf=2)
    lost = remux(
        original,
        tmp_path / "lost.mp4",
        lambda number, data: data[:4] + b"\x41" + bytes(len(data) - 5) if number == 7 else data,
    )
    video = probe_video(lost)
    for frame in range(12, 30):
        with pytest.raises(UnreadableFrameError):
            read_video_frames(video, [frame])


def test_hidden_vp8_frames_are_not_counted(tmp_path: Path) -> None:
    original = encode_video(tmp_path / "x.webm", [picture(0, t) for t in range(12)], "libvpx")
    hidden = remux(
        original,
        tmp_path / "hidden.webm",
        # The frame header's show_frame bit.
        lambda number, data: bytes([data[0] & ~0x10]) + data[1:] if number == 5 else data,
    )
    assert [check_frames(path, n).miscounted for path, n in ((original, 12), (hidden, 11))] == [False, True]


def test_repeated_frames_in_avi_are_not_counted(tmp_path: Path) -> None:
    """XviD writes a repeated frame as a picture header with the flag `not coded`."""
    original = encode_video(tmp_path / "x.avi", [picture(0, t) for t in range(12)], "mpeg4")
    # Start code, P picture, modulo time base, marker, ten bits of time, marker, not coded, stuffing.
    header = b"\0\0\1\xb6" + int("0101001100100010", 2).to_bytes(2, "big")
    repeated = remux(
        original, tmp_path / "repeated.avi", lambda number, data: header if number == 5 else data
    )
    check_frames(repeated, 11)


def test_metadata_may_have_any_encoding(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "TITLE"
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(0, 0), format="rgb24")))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes().replace(b"TITLE", "ÄÖÜßé".encode("latin-1")))
    video = probe_video(path)
    assert len(read_video_frames(video, [0])) == 1


def test_a_codec_unknown_to_ffmpeg(tmp_path: Path) -> None:
    path = encode_video(tmp_path / "x.mp4", [picture(0, 0)])
    path.write_bytes(path.read_bytes().replace(b"avc1\0", b"zzzz\0"))
    with pytest.raises(UnreadableFrameError, match="codec is unknown to ffmpeg"):
        probe_video(path)


def test_a_vp9_packet_that_repeats_a_frame_is_detected(tmp_path: Path) -> None:
    path = encode_video(tmp_path / "x.webm", [picture(0, t) for t in range(4)], "libvpx-vp9")
    repeated = tmp_path / "repeated.webm"
    with av.open(str(path)) as source, av.open(str(repeated), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        # Frame marker 2, profile 0, show_existing_frame, the first of eight reference slots.
        repeat = av.Packet(bytes([0b10001000]))
        repeat.pts = repeat.dts = packets[-1].pts + 40
        repeat.time_base = packets[-1].time_base
        for packet in (*packets, repeat):
            packet.stream = stream
            target.mux(packet)
    assert not probe_video(path).miscounted
    assert probe_video(repeated).miscounted
    assert probe_video(repeated).num_frames == 5
