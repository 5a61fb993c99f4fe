"""The agreement of several ranks to stop, and what ends a run. The ranks are simulated in one process."""

import os
import pty
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from processes import start
from torch.distributed import HashStore

from fasttrain.distributed import FAILED, World
from fasttrain.stopping import GRACE, Stopping


class SharedStore(HashStore):
    """A store that all ranks of one process share."""

    def clone(self) -> "SharedStore":
        return self


def make_ranks(count: int, stall_timeout: float = 100.0) -> list[Stopping]:
    store = SharedStore()
    worlds = [
        World(rank=rank, size=count, cores=1, device=torch.device("cpu"), store=store)
        for rank in range(count)
    ]
    return [Stopping(world, stall_timeout=stall_timeout, say=lambda line: None) for world in worlds]


def begin_steps(rank: Stopping, count: int) -> None:
    for _ in range(count):
        assert rank.may_begin_step()


def test_all_ranks_stop_after_the_same_step() -> None:
    """The ranks are at different steps, and two are waiting for the third when one receives a signal."""
    ranks = make_ranks(3)
    for rank, steps in zip(ranks, (5, 7, 6), strict=True):
        begin_steps(rank, steps)
    ranks[2].receive(signal.SIGTERM, 0.0)
    for rank in reversed(ranks):
        rank.poll(0.0)
    # Rank 2 polled before the others had announced their steps.
    ranks[2].poll(0.1)
    ranks[1].poll(0.1)
    for rank, remaining in zip(ranks, (2, 0, 1), strict=True):
        begin_steps(rank, remaining)
        assert not rank.may_begin_step()


def test_a_rank_waits_until_the_others_have_announced_their_steps() -> None:
    ranks = make_ranks(2)
    begin_steps(ranks[0], 3)
    begin_steps(ranks[1], 4)
    ranks[0].receive(signal.SIGTERM, 0.0)
    ranks[0].poll(0.0)
    answers: list[bool] = []
    waiting = threading.Thread(target=lambda: answers.append(ranks[0].may_begin_step()))
    waiting.start()
    ranks[1].poll(0.0)
    waiting.join(timeout=0.2)
    assert waiting.is_alive()
    ranks[0].poll(0.2)
    waiting.join(timeout=10)
    assert answers == [True]
    assert not ranks[0].may_begin_step()


def test_without_a_signal_no_rank_stops() -> None:
    ranks = make_ranks(2)
    for now in range(3):
        for rank in ranks:
            begin_steps(rank, 2)
            rank.poll(float(now))


@pytest.mark.parametrize(
    ("progress", "who"), [((3, 2, 3), "rank 1"), ((3, 2, 2), "ranks 1, 2"), ((1, 1, 1), "ranks 0, 1, 2")]
)
def test_the_ranks_that_the_others_wait_for_are_named(progress: tuple[int, ...], who: str) -> None:
    ranks = make_ranks(3, stall_timeout=10)
    for rank, count in zip(ranks, progress, strict=True):
        for _ in range(count):
            rank.advance()
        rank.poll(0.0)
    for now in (1.0, 11.0):
        ranks[0].poll(now)
        assert not ranks[0].world.store.check([FAILED])
    ranks[0].poll(11.5)
    assert ranks[0].world.store.get(FAILED).decode().startswith(f"{who} made no progress for 10 s")


def test_a_slow_rank_is_not_a_hanging_one() -> None:
    ranks = make_ranks(2, stall_timeout=10)
    for now in range(0, 100, 9):
        ranks[now % 2].advance()
        for rank in reversed(ranks):
            rank.poll(float(now))
    assert not ranks[0].world.store.check([FAILED])


def test_a_rank_that_never_starts_is_named() -> None:
    ranks = make_ranks(2, stall_timeout=10)
    ranks[0].advance()
    for now in (0.0, 11.0):
        ranks[0].poll(time.monotonic() + now)
    assert ranks[0].world.store.get(FAILED).decode().startswith("rank 1 made no progress")


