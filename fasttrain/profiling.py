"""Where a step's time goes: a Chrome trace of a few steps, and from it a table by span.

`trainer` and `backbone_trainer` name the spans of a step; `StepProfiler` records some early steps of a run
(`train --profile`) and writes `profile/trace.json` (for chrome://tracing or Perfetto) and
`profile/summary.json`. On a GPU a kernel belongs to the span during which the host launched it, on whatever
thread; on a CPU the spans' own durations are taken.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from fasttrain.files import write_json

# Encoder, head and backward pass in one, where a CUDA graph replays them.
RECORDED_PASS = "recorded pass"
SPANS = ("data", "encoder", "head and loss", "backward", RECORDED_PASS, "meters", "optimiser")
# After the first steps, which still fill caches; short enough for a trace that a browser opens.
SKIPPED, RECORDED = 3, 4
STEP = "step"
_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_HOST = {"cpu_op", "user_annotation"}
_LAUNCHES = {"cuda_runtime", "cuda_driver"}
# What to count within the steps. The host reads a number from the device by `_local_scalar_dense`: on a GPU
# each one waits for all work before it.
_COUNTED = {
    "waits": {"cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize"},
    "scalar_reads": {"aten::_local_scalar_dense"},
    "allocations": {"cudaMalloc", "cudaMallocAsync", "cudaFree", "cudaHostAlloc"},
}

# A context that names what is inside for the profiler; next to free without one.
span = record_function


class StepProfiler(profile):
    """Records steps SKIPPED .. SKIPPED + RECORDED - 1 of a run, or those of them that it has.

    Use it as a context, and call `step` after each step. Where it recorded any, it writes its two files and
    passes the summary as a table to `say`.
    """

    def __init__(self, folder: Path, device: torch.device, say: Callable[[str], None]) -> None:
        self.folder, self.say, self._on_gpu = folder, say, device.type == "cuda"
        super().__init__(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])],
            schedule=schedule(wait=0, warmup=SKIPPED, active=RECORDED, repeat=1),
            on_trace_ready=lambda _: self._write(),
        )

    def step(self) -> None:
        """A step is over: begin or end the recording where it is time."""
        if self._on_gpu and self.step_num + 1 == SKIPPED:
            # What was launched before must not run during the recording.
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
        self.say(summary_table(summary))

    def __exit__(self, *error: object) -> None:
        steps = self.step_num
        super().__exit__(*error)
        if steps <= SKIPPED:
            self.say(f"nothing recorded: a profile takes more than {SKIPPED} steps")


def summarise(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A step's time by span, from a Chrome trace's events (times in microseconds).

    Returns `device` (cuda | cpu), `steps`, `step_ms`, `parts` (span -> {"ms", "share"} a step: device time on
    a GPU, host time on a CPU), `outside_ms` (work of no span), and of the steps' own time, on threads that
    run PyTorch, `waits`, `scalar_reads` and `allocations` a step; on a GPU also `busy_share`, the share of
    the recorded time in which at least one kernel ran.
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
    work = [event for event in complete if event.get("cat") in _ON_DEVICE]
    # Of every piece of work its span, if any, and how long it took.
    owned: list[tuple[str | None, float]]
    if work:
        launched = {
            event["args"].get("correlation"): event["ts"]
            for event in complete
            if event.get("cat") in _LAUNCHES
        }
        owned = [
            (_range_at(span_ranges, launched.get(event["args"]["correlation"])), event["dur"])
            for event in work
        ]
        total = sum(duration for _, duration in owned)
    else:
        owned = [(name, end - start) for start, end, name in span_ranges]
        total = sum(end - start for start, end, _ in step_ranges)
    times = {name: sum(duration for owner, duration in owned if owner == name) for name in SPANS}
    # A loader's own threads may wait: the step's do not wait for them.
    threads = {event.get("tid") for event in complete if event.get("cat") in _HOST}
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
        starts, ends = np.array(sorted((event["ts"], event["ts"] + event["dur"]) for event in work)).T
        reach = np.maximum.accumulate(ends)
        # Between the end of all work so far and the start of the next.
        idle = np.maximum(0, starts[1:] - reach[:-1]).sum()
        summary["busy_share"] = float(1 - idle / (reach[-1] - starts[0]))
    return summary


def _range_at(ranges: list[tuple[float, float, str]], time: float | None) -> str | None:
    """Name of the range of the host that holds `time`, if any; they do not overlap."""
    return next((name for start, end, name in ranges if time is not None and start <= time <= end), None)


def summary_table(summary: dict[str, Any]) -> str:
    """The summary as lines for a terminal."""
    lines = [
        f"{summary['step_ms']:.2f} ms a step, mean of {summary['steps']}; "
        f"{'GPU' if summary['device'] == 'cuda' else 'host'} time by span:"
    ]
    rows = {name: part["ms"] for name, part in summary["parts"].items()} | {"outside": summary["outside_ms"]}
    total = sum(rows.values())
    lines += [f"  {name:<14}{ms:>10.3f} ms{ms / total:>8.1%}" for name, ms in rows.items()]
    lines.append(
        f"a step: {summary['waits']:g} waits for the device, "
        f"{summary['scalar_reads']:g} numbers read from it, {summary['allocations']:g} allocations"
    )
    if "busy_share" in summary:
        lines.append(f"GPU busy {summary['busy_share']:.1%} of the time")
    return "\n".join(lines)
