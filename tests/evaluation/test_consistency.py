"""The paper's analysis: its published numbers, and what its definitions say of simple features."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets_made_up import NAMES, SUBJECT, make_scene, write_frames, write_projection, write_videos

from fasttrain.__main__ import main
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.evaluation import consistency_separability
from fasttrain.evaluation.consistency import measure_videos


def random_features(videos: int = 3, frames: int = 10, patches: int = 16, channels: int = 8) -> torch.Tensor:
    return torch.randn(videos, frames, patches, channels, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("given_patches", [True, False])
def test_published_numbers(shared: Path, given_patches: bool) -> None:
    golden = np.load(shared / "golden/eval/consistency_separability.npz")
    patches = golden["inter_patch_indices"] if given_patches else None
    found = consistency_separability(torch.from_numpy(golden["features"]), patches)
    assert set(found) == set(golden.files) - {"features", "inter_patch_indices"}
    for key, value in found.items():
        # float32 sums in another order: an ulp; the published rank is the exponential of an entropy of 3.1 in
        # float32, which may itself be an ulp (2.4e-7) off.
        rel = 5e-7 if key == "effective_rank" else 2e-7
        assert value == pytest.approx(float(golden[key]), rel=rel), key


def test_still_videos_do_not_move() -> None:
    still = random_features(frames=1).expand(-1, 12, -1, -1)
    found = consistency_separability(still)
    assert found["intra_original"] == 0
    assert found["inter_original"] > 0


def test_distances_scale_and_shares_do_not() -> None:
    features = random_features()
    small, large = consistency_separability(features), consistency_separability(3 * features)
    for key in ("intra_original", "inter_original", "inter_diameter_95"):
        assert large[key] == pytest.approx(3 * small[key], rel=1e-5)
    for key in ("intra_normalized_95", "inter_normalized_90", "effective_rank"):
        assert large[key] == pytest.approx(small[key], rel=1e-5)


def test_cycle_of_distinct_still_patches_comes_home() -> None:
    corners = 10 * torch.eye(16)[None, None].repeat(1, 8, 1, 1)
    assert consistency_separability(corners)["cycle_accuracy"] == 1


def test_one_video_has_no_distance_to_others() -> None:
    found = consistency_separability(random_features(videos=1))
    assert np.isnan(found["inter_original"])
    assert found["intra_original"] > 0


def test_videos_of_different_lengths() -> None:
    long, short = random_features(frames=14), random_features(frames=9)
    assert measure_videos([long[0], short[1]])["intra_original"] > 0


@pytest.mark.parametrize(
    ("shape", "patches", "message"),
    [
        ((2, 7, 16, 4), None, "at least 8"),
        ((2, 9, 15, 4), None, "square grid"),
        ((2, 9, 16), None, "features have shape"),
        ((2, 9, 16, 4), [16], "patch indices"),
    ],
)
def test_bad_input(shape: tuple[int, ...], patches: list[int] | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        consistency_separability(torch.ones(shape), patches)


def test_the_command_measures_what_it_can_and_names_the_rest(tmp_path: Path) -> None:
    root = write_videos(tmp_path / "videos")
    write_frames(make_scene(3, 5), root / "short", "{:05d}.jpg")
    broken = root / NAMES[0] / "00004.jpg"
    broken.write_bytes(broken.read_bytes()[:-200])
    head = write_projection(tmp_path / "projection.safetensors")
    places = ("--root", str(root), "--output", str(tmp_path), "--projection", str(head))
    assert main(["eval", "consistency", *places, *SUBJECT, "--image-size", "64"]) == 0
    found = json.loads((tmp_path / "consistency.json").read_text())
    assert found["data"]["videos"] == 2
    assert "short: fewer than 8 frames" in found["data"]["skipped"]
    assert any(line.startswith(NAMES[0]) for line in found["data"]["skipped"])
    before, after, difference = (found["results"][key] for key in ("before", "after", "difference"))
    assert difference["inter_original"] == pytest.approx(after["inter_original"] - before["inter_original"])
    assert (tmp_path / "figures/trade_off.png").stat().st_size > 0


def test_the_command_without_a_video_that_is_long_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_videos(tmp_path / "videos", frames=5)
    assert main(["eval", "consistency", "--root", str(root), "--output", str(tmp_path), *SUBJECT]) == 2
    assert "no video of" in capsys.readouterr().err


def test_two_shares_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two processes of a run one after the other: the main one last, which gathers."""
    root = write_videos(tmp_path / "videos")
    write_frames(make_scene(3, 5), root / "short", "{:05d}.jpg")
    options = ("--root", str(root), *SUBJECT, "--image-size", "64")
    assert main(["eval", "consistency", *options, "--output", str(tmp_path / "one")]) == 0
    monkeypatch.setattr(World, "barrier", lambda world: None)
    for rank in (1, 0):
        world = World(rank=rank, size=2, local_rank=rank, local_size=2, device=torch.device("cpu"))
        monkeypatch.setattr("fasttrain.distributed.start", lambda device, world=world: nullcontext(world))
        assert main(["eval", "consistency", *options, "--output", str(tmp_path / "two")]) == 0
    one, two = (json.loads((tmp_path / name / "consistency.json").read_text()) for name in ("one", "two"))
    assert (one["data"], one["results"]) == (two["data"], two["results"])
    assert not list((tmp_path / "two").glob(".part*"))


@pytest.mark.parametrize(("option", "value"), [("--num-frames", "7"), ("--num-videos", "0")])
def test_bad_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str) -> None:
    assert main(["eval", "consistency", "--root", str(tmp_path), *SUBJECT, option, value]) == 2
    assert f"{option} {value}: expected at least" in capsys.readouterr().err
