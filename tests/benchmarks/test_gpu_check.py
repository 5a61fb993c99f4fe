"""Tests of `make gpu-check`: every step runs and reports its outcome."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
# Stands in for Python on a machine with a GPU.
STUB = """#!/bin/sh
case "$*" in
*benchmarks.kernels*) echo "CUDA error"; exit 1 ;;
*benchmarks.step*) exit 124 ;;
*benchmarks.loaders*) echo "No module named 'av'"; exit 1 ;;
*) readlink "$(echo "$PYTHONPATH" | cut -d: -f2)/fasttrain_kernels"; exit 0 ;;
esac
"""


def test_every_step_runs_and_reports_its_outcome(tmp_path: Path) -> None:
    stub, out = tmp_path / "python", tmp_path / "out"
    stub.write_text(STUB)
    stub.chmod(0o755)
    assert subprocess.run(["sh", SCRIPT, stub, out], check=False, capture_output=True).returncode == 1
    lines = (out / "gpu-check.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        *("passed", "passed", "failed", "out of time", "passed", "skipped")
    ]
    assert lines[0].endswith(f"({ROOT / 'kernels'})")
    assert lines[-1].endswith("(No module named 'av')")


def test_the_steps_exist_and_take_less_than_nine_minutes() -> None:
    script = SCRIPT.read_text()
    steps = re.findall(r"^(?:step|benchmark (\w+)) (\d+)", script, re.MULTILINE)
    assert sum(int(seconds) for _, seconds in steps) < 9 * 60
    files = [f"benchmarks/{name}.py" for name, _ in steps if name]
    files += re.findall(r"(?:tests|recipes)/\S+\.\w+", script)
    assert [path for path in files if not (ROOT / path).is_file()] == []
