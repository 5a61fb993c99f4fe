"""Read ten thousand damaged files, drawn by a fixed seed, through fasttrain's functions and commands.

Each input must be read, skipped and named, or refused with one line. Failures are an exception that fasttrain
does not report, a crash, more than 20 seconds, more than 1 GB of additional memory, and code that runs from a
pickle. The content of each failing input is kept in the folder of the part.

To repeat the inputs of some kinds, or a single one, with another seed:

    PYTHONPATH=tests python -m reliability.fuzz [--seed N] [KIND | KIND/NUMBER ...]
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from reliability import inputs, trials

WORKERS = 2
SECONDS, COMMAND_SECONDS = 20.0, 60.0
MEMORY = 1_000_000_000
# One in so many inputs goes through the command line.
COMMAND_EVERY = 100
FORK = multiprocessing.get_context("fork")

Input = tuple[str, int]


@dataclass
class Results:
    """The outcomes by kind, and the failures by what went wrong."""

    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    failures: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    slowest: tuple[float, str] = (0.0, "")

    def add(self, one: Input, outcome: str, problem: str | None, seconds: float) -> None:
        kind, number = one
        self.outcomes[kind][outcome] += 1
        self.seconds[kind] += seconds
        if not is_command(one):
            self.slowest = max(self.slowest, (round(seconds, 1), f"{kind}/{number}"))
        if problem is not None:
            self.failures[f"{kind}: {problem}"].append(f"{kind}/{number}")

    def lines(self) -> list[str]:
        return [
            f"{problem} ({len(names)} inputs, such as {', '.join(names[:3])})"
            for problem, names in sorted(self.failures.items(), key=lambda entry: -len(entry[1]))
        ]


def run(folder: Path, *, seed: int = 0, chosen: list[Input] | None = None) -> dict[str, Any]:
    todo = chosen or [(kind, i) for kind, of in inputs.KINDS.items() for i in range(of.count)]
    # Shuffled, so that an interrupted run has read some inputs of each kind.
    random.Random(seed).shuffle(todo)
    # A child prepares the files, because a process that has started threads should not fork.
    seeds = in_child(prepare, folder, sorted({kind for kind, _ in todo}))
    results, seconds = Results(), time.monotonic()
    workers = [Worker(folder, name, seed, seeds) for name in range(min(WORKERS, len(todo)))]
    said = time.monotonic()
    while todo or any(worker.current for worker in workers):
        if time.monotonic() - said > 30:
            said = time.monotonic()
            print(f"fuzz: {len(todo)} inputs left, {len(results.failures)} kinds of failures", flush=True)
        for worker in workers:
            if worker.current is None and todo:
                worker.start(todo.pop())
        wait([worker.connection for worker in workers], timeout=0.02)
        for worker in workers:
            if worker.current is not None:
                worker.check(results)
    for worker in workers:
        worker.stop()
    kinds = {
        kind: {
            "inputs": sum(counts.values()),
            **{name: counts[name] for name in ("read", "skipped", "refused")},
            "seconds": round(results.seconds[kind], 1),
        }
        for kind, counts in sorted(results.outcomes.items())
    }
    total = sum(of["inputs"] for of in kinds.values())
    rate = round(total / (time.monotonic() - seconds), 1)
    # Most inputs of a kind can be damaged beyond reading, but not all.
    unread = [f"{kind}: none was read" for kind, counts in results.outcomes.items() if not counts["read"]]
    return {
        "failures": results.lines() + ([] if chosen else unread),
        "seed": seed,
        "trials": total,
        "inputs_per_second": rate,
        "slowest": results.slowest,
        "kinds": kinds,
    }


def prepare(folder: Path, kinds: list[str]) -> dict[str, inputs.Seeds]:
    """Write the surrounding files of each kind, and return the intact inputs."""
    seeds = {}
    for kind in kinds:
        template = folder / "templates" / kind
        template.mkdir(parents=True)
        seeds[kind] = inputs.KINDS[kind].prepare(template)
    return seeds


def in_child(function: Any, *arguments: Any) -> Any:
    """Call a function in a forked process."""
    receiving, sending = FORK.Pipe(duplex=False)
    process = FORK.Process(target=lambda: sending.send(function(*arguments)))
    process.start()
    sending.close()
    try:
        return receiving.recv()
    finally:
        process.join()


class Worker:
    """A forked process that reads one input at a time. It is started anew after a crash."""

    def __init__(self, folder: Path, name: int, seed: int, seeds: dict[str, inputs.Seeds]) -> None:
        self.arguments = folder, folder / f"worker {name}", seed, seeds
        self.failed = folder / "failed"
        self.current: Input | None = None
        self._fork()

    def _fork(self) -> None:
        self.connection, theirs = FORK.Pipe()
        self.process = FORK.Process(target=serve, args=(theirs, *self.arguments), daemon=False)
        self.process.start()
        theirs.close()

    def start(self, one: Input) -> None:
        self.current, self.started = one, time.monotonic()
        self.memory = resident(self.process.pid)
        self.connection.send(one)

    def check(self, results: Results) -> None:
        """Take the result of the current input, or end the process if it takes too much time or memory."""
        assert self.current is not None
        one, problem = self.current, None
        if self.connection.poll():
            try:
                outcome, problem = self.connection.recv()
            except EOFError:
                self.process.join()
                code = self.process.exitcode or 0
                problem = f"crash: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
        else:
            limit = COMMAND_SECONDS if is_command(one) else SECONDS
            if time.monotonic() - self.started > limit:
                problem = f"hang: more than {limit:.0f} seconds"
            elif resident(self.process.pid) - self.memory > MEMORY:
                problem = f"memory: more than {MEMORY} additional bytes"
            else:
                return
            # Where it was is in the log of the worker.
            os.kill(self.process.pid or 0, signal.SIGUSR1)
            time.sleep(0.2)
            self.process.kill()
            self.process.join()
        if not self.process.is_alive():
            outcome = "failed"
            self.connection.close()
            self._keep(one)
            self._fork()
        results.add(one, outcome, problem, time.monotonic() - self.started)
        self.current = None

    def _keep(self, one: Input) -> None:
        """Keep the content of the input that ended the process."""
        _, _, seed, seeds = self.arguments
        keep(self.failed, one, *damaged(one, seed, seeds, self.failed.parent / "marker"))

    def stop(self) -> None:
        self.connection.send(None)
        self.process.join()


def resident(pid: int | None) -> int:
    """Return the resident memory of a process in bytes."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def is_command(one: Input) -> bool:
    return one[1] % COMMAND_EVERY == COMMAND_EVERY - 1


