"""Commands of fasttrain in forked processes, with faults of the system.

Importing fasttrain takes seconds. `multiprocessing` starts a server process that has imported everything, and
forks a process from it for each command. The server has loaded shim.c, which makes calls of the operating
system fail.
"""

from __future__ import annotations

import ctypes
import functools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from reliability.trials import Ended

SHIM = Path(__file__).with_name("shim.c")
# The operations that can fail, in the order of the enumeration in shim.c.
OPERATIONS = (
    *("open_read", "open_write", "read", "write", "fsync", "rename", "close", "mkdir", "stat", "list"),
)
FOREVER = 2**40
# Modules that commands import on demand.
_PRELOADED = [
    "fasttrain.trainer",
    "fasttrain.data.dali",
    "fasttrain.data.pack",
    "fasttrain.evaluation.command",
    "fasttrain.evaluation.report",
    "fasttrain.tools.demo",
    "fasttrain.tools.doctor",
    "fasttrain.tools.export",
    "torch.export",
    "torch.utils.tensorboard",
    "torch._dynamo",
]


@dataclass(frozen=True)
class Fault:
    """Calls `first` to `first + count - 1` of an operation, on paths that begin with `prefix`, fail."""

    prefix: Path
    operation: str
    error: int = 0
    """The number of the error; 0: the calls succeed."""
    first: int = 1
    count: int = FOREVER
    seconds: float = 0
    """How much longer the calls take."""


@functools.cache
def context() -> ForkServerContext:
    """Return the context whose server process forks the commands."""
    forkserver = multiprocessing.get_context("forkserver")
    if library := compile_shim():
        os.environ["LD_PRELOAD"] = str(library)
    forkserver.set_forkserver_preload(_PRELOADED)
    # Starts the server.
    forkserver.Process(target=os.getpid).start()
    os.environ.pop("LD_PRELOAD", None)
    return forkserver


@functools.cache
def compile_shim() -> Path | None:
    """Compile shim.c; return None if the machine has no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    library = Path(tempfile.mkdtemp(prefix="reliability-shim-")) / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SHIM, "-ldl"], check=True)
    return library


def run_forked(
    words: list[str],
    *,
    seconds: float,
    log: Path,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    fault: Fault | None = None,
    limits: Mapping[int, int] | None = None,
    meanwhile: Callable[[ForkServerProcess], None] | None = None,
) -> tuple[Ended, dict[str, int]]:
    """Run `fasttrain WORDS` in a forked process. Return how it ended and its figures: memory, calls.

    Args:
        words: The arguments of fasttrain.
        seconds: The time after which the process and its children are killed.
        log: The file for stdout and stderr.
        folder: The working directory.
        environment: Additional environment variables.
        fault: What to inject. Only calls on its paths are counted.
        limits: Resource limits, such as {resource.RLIMIT_NOFILE: 20}.
        meanwhile: Called with the process once it has started.
    """
    calls = log.with_suffix(".calls")
    calls.unlink(missing_ok=True)
    process = start(words, log=log, folder=folder, environment=environment, fault=fault, limits=limits)
    try:
        if meanwhile is not None:
            meanwhile(process)
        process.join(seconds)
        code = process.exitcode
    finally:
        try:
            assert process.pid is not None
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.join()
        process.close()
    output = log.read_text(errors="replace") if log.exists() else ""
    return Ended(code, output), json.loads(calls.read_text()) if calls.exists() else {}


def start(
    words: list[str],
    *,
    log: Path,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    fault: Fault | None = None,
    limits: Mapping[int, int] | None = None,
    prepare: Callable[[], object] | None = None,
) -> ForkServerProcess:
    """Start `fasttrain WORDS` in a forked process; `prepare` is called in it before the command."""
    arguments = (words, log, folder, dict(environment or {}), fault, dict(limits or {}), prepare)
    process = context().Process(target=_command, args=arguments)
    process.start()
    return process


def _command(
    words: list[str],
    log: Path,
    folder: Path | None,
    environment: dict[str, str],
    fault: Fault | None,
    limits: dict[int, int],
    prepare: Callable[[], object] | None,
) -> None:
    """Run one command in this process."""
    os.setsid()
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    os.close(opened)
    os.environ.update(environment)
    if folder is not None:
        os.chdir(folder)
    from fasttrain.__main__ import main

    shim = None
    if fault is not None:
        shim = ctypes.CDLL(None)
        shim.shim_calls.restype = ctypes.c_long
        shim.shim_arm(
            os.fsencode(fault.prefix),
            OPERATIONS.index(fault.operation),
            fault.error,
            ctypes.c_long(fault.first),
            ctypes.c_long(fault.count),
            ctypes.c_long(round(fault.seconds * 1e6)),
        )
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
    if prepare is not None:
        prepare()
    try:
        code = main(words)
    finally:
        figures = {"peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
        if shim is not None:
            shim.shim_disarm()
            figures |= {name: shim.shim_calls(number) for number, name in enumerate(OPERATIONS)}
        if limits:
            # The figures are written under the usual limits.
            for limit in limits:
                resource.setrlimit(limit, (resource.getrlimit(limit)[1],) * 2)
        log.with_suffix(".calls").write_text(json.dumps(figures))
    sys.exit(code)
