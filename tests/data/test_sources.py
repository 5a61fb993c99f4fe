"""open_source: the videos of each kind of source, their order, and the reports of skipped files."""

import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import encode_video, picture, write_folders

from fasttrain.data.images import UnreadableFrameError
from fasttrain.data.index import FolderIndex, FrameIndex, VideoIndex
from fasttrain.data.sources import MAX_KINDS, describe_left_out, find_source, open_source
from fasttrain.distributed import World
from fasttrain.errors import InputError


def test_frame_folders_at_any_depth_are_sorted_by_name(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "frames", [5, 3, 4])
    write_folders(root / "deeper" / "still", [2], suffix=".png")
    index = open_source(root)
    assert isinstance(index, FolderIndex)
    assert index.names == [
        "class_0/video_0",
        "class_0/video_2",
        "class_1/video_1",
        "deeper/still/class_0/video_0",
    ]
    assert index.num_frames.tolist() == [5, 4, 3, 2]
    assert index.num_frames.dtype == np.int64
    assert index.skipped == []
    np.testing.assert_array_equal(index.read_frame(3, 1), picture(0, 1))


def test_frames_are_in_natural_order(tmp_path: Path) -> None:
    for frame in (0, 1, 2, 9, 10, 11, 100):
        Image.fromarray(picture(0, frame)).save(tmp_path / f"img_{frame}.png")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not a frame")
    index = open_source(tmp_path)
    assert index.names == [tmp_path.name]
    for number, frame in enumerate((0, 1, 2, 9, 10, 11, 100)):
        np.testing.assert_array_equal(index.read_frame(0, number), picture(0, frame))


def test_symbolic_links_are_followed_except_in_cycles(tmp_path: Path) -> None:
    real = write_folders(tmp_path / "real", [3])
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(real, target_is_directory=True)
    (root / "loop").symlink_to(root, target_is_directory=True)
    assert open_source(root).names == ["linked/class_0/video_0"]


def test_paths_in_a_frame_list_are_relative_to_the_list(tmp_path: Path) -> None:
    """The list has a byte order mark, Windows line endings, spaces, frame counts and bad entries."""
    root = write_folders(tmp_path / "frames", [5, 4, 3])
    # Names in HMDB51 may start with #. Some names contain characters at which str.splitlines ends a line.
    names = ["with space 7", "#20 Rhythm clap", "line\u2028mark", "next\x85line"]
    for name in names:
        (tmp_path / name).mkdir()
        Image.fromarray(picture(0, 0)).save(tmp_path / name / "0.jpg")
    too_long = "x" * 300
    lines = [
        "# a comment",
        "frames/class_0/video_0 3",
        "",
        str(root / "class_1/video_1"),
        "./frames/class_0/video_0/",
        "frames/class_1/video_1 9",
        "frames/class_0/video_2 0",
        "frames",
        f"{too_long} 3",
        *names,
    ]
    listing = tmp_path / "train.txt"
    listing.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    index = open_source(listing)
    lengths = dict(zip(index.names, index.num_frames.tolist(), strict=True))
    expected = {str(root / "class_1/video_1"): 4, "frames/class_0/video_0": 3, **dict.fromkeys(names, 1)}
    assert list(lengths.items()) == sorted(expected.items())
    assert index.skipped == [
        ("frames/class_0/video_0", "duplicate entry in the list"),
        ("frames/class_1/video_1", "the list specifies 9 frames, but the folder contains 4"),
        ("frames/class_0/video_2", "the list specifies 0 frames, but the folder contains 3"),
        ("frames", "contains no images; to list its video files, give the path of each"),
        (too_long, "does not exist"),
    ]


