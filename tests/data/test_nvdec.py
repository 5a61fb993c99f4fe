"""The rules for using NVDEC, and the clips cut for it, which PyAV must decode to the frames of the video."""

import dataclasses
import io
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from synthetic import encode_video, picture, remux
from test_video import REAL, sequential

from fasttrain.data.loader import index_for_decoder
from fasttrain.data.nvdec import cut_clip, has_nvdec, nvdec_refusal
from fasttrain.data.sources import open_source
from fasttrain.data.video import RgbConverter, VideoInfo, probe_video
from fasttrain.errors import InputError

GOOD = VideoInfo(
    path=Path("x.mp4"),
    codec="h264",
    pix_fmt="yuv420p",
    width=1280,
    height=720,
    cropped=False,
    interlaced=False,
    upright=True,
    matrix="bt709",
    times=range(0, 100, 10),
    key_times=[0],
    reset_times=[0],
    num_frames=10,
    num_damaged=0,
    miscounted=False,
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"codec": "av1"}, "NVDEC does not support av1 with pixel format yuv420p"),
        ({"pix_fmt": "yuv444p"}, "NVDEC does not support h264 with pixel format yuv444p"),
        ({"width": 4112}, "144 to 4096 pixels"),
        ({"codec": "hevc", "width": 8200}, "144 to 8192 pixels"),
        ({"height": 140}, "144 to 4096 pixels"),
        ({"width": 1279}, "is odd"),
        ({"cropped": True}, "the displayed size differ"),
        ({"interlaced": True}, "interlaced"),
        ({"miscounted": True}, "hidden and repeated"),
        ({"upright": False}, "rotation"),
        ({"times": None}, "located by time"),
        ({"reset_times": []}, "located by time"),
        ({"width": 320, "height": 240}, "small frames"),
    ],
)
def test_each_rule_for_nvdec(changes: dict, expected: str) -> None:
    assert nvdec_refusal(GOOD) is None
    assert expected in nvdec_refusal(dataclasses.replace(GOOD, **changes))


@pytest.mark.parametrize(
    ("height", "width", "params", "expected"),
    [
        (480, 640, "bframes=2", None),
        (360, 640, "bframes=2", "the displayed size differ"),
        (576, 720, "tff=1", "interlaced"),
    ],
)
def test_the_rules_apply_to_encoded_files(
    tmp_path: Path, height: int, width: int, params: str, expected: str | None
) -> None:
    frames = [picture(0, t, height, width) for t in range(3)]
    path = encode_video(tmp_path / "x.mp4", frames, **{"x264-params": params})
    reason = nvdec_refusal(probe_video(path))
    assert reason is None if expected is None else expected in reason


@pytest.mark.skipif(has_nvdec(), reason="requires a machine without NVDEC")
def test_mixed_requires_nvdec(tmp_path: Path) -> None:
    encode_video(tmp_path / "x.mp4", [picture(0, t) for t in range(3)])
    with pytest.raises(InputError, match=r"data\.decoder: 'mixed' .* driver does not provide"):
        index_for_decoder(open_source(tmp_path), "mixed", torch.device("cuda"))


def test_mixed_names_an_unsuitable_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttrain.data.loader.has_nvdec", lambda: True)
    encode_video(tmp_path / "small.mp4", [picture(0, t, 160, 160) for t in range(3)])
    with pytest.raises(InputError, match=r"'small\.mp4' is unsuitable: the CPU decodes small"):
        index_for_decoder(open_source(tmp_path), "mixed", torch.device("cuda"))


def check_clips(path: Path, pairs: list[tuple[int, int]]) -> None:
    """Check that decoding only the clip gives the same frames as decoding the whole file."""
    video, truth = probe_video(path), sequential(path)
    for pair in pairs:
        data, numbers = cut_clip(video, pair)
        with av.open(io.BytesIO(data.tobytes())) as container:
            to_rgb = RgbConverter()
            decoded = [to_rgb(frame) for frame in container.decode(video=0)]
        for frame, number in zip(pair, numbers, strict=True):
            np.testing.assert_array_equal(decoded[number], truth[frame])


@pytest.mark.parametrize("name", [name for name in REAL if not name.startswith(("rotated", "av1"))])
def test_clips_of_real_videos(shared: Path, name: str) -> None:
    path = shared / "videos" / name
    last = probe_video(path).num_frames - 1
    check_clips(path, [(0, 0), (last, last), (1, last), (last // 2, last // 2 + 1), (last, last // 3)])


@pytest.mark.parametrize(
    ("codec", "suffix", "options"),
    [
        (
            "libx264",
            ".mp4",
            {"x264-params": "open-gop=1:keyint=8:min-keyint=8:bframes=3:scenecut=0:b-adapt=0"},
        ),
        (
            "libx265",
            ".mp4",
            {"x265-params": "open-gop=1:keyint=8:min-keyint=8:bframes=3:scenecut=0:log-level=none"},
        ),
        ("libvpx-vp9", ".webm", {"g": 8}),
        # Containers without decoding times after a seek, or without an index.
        ("libx264", ".mkv", {"g": 8, "bf": 2}),
        ("libx264", ".ts", {"g": 8, "bf": 2}),
        ("libx264", ".flv", {"g": 8, "bf": 2}),
    ],
)
def test_clips_of_all_frames(tmp_path: Path, codec: str, suffix: str, options: dict) -> None:
    frames = [picture(0, t) for t in range(30)]
    path = encode_video(tmp_path / f"x{suffix}", frames, codec, **options)
    check_clips(path, [(frame, min(frame + 4, 29)) for frame in range(30)] + [(2, 27), (29, 0)])


@pytest.mark.parametrize("b_pyramid", ["none", "strict", "normal"])
def test_unneeded_h264_pictures_are_not_in_the_clip(tmp_path: Path, b_pyramid: str) -> None:
    params = f"bframes=7:b-adapt=0:b-pyramid={b_pyramid}"
    path = encode_video(tmp_path / "x.mp4", [picture(0, t) for t in range(24)], **{"x264-params": params})
    check_clips(path, [(frame, 23 - frame) for frame in range(24)])
    data, numbers = cut_clip(probe_video(path), [3, 22])
    with av.open(io.BytesIO(data.tobytes())) as clip:
        assert numbers[1] < sum(1 for _ in clip.decode(video=0)) <= 14


def test_a_clip_is_much_smaller_than_its_video(tmp_path: Path) -> None:
    path = encode_video(tmp_path / "x.mp4", [picture(0, t) for t in range(100)], g=10, bf=0)
    data, numbers = cut_clip(probe_video(path), [43, 58])
    assert numbers == [3, 12]
    assert len(data) < path.stat().st_size / 3


def test_clips_of_trimmed_files(tmp_path: Path) -> None:
    """One file has an edit list that starts between key frames, the other lacks its first key frame."""
    original = encode_video(tmp_path / "x.mp4", [picture(0, t) for t in range(30)], g=10, bf=2)
    edited = remux(original, tmp_path / "cut.mp4", lambda _, data: data, shift=-600, use_editlist="1")
    check_clips(edited, [(0, 3), (5, 9), (1, 12)])
    cut = remux(original, tmp_path / "cut.mkv", lambda number, data: data if number > 5 else None)
    check_clips(cut, [(0, 3), (5, 19)])
