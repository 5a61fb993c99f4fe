"""Shared by the parts of the harness: running a command in a process of its own, and comparing folders."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# One thread, so that sums are computed in the same order in every run.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
FASTTRAIN = [sys.executable, "-m", "fasttrain"]


class Ended(NamedTuple):
    """How a command ended."""

    code: int | None
    """Exit code; negative: the signal that ended it; None: it was still running after the time limit."""
    output: str
    """stdout and stderr together."""

    @property
    def is_clean_refusal(self) -> bool:
        """Whether it ended with exit code 2 and a message of fasttrain, without a traceback."""
        lines = self.output.strip().splitlines() or [""]
        return self.code == 2 and lines[-1].startswith("fasttrain: ") and "Traceback" not in self.output


def run(
    command: list[str],
    *,
    seconds: float,
    environment: dict[str, str] | None = None,
    folder: Path | None = None,
    meanwhile: Callable[[subprocess.Popen[str]], None] | None = None,
) -> Ended:
    """Run a command in a process group of its own; kill the whole group after `seconds`.

    `meanwhile` is called once the command has started, such as to send it a signal after some time.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=ENVIRONMENT | (environment or {}),
        cwd=folder,
        start_new_session=True,
    )
    try:
        if meanwhile is not None:
            meanwhile(process)
        output, _ = process.communicate(timeout=seconds)
        return Ended(process.returncode, output)
    except subprocess.TimeoutExpired:
        kill_group(process)
        output, _ = process.communicate()
        return Ended(None, output)
    finally:
        kill_group(process)


def kill_group(process: subprocess.Popen[str]) -> None:
    """Kill a process and its descendants with SIGKILL."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def digests(folder: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    """Hash the files in a folder that match one of the patterns; the keys are relative paths."""
    paths = sorted({path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()})
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
