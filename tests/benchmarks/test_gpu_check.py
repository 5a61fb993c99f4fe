"""Tests of `make gpu-check`: every step runs and reports its outcome, and none outlives its time."""

import importlib
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import PARTS, STEPS, command
from benchmarks.step import SECTIONS, read_recipe

ROOT = Path(__file__).resolve().parents[2]
# Stands in for Python on a machine with a GPU.
STUB = """#!/bin/sh
case "$*" in
-c*) exit 0 ;;
*"-m gpu") echo "3 failed"; exit 1 ;;
*"--only switches") (setsid sleep 600 & echo $! >"$LEFT_RUNNING"); sleep 600 ;;
*benchmarks.loaders*) echo "No module named 'av'"; exit 1 ;;
*benchmarks.counters*) exit 0 ;;
*--out*) for last; do case $previous in --out) echo '{}' >"$last" ;; esac; previous=$last; done ;;
esac
echo "$PYTHONPATH" | cut -d: -f2 | xargs -I{} readlink {}/fasttrain_kernels
"""
# Runs the check with a stub as its interpreter, and less patience.
RUN = """
import sys
from benchmarks import gpu_check
sys.executable = sys.argv[1]
gpu_check.STEPS["switches"] = gpu_check.STEPS["switches"]._replace(seconds=1)
sys.exit(gpu_check.main(sys.argv[2:]))
"""


def check(folder: Path, *steps: str) -> subprocess.CompletedProcess[str]:
    for name, script in (("python", STUB), ("ncu", '#!/bin/sh\necho counters >"$6"')):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    environment = {
        **os.environ,
        "LEFT_RUNNING": str(folder / "pid"),
        "PATH": f"{folder}:{os.environ['PATH']}",
    }
    arguments = [sys.executable, "-c", RUN, str(folder / "python"), str(folder / "out"), *steps]
    return subprocess.run(arguments, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)


def test_every_step_runs_and_reports_its_outcome(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert check(tmp_path, "1").returncode == 1
    assert check(tmp_path, "2").returncode == 1
    assert check(tmp_path, *PARTS["3"]).returncode == 0
    lines = (out / "gpu-check.txt").read_text().splitlines()
    matches = [re.match(r"([a-z ]+): (\w+), \d+ s \(", line) for line in lines]
    outcomes = {match[2]: match[1] for match in matches if match}
    assert list(outcomes) == list(STEPS)
    different = {"tests": "failed", "switches": "out of time", "loaders": "skipped"}
    assert outcomes == {**dict.fromkeys(STEPS, "passed"), **different}
    assert lines[1].endswith(f"({ROOT / 'kernels'})")
    # A process that the step left running in a session of its own has ended.
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()
    # Few files are left, and they contain the results of all calls.
    assert {path.name for path in out.iterdir()} == {"gpu-check.txt", "results.tar.gz"}
    with tarfile.open(out / "results.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert names >= {f"{name}.log" for name in STEPS} | {"training-cuda.json", "counters.csv"}


def test_each_part_takes_less_than_nine_and_a_half_minutes() -> None:
    assert [name for names in PARTS.values() for name in names] == list(STEPS)
    for names in PARTS.values():
        # A process that hangs in the driver is waited for in addition.
        assert sum(STEPS[name].seconds for name in names) + 10 < 9.5 * 60
        assert f"    {', '.join(names)}\n" in (gpu_check.__doc__ or "")


@pytest.mark.parametrize("name", STEPS)
def test_the_command_of_a_step_is_valid(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "DATA", tmp_path)
    words = command(name, tmp_path)
    module, arguments = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
    for word in arguments:
        assert not word.startswith("tests/") or (ROOT / word).is_file()
    if module.startswith("benchmarks."):
        assert callable(importlib.import_module(module).main)
    if module == "benchmarks.step":
        only = arguments.index("--only")
        assert set(arguments[only + 1 :]) <= SECTIONS.keys()
        assert read_recipe(*arguments[5:6], arguments[6:only]).data.source == str(tmp_path)


def test_a_step_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["out", "4"])
    assert "'4' is not a step. Expected tests, kernel_tests" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "code", "out", "error"),
    [
        ("echo 'driver too old' >&2; exit 3", 0, "skipped: no CUDA GPU is available", "^driver too old\n$"),
        (
            "echo Traceback >&2; echo \"ModuleNotFoundError: No module named 'torch'\" >&2; exit 1",
            *(2, "^$", r"^gpu_check: \S+ cannot import PyTorch \(\w+: No module named 'torch'\); pass .*\n$"),
        ),
        ("exit 139", 2, "^$", r"^gpu_check: \S+ cannot import PyTorch \(exit code 139\).*\n$"),
    ],
)
def test_without_a_gpu_or_pytorch_one_line_says_so(
    script: str, code: int, out: str, error: str, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    arguments = [sys.executable, "-c", RUN, str(python), str(tmp_path / "out")]
    ended = subprocess.run(arguments, cwd=ROOT, check=False, capture_output=True, text=True)
    assert ended.returncode == code
    assert re.search(out, ended.stdout)
    assert re.search(error, ended.stderr)
    assert not (tmp_path / "out").exists()
