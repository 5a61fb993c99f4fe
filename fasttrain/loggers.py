"""Logging of a run: metrics.jsonl, TensorBoard, and the terminal. `trackers` has experiment trackers."""

from __future__ import annotations

import importlib
import json
import os
import secrets
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from rich import progress as rich_progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from fasttrain.files import make_folder, naming, printable, write_atomically

# The last event in the log of a backbone that was dropped because its loss was not finite.
NON_FINITE = "non-finite loss"


class Viewer(Protocol):
    """What shows metrics and pictures besides the run folder: TensorBoard or an experiment tracker."""

    def write(self, completed_steps: int, numbers: Mapping[str, float]) -> None:
        """Add metrics by name."""

    def add_pictures(self, completed_steps: int, pictures: Mapping[str, Path]) -> None:
        """Add PNG files by name."""

    def close(self, *, failed: bool) -> None:
        """Return once everything is written. `failed`: whether an exception ends the run."""


class MetricsLog:
    """The log of a run folder: metrics.jsonl and viewers, which it closes.

    Records of steps after `completed_steps` are removed: an interrupted run wrote them after its last
    checkpoint.
    """

    def __init__(self, folder: Path, *, completed_steps: int, viewers: Sequence[Viewer] = ()) -> None:
        path = folder / "metrics.jsonl"
        # A run without a checkpoint begins again, with its record of step 0.
        kept = [record for record in read_records(path) if record["step"] <= completed_steps > 0]
        write_atomically(path, "".join(f"{json.dumps(record)}\n" for record in kept).encode())
        self._path, self._file = path, path.open("a", encoding="utf-8")
        self._viewers = viewers

    def write(self, completed_steps: int, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl, and pass its numbers to the viewers."""
        with naming(self._path):
            self._file.write(json.dumps({"step": completed_steps, **record}) + "\n")
            self._file.flush()
        for viewer in self._viewers:
            viewer.write(completed_steps, metric_numbers(record))

    def add_pictures(self, completed_steps: int) -> None:
        """Pass the learning curves and the pictures of evaluations in the run folder to the viewers."""
        folder = self._path.parent
        paths = [*folder.glob("figures/*.png"), *sorted(folder.glob("eval/*/figures/*.png"))]
        pictures = {
            path.relative_to(folder).with_suffix("").as_posix().replace("figures/", ""): path
            for path in paths
        }
        for viewer in self._viewers if pictures else ():
            viewer.add_pictures(completed_steps, pictures)

    def sync(self) -> None:
        """Return once metrics.jsonl is on disk."""
        with naming(self._path):
            os.fsync(self._file.fileno())

    def close(self, *, failed: bool = False) -> None:
        with naming(self._path):
            self._file.close()
        for viewer in self._viewers:
            viewer.close(failed=failed)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.close(failed=error is not None)


def metric_numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a record, without texts and lists."""
    return {
        name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"
    }


class TensorBoardEvents:
    """An event file of TensorBoard. It replaces the events of steps after `completed_steps`.

    It begins with `recipe`, a text in YAML.

    SummaryWriter of PyTorch writes from a thread, so that an error such as a full disk would end in the
    traceback of that thread.
    """

    def __init__(self, folder: Path, completed_steps: int, recipe: str) -> None:
        # Imported on demand, because TensorBoard is optional.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        make_folder(folder)
        # TensorBoard recognises event files by their name, and reads them in alphabetical order.
        self._path = folder / f"events.out.tfevents.{time.time():017.6f}.{secrets.token_hex(4)}"
        self._file = self._path.open("xb")
        self._writer = RecordWriter(self._file)
        self._append(file_version="brain.Event:2")
        self._append(step=completed_steps + 1, session_log=SessionLog(status=SessionLog.START))
        # The plugin for texts, which shows Markdown, recognises its events by its name.
        text = TensorProto(string_val=[f"```yaml\n{recipe}\n```".encode()], dtype="DT_STRING")
        plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        self._add(completed_steps, [Summary.Value(tag="recipe", tensor=text, metadata=plugin)])

    def write(self, completed_steps: int, numbers: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        self._add(completed_steps, values)

    def add_pictures(self, completed_steps: int, pictures: Mapping[str, Path]) -> None:
        # Imported on demand, because --help does not need it.
        from PIL import Image

        for name, path in pictures.items():
            with naming(path), Image.open(path) as picture:
                width, height = picture.size
                content = path.read_bytes()
            image = self._summary.Image(width=width, height=height, encoded_image_string=content)
            self._add(completed_steps, [self._summary.Value(tag=name, image=image)])

    def _add(self, completed_steps: int, values: list[Any]) -> None:
        self._append(step=completed_steps, summary=self._summary(value=values))

    def close(self, *, failed: bool) -> None:
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
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        # If the run was killed, the last line may be incomplete. Other damage is skipped, too.
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


class EnduringConsole(Console):
    """A console that discards output once its reader has exited (`fasttrain RECIPE | head`).

    The work continues, because it may have taken hours and its results are in files.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.is_jupyter:
            # Plain lines. Otherwise, each would be an HTML output of its own.
            super().__init__(**options, force_jupyter=False, force_terminal=False)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # Python flushes stdout again at exit (see "Note on SIGPIPE" in the documentation of `signal`).
        with open(os.devnull, "w") as devnull:
            os.dup2(devnull.fileno(), self.file.fileno())


def say(line: str, console: Console | None = None) -> None:
    """Print a line without interpreting brackets as markup and without wrapping it.

    Names in it may contain any characters.
    """
    global _last_line
    _last_line = time.monotonic()
    console = console or EnduringConsole()
    console.print(printable(line), highlight=False, markup=False, soft_wrap=True)


def count(number: int, noun: str) -> str:
    """Return a number with a noun in the singular or plural."""
    plural = f"{noun}es" if noun.endswith("ss") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def say_block(title: str, entries: Mapping[str, str], console: Console) -> None:
    """Print a title and indented lines `name  text` below it, wrapped to at most 80 columns."""
    say(title, console)
    width, columns = max(map(len, entries)), min(80, console.width)
    for name, text in entries.items():
        indent = " " * (width + 4)
        lines = textwrap.wrap(
            printable(text), columns, initial_indent=f"  {name:<{width}}  ", subsequent_indent=indent,
            # Paths must remain intact, so that they can be copied.
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
        for line in lines:
            say(line, console)


# Seconds of silence before a sign of life in the first five minutes of a task, and later.
SILENCE, LATER_SILENCE = 4.0, 60.0
# When `say` printed the last line.
_last_line = time.monotonic()


@contextmanager
def repeating(beat: Callable[[float], None]) -> Iterator[None]:
    """Call `beat`, which prints a line, with the elapsed seconds whenever `say` has been silent for long."""
    end, start = threading.Event(), time.monotonic()

    def repeat() -> None:
        while not end.wait(min(0.25, SILENCE)):
            now = time.monotonic()
            if now - _last_line >= (SILENCE if now - start < 300 else LATER_SILENCE):
                beat(now - start)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


@contextmanager
def working(what: str, console: Console) -> Iterator[None]:
    """Print a line now and then for as long as the context lasts; nothing if it lasts a few seconds only."""
    if console.quiet:
        yield
        return
    with repeating(lambda seconds: say(f"{what} ({seconds:.0f} s so far)", console)):
        yield


def import_module(name: str) -> ModuleType:
    """Import a module, and print signs of life, because PyTorch may take long."""
    console = EnduringConsole(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
    with working("importing PyTorch", console):
        return importlib.import_module(name)


class Progress:
    """The progress of a long task: a bar on a terminal, otherwise a line now and then.

    Use it as a context manager. Pass `enabled=False` on all ranks but one.
    """

    def __init__(
        self, unit: str, total: int, *, done: int = 0, enabled: bool = True, console: Console | None = None
    ) -> None:
        self._unit = unit
        self._console = console or EnduringConsole(quiet=not enabled)
        self._remaining = TimeRemainingColumn()
        self._bar = rich_progress.Progress(
            SpinnerColumn(),
            TextColumn(f"[bold]{unit}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=8),
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
        self._stack = ExitStack()

    def __enter__(self) -> Progress:
        self._bar.start()
        if not (self._console.quiet or self._console.is_terminal):
            self._stack.enter_context(repeating(lambda _: self._print()))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._bar.stop()

    def advance(self, count: int = 1, status: str | None = None) -> None:
        """Add `count` completed items; `status` replaces the text next to the bar."""
        self._bar.advance(self._task, count)
        if status is not None:
            self._bar.update(self._task, status=status)

    def show(self, status: str) -> None:
        """Show `status` immediately: next to the bar on a terminal, otherwise as a line."""
        self._bar.update(self._task, status=status)
        if not self._console.is_terminal:
            self._print()

    def _print(self) -> None:
        task = self._bar.tasks[0]
        parts = f"{self._unit} {task.completed:.0f}/{task.total:.0f}", task.fields["status"]
        left = f"left {self._remaining.render(task)}"
        say("  ".join(filter(None, (*parts, left))), self._console)
