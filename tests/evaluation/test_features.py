"""The feature cache: what it is a function of, that a hit opens nothing, that damage is repaired."""

import argparse
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from synthetic import SETTINGS, clips, write_frames
from torch.nn import functional

from fasttrain import distributed
from fasttrain.backbones import load_backbone
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.evaluation import features
from fasttrain.evaluation.features import FeatureStore, Sampling, VideoFeatures, extract
from fasttrain.evaluation.frames import centre_crop
from fasttrain.evaluation.model import EvaluatedModel
from fasttrain.projection import Projection
from fasttrain.tools.synthetic import write_scene

POOLED = Sampling(pool="video", num_frames=3, stride=1, image_size=64)
EACH = Sampling(pool="frame", num_frames=None, stride=2, image_size=64)


@pytest.fixture(scope="module")
def model() -> EvaluatedModel:
    return make_model(0)


def make_model(projection_seed: int, **settings: Any) -> EvaluatedModel:
    projection = Projection(32, init="xavier_uniform", seed=projection_seed)
    encoder = load_backbone(**{**SETTINGS, **settings})
    return EvaluatedModel(encoder=encoder, projection=projection, variants=("before", "after"))


@pytest.fixture
def videos(tmp_path: Path) -> dict[str, Path]:
    """A frame folder and a video file."""
    write_frames(clips(0)[0], tmp_path / "videos" / "folder")
    write_scene(clips(1)[0], tmp_path / "videos" / "file.mp4")
    return {"folder": tmp_path / "videos" / "folder", "file": tmp_path / "videos" / "file.mp4"}


def run(
    videos: dict[str, Path], model: EvaluatedModel, output: Path, sampling: Sampling = POOLED, **options: Any
) -> tuple[dict[str, dict[str, VideoFeatures]], list[str]]:
    arguments = argparse.Namespace(cache=None, batch_size=2, workers=2, **options)
    with distributed.start("cpu") as world:
        found = extract(videos, sampling, model.to(world.device), arguments, output, world)
    assert found is not None
    loaded = {
        name: {variant: found.load(name, variant) for variant in model.variants} for name in found.num_frames
    }
    for name, by_variant in loaded.items():
        assert {one.num_frames for one in by_variant.values()} == {found.num_frames[name]}
    return loaded, found.skipped


