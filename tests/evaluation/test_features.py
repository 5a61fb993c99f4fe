"""The feature cache: what it is a function of, that a hit encodes nothing, that damage is repaired."""

import argparse
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import SETTINGS, clips, write_frames
from torch import Tensor
from torch.nn import functional

from fasttrain.backbones import load_backbone
from fasttrain.data.sources import open_source
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.evaluation.datasets import StoredVideo
from fasttrain.evaluation.features import extract
from fasttrain.evaluation.frames import centre_crop
from fasttrain.evaluation.model import EvaluatedModel
from fasttrain.projection import Projection
from fasttrain.tools.synthetic import write_scene

POOLED = {"num_frames": 3}
EACH = {"stride": 2}


def make_model(projection_seed: int = 0, **settings: Any) -> EvaluatedModel:
    projection = Projection(32, init="xavier_uniform", seed=projection_seed)
    encoder = load_backbone(**{**SETTINGS, **settings})
    return EvaluatedModel(encoder=encoder, projection=projection, variants=("before", "after"))


@pytest.fixture(scope="module")
def model() -> EvaluatedModel:
    return make_model()


@pytest.fixture
def videos(tmp_path: Path) -> dict[str, Path]:
    """A frame folder and a video file."""
    write_frames(clips(0)[0], tmp_path / "videos" / "folder")
    write_scene(clips(1)[0], tmp_path / "videos" / "file.mp4")
    return {"folder": tmp_path / "videos" / "folder", "file": tmp_path / "videos" / "file.mp4"}


