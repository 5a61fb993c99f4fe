"""What the compiler makes of each kernel: registers, spills, shared memory, tensor-core instructions.

    python -m benchmarks.kernels --compile-only      writes results/kernels_compile.json

Needs no GPU: every launcher runs on tensors without data with its kernels replaced by recorders, and what
would have been launched is compiled with the options of the launch. Registers and stack are ptxas's, from
the binary.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fasttrain_kernels import affinity, cycle, cycle_streaming, epilogue

ARCHITECTURES = (80, 90, 100)
WIDTHS = (384, 768, 1024)
MODULES = (affinity, cycle, cycle_streaming, epilogue)
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
COMPILER_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Recorder:
    """Stands in for a kernel, and keeps the arguments of each launch."""

    def __init__(self, kernel: Any, launches: list[dict[str, Any]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.launches.append(
                {"kernel": self.kernel, "grid": grid, "arguments": arguments, "options": options}
            )

        return launch


@contextmanager
def recorded(architecture: int) -> Iterator[list[dict[str, Any]]]:
    """The launches that the block would make on a GPU of sm_`architecture`; none of them runs."""
    launches: list[dict[str, Any]] = []
    kernels = [(module, name) for module in MODULES for name in vars(module) if name.endswith("_kernel")]
    originals = [(module, name, getattr(module, name)) for module, name in kernels]
    try:
        for module, name, kernel in originals:
            setattr(module, name, Recorder(kernel, launches))
        with patch.object(cycle_streaming, "compute_capability", lambda device: divmod(architecture, 10)):
            yield launches
    finally:
        for module, name, kernel in originals:
            setattr(module, name, kernel)


def compile_launch(launch: dict[str, Any], architecture: int) -> Any:
    """Compile for sm_`architecture` with the specialisation Triton would choose for these arguments."""
    kernel, options = launch["kernel"], dict(launch["options"])
    compiler = {name: options.pop(name) for name in COMPILER_OPTIONS if name in options}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        arguments = launch["arguments"]
        value = arguments[index] if index < len(arguments) else options[name]
        if kernel.params[index].is_constexpr or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, Tensor) or (signature[name] == "i32" and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=compiler)


def resources(compiled: Any) -> dict[str, Any]:
    """Figures of one compiled kernel; `spill_bytes` is the stack that a thread needs beyond its registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [os.fspath(CUOBJDUMP), "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no registers: {usage!r}")
    ptx = compiled.asm["ptx"]
    tensor_cores = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync"}
    return {
        "registers": int(found[1]),
        "spill_bytes": int(found[2]),
        "shared_bytes": compiled.metadata.shared,
        "tensor_cores": next((name for name, opcode in tensor_cores.items() if opcode in ptx), None),
    }


def launches_at(channels: int, dtype: torch.dtype, architecture: int) -> dict[str, list[dict[str, Any]]]:
    """What the library launches for 128 samples of 14 x 14 tokens, and of 37 x 37 for the streaming form."""
    device = {"device": "meta"}
    tokens = torch.empty(128, 3, 196, channels, dtype=dtype, **device)
    head = epilogue.HeadParameters(*(torch.empty(channels, **device) for _ in range(3)), 1e-5, True)
    cells, scalar = epilogue.Cells((14, 14), (2, 2)), torch.empty((), **device)
    pooled_dtype = epilogue.pooled_dtype(dtype)
    pooled, many = (torch.empty(128, 3, m, channels, dtype=pooled_dtype, **device) for m in (49, 324))
    forward = {"kl": True, "pool": True, "term_scale": 1.0, "statistics": True}
    scales = {"kl": True, "term_scale": 1.0, "pooled_scale": 1.0}
    statistics = torch.empty(epilogue.statistics_shape(tokens, True), **device)
    cases: dict[str, list[dict[str, Any]]] = {}
    for name, call in {
        "head forward": lambda: epilogue.launch_forward(tokens, tokens, head, cells, **forward),
        "head backward": lambda: epilogue.launch_backward(
            tokens, tokens, head, cells, statistics, scalar, scalar, pooled, **scales
        ),
        "tokens forward": lambda: epilogue.launch_forward(tokens, tokens, None, cells, **forward),
        "tokens backward": lambda: epilogue.launch_backward(
            tokens, tokens, None, cells, statistics, scalar, scalar, pooled, **scales
        ),
        "cycle": lambda: cycle.launch_cycle(pooled, 0.03, grad_dtype=pooled_dtype, diagnostics=False),
        "cycle diagnostics": lambda: cycle.launch_cycle(pooled, 0.03, grad_dtype=None, diagnostics=True),
        "affinity": lambda: affinity.launch_affinity(many[:, 0], many[:, 1], 0.03),
        "streaming": lambda: cycle_streaming.launch_streaming(
            many, 0.03, grad_dtype=pooled_dtype, diagnostics=True
        ),
    }.items():
        with recorded(architecture) as launches:
            call()
        cases[name] = launches
    return cases


def compile_table() -> list[dict[str, Any]]:
    """One row per kernel, width, dtype and architecture; fp32 at the paper's width only."""
    rows = []
    shapes = [(width, torch.bfloat16) for width in WIDTHS] + [(768, torch.float32)]
    for (channels, dtype), architecture in product(shapes, ARCHITECTURES):
        for case, launches in launches_at(channels, dtype, architecture).items():
            for launch in launches:
                rows.append(
                    {
                        "case": case,
                        "kernel": launch["kernel"].__name__.strip("_"),
                        "channels": channels,
                        "dtype": str(dtype).removeprefix("torch."),
                        "architecture": f"sm_{architecture}",
                        "warps": launch["options"]["num_warps"],
                        **resources(compile_launch(launch, architecture)),
                    }
                )
    return rows


def triton_version() -> str:
    """The version of the Triton that compiles here."""
    return str(triton.__version__)


def markdown_table(path: Path) -> str:
    """The table of kernels/README.md: D = 768, bf16, sm_90, by the newest Triton that the file knows."""
    tables = json.loads(path.read_text(encoding="utf-8"))["triton"]
    table = tables[max(tables, key=lambda version: [int(part) for part in version.split(".")[:2]])]
    lines = [
        "| kernel | case | warps | registers | spilled bytes | shared bytes | tensor cores |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table["kernels"]:
        if (row["channels"], row["dtype"], row["architecture"]) == (768, "bfloat16", "sm_90"):
            cells = (
                f"`{row['kernel']}`",
                row["case"],
                row["warps"],
                row["registers"],
                row["spill_bytes"],
                row["shared_bytes"],
                row["tensor_cores"] or "-",
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
