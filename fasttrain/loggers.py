"""Meters that never wait for the GPU, and where their readings go: JSONL, TensorBoard, the terminal.

A `Meter` adds up on the device; `read()` is the one place where the host waits, on log steps only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from torch import Tensor

from fasttrain.distributed import World
from fasttrain.errors import needs_extra
from fasttrain.files import write_atomically


class Meter:
    """Running means of a step's scalars and the first step of a non-finite loss. Lives on the device."""

    NAMES = ("loss", "cycle", "separability")

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(self.NAMES), device=device, dtype=torch.float64)
        self._passes = 0
        # Negated, so that a maximum over steps, passes and processes finds the earliest.
        self._minus_bad_step = torch.full((), -torch.inf, device=device, dtype=torch.float64)

    def add(self, step: int, loss: Tensor, cycle: Tensor, separability: Tensor) -> None:
        """Take in one forward pass; three scalars with or without gradient."""
        self._sums += torch.stack((loss, cycle, separability)).detach()
        self._passes += 1
        # Filled, not chosen by torch.where: that copies plain numbers to the device and waits for it.
        this_step = torch.full_like(self._minus_bad_step, -float(step))
        bad = this_step.masked_fill_(loss.detach().isfinite(), -torch.inf)
        self._minus_bad_step = torch.maximum(self._minus_bad_step, bad)

    def read(self, world: World) -> tuple[dict[str, float], int | None]:
        """Means since the last reading over all processes, and the first bad step; waits for the device."""
        means = world.mean(self._sums / self._passes)
        minus_bad_step = world.maximum(self._minus_bad_step)
        *values, earliest = torch.cat((means, minus_bad_step[None])).tolist()
        self._sums.zero_()
        self._passes = 0
        bad_step = None if earliest == -float("inf") else int(-earliest)
        return dict(zip(self.NAMES, values, strict=True)), bad_step


# The event that ends the log of a backbone whose loss is not finite.
NON_FINITE = "non-finite loss"


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events of one run folder; written by the main process only."""

    def __init__(self, folder: Path, *, first_step: int, tensorboard: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        _drop_lines_from(path, first_step)
        self._file = path.open("a", encoding="utf-8")
        self._writer = None
        if tensorboard:
            # Imported late: it costs a second that a run without it need not pay.
            with needs_extra("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter

            # TensorBoard purges from this step on; what was written at the checkpoint itself stays.
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, record: dict[str, Any]) -> None:
        """Append one line; numbers go to TensorBoard as well."""
        self._file.write(json.dumps({"step": step, **record}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in record.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def last_event(folder: Path) -> str | None:
    """What the log of a run folder ended on, if its last line tells of an event."""
    records = [record for _, record in read_records(folder / "metrics.jsonl")]
    return records[-1].get("event") if records else None


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every whole line of a log with what it says."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            # The run was cut off in the middle of this line.
            continue
        if isinstance(record, dict) and "step" in record:
            yield line, record


def _drop_lines_from(path: Path, first_step: int) -> None:
    """Take out what a run that was cut off wrote after its last checkpoint, so that no step stands twice."""
    if not path.exists():
        return
    kept = [line + "\n" for line, record in read_records(path) if record["step"] <= first_step]
    write_atomically(path, "".join(kept).encode())


class Clock:
    """Pairs per second since the last reading."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._pairs = 0

    def count(self, pairs: int) -> None:
        self._pairs += pairs

    def read(self) -> tuple[float, float]:
        """(pairs per second since the last reading, seconds since the beginning)."""
        now = time.perf_counter()
        rate = self._pairs / (now - self._last)
        self._last, self._pairs = now, 0
        return rate, now - self._start


class ProgressReport:
    """A rich progress bar on a terminal, plain lines elsewhere; silent on all but the main process."""

    def __init__(self, console: Console, *, total_steps: int, first_step: int, enabled: bool) -> None:
        self._console = console
        self._total = total_steps
        self._enabled = enabled
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if enabled and console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=10),
                # Gives way on a narrow terminal: step and time left stay whole.
                TextColumn("{task.fields[status]}", table_column=Column(ratio=1, no_wrap=True)),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
                expand=True,
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=first_step, status="")
            self._bar.start()

    def advance(self, step: int) -> None:
        """`step` steps are done (issued to the device: the bar does not wait either)."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def show(self, step: int, name: str, record: dict[str, Any], seconds_left: float) -> None:
        """The readings of a log step."""
        if not self._enabled:
            return
        status = (
            f"{record['pairs_per_second']:.1f} pairs/s  "
            f"loss {record['loss']:.4f}  cycle {record['cycle']:.4f}  "
            f"separability {record['separability']:.4f}  accuracy {record['cycle_accuracy']:.3f}  "
            f"lr {record['lr']:.2e}"
        )
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, status=f"{name}  {status}")
        else:
            hours, seconds = divmod(int(seconds_left), 3600)
            left = f"{hours:02}:{seconds // 60:02}:{seconds % 60:02}"
            self._console.print(
                f"{name}  step {step}/{self._total}  {status}  left {left}", highlight=False, soft_wrap=True
            )

    def message(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._enabled:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
