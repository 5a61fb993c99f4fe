"""Tests of the launchers with Triton's own binder and compiler, in a process without Triton's interpreter.

Triton compiles the kernels for a GPU, but its driver is replaced by one that does not run them.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fasttrain_kernels
from tests.kernels.test_operators import run_python

FOLDER = Path(fasttrain_kernels.__file__).parent
# Runs the programs on stdin, one JSON string a line.
SERVER = "import json, sys\nfor line in sys.stdin: exec(json.loads(line), {}); sys.stdout.flush()"


@pytest.fixture(scope="module")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """Run a program that prints a line of JSON, and return the value."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("launches")
    (folder / "fasttrain_kernels").symlink_to(FOLDER)
    environment = {"PATH": "", "HOME": str(folder), "PYTHONPATH": f"{folder}:{FOLDER.parent}"}
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(code: str) -> Any:
            print(json.dumps(code), file=process.stdin, flush=True)
            printed = process.stdout.readline()
            assert printed, "the program failed; its traceback is in the output"
            return json.loads(printed)

        yield run


def test_a_step_launches_few_kernels_and_compiles_them_once(in_process: Any) -> None:
    """Triton compiles a kernel again if an argument that it specialises is 1 or becomes divisible by 16."""
    code = """
import json, torch
from unittest.mock import patch
from benchmarks.kernel_resources import pretended_gpu
from fasttrain_kernels import cosettle_head_loss, runtime

def step(batch, tokens, window, masked=False):
    grid = (tokens // 14, 14)
    frozen, linear = torch.zeros(2, batch, 3, tokens, 64, dtype=torch.bfloat16)
    head = [torch.zeros(64, requires_grad=True) for _ in range(3)]
    options = {"window": window, "backend": "triton", "diagnostics": False}
    if masked:
        options["mask"] = torch.ones(batch, tokens, dtype=torch.bool)
    with pretended_gpu(90) as launches:
        cosettle_head_loss(frozen, linear.requires_grad_(), *head, grid, **options).loss.backward()
    return launches

with patch.object(runtime, "_is_supported", lambda device: True):
    fused = [step(batch, 196, 2) for batch in (1, 8, 16, 17)]
    streaming = [step(batch, 196, 1) for batch in (1, 300)]
    masked = [step(batch, 196, window, masked=True) for window in (2, 1) for batch in (1, 16, 17)]
names = [[launch.name for launch in launches] for launches in fused]
kernels = [[id(launch.kernel) for launch in launches] for launches in fused]
print(json.dumps({
    "fused": names[0],
    "same names": len(set(map(tuple, names))),
    "same kernels": len(set(map(tuple, kernels))),
    "streaming": [l.name for l in streaming[0]],
    "groups": [l.grid for l in streaming[1] if l.name == "bracket_kernel"],
    "all kernels": len({id(l.kernel) for launches in streaming for l in launches}),
    "masked": [[l.name for l in launches] for launches in masked] == 3 * [names[0]] + 3 * [
        [l.name for l in streaming[0]]
    ],
    "masked kernels": len({id(l.kernel) for launches in masked for l in launches if l.name != "sum_kernel"}),
}))
"""
    assert in_process(code) == {
        "fused": ["forward_kernel", "cycle_kernel", "sum_kernel", "backward_kernel"],
        "same names": 1,
        "same kernels": 1,
        "streaming": [
            *("forward_kernel", "back_sums_kernel", "return_kernel", "through_kernel"),
            *("bracket_kernel", "sum_kernel", "backward_kernel"),
        ],
        # 16 tiles of 64 x 64 a sample, and 205 samples a group.
        "groups": [[3280], [1520]],
        "all kernels": 7,
        "masked": True,
        # Windows of two sizes have kernels of their own in both directions.
        "masked kernels": 9,
    }


