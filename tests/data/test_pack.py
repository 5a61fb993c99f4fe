"""Packing: what is in the shards, going on after a kill, several machines, and damage."""

import argparse
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from rich.console import Console
from synthetic import encode_video, make_loader, picture, write_folders
from test_faults import odd_frames
from test_loader import check_pixels

from fasttrain.data import open_source
from fasttrain.data.dali import ClipDecoder
from fasttrain.data.pack import PackOptions, _alone, add_arguments, check, pack, run
from fasttrain.data.packed import Part, misplaced_shards, read_shard_index
from fasttrain.data.video import cut_clip, has_nvdec, probe_video, read_video_frames
from fasttrain.errors import InputError

WHOLE = Part(1, 1)


def options(**changes) -> PackOptions:
    small = {"frames": 0, "short_side": 256, "quality": 90, "shard_bytes": 20_000, "decoder": "pyav"}
    return PackOptions(**{**small, **changes})


def packed(source: Path, destination: Path, part: Part = WHOLE, workers: int = 2, **changes) -> str:
    """Pack; returns what was printed."""
    console = Console(file=io.StringIO(), width=200)
    pack(
        source,
        destination,
        kind="auto",
        part=part,
        options=options(**changes),
        workers=workers,
        console=console,
    )
    return console.file.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def command(*words: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args(list(words)))


def test_a_packed_set_is_its_source(tmp_path: Path) -> None:
    source = open_source(write_folders(tmp_path / "frames", [9, 4, 12, 1]))
    packed(tmp_path / "frames", tmp_path / "packed", short_side=48)
    index = open_source(tmp_path / "packed")
    assert index.kind == "packed"
    assert index.names == source.names
    assert index.fingerprint() == source.fingerprint()
    for video in range(4):
        for frame in range(int(index.num_frames[video])):
            # JPEG files that fit already are kept byte for byte.
            np.testing.assert_array_equal(index.read(video, [frame])[0], source.read(video, [frame])[0])


def test_any_tar_reader_finds_the_frames(tmp_path: Path) -> None:
    write_folders(tmp_path / "frames", [5] * 12)
    packed(tmp_path / "frames", tmp_path / "packed")
    shards = sorted((tmp_path / "packed").glob("*.tar"))
    assert len(shards) > 2
    members = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}
    assert len(members) == 60
    original = tmp_path / "frames" / "class_1" / "video_3" / "00002.jpg"
    assert members["class_1/video_3/000002.jpg"] == original.read_bytes()


def test_members_stay_inside_the_folder_that_a_tar_is_unpacked_to(tmp_path: Path) -> None:
    write_folders(tmp_path / "frames", [3, 3])
    (tmp_path / "lists").mkdir()
    listing = tmp_path / "lists" / "videos.txt"
    listing.write_text("../frames/class_0/video_0\n../frames/./class_1/video_1\n")
    packed(listing, tmp_path / "packed")
    (shard,) = (tmp_path / "packed").glob("*.tar")
    with tarfile.open(shard) as tar:
        assert {Path(name).parts[:2] for name in tar.getnames()} == {
            ("frames", "class_0"),
            ("frames", "class_1"),
        }
    assert check(tmp_path / "packed", workers=1, console=Console(file=io.StringIO())) == 6
    assert open_source(tmp_path / "packed").fingerprint() == open_source(listing).fingerprint()


def test_training_reads_packed_frames_as_pillow_does(tmp_path: Path) -> None:
    write_folders(tmp_path / "frames", [20, 9, 30])
    packed(tmp_path / "frames", tmp_path / "packed")
    check_pixels(open_source(tmp_path / "packed"), size=40)


def test_packed_and_unpacked_give_the_same_batches(tmp_path: Path) -> None:
    write_folders(tmp_path / "frames", [20, 9, 30])
    packed(tmp_path / "frames", tmp_path / "packed")
    loaders = [make_loader(open_source(tmp_path / name)) for name in ("frames", "packed")]
    for plain, from_shard in zip(*loaders, strict=True):
        torch.testing.assert_close(plain.frames, from_shard.frames, rtol=0, atol=0)
    for loader in loaders:
        loader.close()


