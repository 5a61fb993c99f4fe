"""SIGTERM at random moments: the run writes a checkpoint and ends, and no step is lost.

python -m reliability.terminate WORDS     run `fasttrain WORDS` with slow steps that are counted
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reliability import trials
from reliability.attempts import LIMIT, attempt, send
from reliability.kill import ending
from reliability.workloads import Workload, difference, result, train, write_sources

STEPS = 40
# Seconds by which a step is slowed, so that a run lasts long enough for signals.
STEP_SECONDS = 0.04
# A run that has received a signal must have ended after this many seconds, also on a busy machine.
PATIENCE = 20.0
# A signal comes before the last steps, so that it always finds a run under way.
LAST_STEPS = 12
INTERRUPTED = 130
# No checkpoints but those that signals cause, and reports between them.
_WORDS = train(f"train.steps={STEPS}", "train.save_every=1000", "train.keep=1", "train.log_every=7")
_HALF = (*_WORDS, "train.batch_size=2")
SINGLE = Workload("one process", (_WORDS,))
RANKS = Workload("two ranks", (_HALF, _HALF), are_ranks=True)
# Sends a signal to a run and returns a failure, and the seconds from the signal to the end.
Stop = Callable[[Workload, Path, random.Random, Path, Callable[[], object]], tuple[str | None, float]]


def run(folder: Path) -> dict[str, Any]:
    write_sources(folder / "sources")
    failures: list[str] = []
    seconds: list[float] = []
    repeated = 0
    plans = [(SINGLE, 16, signal_forked), (RANKS, 12, signal_forked), (RANKS, 4, signal_torchrun)]
    for workload, wanted, stop in plans:
        lines, times, steps = run_workload(workload, folder, wanted, stop)
        failures += lines
        seconds += times
        repeated += steps
    return {
        "failures": failures,
        "trials": len(seconds),
        "repeated_steps": repeated,
        "slowest_stop_seconds": round(max(seconds, default=0.0), 2),
    }


def run_workload(
    workload: Workload,
    folder: Path,
    wanted: int,
    stop: Stop,
    prepare: Callable[[], object] | None = None,
) -> tuple[list[str], list[float], int]:
    """Send `wanted` signals to runs of a workload, and repeat each run until it has ended by itself.

    Returns the failures, the seconds from each signal to the end, and the number of steps taken twice.
    """
    name = f"{workload.name}, {stop.__name__}"
    whole = folder / f"{name.replace(', ', '-').replace(' ', '-')}-whole"
    undisturbed = attempt(workload, whole)
    if any(undisturbed.codes):
        return [f"{name}: undisturbed: {ending(undisturbed)}"], [], 0
    failures: list[str] = []
    seconds: list[float] = []
    repeated, trial = 0, 0
    while len(seconds) < wanted:
        draw = random.Random(f"{name} {trial}")
        here = whole.with_name(whole.name.replace("whole", f"{trial:03d}"))
        here.mkdir()
        steps = here.with_name(f"{here.name}.steps")
        counted = functools.partial(count_steps, steps, prepare)
        found: list[str] = []
        for _ in range(min(draw.randint(1, 3), wanted - len(seconds))):
            line, waited = stop(workload, here, draw, steps, counted)
            found += [line] if line else []
            seconds.append(waited)
        ended = attempt(workload, here, prepare=counted)
        lost = steps.stat().st_size - STEPS
        repeated += lost
        if any(ended.codes):
            found.append(f"repeated: {ending(ended)}")
        elif differing := difference(result(whole), result(here)):
            found.append(differing)
        if lost:
            found.append(f"{lost} steps were taken twice")
        failures += [f"{name}, trial {trial}: {line}" for line in found]
        if not found:
            shutil.rmtree(here)
        trial += 1
    return failures, seconds, repeated


def signal_forked(
    workload: Workload, folder: Path, draw: random.Random, steps: Path, counted: Callable[[], object]
) -> tuple[str | None, float]:
    """Run a workload and send SIGTERM to all or one of its processes.

    Returns a failure, and the seconds from the signal to the end.
    """
    chosen = draw.choice([range(len(workload.commands)), [draw.randrange(len(workload.commands))]])
    moment = _moment(steps, draw)
    sent = 0.0

    def stop(processes: list[Any]) -> None:
        nonlocal sent
        moment(lambda: all(process.exitcode is None for process in processes))
        for number in chosen:
            send(processes[number], signal.SIGTERM)
        sent = time.monotonic()

    stopped = attempt(workload, folder, prepare=counted, meanwhile=stop)
    waited = time.monotonic() - sent
    if any(code != INTERRUPTED for code in stopped.codes) or waited > PATIENCE:
        return f"after SIGTERM to {list(chosen)}: {ending(stopped)}, {waited:.1f} s", waited
    return _missing(folder, steps), waited


def signal_torchrun(
    workload: Workload, folder: Path, draw: random.Random, steps: Path, counted: Callable[[], object]
) -> tuple[str | None, float]:
    """Run a workload under torchrun, and send SIGTERM to torchrun or to all processes."""
    moment, to_all = _moment(steps, draw), draw.random() < 0.5
    sent = 0.0

    def stop(process: Any) -> None:
        nonlocal sent
        moment(lambda: process.poll() is None)
        if to_all:
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.terminate()
        sent = time.monotonic()
        process.wait(LIMIT)

    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={len(workload.commands)}"]
    ended = trials.run(
        [sys.executable, *launcher, "-m", "reliability.terminate", *workload.commands[0]],
        seconds=LIMIT,
        folder=folder,
        environment={"PYTHONPATH": str(Path(__file__).parents[1]), "COUNTED_STEPS": str(steps)},
        meanwhile=stop,
    )
    waited = time.monotonic() - sent
    if ended.code in (0, None) or waited > PATIENCE:
        return f"torchrun after SIGTERM: exit code {ended.code}, {waited:.1f} s", waited
    return _missing(folder, steps), waited


def _moment(steps: Path, draw: random.Random) -> Callable[[Callable[[], bool]], None]:
    """Return a function that waits until a random moment of a run that continues from `steps`."""
    before = steps.stat().st_size if steps.exists() else 0
    # Once rank 0 has begun a second step, all ranks handle signals. Before, a signal ends the run at once.
    until = draw.randint(before + 2, max(before + 2, STEPS - LAST_STEPS))
    later = draw.uniform(0, STEP_SECONDS)

    def wait(is_running: Callable[[], bool]) -> None:
        limit = time.monotonic() + LIMIT
        while is_running() and time.monotonic() < limit:
            if steps.exists() and steps.stat().st_size >= until:
                break
            time.sleep(0.002)
        time.sleep(later)

    return wait


def _missing(folder: Path, steps: Path) -> str | None:
    """Return a failure unless the newest checkpoint is that of the last step that was begun."""
    saved = sorted(path.name for path in folder.glob("run/checkpoints/*"))
    expected = f"step_{steps.stat().st_size:08d}.pt"
    return None if saved[-1:] == [expected] else f"expected the checkpoint {expected}, found {saved}"


def count_steps(path: Path, prepare: Callable[[], object] | None = None) -> None:
    """Slow down the steps of this process; on rank 0, append a byte to a file for each step begun."""
    from fasttrain.trainer import Trainer

    train_step = Trainer.train_step
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def counted(self: Trainer, step_index: int, *, diagnostics: bool) -> None:
        if self.world.is_main:
            os.write(file, b".")
        time.sleep(STEP_SECONDS)
        train_step(self, step_index, diagnostics=diagnostics)

    Trainer.train_step = counted  # type: ignore[method-assign]
    if prepare is not None:
        prepare()


if __name__ == "__main__":
    from fasttrain.__main__ import main

    count_steps(Path(os.environ["COUNTED_STEPS"]))
    sys.exit(main(sys.argv[1:]))
