"""Processes that are forked from a server that has imported fasttrain, because the imports take seconds."""

import multiprocessing
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any, TextIO

import torch

from fasttrain.__main__ import main

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["fasttrain.data.pack", "fasttrain.evaluation.command", "fasttrain.evaluation.plots"]
)


def start(function: Callable[..., Any], *arguments: Any) -> tuple[ForkServerProcess, TextIO]:
    """Start a process that calls `function` and exits with what it returns; also return its output."""
    ((process,), output) = _start(function, arguments, [{}])
    return process, output


def run_two_ranks(words: list[Any]) -> None:
    """Run a command in two processes that communicate, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} for rank in "01"]
    processes, output = _start(
        _command, (torch.get_num_threads(), [*map(str, words)]), [rank | address for rank in ranks]
    )
    # A process that hangs is killed, so that the test fails.
    killers = [threading.Timer(300, process.kill) for process in processes]
    for killer in killers:
        killer.start()
    with output:
        text = output.read()
    for process, killer in zip(processes, killers, strict=True):
        process.join()
        killer.cancel()
    assert [process.exitcode for process in processes] == [0, 0], text


def _command(threads: int, words: list[str]) -> int:
    # Another number of threads would sum in another order.
    torch.set_num_threads(threads)
    return main(words)


def _start(
    function: Callable[..., Any], arguments: tuple[Any, ...], environments: list[dict[str, str]]
) -> tuple[list[ForkServerProcess], TextIO]:
    """Start a process for each of the additional environments. All write to the same output."""
    reader, writer = CONTEXT.Pipe(duplex=False)
    processes = [
        CONTEXT.Process(target=_call, args=(writer, os.environ | environment, function, arguments))
        for environment in environments
    ]
    for process in processes:
        process.start()
    writer.close()
    output = os.fdopen(os.dup(reader.fileno()))
    reader.close()
    return processes, output


def _call(
    writer: Connection, environ: Mapping[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ.update(environ)
    for number in (1, 2):
        os.dup2(writer.fileno(), number)
    writer.close()
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    sys.exit(function(*arguments))
