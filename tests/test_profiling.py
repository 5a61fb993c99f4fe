"""The summary of a profile, for synthetic events and for real recordings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain import distributed
from fasttrain.backbone_trainer import BackboneTrainer
from fasttrain.profiling import RECORDED, SKIPPED, SPANS, STEP, StepProfiler, span, summarise
from fasttrain.recipe import recipe_from_dict


def host(name: str, ts: float, dur: float, cat: str = "user_annotation", **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


def kernel(correlation: int, ts: float, dur: float) -> dict[str, Any]:
    return host("k", ts, dur, "kernel", correlation=correlation)


# A copy is launched in `data`, and two kernels in `encoder`, the first of which overlaps the copy on another
# stream. One kernel is launched in `backward` by another thread of PyTorch, one outside of all spans, and one
# by a thread of the data loader.
GPU_EVENTS = [
    host(STEP, 0, 100),
    host("data", 0, 10),
    host("encoder", 10, 20),
    host("backward", 40, 20),
    host("cudaMemcpyAsync", 5, 1, "cuda_runtime", correlation=1),
    host("cudaLaunchKernel", 12, 1, "cuda_runtime", correlation=2),
    host("cuLaunchKernelEx", 14, 1, "cuda_driver", correlation=3),
    {**host("cudaLaunchKernel", 50, 1, "cuda_runtime", correlation=4), "tid": 7},
    {**host("aten::mm", 49, 3, "cpu_op"), "tid": 7},
    {**host("cudaLaunchKernel", 55, 1, "cuda_runtime", correlation=6), "tid": 8},
    host("cudaLaunchKernel", 90, 1, "cuda_runtime", correlation=5),
    host("cudaStreamSynchronize", 95, 1, "cuda_runtime"),
    host("cudaStreamSynchronize", 195, 1, "cuda_runtime"),
    host("copy", 100, 40, "gpu_memcpy", correlation=1),
    kernel(2, 100, 50),
    kernel(3, 150, 30),
    kernel(4, 190, 10),
    kernel(5, 200, 5),
    kernel(6, 160, 30),
    {"ph": "M", "name": "process_name"},
]


def test_device_time_is_attributed_to_the_span_of_the_launch() -> None:
    summary = summarise(GPU_EVENTS)
    milliseconds = {name: row["ms"] for name, row in summary["parts"].items()}
    assert milliseconds == pytest.approx(
        dict.fromkeys(SPANS, 0.0) | {"data": 0.040, "encoder": 0.080, "backward": 0.010}
    )
    assert summary["outside_ms"] == pytest.approx(0.005)
    assert sum(row["share"] for row in summary["parts"].values()) == pytest.approx(130 / 135)
    assert summary["loader_ms"] == pytest.approx(0.030)
    # Busy from 100 to 180 and from 190 to 205; between, the loader's kernel runs.
    assert summary["busy_share"] == pytest.approx(95 / 105)
    # Waits after the step or on other threads are not counted.
    assert (summary["waits"], summary["scalar_reads"], summary["allocations"]) == (1, 0, 0)
    waiting = {**host("cudaEventSynchronize", 20, 1, "cuda_runtime", correlation=9), "tid": 2}
    assert summarise([*GPU_EVENTS, waiting])["waits"] == 1


def test_host_time_is_used_on_a_cpu() -> None:
    events = [host(STEP, 0, 100), host("encoder", 10, 60), host("aten::_local_scalar_dense", 80, 1, "cpu_op")]
    summary = summarise(events)
    assert summary["device"] == "cpu"
    assert summary["parts"]["encoder"] == pytest.approx({"ms": 0.06, "share": 0.6})
    assert summary["outside_ms"] == pytest.approx(0.04)
    assert summary["scalar_reads"] == 1


@pytest.mark.parametrize(
    ("count", "recorded"),
    [(SKIPPED + 2, 2), (SKIPPED + RECORDED + 2, RECORDED)],
)
def test_short_and_long_runs_are_recorded(count: int, recorded: int, tmp_path: Path) -> None:
    lines: list[str] = []
    with StepProfiler(tmp_path / "profile", torch.device("cpu"), lines.append) as profiler:
        for _ in range(count):
            with span(STEP), span("encoder"):
                (torch.ones(128, 128) @ torch.ones(128, 128)).sum().item()
            profiler.step()
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {"trace.json", "summary.json"}
    summary = json.loads((tmp_path / "profile" / "summary.json").read_text())
    assert (summary["steps"], summary["scalar_reads"]) == (recorded, 1)
    assert summary["parts"]["encoder"]["share"] > 0.5
    assert f"mean of {recorded}" in lines[0]


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_steps_on_a_gpu_neither_wait_nor_allocate(cuda_graph: bool, tmp_path: Path) -> None:
    """Between log steps, the host does not wait for the device, and no memory is allocated."""
    recipe = recipe_from_dict(
        {
            "device": "cuda",
            "backbone": {"name": "dino", "embed_dim": 128, "depth": 2},
            "encoder": {"compile": "none", "cuda_graph": cuda_graph},
            "data": {"image_size": 64},
            "train": {"batch_size": 4},
        }
    )
    profiler = StepProfiler(tmp_path, torch.device("cuda"), print)
    with distributed.start("cuda") as world, profiler:
        trainer = BackboneTrainer(recipe, world)
        trainer.warm_up()
        frames = torch.randn(2, 4, 3, 64, 64, device="cuda", dtype=torch.bfloat16)
        for step_index in range(SKIPPED + RECORDED):
            with span(STEP):
                trainer.forward_backward(frames, step_index, last=True, diagnostics=False)
                trainer.update(1e-4)
            profiler.step()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["waits"], summary["scalar_reads"], summary["allocations"]) == (0, 0, 0)
