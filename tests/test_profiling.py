"""The table of a trace: on made-up events with known answers, and on a real recording."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fasttrain import distributed
from fasttrain.backbone_trainer import BackboneTrainer
from fasttrain.profiling import (
    RECORDED,
    RECORDED_PASS,
    SKIPPED,
    SPANS,
    STEP,
    StepProfiler,
    span,
    summarise,
    summary_table,
)
from fasttrain.recipe import recipe_from_dict


def host(name: str, ts: float, dur: float, cat: str = "user_annotation", **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


def kernel(correlation: int, ts: float, dur: float, stream: int) -> dict[str, Any]:
    return host("k", ts, dur, "kernel", correlation=correlation, stream=stream)


# Two kernels launched in `encoder` run later and overlap a copy on another stream, which belongs to `data`;
# one kernel is launched during `backward` by another thread; one outside of all parts.
GPU_EVENTS = [
    host(STEP, 0, 100),
    host("data", 0, 10),
    host("encoder", 10, 20),
    host("backward", 40, 20),
    host("cudaMemcpyAsync", 5, 1, "cuda_runtime", correlation=1),
    host("cudaLaunchKernel", 12, 1, "cuda_runtime", correlation=2),
    host("cuLaunchKernelEx", 14, 1, "cuda_driver", correlation=3),
    {**host("cudaLaunchKernel", 50, 1, "cuda_runtime", correlation=4), "tid": 7},
    host("cudaLaunchKernel", 90, 1, "cuda_runtime", correlation=5),
    host("cudaStreamSynchronize", 95, 1, "cuda_runtime"),
    host("cudaStreamSynchronize", 195, 1, "cuda_runtime"),
    host("copy", 100, 40, "gpu_memcpy", correlation=1, stream=9),
    kernel(2, 100, 50, 7),
    kernel(3, 150, 30, 7),
    kernel(4, 190, 10, 7),
    kernel(5, 200, 5, 7),
    {"ph": "M", "name": "process_name"},
]


def test_device_time_goes_to_the_part_that_launched_it() -> None:
    summary = summarise(GPU_EVENTS)
    milliseconds = {name: row["ms"] for name, row in summary["parts"].items()}
    assert milliseconds == pytest.approx(
        dict.fromkeys(SPANS, 0.0) | {"data": 0.040, "encoder": 0.080, "backward": 0.010}
    )
    assert summary["outside_ms"] == pytest.approx(0.005)
    assert sum(row["share"] for row in summary["parts"].values()) == pytest.approx(130 / 135)
    # 100..180 and 190..205 of 100..205.
    assert summary["busy_share"] == pytest.approx(95 / 105)
    # The second wait is after the step.
    assert (summary["waits"], summary["scalar_reads"], summary["allocations"]) == (1, 0, 0)


def test_waits_of_a_loaders_threads_do_not_count() -> None:
    wait = host("cudaEventSynchronize", 20, 1, "cuda_runtime", correlation=9)
    events = [{**event, "tid": 1} for event in GPU_EVENTS]
    alone = summarise(events)["waits"]
    assert summarise([*events, {**wait, "tid": 2}])["waits"] == alone
    assert summarise([*events, {**wait, "tid": 1}])["waits"] == alone + 1


def test_host_time_is_taken_without_a_device() -> None:
    events = [host(STEP, 0, 100), host("encoder", 10, 60), host("aten::_local_scalar_dense", 80, 1, "cpu_op")]
    summary = summarise(events)
    assert summary["device"] == "cpu"
    assert summary["parts"]["encoder"] == pytest.approx({"ms": 0.06, "share": 0.6})
    assert summary["outside_ms"] == pytest.approx(0.04)
    assert summary["scalar_reads"] == 1


def run_steps(profiler: StepProfiler, count: int, *, reads: bool = False) -> None:
    a = torch.randn(128, 128)
    for _ in range(count):
        with span(STEP), span("encoder"):
            b = a @ a
            if reads:
                b.sum().item()
        profiler.step()


@pytest.mark.parametrize("reads", [True, False])
def test_recording_writes_trace_and_summary(tmp_path: Path, reads: bool) -> None:
    profiler = StepProfiler(tmp_path / "profile", torch.device("cpu"))
    run_steps(profiler, SKIPPED + RECORDED + 2, reads=reads)
    summary = profiler.close()
    assert summary is not None
    assert summary["steps"] == RECORDED
    assert summary["scalar_reads"] == (1 if reads else 0)
    assert summary["parts"]["encoder"]["share"] > 0.5
    assert "encoder" in summary_table(summary)
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {"trace.json", "summary.json"}


def test_a_run_too_short_gives_nothing_and_a_cut_one_what_there_is(tmp_path: Path) -> None:
    short = StepProfiler(tmp_path / "short", torch.device("cpu"))
    run_steps(short, SKIPPED - 1)
    assert short.close() is None
    assert not (tmp_path / "short").exists()
    cut = StepProfiler(tmp_path / "cut", torch.device("cpu"))
    run_steps(cut, SKIPPED + 2)
    summary = cut.close()
    assert summary is not None
    assert summary["steps"] == 2


def test_a_training_run_is_profiled_and_reads_no_number_between_log_steps(tmp_path: Path) -> None:
    # Brings DALI and PyAV, which a machine that lends its GPU to the test below may lack.
    from fasttrain.trainer import Trainer

    for video in range(4):
        folder = tmp_path / "frames" / f"video{video}"
        folder.mkdir(parents=True)
        for t in range(6):
            Image.new("RGB", (64, 48), (40 * video, 40 * t, 80)).save(folder / f"{t:05d}.jpg")
    recipe = recipe_from_dict(
        {
            "output": str(tmp_path / "run"),
            "device": "cpu",
            "backbone": {"name": "dino", "embed_dim": 32, "depth": 1, "num_heads": 2},
            "data": {"source": str(tmp_path / "frames"), "image_size": 64, "num_threads": 1},
            "train": {
                "steps": 9,
                "batch_size": 2,
                "precision": "fp32",
                "log_every": 9,
                "save_every": 9,
                "tensorboard": False,
            },
        }
    )
    with distributed.start("cpu") as world:
        Trainer(recipe, world, profile=True).train()
    summary = json.loads((tmp_path / "run" / "profile" / "summary.json").read_text())
    assert summary["steps"] == RECORDED
    assert all(summary["parts"][name]["ms"] > 0 for name in SPANS if name != RECORDED_PASS)
    # On a CPU torch's fused AdamW reads its step counter once for each of the head's four parameters; on a
    # GPU the counter stays on the device. A meter that read anything would add to these.
    assert summary["scalar_reads"] <= 4


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_steps_on_a_gpu_neither_wait_nor_allocate(cuda_graph: bool, tmp_path: Path) -> None:
    """Between log steps the host never waits for the device, and after the first steps memory is reused."""
    recipe = recipe_from_dict(
        {
            "device": "cuda",
            "backbone": {"name": "dino", "embed_dim": 128, "depth": 2},
            "encoder": {"compile": "none", "cuda_graph": cuda_graph},
            "data": {"image_size": 64},
            "train": {"batch_size": 4},
        }
    )
    profiler = StepProfiler(tmp_path, torch.device("cuda"))
    with distributed.start("cuda") as world:
        trainer = BackboneTrainer(recipe, world)
        trainer.warm_up()
        frames = torch.randn(2, 4, 3, 64, 64, device="cuda", dtype=torch.bfloat16)
        for step in range(SKIPPED + RECORDED):
            with span(STEP):
                trainer.forward_backward(frames, step, last=True, diagnostics=False)
                trainer.update(1e-4)
            profiler.step()
    summary = profiler.close()
    assert summary is not None
    assert (summary["waits"], summary["scalar_reads"], summary["allocations"]) == (0, 0, 0)