def damaged(one: Input, seed: int, seeds: dict[str, inputs.Seeds], marker: Path) -> tuple[str, bytes]:
    """Return the path of an input, relative to the folder of its kind, and its content."""
    kind, number = one
    return inputs.KINDS[kind].damage(seeds[kind], random.Random(f"{seed} {kind} {number}"), str(marker))


def keep(folder: Path, one: Input, name: str, data: bytes) -> None:
    path = folder / f"{one[0]}-{one[1]}" / Path(name).name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


# --- in the worker ---


def serve(connection: Connection, folder: Path, own: Path, seed: int, seeds: dict[str, inputs.Seeds]) -> None:
    """Read the inputs that arrive on a connection, and answer each with its outcome."""
    own.mkdir(exist_ok=True)
    # No power failure is tested here, and waiting for the disk takes a third of the time.
    os.fsync = lambda file: None
    os.environ["XDG_CACHE_HOME"] = str(own / "cache")
    log = os.open(own / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    marker = folder / "marker"
    while True:
        one = connection.recv()
        if one is None:
            return
        kind, _ = one
        work = own / kind
        if not work.exists():
            shutil.copytree(folder / "templates" / kind, work)
        name, data = damaged(one, seed, seeds, marker)
        outcome, problem = read(one, work, name, data)
        if marker.exists():
            marker.rmdir() if marker.is_dir() else marker.unlink()
            problem = "executed: the input ran code"
        if problem is not None:
            keep(folder / "failed", one, name, data)
            print(f"{kind}/{one[1]}: {problem}", file=sys.stderr, flush=True)
        connection.send((outcome, problem))


def read(one: Input, work: Path, name: str, data: bytes) -> tuple[str, str | None]:
    """Read one input. Returns its outcome and what went wrong, if anything did."""
    kind = inputs.KINDS[one[0]]
    outcome = inputs.Outcome()
    before = resident(os.getpid())
    # Resets the peak of the resident memory.
    Path("/proc/self/clear_refs").write_text("5")
    with inputs.replaced(work / name, data):
        if is_command(one):
            return run_command(kind.command(work, name), work)
        try:
            kind.read(work, name, outcome)
        except Exception as error:
            print(*traceback.format_exception(error), sep="", file=sys.stderr, flush=True)
            return "failed", describe(error)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.split("\n") if line.startswith("VmHWM"))
    if peak - before > MEMORY:
        return outcome.name, f"memory: more than {MEMORY} additional bytes"
    return outcome.name, None


def run_command(words: list[str], work: Path) -> tuple[str, str | None]:
    for results in ("run", "new run", "packed again", "results"):
        if not (work.parents[1] / "templates" / work.name / results).exists():
            shutil.rmtree(work / results, ignore_errors=True)
    ended = trials.run([*trials.FASTTRAIN, *words], seconds=COMMAND_SECONDS)
    if ended.is_clean_refusal:
        return "refused", None
    if ended.code == 0 and "Traceback" not in ended.output:
        return "skipped" if "skipped" in ended.output or "unreadable" in ended.output else "read", None
    last = (ended.output.strip().split("\n") or [""])[-1]
    return "failed", f"command: exit code {ended.code}: {last[:200]}"


def describe(error: Exception) -> str:
    """Describe an exception by its type, its message and the line of fasttrain that let it through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}fasttrain{os.sep}" in frame.filename]
    place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "the harness"
    first = str(error).split("\n")[0][:120]
    return f"{type(error).__name__} at {place}: {first}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "chosen", nargs="*", metavar="KIND[/NUMBER]", help=f"one of {', '.join(inputs.KINDS)}"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chosen: list[Input] = []
    for word in arguments.chosen:
        kind, _, number = word.partition("/")
        chosen += [(kind, int(number))] if number else [(kind, i) for i in range(inputs.KINDS[kind].count)]
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    result = run(folder, seed=arguments.seed, chosen=chosen or None)
    for kind, counts in result["kinds"].items():
        print(f"{kind}: {counts}")
    print(
        *result["failures"], f"{result['trials']} inputs, {result['inputs_per_second']} per second", sep="\n"
    )
    print(f"failing inputs are in {folder / 'failed'}" if result["failures"] else "no failures")


if __name__ == "__main__":
    main()
