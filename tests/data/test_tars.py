"""Packing WebDatasets and the archives of Kinetics: names, grouping, resuming, damaged and hostile tars."""

import gzip
import io
import re
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from synthetic import encode_video, encoded, picture, write_folders

import fasttrain.data.pack
from fasttrain.__main__ import main
from fasttrain.data.pack import PackOptions, pack
from fasttrain.data.packed import PackedIndex, ShardIndex
from fasttrain.data.sources import open_source
from fasttrain.data.tars import TarVideo, _iterate, find_packable
from fasttrain.errors import InputError

JPEG = encoded(Image.fromarray(picture(0, 0)), quality=95)
MP4_FRAMES = 6


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Video files of several formats."""
    folder = tmp_path_factory.mktemp("clips")
    codecs = {".mp4": "libx264", ".webm": "libvpx-vp9", ".mkv": "libx264", ".avi": "mpeg4"}
    return [
        encode_video(folder / f"{number}{suffix}", [picture(number, t) for t in range(MP4_FRAMES)], codec)
        for number, (suffix, codec) in enumerate(codecs.items())
    ]


def write_tar(path: Path, members: dict[str, bytes], compress: bool = False) -> Path:
    """Write members in their order. Existing archives differ in their headers, which tarfile writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if compress else "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(path: Path, *entries: dict[str, object]) -> Path:
    """Write the samples of a WebDataset."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for entry in entries:
            writer.write(entry)
    return path


def packed(
    source: Path, to: Path, share: tuple[int, int] = (1, 1), workers: int = 2, **changes
) -> PackedIndex:
    options = PackOptions(**{"shard_bytes": 20_000, **changes})
    pack(source, to, options, share=share, workers=workers)
    return PackedIndex(to) if share[1] == 1 else None


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def frames_of(index: PackedIndex) -> dict[str, list[bytes]]:
    return {
        name: [frame.tobytes() for frame in index.read(number, range(index.num_frames[number]))]
        for number, name in enumerate(index.names)
    }


# --- what tars contain ---


@pytest.mark.parametrize("form", ["folder", "pattern", "list", "compressed"])
def test_videos_in_tars_are_packed_as_files_are(tmp_path: Path, clips: list[Path], form: str) -> None:
    """The layout of video2dataset: a video, its caption and its metadata per key."""
    for shard in range(2):
        samples(
            tmp_path / "shards" / f"{shard:05d}.tar",
            *(
                {
                    "__key__": clip.stem,
                    clip.suffix[1:]: clip.read_bytes(),
                    "txt": "a dog",
                    "json": {"fps": 25},
                }
                for clip in clips[2 * shard : 2 * shard + 2]
            ),
        )
    (tmp_path / "shards" / "00000_stats.json").touch()
    (tmp_path / "tars.txt").write_text("# tars\nshards/{00000..00001}.tar\n")
    source = {
        "folder": tmp_path / "shards",
        "pattern": tmp_path / "shards" / "{00000..00001}.tar",
        "list": tmp_path / "tars.txt",
        "compressed": tmp_path / "shards",
    }[form]
    if form == "compressed":
        for tar in source.glob("*.tar"):
            tar.with_suffix(".tgz").write_bytes(gzip.compress(tar.read_bytes()))
            tar.unlink()
    index = packed(source, tmp_path / "packed")
    assert frames_of(index) == frames_of(packed(clips[0].parent, tmp_path / "expected"))
    first = "00000.tgz" if form == "compressed" else "00000.tar"
    others = {".json": (4, f"{first}/0.json"), ".txt": (4, f"{first}/0.txt")}
    if source.is_dir():
        others[".json"] = (5, "00000_stats.json")
    assert index.left_out == others


@pytest.mark.parametrize("compress", [False, True])
def test_frame_folders_in_a_tar_are_packed_as_folders_are(tmp_path: Path, compress: bool) -> None:
    """The tar contains what `tar` writes for a folder: other images, annotations, and another order."""
    root = write_folders(tmp_path / "frames", [12, 4])
    video = root / "class_0" / "video_0"
    for number in range(12):
        (video / f"{number:05d}.jpg").rename(video / f"{number}.jpg")
    Image.fromarray(picture(0, 0)).save(video / "cover.jpg")
    Image.fromarray(picture(0, 0)).save(video / ".hidden.jpg")
    (video / "3.jpg").write_bytes(JPEG[:-200])
    (root / "Annotations").mkdir()
    (root / "Annotations" / "0.png").write_bytes(b"")
    with tarfile.open(tmp_path / "frames.tar", "w:gz" if compress else "w") as tar:
        for name in ("class_0", "class_1", "Annotations"):
            tar.add(root / name, f"./{name}")
    index = packed(tmp_path / "frames.tar", tmp_path / "packed", frames=5)
    expected = packed(root, tmp_path / "expected", frames=5)
    assert frames_of(index) == frames_of(expected)
    assert (
        index.skipped
        == expected.skipped
        == [("class_0/video_0/3.jpg", "truncated JPEG (no end-of-image marker)")]
    )
    assert index.left_out == {
        kind: (count, f"frames.tar/{first}") for kind, (count, first) in expected.left_out.items()
    }


def test_a_packed_set_can_be_packed_again(tmp_path: Path) -> None:
    first = packed(write_folders(tmp_path / "frames", [3, 9]), tmp_path / "first")
    again = packed(tmp_path / "first", tmp_path / "again", frames=3)
    assert again.names == first.names
    assert frames_of(again)["class_1/video_1"] == [frames_of(first)["class_1/video_1"][i] for i in (0, 4, 8)]


def test_frames_with_one_key_are_a_video(tmp_path: Path) -> None:
    jpegs = [encoded(Image.fromarray(picture(0, t))) for t in range(11)]
    samples(
        tmp_path / "x.tar",
        {"__key__": "a/dog", **{f"frame_{t}.jpg": jpeg for t, jpeg in enumerate(jpegs)}, "cls": 3},
        {"__key__": "a/cat", **{f"{t:04d}.jpg": jpeg for t, jpeg in enumerate(jpegs[:2])}, "thumb.jpg": JPEG},
        # Not a video, but a labelled image.
        {"__key__": "a/bird", "jpg": JPEG, "seg.png": JPEG, "txt": "a bird"},
    )
    index = packed(tmp_path / "x.tar", tmp_path / "packed")
    assert frames_of(index) == {"a/cat": jpegs[:2], "a/dog": jpegs}
    single = "single images with a text, a label or a video"
    assert index.left_out[single] == (2, "x.tar/a/bird.jpg")
    assert index.left_out["cat.thumb.jpg"][0] == 1


def test_keys_that_begin_anew_in_every_tar(tmp_path: Path, clips: list[Path]) -> None:
    for shard in ("train/0", "train/1", "val/0"):
        write_tar(tmp_path / "all" / f"{shard}.tar", {"000.mp4": clips[0].read_bytes()})
    assert packed(tmp_path / "all", tmp_path / "packed").names == [
        "train/0/000.mp4",
        "train/1/000.mp4",
        "val/0/000.mp4",
    ]


def test_replacements_of_kinetics(tmp_path: Path, clips: list[Path]) -> None:
    good, other = clips[0].read_bytes(), clips[2].read_bytes()
    folder = tmp_path / "k400_targz"
    clip = "-3B32lodo2M_000059_000069.mp4"
    write_tar(folder / "train/part_0.tar.gz", {clip: b"corrupted", "b_000001_000011.mp4": other}, True)
    write_tar(folder / "z.tgz", {f"replacement_for_corrupted_k400/{clip}": good}, True)
    index = packed(folder, tmp_path / "packed")
    assert index.names == ["b_000001_000011.mp4", f"replacement_for_corrupted_k400/{clip}"]
    assert index.left_out == {"replaced": (1, f"train/part_0.tar.gz/{clip}")}
    assert index.skipped == []


# --- the promises of packing ---


@pytest.mark.parametrize("compress", [False, True])
def test_shares_and_workers(tmp_path: Path, clips: list[Path], compress: bool) -> None:
    for shard in range(3):
        members = {f"{shard}{clip.name}": clip.read_bytes() for clip in clips[:3]}
        write_tar(tmp_path / "tars" / f"{shard}.tar", members, compress)
    whole = packed(tmp_path / "tars", tmp_path / "one", workers=1)
    packed(tmp_path / "tars", tmp_path / "five", workers=5)
    assert contents(tmp_path / "one") == contents(tmp_path / "five")
    for share in range(1, 4):
        packed(tmp_path / "tars", tmp_path / "three", (share, 3))
        # Each machine reads one tar.
        index = ShardIndex.read(tmp_path / "three" / f"frames-{share}of3-000000.tar")
        assert {name[0] for name in index.names} == {str(share - 1)}
    assert frames_of(PackedIndex(tmp_path / "three")) == frames_of(whole)
    # Restore a missing shard, without a trace of the temporary files of a killed process.
    (tmp_path / "one" / "frames-1of1-000001.tar").unlink()
    if compress:
        (tmp_path / "one" / ".pack-1of1.partial").mkdir()
        (tmp_path / "one" / ".pack-1of1.partial" / "0").touch()
    packed(tmp_path / "tars", tmp_path / "one")
    assert contents(tmp_path / "one") == contents(tmp_path / "five")
    write_tar(tmp_path / "tars" / "2.tar", {"new.mp4": clips[0].read_bytes()})
    with pytest.raises(InputError, match="from a different source"):
        packed(tmp_path / "tars", tmp_path / "one")


def test_an_interrupted_run_continues_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tars before the first video that is missing are not decompressed again."""
    for tar in range(3):
        members = {f"{tar}{video}/{frame}.jpg": JPEG for video in range(8) for frame in range(4)}
        write_tar(tmp_path / "tars" / f"{tar}.tgz", members, compress=True)
    encode, opened = fasttrain.data.pack._encode_tar, []

    def interrupted(video: TarVideo, options: PackOptions) -> object:
        if video.name == "23":
            raise KeyboardInterrupt
        return encode(video, options)

    with monkeypatch.context() as changes:
        changes.setattr(fasttrain.data.pack, "_encode_tar", interrupted)
        with pytest.raises(KeyboardInterrupt):
            packed(tmp_path / "tars", tmp_path / "stopped")
    assert not (tmp_path / "stopped" / ".pack-1of1.partial").exists()
    with pytest.raises(InputError, match="is incomplete"):
        open_source(tmp_path / "stopped")
    monkeypatch.setattr(gzip, "open", lambda path: opened.append(path.name) or gzip.GzipFile(path))
    packed(tmp_path / "tars", tmp_path / "stopped")
    assert opened == ["2.tgz"]
    packed(tmp_path / "tars", tmp_path / "uninterrupted")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "uninterrupted")