@pytest.fixture
def encoded(model: EvaluatedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of frames that the encoder was given."""
    numbers = []
    tokens = model.encoder.tokens

    def noted(frames_B3HW: Tensor) -> Tensor:
        numbers.append(len(frames_B3HW))
        return tokens(frames_B3HW)

    monkeypatch.setattr(model.encoder, "tokens", noted)
    return numbers


def stored(path: Path) -> StoredVideo:
    return (open_source(path), 0) if path.is_dir() else path


def run(
    videos: dict[str, Path], model: EvaluatedModel, output: Path, **options: Any
) -> tuple[dict[str, dict[str, Tensor]], dict[str, int], list[str]]:
    """Features by video and variant, lengths of the videos, and what was skipped."""
    given = {"cache": None, "batch_size": 2, "workers": 2, "image_size": 64, "precision": "fp32"}
    arguments = argparse.Namespace(**{**given, **(options or POOLED)})
    listed = {name: stored(path) for name, path in videos.items()}
    found = extract(listed, arguments, model, output, World.single())
    assert found is not None
    features = {
        name: {variant: found.load(name, variant) for variant in model.variants} for name in found.num_frames
    }
    return features, dict(found.num_frames), found.skipped


def entries(output: Path) -> list[Path]:
    return sorted((output / "cache").rglob("*.safetensors"))


def assert_same(one: dict[str, dict[str, Tensor]], other: dict[str, dict[str, Tensor]]) -> None:
    for name, by_variant in one.items():
        for variant, features_TD in by_variant.items():
            assert torch.equal(features_TD, other[name][variant])


def test_features_are_mean_normalised_tokens(
    videos: dict[str, Path], model: EvaluatedModel, tmp_path: Path
) -> None:
    found, lengths, skipped = run(videos, model, tmp_path / "out")
    each, _, _ = run(videos, model, tmp_path / "out", **EACH)
    assert not skipped
    assert lengths == {"file": 6, "folder": 6}
    index = open_source(videos["folder"])
    frames = torch.stack([centre_crop(index.read_frame(0, t), 64) for t in (0, 2, 4, 5)])
    with torch.no_grad():
        frozen = model.encoder.tokens(frames)
        tokens = {"before": frozen, "after": model.projection(frozen)}  # type: ignore[misc]
    for variant, tokens_TND in tokens.items():
        expected = functional.normalize(tokens_TND, dim=-1).mean(dim=1)
        torch.testing.assert_close(found["folder"][variant], expected[[0, 1, 3]].mean(dim=0, keepdim=True))
        torch.testing.assert_close(each["folder"][variant], expected[:3])


def test_bf16_is_close(videos: dict[str, Path], model: EvaluatedModel, tmp_path: Path) -> None:
    exact, _, _ = run(videos, model, tmp_path / "out")
    coarse, _, _ = run(videos, model, tmp_path / "out", **POOLED, precision="bf16")
    for name in videos:
        for variant in model.variants:
            one, other = exact[name][variant], coarse[name][variant]
            assert 0 < (one - other).norm() / one.norm() < 0.05
            assert other.dtype == torch.float32


def test_a_long_video_is_decoded_in_parts(model: EvaluatedModel, tmp_path: Path) -> None:
    clip = clips(0)[0]
    write_frames(clip, tmp_path / "short")
    (tmp_path / "long").mkdir()
    for number in range(150):
        frame = tmp_path / "short" / f"{number % len(clip.frames_THWC):05d}.jpg"
        (tmp_path / "long" / f"{number:05d}.jpg").symlink_to(frame)
    videos = {name: tmp_path / name for name in ("short", "long")}
    found, lengths, _ = run(videos, model, tmp_path / "out", stride=1)
    assert lengths == {"long": 150, "short": 6}
    torch.testing.assert_close(found["long"]["after"], found["short"]["after"].repeat(25, 1))


def test_a_hit_encodes_nothing(
    videos: dict[str, Path], model: EvaluatedModel, encoded: list[int], tmp_path: Path
) -> None:
    first, lengths, _ = run(videos, model, tmp_path / "out")
    assert sum(encoded) == 6
    moved = {name: path.rename(path.with_name(f"moved {path.name}")) for name, path in videos.items()}
    second, same_lengths, _ = run(moved, model, tmp_path / "out")
    assert sum(encoded) == 6
    assert lengths == same_lengths
    assert_same(first, second)


def test_entries_are_as_many_as_what_features_are_a_function_of(
    videos: dict[str, Path], model: EvaluatedModel, tmp_path: Path
) -> None:
    def count(model: EvaluatedModel, **options: Any) -> int:
        run(videos, model, tmp_path / "out", **options)
        return len(entries(tmp_path / "out"))

    assert count(model) == 4
    # Another projection keeps the baseline.
    assert count(make_model(1)) == 6
    assert count(make_model(seed=9)) == 10
    assert count(make_model(num_heads=4)) == 14
    assert count(model, num_frames=4) == 18
    assert count(model, **POOLED, image_size=32) == 22
    assert count(model, **POOLED, precision="bf16") == 26
    assert count(model, stride=3) == 30


def test_changed_content_is_another_entry(
    videos: dict[str, Path], model: EvaluatedModel, encoded: list[int], tmp_path: Path
) -> None:
    before, _, _ = run(videos, model, tmp_path / "out")
    shutil.copy(videos["folder"] / "00000.jpg", videos["folder"] / "00002.jpg")
    write_scene(clips(2)[0], videos["file"])
    after, _, _ = run(videos, model, tmp_path / "out")
    for name in videos:
        assert not torch.equal(before[name]["before"], after[name]["before"])
    # A frame that is not used may change.
    shutil.copy(videos["folder"] / "00000.jpg", videos["folder"] / "00001.jpg")
    encoded.clear()
    run(videos, model, tmp_path / "out")
    assert not encoded


def test_unreadable_videos_are_named(
    videos: dict[str, Path], model: EvaluatedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = videos["file"].read_bytes()
    bad = {name: tmp_path / f"{name}.mp4" for name in ("absent", "empty", "cut")}
    bad["empty"].write_bytes(b"")
    bad["cut"].write_bytes(data[: len(data) // 2])
    bad["broken frame"] = tmp_path / "broken"
    write_frames(clips(2)[0], bad["broken frame"])
    (bad["broken frame"] / "00002.jpg").write_bytes(b"\xff\xd8 no image")
    found, _, skipped = run({**videos, **bad}, model, tmp_path / "out")
    assert sorted(found) == sorted(videos)
    assert [line.split(":")[0] for line in skipped] == sorted(bad)
    assert "no such file" in skipped[0]
    assert "frame 2" in next(line for line in skipped if line.startswith("broken frame"))
    assert "4 of 6 videos cannot be read" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written(
    videos: dict[str, Path], model: EvaluatedModel, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        run(videos, model, tmp_path, **POOLED, cache=tmp_path / "file")
