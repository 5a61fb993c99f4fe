"""The harness is itself checked: with a fault planted in fasttrain, it must report failures."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from reliability import kill, power, terminate
from reliability.workloads import WORKLOADS, write_sources

# How many interruptions are tried. The first failure ends the search.
ATTEMPTS = 20
SIGNALS = 2


def run(folder: Path) -> dict[str, Any]:
    write_sources(folder / "sources")
    found: dict[str, str] = {}
    for name, (part, workload, plant) in FAULTS.items():
        here = folder / name.replace(" ", "-")
        here.mkdir()
        (here / "sources").symlink_to(folder / "sources")
        failures = _try(part, workload, here, plant)
        found |= {name: failures[0]} if failures else {}
    return {
        "failures": [f"not noticed: {name}" for name in FAULTS if name not in found],
        "trials": len(FAULTS),
        "noticed": found,
    }


def _try(part: str, workload: str, folder: Path, plant: Callable[[], None]) -> list[str]:
    """Return the failures that a part of the harness reports while a fault is planted."""
    if part == "terminate":
        return terminate.run_workload(terminate.SINGLE, folder, SIGNALS, terminate.signal_forked, plant)[0]
    interrupt = {"kill": kill.kill_once, "power": power.lose_once}[part]
    chosen = WORKLOADS[workload]
    _, failures = kill.run_workload(chosen, folder, ATTEMPTS, interrupt, plant, until_failure=True)
    return failures


# --- the faults; each function patches fasttrain in the process that runs the command ---


def _no_fsync() -> None:
    os.fsync = lambda descriptor: None


def _no_fsync_of_folders() -> None:
    from fasttrain import files

    files._fsync_folder = lambda folder: None


def _no_fsync_of_metrics() -> None:
    from fasttrain.loggers import MetricsLog

    MetricsLog.sync = lambda self: None  # type: ignore[method-assign]


def _patch_writing(opened: Callable[[Path], Any]) -> None:
    """Replace `open_atomically` wherever it has been imported."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fasttrain") and hasattr(module, "open_atomically"):
            module.open_atomically = contextmanager(opened)  # type: ignore[attr-defined]


def _rename_before_write() -> None:
    from fasttrain.files import make_folder

    def opened(path: Path) -> Iterator[BinaryIO]:
        make_folder(path.parent)
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("wb") as file:
            os.replace(partial, path)
            yield file

    _patch_writing(opened)


def _plain_write() -> None:
    from fasttrain.files import make_folder

    def opened(path: Path) -> Iterator[BinaryIO]:
        make_folder(path.parent)
        with path.open("wb") as file:
            yield file

    _patch_writing(opened)


def _swallowed_error() -> None:
    """Save only the first checkpoint of each process; let the errors of the others go unnoticed."""
    from fasttrain import backbone_trainer

    save = backbone_trainer.save_checkpoint
    saved: list[int] = []

    def save_once(folder: Path, completed_steps: int, state: dict[str, Any]) -> Path:
        saved.append(completed_steps)
        return save(folder, completed_steps, state) if len(saved) == 1 else folder

    backbone_trainer.save_checkpoint = save_once


def _wrong_step() -> None:
    from fasttrain.trainer import Trainer

    resume = Trainer._resume
    Trainer._resume = lambda self: max(0, resume(self) - 1)  # type: ignore[method-assign]


def _patch_state(change: Callable[[dict[str, Any]], object]) -> None:
    from fasttrain import trainer

    load = trainer.load_checkpoint

    def changed(folder: Path, completed_steps: int) -> dict[str, Any]:
        state = load(folder, completed_steps)
        change(state)
        return state

    trainer.load_checkpoint = changed


def _bad_samples_forgotten() -> None:
    _patch_state(lambda state: state.pop("bad_samples"))


def _moments_forgotten() -> None:
    _patch_state(lambda state: state["optimizer"]["state"].clear())


def _wrong_video() -> None:
    from fasttrain.data.packed import ShardIndex

    read = ShardIndex.read

    def wrong(shard: Path) -> ShardIndex:
        index = read(shard)
        return dataclasses.replace(index, videos_done=index.videos_done - 1)

    ShardIndex.read = staticmethod(wrong)  # type: ignore[assignment, method-assign]


def _partial_shard() -> None:
    """Write the index of a shard, which declares it complete, before the shard."""
    from fasttrain.data import pack

    write_shard = pack._write_shard

    def write(path: Path, *arguments: Any) -> Any:
        pack.write_atomically(path.with_suffix(".npz"), b"")
        return write_shard(path, *arguments)

    pack._write_shard = write


def _traceback() -> None:
    from fasttrain import trainer

    check = trainer.check_run_folder

    def fail(recipe: Any) -> None:
        if (Path(recipe.output) / "recipe.yaml").exists():
            raise RuntimeError("a bug")
        check(recipe)

    trainer.check_run_folder = fail


def _left_over() -> None:
    from fasttrain import files

    files._remove_abandoned = lambda path: None


def _no_checkpoint() -> None:
    from fasttrain.trainer import Trainer

    Trainer._save = lambda self: None  # type: ignore[method-assign]


def _signal_ignored() -> None:
    from fasttrain import stopping

    stopping.SIGNALS = ()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# Name: the part of the harness that must notice it, the workload, and the function that plants it.
FAULTS: dict[str, tuple[str, str, Callable[[], None]]] = {
    "no fsync": ("power", "train", _no_fsync),
    "no fsync of packed files": ("power", "pack", _no_fsync),
    "no fsync of folders": ("power", "train", _no_fsync_of_folders),
    "no fsync of metrics": ("power", "train", _no_fsync_of_metrics),
    "rename before the content is written": ("kill", "train", _rename_before_write),
    "plain write instead of an atomic one": ("kill", "train", _plain_write),
    "plain write of cached features": ("kill", "eval retrieval", _plain_write),
    "swallowed error of a checkpoint": ("kill", "train", _swallowed_error),
    "resuming from the wrong step": ("kill", "train", _wrong_step),
    "count of bad samples not restored": ("kill", "train", _bad_samples_forgotten),
    "state of the optimiser not restored": ("kill", "train", _moments_forgotten),
    "packing continues with the wrong video": ("kill", "pack", _wrong_video),
    "index of a shard before the shard": ("kill", "pack", _partial_shard),
    "traceback instead of resuming": ("kill", "train", _traceback),
    "temporary files left over": ("kill", "eval retrieval", _left_over),
    "signal ignored": ("terminate", "", _signal_ignored),
    "signal without a checkpoint": ("terminate", "", _no_checkpoint),
}
