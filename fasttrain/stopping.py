"""When a run stops early: signals, and the agreement of all ranks on the step after which they stop.

A signal reaches the ranks at different times, and the host of one rank may be several steps ahead of
another's. If one of them stopped by itself, the others would wait forever in an operation of all ranks.
Therefore, each rank announces how many steps it has begun and begins no other; all stop after the largest of
these numbers. The thread of `Stopping` announces it even while the training loop waits for another rank or
for the device. It uses a key-value store on the host, several times per second. The training loop itself only
takes a lock per step.

The same thread ends the process if another rank has failed, or if no rank makes progress.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack

from fasttrain.distributed import FAILED, StoreError, World

# SLURM (--signal), submitit and a closed terminal send the latter three. A handler is needed for each,
# because their default action ends the process.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# If one of these follows another, the process ends at once. The other signals are early warnings, which the
# scheduler follows up with SIGTERM.
URGENT = (signal.SIGINT, signal.SIGTERM)
# torchrun passes on the signals that it receives, so a Ctrl-C arrives twice. Within this many seconds,
# signals count as one.
SAME_SIGNAL = 1.0
# Seconds between two looks at the store.
INTERVAL = 0.2
# Seconds that the training loop has to report an error itself after another rank has failed.
GRACE = 5.0


class Stopping:
    """Decides, together with the other ranks, whether to begin another step. Use it as a context manager.

    Args:
        world: This process among those of the run.
        stall_timeout: Seconds without progress of any rank after which a run of several processes ends.
        say: Prints a line on rank 0.
    """

    def __init__(self, world: World, *, stall_timeout: float, say: Callable[[str], None]) -> None:
        self.world, self.stall_timeout, self.say = world, stall_timeout, say
        self._store = world.connect()
        self._lock = threading.Lock()
        self._begun = 0  # steps that this rank has begun
        self._announced = False  # whether the other ranks know `_begun`; from then on, it must not grow
        self._agreed = threading.Event()
        self._last = 0  # number of steps after which all ranks stop, once it is agreed
        self._requested = False
        self._urgent_since: float | None = None  # when the first of URGENT arrived
        self._progress = 0  # grows whenever the training loop completes some part of its work
        self._seen: tuple[list[int], float] = [], time.monotonic()  # progress of all ranks, and since when
        self._failed_since: float | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Stopping:
        wake, self._woken = socket.socketpair()
        for end in (wake, self._woken):
            end.setblocking(False)
        watcher = threading.Thread(target=self._watch, name="stopping", daemon=True)
        # Called in reverse order: the thread ends when `wake` is closed.
        self._stack.callback(self._woken.close)
        self._stack.callback(watcher.join)
        self._stack.callback(wake.close)
        # In another thread, as of a web application, Python does not allow handlers.
        if threading.current_thread() is threading.main_thread():
            self._handle_signals(wake)
        watcher.start()
        return self

    def _handle_signals(self, wake: socket.socket) -> None:
        # Python calls handlers only between two instructions of the main thread, which may be waiting for a
        # rank or a disk. It writes the number of the signal to this socket at once.
        self._stack.callback(
            signal.set_wakeup_fd, signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        )
        for number in SIGNALS:
            # `nohup` sets SIGHUP to be ignored, and it must stay so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._stack.callback(signal.signal, number, signal.signal(number, self._interrupt))

    def _interrupt(self, number: int, _: object) -> None:
        """Handle a signal in the main thread: a second Ctrl-C in a notebook interrupts the step."""
        if _keeps_process(number) and self._is_second(time.monotonic()):
            raise KeyboardInterrupt

    def _is_second(self, now: float) -> bool:
        """Return whether one of URGENT arrived before, and not only just now."""
        return self._urgent_since is not None and now - self._urgent_since > SAME_SIGNAL

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def may_begin_step(self) -> bool:
        """Return whether to take another step. Call it once before each step."""
        with self._lock:
            if not self._announced:
                self._begun += 1
                return True
        self._agreed.wait()
        if self._begun < self._last:
            self._begun += 1
            return True
        return False

    def advance(self) -> None:
        """Note that the training loop has completed some part of its work, such as reading a batch."""
        self._progress += 1

    # --- the thread ---

    def _watch(self) -> None:
        """Run `_serve`, and end the process if it fails."""
        try:
            self._serve()
        except BaseException:
            # Without this thread, the run could neither be stopped nor end.
            try:
                traceback.print_exc()
            finally:
                os._exit(1)

    def _serve(self) -> None:
        """Handle signals as they arrive, and look at the store at regular intervals."""
        interval = None if self._store is None else INTERVAL
        while True:
            is_woken = bool(select.select([self._woken], [], [], interval)[0])
            numbers = self._woken.recv(64) if is_woken else b""
            if is_woken and not numbers:  # `__exit__` has closed the other end.
                return
            try:
                for number in numbers:
                    self.receive(number, time.monotonic())
                self.poll(time.monotonic())
            except StoreError as error:
                reason = str(error).partition("\n")[0]
                line = f"rank {self.world.rank} lost contact with rank 0 or with torchrun ({reason})"
                self._end(f"{line}. Repeat the command to continue")

    def receive(self, number: int, now: float) -> None:
        """Handle a signal."""
        if number not in SIGNALS:
            return
        name = signal.Signals(number).name
        if number in URGENT:
            if self._is_second(now) and not _keeps_process(number):
                self._end(f"ended at once, because {name} was the second signal", 128 + number)
            if self._urgent_since is None:
                self._urgent_since = now
        first, self._requested = not self._requested, True
        if number == signal.SIGHUP:
            _replace_closed_terminal()
        # If another rank has failed, torchrun sends SIGTERM, and no step will end.
        if first and not (self._store is not None and self._store.check([FAILED])):
            self.say(f"received {name}; writing a checkpoint after this step")

    def poll(self, now: float) -> None:
        """Exchange with the other ranks what has changed since the last call."""
        if self._store is None:
            if self._requested:
                self._announce()
                self._last = self._begun
                self._agreed.set()
            return
        ranks = range(self.world.size)
        if self._store.check([FAILED]):
            self._follow(self._store.get(FAILED).decode(), now)
        if not self._announced and (self._requested or self._store.check(["stop"])):
            self._store.set("stop", "")
            self._store.set(f"begun/{self.world.rank}", str(self._announce()))
        if self._announced and not self._agreed.is_set():
            keys = [f"begun/{rank}" for rank in ranks]
            if self._store.check(keys):
                self._last = max(int(value) for value in self._store.multi_get(keys))
                self._agreed.set()
        self._store.set(f"progress/{self.world.rank}", str(self._progress))
        # Two ranks look, so that a rank 0 that is frozen as a whole is found, too.
        if self.world.rank < 2:
            self._look_for_stall(now)

    def _announce(self) -> int:
        """Begin no further step until the ranks agree; return the number of steps that have begun."""
        with self._lock:
            self._announced = True
            return self._begun

    def _look_for_stall(self, now: float) -> None:
        """Declare the run failed if no rank has made progress for `stall_timeout` seconds."""
        assert self._store is not None
        # Adding 0 reads a number. That of a rank that has not started is 0.
        progress = [self._store.add(f"progress/{rank}", 0) for rank in range(self.world.size)]
        last, since = self._seen
        if progress != last:
            self._seen = progress, now
        elif now - since > self.stall_timeout:
            # The others wait for the ranks that are behind.
            behind = [str(rank) for rank, count in enumerate(progress) if count == min(progress)]
            who = f"rank {behind[0]}" if len(behind) == 1 else f"ranks {', '.join(behind)}"
            reason = f"{who} made no progress for {self.stall_timeout:g} s (train.stall_timeout)"
            # Not `world.fail`, because the main thread may be waiting for the store of `world`.
            self._store.compare_set(FAILED, "", reason)

    def _follow(self, failure: str, now: float) -> None:
        """End this process some time after another rank has failed, unless it ends by itself."""
        self._failed_since = self._failed_since or now
        if now - self._failed_since >= GRACE:
            self._end(
                f"{failure}, so the run ends. Repeat the command to continue" if self.world.is_main else ""
            )

    def _end(self, line: str, code: int = 1) -> None:
        """End the process although the training loop is waiting for something."""
        try:
            if line:
                print(f"fasttrain: {line}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)


def _keeps_process(number: int) -> bool:
    """Return whether the process survives a second signal: in a notebook, it has the user's variables."""
    return number == signal.SIGINT and hasattr(sys, "ps1")


def _replace_closed_terminal() -> None:
    """Send the output to nowhere if its terminal is gone, so that printing does not end the run."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
