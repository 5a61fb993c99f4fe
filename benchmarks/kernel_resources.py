"""Record the registers, spills, shared memory and tensor-core instructions of the compiled kernels.

    python -m benchmarks.kernel_resources     # updates benchmarks/results/kernels_compile.json

The file has one table per version of Triton. No GPU is needed: the launchers run on meta tensors, and Triton
compiles the kernels without running them. docs/benchmarks.md shows the results for D = 768, bf16 and sm_90.
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
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks.measure import RESULTS, environment
from fasttrain.files import write_json
from fasttrain_kernels import affinity, cycle, primitives, separability
from fasttrain_kernels.separability import Epilogue

ARCHITECTURES = (80, 90, 100)
# Channels and dtype. float32 is compiled only for the paper's number of channels.
FORMS = ((384, torch.bfloat16), (768, torch.bfloat16), (1024, torch.bfloat16), (768, torch.float32))
TENSOR_CORES = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync"}


@contextmanager
def compiled_only(architecture: int) -> Iterator[list[Any]]:
    """Yield a list of the kernels that the block launches, compiled for sm_`architecture` but not run."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(run(self, *arguments, grid=grid, warmup=True, **options))

    # Triton queries the driver before it compiles, so replace it. Triton also caches compiled kernels per
    # device, so use the architecture as the device index.
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", architecture, 32),
        get_current_device=lambda: architecture,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)
    with (
        patch.object(JITFunction, "run", compile_only),
        patch.object(primitives, "compute_capability", lambda device: divmod(architecture, 10)),
    ):
        yield compiled


def compiled_at(channels: int, dtype: torch.dtype, architecture: int, only: str = "") -> dict[str, list[Any]]:
    """Compile the kernels of each case for 128 samples, at the paper's grid or with 324 tokens per view.

    `only` is a regular expression that selects cases by name.
    """
    device = {"device": "meta"}
    tokens = torch.empty(128, 3, 196, channels, dtype=dtype, **device)
    parameter, grid = torch.empty(channels, **device), (14, 14, 2, 2)
    with_head = Epilogue(tokens, tokens, parameter, parameter, parameter, 1e-5, True, *grid, kl=True)
    bare = Epilogue(tokens, tokens, None, None, None, 0.0, False, *grid, kl=True)
    pooled_dtype = separability.pooled_dtype(dtype)
    pooled, many = (torch.empty(128, 3, m, channels, dtype=pooled_dtype, **device) for m in (49, 324))
    statistics = torch.empty(separability.statistics_shape(tokens, True), **device)
    gradients = (statistics, torch.empty((), **device), torch.empty((), **device), pooled, 1.0)
    cases = {
        "head forward": lambda: separability.launch_forward(with_head, pool=True, statistics=True),
        "head backward": lambda: separability.launch_backward(with_head, *gradients),
        "tokens forward": lambda: separability.launch_forward(bare, pool=True, statistics=True),
        "tokens backward": lambda: separability.launch_backward(bare, *gradients),
        "cycle": lambda: cycle.launch_cycle(pooled, 0.03, grad_dtype=pooled_dtype, diagnostics=False),
        "cycle diagnostics": lambda: cycle.launch_cycle(pooled, 0.03, grad_dtype=None, diagnostics=True),
        "affinity": lambda: affinity.launch_affinity(many[:, 0], many[:, 1], 0.03),
        "streaming": lambda: cycle.launch_cycle(many, 0.03, grad_dtype=pooled_dtype, diagnostics=True),
    }
    compiled = {}
    for name, launch in cases.items():
        if re.search(only, name):
            with compiled_only(architecture) as compiled[name]:
                launch()
    return compiled


def resources(compiled: Any) -> dict[str, Any]:
    """Read the resources of a compiled kernel; `spill_bytes` is the stack per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    ptx = compiled.asm["ptx"]
    return {
        "warps": compiled.metadata.num_warps,
        "registers": int(registers),
        "spill_bytes": int(stack),
        "shared_bytes": compiled.metadata.shared,
        "tensor_cores": next((name for name, opcode in TENSOR_CORES.items() if opcode in ptx), None),
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
            "kernel": kernel.metadata.name.strip("_"),
            "channels": channels,
            "dtype": str(dtype).removeprefix("torch."),
            "architecture": f"sm_{architecture}",
            **resources(kernel),
        }
        for (channels, dtype), architecture in product(FORMS, ARCHITECTURES)
        for case, kernels in compiled_at(channels, dtype, architecture).items()
        for kernel in kernels
    ]
    path = RESULTS / "kernels_compile.json"
    # Keep the results of other Triton versions.
    tables = json.loads(path.read_text(encoding="utf-8"))["triton"]
    tables[triton.__version__] = {"environment": environment(), "kernels": rows}
    write_json(path, {"triton": dict(sorted(tables.items()))})
    print(path)


if __name__ == "__main__":
    main()
