"""One run of a workload in forked processes: undisturbed, or ended by a signal at a chosen moment."""

from __future__ import annotations

import functools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from reliability.forks import Fault, compile_shim, start
from reliability.workloads import Workload

# A run that takes longer hangs.
LIMIT = 120.0
# How much longer a write to a slow disk takes.
WRITE_SECONDS = 0.005
_EVENTS = ("os.rename", "os.remove", "os.mkdir")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Moment:
    """When a process is ended: `seconds` after the start of its `operation`-th file operation.

    Operation 0 is the start of the process.
    """

    operation: int
    seconds: float


@dataclass(frozen=True)
class Attempt:
    """How the processes of a workload ended."""

    codes: list[int | None]
    """Exit codes; negative: the signal that ended the process; None: it was still running at the limit."""
    output: str
    seconds: float
    operations: list[int]
    """The number of file operations of each process."""


def attempt(
    workload: Workload,
    folder: Path,
    *,
    victim: int = 0,
    moment: Moment | None = None,
    number: int = signal.SIGKILL,
    others: float | None = None,
    prepare: Callable[[], object] | None = None,
    meanwhile: Callable[[list[ForkServerProcess]], None] | None = None,
    slow_disk: bool = False,
) -> Attempt:
    """Run the commands of a workload at the same time in `folder`.

    Args:
        workload: What to run.
        folder: The working directory; it is created if necessary.
        victim: The process that gets a signal.
        moment: When it gets it. None: never.
        number: The signal.
        others: How many seconds after the victim's end the other processes get the signal. None: never.
        prepare: Called in each process before the command.
        meanwhile: Called with the processes once they have started.
        slow_disk: Whether each write takes longer, so that a signal is likely to arrive during one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder.with_name(f"{folder.name}.{rank}.log") for rank in range(len(workload.commands))]
    common = {"XDG_CACHE_HOME": str(folder / "cache")}
    if workload.are_ranks:
        common |= {"WORLD_SIZE": str(len(logs)), "LOCAL_WORLD_SIZE": str(len(logs))}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    started = time.monotonic()
    processes = []
    for rank, (words, log) in enumerate(zip(workload.commands, logs, strict=True)):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if workload.are_ranks else {}
        death = moment if rank == victim else None
        watch = functools.partial(_watch, folder, log.with_suffix(".operations"), death, number, prepare)
        fault = Fault(folder, "write", seconds=WRITE_SECONDS) if slow_disk and compile_shim() else None
        processes.append(
            start(list(words), log=log, folder=folder, environment=common | own, fault=fault, prepare=watch)
        )
    if meanwhile is not None:
        meanwhile(processes)
    if moment is not None and others is not None:
        wait([processes[victim].sentinel], timeout=LIMIT)
        time.sleep(others)
        for process in processes:
            send(process, number)
    for process in processes:
        process.join(max(0.0, started + LIMIT - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        send(process, signal.SIGKILL)
        process.join()
        process.close()
    return Attempt(
        codes,
        "".join(log.read_text(errors="replace") for log in logs if log.exists()),
        time.monotonic() - started,
        [_read_count(log.with_suffix(".operations")) for log in logs],
    )


def send(process: ForkServerProcess, number: int) -> None:
    """Send a signal to a process unless it has ended."""
    if process.exitcode is None and process.pid is not None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
    return port


def _read_count(path: Path) -> int:
    return int(path.read_text() or 0) if path.exists() else 0


def changed_path(event: str, arguments: tuple[Any, ...], root: str) -> str | None:
    """Return the path below `root` that an audit event of Python is about to change, if it is one."""
    if event not in _EVENTS and not (event == "open" and (arguments[2] or 0) & _WRITES):
        return None
    if not isinstance(arguments[0], str | bytes | os.PathLike):
        return None
    path = os.path.abspath(os.fsdecode(arguments[0]))
    return path if path.startswith(root) else None


def _watch(
    folder: Path,
    counted: Path,
    moment: Moment | None,
    number: int,
    prepare: Callable[[], object] | None,
) -> None:
    """Count the file operations of this process below `folder`, and end it at `moment`."""
    if prepare is not None:
        prepare()
    root = str(folder)
    count = 0
    lock = threading.RLock()
    file = os.open(counted, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def end() -> None:
        if moment is not None and moment.seconds:
            time.sleep(moment.seconds)
        os.kill(os.getpid(), number)

    def operate() -> None:
        nonlocal count
        with lock:
            count += 1
            reached = moment is not None and count == moment.operation
            os.pwrite(file, str(count).encode(), 0)
        if reached:
            assert moment is not None
            if moment.seconds:
                threading.Thread(target=end, daemon=True).start()
            else:
                end()

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if changed_path(event, arguments, root):
            operate()

    fsync = os.fsync

    def counted_fsync(descriptor: int) -> None:
        # Python announces no event for this operation.
        operate()
        fsync(descriptor)

    os.fsync = counted_fsync
    sys.addaudithook(audit)
    if moment is not None and moment.operation == 0:
        threading.Thread(target=end, daemon=True).start()
