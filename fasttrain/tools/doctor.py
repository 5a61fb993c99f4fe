"""List the components that fasttrain uses, whether they are installed, and what each missing one affects."""

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

from fasttrain.errors import InputError, pip_install
from fasttrain.launcher import available_cores

DALI = (
    "Pillow and PyTorch load the training data, which takes more CPU time, and data.decoder=mixed is not "
    f"available; {pip_install('cuda12', 'cuda13')} (Linux)"
)
PYAV = "video files cannot be read or written; frame folders and packed sets can; pip install av"
NVJPEG = "data.decoder=mixed decodes JPEG on the CPU; pip install nvidia-nvjpeg-cu12"
COMPILER = (
    "Triton and torch.compile do not work on a GPU; install gcc and the Python headers (python3-dev), or set "
    "objective.backend=eager encoder.compile=none"
)
EVAL = f"no evaluation, reports or learning curves; {pip_install('eval')}"
APEX = (
    "optimizer.name=apex_fused_adam and apex_fused_lamb are not available; build NVIDIA Apex from its "
    "repository with --cuda_ext (`apex` on PyPI is an unrelated project)"
)
TENSORBOARD = f"no TensorBoard events; {pip_install('tensorboard')}"
ONNX = f"no export to ONNX; {pip_install('onnx')}"


class Component(NamedTuple):
    """A component that fasttrain uses. `detected` is None if it is missing."""

    name: str
    detected: str | None
    consequence: str = ""
    required: bool = False


def run(arguments: argparse.Namespace) -> None:
    components = check_machine()
    table = Table(title="fasttrain doctor")
    for column in ("status", "component", "detected", "if missing"):
        table.add_column(column, overflow="fold")
    for name, detected, consequence, required in components:
        absent = "[red]required[/]" if required else "[yellow]missing[/]"
        status = "[green]ok[/]" if detected else absent
        table.add_row(status, name, detected or "-", "" if detected else consequence)
    Console().print(table)
    missing = [name for name, detected, _, required in components if required and not detected]
    if missing:
        raise InputError(
            f"required components are missing: {', '.join(missing)}. Install them with: "
            f"{pip_install('cuda12', 'cuda13')}"
        )


def check_machine() -> list[Component]:
    """Return all components, in the order in which a training run needs them."""
    # NVIDIA Apex has this compiled extension, but the unrelated project `apex` on PyPI does not.
    apex = _version("apex") if importlib.util.find_spec("amp_C") else None
    return [
        Component("Python", platform.python_version(), required=True),
        Component("CPU cores", str(available_cores())),
        Component("torch", _version("torch"), "nothing works", required=True),
        Component("GPU", _gpu(), "training runs on the CPU, which is practical for small models only"),
        Component("NVDEC", _nvdec(), "videos are packed on the CPU"),
        Component("DALI", _version("nvidia-dali-cuda120", "nvidia-dali-cuda130"), DALI),
        Component("nvJPEG", _version("nvidia-nvjpeg-cu12", "nvidia-nvjpeg"), NVJPEG),
        Component("PyAV", _version("av"), PYAV),
        Component("Triton", _version("triton"), "the losses run in eager PyTorch, which is slower"),
        Component("C compiler", _compiler(), COMPILER),
        Component("timm", _version("timm"), "backbones cannot be built", required=True),
        Component("Matplotlib", _version("matplotlib"), EVAL),
        Component("SciPy", _version("scipy"), EVAL),
        Component("NVIDIA Apex", apex, APEX),
        Component("TensorBoard", _version("tensorboard"), TENSORBOARD),
        Component("ONNX Runtime", _version("onnxruntime"), ONNX),
    ]


def _version(*distributions: str) -> str | None:
    """Return the version of the first distribution that is installed, with its name if there are several."""
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
    # Imported on demand, because torch is loaded first.
    from fasttrain.data.nvdec import has_nvdec

    return "libnvcuvid.so.1" if has_nvdec() else None


def _compiler() -> str | None:
    """Return the C compiler that Triton uses, or None if it or the Python headers are missing."""
    if not Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h").is_file():
        return None
    chosen = os.environ.get("CC")
    return next(filter(None, map(shutil.which, [chosen] if chosen else ["gcc", "clang"])), None)