def test_videos_are_packed_near_lossless_and_small(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for video in range(3):
        frames = [picture(video, t, 96, 144) for t in range(10)]
        encode_video(tmp_path / "videos" / f"{video}.mp4", frames)
    packed(tmp_path / "videos", tmp_path / "packed", short_side=64, frames=4, quality=95)
    source, index = open_source(tmp_path / "videos"), open_source(tmp_path / "packed")
    assert index.names == source.names
    assert index.num_frames.tolist() == [4, 4, 4]
    for number, frame in enumerate((0, 3, 6, 9)):
        whole = Image.fromarray(source.read_frame(1, frame))
        expected = np.asarray(whole.resize((96, 64), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(index.read_frame(1, number) - expected).mean() < 3


def test_real_videos_are_packed_and_the_bad_one_reported(shared: Path, tmp_path: Path) -> None:
    said = packed(shared / "videos", tmp_path, frames=4, short_side=120)
    assert "corrupted.mp4: packet 30 is damaged" in said
    index = open_source(tmp_path)
    assert index.names == open_source(shared / "videos").names
    assert index.num_frames.tolist() == [4, 4, 4, 4, 4, 3]
    assert [name for name, _ in index.skipped] == ["corrupted.mp4"]


def test_a_jpeg_that_decodes_to_garbage_is_left_out(tmp_path: Path) -> None:
    """Pillow and DALI decode it and say nothing."""
    root = write_folders(tmp_path / "frames", [6])
    path = root / "class_0" / "video_0" / "00002.jpg"
    Image.fromarray(picture(0, 2, 240, 320)).save(path, quality=95)
    data = bytearray(path.read_bytes())
    # Sixteen ones in a row are no Huffman code.
    data[len(data) // 2 : len(data) // 2 + 512] = b"\xff\x00" * 256
    path.write_bytes(data)
    assert np.asarray(Image.open(path)).shape == (240, 320, 3)
    packed(root, tmp_path / "packed")
    index = open_source(tmp_path / "packed")
    assert index.num_frames.tolist() == [5]
    assert index.skipped == [
        ("class_0/video_0/00002.jpg", "damaged JPEG: its coded data is not valid"),
    ]


@pytest.mark.parametrize("case", odd_frames())
def test_unusual_frames_are_packed(tmp_path: Path, case: str) -> None:
    """None is taken for damaged, and any reader shows what is packed: RGB, upright without a tag."""
    stored = odd_frames()[case]
    (tmp_path / "frames" / case).mkdir(parents=True)
    for frame, data in enumerate(stored):
        suffix = "png" if b"PNG" in data[:4] else "jpg"
        (tmp_path / "frames" / case / f"{frame}.{suffix}").write_bytes(data)
    packed(tmp_path / "frames", tmp_path / "packed", quality=98)
    source, index = open_source(tmp_path / "frames"), open_source(tmp_path / "packed")
    assert index.skipped == []
    assert index.num_frames.tolist() == [len(stored)]
    for frame in range(len(stored)):
        with Image.open(io.BytesIO(index.read(0, [frame])[0].tobytes())) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            assert (image.format, image.mode, turned) == ("JPEG", "RGB", False)
        difference = index.read_frame(0, frame).astype(int) - source.read_frame(0, frame)
        # Dithered colours do not survive halved chroma.
        assert np.abs(difference).mean() < (16 if case == "palette" else 4)


def test_bad_frames_are_left_out_and_listed(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "frames", [6, 6])
    (root / "class_0" / "video_0" / "00002.jpg").write_bytes(b"")
    (root / "class_0" / "video_0" / "00004.jpg").write_bytes(b"no image")
    for path in (root / "class_1" / "video_1").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    said = packed(root, tmp_path / "packed")
    index = open_source(tmp_path / "packed")
    assert index.names == ["class_0/video_0"]
    assert index.num_frames.tolist() == [4]
    bad = [name for name, _ in index.skipped]
    assert bad[:2] == ["class_0/video_0/00002.jpg", "class_0/video_0/00004.jpg"]
    assert len(bad) == 8
    assert all(f"{name}: {reason}" in said for name, reason in index.skipped)
    assert check(tmp_path / "packed", workers=1, console=Console(file=io.StringIO())) == 4


@pytest.mark.parametrize("workers", [1, 5])
def test_the_bytes_do_not_depend_on_the_workers(tmp_path: Path, workers: int) -> None:
    write_folders(tmp_path / "frames", [5] * 12, suffix=".png")
    packed(tmp_path / "frames", tmp_path / "one", workers=2)
    packed(tmp_path / "frames", tmp_path / "other", workers=workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


KILLED = """
import io, sys
from pathlib import Path
from rich.console import Console
from fasttrain.data.pack import PackOptions, pack
from fasttrain.data.packed import Part, read_shard_index
pack(Path(sys.argv[1]), Path(sys.argv[2]), kind="auto", part=Part(1, 1), workers=1, console=Console(),
     options=PackOptions(frames=0, short_side=256, quality=90, shard_bytes=20_000, decoder="pyav"))
"""


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source = write_folders(tmp_path / "frames", [12] * 60, suffix=".png")
    # In the first video, so that the run that goes on knows of it from a finished shard alone.
    (source / "class_0" / "video_0" / "00003.png").write_bytes(b"")
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(source), str(killed)])
    third = killed / "frames-1of1-000002.npz"
    deadline = time.monotonic() + 60
    while not third.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert third.exists()
    assert not json.loads((killed / "pack-1of1.json").read_text())["complete"]
    with pytest.raises(InputError, match=r"part 1 of 1 of the packed set .* is not finished"):
        open_source(killed)
    kept = third.stat().st_mtime_ns
    packed(source, killed)
    packed(source, tmp_path / "whole")
    assert third.stat().st_mtime_ns == kept
    assert contents(killed) == contents(tmp_path / "whole")
    assert "already packed" in packed(source, killed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_so_and_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    source = write_folders(tmp_path / "frames", [12] * 100, suffix=".png")
    stopped = tmp_path / "stopped"
    words = ["pack", str(source), str(stopped), "--workers", "1", "--shard-size", "1", "--quality", "100"]
    # What runs in a shell's background is born deaf to SIGINT.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from fasttrain.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (stopped / "frames-1of1-000000.npz").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in said
    assert not json.loads((stopped / "pack-1of1.json").read_text())["complete"]
    command(*words[1:])
    assert open_source(stopped).fingerprint() == open_source(source).fingerprint()


def test_several_machines_share_the_work(tmp_path: Path) -> None:
    source = write_folders(tmp_path / "frames", [3] * 11)
    whole = tmp_path / "packed"
    for number in (3, 1):
        packed(source, whole, Part(number, 3))
    with pytest.raises(InputError, match=r"part 2 of 3 .* --shard 2/3 again"):
        open_source(whole)
    packed(source, whole, Part(2, 3))
    assert open_source(whole).fingerprint() == open_source(source).fingerprint()
    assert check(whole, workers=2, console=Console(file=io.StringIO())) == 33


def test_machines_with_folders_of_their_own(tmp_path: Path) -> None:
    source = write_folders(tmp_path / "frames", [3] * 11)
    for number in (1, 2):
        packed(source, tmp_path / f"machine_{number}", Part(number, 2))
    listing = tmp_path / "parts.txt"
    listing.write_text("# both\nmachine_2\nmachine_1\n")
    index = open_source(listing)
    assert index.kind == "packed"
    assert index.fingerprint() == open_source(source).fingerprint()
    np.testing.assert_array_equal(index.read(7, [1])[0], open_source(source).read(7, [1])[0])
    assert check(listing, workers=2, console=Console(file=io.StringIO())) == 33
    with pytest.raises(InputError, match=r"part 2 of 2 of the packed set .*machine_1 is not finished"):
        open_source(tmp_path / "machine_1")
    listing.write_text("machine_1\nmachine_1/../machine_1\n")
    with pytest.raises(InputError, match=r"part 1 of 2 is in .* and in .*--shard I/N of its own"):
        open_source(listing)
    listing.write_text("machine_1\nframes\n")
    with pytest.raises(InputError, match=r"frames is no packed set"):
        open_source(listing, kind="packed")


def test_parts_of_different_sources_are_no_set(tmp_path: Path) -> None:
    """Else a video would be there twice or not at all, and nobody would say so."""
    first = write_folders(tmp_path / "frames", [3] * 4)
    packed(first, tmp_path / "packed", Part(1, 2))
    packed(write_folders(tmp_path / "grown", [3] * 6), tmp_path / "packed", Part(2, 2))
    with pytest.raises(InputError, match=r"pack-2of2\.json was packed with source=.* from the same files"):
        open_source(tmp_path / "packed")
    packed(first, tmp_path / "other", Part(1, 2))
    packed(first, tmp_path / "other", Part(2, 2), quality=50)
    with pytest.raises(InputError, match=r"was packed with quality=50, part 1 with quality=90"):
        open_source(tmp_path / "other")


def test_other_options_or_another_source_are_refused(tmp_path: Path) -> None:
    source = write_folders(tmp_path / "frames", [3] * 4)
    packed(source, tmp_path / "packed")
    with pytest.raises(InputError, match="was begun with quality=90, now it is 50"):
        packed(source, tmp_path / "packed", quality=50)
    with pytest.raises(InputError, match="was begun with source="):
        packed(write_folders(tmp_path / "more", [3] * 5), tmp_path / "packed")


def test_a_source_that_grew_is_another_source(tmp_path: Path) -> None:
    """A frame more in a folder, another number in a list, another size of a video."""
    source = write_folders(tmp_path / "frames", [4, 4])
    listing = tmp_path / "list.txt"
    listing.write_text("frames/class_0/video_0 3\n")
    video = encode_video(tmp_path / "video.mp4", [picture(0, t) for t in range(4)])
    for number, path in enumerate((source, listing, video)):
        packed(path, tmp_path / f"packed{number}")
        packed(path, tmp_path / f"packed{number}")
    listing.write_text("frames/class_0/video_0 4\n")
    shutil.copy(source / "class_0/video_0/00000.jpg", source / "class_0/video_0/00004.jpg")
    video.write_bytes(video.read_bytes() + b"\0")
    for number, path in enumerate((source, listing, video)):
        with pytest.raises(InputError, match=r"was begun with source=.* names of its files and their sizes"):
            packed(path, tmp_path / f"packed{number}")


def test_shards_that_change_places_are_named(tmp_path: Path) -> None:
    source, out = write_folders(tmp_path / "frames", [6] * 12), tmp_path / "packed"
    packed(source, out)
    last = len(list(out.glob("*.tar"))) - 1
    assert last > 1
    swapped = tmp_path / "swapped"
    shutil.copytree(out, swapped)
    copy_shard(out, 0, swapped, 1)
    copy_shard(out, 1, swapped, 0)
    for place in (0, 1):
        with pytest.raises(InputError, match=rf"00000{place}.tar: not the shard of that number"):
            check(swapped, workers=1, console=Console(file=io.StringIO()))
        copy_shard(out, place, swapped, place)
    # One that is ahead of its place would leave out the videos between.
    copy_shard(out, last, swapped, 0)
    (swapped / "pack-1of1.json").unlink()
    with pytest.raises(InputError, match=r"000000.tar: not the shard of that number"):
        packed(source, swapped)
    # How far one went that cannot be read is not known.
    copy_shard(out, 0, swapped, 0)
    (swapped / "frames-1of1-000000.npz").write_bytes(b"")
    assert misplaced_shards(swapped, WHOLE) == []
    shutil.copy(out / "frames-1of1-000000.tar", out / "frames-1of1-000077.tar")
    with pytest.raises(InputError, match=r"000077.tar: a shard that the set does not have"):
        check(out, workers=1, console=Console(file=io.StringIO()))
    (out / "frames-1of1-000077.tar").unlink()
    # One too many is not taken for work that is done, nor the set for unfinished once it is away.
    copy_shard(out, 0, out, last + 1)
    with pytest.raises(InputError, match="or surplus"):
        check(out, workers=1, console=Console(file=io.StringIO()))
    with pytest.raises(InputError, match=rf"{last + 1:06d}.tar: not the shard of that number"):
        packed(source, out)
    for path in out.glob(f"*-{last + 1:06d}.*"):
        path.unlink()
    assert check(out, workers=1, console=Console(file=io.StringIO())) == 72


def copy_shard(root: Path, number: int, to: Path, place: int) -> None:
    for suffix in (".tar", ".npz"):
        shutil.copy(root / f"frames-1of1-{number:06d}{suffix}", to / f"frames-1of1-{place:06d}{suffix}")


def flip_a_byte(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)


def flip_a_zip_flag(shard: Path) -> None:
    """The first bit that says encrypted, in the archive's directory."""
    index = shard.with_suffix(".npz")
    data = bytearray(index.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] ^= 1
    index.write_bytes(data)


def lose_a_key(shard: Path) -> None:
    manifest = shard.with_name("pack-1of1.json")
    manifest.write_text(manifest.read_text().replace('"shards"', '"shbrds"'))


def edit(**changes: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Write the index again with parts of it changed."""

    def damage(shard: Path) -> None:
        index = read_shard_index(shard.with_suffix(".npz"))
        changed = {name: change(getattr(index, name)) for name, change in changes.items()}
        shard.with_suffix(".npz").write_bytes(dataclasses.replace(index, **changed).to_bytes())

    return damage


EDITS = (
    edit(lengths=lambda lengths: lengths + 1),
    edit(lengths=lambda lengths: lengths.astype(np.int64)),
    edit(lengths=lambda lengths: lengths + np.array([6, -6], dtype=np.int32)),
    edit(lengths=lambda lengths: lengths[:-1]),
    edit(lengths=lambda lengths: np.array(["a"] * len(lengths))),
    edit(blocks=lambda blocks: blocks[:-3]),
    edit(blocks=lambda blocks: blocks[:, None]),
    edit(blocks=lambda blocks: blocks + np.uint32(2**20)),
    edit(crcs=lambda crcs: crcs[:-1]),
    edit(sizes=lambda sizes: -sizes),
    edit(sizes=lambda sizes: sizes.astype(float)),
    edit(names=lambda names: list(range(len(names)))),
    edit(names=lambda names: names[:-1]),
    edit(names=lambda names: names[:1] * len(names)),
    edit(num_bytes=lambda _: "many"),
    edit(videos_done=lambda _: None),
    edit(videos_done=lambda done: done - 1),
)


@pytest.mark.parametrize("damage", EDITS)
def test_an_index_that_contradicts_itself_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    packed(write_folders(tmp_path / "frames", [6] * 2), tmp_path / "packed")
    damage(tmp_path / "packed" / "frames-1of1-000000.tar")
    with pytest.raises(InputError, match=r"frames-1of1-000000.npz is damaged"):
        check(tmp_path / "packed", workers=1, console=Console(file=io.StringIO()))
    with pytest.raises(InputError, match=r"frames-1of1-000000.npz is damaged"):
        open_source(tmp_path / "packed")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_zip_flag, "is damaged"),
        (lose_a_key, "is damaged"),
        (flip_a_byte, "frame 0 of class_0/video_0 is not what was packed"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-600]), "bytes, expected"),
        (lambda shard: shard.unlink(), "No such file"),
        (lambda shard: shard.with_suffix(".npz").unlink(), "or a shard is missing"),
        (lambda shard: shard.with_suffix(".npz").write_text("{}"), "is damaged"),
    ],
)
def test_check_names_the_damage(tmp_path: Path, damage, words: str) -> None:
    packed(write_folders(tmp_path / "frames", [6] * 8), tmp_path / "packed")
    assert check(tmp_path / "packed", workers=1, console=Console(file=io.StringIO())) == 48
    damage(tmp_path / "packed" / "frames-1of1-000000.tar")
    with pytest.raises(InputError, match=words):
        check(tmp_path / "packed", workers=1, console=Console(file=io.StringIO()))


def test_packing_again_fills_a_gap(tmp_path: Path) -> None:
    source = write_folders(tmp_path / "frames", [6] * 12)
    packed(source, tmp_path / "packed")
    whole = contents(tmp_path / "packed")
    for suffix in (".tar", ".npz"):
        (tmp_path / "packed" / "frames-1of1-000001.tar").with_suffix(suffix).unlink()
    with pytest.raises(InputError, match="or a shard is missing"):
        open_source(tmp_path / "packed")
    packed(source, tmp_path / "packed")
    assert contents(tmp_path / "packed") == whole


def spoilt_in_mid_run(tmp_path: Path, spoil: Callable[[Path], object]) -> list[str]:
    """Damage the first shard while a loader runs; returns the reasons of its faults."""
    packed(write_folders(tmp_path / "frames", [6] * 12), tmp_path / "packed")
    shard = tmp_path / "packed" / "frames-1of1-000000.tar"
    inside = set(read_shard_index(shard.with_suffix(".npz")).names)
    index = open_source(tmp_path / "packed")
    assert inside < set(index.names)
    loader = make_loader(index, num_steps=24, prefetch=1, max_bad_fraction=1.0)
    for number, pairs in enumerate(loader):
        assert torch.isfinite(pairs.frames).all()
        if number == 2:
            spoil(shard)
    loader.close()
    assert number == 23
    assert {fault.name for fault in loader.faults} <= inside
    return [fault.reason for fault in loader.faults]


def truncate(shard: Path) -> None:
    with shard.open("r+b") as file:
        file.truncate(100)


def overwrite(shard: Path) -> None:
    with shard.open("r+b") as file:
        file.write(bytes(15_000))


def test_a_shard_that_is_cut_off_in_mid_run_kills_nobody(tmp_path: Path) -> None:
    """A memory map would end the process here, with SIGBUS."""
    reasons = spoilt_in_mid_run(tmp_path, truncate)
    assert reasons
    assert set(reasons) == {"frames-1of1-000000.tar was cut off"}


def test_a_shard_that_is_overwritten_in_mid_run_is_noticed(tmp_path: Path) -> None:
    reasons = spoilt_in_mid_run(tmp_path, overwrite)
    assert reasons
    assert set(reasons) == {"its bytes in frames-1of1-000000.tar are not what was packed"}


def test_a_shard_that_vanishes_in_mid_run_is_still_read(tmp_path: Path) -> None:
    assert spoilt_in_mid_run(tmp_path, Path.unlink) == []


def test_a_pair_takes_two_byte_ranges_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed(write_folders(tmp_path / "frames", [9] * 3), tmp_path / "packed", shard_bytes=2**20)
    index = open_source(tmp_path / "packed")
    read, ranges = os.pread, []

    def counted(file: int, size: int, offset: int) -> bytes:
        ranges.append((size, offset))
        return read(file, size, offset)

    monkeypatch.setattr(os, "pread", counted)
    pair = index.read(2, [3, 7])
    assert [size for size, _ in ranges] == [len(frame) for frame in pair]
    (shard,) = (tmp_path / "packed").glob("*.tar")
    for frame, (size, offset) in zip(pair, ranges, strict=True):
        assert shard.read_bytes()[offset : offset + size] == frame.tobytes()


def test_many_shards_raise_the_limit_of_open_files(tmp_path: Path) -> None:
    packed(write_folders(tmp_path / "frames", [2] * 30), tmp_path / "packed", shard_bytes=1)
    code = (
        "import resource, sys; from fasttrain.data import open_source;"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1];"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (20, hard));"
        "print(len(open_source(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "packed")], capture_output=True, text=True, check=True
    )
    assert done.stdout == "30\n"


def test_a_shard_of_the_wrong_size_is_not_opened(tmp_path: Path) -> None:
    packed(write_folders(tmp_path / "frames", [6] * 8), tmp_path / "packed")
    shard = tmp_path / "packed" / "frames-1of1-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(InputError, match="run `fasttrain pack --check`"):
        open_source(tmp_path / "packed")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["frames"], "pack needs a DESTINATION"),
        (["frames", "out", "--shard", "3/2"], "--shard=3/2 is not I/N"),
        (["frames", "out", "--quality", "101"], "--quality=101 is out of range; expected 1 to 100"),
        (["frames", "out", "--frames", "-1"], "--frames=-1 is out of range"),
        (["nowhere", "out"], "does not exist"),
        (["empty", "out"], "nothing in .* to pack"),
        (["frames", "frames/class_0/video_0/00000.jpg"], "is a file; expected a folder"),
        (["frames", "frames/class_0/video_0/00000.jpg/x"], "cannot be written: not a directory"),
        (["--check", "frames"], "is no packed set"),
        (["--check", "nowhere"], "is no packed set"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path: Path, words: list[str], message: str) -> None:
    write_folders(tmp_path / "frames", [3])
    (tmp_path / "empty").mkdir()
    places = ("frames", "out", "nowhere", "empty")
    words = [str(tmp_path / word) if word.split("/")[0] in places else word for word in words]
    with pytest.raises(InputError, match=message) as caught:
        command(*words)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_packing_on_a_gpu_needs_one(tmp_path: Path) -> None:
    write_folders(tmp_path / "frames", [3])
    with pytest.raises(InputError, match="--decoder=gpu needs a GPU"):
        command(str(tmp_path / "frames"), str(tmp_path / "out"), "--decoder", "gpu")


def test_the_command_packs_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folders(tmp_path / "frames", [3, 4])
    # What closes no markup of rich's, but looks like it.
    out = str(tmp_path / "out[" / "b]")
    command(str(tmp_path / "frames"), out, "--workers", "2")
    command("--check", out)
    command(str(tmp_path / "frames"), out)
    said = capsys.readouterr().out
    assert f"{out} is already packed" in said
    assert "7 frames in 1 shards" in said
    assert "7 frames, each as it was packed" in said


def test_one_process_at_a_time_writes_a_part(tmp_path: Path) -> None:
    source, out = write_folders(tmp_path / "frames", [3, 4]), tmp_path / "out"
    with _alone(out, WHOLE):
        with pytest.raises(InputError, match="another process is packing part 1 of 1 into"):
            packed(source, out)
        assert not list(out.glob("*.tar*"))
        # Another part is another's business.
        packed(source, out, Part(2, 2))
        (out / "pack-2of2.json").unlink()
    packed(source, out)


def test_a_full_disk_is_one_line_and_no_loss(tmp_path: Path) -> None:
    source, out = write_folders(tmp_path / "frames", [12] * 20, suffix=".png"), tmp_path / "out"
    # No file may grow past 30 kB, which looks like a full disk.
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000,) * 2);"
        "from fasttrain.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", code, "pack", str(source), str(out)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{out} cannot be written: file too large" in done.stderr
    command(str(source), str(out))
    assert open_source(out).fingerprint() == open_source(source).fingerprint()


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"no video")
    (tmp_path / "videos" / "b.mp4").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"no video of .* can be read; the first, a\.mp4"):
        packed(tmp_path / "videos", tmp_path / "packed")


def test_the_gpus_clip_decoder_on_the_cpu(tmp_path: Path) -> None:
    """The graph that packs with NVDEC, on VP9, which DALI decodes on the CPU too."""
    frames = [picture(0, t, 130, 160) for t in range(20)]
    path = encode_video(tmp_path / "x.webm", frames, "libvpx-vp9", g=6, b=4_000_000)
    video = probe_video(path)
    wanted = [0, 5, 6, 17, 19]
    decoder = ClipDecoder(torch.device("cpu"))
    for _ in range(2):
        got = decoder.decode(*cut_clip(video, wanted), short_side=65)
        assert got.shape == (5, 65, 80, 3)
        for frame, truth in zip(got, read_video_frames(video, wanted), strict=True):
            small = Image.fromarray(truth).resize((80, 65), Image.Resampling.BICUBIC)
            assert np.abs(frame.astype(int) - np.asarray(small)).mean() < 2


@pytest.mark.gpu
@pytest.mark.skipif(not has_nvdec(), reason="needs NVDEC (libnvcuvid.so.1)")
def test_packing_with_nvdec_agrees_with_pyav(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    encode_video(tmp_path / "videos" / "x.mp4", [picture(0, t, 160, 208) for t in range(80)])
    packed(tmp_path / "videos", tmp_path / "gpu", decoder="nvdec", quality=95)
    packed(tmp_path / "videos", tmp_path / "cpu", decoder="pyav", quality=95)
    gpu, cpu = open_source(tmp_path / "gpu"), open_source(tmp_path / "cpu")
    assert gpu.fingerprint() == cpu.fingerprint()
    for frame in range(80):
        assert np.abs(gpu.read_frame(0, frame).astype(int) - cpu.read_frame(0, frame)).mean() < 4
