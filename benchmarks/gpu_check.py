"""Everything that wants a GPU, in under nine minutes: `make gpu-check`.

Runs the tests marked `gpu`, those of the kernels and the short form of every benchmark, each in a process of
its own with a time limit, and installs nothing. A step writes into a scratch folder, and every file whole or
not at all; what it wrote is copied to the folder `--out`, also when it failed or ran out of time.
`gpu-check.json` there, written after every step, says of each whether it passed, failed, ran out of time or
was skipped, and why; the exit code is 1 if one failed or ran out of time.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.record import environment, write_results

ROOT = Path(__file__).resolve().parents[1]
# Import name -> what it is called where people install it.
PACKAGES = {
    "nvidia.dali": "DALI",
    "av": "PyAV",
    "timm": "timm",
    "triton": "Triton",
    "rich": "rich",
    "pytest": "pytest",
    "xdist": "pytest-xdist",
    "hypothesis": "hypothesis",
    "matplotlib": "matplotlib",
    "scipy": "SciPy",
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One program: `{out}` in its words is the scratch folder, `{limit}` the seconds it may measure."""

    name: str
    command: tuple[str, ...]
    seconds: int
    needs: tuple[str, ...] = ()
    # Takes what the steps before it and those that cannot run leave of their seconds.
    takes_spare: bool = False


# Of a step's seconds, those that starting, compiling what was begun last and writing may take.
RESERVE = 60
# Not marked `gpu`: without one they run interpreted. Hypothesis' shapes would compile for minutes.
KERNEL_TESTS = (
    *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not any_shape"),
    *("tests/kernels/test_elementary.py", "tests/kernels/test_triton.py", "tests/kernels/test_memory.py"),
)
# The figures that are most wanted first; the last step stops by itself when its seconds are over.
STEPS = (
    Step(
        name="tests",
        command=(
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-p",
            "no:cacheprovider",
            # A package that is there and does not load fails the files that need it, not all.
            "--continue-on-collection-errors",
            "--junitxml={out}/gpu-tests.xml",
        ),
        seconds=85,
        needs=("pytest", "hypothesis", "timm"),
    ),
    Step(
        name="kernel tests",
        command=(*KERNEL_TESTS, "-n", "12", "--junitxml={out}/kernel-tests.xml"),
        seconds=80,
        needs=("pytest", "xdist", "hypothesis", "triton"),
    ),
    Step(
        name="kernels",
        command=("-m", "benchmarks.kernels", "--short", "--output", "{out}"),
        seconds=90,
        needs=("triton",),
        takes_spare=True,
    ),
    Step(
        name="propagation",
        command=("-m", "benchmarks.propagation", "--short", "--out", "{out}/propagation-cuda.json"),
        seconds=50,
        needs=("matplotlib", "scipy", "timm", "rich"),
        takes_spare=True,
    ),
    Step(
        name="davis",
        command=("-m", "benchmarks.davis", "--out", "{out}/davis-cuda.json"),
        seconds=45,
        needs=("av", "scipy", "timm", "rich"),
    ),
    Step(
        name="loaders",
        command=(
            "-m",
            "benchmarks.loaders",
            "--short",
            "--limit",
            "60",
            "--out",
            "{out}/loaders-cuda.json",
        ),
        seconds=70,
        needs=("nvidia.dali", "av", "matplotlib", "rich"),
    ),
    Step(
        name="throughput",
        command=(
            "-m",
            "benchmarks.step",
            "--short",
            "--limit",
            "{limit}",
            "--out",
            "{out}/throughput-cuda.json",
            "recipes/dino.yaml",
        ),
        seconds=105,
        needs=("timm", "matplotlib", "rich"),
        takes_spare=True,
    ),
)


def obstacle(step: Step) -> str | None:
    """Why a step cannot run here, if so."""
    missing = [PACKAGES[name] for name in step.needs if not installed(name)]
    if missing:
        return f"{', '.join(missing)} not installed"
    module = step.command[1]
    if module.startswith("benchmarks.") and not (ROOT / f"{module.replace('.', '/')}.py").is_file():
        return f"{module} is not in this checkout"
    return None


def installed(name: str) -> bool:
    # find_spec of a submodule imports its parent, which may be absent itself.
    parent = name.partition(".")[0]
    return importlib.util.find_spec(parent) is not None and importlib.util.find_spec(name) is not None


