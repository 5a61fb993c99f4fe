"""The loader: pixels, order across ranks, resuming, and damaged or unusual data."""

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from synthetic import (
    BROKEN_FRAMES,
    encode_video,
    make_loader,
    make_sampling,
    odd_frames,
    picture,
    write_folders,
)

from fasttrain.data.index import FrameIndex
from fasttrain.data.loader import (
    MAX_ATTEMPTS,
    FramePairs,
    calibration_frames,
    check_bad_fraction,
    decoding_threads,
)
from fasttrain.data.sampling import Ints, PairSampling, pixel_box
from fasttrain.data.sources import open_source
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.normalization import IMAGENET_MEAN, IMAGENET_STD


@pytest.fixture(autouse=True, params=["DALI", "PyTorch"])
def _decode_with(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test with DALI, and as on a machine without it."""
    if request.param == "DALI":
        pytest.importorskip("nvidia.dali")
    else:
        monkeypatch.setattr("fasttrain.data.loader.has_dali", lambda: False)


def samples_of(index: FrameIndex, **changes) -> list[np.ndarray]:
    """Return the sample ids of a loader, one array per micro-batch."""
    loader = make_loader(index, **changes)
    ids = [pairs.samples for pairs in loader]
    loader.close()
    return ids


def reference_pairs(
    index: FrameIndex, sampling: PairSampling, epochs: Ints, samples: Ints, size: int
) -> np.ndarray:
    """Decode, crop, resize and flip with Pillow. Returns levels 0..255, (T, B, 3, size, size)."""
    drawn = sampling.draw(index.num_frames, epochs, samples)
    out = np.empty((sampling.frames, len(samples), 3, size, size))
    for b, row in enumerate(drawn):
        for view, number in enumerate(row["frames"]):
            frame = Image.fromarray(index.read_frame(int(row["video"]), int(number)))
            top, left, bottom, right = pixel_box(row["box"], frame.height, frame.width)
            crop = frame.crop((left, top, right, bottom)).resize((size, size), Image.Resampling.BICUBIC)
            levels = np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if row["flip"] else crop)
            out[view, b] = levels.transpose(2, 0, 1)
    return out


def levels(frames: torch.Tensor) -> np.ndarray:
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return ((frames * std + mean) * 255).numpy()


def check_pixels(index: FrameIndex, size: int, frames: int = 2) -> None:
    sampling = make_sampling(pairs_per_video=8, frames=frames)
    loader = make_loader(index, pairs_per_video=8, image_size=size, batch_size=4, frames=frames)
    for number, pairs in enumerate(loader):
        assert pairs.frames.shape == (frames, 4, 3, size, size)
        assert pairs.frames.dtype == torch.float32
        epochs, samples = sampling.order(np.arange(4 * number, 4 * number + 4), len(index) * 8)
        np.testing.assert_array_equal(pairs.samples, samples)
        expected = reference_pairs(index, sampling, epochs, samples, size)
        difference = np.abs(levels(pairs.frames) - expected)
        assert difference.mean() < 0.5
        assert difference.max() < 3
    loader.close()


def test_frames_agree_with_pillow(tmp_path: Path) -> None:
    check_pixels(open_source(write_folders(tmp_path / "folders", [20, 9, 30])), size=40)
    check_pixels(open_source(write_folders(tmp_path / "four", [20, 1, 7])), size=40, frames=4)
    for video in range(3):
        encode_video(tmp_path / f"{video}.mp4", [picture(video, t) for t in range(8)])
    for frames in (2, 3):
        check_pixels(open_source(tmp_path, kind="videos"), 32, frames)


@pytest.mark.parametrize(("source", "size"), [("davis/JPEGImages/480p", 224), ("videos", 96)])
def test_real_frames_agree_with_pillow(shared: Path, source: str, size: int) -> None:
    if source == "videos":
        pytest.importorskip("av")
    check_pixels(open_source(shared / source), size)


def test_both_frames_of_a_pair_have_the_same_crop_and_flip(tmp_path: Path) -> None:
    folder = tmp_path / "still"
    folder.mkdir()
    for frame in range(20):
        Image.fromarray(picture(0, 0, 200, 300)).save(folder / f"{frame:03d}.png")
    loader = make_loader(open_source(tmp_path), pairs_per_video=64, batch_size=32)
    for pairs in loader:
        torch.testing.assert_close(pairs.frames[0], pairs.frames[1], rtol=0, atol=0)
        assert len({image.numpy().tobytes() for image in pairs.frames[0]}) == 32
    loader.close()


@pytest.mark.parametrize(("world", "batch", "accumulate"), [(1, 6, 1), (2, 3, 1), (3, 1, 2), (1, 2, 3)])
def test_steps_do_not_depend_on_the_split_of_the_global_batch(
    tmp_path: Path, world: int, batch: int, accumulate: int
) -> None:
    index = open_source(write_folders(tmp_path, [3] * 13))
    sampling = make_sampling(pairs_per_video=2)
    # With 26 samples and steps of 6, epochs end within steps.
    options = {"pairs_per_video": 2, "batch_size": batch, "accumulate": accumulate, "world_size": world}
    ranks = [np.stack(samples_of(index, rank=rank, num_steps=13, **options)) for rank in range(world)]
    steps = np.stack(ranks, axis=1).reshape(13, 6)
    stream = sampling.order(np.arange(78), 26)[1].reshape(13, 6)
    np.testing.assert_array_equal(np.sort(steps), np.sort(stream))
    assert np.bincount(steps.flat, minlength=26).tolist() == [3] * 26


def test_a_gpu_leaves_two_cores_to_the_threads_of_training() -> None:
    threads = {}
    for device, cores in [("cpu", 8), ("cuda", 8), ("cuda", 2)]:
        world = replace(World.single(), device=torch.device(device), cores=cores)
        threads[device, cores] = decoding_threads(world)
    assert threads == {("cpu", 8): 8, ("cuda", 8): 6, ("cuda", 2): 1}


def test_the_order_does_not_depend_on_threads_or_prefetch(tmp_path: Path) -> None:
    index = open_source(write_folders(tmp_path, [6] * 8))
    runs = []
    for threads, prefetch in ((1, 1), (4, 3), (2, 100)):
        loader = make_loader(index, num_threads=threads, prefetch=prefetch, batch_size=3, num_steps=7)
        runs.append([(pairs.samples, pairs.frames.clone()) for pairs in loader])
        loader.close()
    for run in runs[1:]:
        for (ids, frames), (first_ids, first_frames) in zip(run, runs[0], strict=True):
            np.testing.assert_array_equal(ids, first_ids)
            torch.testing.assert_close(frames, first_frames, rtol=0, atol=0)


def test_a_resumed_loader_continues_with_the_same_samples(tmp_path: Path) -> None:
    index = open_source(write_folders(tmp_path, [6] * 8))
    uninterrupted = samples_of(index, batch_size=3, accumulate=2, num_steps=6)
    for first in (4, 6):
        rest = samples_of(index, batch_size=3, accumulate=2, first_step_index=first, num_steps=6 - first)
        assert list(map(list, uninterrupted[2 * first :])) == list(map(list, rest))


def test_batches_are_not_overwritten_by_later_ones(tmp_path: Path) -> None:
    loader = make_loader(open_source(write_folders(tmp_path, [6] * 8)), num_steps=12)
    kept = [(pairs.frames, pairs.frames.clone()) for pairs in loader]
    loader.close()
    for frames, copy in kept:
        torch.testing.assert_close(frames, copy, rtol=0, atol=0)


def test_samples_of_step_covers_all_ranks(tmp_path: Path) -> None:
    index = open_source(write_folders(tmp_path, [6] * 8))
    loader = make_loader(index, batch_size=2, accumulate=2, world_size=2)
    ids, names = loader.samples_of_step(5)
    loader.close()
    seen = [
        samples_of(
            index, batch_size=2, accumulate=2, world_size=2, rank=rank, first_step_index=5, num_steps=1
        )
        for rank in range(2)
    ]
    assert sorted(ids) == sorted(np.concatenate([np.concatenate(part) for part in seen]))
    assert names == [index.names[i] for i in ids]


def test_a_global_batch_larger_than_an_epoch_is_an_error(tmp_path: Path) -> None:
    index = open_source(write_folders(tmp_path, [6] * 3))
    message = r"train\.accumulate: .* of 4 pairs \(batch_size .* larger than .*\.pairs_per_video to 2 or more"
    with pytest.raises(InputError, match=message):
        make_loader(index, batch_size=2, world_size=2)


def test_a_video_with_one_frame_gives_two_identical_frames(tmp_path: Path) -> None:
    loader = make_loader(open_source(write_folders(tmp_path, [1, 1])))
    for pairs in loader:
        torch.testing.assert_close(pairs.frames[0], pairs.frames[1], rtol=0, atol=0)
        assert pairs.bad_samples == []
    loader.close()


# --- damaged and unusual data ---

NUM_VIDEOS = 7
PAIRS_PER_VIDEO = 4


def run_ranks(index: FrameIndex, steps: int = 8, frames: int = 2, **changes: Any) -> list[list[FramePairs]]:
    """Return the batches of both ranks, reading the two loaders alternately."""
    options = {"batch_size": 2, "num_steps": steps, "pairs_per_video": PAIRS_PER_VIDEO, "frames": frames}
    options |= changes
    loaders = [make_loader(index, rank=rank, world_size=2, **options) for rank in range(2)]
    # strict=True detects a rank with fewer batches than the other.
    ranks = [list(batches) for batches in zip(*zip(*loaders, strict=True), strict=True)]
    assert [len(batches) for batches in ranks] == [steps, steps]
    for pairs in [*ranks[0], *ranks[1]]:
        assert pairs.frames.shape == (frames, options["batch_size"], 3, 32, 32)
        assert torch.isfinite(pairs.frames).all()
    for loader in loaders:
        loader.close()
    return ranks


def bad_samples(batches: list[FramePairs]) -> list[str]:
    return [bad for pairs in batches for bad in pairs.bad_samples]


def check_replaced(index: FrameIndex, reports: list[str], name: str, reason: str) -> None:
    """Check that all reports concern the video `name`, give this reason, and name a replacement."""
    assert reports
    for report in reports:
        match = re.fullmatch(r"(.+), frame \d+: (.+); replaced with a frame pair from (.+)", report)
        assert match[1] == name
        assert reason in match[2]
        assert match[3] in index.names


@pytest.mark.parametrize("case", BROKEN_FRAMES)
def test_a_damaged_frame_is_replaced_and_reported(tmp_path: Path, case: str) -> None:
    content, suffix, reason = BROKEN_FRAMES[case]
    root = write_folders(tmp_path, [8] * NUM_VIDEOS)
    bad = root / "bad"
    bad.mkdir()
    for frame in range(8):
        (bad / f"{frame}{suffix}").write_bytes(content)
    index = open_source(root)
    first, second = run_ranks(index, frames=3)
    check_replaced(index, bad_samples([*first, *second]), "bad", reason)


def test_reports_do_not_depend_on_threads_or_prefetch(tmp_path: Path) -> None:
    root = write_folders(tmp_path, [8] * NUM_VIDEOS)
    for frame in range(0, 8, 2):
        (root / "class_0" / "video_0" / f"{frame:05d}.jpg").write_bytes(b"not an image")
        (root / "class_1" / "video_1" / f"{frame:05d}.jpg").write_bytes(b"")
    index = open_source(root)
    runs = [run_ranks(index, num_threads=n, prefetch=ahead) for n, ahead in ((1, 1), (3, 4))]
    one, other = ([bad_samples(batches) for batches in ranks] for ranks in runs)
    assert one == other
    reasons = {re.search(": (.*);", bad)[1] for bad in one[0]}
    assert reasons == {"the file is empty", "cannot be decoded: unknown image format"}


def test_a_gif_named_jpg_is_trained_on(shared: Path) -> None:
    index = open_source(shared / "cases" / "gif_in_jpg")
    loader = make_loader(index, pairs_per_video=4, num_steps=2)
    batches = list(loader)
    loader.close()
    assert not bad_samples(batches)


def test_a_damaged_sample_does_not_change_other_samples(tmp_path: Path) -> None:
    root = write_folders(tmp_path, [8] * NUM_VIDEOS)
    index = open_source(root)

    def run() -> list[FramePairs]:
        loader = make_loader(index, pairs_per_video=PAIRS_PER_VIDEO, batch_size=7, num_steps=4)
        pairs = list(loader)
        loader.close()
        return pairs

    before = run()
    for path in (root / "class_0" / "video_2").iterdir():
        path.write_bytes(b"not an image")
    after = run()
    changed = 0
    for old, new in zip(before, after, strict=True):
        same = old.samples == new.samples
        changed += int((~same).sum())
        assert (old.samples[~same] // PAIRS_PER_VIDEO == index.names.index("class_0/video_2")).all()
        torch.testing.assert_close(old.frames[:, same], new.frames[:, same], rtol=0, atol=0)
    assert changed == PAIRS_PER_VIDEO


def test_files_deleted_during_a_run(tmp_path: Path) -> None:
    root = write_folders(tmp_path, [8] * NUM_VIDEOS)
    index = open_source(root)
    loader = make_loader(index, pairs_per_video=PAIRS_PER_VIDEO, num_steps=28, prefetch=1)
    batches = []
    for number, pairs in enumerate(loader):
        batches.append(pairs)
        if number == 2:
            for path in (root / "class_1" / "video_3").iterdir():
                path.unlink()
    loader.close()
    check_replaced(index, bad_samples(batches), "class_1/video_3", "no such file")


def test_videos_damaged_after_indexing(tmp_path: Path) -> None:
    for video in range(NUM_VIDEOS + 1):
        encode_video(tmp_path / f"{video}.mp4", [picture(video, t) for t in range(8)])
    index = open_source(tmp_path)
    damaged = tmp_path / "0.mp4"
    damaged.write_bytes(damaged.read_bytes()[:500])
    (tmp_path / "1.mp4").write_bytes(b"")
    first, second = run_ranks(index)
    reports = bad_samples([*first, *second])
    assert {report.partition(",")[0] for report in reports} == {"0.mp4", "1.mp4"}


@pytest.mark.parametrize("case", odd_frames())
def test_unusual_frames_agree_with_pillow(tmp_path: Path, case: str) -> None:
    stored = odd_frames()[case]
    (tmp_path / case).mkdir()
    for frame, data in enumerate(stored):
        suffix = "png" if b"PNG" in data[:4] else "jpg"
        (tmp_path / case / f"{frame}.{suffix}").write_bytes(data)
    index = open_source(tmp_path)
    full_frame = {"pairs_per_video": 4, "crop_area": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0}
    loader = make_loader(index, image_size=24, batch_size=1, num_steps=1, **full_frame)
    (pairs,) = list(loader)
    loader.close()
    assert pairs.bad_samples == []
    drawn = make_sampling(**full_frame).draw(index.num_frames, np.array([0]), pairs.samples)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for view in range(2):
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(stored[drawn["frames"][0, view]])))
        if case == "png16":
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        expected = image.convert("RGB").resize((24, 24), Image.Resampling.BICUBIC)
        got = (pairs.frames[view, 0].permute(1, 2, 0) * std + mean) * 255
        assert np.abs(got.numpy() - np.asarray(expected)).mean() < 1


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_many_unreadable_samples_in_a_row_are_an_error(tmp_path: Path, content: bytes) -> None:
    root = write_folders(tmp_path, [8] * 2)
    for path in root.rglob("*.jpg"):
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"data.source: {MAX_ATTEMPTS} samples in a row are unreadable"):
        run_ranks(open_source(root), batch_size=1)


def test_a_failure_of_the_gpu_is_not_taken_for_damaged_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages raise RuntimeError for both; afterwards, the GPU answers with an error of its own."""

    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    def fail_to_decode() -> None:
        raise RuntimeError("Error in mixed operator `nvidia.dali.fn.decoders.image`")

    loader = make_loader(open_source(write_folders(tmp_path, [4] * 4)))
    loader.world = World(rank=0, size=1, cores=1, device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    monkeypatch.setattr(loader._stage, "collect", fail_to_decode)
    with pytest.raises(torch.AcceleratorError):
        next(iter(loader))
    loader.close()


def test_calibration_frames_are_whole_frames_of_all_videos(tmp_path: Path) -> None:
    root = write_folders(tmp_path, [6, 1, 40])
    index = open_source(root)
    (root / index.names[0] / "00000.jpg").write_bytes(b"not an image")
    frames = calibration_frames(index, 32)
    assert frames.shape == (2, 15, 3, 32, 32)
    assert torch.equal(frames[1], frames[0].flip(0))
    # 16 of 47 frames, without the first one, which is damaged; the last one is the last of its video.
    last = Image.fromarray(index.read_frame(2, int(index.num_frames[2]) - 1))
    expected = np.asarray(last.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(levels(frames[0, -1]) - expected).max() < 2
    for path in root.rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"none of 16 frames can be read.* Last unreadable frame: \S+: "):
        calibration_frames(index, 32)


def test_the_limit_of_bad_samples_is_a_fraction_of_all_samples() -> None:
    check_bad_fraction(10, 1000, 0.01, "x")
    check_bad_fraction(10, 30, 0.01, "x")
    with pytest.raises(InputError, match=r"11 of 1000 samples .* Last unreadable sample: x"):
        check_bad_fraction(11, 1000, 0.01, "x")
    with pytest.raises(InputError):
        check_bad_fraction(1, 30, 0.0, "x")
