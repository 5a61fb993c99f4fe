"""The DALI graph for GPUs: compared with Pillow on the CPU, and with the CPU loader on a GPU if available."""

import dataclasses
import re
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline, backend
from PIL import Image
from synthetic import (
    encode_video,
    encoded,
    make_loader,
    make_recipe,
    make_sampling,
    odd_frames,
    picture,
    remux,
    write_folders,
)
from test_loader import levels, reference_pairs

from fasttrain.data.dali import GpuStage, Graph, clip_graph, pair_graph
from fasttrain.data.index import ClipIndex, FrameIndex, VideoIndex
from fasttrain.data.loader import FramePairs
from fasttrain.data.nvdec import has_nvdec, rgb_correction
from fasttrain.data.sampling import SampleParameters, pixel_box
from fasttrain.data.sources import open_source
from fasttrain.data.torch_stage import TorchGpuStage
from fasttrain.errors import InputError

CPU = torch.device("cpu")
SIZE = 40
needs_nvdec = pytest.mark.skipif(not has_nvdec(), reason="requires NVDEC (libnvcuvid.so.1)")
PAIRS = 3


def make_stage(index: FrameIndex, depth: int = 1, frames: int = 2) -> GpuStage:
    recipe = make_recipe(batch_size=PAIRS, image_size=SIZE, frames=frames)
    return GpuStage(recipe, index, CPU, num_threads=2, depth=depth)


def draw(index: FrameIndex, number: int, frames: int = 2) -> tuple[list, SampleParameters]:
    """Draw batch `number`: its stored frames and their parameters."""
    parameters = make_sampling(pairs_per_video=8, frames=frames).draw(
        index.num_frames, np.zeros(PAIRS, dtype=int), np.arange(PAIRS) * 7 + number
    )
    return [index.read(int(row["video"]), row["frames"]) for row in parameters], parameters


def check_against_pillow(
    index: FrameIndex, truth: FrameIndex | None = None, tolerance: float = 0.5, frames: int = 2
) -> None:
    stage = make_stage(index, frames=frames)
    sampling = make_sampling(pairs_per_video=8, frames=frames)
    for number in range(2):
        pairs, parameters = draw(index, number, frames)
        stage.submit(pairs, parameters)
        got = stage.collect()
        assert got.shape == (frames, PAIRS, 3, SIZE, SIZE)
        epochs = np.zeros(PAIRS, dtype=int)
        expected = reference_pairs(truth or index, sampling, epochs, parameters["sample"], SIZE)
        assert np.abs(levels(got) - expected).mean() < tolerance


def test_the_graph_on_images(tmp_path: Path) -> None:
    index = open_source(write_folders(tmp_path, [20, 9, 30]))
    for frames in (2, 3):
        check_against_pillow(index, frames=frames)


@pytest.mark.parametrize("source", ["davis/JPEGImages/480p", "videos"])
def test_the_graph_on_real_images_and_raw_frames(shared: Path, source: str) -> None:
    check_against_pillow(open_source(shared / source))


@pytest.mark.parametrize("stage", ["DALI", "PyTorch"])
def test_pixels_outside_the_crop_do_not_matter(tmp_path: Path, stage: str) -> None:
    """As in the loader on a CPU, the frame is cropped first and then resized."""
    index = open_source(write_folders(tmp_path, [20, 9, 30]))
    _, parameters = draw(index, 0)
    recipe = make_recipe(batch_size=PAIRS, image_size=SIZE)
    rng = np.random.default_rng(0)
    crops = rng.integers(0, 256, (PAIRS, 60, 80, 3), dtype=np.uint8)
    batches = []
    for _ in range(2):
        frames = rng.integers(0, 256, crops.shape, dtype=np.uint8)
        for frame, crop, box in zip(frames, crops, parameters["box"], strict=True):
            top, left, bottom, right = pixel_box(box, 60, 80)
            frame[top:bottom, left:right] = crop[top:bottom, left:right]
        stored = [np.frombuffer(encoded(Image.fromarray(frame), "PNG"), np.uint8) for frame in frames]
        made = make_stage(index) if stage == "DALI" else TorchGpuStage(recipe, CPU, num_threads=1)
        made.submit([[image, image] for image in stored], parameters)
        batches.append(made.collect())
        made.close()
    torch.testing.assert_close(*batches, rtol=0, atol=0)


