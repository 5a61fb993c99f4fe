"""Say what this machine has, what it lacks, and what each missing thing costs."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sysconfig
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from fasttrain.errors import InputError

DALI_COST = "no frames can be loaded: pip install 'fasttrain[cuda12]', or 'fasttrain[cuda13]'"
NVJPEG_COST = "data.decoder=mixed decodes JPEGs on the CPU all the same: pip install nvidia-nvjpeg-cu12"
COMPILER_COST = (
    "on a GPU neither Triton nor torch.compile can start: install gcc and Python's headers (python3-dev), or "
    "set objective.backend=eager encoder.compile=none"
)
EVAL_COST = "no evaluation, no report, no learning curves at a run's end: pip install 'fasttrain[eval]'"
APEX_COST = (
    "only optimizer.name=apex_fused_adam and apex_fused_lamb; it is built from its repository with "
    "--cuda_ext, and PyPI's `apex` is an unrelated project; torch's fused AdamW is the default"
)
TENSORBOARD_COST = "set train.tensorboard=false, or pip install 'fasttrain[tensorboard]'"


class Finding(NamedTuple):
    """One thing that fasttrain can use; `found` is None where it is missing, which then costs `cost`."""

    name: str
    found: str | None
    cost: str = ""
    required: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments: the machine is the input."""


def run(arguments: argparse.Namespace) -> None:
    findings = examine()
    table = Table(title="fasttrain doctor")
    for column in ("", "part", "found", "what it costs that it is missing"):
        table.add_column(column, overflow="fold")
    for name, found, cost, required in findings:
        missing = "[red]missing[/]" if required else "[yellow]absent[/]"
        table.add_row("[green]ok[/]" if found else missing, name, found or "-", "" if found else cost)
    Console().print(table)
    lacking = [name for name, found, _, required in findings if required and not found]
    if lacking:
        raise InputError(
            f"cannot train without {', '.join(lacking)}; install the project again: make install"
        )


def examine() -> list[Finding]:
    """All findings, in the order in which a training run needs them."""
    # Only NVIDIA's Apex has this compiled extension; PyPI's project of that name is another.
    apex = _version("apex") if importlib.util.find_spec("amp_C") else None
    return [
        Finding("Python", platform.python_version(), required=True),
        Finding("CPU cores", str(len(os.sched_getaffinity(0)))),
        Finding("torch", _version("torch"), "nothing runs", required=True),
        Finding("GPU", _gpu(), "training runs on the CPU, with small models only"),
        Finding("NVDEC", _nvdec(), "videos are packed on the CPU"),
        Finding("DALI", _version("nvidia-dali-cuda120", "nvidia-dali-cuda130"), DALI_COST, required=True),
        Finding("nvJPEG", _version("nvidia-nvjpeg-cu12", "nvidia-nvjpeg"), NVJPEG_COST),
        Finding("PyAV", _version("av"), "videos cannot be indexed, nor decoded on the CPU", required=True),
        Finding("Triton", _version("triton"), "the losses run in eager PyTorch, slower and in more memory"),
        Finding("C compiler", _compiler(), COMPILER_COST),
        Finding("timm", _version("timm"), "no backbone can be built", required=True),
        Finding("Matplotlib", _version("matplotlib"), EVAL_COST),
        Finding("SciPy", _version("scipy"), EVAL_COST),
        Finding("NVIDIA Apex", apex, APEX_COST),
        Finding("TensorBoard", _version("tensorboard"), TENSORBOARD_COST),
    ]


def _version(*distributions: str) -> str | None:
    """The version of the first that is installed, with its name where several are asked for."""
    for name in distributions:
        with suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
            return version if len(distributions) == 1 else f"{name} {version}"
    return None


def _gpu() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    names = (f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}" for gpu in gpus)
    return f"{'; '.join(names)}; CUDA {torch.version.cuda}"


def _nvdec() -> str | None:
    if importlib.util.find_spec("av") is None:
        return None
    # Imports PyAV.
    from fasttrain.data.nvdec import has_nvdec

    return "libnvcuvid.so.1" if has_nvdec() else None


def _compiler() -> str | None:
    """What Triton builds its launchers with: the compiler that it takes, and Python's headers."""
    if not Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h").is_file():
        return None
    named = os.environ.get("CC")
    return next(filter(None, map(shutil.which, [named] if named else ["gcc", "clang"])), None)
