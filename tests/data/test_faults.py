"""Data that is not perfect, on two ranks: it works, or is replaced, counted and named, and nobody waits."""

import io
from collections.abc import Callable
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from synthetic import encode_video, make_loader, make_sampling, picture, write_folders

from fasttrain.data import FrameIndex, PairLoader, check_bad_fraction, open_source
from fasttrain.data.loader import MAX_ATTEMPTS
from fasttrain.errors import InputError

GOOD = 7
PAIRS_PER_VIDEO = 4


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def whole_jpeg() -> bytes:
    return encoded(Image.fromarray(picture(3, 0)), quality=95)


def whole_png() -> bytes:
    return encoded(Image.fromarray(picture(3, 0)), "PNG")


def run_ranks(index: FrameIndex, steps: int = 8, **changes) -> list[PairLoader]:
    """Both ranks batch by batch, as a training step would; returns the loaders, exhausted."""
    sampling = make_sampling(pairs_per_video=PAIRS_PER_VIDEO)
    options = {"batch_size": 2, "num_steps": steps, "world_size": 2, "max_bad_fraction": 1.0} | changes
    ranks = [make_loader(index, sampling, rank=rank, **options) for rank in range(2)]
    batches = 0
    for first, second in zip_longest(*ranks):
        # zip_longest: a rank that fell out of step would give None.
        assert first.frames.shape == second.frames.shape == (2, options["batch_size"], 3, 32, 32)
        assert torch.isfinite(first.frames).all()
        assert torch.isfinite(second.frames).all()
        batches += 1
    assert batches == steps
    for loader in ranks:
        loader.close()
    return ranks


def check_replaced(index: FrameIndex, ranks: list[PairLoader], bad: str, words: str) -> None:
    """The bad video was met, each meeting is named, and what came instead was another."""
    faults = [fault for loader in ranks for fault in loader.faults]
    assert faults
    for fault in faults:
        assert fault.name == bad
        assert words in fault.reason
        assert fault.replaced_by in index.names
        assert "\n" not in str(fault)
        assert bad in str(fault)


def with_thumbnail(jpeg: bytes) -> bytes:
    """With a small whole JPEG in its header, as cameras write it."""
    small = encoded(Image.fromarray(picture(3, 0)).resize((16, 12)))
    segment = b"\xff\xe1" + (len(small) + 2).to_bytes(2, "big") + small
    return jpeg[:2] + segment + jpeg[2:]


BROKEN_FRAMES: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "truncated jpeg": (lambda: whole_jpeg()[:-200], ".jpg", "truncated JPEG"),
    "jpeg cut in its header": (lambda: whole_jpeg()[:30], ".jpg", "truncated JPEG"),
    "truncated jpeg with a thumbnail": (
        lambda: with_thumbnail(whole_jpeg())[:-200],
        ".jpg",
        "truncated JPEG",
    ),
    "empty file": (lambda: b"", ".jpg", "empty"),
    "no image at all": (lambda: b"<html>404 not found</html>", ".jpg", "cannot be decoded"),
    "jpeg with a broken header": (
        lambda: whole_jpeg()[:4] + b"\0" * 300 + whole_jpeg()[304:],
        ".jpg",
        "cannot be decoded",
    ),
    "truncated png": (lambda: whole_png()[:-200], ".png", "truncated PNG"),
    "png with a broken chunk": (
        lambda: whole_png()[:60] + b"\0" * 40 + whole_png()[100:],
        ".png",
        "cannot be decoded",
    ),
}


@pytest.mark.parametrize("case", BROKEN_FRAMES)
def test_a_broken_frame_is_replaced_and_named(tmp_path: Path, case: str) -> None:
    make, suffix, words = BROKEN_FRAMES[case]
    root = write_folders(tmp_path, [8] * GOOD)
    bad = root / "bad"
    bad.mkdir()
    for frame in range(8):
        (bad / f"{frame}{suffix}").write_bytes(make())
    index = open_source(root)
    ranks = run_ranks(index)
    check_replaced(index, ranks, "bad", words)


