"""The loader: pixels, order over ranks and resumption. Faults are in test_faults.py."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import encode_video, make_loader, make_sampling, picture, write_folders

from fasttrain.data import FrameIndex, open_source
from fasttrain.data.images import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.data.sampling import pixel_box
from fasttrain.errors import InputError


def samples_of(index: FrameIndex, **changes) -> list[np.ndarray]:
    """The sample ids that a loader yields, one array per micro-batch."""
    loader = make_loader(index, **changes)
    ids = [pairs.samples for pairs in loader]
    loader.close()
    return ids


def reference_pairs(index: FrameIndex, sampling, epochs, samples, size: int) -> np.ndarray:
    """Pillow all the way: decode, crop, resize bicubically, flip; (2, B, 3, size, size) levels 0..255."""
    draws = sampling.draw(index.num_frames, epochs, samples)
    out = np.empty((2, len(samples), 3, size, size))
    for b in range(len(samples)):
        for view in range(2):
            frame = Image.fromarray(index.read_frame(int(draws.videos[b]), int(draws.frames[b, view])))
            top, left, bottom, right = pixel_box(draws.boxes[b], frame.height, frame.width)
            crop = frame.crop((left, top, right, bottom)).resize((size, size), Image.Resampling.BICUBIC)
            levels = np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws.flips[b] else crop)
            out[view, b] = levels.transpose(2, 0, 1)
    return out


def levels(frames: torch.Tensor) -> np.ndarray:
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return ((frames * std + mean) * 255).numpy()


def check_pixels(index: FrameIndex, size: int) -> None:
    sampling = make_sampling(pairs_per_video=8)
    loader = make_loader(index, sampling, image_size=size, batch_size=4, num_steps=2)
    for number, pairs in enumerate(loader):
        assert pairs.frames.shape == (2, 4, 3, size, size)
        assert pairs.frames.dtype == torch.float32
        epochs, samples = sampling.order(np.arange(4 * number, 4 * number + 4), len(index) * 8)
        np.testing.assert_array_equal(pairs.samples, samples)
        np.testing.assert_array_equal(pairs.videos, samples // 8)
        expected = reference_pairs(index, sampling, epochs, samples, size)
        difference = np.abs(levels(pairs.frames) - expected)
        assert difference.mean() < 0.5
        assert difference.max() < 3
    loader.close()


def test_frames_are_what_pillow_makes_of_them(tmp_path: Path) -> None:
    check_pixels(open_source(write_folders(tmp_path, [20, 9, 30])), size=40)


def test_real_frames_are_what_pillow_makes_of_them(shared: Path) -> None:
    check_pixels(open_source(shared / "davis" / "JPEGImages" / "480p"), size=224)


def test_real_videos_are_what_pyav_and_pillow_make_of_them(shared: Path) -> None:
    check_pixels(open_source(shared / "videos"), size=96)


def test_both_frames_of_a_pair_have_the_same_crop_and_flip(tmp_path: Path) -> None:
    folder = tmp_path / "still"
    folder.mkdir()
    for frame in range(20):
        Image.fromarray(picture(0, 0, 200, 300)).save(folder / f"{frame:03d}.png")
    loader = make_loader(open_source(tmp_path), make_sampling(pairs_per_video=64), batch_size=32)
    for pairs in loader:
        torch.testing.assert_close(pairs.frames[0], pairs.frames[1], rtol=0, atol=0)
        assert len({image.numpy().tobytes() for image in pairs.frames[0]}) == 32
    loader.close()


@pytest.mark.parametrize(("world", "batch", "accumulate"), [(1, 6, 1), (2, 3, 1), (3, 1, 2), (1, 2, 3)])
def test_every_split_of_a_global_batch_sees_the_same_steps(
    tmp_path: Path, world: int, batch: int, accumulate: int
) -> None:
    index = open_source(write_folders(tmp_path, [3] * 13))
    sampling = make_sampling(pairs_per_video=2)
    # 26 samples in steps of 6: the epochs' borders fall inside steps.
    steps = [
        np.concatenate(
            [
                ids
                for rank in range(world)
                for ids in samples_of(
                    index,
                    sampling=sampling,
                    batch_size=batch,
                    accumulate=accumulate,
                    world_size=world,
                    rank=rank,
                    first_step=step,
                    num_steps=1,
                )
            ]
        )
        for step in range(13)
    ]
    stream = sampling.order(np.arange(78), 26)[1].reshape(13, 6)
    for step, ids in enumerate(steps):
        assert sorted(ids) == sorted(stream[step])
    everything = np.concatenate(steps)
    assert np.bincount(everything, minlength=26).tolist() == [3] * 26


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


def test_resuming_is_a_matter_of_the_step(tmp_path: Path) -> None:
    index = open_source(write_folders(tmp_path, [6] * 8))
    whole = samples_of(index, batch_size=3, accumulate=2, num_steps=6)
    rest = samples_of(index, batch_size=3, accumulate=2, first_step=4, num_steps=2)
    np.testing.assert_array_equal(whole[8:], rest)


def test_batches_stay_as_they_are_when_more_are_drawn(tmp_path: Path) -> None:
    loader = make_loader(open_source(write_folders(tmp_path, [6] * 8)), num_steps=12)
    kept = [(pairs.frames, pairs.frames.clone()) for pairs in loader]
    loader.close()
    for frames, copy in kept:
        torch.testing.assert_close(frames, copy, rtol=0, atol=0)


def test_the_samples_of_a_step_are_those_of_all_ranks(tmp_path: Path) -> None:
    index = open_source(write_folders(tmp_path, [6] * 8))
    loader = make_loader(index, batch_size=2, accumulate=2, world_size=2)
    ids, names = loader.samples_of_step(5)
    loader.close()
    seen = [
        samples_of(index, batch_size=2, accumulate=2, world_size=2, rank=rank, first_step=5, num_steps=1)
        for rank in range(2)
    ]
    assert sorted(ids) == sorted(np.concatenate([np.concatenate(part) for part in seen]))
    assert names == [index.names[i] for i in ids]


def test_no_steps_are_no_batches(tmp_path: Path) -> None:
    assert samples_of(open_source(write_folders(tmp_path, [6] * 8)), num_steps=0) == []


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    index = open_source(write_folders(tmp_path, [6] * 3))
    with pytest.raises(InputError, match="global batch of 4 pairs is larger than the data"):
        make_loader(index, batch_size=2, world_size=2)


def test_a_video_of_one_frame_is_a_pair_of_it(tmp_path: Path) -> None:
    loader = make_loader(open_source(write_folders(tmp_path, [1, 1])))
    for pairs in loader:
        torch.testing.assert_close(pairs.frames[0], pairs.frames[1], rtol=0, atol=0)
    assert loader.faults == []
    loader.close()


def test_a_folder_of_short_videos(tmp_path: Path) -> None:
    for video in range(3):
        encode_video(tmp_path / f"{video}.mp4", [picture(video, t) for t in range(8)])
    check_pixels(open_source(tmp_path), size=32)
