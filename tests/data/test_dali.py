"""The DALI graph of the GPU, run on the CPU's operators against Pillow; and on a GPU where there is one."""

import dataclasses
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import encode_video, make_loader, make_recipe, make_sampling, picture, write_folders
from test_loader import levels, reference_pairs

from fasttrain.data import FrameIndex, open_source
from fasttrain.data.dali import (
    ClipCorrection,
    GpuStage,
    InFlightBuffers,
    new_pipeline,
    pair_graph,
)
from fasttrain.data.index import VideoIndex
from fasttrain.data.nvdec import has_nvdec, rgb_correction
from fasttrain.data.sampling import PARAMETERS, SampleParameters
from fasttrain.errors import InputError

SIZE = 40
needs_nvdec = pytest.mark.skipif(not has_nvdec(), reason="needs NVDEC (libnvcuvid.so.1)")
PAIRS = 3


def make_stage(
    index: FrameIndex, storage: str | None = None, depth: int = 1, **video_changes: Any
) -> GpuStage:
    """For clips, as if all videos had these `video_changes`."""
    clips = [dataclasses.replace(video, **video_changes) for video in getattr(index, "videos", [])]
    recipe = make_recipe(batch_size=PAIRS, image_size=SIZE)
    storage = storage or index.storage
    return GpuStage(recipe, storage, torch.device("cpu"), videos=clips, num_threads=2, depth=depth)


def drawn(index: FrameIndex, number: int, clips: bool = False) -> tuple[list, SampleParameters]:
    parameters = make_sampling(pairs_per_video=8).draw(
        index.num_frames, np.zeros(PAIRS, dtype=int), np.arange(PAIRS) * 7 + number
    )
    read = index.read_clip if clips else index.read
    return [read(int(row["video"]), row["frames"]) for row in parameters], parameters


def check_against_pillow(index: FrameIndex, stage: GpuStage, *, clips: bool = False, turns: int = 0) -> None:
    sampling = make_sampling(pairs_per_video=8)
    for number in range(2):
        pairs, parameters = drawn(index, number, clips)
        stage.submit(pairs, parameters)
        got = stage.collect()
        assert got.shape == (2, PAIRS, 3, SIZE, SIZE)
        epochs = np.zeros(PAIRS, dtype=int)
        expected = reference_pairs(index, sampling, epochs, parameters["sample"], SIZE, turns)
        assert np.abs(levels(got) - expected).mean() < 2


def test_the_graph_on_images(tmp_path: Path) -> None:
    index = open_source(write_folders(tmp_path, [20, 9, 30]))
    check_against_pillow(index, make_stage(index))


def test_the_graph_on_real_images(shared: Path) -> None:
    index = open_source(shared / "davis" / "JPEGImages" / "480p")
    check_against_pillow(index, make_stage(index))


def test_the_graph_on_raw_frames(shared: Path) -> None:
    index = open_source(shared / "videos")
    check_against_pillow(index, make_stage(index))


def vp9_videos(folder: Path) -> VideoIndex:
    """VP9 is what DALI decodes on a CPU too."""
    for video in range(3):
        encode_video(
            folder / f"{video}.webm",
            [picture(video, t, 130, 160) for t in range(24)],
            "libvpx-vp9",
            g=6,
            b=4_000_000,
        )
    return open_source(folder)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_the_graph_on_clips_turns_them_upright(tmp_path: Path, turns: int) -> None:
    index = vp9_videos(tmp_path)
    stage = make_stage(index, "clips", quarter_turns=turns)
    check_against_pillow(index, stage, clips=True, turns=turns)