# --- damaged and hostile tars ---


# Where the third member begins.
THIRD = 2 * (512 + len(JPEG) + -len(JPEG) % 512)


def with_size(size: int) -> Callable[[bytes], bytes]:
    """Return a function that gives the third member another size, with a right checksum."""

    def change(data: bytes) -> bytes:
        header = bytearray(data[THIRD : THIRD + 512])
        header[124:136] = bytes([0x80 if size > 0 else 0xFF]) + size.to_bytes(11, "big", signed=True)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return data[:THIRD] + bytes(header) + data[THIRD + 512 :]

    return change


def huge_name(data: bytes) -> bytes:
    """Insert a member whose name claims to have a gigabyte."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**30
    return data[:THIRD] + info.tobuf(tarfile.GNU_FORMAT) + data[THIRD:]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: THIRD + 600], "unexpected end of data"),
        (lambda data: data[:THIRD] + b"?" * 512 + data[THIRD + 512 :], "no header at byte"),
        (with_size(2**40), "unexpected end of data"),
        (with_size(2**62), "damaged tar file ("),
        (huge_name, "damaged tar file ("),
    ],
)
@pytest.mark.parametrize("compress", [False, True])
def test_members_before_the_damage_are_packed(
    tmp_path: Path, damage: Callable[[bytes], bytes], reason: str, compress: bool
) -> None:
    members = {f"{video}/0.jpg": JPEG for video in range(20)}
    data = damage(write_tar(tmp_path / "tars/0.tar", members).read_bytes())
    (tmp_path / "tars/0.tar").write_bytes(gzip.compress(data) if compress else data)
    write_tar(tmp_path / "tars/1.tar", {"intact/0.jpg": JPEG})
    index = packed(tmp_path / "tars", tmp_path / "packed")
    assert frames_of(index) == {"0": [JPEG], "1": [JPEG], "intact": [JPEG]}
    ((name, problem),) = index.skipped
    assert name == "0.tar"
    assert problem.startswith("damaged tar file (")
    assert reason in problem


def test_a_negative_size_does_not_lead_back(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", {f"{video}/0.jpg": JPEG for video in range(4)})
    members = _iterate(io.BytesIO(with_size(-512)(tar.read_bytes())))
    # Newer versions of Python refuse the header themselves.
    with pytest.raises(tarfile.ReadError, match=r"negative size|no header"):
        list(islice(members, 9))


def test_a_truncated_or_altered_gzip_file(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 5000), dtype=np.uint8)
    members = {f"{video}/0.jpg": JPEG + noise[video].tobytes() for video in range(9)}
    data = bytearray(write_tar(tmp_path / "tars/0.tar", members, compress=True).read_bytes())
    write_tar(tmp_path / "tars/2.tar", {"intact/0.jpg": JPEG, "0/0.jpg": JPEG})
    (tmp_path / "tars/1.tgz").write_bytes(data[: len(data) // 2])
    data[-5] ^= 1
    (tmp_path / "tars/0.tar").write_bytes(data)
    files = find_packable(tmp_path / "tars", tmp_path / "packed")
    assert [name for name, _ in files.skipped] == ["0.tar", "1.tgz"]
    assert "crc check failed" in files.skipped[0][1]
    assert "end-of-stream" in files.skipped[1][1]
    index = packed(tmp_path / "tars", tmp_path / "packed")
    assert index.names == [*(f"0/{i}" for i in range(9)), *(f"1/{i}" for i in range(4)), "2/0", "2/intact"]


def test_no_name_leads_out_of_the_destination(tmp_path: Path) -> None:
    """Links, devices and other special members are left out."""
    path = write_tar(tmp_path / "in/x.tar", {"../../up/0.jpg": JPEG, "/abs/0.jpg": JPEG, ".git/0.jpg": JPEG})
    with tarfile.open(path, "a") as tar:
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "abs/0.jpg")):
            info = tarfile.TarInfo(f"linked/{target[-1]}.jpg")
            info.type, info.linkname = kind, target
            tar.addfile(info)
    index = packed(path, tmp_path / "in" / "packed")
    assert index.names == ["abs", "up"]
    assert index.left_out == {"links or special files": (2, "x.tar/linked/d.jpg")}
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    with tarfile.open(tmp_path / "in/packed/frames-1of1-000000.tar") as tar:
        assert tar.getnames() == ["up/000000.jpg", "abs/000000.jpg"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("empty.tar", r"contains no readable video \(1 skipped, first empty.tar: damaged tar file \(empty"),
        ("text.tar", "damaged tar file"),
        ("photos.tar", r"files left out: 2, of which 1 \.txt .*, 1 single images with a text"),
        ("both.tar", r"both images \(first: both\.tar/a\) and video files \(first: both\.tar/b\.mp4\)"),
        ("{0..3}.tar", r"0\.tar' does not exist \(missing tar files: 4 of 4\)"),
        ("photos.tar/x", "does not exist"),
        ("out", r"out' contains the tar files of SOURCE"),
    ],
)
def test_bad_tars_give_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, message: str
) -> None:
    (tmp_path / "empty.tar").touch()
    (tmp_path / "text.tar").write_text("not a tar\n" * 99)
    samples(tmp_path / "photos.tar", {"__key__": "0", "jpg": JPEG, "txt": "a dog"})
    write_tar(tmp_path / "both.tar", {"a/0.jpg": JPEG, "b.mp4": b""})
    write_tar(tmp_path / "out/x.tar", {"a/0.jpg": JPEG})
    assert main(["pack", str(tmp_path / source), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not list((tmp_path / "out").glob(".*"))


def test_training_on_a_tar_says_to_pack_it(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "tars/x.tar", {"a/0.jpg": JPEG})
    with pytest.raises(InputError, match=r"is a tar file\. Pack it first with `fasttrain pack "):
        open_source(tar)
    with pytest.raises(InputError, match=r"1 \.tar .* WebDataset tars must be packed first"):
        open_source(tar.parent)
    (tmp_path / "list.txt").write_text(f"{tar}\n")
    with pytest.raises(InputError, match=r"x\.tar: is a tar file; pack it first"):
        open_source(tmp_path / "list.txt")
