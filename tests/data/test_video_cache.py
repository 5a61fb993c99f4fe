"""The cache of video metadata: unchanged files are not scanned again."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from synthetic import encode_video, picture

from fasttrain.data import sources as module
from fasttrain.data.sources import open_source
from fasttrain.data.video import VideoInfo, probe_video
from fasttrain.data.video_cache import cache_path, file_state, read_cache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "videos"
    root.mkdir()
    encode_video(root / "even.mp4", [picture(0, t) for t in range(6)])
    uneven = [0, 40, 100, 120, 200]
    encode_video(root / "uneven.mkv", [picture(1, t) for t in range(5)], times=uneven)
    encode_video(root / "timeless.avi", [picture(2, t) for t in range(4)], codec="mpeg4")
    (root / "bad.mp4").write_bytes(b"no video")
    return root


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the names of the files that are scanned."""
    names: list[str] = []

    def recording(path: Path) -> VideoInfo:
        names.append(path.name)
        return probe_video(path)

    monkeypatch.setattr(module, "probe_video", recording)
    return names


def test_only_unreadable_files_are_scanned_again(folder: Path, scanned: list[str]) -> None:
    first = open_source(folder)
    scanned.clear()
    second = open_source(folder)
    assert scanned == ["bad.mp4"]
    assert second.fingerprint() == first.fingerprint()
    assert second.skipped == first.skipped
    for one, other in zip(first.videos, second.videos, strict=True):
        assert type(one.times) is type(other.times)
        np.testing.assert_array_equal(one.times, other.times)
        assert {**vars(one), "times": None} == {**vars(other), "times": None}
    for video, frames in enumerate(first.num_frames):
        np.testing.assert_array_equal(
            second.read_frame(video, frames - 1), first.read_frame(video, frames - 1)
        )


def test_changed_files_are_scanned_again(folder: Path, scanned: list[str]) -> None:
    open_source(folder)
    encode_video(folder / "even.mp4", [picture(0, t) for t in range(9)])
    state = file_state(folder / "uneven.mkv")
    os.utime(folder / "uneven.mkv", ns=(state[1] + 1, state[1] + 1))
    (folder / "timeless.avi").unlink()
    scanned.clear()
    index = open_source(folder)
    assert sorted(scanned) == ["bad.mp4", "even.mp4", "uneven.mkv"]
    assert dict(zip(index.names, index.num_frames.tolist(), strict=True)) == {"even.mp4": 9, "uneven.mkv": 5}
    scanned.clear()
    open_source(folder)
    assert scanned == ["bad.mp4"]


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "other JSON", "other format"])
def test_an_unusable_cache_is_rebuilt(folder: Path, scanned: list[str], damage: str) -> None:
    first = open_source(folder)
    path = cache_path(folder)
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "not gzip":
        path.write_bytes(b"nothing")
    elif damage == "other JSON":
        path.write_bytes(gzip.compress(b"{}"))
    else:
        content = json.loads(gzip.decompress(data))
        content["header"]["format"] = 0
        path.write_bytes(gzip.compress(json.dumps(content).encode()))
    scanned.clear()
    assert open_source(folder).fingerprint() == first.fingerprint()
    assert len(scanned) == 4
    assert len(read_cache(folder)) == 3


def test_each_source_has_its_own_cache(folder: Path, tmp_path: Path) -> None:
    open_source(folder)
    other = tmp_path / "other"
    other.mkdir()
    encode_video(other / "even.mp4", [picture(5, t) for t in range(7)])
    assert open_source(other).num_frames.tolist() == [7]
    assert open_source(folder).num_frames.tolist() == [6, 4, 5]


def test_a_cache_that_cannot_be_written_gives_a_warning(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="Cannot write the video cache"):
        assert len(open_source(folder)) == 3


def test_a_user_without_a_home_folder_has_no_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", str)  # as it is without HOME and an entry in passwd
    with pytest.warns(UserWarning, match="Cannot write the video cache .*no home folder"):
        assert len(open_source(folder)) == 3


def test_the_cache_of_another_user_is_ignored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_source(folder)
    assert read_cache(folder)
    owner = os.stat(cache_path(folder)).st_uid or 12345
    if os.geteuid() == 0:
        os.chown(cache_path(folder), owner, owner)
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert not read_cache(folder)