def vp9_videos(folder: Path) -> VideoIndex:
    """Write three VP9 videos, which DALI can also decode on a CPU."""
    for video in range(3):
        frames = [picture(video, t, 130, 160) for t in range(24)]
        encode_video(folder / f"{video}.webm", frames, "libvpx-vp9", g=6, b=4_000_000)
    return open_source(folder)


def as_clips(index: VideoIndex, matrices: list[str]) -> ClipIndex:
    """Index the videos as clips, as if their streams specified these colour matrices."""
    videos = zip(index.names, index.videos, matrices, strict=True)
    return ClipIndex({name: dataclasses.replace(video, matrix=matrix) for name, video, matrix in videos}, [])


class Recoloured(VideoIndex):
    """A video index that corrects frames decoded as BT.601 to the colour matrix of their video."""

    def read_frame(self, video: int, frame: int) -> np.ndarray:
        correction = rgb_correction(self.videos[video].matrix)
        # The correction must not change greys.
        np.testing.assert_allclose(correction.sum(axis=1), 1, atol=1e-12)
        return np.rint(super().read_frame(video, frame) @ correction.T).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("matrices", [["bt601"] * 3, ["bt709", "bt601", "bt2020"]])
def test_the_graph_on_clips_with_different_matrices(tmp_path: Path, matrices: list[str]) -> None:
    clips = as_clips(vp9_videos(tmp_path), matrices)
    truth = Recoloured(dict(zip(clips.names, clips.videos, strict=True)), [])
    for frames in (2, 4):
        check_against_pillow(clips, truth, tolerance=2, frames=frames)


@pytest.mark.parametrize(
    "define",
    [
        *(
            partial(pair_graph, make_recipe(decoder=decoder, precision="bf16"), storage)
            for storage, decoder in [
                ("images", "cpu"),
                ("images", "mixed"),
                ("frames", "cpu"),
                ("clips", "mixed"),
            ]
        ),
        clip_graph,
    ],
)
def test_dali_has_each_operator_of_a_graph_for_a_gpu(define: Callable) -> None:
    """A GPU is only needed to run the graph."""
    pipeline = Pipeline(batch_size=2, num_threads=1, device_id=None, exec_dynamic=True)
    with pipeline:
        output = define(torch.device("cuda", 0))
        pipeline.set_outputs(output)
    assert output.device == "gpu"
    # This has DALI itself check the graph.
    pipeline.serialize()
    registered = {
        "cpu": backend.RegisteredCPUOps(),
        "gpu": backend.RegisteredGPUOps(),
        "mixed": backend.RegisteredMixedOps(),
    }
    on_gpu = set()
    for operator in pipeline._ops:
        spec = operator.spec
        described = re.match(r"OpSpec for (\w+):.*?\n    device: (\w+)\n", str(spec), re.DOTALL)
        assert described
        name, device = described.groups()
        assert name in registered[device]
        if device != "cpu":
            on_gpu.add(name)
        schema = backend.GetSchema(name)
        for i in range(spec.NumInput()):
            given = spec.InputDevice(i)
            # The inputs that come after the regular ones are arguments, which are read on the host.
            on_host = device == "mixed" or i >= spec.NumRegularInput()
            assert given == ("cpu" if on_host else schema.GetInputDevice(i, given, device))
    assert "Resize" in on_gpu


