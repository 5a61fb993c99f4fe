"""Tests that the benchmark of the loaders runs. Timings are not checked."""

import json
from pathlib import Path

import pytest

from benchmarks import loaders
from benchmarks.loaders import BASELINE, OUR_VIDEO, OURS


def test_loaders_are_measured(tmp_path: Path) -> None:
    setting = {**loaders.prepare(tmp_path, None, 2), "batch": 2, "pairs": 4, "rounds": 1, "device": "cpu"}
    for name in (OURS, OUR_VIDEO, BASELINE):
        assert loaders.measure(name, setting)["pairs_per_cpu_second"] > 0
    assert f"{OURS}, JPEG engine 65%" in loaders.contenders({**setting, "device": "cuda"})


@pytest.mark.slow
def test_the_whole_program_runs(tmp_path: Path) -> None:
    out = tmp_path / "loaders.json"
    loaders.main(["--short", "--device", "cpu", "--pairs", "4", "--batch", "2", "--out", str(out)])
    content = json.loads(out.read_text())
    assert content["skipped"] == {}
    assert content["loaders"].keys() >= {OURS, OUR_VIDEO, BASELINE}
