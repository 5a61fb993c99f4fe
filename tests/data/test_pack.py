"""Packing: the content of packed sets, resuming, several machines, and damaged files."""

import io
import json
import os
import re
import shutil
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from processes import start
from synthetic import encode_video, make_loader, picture, write_folders

from fasttrain.__main__ import main
from fasttrain.data.dali import ClipDecoder
from fasttrain.data.images import UnreadableFrameError
from fasttrain.data.nvdec import cut_clip, has_nvdec
from fasttrain.data.pack import PackOptions, check, encode_jpeg, pack
from fasttrain.data.packed import PackedIndex
from fasttrain.data.sources import open_source
from fasttrain.data.video import probe_video, read_video_frames
from fasttrain.errors import InputError
from fasttrain.files import file_lock

# A packed set from the first version of this format, with shards of 2000 bytes.
OLD_SET = Path(__file__).parent / "packed_format_2"


def packed(source: Path, to: Path, share: tuple[int, int] = (1, 1), workers: int = 2, **changes) -> Path:
    """Pack a source in small shards and return the destination."""
    pack(source, to, PackOptions(**{"shard_bytes": 20_000, **changes}), share=share, workers=workers)
    return to


def contents(folder: Path) -> dict[str, bytes]:
    """Read all files of a packed set."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def command(*arguments: object) -> int:
    return main(["pack", *map(str, arguments)])


# --- content ---


def test_a_packed_set_equals_its_source(tmp_path: Path) -> None:
    source = open_source(write_folders(tmp_path / "frames", [9, 4, 12, 1]))
    index = open_source(packed(tmp_path / "frames", tmp_path / "packed", short_side=48))
    assert isinstance(index, PackedIndex)
    assert index.fingerprint() == source.fingerprint()
    for video, name in enumerate(source.names):
        assert index.names[video] == name
        frames = list(range(int(index.num_frames[video])))
        # JPEG files that are already small enough are stored unchanged.
        for stored, frame in zip(index.read(video, frames), source.read(video, frames), strict=True):
            np.testing.assert_array_equal(stored, frame)
    loaders = [make_loader(index), make_loader(source)]
    for pairs, expected in zip(*loaders, strict=True):
        torch.testing.assert_close(pairs.frames, expected.frames, rtol=0, atol=0)
    for loader in loaders:
        loader.close()


def test_shards_are_tar_files(tmp_path: Path) -> None:
    """On extraction, the paths of their members do not lead out of the target folder."""
    write_folders(tmp_path / "frames", [20, 20])
    (tmp_path / "lists").mkdir()
    listing = tmp_path / "lists" / "videos.txt"
    listing.write_text("../frames/class_0/video_0\n../frames/./class_1/video_1\n")
    packed(listing, tmp_path / "packed")
    members = {}
    shards = sorted((tmp_path / "packed").glob("*.tar"))
    assert len(shards) == 2
    for shard in shards:
        with tarfile.open(shard) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}
    assert len(members) == 40
    original = tmp_path / "frames" / "class_1" / "video_1" / "00002.jpg"
    assert members["frames/class_1/video_1/000002.jpg"] == original.read_bytes()
    assert check(tmp_path / "packed") == 40
    assert open_source(tmp_path / "packed").fingerprint() == open_source(listing).fingerprint()


def test_packed_sets_of_earlier_versions_can_be_read_and_continued(tmp_path: Path) -> None:
    index = open_source(OLD_SET)
    assert index.names == ["class_0/video_0", "class_1/video_1"]
    assert index.num_frames.tolist() == [2, 2]
    assert index.skipped == [("class_0/video_0/00001.jpg", "the file is empty")]
    assert np.abs(index.read_frame(1, 1).astype(int) - picture(1, 1, 16, 16)).mean() < 16
    assert check(OLD_SET) == 4
    # Restore the source from the packed set.
    for video, numbers in enumerate(([0, 2], [0, 1])):
        folder = tmp_path / "frames" / index.names[video]
        folder.mkdir(parents=True)
        for number, data in zip(numbers, index.read(video, [0, 1]), strict=True):
            (folder / f"{number:05d}.jpg").write_bytes(data.tobytes())
    (tmp_path / "frames" / "class_0" / "video_0" / "00001.jpg").touch()
    shutil.copytree(OLD_SET, tmp_path / "continued")
    for path in (tmp_path / "continued").glob("*-000001.*"):
        path.unlink()
    for name in ("continued", "new"):
        packed(tmp_path / "frames", tmp_path / name, shard_bytes=2000)
        written, expected = contents(tmp_path / name), contents(OLD_SET)
        assert written.keys() == expected.keys()
        for file, data in written.items():
            if file.endswith(".npz"):
                # Compare the arrays, because the zip headers depend on the version of NumPy.
                new, old = (np.load(io.BytesIO(archive)) for archive in (data, expected[file]))
                assert {key: new[key].tolist() for key in new} == {key: old[key].tolist() for key in old}
            else:
                assert data == expected[file]


def test_videos_are_downscaled_and_encoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "videos").mkdir()
    for video in range(3):
        frames = [picture(video, t, 96, 144) for t in range(10)]
        encode_video(tmp_path / "videos" / f"{video}.mp4", frames)
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"no video")
    options = ("--short-side", 64, "--frames", 4, "--quality", 95, "--decoder", "cpu")
    assert command(tmp_path / "videos", tmp_path / "packed", *options) == 0
    printed = capsys.readouterr().out
    assert "skipped broken.mp4: " in printed
    assert "frames: 12, shard files: 1, size: " in printed
    source, index = open_source(tmp_path / "videos"), open_source(tmp_path / "packed")
    assert index.names == source.names
    assert index.num_frames.tolist() == [4, 4, 4]
    assert [name for name, _ in index.skipped] == ["broken.mp4"]
    for number, frame in enumerate((0, 3, 6, 9)):
        original = Image.fromarray(source.read_frame(1, frame))
        expected = np.asarray(original.resize((96, 64), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(index.read_frame(1, number) - expected).mean() < 3


def test_all_images_become_upright_rgb_jpegs(tmp_path: Path) -> None:
    folder = tmp_path / "frames" / "video"
    folder.mkdir(parents=True)
    image, exif = Image.fromarray(picture(0, 0)), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(folder / "0.jpg", exif=exif)
    image.convert("L").save(folder / "1.jpg")
    image.convert("CMYK").save(folder / "2.jpg")
    image.convert("RGBA").save(folder / "3.jpg", "PNG")
    source, index = open_source(tmp_path / "frames"), open_source(packed(tmp_path / "frames", tmp_path / "p"))
    for frame, stored in enumerate(index.read(0, [0, 1, 2, 3])):
        with Image.open(io.BytesIO(stored.tobytes())) as jpeg:
            orientation = jpeg.getexif().get(ExifTags.Base.Orientation, 1)
            assert (jpeg.format, jpeg.mode, orientation) == ("JPEG", "RGB", 1)
        assert np.abs(index.read_frame(0, frame).astype(int) - source.read_frame(0, frame)).mean() < 4


def test_files_left_out_are_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folders(tmp_path / "frames", [3, 4])
    (root / "notes.txt").touch()
    Image.fromarray(picture(0, 0)).save(root / "class_0" / "video_0" / "cover.jpg")
    for share in ((1, 2), (2, 2)):
        packed(root, tmp_path / "packed", share)
    index = open_source(tmp_path / "packed")
    assert index.num_frames.tolist() == [3, 4]
    assert index.left_out == {".txt": (1, "notes.txt"), "cover.jpg": (1, "class_0/video_0/cover.jpg")}
    assert index.left_out == open_source(root).left_out
    assert capsys.readouterr().out.count("files left out: 2, of which 1 .txt (first notes.txt), 1 cover") == 1


def test_unreadable_frames_are_skipped_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folders(tmp_path / "frames", [6, 6])
    video = root / "class_0" / "video_0"
    (video / "00002.jpg").write_bytes(b"")
    # Sixteen ones in a row are not a Huffman code. Pillow and DALI decode the frame without an error.
    Image.fromarray(picture(0, 2, 240, 320)).save(video / "00004.jpg", quality=95)
    data = bytearray((video / "00004.jpg").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 512] = b"\xff\x00" * 256
    (video / "00004.jpg").write_bytes(data)
    for path in (root / "class_1" / "video_1").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    index = open_source(packed(root, tmp_path / "packed"))
    assert index.names == ["class_0/video_0"]
    assert index.num_frames.tolist() == [4]
    assert index.skipped[:2] == [
        ("class_0/video_0/00002.jpg", "the file is empty"),
        ("class_0/video_0/00004.jpg", "damaged JPEG: invalid coded data"),
    ]
    assert len(index.skipped) == 8
    printed = capsys.readouterr().out
    assert all(f"{name}: {reason}" in printed for name, reason in index.skipped)


# --- resuming ---


def interruptible(words: list[str]) -> int:
    # A shell may start background processes with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return main(words)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_continues_to_the_same_bytes(tmp_path: Path, number: signal.Signals) -> None:
    """The run is interrupted after the third shard, which must be kept."""
    rng = np.random.default_rng(0)
    for video in range(60):
        (tmp_path / "frames" / str(video)).mkdir(parents=True)
        noise = Image.fromarray(rng.integers(0, 256, (200, 200, 3), dtype=np.uint8))
        for frame in range(4):
            noise.save(tmp_path / "frames" / str(video) / f"{frame}.jpg", quality=100)
    # The continued run does not read the first video again: the index of its shard lists this frame.
    (tmp_path / "frames" / "0" / "2.jpg").write_bytes(b"")
    stopped, options = tmp_path / "stopped", ("--workers", "1", "--shard-size", "1")
    process, output = start(interruptible, ["pack", str(tmp_path / "frames"), str(stopped), *options])
    assert process.pid is not None
    third = stopped / "frames-1of1-000002.npz"
    deadline = time.monotonic() + 60
    while not third.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, number)
    with output:
        printed = output.read()
    process.join()
    if number == signal.SIGINT:
        assert process.exitcode == 130
        assert "Run the same command again to continue" in printed
    with pytest.raises(InputError, match=r"stopped' is incomplete"):
        open_source(stopped)
    kept = third.stat().st_mtime_ns
    assert command(tmp_path / "frames", stopped, *options) == 0
    assert command(tmp_path / "frames", tmp_path / "uninterrupted", *options) == 0
    assert third.stat().st_mtime_ns == kept
    assert contents(stopped) == contents(tmp_path / "uninterrupted")


@pytest.mark.parametrize("missing", ["*-000001.*", "*-000001.tar", "*-000001.npz"])
def test_packing_again_restores_missing_shards(tmp_path: Path, missing: str) -> None:
    """The restored files do not depend on the number of workers."""
    source = write_folders(tmp_path / "frames", [5] * 12, suffix=".png")
    (source / "class_0" / "video_0" / "00002.png").write_bytes(b"not an image")
    complete = contents(packed(source, tmp_path / "packed", workers=1))
    for path in (tmp_path / "packed").glob(missing):
        path.unlink()
    with pytest.raises(InputError, match="has a missing shard"):
        open_source(tmp_path / "packed")
    assert contents(packed(source, tmp_path / "packed", workers=5)) == complete


def test_continuing_with_other_options_or_another_source_is_an_error(tmp_path: Path) -> None:
    """The source changes by an added frame, by another frame count in a list, or by the size of a video."""
    source = write_folders(tmp_path / "frames", [4, 4])
    listing = tmp_path / "list.txt"
    listing.write_text("frames/class_0/video_0 3\n")
    video = encode_video(tmp_path / "video.mp4", [picture(0, t) for t in range(4)])
    sources = {path: tmp_path / f"packed_{path.name}" for path in (source, listing, video)}
    for path, out in sources.items():
        packed(path, out)
        with pytest.raises(InputError, match="started with quality=90, but now quality=50"):
            packed(path, out, quality=50)
    listing.write_text("frames/class_0/video_0 4\n")
    shutil.copy(source / "class_0/video_0/00000.jpg", source / "class_0/video_0/00004.jpg")
    video.write_bytes(video.read_bytes() + b"\0")
    for path, out in sources.items():
        with pytest.raises(InputError, match="started from a different source, or the names or sizes"):
            packed(path, out)


# --- several machines ---


def test_several_machines_pack_one_set(tmp_path: Path) -> None:
    source, destination = write_folders(tmp_path / "frames", [3] * 11), tmp_path / "packed"
    with file_lock(destination / "pack-1of3.lock", "busy"):
        with pytest.raises(InputError, match="Another process is packing share 1 of 3 in"):
            packed(source, destination, (1, 3))
        assert not list(destination.glob("*.tar*"))
        # The lock of one share does not block the others.
        packed(source, destination, (3, 3))
    packed(source, destination, (1, 3))
    with pytest.raises(InputError, match=r"found 1/3, 3/3\. Pack the missing shares with --shard I/N"):
        open_source(destination)
    packed(source, destination, (2, 3))
    assert open_source(destination).fingerprint() == open_source(source).fingerprint()
    assert check(destination, workers=2) == 33


def test_shares_of_different_sources_or_options_are_an_error(tmp_path: Path) -> None:
    """Otherwise, a video could be missing or present twice without notice."""
    first = write_folders(tmp_path / "frames", [3] * 4)
    packed(first, tmp_path / "packed", (1, 2))
    packed(write_folders(tmp_path / "grown", [3] * 6), tmp_path / "packed", (2, 2))
    with pytest.raises(InputError, match=r"pack-2of2\.json' and the manifest of share 1 differ in source\."):
        open_source(tmp_path / "packed")
    packed(first, tmp_path / "other", (1, 2))
    packed(first, tmp_path / "other", (2, 2), quality=50)
    with pytest.raises(InputError, match=r"differ in quality\."):
        open_source(tmp_path / "other")


# --- damage ---


def flip_bit(position: int, suffix: str = ".tar") -> Callable[[Path], None]:
    """Return a function that flips a bit of a shard or of its index."""

    def damage(shard: Path) -> None:
        data = bytearray(shard.with_suffix(suffix).read_bytes())
        data[position] ^= 1
        shard.with_suffix(suffix).write_bytes(data)

    return damage


def change_manifest(**changes: object) -> Callable[[Path], object]:
    """Return a function that changes keys of the manifest next to a shard; None removes a key."""

    def damage(shard: Path) -> None:
        path = shard.parent / "pack-1of1.json"
        manifest = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in manifest.items() if value is not None}))

    return damage


def change_index(**changes: object) -> Callable[[Path], object]:
    """Return a function that changes fields of the index of a shard; its checksums are right."""

    def damage(shard: Path) -> None:
        path = shard.with_suffix(".npz")
        with np.load(path) as content:
            arrays = dict(content)
        values = json.loads(arrays["told"].tobytes())
        for key, value in changes.items():
            (arrays if key in arrays else values)[key] = value
        arrays["told"] = np.frombuffer(json.dumps(values).encode(), np.uint8)
        np.savez(path, **arrays)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_bit(1000), "frame 0 of 'class_0/video_0' is damaged"),
        (flip_bit(20), "frame 0 of 'class_0/video_0' is damaged"),
        (lambda shard: os.truncate(shard, shard.stat().st_size - 600), "bytes, expected"),
        (lambda shard: shard.unlink(), "has a missing shard"),
        (lambda shard: shard.with_suffix(".npz").unlink(), "has a missing shard"),
        (lambda shard: shard.with_suffix(".npz").write_text("{}"), "npz'? is damaged"),
        (flip_bit(300, ".npz"), "npz'? is damaged"),
        (lambda shard: (shard.parent / "pack-1of1.json").write_text("{"), "json' is damaged"),
        (lambda shard: (shard.parent / "pack-1of1.json").write_text("[]"), r"damaged \(not a JSON object\)"),
        (lambda shard: (shard.parent / "pack-1of1.json").write_text("[" * 99_999), "nested too deeply"),
        (lambda shard: (shard.parent / "pack-1of1.json").write_bytes(b"\xff"), "json' is damaged"),
        (change_manifest(quality=None), "it has no 'quality'"),
        (change_manifest(shards=None), "it has no 'shards'"),
        (change_manifest(skipped=[["a"]]), "the list of skipped files is malformed"),
        (change_manifest(skipped=5), "the list of skipped files is malformed"),
        (change_manifest(left_out=[5]), "the count of files left out is malformed"),
        (change_manifest(left_out={".txt": ["a.txt", 1]}), "the count of files left out is malformed"),
        (change_index(names=["a"]), "npz'? is damaged"),
        (change_index(names=[["a"]] * 8), "npz'? is damaged"),
        (change_index(names=3), "npz'? is damaged"),
        (change_index(skipped=[[1, 2]]), "npz'? is damaged"),
        (change_index(videos_done="8"), "npz'? is damaged"),
        (change_index(lengths=np.zeros(8, np.int32)), "npz'? is damaged"),
        (change_index(lengths=np.full(8, 6.0)), "npz'? is damaged"),
        (change_index(lengths=np.array(["6"] * 8)), "npz'? is damaged"),
        (change_index(lengths=np.array([{}], object)), "npz'? is damaged"),
        (change_index(blocks=np.full(48, 2**32 - 1, np.uint32)), "npz'? is damaged"),
        (change_index(sizes=np.full(48, -1, np.int32)), "npz'? is damaged"),
    ],
)
def test_check_reports_the_damage(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    out = packed(write_folders(tmp_path / "frames", [6] * 8), tmp_path / "packed")
    damage(out / "frames-1of1-000000.tar")
    with pytest.raises(InputError, match=message):
        check(out)
    if "frame 0" not in message:
        # Opening the set also detects all damage that shows without reading the frames.
        with pytest.raises(InputError, match=message):
            open_source(out)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        # With a memory map, SIGBUS would kill the process here.
        (lambda shard: os.truncate(shard, 100), r"^frames-1of1-000000\.tar is truncated"),
        (flip_bit(1000), r"^checksum mismatch in frames-1of1-000000\.tar"),
    ],
)
def test_damage_after_opening_is_an_unreadable_frame(
    tmp_path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    index = open_source(packed(write_folders(tmp_path / "frames", [6] * 12), tmp_path / "packed"))
    shard = tmp_path / "packed" / "frames-1of1-000000.tar"
    damage(shard)
    with pytest.raises(UnreadableFrameError, match=reason):
        index.read(0, [0, 3])
    index.read(11, [0, 3])


# --- the command ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frames"], "DESTINATION is missing"),
        (["nowhere", "out"], "does not exist"),
        (["empty", "out"], r"contains no readable video\. Pass a SOURCE"),
        (["texts", "out"], r"no readable video \(files left out: 1, of which 1 \.txt \(first a\.txt\)\)\."),
        (["frames", "frames/class_0/video_0/00000.jpg"], "file exists; use another path"),
        (["frames", "frames/class_0/video_0/00000.jpg/x"], "not a directory; use another path"),
        (["broken", "out"], r"contains no readable video \(2 skipped, first a\.mp4: "),
        (["--check", "frames"], "is not a packed set"),
        (["--check", "nowhere"], "is not a packed set"),
        pytest.param(
            ["frames", "out", "--decoder=gpu"],
            "--decoder gpu requires a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="requires a machine without a GPU"),
        ),
        (["frames", "out", "--quality=101"], "--quality 101: expected at most 100"),
        (["frames", "out", "--frames=-1"], "--frames -1: expected at least 0"),
    ],
)
def test_bad_input_gives_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write_folders(tmp_path / "frames", [3])
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.mp4").write_bytes(b"no video")
    (tmp_path / "broken" / "b.mp4").symlink_to("nowhere")
    assert command(*(word if word.startswith("--") else tmp_path / word for word in arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_the_command_packs_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folders(tmp_path / "frames", [3, 4])
    # A path that resembles rich markup must be printed unchanged.
    out = tmp_path / "out[" / "b]"
    assert command(tmp_path / "frames", out, "--workers", 2) == 0
    assert command("--check", out) == 0
    assert command(tmp_path / "frames", out) == 0
    printed = capsys.readouterr().out
    assert "frames: 7, shard files: 1, size: " in printed
    assert "all 7 frames are intact" in printed
    assert f"'{out}' is already packed" in printed


# --- packing with NVDEC ---


def test_the_clip_decoder_on_the_cpu(tmp_path: Path) -> None:
    """The graph for NVDEC is tested with VP9, which DALI can also decode on the CPU."""
    frames = [picture(0, t, 130, 160) for t in range(20)]
    video = probe_video(encode_video(tmp_path / "x.webm", frames, "libvpx-vp9", g=6, b=4_000_000))
    wanted = [0, 5, 6, 17, 19]
    decoder = ClipDecoder(torch.device("cpu"))
    for _ in range(2):
        got = decoder.decode(*cut_clip(video, wanted), short_side=65)
        assert got.shape == (5, 65, 80, 3)
        for frame, truth in zip(got, read_video_frames(video, wanted), strict=True):
            small = Image.fromarray(truth).resize((80, 65), Image.Resampling.BICUBIC)
            assert np.abs(frame.astype(int) - np.asarray(small)).mean() < 2


@pytest.mark.gpu
@pytest.mark.skipif(not has_nvdec(), reason="requires NVDEC (libnvcuvid.so.1)")
def test_packing_with_nvdec_agrees_with_pyav(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    encode_video(tmp_path / "videos" / "x.mp4", [picture(0, t, 384, 640) for t in range(80)])
    gpu = open_source(packed(tmp_path / "videos", tmp_path / "gpu", decoder="nvdec", quality=95))
    cpu = open_source(packed(tmp_path / "videos", tmp_path / "cpu", decoder="pyav", quality=95))
    assert gpu.fingerprint() == cpu.fingerprint()
    for frame in range(80):
        assert np.abs(gpu.read_frame(0, frame).astype(int) - cpu.read_frame(0, frame)).mean() < 4


def test_a_disk_error_ends_packing_instead_of_skipping_the_file(tmp_path: Path) -> None:
    """Otherwise the file would be missing even after the disk has been repaired."""
    root = write_folders(tmp_path / "frames", [3])
    frame = root / "class_0" / "video_0" / "00001.jpg"
    frame.unlink()
    # Reading its first page fails with EIO.
    frame.symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error") as raised:
        packed(root, tmp_path / "packed")
    assert raised.value.filename == str(frame)
    frame.unlink()
    Image.fromarray(picture(0, 1)).save(frame)
    assert open_source(packed(root, tmp_path / "packed")).num_frames.tolist() == [3]


def test_damage_that_ffmpeg_reports_as_a_disk_error_is_skipped(tmp_path: Path) -> None:
    """FFmpeg has the error EIO for a Matroska file that ends in its header."""
    root = tmp_path / "videos"
    root.mkdir()
    for name in ("intact.mkv", "truncated.mkv"):
        encode_video(root / name, [picture(0, t) for t in range(3)])
    os.truncate(root / "truncated.mkv", 200)
    index = open_source(packed(root, tmp_path / "packed"))
    assert index.names == ["intact.mkv"]
    assert index.skipped == [("truncated.mkv", "input/output error")]


def test_a_compressed_index_is_refused(tmp_path: Path) -> None:
    """It could fill the memory."""
    root = packed(write_folders(tmp_path / "frames", [3]), tmp_path / "packed")
    path = next(root.glob("*.npz"))
    with np.load(path) as content:
        np.savez_compressed(path, **dict(content))
    with pytest.raises(InputError, match="is damaged"):
        open_source(root)


def test_a_frame_that_jpeg_cannot_hold_is_unreadable() -> None:
    frame = np.zeros((16, 70_000, 3), np.uint8)
    with pytest.raises(UnreadableFrameError, match="cannot be stored as JPEG"):
        encode_jpeg(frame, PackOptions(short_side=256))