def run_step(step: Step, out: Path, *, spare: float = 0.0) -> dict[str, Any]:
    """Run a step to its end or its limit, `spare` seconds beyond its own; its files go to `out`, whole."""
    limit = step.seconds + spare
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        places = {"{out}": scratch, "{limit}": str(max(0, int(limit - RESERVE)))}
        command = [sys.executable, *(fill(word, places) for word in step.command)]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": search_path(scratch), "PYTHONUNBUFFERED": "1"},
            # A group of its own, so that the workers it started can be ended with it.
            start_new_session=True,
        )
        outcome = "out of time"
        try:
            output, _ = process.communicate(timeout=limit)
            outcome = "passed" if process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            output = end(process)
        finally:
            # Left where this program itself is told to stop.
            if process.poll() is None:
                end(process)
            files = keep_all(Path(scratch), out)
    return {
        "outcome": outcome,
        "seconds": round(time.perf_counter() - start, 1),
        "limit_seconds": round(limit, 1),
        "files": files,
        "output_tail": output[-4000:],
    }


def fill(word: str, places: dict[str, str]) -> str:
    for place, value in places.items():
        word = word.replace(place, value)
    return word


def end(process: subprocess.Popen[str]) -> str:
    """Stop a step that ran out of time; what it had printed.

    First by asking: pytest then writes its report, and torchrun ends its workers, which are in groups of
    their own.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, number)
        try:
            output, _ = process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            continue
        return output
    return "(what it printed is lost: a worker still holds its output)"


def search_path(scratch: str) -> str:
    """A path that finds the project uninstalled: `kernels/` also under its import name."""
    names = Path(scratch) / "names"
    names.mkdir()
    (names / "fasttrain_kernels").symlink_to(ROOT / "kernels", target_is_directory=True)
    return os.pathsep.join((str(ROOT), str(names), os.environ.get("PYTHONPATH", "")))


def keep_all(scratch: Path, out: Path) -> list[str]:
    """Copy the whole files into `out`, each atomically; their names."""
    files = sorted(path for path in scratch.iterdir() if path.is_file() and path.suffix != ".partial")
    for path in files:
        partial = out / f".{path.name}.partial"
        partial.write_bytes(path.read_bytes())
        partial.replace(out / path.name)
    return [path.name for path in files]


def stop(number: int, frame: FrameType | None) -> None:
    """Signal handler: what the step at work has written is kept, as at its limit."""
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=[step.name for step in STEPS], help="these steps only")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    cuda = torch.cuda.is_available()
    lacks = [label for name, label in PACKAGES.items() if not installed(name)]
    print(
        f"GPU: {torch.cuda.get_device_name() if cuda else 'none'}; not installed: {', '.join(lacks) or '-'}"
    )
    report: dict[str, Any] = {}
    payload = {"environment": environment(), "not_installed": lacks, "steps": report}
    wanted = [step for step in STEPS if arguments.only is None or step.name in arguments.only]
    reasons = {step.name: obstacle(step) if cuda else "torch sees no GPU" for step in wanted}
    spare = float(sum(step.seconds for step in wanted if reasons[step.name]))
    signal.signal(signal.SIGTERM, stop)
    for step in wanted:
        if reasons[step.name]:
            report[step.name] = {"outcome": "skipped", "why": reasons[step.name]}
        else:
            # What stays, whatever ends this program.
            report[step.name] = {"outcome": "not finished"}
            write_results(arguments.out / "gpu-check.json", payload)
            # What a step took beyond its limit in ending comes out of the next of these.
            taken = spare if step.takes_spare else 0.0
            report[step.name] = run_step(step, arguments.out, spare=taken)
            spare += step.seconds - report[step.name]["seconds"]
        told = report[step.name]
        print(f"{step.name}: {told['outcome']} {told.get('why') or str(told['seconds']) + ' s'}", flush=True)
        if told["outcome"] in ("failed", "out of time"):
            print(told["output_tail"], flush=True)
        write_results(arguments.out / "gpu-check.json", payload)
    return int(any(step["outcome"] in ("failed", "out of time") for step in report.values()))


if __name__ == "__main__":
    sys.exit(main())
