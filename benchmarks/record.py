"""What every benchmark writes beside its figures: where, with what, and at which commit they were taken.

Used by the scripts of this folder only. Plots are drawn from the written JSON files, never from live numbers.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "timm",
    "av",
    "numpy",
    "torchcodec",
    "decord",
)


def environment() -> dict[str, Any]:
    """The machine and the software: `device`, `cpu`, `versions`, `commit` and `date` (UTC, ISO 8601).

    `device` is the name of the current CUDA device, or None where there is none. `commit` ends in `-dirty`
    when tracked files differ from it; outside a git checkout it is what FASTTRAIN_COMMIT says, or None.
    """
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **_package_versions()},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def write_results(path: str | os.PathLike[str], payload: dict[str, Any]) -> Path:
    """Write `payload` as indented JSON, atomically: a reader sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(payload, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _commit() -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        # A copy of the files alone, as on a machine that only lends its GPU, or no git there.
        return os.environ.get("FASTTRAIN_COMMIT")