def test_unreadable_videos_of_a_folder_are_reported(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    good = encode_video(tmp_path / "b" / "good.mp4", [picture(0, t) for t in range(6)])
    (tmp_path / "a.mkv").write_bytes(b"")
    (tmp_path / "c.mp4").write_bytes(good.read_bytes()[:400])
    (tmp_path / "readme.txt").write_text("not a video")
    index = open_source(tmp_path)
    assert isinstance(index, VideoIndex)
    assert index.names == ["b/good.mp4"]
    assert index.num_frames.tolist() == [6]
    assert [name for name, _ in index.skipped] == ["a.mkv", "c.mp4"]
    assert all(reason for _, reason in index.skipped)
    assert open_source(good).names == ["good.mp4"]


def test_processes_divide_the_scan_of_videos(tmp_path: Path) -> None:
    """Each process scans its share of the videos, and all get the index that a single process would get."""
    for video in range(5):
        encode_video(tmp_path / f"{video}.mp4", [picture(video, t) for t in range(3 + video)])
    (tmp_path / "bad.mp4").write_bytes(b"")
    single = open_source(tmp_path)
    scanned: list[list[str]] = []
    barrier = threading.Barrier(2)
    gathered: list[Any] = [None, None]

    class OneOfTwo(World):
        def gather(self, value: Any) -> list[Any]:
            gathered[self.rank] = pickle.loads(pickle.dumps(value))
            scanned.append(list(value))
            barrier.wait(timeout=60)
            return gathered

    def run(rank: int) -> FrameIndex:
        cpu = torch.device("cpu")
        return open_source(tmp_path, world=OneOfTwo(rank=rank, size=2, cores=1, device=cpu))

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(run, range(2)))
    assert sorted(map(len, scanned)) == [3, 3]
    for index in both:
        assert index.fingerprint() == single.fingerprint()
        assert index.skipped == single.skipped
        np.testing.assert_array_equal(index.read_frame(4, 6), single.read_frame(4, 6))


def test_a_list_of_videos(tmp_path: Path) -> None:
    encode_video(tmp_path / "one.mp4", [picture(0, t) for t in range(4)])
    encode_video(tmp_path / "two.avi", [picture(0, t) for t in range(4)], "mpeg4").rename(tmp_path / "2.dat")
    (tmp_path / "notes.txt").write_text("no video")
    (tmp_path / "list.txt").write_text("one.mp4\nmissing.mp4\n2.dat\none.mp4\nnotes.txt\n")
    index = open_source(tmp_path / "list.txt", kind="list")
    assert isinstance(index, VideoIndex)
    assert index.names == ["2.dat", "one.mp4"]
    assert index.skipped == [
        ("missing.mp4", "does not exist"),
        ("one.mp4", "duplicate entry in the list"),
        ("notes.txt", "invalid data found when processing input"),
    ]
    assert index.left_out == {}


def test_real_videos(shared: Path) -> None:
    index = open_source(shared / "videos")
    lengths = dict(zip(index.names, index.num_frames.tolist(), strict=True))
    assert lengths == {
        "av1_video.mkv": 125,
        "bt709_full_range.mp4": 30,
        "flipping_a_pancake.mkv": 310,
        "h265_video.mp4": 10,
        "nasa_13013.mp4": 390,
        "rotated_180.mov": 3,
    }
    ((name, reason),) = index.skipped
    assert name == "corrupted.mp4"
    assert "damaged" in reason


