"""What `make gpu-check` promises: limits, whole files only, and a reason for all that is left out."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import STEPS, Step, main, obstacle, run_step

WRITE = "import sys; open(sys.argv[1] + '/figures.json', 'w').write('{}'); "


def program(text: str, *, seconds: int = 60, name: str = "step") -> Step:
    return Step(name=name, command=("-c", text, "{out}"), seconds=seconds)


def test_all_limits_together_stay_under_nine_minutes() -> None:
    assert sum(step.seconds for step in STEPS) < 9 * 60


def test_a_finished_step_brings_its_files(tmp_path: Path) -> None:
    result = run_step(program(WRITE + "print('fine')"), tmp_path)
    assert result["outcome"] == "passed"
    assert result["output_tail"] == "fine\n"
    assert [path.name for path in tmp_path.iterdir()] == result["files"] == ["figures.json"]


@pytest.mark.parametrize(
    ("text", "seconds", "outcome"),
    [("raise SystemExit(3)", 60, "failed"), ("import time; time.sleep(60)", 2, "out of time")],
)
def test_a_step_that_does_not_finish_leaves_whole_files_only(
    tmp_path: Path, text: str, seconds: int, outcome: str
) -> None:
    half = "open(sys.argv[1] + '/.more.json.7.partial', 'w').write('{'); "
    result = run_step(program(WRITE + half + text, seconds=seconds), tmp_path)
    assert (result["outcome"], result["files"]) == (outcome, ["figures.json"])
    assert result["seconds"] < 30
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_stopped_from_outside_what_is_written_stays(tmp_path: Path) -> None:
    """As `timeout make gpu-check` stops it; the step's programs, in groups of their own, end with it."""
    text = f"""
import signal, sys, torch
from benchmarks import gpu_check
slow = {WRITE + "import os, time; open(sys.argv[1] + '/pid', 'w').write(str(os.getpid())); time.sleep(60)"!r}
gpu_check.STEPS = (gpu_check.Step(name="slow", command=("-c", slow, "{{out}}"), seconds=60),)
torch.cuda.is_available, torch.cuda.get_device_name = lambda: True, lambda: "a GPU"
signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
signal.alarm(4)
sys.argv = ["gpu_check", "--out", {str(tmp_path)!r}]
gpu_check.main()
"""
    process = subprocess.run([sys.executable, "-c", text], cwd=gpu_check.ROOT, timeout=60, check=False)
    assert process.returncode == 128 + signal.SIGTERM
    assert (tmp_path / "figures.json").read_text() == "{}"
    report = json.loads((tmp_path / "gpu-check.json").read_text())
    assert report["steps"] == {"slow": {"outcome": "not finished"}}
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_step_takes_the_time_that_others_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = (
        Step(name="quick", command=("-c", ""), seconds=50),
        Step(name="taker", command=("-c", ""), seconds=30, takes_spare=True),
        Step(name="absent", command=("-m", "benchmarks.no_such_module"), seconds=20),
        Step(name="plain", command=("-c", ""), seconds=10),
        Step(name="last", command=("-c", ""), seconds=10, takes_spare=True),
    )
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path)])
    assert main() == 0
    report: dict[str, Any] = json.loads((tmp_path / "gpu-check.json").read_text())["steps"]
    limits = {name: step.get("limit_seconds") for name, step in report.items()}
    assert (limits["quick"], limits["absent"], limits["plain"]) == (50, None, 10)
    assert 80 < limits["taker"] <= 100
    # What the first left is not lost: all seconds together are 120.
    assert 100 < limits["last"] <= 120


def test_the_last_step_takes_what_all_before_it_leave() -> None:
    assert STEPS[-1].takes_spare


def test_a_step_is_told_how_long_it_may_measure(tmp_path: Path) -> None:
    step = Step(name="limited", command=("-c", "import sys; print(sys.argv[1])", "{limit}"), seconds=100)
    assert run_step(step, tmp_path, spare=7.5)["output_tail"] == f"{int(107.5 - gpu_check.RESERVE)}\n"


def test_tests_that_run_out_of_time_are_reported(tmp_path: Path) -> None:
    """pytest writes its report where it is interrupted, not where it is killed."""
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_slow.py").write_text(
        "import time\ndef test_quick(): pass\ndef test_slow(): time.sleep(60)\n"
    )
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder))
    step = Step(name="tests", command=(*words, "--junitxml={out}/report.xml"), seconds=8)
    result = run_step(step, tmp_path)
    assert (result["outcome"], result["files"]) == ("out of time", ["report.xml"])
    assert 'name="test_quick"' in (tmp_path / "report.xml").read_text()


def test_the_project_is_found_without_being_installed(tmp_path: Path) -> None:
    text = "import fasttrain_kernels, fasttrain; print(fasttrain_kernels.__file__)"
    result = run_step(program(text), tmp_path)
    assert result["outcome"] == "passed", result["output_tail"]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "installed", lambda name: name not in ("nvidia.dali", "av"))
    reasons = {step.name: obstacle(step) for step in STEPS}
    assert reasons["loaders"] == "DALI, PyAV not installed"
    assert reasons["throughput"] is None
    absent = Step(name="absent", command=("-m", "benchmarks.no_such_module"), seconds=1)
    assert "benchmarks.no_such_module" in (obstacle(absent) or "")


@pytest.mark.parametrize("package", ["rich", "scipy"])
def test_files_that_need_what_is_missing_are_left_out(tmp_path: Path, package: str) -> None:
    """The step of the tests does not fail for them."""
    text = f"""
import sys, pytest
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}")
sys.meta_path.insert(0, Absent())
files = "test_recipe.py", "test_trainer.py", "evaluation/test_localization.py"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--co", *("tests/" + name for name in files)]))
"""
    result = run_step(program(text), tmp_path)
    assert result["outcome"] == "passed", result["output_tail"]
    assert f"needs the package {package}, which is not installed" in result["output_tail"]


def test_without_a_gpu_everything_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path)])
    assert main() == 0
    report: dict[str, Any] = json.loads((tmp_path / "gpu-check.json").read_text())
    assert {step["outcome"] for step in report["steps"].values()} == {"skipped"}
    assert "torch sees no GPU" in capsys.readouterr().out
