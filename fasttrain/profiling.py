"""Profiling: a Chrome trace of a few steps, and a summary of the time by span.

`trainer` and `backbone_trainer` mark the spans of a step. With `train --profile`, `StepProfiler` records some
early steps of a run and writes profile/trace.json (for chrome://tracing or Perfetto) and
profile/summary.json. On a GPU, the time of a kernel is attributed to the span in which the host launched it,
on any thread of PyTorch; on a CPU, the time of a span is its duration.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from fasttrain.files import write_json

# Replaces the spans of encoder, head and backward pass when a CUDA graph replays all three.
RECORDED_PASS = "recorded pass"
SPANS = ("data", "encoder", "head and loss", "backward", RECORDED_PASS, "meters", "optimiser")
# The first steps, which fill caches, are skipped. Few steps keep the trace small enough for a browser.
SKIPPED, RECORDED = 3, 4
STEP = "step"
_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_HOST = {"cpu_op", "user_annotation"}
_LAUNCHES = {"cuda_runtime", "cuda_driver"}
# Events to count within the steps. `_local_scalar_dense` copies a scalar to the host; on a GPU, it waits for
# all previous work.
_COUNTED = {
    "waits": {"cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize"},
    "scalar_reads": {"aten::_local_scalar_dense"},
    "allocations": {"cudaMalloc", "cudaMallocAsync", "cudaFree", "cudaHostAlloc"},
}

# A context that names a span for the profiler. Its overhead is negligible if no profiler is active.
span = record_function


class StepProfiler(profile):
    """A profiler of the steps from index SKIPPED up to SKIPPED + RECORDED - 1, or fewer in a shorter run.

    Use it as a context manager and call `step` after each step. If any steps were recorded, it writes both
    files to `folder` and passes the summary table to `say`.
    """

    def __init__(self, folder: Path, device: torch.device, say: Callable[[str], None]) -> None:
        self.folder, self.say, self._on_gpu = folder, say, device.type == "cuda"
        super().__init__(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])],
            schedule=schedule(wait=0, warmup=SKIPPED, active=RECORDED, repeat=1),
            on_trace_ready=lambda _: self._write(),
        )

    def step(self) -> None:
        """End a step, and start or stop the recording if the next step requires it."""
        if self._on_gpu and self.step_num + 1 == SKIPPED:
            # Work that was launched earlier must not run during the recording.
            torch.cuda.synchronize()
        super().step()

    def _write(self) -> None:
        if self.step_num <= SKIPPED:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "trace.json"
        self.export_chrome_trace(str(path))
        summary = summarise(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])
        write_json(self.folder / "summary.json", summary)
        for line in summary_table(summary).splitlines():
            self.say(line)

    def __exit__(self, *error: object) -> None:
        steps = self.step_num
        super().__exit__(*error)
        if steps <= SKIPPED:
            self.say(f"no profile: the run took only {steps} steps, and the first {SKIPPED} are not recorded")


def summarise(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Summarise the events of a Chrome trace (times in microseconds).

    Returns:
        A dictionary with the keys

        - `device`: `cuda` or `cpu`.
        - `steps`: Number of recorded steps.
        - `step_ms`: Mean duration of a step.
        - `parts`: For each span, `ms` per step and `share` of the total (device time on a GPU).
        - `outside_ms`: Time per step outside of all spans.
        - `loader_ms`: Device time per step of what other threads than PyTorch's launched (GPU only).
        - `waits`, `scalar_reads`, `allocations`: Events per step on threads that run PyTorch.
        - `busy_share`: Fraction of the recorded time during which the device worked, without that work (GPU
          only).
    """
    complete = [event for event in events if event.get("ph") == "X"]
    ranges = sorted(
        (event["ts"], event["ts"] + event["dur"], event["name"])
        for event in complete
        if event.get("cat") == "user_annotation"
    )
    step_ranges = [each for each in ranges if each[2] == STEP]
    span_ranges = [each for each in ranges if each[2] in SPANS]
    steps = len(step_ranges)
    # Excludes the threads of a data loader, whose waiting does not delay a step.
    threads = {event.get("tid") for event in complete if event.get("cat") in _HOST}
    launches = {
        event["args"].get("correlation"): event for event in complete if event.get("cat") in _LAUNCHES
    }
    work, loader_us = [], 0.0
    for event in complete:
        if event.get("cat") in _ON_DEVICE:
            launch = launches.get(event["args"]["correlation"], {})
            if launch and launch.get("tid") not in threads:
                loader_us += event["dur"]
            else:
                work.append((event, launch.get("ts")))
    # Pairs of a span (or None) and a duration.
    durations: list[tuple[str | None, float]]
    if work:
        durations = [(_range_at(span_ranges, launched), event["dur"]) for event, launched in work]
        total = sum(duration for _, duration in durations)
    else:
        durations = [(name, end - start) for start, end, name in span_ranges]
        total = sum(end - start for start, end, _ in step_ranges)
    times = {name: sum(duration for owner, duration in durations if owner == name) for name in SPANS}
    within = [
        event["name"]
        for event in complete
        if event.get("tid") in threads and _range_at(step_ranges, event["ts"]) is not None
    ]
    summary: dict[str, Any] = {
        "device": "cuda" if work else "cpu",
        "steps": steps,
        "step_ms": (step_ranges[-1][1] - step_ranges[0][0]) / steps / 1e3,
        "parts": {name: {"ms": time / steps / 1e3, "share": time / total} for name, time in times.items()},
        "outside_ms": (total - sum(times.values())) / steps / 1e3,
        **{count: sum(name in names for name in within) / steps for count, names in _COUNTED.items()},
    }
    if work:
        summary["loader_ms"] = loader_us / steps / 1e3
        starts, ends = np.array(sorted((event["ts"], event["ts"] + event["dur"]) for event, _ in work)).T
        latest_ends = np.maximum.accumulate(ends)
        # The device is idle between the end of all previous work and the start of the next.
        idle = np.maximum(0, starts[1:] - latest_ends[:-1]).sum()
        summary["busy_share"] = float(1 - idle / (latest_ends[-1] - starts[0]))
    return summary


def _range_at(ranges: list[tuple[float, float, str]], time: float | None) -> str | None:
    """Return the name of the range that contains `time`, or None. Ranges do not overlap."""
    return next((name for start, end, name in ranges if time is not None and start <= time <= end), None)


def summary_table(summary: dict[str, Any]) -> str:
    """Format the summary as a table for the terminal."""
    lines = [
        f"{summary['step_ms']:.2f} ms per step (mean of {summary['steps']} steps); "
        f"{'GPU' if summary['device'] == 'cuda' else 'CPU'} time by span:"
    ]
    rows = {name: part["ms"] for name, part in summary["parts"].items()} | {"outside": summary["outside_ms"]}
    total = sum(rows.values())
    lines += [f"  {name:<14}{ms:>10.3f} ms{ms / total:>8.1%}" for name, ms in rows.items()]
    lines.append(
        f"per step: {summary['waits']:g} waits for the device, "
        f"{summary['scalar_reads']:g} scalar reads, {summary['allocations']:g} allocations"
    )
    if "busy_share" in summary:
        lines.append(
            f"GPU busy {summary['busy_share']:.1%} of the time, not counting the data loader's "
            f"{summary['loader_ms']:.3f} ms per step"
        )
    return "\n".join(lines)
