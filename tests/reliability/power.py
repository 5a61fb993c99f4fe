"""Loss of power at random moments: the repeated command ends with the same files as an undisturbed one.

A process records its file operations and is killed. Then the disk is set back to a state that POSIX allows
after a loss of power: a file keeps what was in it at its last fsync, and any of what was written later. Of
the names that were created, changed or removed in a folder since its last fsync, the first ones are kept.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from reliability.attempts import Attempt, attempt, changed_path
from reliability.kill import ending, kill_once, run_workload
from reliability.workloads import WORKLOADS, Workload, difference, result, write_sources

# The number of losses of power by workload.
LOSSES = {
    "train": 16,
    "train two backbones": 8,
    "pack": 8,
    "pack two shares": 6,
    "export": 4,
    "eval retrieval": 6,
    "eval davis": 3,
}


def run(folder: Path) -> dict[str, Any]:
    write_sources(folder / "sources")
    failures: list[str] = []
    hits: Counter[str] = Counter()
    for name, wanted in LOSSES.items():
        workload = WORKLOADS[name]
        hits[name], lines = run_workload(workload, folder, wanted, lose_once)
        failures += lines or lose_at_the_end(workload, folder)
    return {"failures": failures, "trials": hits.total(), "losses_by_workload": dict(hits)}


def lose_once(
    workload: Workload,
    folder: Path,
    whole: Attempt,
    draw: random.Random,
    prepare: Callable[[], object] | None = None,
) -> Attempt:
    """Run a workload, kill all its processes at a random moment, and lose what is not on disk."""
    disk = Disk(folder)
    recording = functools.partial(_record, folder, disk.journal, prepare)
    killed = kill_once(workload, folder, whole, draw, recording, all_at_once=True)
    disk.lose_power(draw)
    return killed


def lose_at_the_end(
    workload: Workload, folder: Path, prepare: Callable[[], object] | None = None
) -> list[str]:
    """Lose power after a workload has ended; return a failure if its results are not all on disk."""
    name = workload.name.replace(" ", "-")
    here = folder / f"{name}-ended"
    disk = Disk(here)
    ended = attempt(workload, here, prepare=functools.partial(_record, here, disk.journal, prepare))
    if any(ended.codes):
        return [f"{workload.name}: {ending(ended)}"]
    disk.lose_power(random.Random(f"{name} at the end"))
    expected, found = result(folder / f"{name}-whole"), result(here)
    # The last deletion of a checkpoint may be lost. Repeating the command makes up for it.
    differing = difference(expected, {path: content for path, content in found.items() if path in expected})
    if not differing:
        attempt(workload, here, prepare=prepare)
        differing = difference(expected, result(here))
    return [f"{workload.name}, power lost after its end: {differing}"] if differing else []


class Disk:
    """What is on disk in a folder, given that everything in it is now and that a journal is kept."""

    FOLDER = -1

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self.journal = root.with_name(f"{root.name}.journal")
        shutil.rmtree(self.journal, ignore_errors=True)
        self.journal.mkdir()
        # Names on disk and as processes see them -> number of a file. Its content on disk.
        self.names: dict[str, int] = {}
        self.contents: list[bytes] = []
        for path in sorted(root.rglob("*")):
            self.names[str(path)] = self.FOLDER if path.is_dir() else self._add(path.read_bytes())
        self.seen = dict(self.names)
        # Files that were opened for writing since their last fsync.
        self.written: set[int] = set()
        # Changes of the names in a folder since its last fsync: old name, new name, file.
        self.changes: dict[str, list[tuple[str | None, str | None, int]]] = defaultdict(list)

    def lose_power(self, draw: random.Random) -> None:
        """Replace the folder by what is left of it after a loss of power."""
        for event, path, detail in self._events():
            self._replay(event, path, detail)
        # What the processes saw last, all of which may have reached the disk.
        latest = {
            file: Path(path).read_bytes()
            for path, file in self.seen.items()
            if file in self.written and Path(path).is_file()
        }
        for folder in sorted(self.changes):
            self._keep(folder, draw.randint(0, len(self.changes[folder])))
        shutil.rmtree(self.root)
        self.root.mkdir()
        for path, file in sorted(self.names.items()):
            # A folder that was lost takes along what was in it.
            if not Path(path).parent.is_dir():
                continue
            if file == self.FOLDER:
                Path(path).mkdir()
                continue
            content = self.contents[file]
            if file in self.written:
                later = latest.get(file, content)
                content = draw.choice([content, later, later[: len(later) // 2], bytes(len(later))])
            Path(path).write_bytes(content)

    def _add(self, content: bytes) -> int:
        self.contents.append(content)
        return len(self.contents) - 1

    def _events(self) -> Iterator[tuple[str, str, Any]]:
        path = self.journal / "events"
        for line in path.read_text().splitlines() if path.exists() else ():
            yield tuple(json.loads(line))

    def _replay(self, event: str, path: str, detail: Any) -> None:
        folder = os.path.dirname(path)
        file = self.seen.get(path)
        if event == "open":
            if file is None:
                file = self.seen[path] = self._add(b"")
                self.changes[folder].append((None, path, file))
            self.written.add(file)
        elif event == "os.mkdir" and file is None:
            self.seen[path] = self.FOLDER
            self.changes[folder].append((None, path, self.FOLDER))
        elif event == "os.remove" and file is not None:
            self.changes[folder].append((path, None, self.seen.pop(path)))
        elif event == "os.rename" and file is not None:
            assert os.path.dirname(detail) == folder
            self.seen[detail] = self.seen.pop(path)
            self.changes[folder].append((path, detail, file))
        elif event == "fsync" and path in self.seen and file != self.FOLDER:
            assert file is not None
            self.contents[file] = (self.journal / detail).read_bytes()
            self.written.discard(file)
        elif event == "fsync" and detail is None:
            self._keep(path, len(self.changes[path]))

    def _keep(self, folder: str, count: int) -> None:
        """Put the first `count` changes of the names in a folder on disk, and forget the others."""
        for old, new, file in self.changes.pop(folder, [])[:count]:
            if old is not None:
                self.names.pop(old, None)
            if new is not None:
                self.names[new] = file


def _record(folder: Path, journal: Path, prepare: Callable[[], object] | None) -> None:
    """Record the file operations of this process below `folder` in a journal."""
    root = str(folder)
    file = os.open(journal / "events", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    lock = threading.RLock()
    fsync = os.fsync
    count = 0

    def write(event: str, path: str, detail: str | None = None) -> None:
        # One call, because several processes may write to the same journal.
        os.write(file, f"{json.dumps([event, path, detail])}\n".encode())

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        path = changed_path(event, arguments, root)
        if path is not None:
            target = os.path.abspath(os.fsdecode(arguments[1])) if event == "os.rename" else None
            write(event, path, target)

    def recorded_fsync(descriptor: int) -> None:
        nonlocal count
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not path.startswith(root):
            return fsync(descriptor)
        with lock:
            if os.path.isdir(path):
                return write("fsync", path)
            count += 1
            copy = f"{os.getpid()}-{count}"
            shutil.copyfile(path, journal / copy)
            return write("fsync", path, copy)

    sys.addaudithook(audit)
    os.fsync = recorded_fsync
    if prepare is not None:
        prepare()
