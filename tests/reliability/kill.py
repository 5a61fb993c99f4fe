"""SIGKILL at random moments: the repeated command ends with the same files as an undisturbed one."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reliability import trials
from reliability.attempts import LIMIT, Attempt, Moment, attempt
from reliability.trials import kill_group
from reliability.workloads import WORKLOADS, Workload, difference, result, write_sources

# The number of kills by workload.
KILLS = {
    "train": 26,
    "train two backbones": 10,
    "train two ranks": 20,
    "pack": 20,
    "pack two shares": 16,
    "export": 8,
    "eval retrieval": 12,
    "eval davis": 6,
}
# Workloads that are also run and killed from the command line; several ranks with torchrun.
COMMAND_LINES = ("train", "train two ranks", "pack", "eval retrieval")
# At most this many kills before a command may run to its end.
IN_A_ROW = 3
KILLED = -9
Interrupt = Callable[[Workload, Path, Attempt, random.Random, Callable[[], object] | None], Attempt]


def run(folder: Path) -> dict[str, Any]:
    write_sources(folder / "sources")
    failures: list[str] = []
    hits: Counter[str] = Counter()
    for name, wanted in KILLS.items():
        hits[name], lines = run_workload(WORKLOADS[name], folder, wanted)
        failures += lines
    for name in COMMAND_LINES:
        line = run_command_line(WORKLOADS[name], folder)
        hits[f"{name}, from the command line"] = int(line is None)
        failures += [line] if line else []
    return {"failures": failures, "trials": hits.total(), "kills_by_workload": dict(hits)}


def run_workload(
    workload: Workload,
    folder: Path,
    wanted: int,
    interrupt: Interrupt | None = None,
    prepare: Callable[[], object] | None = None,
    *,
    until_failure: bool = False,
) -> tuple[int, list[str]]:
    """Interrupt a workload `wanted` times, and repeat it until it has ended by itself.

    Args:
        workload: What to run.
        folder: Contains the folder `sources`.
        wanted: The number of interruptions that must hit a running process.
        interrupt: How to interrupt it (default: `kill_once`).
        prepare: Called in each process before the command, except for the undisturbed run.
        until_failure: Whether to end at the first failure.

    Returns:
        The number of interruptions that hit, and one line for each failure.
    """
    name = workload.name.replace(" ", "-")
    undisturbed = folder / f"{name}-whole"
    whole = attempt(workload, undisturbed)
    if any(whole.codes):
        return 0, [f"{workload.name}: undisturbed: {ending(whole)}"]
    expected = result(undisturbed)
    hits, trial, failures = 0, 0, []
    while hits < wanted and not (failures and until_failure):
        # Seeded by the trial, so that it can be repeated by itself.
        draw = random.Random(f"{name} {trial}")
        here = folder / f"{name}-{trial:03d}"
        found: list[str] = []
        for _ in range(draw.randint(1, IN_A_ROW)):
            killed = (interrupt or kill_once)(workload, here, whole, draw, prepare)
            hits += killed.codes.count(KILLED)
            if failure := _unexpected(workload, killed):
                found.append(failure)
        ended = attempt(workload, here, prepare=prepare)
        if any(ended.codes):
            found.append(f"repeated: {ending(ended)}")
        elif differing := difference(expected, result(here)):
            found.append(differing)
        failures += [f"{workload.name}, trial {trial}: {line}" for line in found]
        if not found:
            shutil.rmtree(here)
        trial += 1
        if trial > 3 * wanted:
            failures.append(f"{workload.name}: only {hits} of {wanted} interruptions hit a running process")
            break
    return hits, failures


def kill_once(
    workload: Workload,
    folder: Path,
    whole: Attempt,
    draw: random.Random,
    prepare: Callable[[], object] | None = None,
    *,
    all_at_once: bool = False,
) -> Attempt:
    """Run a workload and kill one of its processes, and perhaps the others, at a random moment."""
    victim = draw.randrange(len(workload.commands))
    operations = whole.operations[victim]
    kind = draw.random()
    if kind < 0.3 or not operations:
        moment = Moment(0, draw.uniform(0, whole.seconds))
    else:
        # Before the operation, during it, or while the work after it is done.
        longest = whole.seconds / operations
        seconds = 0.0 if kind < 0.5 else longest * 10 ** draw.uniform(-4, 0)
        moment = Moment(draw.randint(1, operations), seconds)
    # The ranks of a run die together on a node that fails; independent commands may survive.
    together = workload.are_ranks or draw.random() < 0.5
    others = draw.choice([0.0, draw.uniform(0, 0.1)]) if together else None
    if all_at_once:
        others = 0.0
    return attempt(
        workload, folder, victim=victim, moment=moment, others=others, prepare=prepare, slow_disk=kind >= 0.5
    )


def run_command_line(workload: Workload, folder: Path) -> str | None:
    """Kill a workload and its launcher some time after its first file, and repeat it; return a failure."""
    name = workload.name.replace(" ", "-")
    here = folder / f"{name}-command-line"
    here.mkdir()
    draw = random.Random(f"{name} from the command line")
    launcher = [sys.executable, "-m"]
    if workload.are_ranks:
        launcher += [
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={len(workload.commands)}",
            "-m",
        ]
    command = [*launcher, "fasttrain", *workload.commands[0]]

    def kill(process: subprocess.Popen[str]) -> None:
        while process.poll() is None and not any(path.is_file() for path in here.rglob("*")):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        kill_group(process)

    killed = trials.run(command, seconds=LIMIT, folder=here, meanwhile=kill)
    ended = trials.run(command, seconds=LIMIT, folder=here)
    differing = difference(result(folder / f"{name}-whole"), result(here))
    if killed.code != KILLED or ended.code != 0 or differing:
        last = (ended.output.strip().splitlines() or ["no output"])[-1]
        return f"{workload.name}, from the command line: {killed.code}, {ended.code}, {last!r}, {differing}"
    return None


def _unexpected(workload: Workload, killed: Attempt) -> str | None:
    """Return how a process ended that neither was killed nor succeeded, unless its other rank was killed."""
    if all(code in (0, KILLED) for code in killed.codes):
        return None
    if workload.are_ranks and KILLED in killed.codes:
        return None
    return f"while killed: {ending(killed)}"


def ending(ended: Attempt) -> str:
    """Describe how an attempt ended, in one line."""
    lines = ended.output.strip().splitlines() or ["no output"]
    return f"exit codes {ended.codes}, last line {lines[-1]!r}"