def test_each_clip_gets_the_matrix_of_its_stream(tmp_path: Path) -> None:
    """What BT.601 made of a colour becomes what its own matrix makes of it."""
    index = vp9_videos(tmp_path)
    matrices = ["bt709", "bt601", "bt2020"]
    videos = [dataclasses.replace(v, matrix=m) for v, m in zip(index.videos, matrices, strict=True)]
    parameters = np.zeros(3, PARAMETERS)
    parameters["video"] = [2, 1, 0]
    frames = torch.rand(2, 3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    before = levels(frames)
    ClipCorrection(videos, torch.device("cpu")).apply(frames, parameters)
    for row, video in enumerate(parameters["video"]):
        correction = rgb_correction(matrices[video])
        expected = np.einsum("ij,vjhw->vihw", correction, before[:, row]).clip(0, 255)
        np.testing.assert_allclose(levels(frames)[:, row], expected, atol=0.01)
        # A grey has no colour to change.
        np.testing.assert_allclose(correction.sum(axis=1), 1, atol=1e-12)
    assert np.abs(levels(frames) - before).max() > 5


@pytest.mark.parametrize(
    ("storage", "decoder"), [("images", "cpu"), ("images", "mixed"), ("frames", "cpu"), ("clips", "mixed")]
)
def test_the_graph_for_a_gpu_ends_on_it(storage: str, decoder: str) -> None:
    """DALI checks operators and devices when a graph is defined, which takes no GPU."""
    gpu = torch.device("cuda", 0)
    with new_pipeline(device=gpu, batch_size=2, num_threads=1, depth=1):
        node = pair_graph(make_recipe(decoder=decoder, precision="bf16"), storage, gpu)
    assert node.device == "gpu"


def test_a_clip_that_does_not_decode_spoils_no_other_batch(tmp_path: Path) -> None:
    index = vp9_videos(tmp_path)
    stage = make_stage(index, "clips", depth=2)
    good, parameters = drawn(index, 0, clips=True)
    bad = [[np.zeros(500, dtype=np.uint8), good[0][1]], *good[1:]]
    stage.submit(bad, parameters)
    stage.submit(good, parameters)
    with pytest.raises(RuntimeError):
        stage.collect()
    stage.submit(good, parameters)
    first, second = stage.collect(), stage.collect()
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    past_the_end = [[good[0][0], good[0][1] + 100], *good[1:]]
    stage.submit(past_the_end, parameters)
    with pytest.raises(RuntimeError):
        stage.collect()


class ManualEvent:
    """An event that comes when it is told to, or waited for: then its buffer must still be there."""

    def __init__(self, buffer: weakref.ref) -> None:
        self.buffer = buffer
        self.came = False

    def query(self) -> bool:
        return self.came

    def synchronize(self) -> None:
        assert self.buffer() is not None
        self.came = True


def test_a_buffer_is_kept_until_the_device_has_read_it() -> None:
    class Buffer:
        pass

    in_flight = InFlightBuffers(limit=2)
    buffers = [Buffer() for _ in range(5)]
    alive = [weakref.ref(buffer) for buffer in buffers]
    events = [ManualEvent(buffer) for buffer in alive]

    def keep(number: int) -> list[bool]:
        in_flight.keep(buffers[number], until=events[number])
        buffers[number] = None
        return [buffer() is not None for buffer in alive]

    assert keep(0)[:1] == [True]
    events[0].came = True
    assert keep(1)[:2] == [False, True]
    assert keep(2)[:3] == [False, True, True]
    assert not any(event.came for event in events[1:])
    # The host is three ahead: it waits for the oldest.
    assert keep(3)[:4] == [False, False, True, True]
    assert [event.came for event in events] == [True, True, False, False, False]
    keep(4)
    in_flight.wait()
    assert all(event.came for event in events)
    assert not any(buffer() for buffer in alive)


def test_a_gpu_decoder_needs_a_gpu(tmp_path: Path) -> None:
    index = open_source(write_folders(tmp_path, [4, 4]))
    with pytest.raises(InputError, match=r"data\.decoder=mixed needs a GPU"):
        make_loader(index, decoder="mixed")


def read_all(index: FrameIndex, **changes: Any) -> list[torch.Tensor]:
    loader = make_loader(
        index, **{"pairs_per_video": 8, "image_size": 96, "batch_size": 4, "num_steps": 4} | changes
    )
    batches = list(loader)
    loader.close()
    assert not any(pairs.bad_samples for pairs in batches)
    return [pairs.frames for pairs in batches]


def check_gpu_against_cpu(index: FrameIndex, decoder: str, precision: str, tolerance: float) -> None:
    on_gpu = read_all(index, device="cuda", decoder=decoder, precision=precision)
    assert all(frames.device.type == "cuda" for frames in on_gpu)
    for got, expected in zip(on_gpu, read_all(index), strict=True):
        assert np.abs(levels(got.float().cpu()) - levels(expected)).mean() < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["cpu", "mixed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_on_the_gpu_are_those_of_the_cpu(tmp_path: Path, decoder: str, precision: str) -> None:
    check_gpu_against_cpu(open_source(write_folders(tmp_path, [20, 9, 30])), decoder, precision, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["auto", pytest.param("mixed", marks=needs_nvdec)])
@pytest.mark.parametrize(
    ("codec", "pix_fmt"),
    [("libx264", "yuv420p"), ("libx265", "yuv420p10le"), ("libvpx-vp9", "yuv420p")],
)
def test_videos_on_the_gpu_are_those_of_the_cpu(
    tmp_path: Path, codec: str, pix_fmt: str, decoder: str
) -> None:
    for video in range(3):
        frames = [picture(video, t, 480, 640) for t in range(24)]
        encode_video(tmp_path / f"{video}.mp4", frames, codec, pix_fmt=pix_fmt)
    check_gpu_against_cpu(open_source(tmp_path), decoder, "fp32", 4)


@pytest.mark.gpu
@needs_nvdec
def test_a_real_video_on_the_gpu_is_that_of_the_cpu(shared: Path) -> None:
    check_gpu_against_cpu(open_source(shared / "videos" / "bt709_full_range.mp4"), "mixed", "fp32", 4)


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["cpu", "mixed"])
def test_no_batch_is_overwritten_while_the_device_is_behind(tmp_path: Path, decoder: str) -> None:
    """The copies queue up behind long work, while DALI decodes ahead into what it thinks is free."""
    index = open_source(write_folders(tmp_path, [20, 9, 30]))
    changes = {"pairs_per_video": 8, "image_size": 96, "num_steps": 12}
    expected = read_all(index, batch_size=2, num_steps=12)
    loader = make_loader(index, device="cuda", decoder=decoder, **changes)
    busy = torch.randn(8192, 8192, device="cuda")
    got = []
    for pairs in loader:
        got.append(pairs.frames)
        for _ in range(10):
            busy = (busy @ busy).tanh()
    loader.close()
    for frames, truth in zip(got, expected, strict=True):
        assert np.abs(levels(frames.cpu()) - levels(truth)).mean() < 2


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["cpu", "mixed"])
def test_a_damaged_frame_is_replaced_on_the_gpu(tmp_path: Path, decoder: str) -> None:
    root = write_folders(tmp_path, [8] * 6)
    for path in (root / "class_0" / "video_0").iterdir():
        path.write_bytes(b"no image")
    loader = make_loader(open_source(root), device="cuda", decoder=decoder, num_steps=3)
    batches = list(loader)
    loader.close()
    assert len(batches) == 3
    assert {bad.name for pairs in batches for bad in pairs.bad_samples} == {"class_0/video_0"}
