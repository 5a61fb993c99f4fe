"""The stages for machines without DALI, compared with those of DALI. test_loader.py also covers them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import encoded, make_loader, make_recipe, picture, write_folders
from test_loader import levels

from fasttrain.data.images import decode_image
from fasttrain.data.index import StoredFrames
from fasttrain.data.loader import index_for_decoder
from fasttrain.data.sampling import SampleParameters, parameters_dtype
from fasttrain.data.sources import open_source
from fasttrain.data.torch_stage import GPU_FRAMES, TorchGpuStage, TorchHostStage, resize_weights
from fasttrain.errors import InputError

# Whole frames, and parts that touch some of their sides or none.
BOXES = [(0, 0, 1, 1), (0.1, 0.2, 0.9, 0.8), (0.33, 0.01, 0.77, 0.99), (0, 0.5, 0.4, 1)]
FRAME_SIZES = [(256, 340), (255, 341), (480, 854), (540, 960), (501, 37), (2, 3), (1, 1)]
CPU = torch.device("cpu")


def make_batch(
    sizes: list[tuple[int, int]] = FRAME_SIZES, times: tuple[int, ...] = (2, 9)
) -> tuple[list[StoredFrames], SampleParameters]:
    """Return noisy frames of each size with each box, with and without a flip."""
    noise = np.random.default_rng(0)
    pairs: list[StoredFrames] = []
    for height, width in sizes:
        frames = [
            picture(1, t, height, width) // 2 + noise.integers(128, size=(height, width, 3)) for t in times
        ]
        images = [Image.fromarray(frame.astype(np.uint8)) for frame in frames]
        pairs += [[np.frombuffer(encoded(image, quality=95), np.uint8) for image in images]] * 2 * len(BOXES)
    parameters = np.zeros(len(pairs), parameters_dtype(len(times)))
    parameters["box"] = BOXES * 2 * len(sizes)
    parameters["flip"] = ([False] * len(BOXES) + [True] * len(BOXES)) * len(sizes)
    return pairs, parameters


def host_stage(size: int = 32) -> TorchHostStage:
    return TorchHostStage(make_recipe(image_size=size), num_threads=2)


def gpu_stage(size: int = 32, device: torch.device = CPU) -> TorchGpuStage:
    return TorchGpuStage(make_recipe(image_size=size), device, num_threads=2)


def run(stage, pairs: list[StoredFrames], parameters: SampleParameters) -> torch.Tensor:
    stage.submit(pairs, parameters)
    batch = stage.collect()
    stage.close()
    return batch


def check_levels(frames: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare two batches rounded to levels. A value between two levels may be rounded differently."""
    difference = np.abs(levels(frames.float().cpu()) - levels(expected.float().cpu()))
    assert difference.max() < 1.01
    assert difference.mean(axis=(2, 3, 4)).max() < 0.1


@pytest.mark.parametrize("size", [32, pytest.param(224, marks=pytest.mark.slow)])
def test_frames_are_those_of_dali(tmp_path: Path, size: int) -> None:
    dali = pytest.importorskip("fasttrain.data.dali")
    pairs, parameters = make_batch(times=(2, 9, 11))
    assert 3 * len(pairs) % GPU_FRAMES  # the last part is smaller than the others
    index = open_source(write_folders(tmp_path, [1]))
    recipe = make_recipe(image_size=size, batch_size=len(pairs), frames=3)
    expected = run(dali.HostStage(recipe, index, num_threads=2, depth=1), pairs, parameters)
    torch.testing.assert_close(run(host_stage(size), pairs, parameters), expected, rtol=0, atol=0)
    expected = run(dali.GpuStage(recipe, index, CPU, num_threads=2, depth=1), pairs, parameters)
    check_levels(run(gpu_stage(size), pairs, parameters), expected)


