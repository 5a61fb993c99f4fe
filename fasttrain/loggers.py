"""How a run is going: metrics.jsonl, TensorBoard, the terminal."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich import progress as rich_progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from fasttrain.files import write_atomically

# The event that ends the log of a backbone whose loss is not finite.
NON_FINITE = "non-finite loss"


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events of one run folder.

    Lines after `first_step`, which a run that was cut off wrote after its last checkpoint, are removed.
    """

    def __init__(self, folder: Path, *, first_step: int, tensorboard: bool) -> None:
        path = folder / "metrics.jsonl"
        kept = [record for record in read_records(path) if record["step"] <= first_step]
        write_atomically(path, "".join(f"{json.dumps(record)}\n" for record in kept).encode())
        self._file = path.open("a", encoding="utf-8")
        self._writer = None
        if tensorboard:
            # Imported late: it costs a second that a run without it need not pay.
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
    """The event that the log of a run folder ends with, if it ends with one."""
    records = read_records(folder / "metrics.jsonl")
    return records[-1].get("event") if records else None


def read_records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        # The last line may have been cut off with its run.
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def say(line: str, console: Console | None = None) -> None:
    """Print a line as it is: without markup, which brackets in a path would be, and without line breaks."""
    (console or Console()).print(line, highlight=False, markup=False, soft_wrap=True)


class Progress:
    """How far a long piece of work is: a bar on a terminal, elsewhere a line a minute.

    Use it as a context. Silent unless `enabled`: of several processes the main one shows its progress.
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
            # The first to be cut on a narrow terminal: the count and the time left stay whole.
            TextColumn("{task.fields[status]}", table_column=Column(ratio=1, no_wrap=True), markup=False),
            TextColumn("left"),
            self._remaining,
            console=self._console,
            expand=True,
            disable=self._console.quiet or not self._console.is_terminal,
            # Videos may take half a minute each.
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
        """`count` more are done; from now on `status` is shown beside the bar."""
        self._bar.advance(self._task, count)
        if status is not None:
            self._bar.update(self._task, status=status)
        if time.monotonic() - self._last_line > self.SECONDS_BETWEEN_LINES:
            self._print()

    def show(self, status: str) -> None:
        """Show `status` now: in the bar on a terminal, elsewhere as a line."""
        self._bar.update(self._task, status=status)
        self._print()

    def _print(self) -> None:
        self._last_line = time.monotonic()
        if not self._console.is_terminal:
            task = self._bar.tasks[0]
            count = f"{self._unit} {task.completed:.0f}/{task.total:.0f}"
            say(f"{count}  {task.fields['status']}  left {self._remaining.render(task)}", self._console)