def test_the_fingerprint_depends_on_names_and_lengths(tmp_path: Path) -> None:
    first = open_source(write_folders(tmp_path / "one", [5, 3]))
    same = open_source(write_folders(tmp_path / "two", [5, 3], suffix=".png"))
    longer = open_source(write_folders(tmp_path / "three", [5, 4]))
    fewer = open_source(write_folders(tmp_path / "four", [5]))
    assert first.fingerprint() == same.fingerprint()
    assert len({index.fingerprint() for index in (first, longer, fewer)}) == 3


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda root: root / "nowhere", "auto", "does not exist"),
        (lambda root: root, "auto", r"contains no readable video\. Expected"),
        (lambda root: root, "list", "is a folder, but the kind is 'list'"),
        (
            lambda root: _write(root / "x.txt", b"\xff\xfe\x00binary"),
            "auto",
            "a video file or a text file that lists",
        ),
        (lambda root: _write(root / "x.txt", b"nowhere\n"), "auto", "no line is an existing path.*'nowhere'"),
        (lambda root: _write(root / "a.md", b"# Notes\n\nText.\n"), "auto", "was read as a list .*'Text.'"),
        (lambda root: _write(root / "x.txt", b""), "folders", "is a file, but the kind is 'folders'"),
        (lambda root: _write(root / "x.JPG", b"\xff\xd8"), "auto", "is an image. Pass the folder"),
        (lambda root: _write(root / "x.mp4", b"no video"), "list", "is a video file, but the kind is 'list'"),
        (lambda root: _write(root / "x.mp4", b"no video"), "auto", r"\(1 skipped, first x\.mp4: "),
    ],
)
def test_a_bad_source_gives_a_one_line_error(tmp_path: Path, make, kind: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_source(make(tmp_path), kind=kind)
    assert "\n" not in str(caught.value)


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_folder_of_images_and_videos_requires_a_kind(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "mixed", [3])
    encode_video(root / "clip.mp4", [picture(0, t) for t in range(4)])
    with pytest.raises(InputError, match=r"images \(first: .*/00000.jpg\) and video .*clip.mp4"):
        open_source(root)
    folders, videos = open_source(root, kind="folders"), open_source(root, kind="videos")
    assert (folders.names, folders.left_out) == (["class_0/video_0"], {".mp4": (1, "clip.mp4")})
    assert (videos.names, videos.left_out) == (["clip.mp4"], {".jpg": (3, "class_0/video_0/00000.jpg")})


def test_an_unreadable_frame_error_has_the_frame_number(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "frames", [4])
    index = open_source(root)
    folder = root / "class_0" / "video_0"
    (folder / "00001.jpg").write_bytes((folder / "00001.jpg").read_bytes()[:-300])
    (folder / "00002.jpg").write_bytes(b"")
    (folder / "00003.jpg").unlink()
    index.read(0, [0])
    for frame, message in ((1, "truncated JPEG"), (2, "empty"), (3, "no such file")):
        with pytest.raises(UnreadableFrameError, match=message) as caught:
            index.read(0, [0, frame])
        assert caught.value.frame == frame


def test_a_number_that_is_too_long_belongs_to_the_name(tmp_path: Path) -> None:
    write_folders(tmp_path, [2])
    (tmp_path / "list.txt").write_text(f"class_0/video_0 1\nclass_0/video_0 {'9' * 5000}\n")
    index = open_source(tmp_path / "list.txt")
    assert list(index.num_frames) == [1]
    assert [reason for _, reason in index.skipped] == ["does not exist"]


# --- lists of data sets with labels ---


@pytest.mark.parametrize("layout", ["beside", "annotations"])
def test_a_list_of_kinetics_selects_the_videos_that_exist(tmp_path: Path, layout: str) -> None:
    """The layout of the CVD Foundation, in which some videos have a replacement."""
    root = tmp_path / "k400"
    clips = ["a_000001_000011", "-b_000090_000100", "c_c_001234_001244", "unlisted_000000_000010"]
    replacement = root / "replacement/replacement_for_corrupted_k400/a_000001_000011.mp4"
    paths = [root / "train" / f"{clips[0]}.mp4", root / "train/doing this, \u2028/" / f"{clips[1]}.mp4"]
    paths += [root / "val" / f"{clips[2]}.webm", root / "train" / f"{clips[3]}.mp4", replacement]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    path = root / {"beside": "train.csv", "annotations": "annotations/train.csv"}[layout]
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "label,youtube_id,time_start,time_end,split\n"
        'doing that,a,1,11,train\n"doing this, too",-b,90,100,train\nx,c_c,1234,1244,val\nx,gone,0,10,train\n'
    )
    files = find_source(path)
    assert files.videos == {str(path.relative_to(root)): path for path in (replacement, paths[1], paths[2])}
    reason = f"lists videos that do not exist below {str(root)!r}: 1 of 4, such as gone_000000_000010.mp4"
    assert files.skipped == [("train.csv", reason)]
    assert files.left_out == {}


def test_a_list_of_kinetics_selects_frame_folders(tmp_path: Path) -> None:
    for clip in ("a_000001_000011", "b_000001_000011"):
        (tmp_path / "train" / clip).mkdir(parents=True)
        Image.fromarray(picture(0, 0)).save(tmp_path / "train" / clip / "img_00001.jpg")
    (tmp_path / "train.csv").write_text("youtube_id,time_start,time_end,split\nb,1,11,train\n")
    assert open_source(tmp_path / "train.csv").names == ["train/b_000001_000011"]


