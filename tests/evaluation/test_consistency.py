"""`fasttrain eval consistency`."""

import json
from pathlib import Path

import pytest
import torch
from synthetic import (
    MODEL,
    NAMES,
    make_scene,
    result_of,
    write_frames,
    write_projection,
    write_videos,
)

from fasttrain.__main__ import main
from fasttrain.projection import Projection


def test_unreadable_and_short_videos_are_skipped_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_videos(tmp_path / "videos")
    write_frames(make_scene(3, 5), root / "short", "{:05d}.jpg")
    (root / "notes.txt").touch()
    broken = root / NAMES[0] / "00004.jpg"
    broken.write_bytes(broken.read_bytes()[:-200])
    head = write_projection(tmp_path / "projection.safetensors")
    words = ("--root", str(root), "--output", str(tmp_path), "--projection", str(head))
    assert main(["eval", "consistency", *words, *MODEL, "--image-size", "64"]) == 0
    report = json.loads(result_of(tmp_path, "consistency").read_text())
    assert report["data"]["videos"] == 2
    assert "short: fewer than 8 frames" in report["data"]["skipped"]
    assert any(line.startswith(NAMES[0]) for line in report["data"]["skipped"])
    before, after, difference = (report["results"][key] for key in ("before", "after", "difference"))
    assert difference["inter_original"] == pytest.approx(after["inter_original"] - before["inter_original"])
    assert (result_of(tmp_path, "consistency").with_suffix("") / "figures/trade_off.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "skipped videos: 2 (for example alpha" in printed
    assert "files left out: 1, of which 1 .txt (first notes.txt)" in printed


def test_all_videos_are_too_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_videos(tmp_path / "videos", frames=5)
    assert main(["eval", "consistency", "--root", str(root), "--output", str(tmp_path), *MODEL]) == 2
    assert "no video in" in capsys.readouterr().err


def test_projection_with_non_finite_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, head = write_videos(tmp_path / "videos"), write_projection(tmp_path / "projection.safetensors")
    projection = Projection.load(head)
    projection.norm.weight.data.fill_(torch.nan)
    projection.save(head)
    words = ("--root", str(root), "--output", str(tmp_path), *MODEL, "--image-size", "64")
    assert main(["eval", "consistency", *words, "--projection", str(head)]) == 2
    error = capsys.readouterr().err
    assert "video 'alpha': its features after the projection are not all finite" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("option", "value"), [("--num-frames", "7"), ("--num-videos", "0")])
def test_invalid_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    assert main(["eval", "consistency", "--root", str(tmp_path), *MODEL, option, value]) == 2
    assert f"{option} {value}: expected at least" in capsys.readouterr().err