def test_the_same_faults_whatever_the_threads(tmp_path: Path) -> None:
    root = write_folders(tmp_path, [8] * GOOD)
    for frame in range(0, 8, 2):
        (root / "class_0" / "video_0" / f"{frame:05d}.jpg").write_bytes(b"no image")
        (root / "class_1" / "video_1" / f"{frame:05d}.jpg").write_bytes(b"")
    index = open_source(root)
    runs = [run_ranks(index, num_threads=n, prefetch=ahead) for n, ahead in ((1, 1), (3, 4))]
    assert runs[0][0].faults == runs[1][0].faults
    assert runs[0][1].faults == runs[1][1].faults
    assert {fault.reason for fault in runs[0][0].faults} == {
        "the file is empty",
        "cannot be decoded, the file is damaged",
    }


def test_a_damaged_sample_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    root = write_folders(tmp_path, [8] * GOOD)
    index = open_source(root)
    sampling = make_sampling(pairs_per_video=PAIRS_PER_VIDEO)

    def run() -> list:
        loader = make_loader(index, sampling, batch_size=7, num_steps=4, max_bad_fraction=1.0)
        pairs = list(loader)
        loader.close()
        return pairs

    before = run()
    for path in (root / "class_0" / "video_2").iterdir():
        path.write_bytes(b"no image")
    after = run()
    changed = 0
    for old, new in zip(before, after, strict=True):
        same = old.samples == new.samples
        changed += int((~same).sum())
        assert (old.videos[~same] == index.names.index("class_0/video_2")).all()
        torch.testing.assert_close(old.frames[:, same], new.frames[:, same], rtol=0, atol=0)
    assert changed == PAIRS_PER_VIDEO


def test_files_that_vanish_in_mid_run(tmp_path: Path) -> None:
    root = write_folders(tmp_path, [8] * GOOD)
    index = open_source(root)
    sampling = make_sampling(pairs_per_video=PAIRS_PER_VIDEO)
    loader = make_loader(index, sampling, num_steps=14, prefetch=1, max_bad_fraction=1.0)
    for number, _ in enumerate(loader):
        if number == 2:
            assert loader.drain_faults() == []
            for path in (root / "class_1" / "video_3").iterdir():
                path.unlink()
    check_replaced(index, [loader], "class_1/video_3", "no such file")
    # A replacement is one more sample that was seen.
    assert loader.num_seen == 14 * 2 + len(loader.faults)
    assert loader.drain_faults() == loader.faults
    assert loader.drain_faults() == []
    loader.close()


def test_a_video_that_is_damaged_after_it_was_indexed(tmp_path: Path) -> None:
    for video in range(GOOD + 1):
        encode_video(tmp_path / f"{video}.mp4", [picture(video, t) for t in range(8)])
    index = open_source(tmp_path)
    damaged = tmp_path / "0.mp4"
    damaged.write_bytes(damaged.read_bytes()[:500])
    (tmp_path / "1.mp4").write_bytes(b"")
    ranks = run_ranks(index)
    faults = [fault for loader in ranks for fault in loader.faults]
    assert {fault.name for fault in faults} == {"0.mp4", "1.mp4"}
    assert all(fault.reason for fault in faults)


def deep_png(frame: np.ndarray) -> bytes:
    """16 bits in each colour, which Pillow cannot write."""
    height, width = frame.shape[:2]
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "rgb48be"
    encoder.time_base = Fraction(1, 25)
    image = av.VideoFrame(width, height, "rgb48be")
    rows = np.zeros((height, image.planes[0].line_size), dtype=np.uint8)
    rows[:, : 6 * width] = (frame.astype(">u2") * 257).astype(">u2").view(np.uint8).reshape(height, -1)
    image.planes[0].update(rows.tobytes())
    return b"".join(bytes(packet) for packet in [*encoder.encode(image), *encoder.encode(None)])