def forbid(monkeypatch: pytest.MonkeyPatch, opened: list[str] | None = None) -> None:
    """Opening a video or decoding a frame fails the test, or is noted."""

    def refuse(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            if opened is None:
                raise AssertionError(f"{name} was called")
            opened.append(name)
            return function(*arguments)

        return called

    for name in ("probe_video", "stream_video_frames", "_stream"):
        monkeypatch.setattr(features, name, refuse(name, getattr(features, name)))


def test_features_are_mean_normalised_tokens(
    videos: dict[str, Path], model: EvaluatedModel, tmp_path: Path
) -> None:
    found, skipped = run(videos, model, tmp_path / "out")
    each, _ = run(videos, model, tmp_path / "out", EACH)
    assert not skipped
    assert list(found) == ["file", "folder"]
    index, _ = features._open(videos["folder"])
    frames = torch.stack([centre_crop(index.read_frame(0, t), 64) for t in (0, 2, 4, 5)])
    with torch.no_grad():
        frozen = model.encoder.tokens(frames)
        tokens = {"before": frozen, "after": model.projection(frozen)}  # type: ignore[misc]
    for variant, tokens_TND in tokens.items():
        expected = functional.normalize(tokens_TND, dim=-1).mean(dim=1)
        pooled = expected[[0, 1, 3]].mean(dim=0, keepdim=True)
        torch.testing.assert_close(found["folder"][variant].features_TD, pooled)
        torch.testing.assert_close(each["folder"][variant].features_TD, expected[:3])
        assert found["folder"][variant].num_frames == each["file"][variant].num_frames == 6
    assert found["file"]["before"].picture().shape == (96, 120, 3)


def test_bf16_is_close(videos: dict[str, Path], model: EvaluatedModel, tmp_path: Path) -> None:
    exact, _ = run(videos, model, tmp_path / "out")
    coarse, _ = run(videos, model, tmp_path / "out", replace(POOLED, precision="bf16"))
    for name in videos:
        for variant in model.variants:
            one, other = (found[name][variant].features_TD for found in (exact, coarse))
            assert 0 < (one - other).norm() / one.norm() < 0.05
            assert other.dtype == torch.float32


def test_long_videos_are_read_in_parts(
    videos: dict[str, Path], model: EvaluatedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(videos, model, tmp_path / "whole", EACH)
    monkeypatch.setattr(features, "_CHUNK", 2)
    parts, _ = run(videos, model, tmp_path / "parts", EACH)
    for name in videos:
        torch.testing.assert_close(parts[name]["after"].features_TD, whole[name]["after"].features_TD)


def test_a_hit_opens_no_video(
    videos: dict[str, Path], model: EvaluatedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = run(videos, model, tmp_path / "out")
    forbid(monkeypatch)
    moved = {name: path.rename(path.with_name(f"moved {path.name}")) for name, path in videos.items()}
    second, _ = run(moved, model, tmp_path / "out")
    for name in videos:
        for variant in model.variants:
            assert torch.equal(first[name][variant].features_TD, second[name][variant].features_TD)
            assert first[name][variant].thumbnail == second[name][variant].thumbnail


def test_another_projection_keeps_the_baseline(
    videos: dict[str, Path], model: EvaluatedModel, tmp_path: Path
) -> None:
    run(videos, model, tmp_path / "out")
    store = set((tmp_path / "out" / "cache").rglob("*.safetensors"))
    assert len(store) == 4
    run(videos, make_model(1), tmp_path / "out")
    assert len(set((tmp_path / "out" / "cache").rglob("*.safetensors")) - store) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"num_frames": 4},
        {"image_size": 32},
        {"pool": "frame"},
        {"num_frames": None, "stride": 3},
        {"precision": "bf16"},
    ],
)
def test_other_sampling_is_another_entry(
    change: dict[str, Any], videos: dict[str, Path], model: EvaluatedModel, tmp_path: Path
) -> None:
    run(videos, model, tmp_path / "out")
    run(videos, model, tmp_path / "out", replace(POOLED, **change))
    assert len(list((tmp_path / "out" / "cache").rglob("*.safetensors"))) == 8


def test_other_weights_or_heads_are_other_entries(
    videos: dict[str, Path], model: EvaluatedModel, tmp_path: Path
) -> None:
    for other in (model, make_model(0, seed=9), make_model(0, num_heads=4)):
        run(videos, other, tmp_path / "out")
    assert len(list((tmp_path / "out" / "cache").rglob("*.safetensors"))) == 12