def test_lists_of_other_tools(tmp_path: Path) -> None:
    """The lists of MMAction2 (for frame folders, with frames and label) and of VideoMAE or TimeSformer."""
    root = write_folders(tmp_path, [5, 5, 5, 5])
    (root / "class_0/video_0").rename(root / "class_0/a, b")
    (root / "class_0/video_2").rename(root / "class_0/v 7 8")
    lines = ["class_0/a, b 5 17", "class_0/v 7 8 3 2", "class_1/video_1,4", "class_1/video_3, doing this"]
    (root / "list.csv").write_text("\n".join([*lines, "gone/a, b.mp4 3", "gone.mp4,3"]))
    index = open_source(root / "list.csv")
    assert dict(zip(index.names, index.num_frames.tolist(), strict=True)) == {
        "class_0/a, b": 5,
        "class_0/v 7 8": 3,
        "class_1/video_1": 5,
        "class_1/video_3": 5,
    }
    assert index.skipped == [("gone/a, b.mp4", "does not exist"), ("gone.mp4,3", "does not exist")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a,x,one,11", "malformed row .*; expected the columns youtube_id, time_start, time_end"),
        ("a,b,1", "malformed row"),
        ("a" * 200_000, "is not a valid CSV file"),
        (
            "x,a,1,11",
            r"none of its videos is below .* \(listed: 1, first: a_000001_000011\.mp4\)\. Move the list",
        ),
    ],
)
def test_a_bad_list_of_kinetics_gives_a_one_line_error(tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "x.csv").write_text(f"label,youtube_id,time_start,time_end\n{row}\n")
    with pytest.raises(InputError, match=message) as caught:
        open_source(tmp_path / "x.csv")
    assert "\n" not in str(caught.value)


# --- which images are frames ---


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def numbered(pattern: str, count: int) -> list[str]:
    return [pattern.format(number) for number in range(1, count + 1)]


@pytest.mark.parametrize(
    ("frames", "others"),
    [
        (numbered("img_{:05d}.jpg", 4), numbered("flow_x_{:05d}.jpg", 4) + numbered("flow_y_{:05d}.jpg", 4)),
        # Each object has a mask, so there are more masks than frames.
        (numbered("{}.jpg", 12), numbered("{}_mask_1.png", 12) + numbered("{}_mask_2.png", 12)),
        (numbered("rgb-{}.png", 3), numbered("Depth-{}.png", 9)),
        (numbered("frame{:06d}.jpg", 3), ["cover.jpg", "poster.webp", "00001_thumb.jpg"]),
        (numbered("{:05d}.jpg", 3), ["a.jpg", "b.jpg"]),
        # Names are in the order of all their numbers, whatever the number of digits.
        (["1_9.jpg", "1_10.JPG", "10_1.jpg"], []),
        (["2011-09-26T13.02.25Z.png", "2011-09-26T13.02.26Z.png"], []),
        # If no other images are left, the words mean nothing.
        (numbered("cover song {}.bmp", 3), []),
        (["whatever.tiff"], []),
        (["Frame1.jpeg", "frame2.JPG", "frame10.jpg"], []),
        (numbered("waterflow_{}.jpg", 3), ["segmented.jpg"]),
    ],
)
def test_frames_are_the_images_of_one_pattern(tmp_path: Path, frames: list[str], others: list[str]) -> None:
    root = touch(tmp_path / "a" / "video", *frames, *others).parent
    source = find_source(root)
    assert source.folders == {"video": (root / "video", tuple(frames))}
    assert source.skipped == []
    assert sum(count for count, _ in source.left_out.values()) == len(others)
    (tmp_path / "list.txt").write_text(f"a/video {len(frames)}\n")
    listed = find_source(tmp_path / "list.txt")
    assert listed.folders == {"a/video": source.folders["video"]}
    assert listed.left_out == {kind: (n, f"a/{first}") for kind, (n, first) in source.left_out.items()}


@pytest.mark.parametrize(
    ("images", "listed"),
    [
        (
            [*numbered("flow_x_{}.jpg", 3), *numbered("flow_y_{}.jpg", 3)],
            r"3 flow_x_\*\.jpg, 3 flow_y_\*\.jpg\.",
        ),
        ([*numbered("{:05d}.jpg", 4), *numbered("{:05d}.png", 4)], r"4 \*\.jpg, 4 \*\.png\."),
        ([*numbered("mask_dance_{}.jpg", 9), "info.png"], r"9 mask_dance_\*\.jpg, 1 info\.png\."),
        ([f"{letter}3f.jpg" for letter in "abcdef"], r"1 a\*f\.jpg, .*, 1 e\*f\.jpg, \.\.\.\."),
    ],
)
def test_a_folder_without_a_majority_is_skipped(tmp_path: Path, images: list[str], listed: str) -> None:
    touch(tmp_path / "video", *images)
    touch(tmp_path / "good", "1.jpg")
    source = find_source(tmp_path)
    assert list(source.folders) == ["good"]
    ((name, reason),) = source.skipped
    assert name == "video"
    assert re.search(f"kinds of images, .* are the frames: {listed}", reason)
    assert source.left_out == {}