@pytest.mark.parametrize("storage", ["images", "frames"])
def test_dali_keeps_stored_frames_until_it_has_read_them(storage: str) -> None:
    """GpuStage does not keep them itself."""
    graph = Graph(lambda: pair_graph(make_recipe(), storage, CPU), batch_size=2, depth=3)
    box, mirror = np.tile(np.float32([[0, 0], [1, 1]]), (2, 1, 1)), np.zeros(2, dtype=np.int32)
    kept = []
    for batch in range(3):
        frames = [np.full((40, 50, 3), 40 * batch + 20 * frame, dtype=np.uint8) for frame in range(2)]
        if storage == "images":
            frames = [np.frombuffer(bytearray(encoded(Image.fromarray(frame))), np.uint8) for frame in frames]
        kept += [weakref.ref(frame) for frame in frames]
        if batch == 2:
            # The first runs begin with the last batch.
            assert all(frame() is not None for frame in kept)
        graph.submit(stored=frames, box=box, mirror=mirror)
        del frames
    for batch in range(3):
        got = levels(torch.from_dlpack(graph.collect().as_tensor()).float()).mean(axis=(1, 2, 3))
        np.testing.assert_allclose(got, [40 * batch, 40 * batch + 20], atol=1)
    assert all(frame() is None for frame in kept)


def test_an_undecodable_image_does_not_affect_other_batches(tmp_path: Path) -> None:
    index = open_source(write_folders(tmp_path, [20, 9, 30]))
    stage = make_stage(index, depth=3)
    good, parameters = draw(index, 0)
    cut = [[good[0][0][: len(good[0][0]) // 2], good[0][1]], *good[1:]]
    headless = [[good[0][0][:50], good[0][1]], *good[1:]]
    for pairs in (headless, cut, good):
        stage.submit(pairs, parameters)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            stage.collect()
        stage.submit(good, parameters)
    first, second = stage.collect(), stage.collect()
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_file_that_ends_too_early_is_read_as_far_as_its_crop_needs(tmp_path: Path) -> None:
    index = open_source(write_folders(tmp_path, [20, 9, 30]))
    stage = make_stage(index)
    whole = np.frombuffer(encoded(Image.fromarray(picture(0, 0, 400, 300))), np.uint8)
    cut = whole[: len(whole) * 6 // 10]
    _, parameters = draw(index, 0)
    parameters["box"] = 0, 0, 0.4, 1
    batches = []
    for image in (whole, cut):
        stage.submit([[image, image]] * PAIRS, parameters)
        batches.append(stage.collect())
    torch.testing.assert_close(*batches, rtol=0, atol=0)
    parameters["box"] = 0.4, 0, 0.8, 1
    stage.submit([[cut, cut]] * PAIRS, parameters)
    with pytest.raises(RuntimeError):
        stage.collect()


def test_clips_read_single_frames(tmp_path: Path) -> None:
    videos = vp9_videos(tmp_path)
    np.testing.assert_array_equal(as_clips(videos, ["bt601"] * 3).read_frame(1, 7), videos.read_frame(1, 7))


def test_an_undecodable_clip_does_not_affect_other_batches(tmp_path: Path) -> None:
    index = as_clips(vp9_videos(tmp_path), ["bt601"] * 3)
    stage = make_stage(index, depth=2)
    good, parameters = draw(index, 0)
    bad = [[np.zeros(500, dtype=np.uint8), good[0][1]], *good[1:]]
    stage.submit(bad, parameters)
    stage.submit(good, parameters)
    with pytest.raises(RuntimeError):
        stage.collect()
    stage.submit(good, parameters)
    first, second = stage.collect(), stage.collect()
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    beyond_the_end = [[good[0][0], good[0][1] + 100], *good[1:]]
    stage.submit(beyond_the_end, parameters)
    with pytest.raises(RuntimeError):
        stage.collect()


def test_decoding_on_the_gpu_requires_a_gpu(tmp_path: Path) -> None:
    index = open_source(write_folders(tmp_path, [4, 4]))
    with pytest.raises(
        InputError, match=r"data\.decoder: 'mixed' .* the device is cpu\. Set data\.decoder to"
    ):
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
def test_images_agree_between_gpu_and_cpu(tmp_path: Path, decoder: str, precision: str) -> None:
    check_gpu_against_cpu(open_source(write_folders(tmp_path, [20, 9, 30])), decoder, precision, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["cpu", "mixed"])
@pytest.mark.parametrize("form", list(odd_frames()))
def test_unusual_images_agree_between_gpu_and_cpu(tmp_path: Path, decoder: str, form: str) -> None:
    for video in range(4):
        (tmp_path / str(video)).mkdir()
        for number, content in enumerate(odd_frames()[form]):
            (tmp_path / str(video) / f"{number}.jpg").write_bytes(content)
    check_gpu_against_cpu(open_source(tmp_path), decoder, "fp32", 2)


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["auto", pytest.param("mixed", marks=needs_nvdec)])
@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {}),
        ("libx264", {"x264-params": "colormatrix=bt709"}),
        ("libx264", {"x264-params": "colormatrix=bt709:fullrange=on"}),
        ("libx265", {"pix_fmt": "yuv420p10le"}),
        ("libvpx-vp9", {}),
    ],
)
def test_videos_agree_between_gpu_and_cpu(tmp_path: Path, codec: str, options: Any, decoder: str) -> None:
    """Videos of two sizes take turns, for which NVDEC needs different decoders."""
    for video, (height, width) in enumerate([(480, 640), (240, 320), (480, 640), (480, 848)]):
        frames = [picture(video, t, height, width) for t in range(24)]
        encode_video(tmp_path / f"{video}.mp4", frames, codec, **options)
    check_gpu_against_cpu(open_source(tmp_path), decoder, "fp32", 4)


