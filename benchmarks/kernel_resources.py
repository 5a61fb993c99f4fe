"""Record the registers, spills, shared memory and tensor-core instructions of the compiled kernels.

    python -m benchmarks.kernel_resources     # updates benchmarks/results/kernels_compile.json

The file has one table per version of Triton. No GPU is needed: Triton itself binds the arguments and compiles
the kernels, but its driver is replaced by one that does not run them. docs/benchmarks.md shows the results
for D = 768, bf16 and sm_90.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks.measure import RESULTS, environment
from fasttrain.files import write_json
from fasttrain_kernels import cosettle, cycle, primitives, separability
from fasttrain_kernels.separability import Epilogue

ARCHITECTURES = (80, 90, 100)
# Shared memory per block in KiB, from the CUDA programming guide. sm_86 and sm_120 are desktop GPUs.
SHARED_KIB = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}
# Channels and dtype. float32 is compiled only for the paper's number of channels.
FORMS = ((384, torch.bfloat16), (768, torch.bfloat16), (1024, torch.bfloat16), (768, torch.float32))
TENSOR_CORES = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync"}


class Launch(NamedTuple):
    """A launch of a compiled kernel."""

    kernel: Any
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return str(self.kernel.metadata.name).strip("_")


class _Driver:
    """A driver of Triton for a GPU of 132 multiprocessors, like an H100, that loads and runs nothing."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        # Triton caches compiled kernels per device.
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"multiprocessor_count": 132, "max_shared_mem": 1024 * SHARED_KIB[self.architecture]}

    def load_binary(self, name: str, binary: bytes, *_: Any) -> tuple[int, int, int, int, int]:
        """Return module, function, registers, spilled bytes, and the most threads per block."""
        return 1, 1, *_registers_and_spills(binary), 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *_: None


@contextmanager
def pretended_gpu(architecture: int) -> Iterator[list[Launch]]:
    """Pretend that tensors on the CPU or the meta device are on a GPU; yield the list of launches.

    The kernels are compiled for sm_`architecture` but not run, so the contents of all results are undefined.
    """
    launches: list[Launch] = []
    run = JITFunction.run

    def record(self: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=warmup, **options)
        if not warmup:
            launches.append(Launch(kernel, grid))
        return kernel

    # The driver stays replaced: without a GPU, Triton has no other.
    triton.runtime.driver.set_active(_Driver(architecture))
    with (
        patch.object(JITFunction, "run", record),
        patch.object(primitives, "compute_capability", lambda device: divmod(architecture, 10)),
    ):
        yield launches


def _registers_and_spills(binary: bytes) -> tuple[int, int]:
    """Return the registers and the bytes of stack per thread of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    return int(registers), int(stack)


def launches_at(
    channels: int, dtype: torch.dtype, architecture: int, only: str = "", samples: int = 128
) -> dict[str, list[Launch]]:
    """Launch the kernels of each case, at the paper's grid or with 324 tokens per view.

    `only` is a regular expression that selects cases by name.
    """
    device = {"device": "meta"}
    tokens = torch.empty(samples, 3, 196, channels, dtype=dtype, **device)
    parameter, grid = torch.empty(channels, **device), (14, 14, 2, 2)
    with_head = Epilogue(tokens, tokens, *[parameter] * 3, None, None, 1e-5, True, *grid, kl=True)
    bare = Epilogue(tokens, tokens, *[None] * 5, 0.0, False, *grid, kl=True)
    pooled_dtype = separability.pooled_dtype(dtype)
    pooled, many = (torch.empty(samples, 3, m, channels, dtype=pooled_dtype, **device) for m in (49, 324))
    statistics = torch.empty(separability.statistics_shape(tokens, True), **device)
    gradients = {"grad_loss": torch.empty((), **device), "lambda_reg": 3.0, "grad_pooled_BTMD": pooled}
    terms, rows = torch.empty(samples, 3, 49, **device), torch.empty(samples, 49, **device)
    losses = [torch.empty((), **device) for _ in range(3)]
    cases = {
        "head forward": lambda: separability.launch_forward(with_head, pool=True, statistics=True),
        "head backward": lambda: separability.launch_backward(with_head, statistics, None, **gradients),
        "tokens forward": lambda: separability.launch_forward(bare, pool=True, statistics=True),
        "tokens backward": lambda: separability.launch_backward(bare, statistics, None, **gradients),
        "cycle": lambda: cycle.launch_cycle(pooled, None, 0.03, grad=True),
        "sum": lambda: cosettle.launch_sum(terms, rows, losses, 3.0),
        "streaming": lambda: cycle.launch_cycle(many, None, 0.03, grad=True),
    }
    recorded = {}
    for name, launch in cases.items():
        if re.search(only, name):
            with pretended_gpu(architecture) as recorded[name]:
                launch()
    return recorded


def resources(kernel: Any) -> dict[str, Any]:
    """Return the resources of a compiled kernel; `spill_bytes` is the stack per thread."""
    registers, spill_bytes = _registers_and_spills(kernel.asm["cubin"])
    return {
        "warps": kernel.metadata.num_warps,
        "registers": registers,
        "spill_bytes": spill_bytes,
        "shared_bytes": kernel.metadata.shared,
        "tensor_cores": next(
            (name for name, code in TENSOR_CORES.items() if code in kernel.asm["ptx"]), None
        ),
    }


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_resources",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    rows = [
        {
            "case": case,
            "kernel": name,
            "channels": channels,
            "dtype": str(dtype).removeprefix("torch."),
            "architecture": f"sm_{architecture}",
            **resources(kernel),
        }
        for (channels, dtype), architecture in product(FORMS, ARCHITECTURES)
        for case, launches in launches_at(channels, dtype, architecture).items()
        for name, kernel in {launch.name: launch.kernel for launch in launches}.items()
    ]
    path = RESULTS / "kernels_compile.json"
    # Keep the results of other Triton versions.
    tables = json.loads(path.read_text(encoding="utf-8"))["triton"]
    tables[triton.__version__] = {"environment": environment(), "kernels": rows}
    write_json(path, {"triton": dict(sorted(tables.items()))})
    print(path)


if __name__ == "__main__":
    main()
