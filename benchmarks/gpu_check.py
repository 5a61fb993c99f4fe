"""Run the tests and benchmarks that need a GPU: `make gpu-check`, or

    python -m benchmarks.gpu_check OUT [STEP ...]      # all steps if none is given

Each step is a process of its own with a fixed time limit, so that it can neither use the time of another step
nor harm its results. The most important steps come first. For machines that are lent for ten minutes at a
time, they are divided into three parts of less than 9.5 minutes. A part can be given by its number:

    1    tests, kernel_tests, kernels, training
    2    baseline, parts, probe, random_shapes, switches
    3    graphs, loaders, propagation, schedules, scaling, counters

OUT receives two files, which are replaced after each step. A later call with the same OUT adds to both:

    gpu-check.txt     one line per step: passed, skipped, failed or out of time, and after how many seconds
    results.tar.gz    the output (NAME.log) and the results (NAME-cuda.json) of the steps

Steps with data use the packed set data/gpu-check if it exists, and synthetic scenes otherwise; the results
say which. Nothing is installed: the steps run with the interpreter of this command, and those whose packages
are missing are skipped. The exit code is 1 if a step failed or ran out of time, and 2 if the arguments are
invalid or PyTorch cannot be imported.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data" / "gpu-check"
KERNEL_TESTS = [f"tests/kernels/test_{name}.py" for name in ("primitives", "triton", "memory", "operators")]
NCU = [
    *("ncu", "--clock-control=none", "--profile-from-start=off", "--target-processes=application-only"),
    *("--csv", "--log-file"),
]
NCU_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats")
# So that the archive is easy to send.
MOST_BYTES = 15 * 2**20
PR_SET_CHILD_SUBREAPER = 36  # from <linux/prctl.h>
# Python itself ends with 1 after an exception.
NO_GPU = 3


class Step(NamedTuple):
    """A step: its part, its time limit in seconds, its module, and the arguments that only this step has."""

    part: int
    seconds: int
    module: str
    arguments: list[str]


STEPS = {
    "tests": Step(1, 150, "pytest", ["-n", "4", "-m", "gpu"]),
    # These are not marked `gpu`, because they also run interpreted.
    "kernel_tests": Step(1, 100, "pytest", ["-n", "12", "-m", "not slow", *KERNEL_TESTS]),
    "kernels": Step(1, 145, "benchmarks.kernels", ["--only", "shapes"]),
    "training": Step(1, 150, "benchmarks.step", ["--only", "training"]),
    "baseline": Step(2, 110, "benchmarks.step", ["--only", "end_to_end", "steps"]),
    "parts": Step(2, 60, "benchmarks.step", ["--only", "parts"]),
    "probe": Step(2, 60, "benchmarks.probe", []),
    "random_shapes": Step(2, 35, "pytest", ["-n", "2", "-m", "slow", "tests/kernels/test_triton.py"]),
    "switches": Step(2, 290, "benchmarks.step", ["--only", "switches"]),
    "graphs": Step(3, 90, "benchmarks.step", ["--only", "graphs"]),
    "loaders": Step(3, 120, "benchmarks.loaders", []),
    "propagation": Step(3, 120, "benchmarks.propagation", []),
    "schedules": Step(3, 45, "benchmarks.kernels", ["--only", "schedules"]),
    "scaling": Step(3, 100, "benchmarks.step", ["--only", "scaling"]),
    "counters": Step(3, 80, "benchmarks.counters", []),
}
PARTS = {str(part): [name for name in STEPS if STEPS[name].part == part] for part in (1, 2, 3)}


def command(name: str, folder: Path) -> list[str]:
    """Return the command of a step, which writes its results to `folder`."""
    _, seconds, module, arguments = STEPS[name]
    python = [sys.executable, "-m", module]
    if module == "pytest":
        # Verbose, so that the outcome of each test is known if time runs out.
        return [
            *python,
            "-v",
            "-raP",
            "-p",
            "no:cacheprovider",
            "--continue-on-collection-errors",
            *arguments,
        ]
    if module == "benchmarks.counters":
        sections = [f"--section={section}" for section in NCU_SECTIONS]
        return [*NCU, str(folder / f"{name}.csv"), *sections, *python]
    source = str(DATA) if DATA.exists() else ""
    if module == "benchmarks.step":
        arguments = ["recipes/dino.yaml", f"data.source={source}", *arguments]
    if module == "benchmarks.loaders" and source:
        arguments = ["--source", source]
    # No measurement starts in the last third of the time, because compilation may take that long.
    limits = ["--short", "--limit", str(2 * seconds // 3)]
    return [*python, *limits, "--out", str(folder / f"{name}-cuda.json"), *arguments]


def run(name: str, folder: Path) -> str:
    """Run a step and return its outcome."""
    log, start, code = folder / f"{name}.log", time.monotonic(), None
    with log.open("w", encoding="utf-8") as output:
        words = command(name, folder)
        print(*words, file=output, flush=True)
        try:
            process = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            code = process.wait(STEPS[name].seconds)
        except subprocess.TimeoutExpired:
            pass
        except FileNotFoundError:
            print(f"{words[0]} is not installed", file=output, flush=True)
            code = 1
        end_children()
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    last = next((line for line in reversed(lines) if line.strip()), "")
    if code is None:
        outcome = "out of time"
    elif code == 0:
        outcome = "passed"
    else:
        missing = any(phrase in last for phrase in ("No module named", "is not installed"))
        outcome = "skipped" if missing else "failed"
    if outcome in ("failed", "out of time"):
        print(*lines[-20:], sep="\n")
    return f"{outcome}: {name}, {time.monotonic() - start:.0f} s ({last})"


def end_children(seconds: float = 10) -> None:
    """End the processes that a step has left running, whatever their process group, and wait for their end.

    Waiting has a limit, because a process may hang in the driver.
    """
    deadline = time.monotonic() + seconds
    with suppress(ChildProcessError):
        while time.monotonic() < deadline:
            for status in Path("/proc").glob("[0-9]*/stat"):
                with suppress(OSError):
                    parent = status.read_text(encoding="utf-8").rpartition(")")[2].split()[1]
                    if int(parent) == os.getpid():
                        os.kill(int(status.parent.name), signal.SIGKILL)
            os.waitpid(-1, os.WNOHANG)
            time.sleep(0.05)


def pack(folder: Path, archive: Path) -> None:
    """Replace `archive` by one with the files in `folder`."""
    partial = shutil.make_archive(str(archive.with_name(".results")), "gztar", folder)
    os.replace(partial, archive)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results")
    parser.add_argument(
        "steps", nargs="*", metavar="STEP", help=f"{', '.join(STEPS)}; or the number of a part (default: all)"
    )
    args = parser.parse_args(arguments)
    names = [name for given in args.steps for name in PARTS.get(given, [given])] or list(STEPS)
    for name in names:
        if name not in STEPS:
            parser.error(f"{name!r} is not a step. Expected {', '.join(STEPS)}, or a part from 1 to 3")
    has_gpu = f"import sys, torch; sys.exit(0 if torch.cuda.is_available() else {NO_GPU})"
    checked = subprocess.run([sys.executable, "-c", has_gpu], stderr=subprocess.PIPE, text=True)
    if checked.returncode not in (0, NO_GPU):
        reason = (checked.stderr.splitlines() or [f"exit code {checked.returncode}"])[-1]
        print(
            f"gpu_check: {sys.executable} cannot import PyTorch ({reason}); pass an interpreter that can: "
            f"make gpu-check PYTHON=PATH",
            file=sys.stderr,
        )
        return 2
    # PyTorch warns here of a driver that is too old, for example.
    sys.stderr.write(checked.stderr)
    if checked.returncode == NO_GPU:
        print("skipped: no CUDA GPU is available to PyTorch")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    archive, summary = args.out / "results.tar.gz", args.out / "gpu-check.txt"
    # Processes whose parent has ended become children of this one, so that none outlives its step.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    good = True
    with tempfile.TemporaryDirectory() as temporary:
        # Make the project importable without installing it, including `kernels/` under its import name.
        folder, importable = Path(temporary, "results"), Path(temporary, "import")
        folder.mkdir()
        importable.mkdir()
        (importable / "fasttrain_kernels").symlink_to(ROOT / "kernels")
        paths = [str(ROOT), str(importable), os.environ.get("PYTHONPATH", "")]
        os.environ |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        if archive.exists():
            shutil.unpack_archive(archive, folder)
        for name in names:
            line = run(name, folder)
            print(line, flush=True)
            with summary.open("a", encoding="utf-8") as file:
                print(line, file=file)
            pack(folder, archive)
            if archive.stat().st_size > MOST_BYTES:
                # The trace is the only large file.
                for trace in folder.glob("*.trace.json"):
                    trace.unlink()
                pack(folder, archive)
            good &= line.startswith(("passed", "skipped"))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
