"""The benchmark of the loaders, and its arithmetic; no timing is judged."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import loaders
from benchmarks.loaders import BASELINE, OUR_VIDEO, OURS, Setting


def test_contenders_are_measured(tmp_path: Path) -> None:
    setting = Setting(**loaders.prepare(tmp_path, None, 2), batch=2, pairs=4, threads=1, device="cpu")
    for name in (OURS, OUR_VIDEO, BASELINE):
        assert loaders.measure(name, setting)["pairs_per_second"] > 0
    with pytest.raises(RuntimeError, match="KeyError: 'no such'"):
        loaders.measure_apart("no such", setting, 60)
    with pytest.raises(subprocess.TimeoutExpired):
        loaders.measure_apart(OURS, setting, 0.1)


@pytest.mark.slow
def test_the_whole_program_runs(tmp_path: Path) -> None:
    out = tmp_path / "loaders.json"
    loaders.main(["--short", "--device", "cpu", "--pairs", "4", "--batch", "2", "--out", str(out)])
    content = json.loads(out.read_text())
    assert content["skipped"] == {}
    assert content["goals"]["packed_over_four_frames"] > 0


def test_the_goals_are_taken_from_what_is_there() -> None:
    def row(per_cpu_second: float) -> dict[str, Any]:
        return {"pairs_per_second": 2 * per_cpu_second, "pairs_per_cpu_second": per_cpu_second}

    assert loaders.goals({}) == {}
    rows = {OURS: row(400), BASELINE: row(80), OUR_VIDEO: row(60), "torchcodec, two frames": row(50)}
    assert loaders.goals(rows) == {
        "packed_over_four_frames": 5.0,
        "video_over_torchcodec": 1.2,
        "packed_frames_per_second": 1600,
    }
