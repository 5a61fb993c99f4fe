"""Logging of a run: metrics.jsonl, TensorBoard, and the terminal."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich import progress as rich_progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from fasttrain.files import make_folder, naming, printable, write_atomically

# The last event in the log of a backbone that was dropped because its loss was not finite.
NON_FINITE = "non-finite loss"


class MetricsLog:
    """The log of a run folder: metrics.jsonl and, if `tensorboard`, TensorBoard events.

    Records of steps after `completed_steps` are removed: an interrupted run wrote them after its last
    checkpoint.
    """

    def __init__(self, folder: Path, *, completed_steps: int, tensorboard: bool) -> None:
        path = folder / "metrics.jsonl"
        kept = [record for record in read_records(path) if record["step"] <= completed_steps]
        write_atomically(path, "".join(f"{json.dumps(record)}\n" for record in kept).encode())
        self._path, self._file = path, path.open("a", encoding="utf-8")
        self._events = TensorBoardEvents(folder / "tensorboard", completed_steps) if tensorboard else None

    def write(self, completed_steps: int, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl, and its numbers to TensorBoard."""
        with naming(self._path):
            self._file.write(json.dumps({"step": completed_steps, **record}) + "\n")
            self._file.flush()
        if self._events is not None:
            numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
            self._events.write(completed_steps, numbers)

    def sync(self) -> None:
        """Return once metrics.jsonl is on disk."""
        with naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with naming(self._path):
            self._file.close()
        if self._events is not None:
            self._events.close()


class TensorBoardEvents:
    """An event file of TensorBoard. It replaces the events of steps after `completed_steps`.

    SummaryWriter of PyTorch writes from a thread, so that an error such as a full disk would end in the
    traceback of that thread.
    """

    def __init__(self, folder: Path, completed_steps: int) -> None:
        # Imported on demand, because TensorBoard is optional.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        make_folder(folder)
        # TensorBoard recognises event files by their name, and reads them in alphabetical order.
        self._path = folder / f"events.out.tfevents.{time.time():017.6f}.{secrets.token_hex(4)}"
        self._file = self._path.open("xb")
        self._writer = RecordWriter(self._file)
        self._append(file_version="brain.Event:2")
        self._append(step=completed_steps + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, completed_steps: int, numbers: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        self._append(step=completed_steps, summary=self._summary(value=values))

    def close(self) -> None:
        with naming(self._path):
            self._file.close()

    def _append(self, **fields: Any) -> None:
        with naming(self._path):
            self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())
            self._file.flush()


def last_event(folder: Path) -> str | None:
    """Return the event in the last record of a run folder's log, or None."""
    records = read_records(folder / "metrics.jsonl")
    return records[-1].get("event") if records else None


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl file; the list is empty if the file does not exist."""
    records = []
    with naming(path):
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        # If the run was killed, the last line may be incomplete.
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def say(line: str, console: Console | None = None) -> None:
    """Print a line without interpreting brackets as markup and without wrapping it.

    Names in it may contain any characters.
    """
    (console or Console()).print(printable(line), highlight=False, markup=False, soft_wrap=True)


class Progress:
    """The progress of a long task: a bar on a terminal, otherwise a line per minute.

    Use it as a context manager. Pass `enabled=False` on all ranks but one.
    """

    SECONDS_BETWEEN_LINES = 60.0

    def __init__(
        self, unit: str, total: int, *, done: int = 0, enabled: bool = True, console: Console | None = None
    ) -> None:
        self._unit = unit
        self._console = console or Console(quiet=not enabled)
        self._remaining = TimeRemainingColumn()
        self._bar = rich_progress.Progress(
            TextColumn(f"[bold]{unit}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=10),
            # The only column that is truncated on a narrow terminal.
            TextColumn("{task.fields[status]}", table_column=Column(ratio=1, no_wrap=True), markup=False),
            TextColumn("left"),
            self._remaining,
            console=self._console,
            expand=True,
            disable=self._console.quiet or not self._console.is_terminal,
            # Long, because a single video may take half a minute.
            speed_estimate_period=600,
        )
        self._task = self._bar.add_task(unit, total=total, completed=done, status="")
        self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, count: int = 1, status: str | None = None) -> None:
        """Add `count` completed items; `status` replaces the text next to the bar."""
        self._bar.advance(self._task, count)
        if status is not None:
            self._bar.update(self._task, status=status)
        if time.monotonic() - self._last_line > self.SECONDS_BETWEEN_LINES:
            self._print()

    def show(self, status: str) -> None:
        """Show `status` immediately: next to the bar on a terminal, otherwise as a line."""
        self._bar.update(self._task, status=status)
        self._print()

    def _print(self) -> None:
        self._last_line = time.monotonic()
        if not self._console.is_terminal:
            task = self._bar.tasks[0]
            count = f"{self._unit} {task.completed:.0f}/{task.total:.0f}"
            say(f"{count}  {task.fields['status']}  left {self._remaining.render(task)}", self._console)
