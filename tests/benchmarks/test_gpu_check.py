"""What `make gpu-check` promises: time limits, and a reason for all that is left out."""

import json
import shlex
from pathlib import Path

from benchmarks.gpu_check import ROOT, STEPS, Step, check

WRITE = "-c \"import pathlib; pathlib.Path('{out}', 'figures.json').write_text('{limit}'); "


def test_the_steps_are_there_and_stay_under_nine_minutes() -> None:
    assert sum(step.seconds for step in STEPS) < 9 * 60
    words = [word for step in STEPS for word in shlex.split(step.command)]
    files = [word for word in words if word.startswith(("tests/", "recipes/"))]
    files += [f"{word.replace('.', '/')}.py" for word in words if word.startswith("benchmarks.")]
    assert [name for name in files if not (ROOT / name).is_file()] == []


def test_a_step_that_does_not_finish_costs_nothing_else(tmp_path: Path) -> None:
    steps = (
        Step("absent", "-c pass", 40, "no_such_package"),
        Step("fails", f'{WRITE} raise SystemExit(3)"', 20),
        Step("hangs", '-c "import time; time.sleep(600)"', -57),
        Step("uninstalled", '-c "import fasttrain_kernels; print(fasttrain_kernels.__file__)"', 60),
    )
    assert check(tmp_path, steps) == 1
    report = json.loads((tmp_path / "gpu-check.json").read_text())["steps"]
    outcomes = {name: result["outcome"] for name, result in report.items()}
    assert outcomes == {
        "absent": "skipped",
        "fails": "failed",
        "hangs": "out of time",
        "uninstalled": "passed",
    }
    assert report["absent"]["why"] == "no_such_package not installed"
    # A step has the time that others leave.
    assert 20 < int((tmp_path / "figures.json").read_text()) <= 45
    assert "kernels/__init__.py" in (tmp_path / "gpu-check.log").read_text()
