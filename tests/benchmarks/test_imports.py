"""Benchmarks on a machine without PyAV and DALI."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.loaders import BASELINE, OUR_VIDEO, OURS

ROOT = Path(__file__).resolve().parents[2]
BLOCK = "import sys; sys.modules.update(dict.fromkeys(('av', 'nvidia.dali')))"


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An interpreter that can import neither, like the ones that it starts."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    return [sys.executable]


def test_every_benchmark_can_be_imported(python: list[str]) -> None:
    names = [f"benchmarks.{path.stem}" for path in sorted((ROOT / "benchmarks").glob("*.py"))]
    program = f"import importlib; [importlib.import_module(name) for name in {names}]"
    done = subprocess.run([*python, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_loaders_are_measured_but_for_videos(python: list[str], tmp_path: Path) -> None:
    out = tmp_path / "loaders.json"
    options = ["--short", "--device", "cpu", "--pairs", "4", "--batch", "2", "--out", str(out)]
    done = subprocess.run(
        [*python, "-m", "benchmarks.loaders", *options], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    assert content["skipped"] == {OUR_VIDEO: "needs av, which is not installed"}
    assert content["loaders"].keys() == {OURS, BASELINE}
    assert content["data"]["loader"] == "PyTorch"