@pytest.mark.parametrize(("length", "size"), [(340, 224), (100, 224), (224, 224), (900, 32)])
def test_the_weights_are_those_of_bicubic_interpolation(length: int, size: int) -> None:
    (weights,) = resize_weights(np.array([length]), size, CPU)
    identity = torch.eye(length)[None, None]
    (expected,) = torch.nn.functional.interpolate(
        identity, size=(size, length), mode="bicubic", antialias=True
    )[0]
    # PyTorch leaves out the pixels beyond the ends of the side instead of repeating the last ones.
    inner = slice(3, -3)
    torch.testing.assert_close(weights[inner], expected[inner], rtol=0, atol=1e-4)
    torch.testing.assert_close(weights.sum(1), torch.ones(size))


@pytest.mark.parametrize("make_stage", [host_stage, gpu_stage])
def test_frames_that_are_already_decoded(make_stage: Callable) -> None:
    pairs, parameters = make_batch([(40, 50), (51, 39)])
    decoded = [[decode_image(stored) for stored in pair] for pair in pairs]
    expected = run(make_stage(), pairs, parameters)
    torch.testing.assert_close(run(make_stage(), decoded, parameters), expected, rtol=0, atol=0)


@pytest.mark.parametrize("make_stage", [host_stage, gpu_stage])
def test_an_undecodable_frame_does_not_affect_other_batches(make_stage: Callable) -> None:
    pairs, parameters = make_batch([(40, 50), (51, 39)])
    bad = [[np.zeros(500, dtype=np.uint8), pairs[0][1]], *pairs[1:]]
    stage = make_stage()
    for batch in (pairs, bad, pairs):
        stage.submit(batch, parameters)
    first = stage.collect()
    kept = first.clone()
    with pytest.raises(RuntimeError, match="unknown image format"):
        stage.collect()
    torch.testing.assert_close(stage.collect(), kept, rtol=0, atol=0)
    torch.testing.assert_close(first, kept, rtol=0, atol=0)
    # Batches that are never collected do not keep the threads alive.
    stage.submit(bad, parameters)
    stage.close()


def test_decoding_on_the_gpu_requires_dali(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttrain.data.loader.has_dali", lambda: False)
    index = open_source(write_folders(tmp_path, [1]))
    with pytest.raises(
        InputError, match=r"data\.decoder: 'mixed' needs DALI, .* Set data\.decoder to cpu .*cuda12"
    ):
        index_for_decoder(index, "mixed", torch.device("cuda"))


@pytest.mark.gpu
def test_frames_agree_between_gpu_and_cpu() -> None:
    pairs, parameters = make_batch()
    on_gpu = run(gpu_stage(224, torch.device("cuda", 0)), pairs, parameters)
    assert on_gpu.device.type == "cuda"
    check_levels(on_gpu, run(gpu_stage(224), pairs, parameters))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batches_are_not_overwritten_while_a_training_step_is_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """The steps read their batches long after the host has dropped them and later batches are loaded."""
    monkeypatch.setattr("fasttrain.data.loader.has_dali", lambda: False)
    index = open_source(write_folders(tmp_path, [20, 9, 30]))
    sums, expected = [], []
    for busy, results in ((False, expected), (True, sums)):
        loader = make_loader(
            index, device="cuda", precision=precision, pairs_per_video=8, image_size=96, num_steps=12
        )
        work = torch.randn(8192, 8192, device="cuda")
        for pairs in loader:
            for _ in range(10 if busy else 0):
                work = (work @ work).tanh()
            results.append(pairs.frames.double().sum(dim=(0, 2, 3, 4)))
        loader.close()
    torch.testing.assert_close(torch.stack(sums), torch.stack(expected), rtol=0, atol=0)


@pytest.mark.gpu
def test_a_damaged_frame_is_replaced_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttrain.data.loader.has_dali", lambda: False)
    root = write_folders(tmp_path, [8] * 6)
    for path in (root / "class_0" / "video_0").iterdir():
        path.write_bytes(b"not an image")
    loader = make_loader(open_source(root), device="cuda", num_steps=3)
    batches = list(loader)
    loader.close()
    assert len(batches) == 3
    assert all(pairs.frames.device.type == "cuda" for pairs in batches)
    bad_samples = [bad for pairs in batches for bad in pairs.bad_samples]
    assert {bad.partition(",")[0] for bad in bad_samples} == {"class_0/video_0"}