def odd_frames() -> dict[str, list[bytes]]:
    """Videos of unusual frames, all of which must work."""
    frames = [Image.fromarray(picture(5, t)) for t in range(8)]
    turned = Image.Exif()
    turned[0x0112] = 6
    grey16 = [np.asarray(frame.convert("L")).astype(np.uint16) * 257 for frame in frames]
    return {
        "grey": [encoded(frame.convert("L")) for frame in frames],
        "cmyk": [encoded(frame.convert("CMYK")) for frame in frames],
        "turned": [encoded(frame, exif=turned) for frame in frames],
        "thumbnail and a tail": [with_thumbnail(encoded(frame)) + bytes(999) for frame in frames],
        "progressive": [encoded(frame, progressive=True) for frame in frames],
        "mixed_sizes": [encoded(frame.resize((40 + 9 * t, 70 - 5 * t))) for t, frame in enumerate(frames)],
        "tiny": [encoded(frame.resize((3, 2))) for frame in frames],
        "png16": [encoded(Image.fromarray(grey), "PNG") for grey in grey16],
        "png48": [deep_png(np.asarray(frame)) for frame in frames],
        "palette": [encoded(frame.convert("P"), "PNG") for frame in frames],
        "alpha": [encoded(frame.convert("RGBA"), "PNG") for frame in frames],
        "grey_alpha": [encoded(frame.convert("LA"), "PNG") for frame in frames],
        "one_bit": [encoded(frame.convert("1"), "PNG") for frame in frames],
        "one_frame": [encoded(frames[0])],
    }


@pytest.mark.parametrize("case", odd_frames())
def test_unusual_frames_work(tmp_path: Path, case: str) -> None:
    """No fault, and the pixels that Pillow shows."""
    stored = odd_frames()[case]
    (tmp_path / case).mkdir()
    for frame, data in enumerate(stored):
        suffix = "png" if b"PNG" in data[:4] else "jpg"
        (tmp_path / case / f"{frame}.{suffix}").write_bytes(data)
    index = open_source(tmp_path)
    ranks = run_ranks(index, steps=1, batch_size=1)
    assert [loader.faults for loader in ranks] == [[], []]
    whole = make_sampling(
        pairs_per_video=PAIRS_PER_VIDEO, crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0
    )
    loader = make_loader(index, whole, image_size=24, batch_size=1, num_steps=1)
    (pairs,) = list(loader)
    loader.close()
    draws = whole.draw(index.num_frames, np.array([0]), pairs.samples)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for view in range(2):
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(stored[draws.frames[0, view]])))
        if case == "png16":
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        expected = image.convert("RGB").resize((24, 24), Image.Resampling.BICUBIC)
        got = (pairs.frames[view, 0].permute(1, 2, 0) * std + mean) * 255
        assert np.abs(got.numpy() - np.asarray(expected)).mean() < 1


def test_the_limit_stops_the_run_with_one_line(tmp_path: Path) -> None:
    root = write_folders(tmp_path, [8] * GOOD)
    for path in (root / "class_0" / "video_0").iterdir():
        path.write_bytes(b"")
    sampling = make_sampling(pairs_per_video=PAIRS_PER_VIDEO)

    def run(limit: float) -> None:
        loader = make_loader(open_source(root), sampling, num_steps=14, max_bad_fraction=limit)
        try:
            assert len(list(loader)) == 14
        finally:
            loader.close()

    with pytest.raises(InputError, match=r"more than data\.max_bad_fraction=0.001 allows") as caught:
        run(0.001)
    assert "class_0/video_0" in str(caught.value)
    assert "\n" not in str(caught.value)
    run(0.02)


def test_the_limit_is_a_share_of_what_was_seen() -> None:
    check_bad_fraction(10, 1000, 0.01, "x")
    check_bad_fraction(10, 30, 0.01, "x")
    check_bad_fraction(1000, 100_000, 0.01, "x")
    with pytest.raises(InputError, match=r"11 of 1000 samples .* the last: x"):
        check_bad_fraction(11, 1000, 0.01, "x")
    with pytest.raises(InputError):
        check_bad_fraction(1, 30, 0.0, "x")


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_nothing_readable_left_stops_the_run(tmp_path: Path, content: bytes) -> None:
    root = write_folders(tmp_path, [8] * 2)
    for path in root.rglob("*.jpg"):
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"{MAX_ATTEMPTS} samples in a row could not be read"):
        run_ranks(open_source(root), batch_size=1, max_bad_fraction=1.0)