@pytest.mark.gpu
@needs_nvdec
def test_a_damaged_clip_does_not_change_the_others_of_its_batch(tmp_path: Path) -> None:
    """The damaged samples may be replaced, or decoded like a player does."""
    for video in range(3):
        frames = [picture(video, t, 480, 640) for t in range(24)]
        encode_video(tmp_path / f"{video}.mp4", frames)
    index = open_source(tmp_path)

    def read() -> list[FramePairs]:
        changes = {"pairs_per_video": 8, "image_size": 96, "batch_size": 4, "num_steps": 4}
        loader = make_loader(index, device="cuda", decoder="mixed", **changes)
        batches = list(loader)
        loader.close()
        return batches

    before = read()
    remux(
        tmp_path / "1.mp4",
        tmp_path / "new.mp4",
        lambda number, content: content[:40] + bytes(len(content) - 40) if number == 8 else content,
    ).replace(tmp_path / "1.mp4")
    compared = 0
    for old, new in zip(before, read(), strict=True):
        for row in np.flatnonzero((old.samples == new.samples) & (old.samples // 8 != 1)):
            assert torch.equal(old.frames[:, row], new.frames[:, row])
            compared += 1
    assert compared > 4


@pytest.mark.gpu
@needs_nvdec
def test_a_real_video_agrees_between_gpu_and_cpu(shared: Path) -> None:
    check_gpu_against_cpu(open_source(shared / "videos" / "bt709_full_range.mp4"), "mixed", "fp32", 4)


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["cpu", "mixed"])
def test_batches_are_not_overwritten_while_their_copies_are_queued(tmp_path: Path, decoder: str) -> None:
    """The copies are queued behind long kernels, while DALI decodes ahead into buffers it considers free."""
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
        path.write_bytes(b"not an image")
    loader = make_loader(open_source(root), device="cuda", decoder=decoder, num_steps=3)
    batches = list(loader)
    loader.close()
    assert len(batches) == 3
    bad_samples = [bad for pairs in batches for bad in pairs.bad_samples]
    assert {bad.partition(",")[0] for bad in bad_samples} == {"class_0/video_0"}