def test_persistent_programs_fit_on_the_gpu_at_once(in_process: Any) -> None:
    """A multiprocessor has four partitions of 16,384 registers, which warps take in units of 8 per thread."""
    code = """
import json, torch
from benchmarks.kernel_resources import launches_at, resources
rows = []
for channels in (1024,):
    for launches in launches_at(channels, torch.bfloat16, 90, only="head").values():
        used = resources(launches[0].kernel)
        rows.append([launches[0].grid[0], used["registers"], used["warps"]])
print(json.dumps(rows))
"""
    for programs, registers, warps in in_process(code):
        warps_at_once = programs // 132 * warps
        of_partition = -(-warps_at_once // 4)
        allocated = -(-registers // 8) * 8 * 32
        assert programs % 132 == 0
        assert of_partition * allocated <= 16384
        # One more program a multiprocessor would not fit.
        assert programs == 32 * 132 or (warps_at_once + warps) > 4 * (16384 // allocated)


@pytest.mark.parametrize(
    ("architecture", "cores"),
    [
        pytest.param(80, "mma", marks=pytest.mark.slow),
        pytest.param(86, "mma", marks=pytest.mark.slow),
        (90, "wgmma"),
        pytest.param(100, "tcgen05", marks=pytest.mark.slow),
        pytest.param(120, "mma", marks=pytest.mark.slow),
    ],
)
def test_kernels_fit_without_spilling_at_the_papers_shape(
    in_process: Any, architecture: int, cores: str
) -> None:
    """Triton itself raises an error if a kernel needs more shared memory than the GPU has."""
    code = f"""
import json, torch
from benchmarks.kernel_resources import launches_at, resources
rows = {{}}
for name, launches in launches_at(768, torch.bfloat16, {architecture}, only="head|cycle$|sum").items():
    for launch in launches:
        used = resources(launch.kernel)
        rows[name] = [used["spill_bytes"], used["tensor_cores"]]
print(json.dumps(rows))
"""
    assert in_process(code) == {
        "head forward": [0, None],
        "head backward": [0, None],
        "cycle": [0, cores],
        "sum": [0, None],
    }


def test_masked_kernels_fit_without_spilling_at_the_papers_shape(in_process: Any) -> None:
    code = """
import json, torch
from unittest.mock import patch
from benchmarks.kernel_resources import pretended_gpu, resources
from fasttrain_kernels import cosettle_head_loss, runtime

frozen, linear = torch.zeros(2, 1, 3, 196, 768, dtype=torch.bfloat16)
head = [torch.zeros(768, requires_grad=True) for _ in range(3)]
options = {"mask": torch.ones(1, 196, dtype=torch.bool), "backend": "triton", "diagnostics": False}
with patch.object(runtime, "_is_supported", lambda device: True), pretended_gpu(90) as launches:
    cosettle_head_loss(frozen, linear.requires_grad_(), *head, (14, 14), **options).loss.backward()
print(json.dumps({launch.name: resources(launch.kernel)["spill_bytes"] for launch in launches}))
"""
    names = ("forward_kernel", "cycle_kernel", "sum_kernel", "backward_kernel")
    assert in_process(code) == dict.fromkeys(names, 0)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 86, 90, 100, 120])
@pytest.mark.parametrize(
    ("channels", "dtype"), [(48, "bfloat16"), (384, "float16"), (1024, "bfloat16"), (1536, "float32")]
)
def test_every_launcher_compiles(in_process: Any, architecture: int, channels: int, dtype: str) -> None:
    code = f"""
import json, torch
from benchmarks.kernel_resources import launches_at
launches = launches_at({channels}, torch.{dtype}, {architecture}, samples=3)
print(json.dumps([name for name, recorded in launches.items() if not recorded]))
"""
    assert in_process(code) == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gfx90a", "gfx942"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_launcher_compiles_for_amd(tmp_path: Path, architecture: str, dtype: str) -> None:
    """As in PyTorch for ROCm, in a process of its own. Blocks have up to 64 KiB of shared memory."""
    pytest.importorskip("triton")
    (tmp_path / "fasttrain_kernels").symlink_to(FOLDER)
    code = f"""
import json, torch
torch.version.hip = "6.4"
from triton.backends.compiler import GPUTarget
from benchmarks import kernel_resources

class Driver(kernel_resources._Driver):
    def get_current_target(self):
        return GPUTarget("hip", "{architecture}", 64)

    def get_device_properties(self, device):
        return {{"multiprocessor_count": 304, "max_shared_mem": 65536}}

    def load_binary(self, name, binary, *_):
        return 1, 1, 128, 0, 1024

kernel_resources._Driver = Driver
launches = kernel_resources.launches_at(768, torch.{dtype}, 90, samples=3)
print(json.dumps([[name, "hsaco" in one.kernel.asm] for name, each in launches.items() for one in each]))
"""
    rows = json.loads(run_python(code, tmp_path, FOLDER.parent))
    assert {name for name, _ in rows} >= {"head forward", "head backward", "cycle", "sum", "streaming"}
    assert all(compiled for _, compiled in rows)
