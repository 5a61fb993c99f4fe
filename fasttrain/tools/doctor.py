"""Say what this machine has, what it lacks, and what each missing thing costs."""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fasttrain.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that fasttrain can use."""

    name: str
    found: str | None
    """What is there, with its version; None where it is missing."""
    cost: str
    """What it costs that this is missing."""
    required: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments: the machine is the input."""


def run(arguments: argparse.Namespace) -> None:
    findings = examine()
    table = Table(title="fasttrain doctor", show_lines=False)
    for column in ("", "part", "found", "what it costs that it is missing"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        mark = (
            "[green]ok[/]"
            if finding.found
            else "[red]missing[/]"
            if finding.required
            else "[yellow]absent[/]"
        )
        table.add_row(mark, finding.name, finding.found or "-", "" if finding.found else finding.cost)
    Console().print(table)
    missing = [finding.name for finding in findings if finding.required and not finding.found]
    if missing:
        raise InputError(
            f"cannot train without {', '.join(missing)}; install the project again: make install"
        )


def examine() -> list[Finding]:
    """All findings, in the order in which a training run needs them."""
    return [
        Finding(name="Python", found=platform.python_version(), cost="", required=True),
        Finding(name="CPU cores", found=str(len(os.sched_getaffinity(0))), cost=""),
        Finding(name="torch", found=_version("torch"), cost="nothing runs", required=True),
        Finding(name="GPU", found=_gpu(), cost="training runs on the CPU, with small models only"),
        Finding(
            name="NVDEC",
            found=_library("libnvcuvid.so.1"),
            cost="raw H.264 and H.265 are decoded on the CPU by PyAV; pack the frames once instead",
        ),
        Finding(
            name="DALI",
            found=_first_version("nvidia-dali-cuda120", "nvidia-dali-cuda130"),
            cost="no frames can be loaded: pip install nvidia-dali-cuda120",
            required=True,
        ),
        Finding(
            name="nvJPEG",
            found=_first_version("nvidia-nvjpeg-cu12", "nvidia-nvjpeg"),
            cost="data.decoder=mixed decodes JPEGs on the CPU all the same: pip install nvidia-nvjpeg-cu12",
        ),
        Finding(
            name="PyAV",
            found=_version("av"),
            cost="videos cannot be indexed, nor decoded on the CPU: pip install av",
            required=True,
        ),
        Finding(
            name="Triton",
            found=_version("triton"),
            cost="the losses run in eager PyTorch: several times slower, and memory grows with N squared",
        ),
        Finding(
            name="C compiler",
            found=_compiler(),
            cost="on a GPU neither Triton nor torch.compile can start: install gcc and Python's headers "
            "(python3-dev), or set objective.backend=eager encoder.compile=none",
        ),
        Finding(name="timm", found=_version("timm"), cost="no backbone can be built", required=True),
        Finding(
            name="Hugging Face Hub",
            found=_version("huggingface_hub"),
            cost="no backbone can be built: timm needs it",
            required=True,
        ),
        *(
            Finding(
                name=name,
                found=_version(name.lower()),
                cost="no learning curves at a run's end, no evaluation, no report",
                required=True,
            )
            for name in ("Matplotlib", "SciPy")
        ),
        Finding(name="NVIDIA Apex", found=_apex(), cost=_apex_cost()),
        Finding(name="TensorBoard", found=_version("tensorboard"), cost="set train.tensorboard=false"),
    ]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_version(*distributions: str) -> str | None:
    found = (f"{name} {version}" for name in distributions if (version := _version(name)))
    return next(found, None)


def _gpu() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    names = []
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        names.append(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}")
    return f"{'; '.join(names)}; CUDA {torch.version.cuda}"


def _compiler() -> str | None:
    """What Triton builds its launchers with: the compiler that it takes, and Python's headers."""
    if not Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h").is_file():
        return None
    named = os.environ.get("CC")
    paths = map(shutil.which, [named] if named else ["gcc", "clang"])
    return next(filter(None, paths), None)


def _library(name: str) -> str | None:
    try:
        ctypes.CDLL(name)
    except OSError:
        return None
    return name


def _apex() -> str | None:
    """NVIDIA's Apex, told from PyPI's project of that name by its optimisers and compiled extension."""
    if not _has_module("apex") or not _has_module("apex.optimizers") or not _has_module("amp_C"):
        return None
    return _version("apex") or "of unknown version"


def _apex_cost() -> str:
    cost = "only optimizer.name=apex_fused_adam and apex_fused_lamb; torch's fused AdamW is the default"
    if _has_module("apex") and not _has_module("apex.optimizers"):
        return f"the installed `apex` is PyPI's unrelated project (pip uninstall apex); {cost}"
    if _has_module("apex.optimizers"):
        return f"the installed Apex was built without its CUDA extensions (--cuda_ext); {cost}"
    return cost


def _has_module(name: str) -> bool:
    find: Callable[[str], object] = importlib.util.find_spec
    try:
        return find(name) is not None
    except (ImportError, AttributeError):
        # A parent that fails to import, as PyPI's `apex` does, has no such module either.
        return False
