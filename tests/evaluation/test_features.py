"""Feature extraction and its cache: values, cache keys, cache hits, unreadable videos."""

import argparse
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import SETTINGS, clips, write_frames
from torch.nn import functional

from fasttrain.backbones import load_backbone
from fasttrain.data.preprocessing import centre_crop
from fasttrain.data.sources import open_source
from fasttrain.distributed import World
from fasttrain.encoder_options import EvaluatedModel
from fasttrain.errors import InputError
from fasttrain.evaluation.features import Extracted, extract
from fasttrain.projection import Projection
from fasttrain.tools.synthetic import write_scene

POOLED = {"num_frames": 3}
HALF = (0.5, 0.5, 0.5)


def make_model(projection_seed: int = 0, **settings: Any) -> EvaluatedModel:
    projection = Projection(32, init="xavier_uniform", seed=projection_seed)
    encoder = load_backbone(**{**SETTINGS, **settings})
    return EvaluatedModel(encoder=encoder, projection=projection, variants=("before", "after"))


@pytest.fixture(scope="module")
def model() -> EvaluatedModel:
    return make_model()


@pytest.fixture
def videos(tmp_path: Path) -> dict[str, Path]:
    """Write a frame folder and a video file."""
    write_frames(clips(0)[0], tmp_path / "videos" / "folder")
    write_scene(clips(1)[0], tmp_path / "videos" / "file.mp4")
    return {"folder": tmp_path / "videos" / "folder", "file": tmp_path / "videos" / "file.mp4"}


def run(videos: dict[str, Path], model: EvaluatedModel, output: Path, **options: Any) -> Extracted:
    given = {"cache": None, "batch_size": 2, "workers": 2, "image_size": 64, "precision": "fp32"}
    arguments = argparse.Namespace(**{**given, **(options or POOLED)})
    listed = {name: (open_source(path), 0) if path.is_dir() else path for name, path in videos.items()}
    extracted = extract(listed, arguments, model, output, World.single())
    assert extracted is not None
    return extracted


def test_features_are_mean_normalised_tokens(
    videos: dict[str, Path], model: EvaluatedModel, tmp_path: Path
) -> None:
    per_video = run(videos, model, tmp_path / "out")
    per_frame = run(videos, model, tmp_path / "out", stride=2)
    in_bf16 = run(videos, model, tmp_path / "out", **POOLED, precision="bf16")
    assert not per_video.skipped
    assert per_video.num_frames == {"file": 6, "folder": 6}
    index = open_source(videos["folder"])
    mean, std = model.encoder.mean, model.encoder.std
    frames = torch.stack([centre_crop(index.read_frame(0, t), 64, mean, std) for t in (0, 2, 4, 5)])
    for variant, tokens_TND in model.tokens(frames).items():
        expected = functional.normalize(tokens_TND, dim=-1).mean(dim=1)
        pooled = expected[[0, 1, 3]].mean(dim=0, keepdim=True)
        torch.testing.assert_close(per_video.load("folder", variant), pooled)
        torch.testing.assert_close(per_frame.load("folder", variant), expected[:3])
        rounded = in_bf16.load("folder", variant)
        assert 0 < (rounded - pooled).norm() / pooled.norm() < 0.05
        assert rounded.dtype == torch.float32


def test_long_video_is_encoded_in_batches(model: EvaluatedModel, tmp_path: Path) -> None:
    clip = clips(0)[0]
    write_frames(clip, tmp_path / "short")
    (tmp_path / "long").mkdir()
    for number in range(150):
        frame = tmp_path / "short" / f"{number % len(clip.frames_THWC):05d}.jpg"
        (tmp_path / "long" / f"{number:05d}.jpg").symlink_to(frame)
    videos = {name: tmp_path / name for name in ("short", "long")}
    extracted = run(videos, model, tmp_path / "out", stride=1)
    assert extracted.num_frames == {"long": 150, "short": 6}
    long, short = (extracted.load(name, "after") for name in ("long", "short"))
    torch.testing.assert_close(long, short.repeat(25, 1))


def test_cached_videos_are_not_encoded_again_unless_they_change(
    videos: dict[str, Path], model: EvaluatedModel, tmp_path: Path
) -> None:
    batches: list[int] = []
    hook = model.encoder.patch_embed.register_forward_pre_hook(
        lambda module, inputs: batches.append(len(inputs[0]))
    )
    first = run(videos, model, tmp_path / "out")
    assert sum(batches) == 6
    moved = {name: path.rename(path.with_name(f"moved {path.name}")) for name, path in videos.items()}
    assert run(moved, model, tmp_path / "out") == first
    # Changing a frame that is not used has no effect.
    shutil.copy(moved["folder"] / "00000.jpg", moved["folder"] / "00001.jpg")
    assert run(moved, model, tmp_path / "out") == first
    assert sum(batches) == 6
    shutil.copy(moved["folder"] / "00000.jpg", moved["folder"] / "00002.jpg")
    write_scene(clips(2)[0], moved["file"])
    changed = run(moved, model, tmp_path / "out")
    assert sum(batches) == 12
    for name in videos:
        assert not torch.equal(first.load(name, "before"), changed.load(name, "before"))
    hook.remove()
    entry = next(iter(changed.entries["folder"].values()))
    entry.write_bytes(b"")
    with pytest.raises(InputError, match=f"cached features '{entry}' are damaged"):
        run(moved, model, tmp_path / "out")


def test_cache_key_covers_everything_that_determines_the_features(
    videos: dict[str, Path], model: EvaluatedModel, tmp_path: Path
) -> None:
    def count(model: EvaluatedModel, **options: Any) -> int:
        run(videos, model, tmp_path / "out", **options)
        return len(list((tmp_path / "cache").rglob("*.safetensors")))

    assert count(model) == 4
    # Another projection reuses the features of the backbone.
    assert count(make_model(1)) == 6
    assert count(make_model(seed=9)) == 10
    assert count(make_model(num_heads=4)) == 14
    assert count(make_model(mean=HALF)) == 18
    assert count(make_model(std=HALF)) == 22
    assert count(model, num_frames=4) == 26
    assert count(model, **POOLED, image_size=32) == 30
    assert count(model, **POOLED, precision="bf16") == 34
    assert count(model, stride=3) == 38


def test_unreadable_videos_are_skipped_and_reported(
    videos: dict[str, Path], model: EvaluatedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = videos["file"].read_bytes()
    bad = {name: tmp_path / f"{name}.mp4" for name in ("absent", "empty", "cut")}
    bad["empty"].write_bytes(b"")
    bad["cut"].write_bytes(data[: len(data) // 2])
    bad["broken frame"] = tmp_path / "broken"
    write_frames(clips(2)[0], bad["broken frame"])
    (bad["broken frame"] / "00002.jpg").write_bytes(b"\xff\xd8 no image")
    extracted = run({**videos, **bad}, model, tmp_path / "out")
    assert sorted(extracted.num_frames) == sorted(videos)
    assert [line.split(":")[0] for line in extracted.skipped] == sorted(bad)
    assert "no such file" in extracted.skipped[0]
    assert "frame 2" in next(line for line in extracted.skipped if line.startswith("broken frame"))
    assert "skipped unreadable videos: 4 of 6" in capsys.readouterr().out


def test_cache_that_is_not_writable(videos: dict[str, Path], model: EvaluatedModel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        run(videos, model, tmp_path, **POOLED, cache=tmp_path / "file")