@pytest.mark.parametrize("rank", [0, 1])
def test_the_failure_of_another_rank_ends_the_process(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only rank 0 prints the line, after some time in which the process may end by itself."""
    ranks = make_ranks(2)
    ranks[1].world.fail("rank 1 failed (OSError)")
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    ranks[rank].poll(0.1)
    assert not codes
    ranks[rank].poll(0.1 + GRACE)
    assert codes == [1]
    line = "fasttrain: rank 1 failed (OSError), so the run ends. Repeat the command to continue\n"
    assert capsys.readouterr().err == ("" if rank else line)


# A step is a long call of a C function, in which Python calls no signal handler.
PROGRAM = """
import hashlib, signal
from fasttrain.distributed import World
from fasttrain.stopping import SIGNALS, Stopping
# The tests themselves may have been started with `nohup` or in the background, which ignores signals.
for number in SIGNALS:
    signal.signal(number, signal.SIG_DFL)
IGNORED
with Stopping(World.single(), stall_timeout=1, say=lambda line: print(line, flush=True)) as stopping:
    stopping.may_begin_step()
    print("ready", flush=True)
    for _ in range(100):
        hashlib.pbkdf2_hmac("sha256", b"", b"", ITERATIONS)
        if not stopping.may_begin_step():
            print("stopped", flush=True)
            break
"""


def run_with_signals(
    send: Callable[[ForkServerProcess], None], *, ignored: str = "", iterations: int = 500_000
) -> tuple[int, str]:
    program = PROGRAM.replace("IGNORED", ignored).replace("ITERATIONS", str(iterations))
    process, output = start(exec, program, {})
    with output:
        assert output.readline() == "ready\n"
        # A process that hangs is killed, so that the test fails.
        killer = threading.Timer(60, process.kill)
        killer.start()
        send(process)
        text = output.read()
        process.join()
        killer.cancel()
    assert process.exitcode is not None
    return process.exitcode, text


def kill(process: ForkServerProcess, number: signal.Signals) -> None:
    assert process.pid is not None
    os.kill(process.pid, number)


@pytest.mark.parametrize(
    "name",
    [
        "SIGINT",
        "SIGTERM",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2")),
    ],
)
def test_each_signal_stops_after_the_step(name: str) -> None:
    code, output = run_with_signals(lambda process: kill(process, signal.Signals[name]))
    assert (code, output) == (0, f"received {name}; writing a checkpoint after this step\nstopped\n")


def test_a_signal_that_arrives_twice_at_once_counts_once() -> None:
    """torchrun passes on the signals that it receives."""

    def send(process: ForkServerProcess) -> None:
        kill(process, signal.SIGINT)
        time.sleep(0.05)
        kill(process, signal.SIGINT)

    assert run_with_signals(send, iterations=3_000_000)[0] == 0


def test_a_second_signal_ends_the_process_at_once() -> None:
    """Even if the main thread hangs. A warning, such as SIGUSR1, does not count as the first one."""

    def send(process: ForkServerProcess) -> None:
        kill(process, signal.SIGUSR1)
        kill(process, signal.SIGTERM)
        # On a busy machine, SIGTERM may be handled late, and the first SIGINT then counts as the same signal.
        process.join(1.2)
        while process.is_alive():
            kill(process, signal.SIGINT)
            process.join(1.2)

    code, output = run_with_signals(send, iterations=10**9)
    assert code == 128 + signal.SIGINT
    assert output.endswith("fasttrain: ended at once, because SIGINT was the second signal\n")


def test_an_ignored_signal_stays_ignored() -> None:
    """As for a command that `nohup` starts."""

    def send(process: ForkServerProcess) -> None:
        kill(process, signal.SIGHUP)
        time.sleep(0.5)
        kill(process, signal.SIGUSR1)

    code, output = run_with_signals(send, ignored="signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    assert (code, output) == (0, "received SIGUSR1; writing a checkpoint after this step\nstopped\n")


def test_handlers_are_restored() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)]
    with Stopping(World.single(), stall_timeout=1, say=print):
        assert signal.getsignal(signal.SIGINT) is not handlers[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)] == handlers
    assert signal.set_wakeup_fd(-1) == -1


def test_a_closed_terminal_stops_the_run() -> None:
    """Nothing can be printed any more when SIGHUP arrives."""
    program = PROGRAM.replace("IGNORED", "import pathlib, sys").replace("ITERATIONS", "500_000")
    with tempfile.TemporaryDirectory() as folder:
        done = Path(folder) / "done"
        program += f"pathlib.Path({str(done)!r}).touch()\n"
        child, terminal = pty.fork()
        if child == 0:
            os.execv(sys.executable, [sys.executable, "-c", program])
        output = b""
        while not output.endswith(b"\n"):
            output += os.read(terminal, 100)
        os.close(terminal)
        _, status = os.waitpid(child, 0)
        assert (status, done.exists()) == (0, True)
