"""Everything that wants a GPU, in under nine minutes: `make gpu-check OUT=FOLDER`.

Runs the tests marked `gpu`, those of the kernels and the short form of every benchmark, one after another,
each a process with a time limit, and installs nothing. Every step writes its results into the folder as it
goes, so that one that fails or runs out of time costs no other figure; all they print is in `gpu-check.log`.
`gpu-check.json`, written after every step, says of each whether it passed, failed, ran out of time or was
skipped, and why. The exit code is 1 if one failed or ran out of time.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measure import environment, write_results

ROOT = Path(__file__).resolve().parents[1]
# The share of a step's seconds in which it begins new figures; the rest is for starting and ending the last.
SHARE = 0.75


class Step(NamedTuple):
    """`python COMMAND`, where `{out}` is the folder and `{limit}` the seconds in which figures may be begun.

    A step has its `seconds` and all that those before it left of theirs.
    """

    name: str
    command: str
    seconds: int
    needs: str = ""


PYTEST = "-m pytest -q -p no:cacheprovider"
# Not marked `gpu`: without one they run interpreted. Hypothesis' shapes would compile for minutes.
KERNEL_FILES = " ".join(f"tests/kernels/test_{name}.py" for name in ("primitives", "triton", "memory"))
KERNEL_TESTS = f"{PYTEST} -k 'not any_shape' {KERNEL_FILES}"
STEP_OUT = "--short --limit {limit} --out {out}"
# The figures that are most wanted first.
STEPS = (
    Step("tests", f"{PYTEST} -m gpu --continue-on-collection-errors", 85, "pytest hypothesis timm"),
    Step("kernel tests", f"{KERNEL_TESTS} -n 12", 80, "pytest xdist hypothesis triton"),
    Step("kernels", f"-m benchmarks.kernels {STEP_OUT}/kernels-cuda.json", 90, "triton"),
    Step("step", f"-m benchmarks.step {STEP_OUT}/step-cuda.json recipes/dino.yaml", 150, "timm pydantic"),
    Step("propagation", f"-m benchmarks.propagation {STEP_OUT}/propagation-cuda.json", 60, "timm"),
    Step("loaders", f"-m benchmarks.loaders {STEP_OUT}/loaders-cuda.json", 65, "nvidia.dali av pydantic"),
)


def missing(step: Step) -> list[str]:
    """The packages that a step needs and this machine lacks."""

    def installed(name: str) -> bool:
        # find_spec of a submodule imports its parent, which may be absent itself.
        parent = name.partition(".")[0]
        return importlib.util.find_spec(parent) is not None and importlib.util.find_spec(name) is not None

    return [name for name in step.needs.split() if not installed(name)]


def run_step(step: Step, out: Path, limit: float) -> dict[str, Any]:
    """Run a step to its end or its limit."""
    places = {"out": str(out), "limit": str(int(SHARE * limit))}
    command = [sys.executable, *(word.format(**places) for word in shlex.split(step.command))]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as names, (out / "gpu-check.log").open("a", encoding="utf-8") as log:
        # The project is found uninstalled: `kernels/` also under its import name.
        (Path(names) / "fasttrain_kernels").symlink_to(ROOT / "kernels", target_is_directory=True)
        paths = os.pathsep.join((str(ROOT), names, os.environ.get("PYTHONPATH", "")))
        print(f"\n=== {step.name}, {limit:.0f} s: {shlex.join(command)}", file=log, flush=True)
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"},
                timeout=limit,
                check=False,
            )
            outcome = "failed" if done.returncode else "passed"
        except subprocess.TimeoutExpired:
            outcome = "out of time"
    return {"outcome": outcome, "seconds": round(time.monotonic() - start, 1)}


def check(out: Path, steps: Sequence[Step]) -> int:
    out.mkdir(parents=True, exist_ok=True)
    lacks = {step.name: missing(step) for step in steps}
    report: dict[str, dict[str, Any]] = {
        name: {"outcome": "skipped", "why": f"{', '.join(names)} not installed"}
        for name, names in lacks.items()
        if names
    }
    payload = {"environment": environment(), "steps": report}
    print(report, flush=True)
    write_results(out / "gpu-check.json", payload)
    deadline = time.monotonic() + sum(step.seconds for step in steps)
    runnable = [step for step in steps if step.name not in report]
    for number, step in enumerate(runnable, start=1):
        later = sum(other.seconds for other in runnable[number:])
        report[step.name] = run_step(step, out, deadline - time.monotonic() - later)
        print(f"{step.name}: {report[step.name]}", flush=True)
        write_results(out / "gpu-check.json", payload)
    return int(any(result["outcome"] in ("failed", "out of time") for result in report.values()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=[step.name for step in STEPS], help="these steps only")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: torch sees no GPU")
        return 0
    wanted = arguments.only or [step.name for step in STEPS]
    return check(arguments.out.absolute(), [step for step in STEPS if step.name in wanted])


if __name__ == "__main__":
    sys.exit(main())