def test_changed_content_is_another_entry(
    videos: dict[str, Path], model: EvaluatedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _ = run(videos, model, tmp_path / "out")
    shutil.copy(videos["folder"] / "00000.jpg", videos["folder"] / "00002.jpg")
    write_scene(clips(2)[0], videos["file"])
    after, _ = run(videos, model, tmp_path / "out")
    for name in videos:
        assert not torch.equal(before[name]["before"].features_TD, after[name]["before"].features_TD)
    # A frame that is not used may change.
    shutil.copy(videos["folder"] / "00000.jpg", videos["folder"] / "00001.jpg")
    forbid(monkeypatch)
    run(videos, model, tmp_path / "out")


@pytest.mark.parametrize("start", [0, 300_000, 777_777, 1_800_000])
def test_a_hole_that_is_filled_in_later_is_another_video(start: int, tmp_path: Path) -> None:
    video, copy = tmp_path / "video.mp4", tmp_path / "copy.mp4"
    content = torch.randint(256, (2_000_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    copy.write_bytes(content.numpy().tobytes())
    content[start : start + 140_000] = 0
    video.write_bytes(content.numpy().tobytes())
    before = features._identify(video, POOLED)
    shutil.copyfile(copy, video)
    assert features._identify(video, POOLED) == features._identify(copy, POOLED) != before


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
        lambda data: b"not a file of tensors",
    ],
)
def test_a_damaged_entry_is_made_again(
    damage: Callable[[bytes], bytes],
    videos: dict[str, Path],
    model: EvaluatedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, _ = run(videos, model, tmp_path / "out")
    entries = sorted((tmp_path / "out" / "cache").rglob("*.safetensors"))
    entries[0].write_bytes(damage(entries[0].read_bytes()))
    store = FeatureStore(tmp_path / "out" / "cache")
    assert store.load(entries[0].stem) is None
    opened: list[str] = []
    forbid(monkeypatch, opened)
    second, _ = run(videos, model, tmp_path / "out")
    assert opened.count("_stream") == 1
    assert store.load(entries[0].stem) is not None
    for name in videos:
        assert torch.equal(first[name]["after"].features_TD, second[name]["after"].features_TD)


def test_an_entry_under_another_name_is_not_taken(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    store.save("aa1", VideoFeatures(torch.ones(1, 2), 5, b"x"))
    found = store.load("aa1")
    assert found is not None
    assert (found.features_TD.tolist(), found.num_frames, found.thumbnail) == ([[1, 1]], 5, b"x")
    shutil.copy(store.path("aa1"), store.path("aa2"))
    assert store.load("aa2") is None
    assert not list(tmp_path.rglob(".*"))


def test_unreadable_videos_are_named(
    videos: dict[str, Path], model: EvaluatedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = videos["file"].read_bytes()
    bad = {name: tmp_path / f"{name}.mp4" for name in ("absent", "empty", "cut")}
    bad["empty"].write_bytes(b"")
    bad["cut"].write_bytes(data[: len(data) // 2])
    bad["no frames"] = tmp_path / "nothing"
    bad["no frames"].mkdir()
    bad["broken frame"] = tmp_path / "broken"
    write_frames(clips(2)[0], bad["broken frame"])
    (bad["broken frame"] / "00002.jpg").write_bytes(b"\xff\xd8 no image")
    found, skipped = run({**videos, **bad}, model, tmp_path / "out")
    assert sorted(found) == sorted(videos)
    assert [line.split(":")[0] for line in skipped] == sorted(bad)
    assert "no such file" in skipped[0]
    assert "frame 2" in next(line for line in skipped if line.startswith("broken frame"))
    assert "5 of 7 videos cannot be read" in capsys.readouterr().out


def test_a_cache_that_another_process_does_not_see(
    videos: dict[str, Path], model: EvaluatedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def merge_with_another_machine(world: World, results: Any) -> Any:
        shutil.rmtree(tmp_path / "out" / "cache")
        return results

    monkeypatch.setattr(World, "merge", merge_with_another_machine)
    with pytest.raises(InputError, match="all processes must see it"):
        run(videos, model, tmp_path / "out")


@pytest.mark.parametrize(
    ("sampling", "part"),
    [
        ({"num_frames": 0}, "0 frames"),
        ({"stride": 0}, "0-th"),
        ({"image_size": 70}, "multiples of 16"),
    ],
)
def test_bad_input(sampling: dict[str, Any], part: str, model: EvaluatedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=part):
        run({}, model, tmp_path, replace(POOLED, **sampling))


def test_a_frame_of_a_few_rows(model: EvaluatedModel, tmp_path: Path) -> None:
    (tmp_path / "wide").mkdir()
    Image.new("RGB", (4000, 4)).save(tmp_path / "wide" / "0.png")
    found, skipped = run({"wide": tmp_path / "wide"}, model, tmp_path / "out")
    assert not skipped
    assert found["wide"]["before"].picture().shape == (96, 384, 3)
