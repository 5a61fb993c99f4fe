"""The demo, with fewer scenes and steps than by default."""

import json
from pathlib import Path

import pytest

from fasttrain.__main__ import main
from fasttrain.tools import demo


def test_the_demo_writes_results_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "TRAINING_SCENES", range(2))
    monkeypatch.setattr(demo, "HELD_OUT_SCENES", range(100, 102))
    run = tmp_path / "run"
    overrides = [f"output={run}", f"data.source={tmp_path / 'videos'}", "train.steps=2", "train.batch_size=2"]
    assert main(["demo", *overrides, "backbone.patch_size=16", "train.tensorboard=false"]) == 0
    results = json.loads((run / "demo.json").read_text())
    assert set(results) == {"before", "after"}
    assert set(demo.HEADINGS) <= set(results["after"])
    assert (run / "figures" / "demo.png").is_file()
    out = capsys.readouterr().out
    assert f"  projection       {run}/projection.safetensors\n" in out
    assert "effective rank" in out
