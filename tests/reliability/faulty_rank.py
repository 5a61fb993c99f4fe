"""fasttrain with a fault in one rank.

python -m reliability.faulty_rank FAULT RANK RECIPE [KEY=VALUE ...]
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

from fasttrain.__main__ import main
from fasttrain.backbone_trainer import BackboneTrainer
from fasttrain.errors import LocalInputError
from fasttrain.trainer import Trainer

STEP = 3


def sleep() -> None:
    time.sleep(3600)


def fail() -> None:
    raise RuntimeError("planted fault")


def refuse() -> None:
    raise LocalInputError("planted refusal")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_step(action: Callable[[], None], *, every_step: bool = False) -> None:
    """Call `action` at the beginning of a step."""
    train_step = Trainer.train_step

    def faulty(self: Trainer, step_index: int, *, diagnostics: bool) -> None:
        if every_step or step_index == STEP:
            action()
        train_step(self, step_index, diagnostics=diagnostics)

    Trainer.train_step = faulty  # type: ignore[method-assign]


def in_save(action: Callable[[], None]) -> None:
    BackboneTrainer.save = lambda *_: action()  # type: ignore[assignment, method-assign]


FAULTS: dict[str, Callable[[], object]] = {
    "none": lambda: None,
    "raises": lambda: in_step(fail),
    "refuses": lambda: in_step(refuse),
    "dies": lambda: in_step(die),
    "hangs": lambda: in_step(sleep),
    "hangs in a save": lambda: in_save(sleep),
    "fails in a save": lambda: in_save(fail),
    "is slow": lambda: in_step(lambda: time.sleep(0.4), every_step=True),
    "sees other files": lambda: sys.argv.append(f"data.source={os.environ['OTHER_SOURCE']}"),
}

if __name__ == "__main__":
    fault, rank, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank:
        sys.argv[:] = [sys.argv[0], *arguments]
        FAULTS[fault]()
        arguments = sys.argv[1:]
    sys.exit(main(arguments))