def test_images_below_a_folder_of_annotations_are_frames_only_if_there_are_no_others(tmp_path: Path) -> None:
    touch(tmp_path / "Annotations" / "480p" / "bear", "00000.png", "00001.png")
    assert list(find_source(tmp_path).folders) == ["Annotations/480p/bear"]
    touch(tmp_path / "JPEGImages" / "480p" / "bear", "00000.jpg", "00001.jpg")
    source = find_source(tmp_path)
    assert list(source.folders) == ["JPEGImages/480p/bear"]
    assert source.left_out == {"images below Annotations": (2, "Annotations/480p/bear/00000.png")}


def test_a_folder_with_optical_flow(shared: Path) -> None:
    index = open_source(shared / "cases" / "rawframes_flow")
    assert index.num_frames.tolist() == [6]
    name = "v_Archery_g01_c01"
    assert index.left_out == {
        f"flow_{axis}_*.jpg": (6, f"{name}/flow_{axis}_00001.jpg") for axis in ("x", "y")
    }


# --- which files are videos, and what is left out ---


def test_files_left_out_are_counted_by_kind(tmp_path: Path) -> None:
    touch(tmp_path, "B.TXT", "clip.MTS", "x.VOB", ".hidden.txt")
    touch(tmp_path / "a", "a.txt", "readme", "1.json", "2.json", "3.json", "y.gif")
    source = find_source(tmp_path)
    assert list(source.videos) == ["clip.MTS", "x.VOB", "a/y.gif"]
    assert source.left_out == {
        ".txt": (2, "B.TXT"),
        ".json": (3, "a/1.json"),
        "without suffix": (1, "a/readme"),
    }
    assert describe_left_out(source.left_out) == (
        "files left out: 6, of which 3 .json (first a/1.json), 2 .txt (first B.TXT), "
        "1 without suffix (first a/readme)"
    )
    with pytest.raises(
        InputError, match=r"no readable video \(3 skipped, first .*; files left out: 6, of which"
    ):
        open_source(tmp_path)


def test_the_number_of_kinds_is_bounded(tmp_path: Path) -> None:
    """A folder may contain millions of files, each with a suffix of its own."""
    touch(tmp_path, *(f"x.{number:03d}" for number in range(MAX_KINDS + 50)))
    left_out = find_source(tmp_path).left_out
    assert len(left_out) == MAX_KINDS + 1
    assert left_out["of other kinds"][0] == 50
    assert describe_left_out(left_out).endswith(f", {MAX_KINDS - 4} others")


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        (".mp4", "libx264"),
        (".mkv", "libx264"),
        (".avi", "mpeg4"),
        (".flv", "flv"),
        (".wmv", "wmv2"),
        (".mpg", "mpeg2video"),
        (".ts", "mpeg2video"),
        (".mxf", "mpeg2video"),
        (".y4m", "wrapped_avframe"),
        (".rm", "rv20"),
    ],
)
def test_a_video_without_a_suffix_is_found(tmp_path: Path, suffix: str, codec: str) -> None:
    frames = [picture(0, t, 96, 128) for t in range(5)]
    path = encode_video(tmp_path / f"x{suffix}", frames, codec, time_base=Fraction(1, 25), times=range(5))
    path.rename(tmp_path / "x")
    # Lines of 94 bytes that begin with a G resemble the packets of MPEG-TS.
    (tmp_path / "LICENSE").write_text(f"G{'x' * 92}\n" * 9)
    (tmp_path / "Makefile").touch()
    index = open_source(tmp_path)
    assert (index.names, index.left_out) == (["x"], {"without suffix": (2, "LICENSE")})
    assert open_source(tmp_path / "x").names == ["x"]


def test_a_list_of_images_is_refused(tmp_path: Path) -> None:
    write_folders(tmp_path, [2])
    (tmp_path / "list.txt").write_text("class_0/video_0/00000.jpg\nclass_0/video_0/00001.jpg 1\n")
    with pytest.raises(InputError, match=r"2 skipped, .*is an image; list the folder of its video instead"):
        open_source(tmp_path / "list.txt")
